"""FunASR's training dataset, strict: every row of the list is used as it is, or training stops and says which.

Registered under FunASR's own name. What differs from funasr/datasets/fun_asr_datasets/datasets.py (1.4.16):
  * audio that cannot be read stops training; upstream trains on a random other utterance instead;
  * audio at another rate than the frontend's stops training; upstream resamples, differently on different machines;
  * a batch is never cut: upstream drops the last samples of one above batch_size_token_max;
  * `cache_gib` keeps features in memory, where one process re-reads a small corpus every epoch;
  * a training row whose `channel` is {"online": SETTINGS} goes through `FunASR.channel`, anew in every epoch.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import funasr  # noqa: F401  fills the registry
import numpy as np
import soundfile
from funasr.register import tables

# Upstream's module has two classes of this name, the second hides the first; the registry has both.
Stock = tables.dataset_classes["FunASR"]


@tables.register("dataset_classes", "FunASR")
class FunASR(Stock):
    """One item per row: token ids, labels and LFR features, as upstream makes them.

    `channel` is set by local/train.py: (settings, key, samples, rate, epoch) -> float32 samples at the same rate.
    `epoch` is set by the Trainer before the workers of an epoch start.
    """

    channel: Callable[[str, str, np.ndarray, int, int], np.ndarray] | None = None
    epoch: int | None = None

    def __init__(self, path: str, cache_gib: float = 0.0, **kwargs: Any):
        super().__init__(path, **kwargs)
        if self.prompt_classes is not None:
            raise ValueError("dataset_conf.prompt_classes adds a context to every prompt that decoding does not have")
        # One try: the second would be a random other row.
        self.retry = 1
        self.batch_size_token_max = float("inf")
        self.cache: dict[int, dict] = {}
        self.cache_left = cache_gib * 2**30
        self.online = online_rows(path)
        if self.online and (self.channel is None or not kwargs.get("is_training")):
            raise ValueError(f"{path} has rows whose channel is drawn in training; only local/train.py trains on them, "
                             "and dev rows must not be such; run stage 0 again")  # fmt: skip
        self.simulated: np.ndarray | None = None
        if self.online:
            if self.preprocessor_noise is not None:
                raise ValueError("dataset_conf.preprocessor_noise has the place of the online channel; leave it out")
            # Upstream logs an exception in this hook and trains on clean audio: it only hands over what is finished.
            self.preprocessor_noise = lambda samples: samples if self.simulated is None else self.simulated

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
        settings = self.online.get(row.get("key"))
        self.simulated = None if settings is None else self._simulate(row, path, settings)
        sample = super().__getitem__(index)
        if sample is None or "speech" not in sample:
            raise RuntimeError(f"{row.get('key')}: no features from {path} (see the lines above)")
        if settings is not None:
            return sample
        size = sum(feature.nbytes for feature in sample["speech"])
        if size <= self.cache_left:
            self.cache_left -= size
            self.cache[index] = sample
        return sample

    def _simulate(self, row: dict, path: str, settings: str) -> np.ndarray:
        """The row's audio after its channel of this epoch."""
        if self.epoch is None or row.get("noised"):
            raise RuntimeError(f"{row['key']}: no epoch is set, or the row is `noised`: no channel is drawn")
        samples, rate = soundfile.read(path, dtype="float32")
        try:
            heard = self.channel(settings, row["key"], samples, rate, self.epoch)
        except Exception as error:
            raise RuntimeError(f"{row['key']}: the channel of epoch {self.epoch} failed on {path}: {error}") from error
        if heard.shape != samples.shape:
            raise RuntimeError(f"{row['key']}: the channel made {heard.shape} samples of {samples.shape}")
        return heard


def online_rows(path: str) -> dict[str, str]:
    """Settings of the rows of a list whose channel is drawn in training, by key."""
    found = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            if '"online"' in line:  # cheap to see; most lists have none
                row = json.loads(line)
                if isinstance(row.get("channel"), dict) and "online" in row["channel"]:
                    found[row["key"]] = row["channel"]["online"]
    return found
