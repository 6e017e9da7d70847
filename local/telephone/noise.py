"""Noise and tones of a telephone call: white, pink, babble, the user's own recordings, mains hum, level meters.

Levels are in dBov: 0 dBov is a signal whose RMS is full scale (1.0), so a full-scale sine is -3.01 dBov
(ITU-T G.191). Levels on the line are in dBm0 = dBov + 6.15, the A-law relation; both are used nowhere else
in any other sense. Speech is measured while it is active (ITU-T P.56, method B), noise by its RMS.

    gain = db_to_gain(-26 - active_level(speech))
"""

import functools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.ndimage import maximum_filter1d
from scipy.signal import lfilter

import audio
from audio import rms_level
from common import UserError, progress
from telephone.filters import db_to_gain, fir, grid, linear_phase
from telephone.resample import resample

DBM0 = 6.15  # dBm0 of a signal at 0 dBov, A-law
SILENT_DBOV = -70.0  # speech this faint is lost in 16-bit rounding and the idle noise of an A-law line, -72 dBov
OFFSET = 0.01  # of full scale; the mean of a sentence is less by chance

THRESHOLDS = np.arange(-98.0, 0.0, 2.0)  # dBov, that the envelope of speech is held against

# What the four pairs of bits in a byte stand for.
CONVERTER_STEPS = (((np.arange(256)[:, None] >> np.arange(0, 8, 2) & 3) * 2 - 3) / 32768).astype(np.float32)


