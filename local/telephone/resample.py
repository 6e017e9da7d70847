"""The one resampler of this recipe: what brings a call to the 16 kHz the model hears is part of the channel.

A telephone call up-sampled badly carries images of speech above 4 kHz, which a model trained on clean
up-sampled audio has never met. So training data, real calls and decoding all go through `resample`:
soxr HQ, zero delay, the stop band below 16-bit rounding noise.

    samples = resample(samples, 8000, 16000)
"""

import numpy as np
import soxr


def resample(samples: np.ndarray, fs_in: int, fs_out: int) -> np.ndarray:
    """Return float32 samples at `fs_out`, `round(n * fs_out / fs_in)` of them, aligned with the input."""
    return resample_counted(samples, fs_in, fs_out)[0]


def resample_counted(samples: np.ndarray, fs_in: int, fs_out: int) -> tuple[np.ndarray, int]:
    """Resample, and count the samples that would have clipped: band-limited peaks lie between samples.

    Where there are any, the whole utterance is turned down by the excess (at most a few dB), because
    clipping would put energy above 4 kHz, where a telephone call has none.
    """
    samples = np.ascontiguousarray(samples, dtype=np.float32)
    if fs_in == fs_out:
        return samples, 0
    wanted = round(samples.size * fs_out / fs_in)
    out = soxr.resample(samples, fs_in, fs_out, quality="HQ")[:wanted]
    peak = max(float(out.max(initial=0.0)), -float(out.min(initial=0.0)))
    if peak < 1.0:
        return out, 0
    return out * np.float32(0.999 / peak), int(np.count_nonzero(np.abs(out) >= 1.0))
