"""What is heard in the tests."""

import av
import numpy as np
from scipy.signal import lfilter


def speech(seconds, fs=16000, seed=0):
    """Voiced and unvoiced syllables through moving formants, with pauses: speech to a codec and to a level meter."""
    rng, parts = np.random.default_rng(seed), []
    while sum(map(len, parts)) < seconds * fs:
        count = int(fs * rng.uniform(0.12, 0.3))
        pitch = np.cumsum(np.linspace(*rng.uniform(90, 240, 2), count) / fs)
        source = np.diff(np.floor(pitch), prepend=0) + 0.03 * rng.standard_normal(count)
        for centre, width in zip(rng.uniform((300, 900, 2300), (800, 2200, 3200)), (80, 120, 200), strict=True):
            radius = np.exp(-np.pi * width / fs)
            source = lfilter([1 - radius], [1, -2 * radius * np.cos(2 * np.pi * centre / fs), radius**2], source)
        parts.append(source / np.abs(source).max() * np.hanning(count) * rng.uniform(0.3, 0.9))
        if rng.random() < 0.2:
            parts.append(np.zeros(int(fs * rng.uniform(0.1, 0.6))))
    return np.concatenate(parts)[: int(seconds * fs)].astype(np.float32)


def murmur(seconds, rate, seed=0):
    """Noise that comes and goes: no silence, no clipping, energy up to half the rate."""
    rng = np.random.default_rng(seed)
    n = round(seconds * rate)
    return (rng.normal(0, 0.05, n) * (1.2 + np.sin(np.arange(n) / rate * 12))).astype(np.float32)


def encode(path, samples, rate, codec, layout="mono", **options):
    """Write with PyAV, as a recorder would; options of the container."""
    with av.open(str(path), "w", options=options) as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        pcm = np.round(samples * 32767).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(pcm, format="s16", layout=layout)
        frame.rate = rate
        resampler = av.AudioResampler(stream.format, layout, rate, frame_size=stream.codec_context.frame_size or None)
        for part in [*resampler.resample(frame), *resampler.resample(None), None]:
            container.mux(stream.encode(part))
