"""What a telephone does to speech before it is coded: send response, room, limiter, gain control, echo.

The send responses are linear-phase FIR filters of the shapes ITU-T publishes (P.48 IRS, P.830 modified IRS, G.712,
the mobile high-pass). Their delay is taken out again, so that transcripts stay aligned. Levels are in dBov
(telephone.noise).

    samples = send(samples, 8000, "irs", peaks=[[2100, 4]])
"""

import functools
import math

import numpy as np
from scipy.fft import fft, ifft, irfft
from scipy.signal import fftconvolve

from audio import rms_level

# dB relative to 1 kHz at FREQUENCIES, read off the published curves and rounded. `flat` is a path without a shape.
FREQUENCIES = (0, 50, 100, 160, 200, 250, 315, 400, 630, 1000, 1600, 2000, 2500, 3150, 3400, 3600, 3800, 4000)
SHAPES = {
    "irs": (-60, -60, -42, -22, -15.5, -10.5, -7, -4, -2, 0, 3.5, 4.5, 5.5, 5.5, 1.5, -9.5, -21, -35),
    "modified_irs": (-50, -45, -28, -13.5, -9.5, -6.5, -4.5, -3.5, -2, 0, 3, 3.5, 5, 6, 4, -1, -10, -24),
    "g712": (-30, -25, -30, -11, -5, -1.5, 0, 0.5, 0, 0, 0, 0, 0, 0, -1, -6, -31, -45),
    "mobile": (-30, -25, -13, -5.5, -2.5, -1, 0, 0, 0, 0, 0, 0, 0, 0, -1, -4, -12, -26),
}
BLOCK = 2048  # samples filtered at a time: small enough for the cache, large against the taps


def db_to_gain(db: float) -> float:
    """Decibels to an amplitude factor."""
    return 10.0 ** (db / 20.0)


def send(
    samples: np.ndarray, fs: int, shape: str, low_hz: float = 0.0, high_hz: float = 0.0, peaks: list | None = None,
    fs_out: int | None = None,
) -> np.ndarray:  # fmt: skip
    """Apply a send response: a shape of SHAPES with its peaks, or `band`, a plain band-pass low_hz..high_hz.

    `peaks` is a list of [Hz, dB]. At 16 kHz (a wideband leg) a shape goes on flat from 3150 Hz to 7 kHz. With
    `fs_out` of half `fs` the same filter halves the rate: what lies above its half is 90 dB down.
    """
    fs_out = fs_out or fs
    return fir(samples, *_response(fs, fs_out, shape, low_hz, high_hz, tuple(map(tuple, peaks or ()))))


