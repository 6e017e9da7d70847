"""FunASR's training dataset, strict: every row of the list is used once an epoch, or training stops and says which.

Registered under FunASR's own names. What differs from funasr/datasets (1.4.16):
  * audio that cannot be read stops training; upstream trains on a random other utterance instead;
  * audio at another rate than the frontend's stops training; upstream resamples, differently on different machines;
  * a batch is never cut: upstream drops the last samples of one above batch_size_token_max;
  * `cache_gib` keeps features in memory, where one process re-reads a small corpus every epoch;
  * the sampler repeats no row on one process (upstream fills up the last batch of examples), emits no empty batch
    (upstream does where a whole sort buffer is above batch_size) and skips what a resumed epoch has done, with
    batches of examples too;
  * a batch says by its rows' numbers in the list what it holds (item["row"]), for the Trainer's account.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import funasr  # noqa: F401  fills the registry
import soundfile
from funasr.register import tables

# Upstream's module has two classes of this name, the second hides the first; the registry has both.
Stock = tables.dataset_classes["FunASR"]
stock_sampler = tables.batch_sampler_classes["BatchSampler"]


@tables.register("dataset_classes", "FunASR")
class FunASR(Stock):
    """One item per row: token ids, labels and LFR features, as upstream makes them."""

    def __init__(self, path: str, cache_gib: float = 0.0, **kwargs: Any):
        if kwargs.get("prompt_classes"):
            raise ValueError("dataset_conf.prompt_classes adds a context to every prompt that decoding does not have")
        super().__init__(path, **kwargs)
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
        row["row"] = index
        size = sum(feature.nbytes for feature in sample["speech"])
        if size <= self.cache_left:
            self.cache_left -= size
            self.cache[index] = sample
        return sample


class Once:
    """Upstream's batches of row numbers, less empty batches, on one process less repeated rows; `skip` are done."""

    def __init__(self, stock: Any, skip: int):
        self.stock, self.skip = stock, skip

    def __iter__(self) -> Iterator[list[int]]:
        seen: set[int] = set()
        batches = []
        for batch in self.stock:
            if self.stock.num_replicas == 1:
                batch = [row for row in batch if row not in seen]
                seen.update(batch)
            batches.append(batch)
        full = [batch for batch in batches if batch]
        if self.stock.num_replicas > 1:  # each process takes the same number of steps
            full = [batch or full[0] for batch in batches]
        return iter(full[self.skip :])

    def __len__(self) -> int:
        return len(self.stock)

    def set_epoch(self, epoch: int) -> None:
        self.stock.set_epoch(epoch)


@tables.register("batch_sampler_classes", "BatchSampler")
def batch_sampler(dataset: Stock, start_step: int = 0, **conf: Any) -> dict[str, Any]:
    """Arguments of a DataLoader over `dataset`, as upstream's function of this name gives them."""
    arguments = stock_sampler(dataset, **conf)
    arguments["batch_sampler"] = Once(arguments["batch_sampler"], start_step)
    return arguments
