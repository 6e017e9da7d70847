"""Noise and tones of a telephone call: white, pink, babble, the user's own recordings, mains hum, level meters.

Levels are in dBov: 0 dBov is a signal whose RMS is full scale (1.0), so a full-scale sine is -3.01 dBov
(ITU-T G.191). Levels on the line are in dBm0 = dBov + 6.15, the A-law relation; both are used nowhere else
in any other sense. Speech is measured while it is active (ITU-T P.56, method B), noise by its RMS.

    gain = db_to_gain(-26 - active_level(speech))
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.ndimage import maximum_filter1d
from scipy.signal import bilinear_zpk, butter, lfilter, sosfilt, zpk2sos

import audio
from common import UserError
from telephone.resample import resample

DBM0 = 6.15  # dBm0 of a signal at 0 dBov, A-law
SILENT_DBOV = -70.0  # speech this faint is lost in 16-bit rounding and the idle noise of an A-law line, -72 dBov
BLOCK_S = 0.005  # P.56's 30 ms envelope changes little in 5 ms
LONGEST_S = 10.0  # as much of a voice as is kept in memory for babble

Source = Callable[[np.random.Generator, int, int], tuple[np.ndarray, list[str]]]


def db_to_gain(db: float) -> float:
    """Decibels to an amplitude factor."""
    return 10.0 ** (db / 20.0)


def rms_level(samples: np.ndarray) -> float:
    """RMS level in dBov; -inf for digital silence."""
    power = float(np.dot(samples, samples)) / max(samples.size, 1)
    return 10.0 * math.log10(power) if power > 0 else -math.inf


def active_level(samples: np.ndarray, fs: int) -> float:
    """Level of speech while it is active, in dBov (P.56 method B on 5 ms blocks); -inf where there is none.

    The envelope has two time constants of 30 ms, a hangover of 200 ms bridges the gaps inside words, and the
    threshold lies 15.9 dB below the level it yields: levels are comparable however long the pauses are.
    """
    block = max(1, round(fs * BLOCK_S))
    whole = samples[: samples.size // block * block].reshape(-1, block)
    energy = np.einsum("ij,ij->i", whole, whole, dtype=np.float64)
    if whole.size == 0 or energy.sum() <= 0:
        return rms_level(samples)
    keep = math.exp(-BLOCK_S / 0.03)
    envelope = np.abs(whole).mean(axis=1, dtype=np.float64)
    envelope = lfilter([(1 - keep) ** 2], [1, -2 * keep, keep * keep], envelope)
    hangover = round(0.2 / BLOCK_S)
    held = np.sort(maximum_filter1d(envelope, hangover, origin=hangover // 2 - 1, mode="constant"))
    thresholds = np.arange(-98.0, 0.0, 2.0)
    active = held.size - np.searchsorted(held, 10 ** (thresholds / 20))
    thresholds, active = thresholds[active > 0], active[active > 0]
    if active.size == 0:
        return rms_level(samples)
    levels = 10 * np.log10(energy.sum() / (active * block))
    margins = levels - thresholds - 15.9
    above = int(np.argmax(margins <= 0)) or margins.size - 1  # the first threshold too near, else the highest
    return float(np.interp(0.0, margins[[above, above - 1]], levels[[above, above - 1]]))


def at_level(samples: np.ndarray, dbov: float) -> np.ndarray:
    """Scale to an RMS level; silence stays silent."""
    level = rms_level(samples)
    return samples if level == -math.inf else samples * np.float32(db_to_gain(dbov - level))


def coloured(rng: np.random.Generator, kind: str, count: int, fs: int) -> np.ndarray:
    """`white` Gaussian noise, or `pink`, falling 3 dB per octave in the telephone band."""
    white = rng.standard_normal(count, dtype=np.float32)
    return white if kind == "white" else sosfilt(_pink_sections(fs), white)


def converter(rng: np.random.Generator, count: int) -> np.ndarray:
    """The last bits of a telephone's analogue-to-digital converter: -3, -1, 1 or 3 steps of 16 bits, -77 dBm0.

    Digital silence never enters a call: without these bits A-law would turn it into a constant, and log-mel into
    its floor; with them it idles at +-8, as lines do.
    """
    bits = rng.integers(0, 256, count, dtype=np.uint8) >> 6
    return bits * np.float32(2 / 32768) - np.float32(3 / 32768)


@functools.lru_cache
def _pink_sections(fs: int) -> np.ndarray:
    # Poles and zeros taking turns at equal ratios make a staircase whose mean slope is -3 dB per octave. What lies
    # below the telephone band is left out: it would only push an idle A-law line to one side of zero.
    ratio = (fs / 2 / 100.0) ** (1 / 8)
    poles, zeros = (100.0 * ratio ** (np.arange(7) + shift) for shift in (0.5, 1.0))
    warped = [-2 * fs * np.tan(np.pi * corners / fs) for corners in (zeros, poles)]
    pinking = zpk2sos(*bilinear_zpk(*warped, 1.0, fs))
    return np.vstack([butter(2, 120.0, "highpass", fs=fs, output="sos"), pinking]).astype(np.float32)


def hum(rng: np.random.Generator, count: int, fs: int) -> np.ndarray:
    """Mains hum of 50 Hz with odd harmonics falling 6 dB each, of RMS 1."""
    time = np.arange(count) * (2 * np.pi * 50.0 / fs)
    phases = rng.uniform(0, 2 * np.pi, 5)
    total = sum(0.5**i * np.sin((2 * i + 1) * time + phase) for i, phase in enumerate(phases))
    return (total / math.sqrt(sum(0.25**i for i in range(5)) / 2)).astype(np.float32)


class Recording(NamedTuple):
    """Speech or noise to mix in: the name it is written down by, and where it is."""

    name: str
    path: str
    channel: int | None = None
    start: float | None = None
    end: float | None = None

    @classmethod
    def of(cls, row: dict[str, Any]) -> Recording:
        """The recording of a row of a manifest or of babble_pool_*.jsonl."""
        return cls(row["key"], row["source"], row.get("channel"), row.get("start"), row.get("end"))

    def cut(self) -> dict[str, Any]:
        """Which part of the file it is, as fields of a row."""
        fields = {"channel": self.channel, "start": self.start, "end": self.end}
        return {name: value for name, value in fields.items() if value is not None}


def babble_source(voices: Sequence[Recording], exclude: str | None = None) -> Source:
    """Babble of three to seven of the utterances, never of the one named `exclude`, which it is mixed with."""
    others = [voice for voice in voices if voice.name != exclude] or list(voices)

    def babble(rng: np.random.Generator, count: int, fs: int) -> tuple[np.ndarray, list[str]]:
        chosen = rng.choice(len(others), size=min(len(others), int(rng.integers(3, 8))), replace=False)
        mix = np.zeros(count, np.float32)
        for i in chosen:
            mix += _excerpt(rng, _voice(others[i], fs), count) * np.float32(db_to_gain(rng.uniform(-6, 0)))
        return mix, [others[i].name for i in chosen]

    return babble


def file_source(recordings: Sequence[Recording]) -> Source:
    """An excerpt of one of the noise recordings, repeated where it is shorter than the utterance."""

    def noise(rng: np.random.Generator, count: int, fs: int) -> tuple[np.ndarray, list[str]]:
        chosen = recordings[int(rng.integers(len(recordings)))]
        length = audio.length(chosen.path)
        seconds = length.samples / length.rate
        start = float(rng.uniform(0.0, max(0.0, seconds - count / fs)))
        samples, rate = audio.read(chosen.path, None, start, min(start + count / fs + 0.01, seconds))
        return np.resize(resample(samples, rate, fs), count), [chosen.name]

    return noise


def read_scp(path: str | os.PathLike) -> list[Recording]:
    """The recordings of a Kaldi wav.scp; UserError, code 2, for a list that cannot be used."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"the noise list {path} does not exist", code=2)
    recordings = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        name, _, source = line.strip().replace("\t", " ").partition(" ")
        source = source.strip()
        # Kaldi's relative paths start where the recipe is run; a list beside its files is common too.
        places = [source, os.path.join(path.parent, source)]
        found = next((os.path.abspath(place) for place in places if os.path.isfile(place)), None)
        if name and found is None:
            raise UserError(f"{path}:{number}: {source or name!r} is not a file; a line is `name path`", code=2)
        recordings += [Recording(name, found)] if name else []
    if not recordings:
        raise UserError(f"the noise list {path} is empty; a line is `name path`", code=2)
    for recording in recordings:
        try:
            audio.length(recording.path)
        except audio.AudioError as error:
            raise UserError(f"{path}: {recording.name}: {error}", code=2) from error
    return recordings


