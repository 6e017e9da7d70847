"""FunASR's training dataset, strict: every row of the list is used as it is, or training stops and says which.

Registered under FunASR's own name. What differs from funasr/datasets/fun_asr_datasets/datasets.py (1.4.16):
  * audio that cannot be read stops training; upstream trains on a random other utterance instead;
  * audio at another rate than the frontend's stops training; upstream resamples, differently on different machines;
  * a batch is never cut: upstream drops the last samples of one above batch_size_token_max;
  * `cache_gib` keeps features in memory, where one process re-reads a small corpus every epoch.
"""

from __future__ import annotations

from typing import Any

import funasr  # noqa: F401  fills the registry
import soundfile
from funasr.register import tables

# Upstream's module has two classes of this name, the second hides the first; the registry has both.
Stock = tables.dataset_classes["FunASR"]


@tables.register("dataset_classes", "FunASR")
class FunASR(Stock):
    """One item per row: token ids, labels and LFR features, as upstream makes them."""

    def __init__(self, path: str, cache_gib: float = 0.0, **kwargs: Any):
        super().__init__(path, **kwargs)
        if self.prompt_classes is not None:
            raise ValueError("dataset_conf.prompt_classes adds a context to every prompt that decoding does not have")
        # One try: the second would be a random other row.
        self.retry = 1
        self.batch_size_token_max = float("inf")
        self.cache: dict[int, dict] = {}
        self.cache_left = cache_gib * 2**30

    def __getitem__(self, index: int) -> dict:
        """Features and labels of row `index`. Raises RuntimeError for audio that cannot be used as it is."""
        if index in self.cache:
            return self.cache[index]
        row = self.index_ds[index]
        path = self.pattern.search(row["user"][0]).group(0)[len("<|startofspeech|>!") : -len("<|endofspeech|>")]
        try:
            rate = soundfile.info(path).samplerate
        except (soundfile.LibsndfileError, OSError) as error:
            raise RuntimeError(f"{row.get('key')}: cannot read {path}: {error}; run stage 0 again") from error
        if rate != self.fs:
            raise RuntimeError(f"{row.get('key')}: {path} is at {rate} Hz, not the frontend's {self.fs}; redo stage 0")
        sample = super().__getitem__(index)
        if sample is None or "speech" not in sample:
            raise RuntimeError(f"{row.get('key')}: no features from {path} (see the lines above)")
        size = sum(feature.nbytes for feature in sample["speech"])
        if size <= self.cache_left:
            self.cache_left -= size
            self.cache[index] = sample
        return sample