def active_level(samples: np.ndarray, fs: int) -> float:
    """Level of speech while it is active, in dBov (P.56 method B on 5 ms blocks); -inf where there is none.

    The envelope has two time constants of 30 ms, a hangover of 200 ms bridges the gaps inside words, and the
    threshold lies 15.9 dB below the level it yields: levels are comparable however long the pauses are.
    """
    block_s = 0.005  # P.56's 30 ms envelope changes little in 5 ms
    block = max(1, round(fs * block_s))
    whole = samples[: samples.size // block * block].reshape(-1, block)
    energy = np.einsum("ij,ij->i", whole, whole).astype(np.float64)
    keep = math.exp(-block_s / 0.03)
    envelope = np.einsum("ij->i", np.abs(whole)).astype(np.float64) / block
    envelope = lfilter([(1 - keep) ** 2], [1, -2 * keep, keep * keep], envelope)
    hangover = round(0.2 / block_s)
    held = np.sort(maximum_filter1d(envelope, hangover, origin=hangover // 2 - 1, mode="constant"))
    active = held.size - held.searchsorted(10 ** (THRESHOLDS / 20))
    count = np.count_nonzero(active)
    if count == 0:
        return rms_level(samples)
    levels = 10 * np.log10(energy.sum() / (active[:count] * block))
    margins = levels - THRESHOLDS[:count] - 15.9
    above = int((margins <= 0).argmax()) or count - 1  # the first threshold too near, else the highest
    return float(np.interp(0.0, margins[[above, above - 1]], levels[[above, above - 1]]))


def without_offset(samples: np.ndarray) -> np.ndarray:
    """Without a recorder's offset: its step at either end would be a click, and silence be taken for speech."""
    offset = samples.mean()
    # Of a voice whose swings are larger to one side, the median says another offset than the mean.
    recorders = abs(offset) > OFFSET and abs(np.median(samples) - offset) < OFFSET
    return samples - offset if recorders else samples


def at_level(samples: np.ndarray, dbov: float) -> np.ndarray:
    """Scale to an RMS level; silence stays silent."""
    level = rms_level(samples)
    return samples if level == -math.inf else samples * np.float32(db_to_gain(dbov - level))


def coloured(rng: np.random.Generator, kind: str, count: int, fs: int) -> np.ndarray:
    """`white` noise of RMS 1, or `pink`, falling 3 dB per octave in the telephone band."""
    # The sum of four bytes: hiss is Gaussian to the ear and to a codec, and this takes a fifth of the time.
    parts = rng.integers(0, 2**64, -(-count // 2), dtype=np.uint64).view(np.int8).reshape(4, -1)[:, :count]
    total = np.full(count, 2, np.int16)  # the mean of an int8 is -1/2
    for part in parts:
        total += part
    white = total * np.float32(1 / math.sqrt(4 * (2**16 - 1) / 12))
    return white if kind == "white" else fir(white, *_pink(fs))


def converter(rng: np.random.Generator, count: int, law: str) -> np.ndarray:
    """The last bits of a telephone's analogue-to-digital converter: -3, -1, 1 or 3 steps of 16 bits, -77 dBm0.

    Without them A-law would turn digital silence into a constant; with them it idles at +-8, as lines do. Mu-law
    ("ulaw") takes up to 3 steps for nothing and has twice as many.
    """
    codes = np.frombuffer(rng.bytes(-(-count // 4)), np.uint8)
    steps = CONVERTER_STEPS * np.float32(2 if law == "ulaw" else 1)
    return steps.take(codes, axis=0).reshape(-1)[:count]


@functools.lru_cache
def _pink(fs: int) -> tuple[np.ndarray, int]:
    # What lies below the telephone band is left out: it would only push an idle A-law line to one side of zero.
    hz = grid(fs)
    return linear_phase(fs, np.minimum(1.0, (hz / 120.0) ** 2) / np.sqrt(np.maximum(hz, 120.0)))


def hum(rng: np.random.Generator, count: int, fs: int) -> np.ndarray:
    """Mains hum of 50 Hz with odd harmonics falling 6 dB each, of RMS 1."""
    time = np.arange(fs // 50) * (2 * np.pi * 50.0 / fs)
    phases = rng.uniform(0, 2 * np.pi, 5)
    period = sum(0.5**i * np.sin((2 * i + 1) * time + phase) for i, phase in enumerate(phases))
    return np.resize((period / math.sqrt(sum(0.25**i for i in range(5)) / 2)).astype(np.float32), count)


class Recording(NamedTuple):
    """Speech or noise to mix in: the key it is written down by, and where it is, as in a row of a corpus."""

    key: str
    source: str
    channel: int | None = None
    start: float | None = None
    end: float | None = None


def babble(
    rng: np.random.Generator, count: int, fs: int, pool: Sequence[Recording], key: str
) -> tuple[np.ndarray, list[str]]:
    """`count` samples of three to seven voices of the pool, not of the one named `key`; and their keys."""
    own = (key, key.rsplit("#", 1)[0])  # key#2 is a repeat of key in a train list
    others = [voice for voice in pool if voice.key not in own] or pool
    chosen = rng.choice(len(others), size=min(len(others), int(rng.integers(3, 8))), replace=False)
    mix = np.zeros(count, np.float32)
    for i in chosen:
        voice = _voice(others[i], fs)
        start = int(rng.integers(voice.size))
        mix += np.resize(np.roll(voice, -start), count) * np.float32(db_to_gain(rng.uniform(-6, 0)))
    return mix, [others[i].key for i in chosen]


@functools.lru_cache(maxsize=256)
def _voice(voice: Recording, fs: int) -> np.ndarray:
    samples, rate = audio.read(*voice[1:])
    samples = without_offset(samples[: 10 * rate])  # that is all that is kept in memory
    return at_level(resample(samples, rate, fs), 0.0)


def excerpt(
    rng: np.random.Generator, count: int, fs: int, recordings: Sequence[Recording]
) -> tuple[np.ndarray, list[str]]:
    """`count` samples of one of the recordings, repeated where it is shorter; and its key."""
    chosen = recordings[int(rng.integers(len(recordings)))]
    length = audio.length(chosen.source)
    seconds = length.samples / length.rate
    start = float(rng.uniform(0.0, max(0.0, seconds - count / fs)))
    samples, rate = audio.read(chosen.source, None, start, min(start + count / fs + 0.01, seconds))
    return np.resize(resample(without_offset(samples), rate, fs), count), [chosen.key]


def read_scp(path: str | os.PathLike) -> list[Recording]:
    """The recordings of a Kaldi wav.scp, each of them read once; UserError, code 2, for a list that cannot be used."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"the noise list {path} does not exist", code=2)
    recordings = []
    lines = [*filter(str.strip, path.read_text(encoding="utf-8", errors="replace").splitlines())]
    for line in progress(lines, len(lines), "reading noise recordings"):
        key, *source = line.split(maxsplit=1)
        place = "".join(source).strip()
        # Kaldi's relative paths start where the recipe is run; a list beside its files is common too.
        place = os.path.abspath(place if os.path.isfile(place) else path.parent / place)
        try:
            samples, _ = audio.read(place)
        except audio.AudioError as error:
            raise UserError(f"{path}: {key}: {error}; a line is `name path`", code=2) from error
        if samples.std() < 1 / 32768:  # nothing, or nothing but an offset, whatever it is amplified by
            raise UserError(f"{path}: {key}: {place} is silent; take it out of the list", code=2)
        recordings.append(Recording(key, place))
    if not recordings:
        raise UserError(f"the noise list {path} is empty; a line is `name path`", code=2)
    return recordings


# What a call holds while nobody speaks; a recogniser must write nothing.
PROBES = ("idle", "ringback", "busy", "hum", "loss", "music")


def render_probe(kind: str, plan: dict, fs: int = 8000) -> np.ndarray:
    """1 to 15 s of a call without speech, short ones oftener, the plan of its channel changed to fit."""
    rng = np.random.default_rng([plan["draw"], 9])
    count = int(fs * 15.0 ** rng.random())
    time = np.arange(count) / fs
    plan["probe"] = kind
    if kind == "hum":
        plan["line"]["hum_dbm0"] = round(float(rng.uniform(-50.0, -35.0)), 3)
    if kind == "loss":
        plan |= {"hop1": {"codec": "g711_alaw"}, "packet_loss": {"percent": 10.0, "burst": 3.0}}
        plan.setdefault("noise", {"kind": "pink", "snr_db": 15.0})
    if kind in ("ringback", "busy"):  # the 450 Hz of Chinese exchanges, on and off
        on_s, period_s = {"ringback": (1.0, 5.0), "busy": (0.35, 0.7)}[kind]
        return (0.3 * np.sin(2 * np.pi * 450.0 * time) * (time % period_s < on_s)).astype(np.float32)
    if kind == "music":  # on hold: a chord of three decaying notes every half second
        roots = 220.0 * 2 ** (rng.choice([0, 3, 5, 7, 10], 31) / 12)
        root = roots[(2 * time).astype(int)]
        chord = sum(np.sin(2 * np.pi * ratio * root * time) for ratio in (1.0, 1.25, 1.5))
        return (0.1 * chord * np.exp(-3.0 * (time % 0.5))).astype(np.float32)
    return np.zeros(count, np.float32)
