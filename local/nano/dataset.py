"""FunASR's training dataset, strict: every row of the list is used once an epoch, or training stops and says which.

Registered under FunASR's own names. What differs from funasr/datasets (1.4.16):
  * audio that cannot be read stops training; upstream trains on a random other utterance instead;
  * audio at another rate than the frontend's stops training; upstream resamples, differently on different machines;
  * a batch is never cut: upstream drops the last samples of one above batch_size_token_max;
  * `cache_gib` keeps features in memory, where one process re-reads a small corpus every epoch;
  * the sampler repeats no row on one process (upstream fills up the last batch of examples), emits no empty batch
    (upstream does where a whole sort buffer is above batch_size) and skips what a resumed epoch has done, with
    batches of examples too;
  * a batch says by its rows' numbers in the list what it holds (item["row"]), for the Trainer's account;
  * a training row whose `channel` is {"online": SETTINGS} goes through `FunASR.channel`, anew in every epoch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import funasr  # noqa: F401  fills the registry
import numpy as np
import soundfile
from funasr.register import tables

# Upstream's module has two classes of this name, the second hides the first; the registry has both.
Stock = tables.dataset_classes["FunASR"]
stock_sampler = tables.batch_sampler_classes["BatchSampler"]


@tables.register("dataset_classes", "FunASR")
class FunASR(Stock):
    """One item per row: token ids, labels and LFR features, as upstream makes them.

    `channel` is set by local/train.py: (settings, key, samples, rate, epoch) -> float32 samples at the same rate.
    `epoch` is set by the Trainer before the workers of an epoch start.
    """

    channel: Callable[[str, str, np.ndarray, int, int], np.ndarray] | None = None
    epoch: int | None = None

    def __init__(self, path: str, cache_gib: float = 0.0, **kwargs: Any):
        if kwargs.get("prompt_classes"):
            raise ValueError("dataset_conf.prompt_classes adds a context to every prompt that decoding does not have")
        super().__init__(path, **kwargs)
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
        row["row"] = index
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