def fir(samples: np.ndarray, spectrum: np.ndarray, taps: int) -> np.ndarray:
    """Filter float32 samples without delay by what `linear_phase` made, block by block (overlap-save).

    A spectrum of 1/n of a block, which ends at half the rate it stands for, returns every n-th sample.
    """
    down, delayed, hop = BLOCK // spectrum.size, taps // 2, BLOCK - taps + 1
    # The transform of a complex signal takes less than that of two real ones: the second half is the imaginary part.
    blocks = -(-samples.size // (2 * hop))
    half = blocks * hop
    padded = np.zeros(half + taps - 1, np.complex64)
    first, second = samples[: padded.size - delayed], samples[half - delayed : half - delayed + padded.size]
    padded.real[delayed : delayed + first.size] = first
    padded.imag[: second.size] = second
    spectra = fft(np.ndarray((blocks, BLOCK), np.complex64, padded, strides=(8 * hop, 8)), axis=1)
    if down > 1:
        spectra = _lowest(spectra, spectrum.size)
    spectra *= spectrum
    filtered = ifft(spectra, axis=1, overwrite_x=True)[:, (taps - 1) // down :]
    return np.concatenate([filtered.real, filtered.imag], axis=None)[: round(samples.size / down)]


def linear_phase(fs: int, gains: np.ndarray, down: int = 1) -> tuple[np.ndarray, int]:
    """The filter whose gain at 0 .. fs/2, evenly spaced, is `gains`: its spectrum over a block, and its length.

    With `down` the spectrum ends at the half of a rate so many times lower, which `fir` then returns.
    """
    half = 127 * fs // 8000  # 31 Hz between the points a filter can follow
    response, window = irfft(gains.astype(np.float32)), _window(2 * half + 1)
    centred = np.concatenate([response[-half:], response[: half + 1]]) * window
    # A telephone path passes no direct current: in pauses it would leave A-law inside one step, digitally silent.
    centred -= window * (centred.sum() / window.sum())
    return _lowest(fft(centred, BLOCK), BLOCK // down) / np.float32(down), centred.size


def _lowest(spectra: np.ndarray, count: int) -> np.ndarray:
    """The `count` frequencies nearest to zero, on both sides of it."""
    return np.concatenate([spectra[..., : count // 2], spectra[..., -(count // 2) :]], axis=-1)


@functools.lru_cache
def _window(taps: int) -> np.ndarray:
    return np.kaiser(taps, 9.0).astype(np.float32)  # side lobes at -90 dB


@functools.lru_cache
def grid(fs: int) -> np.ndarray:
    """The frequencies at which `linear_phase` is given gains; 1 Hz in place of 0."""
    return np.maximum(np.linspace(0.0, fs / 2, 512 * fs // 8000 + 1), 1.0)


@functools.lru_cache(maxsize=64)
def _response(
    fs: int, fs_out: int, shape: str, low_hz: float, high_hz: float, peaks: tuple[tuple[float, float], ...]
) -> tuple[np.ndarray, int]:
    hz = grid(fs)
    if shape == "band":  # the edges of a Butterworth filter of fourth order
        high_hz = min(high_hz, 0.49 * fs_out)
        gains = 1 / np.sqrt(1 + ((hz - low_hz * high_hz / hz) / (high_hz - low_hz)) ** 8)
    else:
        # A peak is half an octave wide, as a resonance of a small enclosure is.
        decibels = sum(db * np.exp(-0.5 * (np.log2(hz / peak_hz) / 0.35) ** 2) for peak_hz, db in peaks)
        gains = _shape(fs, fs_out, shape) * 10 ** (decibels / 20)
    if fs_out < fs:  # the edges of soxr's HQ, which recordings of other rates come through
        gains = gains * np.interp(hz, (0.456 * fs_out, 0.4875 * fs_out), (1, 0))
    return linear_phase(fs, gains, fs // fs_out)


@functools.lru_cache
def _shape(fs: int, fs_out: int, shape: str) -> np.ndarray:
    points = list(zip(FREQUENCIES, SHAPES[shape], strict=True))
    if fs_out > 8000:
        narrow = [(hz, db) for hz, db in points if hz <= 3150]
        points = [*narrow, (7000, narrow[-1][1]), (fs_out / 2, -40.0)]
    return 10 ** (np.interp(grid(fs), *zip(*points, strict=True)) / 20)


def room(rng: np.random.Generator, samples: np.ndarray, fs: int, rt60_s: float, direct_db: float) -> np.ndarray:
    """Reverberation of a small room at a hands-free telephone, the direct sound `direct_db` above it."""
    count = int(fs * rt60_s)
    tail = rng.standard_normal(count, dtype=np.float32) * np.exp(-6.9 * np.arange(count) / count, dtype=np.float32)
    tail[: int(0.003 * fs)] = 0.0  # a table or wall is half a metre away
    tail *= np.float32(db_to_gain(-direct_db) / math.sqrt(float(np.square(tail).sum())))
    tail[0] = 1.0
    return fftconvolve(samples, tail)[: samples.size]


def limit(samples: np.ndarray, kind: str) -> np.ndarray:
    """An overdriven input: `hard_clip` at full scale, or `soft_clip`, bending from half of it on."""
    if kind == "hard_clip":
        return np.clip(samples, -1.0, 32767 / 32768)
    size = np.abs(samples)
    bent = 0.5 + 0.5 * np.tanh((size - 0.5) / 0.5)
    return np.where(size > 0.5, np.copysign(bent, samples), samples).astype(np.float32)


def agc(samples: np.ndarray, fs: int, target_dbov: float) -> np.ndarray:
    """Automatic gain control: quick to turn down, slow to turn up, still in pauses.

    Because of that `target_dbov` is what the loudest blocks of 10 ms come to; the active level ends 4 dB lower.
    """
    block = fs // 100
    blocks = -(-samples.size // block)
    padded = np.pad(samples, (0, blocks * block - samples.size)).reshape(blocks, block)
    levels = 10 * np.log10(np.einsum("ij,ij->i", padded, padded) / block + 1e-10)
    gate = rms_level(samples) - 15.0
    gains, gain = np.empty(blocks), 0.0
    for i, level in enumerate(levels):
        if level > gate:
            wanted = min(max(target_dbov - level, -15.0), 15.0)  # as much as G.169 allows
            gain += (wanted - gain) * (0.2 if wanted < gain else 0.01)
        gains[i] = gain
    smooth = np.interp(np.arange(samples.size), (np.arange(blocks) + 0.5) * block, 10 ** (gains / 20))
    return samples * smooth.astype(np.float32)


def echo(samples: np.ndarray, fs: int, delay_ms: float, loss_db: float) -> np.ndarray:
    """The talker's own voice, coming back from the far hybrid `delay_ms` later and `loss_db` weaker."""
    delay, out = round(fs * delay_ms / 1000), samples.copy()
    out[delay:] += samples[: max(0, samples.size - delay)] * np.float32(db_to_gain(-loss_db))
    return out
