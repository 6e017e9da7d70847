"""FunASR's training dataset, strict: every row of the list is used once an epoch, or training stops and says which.

Importing this module registers its classes under FunASR's own names. What differs from funasr 1.4.16:
  * audio that cannot be read stops training; upstream trains on a random other utterance instead;
  * audio at another rate than the frontend's stops training; upstream resamples, differently on different machines;
  * a batch is never cut: upstream drops the last samples of one above batch_size_token_max;
  * `cache_gib` keeps features in memory, where one process re-reads a small corpus every epoch;
  * the sampler repeats no row on one process (upstream fills up the last batch of examples), emits no empty batch
    (upstream does where a whole sort buffer is above batch_size) and skips what a resumed epoch has done, with
    batches of examples too;
  * a batch says by its rows' numbers in the list what it holds (item["row"]), for the Trainer's account;
  * a training row whose `channel` is {"online": SETTINGS} goes through `FunASR.channel`, anew in every epoch;
  * filter-bank features are made in PyTorch, on CPU and GPU machines alike.
"""

from collections.abc import Callable, Iterator
from typing import Any

import funasr  # noqa: F401  fills the registry
import numpy as np
import soundfile
import torch
from funasr.frontends import wav_frontend
from funasr.register import tables
from transformers.audio_utils import mel_filter_bank

from common import UserError, read_jsonl

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
        super().__init__(path, **kwargs)
        # One try: the second would be a random other row.
        self.retry = 1
        self.batch_size_token_max = float("inf")
        self.cache: dict[int, dict] = {}
        self.cache_left = cache_gib * 2**30
        # Settings of the rows whose channel is drawn in training, by key; upstream's index does not keep them.
        simulated = (row for row in read_jsonl(path) if "channel" in row)
        self.online = {row["key"]: row["channel"]["online"] for row in simulated if "online" in row["channel"]}
        if self.online and (self.channel is None or not kwargs.get("is_training")):
            raise ValueError(f"{path} has rows whose channel is drawn in training; only local/train.py trains on them, "
                             "and dev rows must not be such; run stage 0 with --force true")  # fmt: skip
        if self.online:
            self.preprocessor_noise = self._through_channel

    def __getitem__(self, index: int) -> dict:
        """Features and labels of row `index`. Raises UserError for audio that cannot be used as it is."""
        if index in self.cache:
            return self.cache[index]
        row = self.index_ds[index]
        key, path = row.get("key"), self.pattern.search(row["user"][0]).group(0)
        path = path[len("<|startofspeech|>!") : -len("<|endofspeech|>")]
        try:
            rate = soundfile.info(path).samplerate
        except (soundfile.LibsndfileError, OSError) as error:
            raise UserError(f"{key}: cannot read {path}: {error}; run stage 0 with --force true") from error
        if rate != self.fs:
            raise UserError(f"{key}: {path} is at {rate} Hz, not the frontend's {self.fs}; "
                            "run stage 0 with --force true")  # fmt: skip
        # Upstream logs an exception of the channel and trains on clean audio, and does so with rows that are `noised`.
        self.key, self.failure = key, "was not asked for" if key in self.online else None
        sample = super().__getitem__(index)
        if self.failure:
            raise UserError(f"{key}: {path}: the channel of epoch {self.epoch} {self.failure}")
        if sample is None or "speech" not in sample:
            raise UserError(f"{key}: no features from {path} (see the lines above)")
        row["row"] = index
        size = sum(feature.nbytes for feature in sample["speech"])
        if key not in self.online and size <= self.cache_left:
            self.cache_left -= size
            self.cache[index] = sample
        return sample

    def _through_channel(self, samples: np.ndarray) -> np.ndarray:
        """What upstream makes features of in place of the samples it has read: of an online row, this epoch's call."""
        if self.key not in self.online:
            return samples
        if self.epoch is None:
            self.failure = "cannot be drawn: no epoch is set"
            return samples
        try:
            heard = self.channel(self.online[self.key], self.key, samples, self.fs, self.epoch)
        except Exception as error:
            self.failure = f"failed: {error}"
            raise
        self.failure = f"made {heard.shape} samples of {samples.shape}" if heard.shape != samples.shape else None
        return heard