def _excerpt(rng: np.random.Generator, samples: np.ndarray, count: int) -> np.ndarray:
    """`count` samples from a random place on, going round at the end."""
    start = int(rng.integers(samples.size))
    part = samples[start : start + count]
    return part if part.size == count else np.resize(np.roll(samples, -start), count)


@functools.lru_cache(maxsize=256)
def _voice(voice: Recording, fs: int) -> np.ndarray:
    start = voice.start or 0.0
    length = audio.length(voice.path, voice.channel, voice.start, voice.end)
    end = start + min(length.samples / length.rate, LONGEST_S)
    samples, rate = audio.read(voice.path, voice.channel, start, end)
    return at_level(resample(samples, rate, fs), 0.0)


# What a call holds while nobody speaks; a recogniser must write nothing.
PROBES = ("idle", "ringback", "busy", "hum", "loss", "music")


def render_probe(kind: str, plan: dict, fs: int = 8000) -> np.ndarray:
    """3 to 15 s of a call without speech, the plan of its channel changed to fit."""
    rng = np.random.default_rng([plan["draw"], 9])
    count = int(fs * rng.uniform(3.0, 15.0))
    plan["probe"] = kind
    if kind == "hum":
        plan["line"]["hum_dbm0"] = round(float(rng.uniform(-50.0, -35.0)), 3)
    if kind == "loss":
        plan["hop1"] = {"codec": "g711_alaw"}
        plan["packet_loss"] = {"percent": 10.0, "burst": 3.0}
        plan.setdefault("noise", {"kind": "pink", "snr_db": 15.0})
    if kind == "ringback":
        return _tone(count, fs, 1.0, 4.0)
    if kind == "busy":
        return _tone(count, fs, 0.35, 0.35)
    return _music(rng, count, fs) if kind == "music" else np.zeros(count, np.float32)


def _tone(count: int, fs: int, on_s: float, off_s: float) -> np.ndarray:
    """450 Hz, the tone of Chinese exchanges, on and off."""
    time = np.arange(count) / fs
    return (0.3 * np.sin(2 * np.pi * 450.0 * time) * (time % (on_s + off_s) < on_s)).astype(np.float32)


def _music(rng: np.random.Generator, count: int, fs: int) -> np.ndarray:
    """Music on hold: a chord of three decaying notes every half second."""
    beat, out = fs // 2, np.zeros(count, np.float32)
    time = np.arange(beat) / fs
    for start in range(0, count, beat):
        root = 220.0 * 2 ** (int(rng.choice([0, 3, 5, 7, 10])) / 12)
        third = 2 ** (int(rng.choice([3, 4])) / 12)
        notes = [ratio * root * partial for ratio in (1.0, third, 1.5) for partial in (1, 2, 3)]
        chord = sum(np.sin(2 * np.pi * note * time) / note for note in notes) * np.exp(-3.0 * time)
        out[start : start + beat] = chord[: count - start]
    return out * np.float32(0.3 / max(1e-9, np.abs(out).max()))