class Once:
    """Upstream's batches of row numbers, less empty batches, on one process less repeated rows; `skip` are done."""

    def __init__(self, stock: Any, skip: int):
        self.stock, self.skip, self.count = stock, skip, len(stock)

    def __iter__(self) -> Iterator[list[int]]:
        seen: set[int] = set()
        batches = []
        for batch in self.stock:
            if self.stock.num_replicas == 1:
                batch = [row for row in dict.fromkeys(batch) if row not in seen]
                seen.update(batch)
            batches.append(batch)
        full = [batch for batch in batches if batch]
        if self.stock.num_replicas > 1:  # each process takes the same number of steps
            full = [batch or full[0] for batch in batches]
        self.count = len(full)
        return iter(full[self.skip :])

    def __len__(self) -> int:
        """Batches of the epoch, those that are done too; before the first iteration upstream's guess."""
        return self.count

    def set_epoch(self, epoch: int) -> None:
        self.stock.set_epoch(epoch)


@tables.register("batch_sampler_classes", "BatchSampler")
def batch_sampler(dataset: Stock, start_step: int = 0, **conf: Any) -> dict[str, Any]:
    """Arguments of a DataLoader over `dataset`, as upstream's function of this name gives them."""
    arguments = stock_sampler(dataset, **conf)
    arguments["batch_sampler"] = Once(arguments["batch_sampler"], start_step)
    return arguments


@tables.register("frontend_classes", "WavFrontend")
class WavFrontend(wav_frontend.WavFrontend):
    """Log mel filter bank with LFR as Kaldi defines them: upstream's numbers within rounding, in a third of the time.

    Upstream calls kaldi-native-fbank, frame by frame from Python, or torchaudio, whichever is there.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.usual = self.window == "hamming" and self.snip_edges and self.upsacle_samples and self.cmvn is None
        self.size, self.shift = (self.fs * ms // 1000 for ms in (self.frame_length, self.frame_shift))
        self.fft = 1 << (self.size - 1).bit_length()
        self.taper = torch.hamming_window(self.size, periodic=False)
        # Kaldi's triangles from 20 Hz to half the sampling rate, without the bin at the end, which no triangle reaches.
        mels = mel_filter_bank(self.fft // 2 + 1, self.n_mels, 20.0, self.fs / 2, self.fs, mel_scale="kaldi",
                               triangularize_in_mel_space=True)  # fmt: skip
        self.mels = torch.from_numpy(mels[:-1]).float()

    def forward(self, input: torch.Tensor, input_lengths, **kwargs) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (batch, LFR frames, mels * lfr_m) of waveforms (batch, samples) in -1..1, and their lengths."""
        if not self.usual or min(input_lengths) < self.size:
            return super().forward(input, input_lengths, **kwargs)
        features = [wav_frontend.apply_lfr(self.fbank(waveform[:length]), self.lfr_m, self.lfr_n)
                    for waveform, length in zip(input, input_lengths, strict=True)]  # fmt: skip
        lengths = torch.tensor([len(feature) for feature in features])
        return torch.nn.utils.rnn.pad_sequence(features, batch_first=True), lengths

    def fbank(self, waveform: torch.Tensor) -> torch.Tensor:
        """Log mel energies (frames, mels) of one waveform (samples,)."""
        frames = (waveform * (1 << 15)).unfold(-1, self.size, self.shift)
        if self.dither:
            frames = frames + self.dither * torch.randn_like(frames)
        frames = frames - frames.mean(-1, keepdim=True)
        before = torch.cat([frames[:, :1], frames[:, :-1]], dim=-1)
        spectrum = torch.fft.rfft((frames - 0.97 * before) * self.taper.to(frames), self.fft)[:, :-1]
        power = spectrum.real.square() + spectrum.imag.square()
        return (power @ self.mels.to(frames)).clamp(min=torch.finfo(torch.float32).eps).log()
