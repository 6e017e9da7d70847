"""Read any recording a call centre keeps, write the mono FLAC or WAV this recipe trains on.

Reading tries soundfile (WAV PCM, A-law, mu-law, GSM 06.10, FLAC, MP3, Opus), then PyAV (AMR, G.722,
G.726, M4A ...), then SoX where it is installed (NIST SPHERE with shorten, odd headers).
Files are named by their key, so that two keys never share a file and none leaves its folder.
"""

import functools
import hashlib
import math
import os
import re
import shutil
import subprocess
from typing import NamedTuple

import numpy as np
import soundfile

from common import atomic_write, first_line, memory_file

SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,119}")
HEADERLESS = ("alaw", "mulaw", "s8", "u8", "s16le", "u16le")  # FFmpeg says 44.1 kHz; SoX knows .al and .ul
UNKNOWN_LENGTH = 1 << 40  # libsndfile's frame count of a streamed FLAC, whose header has no length, is far above


class AudioError(Exception):
    """Audio, or a row, that cannot be used; `reason` is a reason code of rejected.jsonl, the text says more."""

    def __init__(self, reason: str, detail: str):
        super().__init__(detail)
        self.reason = reason


def read(
    path: str | os.PathLike, channel: int | None = None, start: float | None = None, end: float | None = None
) -> tuple[np.ndarray, int]:
    """Read one channel (the mix-down for None) from `start` to `end` seconds: float32 (n,) in [-1, 1], rate in Hz.

    Raises AudioError: audio_missing, audio_unreadable, audio_empty, channel_missing, bad_segment, audio_not_finite.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise AudioError("audio_missing", f"{path} does not exist")
    samples, rate = _decode_soundfile(path, start or 0.0, end) or _decode_other(path, start or 0.0, end)
    if not 1000 <= rate <= 1_000_000:  # a damaged header: seconds of speech would become hours
        raise AudioError("audio_unreadable", f"{path}: a sampling rate of {rate} Hz")
    _check_channel(channel, samples.shape[1], path)
    integers = samples.dtype == np.int16
    if integers:  # libsndfile's own conversion to float gives the same and takes ten times as long
        samples = np.multiply(samples, 1 / 32768, dtype=np.float32)
    samples = samples.mean(axis=1) if channel is None and samples.shape[1] > 1 else samples[:, channel or 0]
    if samples.size == 0:
        raise AudioError("audio_empty", f"no samples between {start or 0.0} s and {end or 'the end'} in {path}")
    if not (integers or (np.abs(samples) < 1e10).all()):  # the sum of larger squares would not be finite
        raise AudioError("audio_not_finite", f"NaN, infinite or senselessly large samples in {path}")
    return np.ascontiguousarray(samples, dtype=np.float32), rate


def write(path: str | os.PathLike, samples: np.ndarray, rate: int) -> None:
    """Write int16 samples, or floats in [-1, 1], as 16-bit mono, format by suffix (.flac, .wav).

    The name appears when the file is whole.
    """
    encoded = encode(samples, rate, os.path.splitext(path)[1][1:].upper(), "PCM_16")
    with atomic_write(path, "wb", sync=False) as file:
        file.write(encoded)  # libsndfile would not say that the disk is full


def encode(samples: np.ndarray, rate: int, kind: str, subtype: str | None = None) -> bytes:
    """The bytes of a sound file; format and subtype are those of soundfile."""
    with memory_file() as file:
        soundfile.write(file.fileno(), samples, rate, subtype=subtype, format=kind, closefd=False)
        file.seek(0)
        return file.read()


class Length(NamedTuple):
    """Samples of a segment, the file's rate in Hz, and whether it is all of a mono file of linear PCM."""

    samples: int
    rate: int
    plain: bool  # any training framework loads it alike


def length(
    path: str | os.PathLike, channel: int | None = None, start: float | None = None, end: float | None = None
) -> Length:
    """Length of what `read` would return, from the header where it says so, else by reading; AudioError as there."""
    path = os.fspath(path)
    header = _header(path)
    if header is None or header.frames <= 0 or _is_length_unknown(header, path):
        samples, rate = read(path, channel, start, end)
        return Length(len(samples), rate, False)
    _check_channel(channel, header.channels, path)
    first, last = _bounds(header.frames, header.samplerate, start or 0.0, end, path)
    if last <= first:
        raise AudioError("audio_empty", f"no samples between {start} s and {end} s in {path}")
    plain = header.format in ("WAV", "WAVEX", "FLAC") and header.subtype in ("PCM_16", "PCM_24", "PCM_32", "FLOAT")
    whole = header.channels == 1 and (first, last) == (0, header.frames)
    return Length(last - first, header.samplerate, plain and whole)


def channels(path: str) -> int:
    """Channels of a recording. Raises AudioError for one that cannot be read."""
    header = _header(path)
    return header.channels if header else _decode_whole(path, os.stat(path).st_mtime_ns)[0].shape[1]


def rms_level(samples: np.ndarray) -> float:
    """RMS level in dBov; -inf for digital silence."""
    # Not np.dot: its last bits depend on how many threads it has, and so would the audio on the number of workers.
    power = float(np.square(samples).sum()) / max(samples.size, 1)
    return 10.0 * math.log10(power) if power > 0 else -math.inf


_window = functools.lru_cache(8)(np.hanning)


def is_narrow_band(samples: np.ndarray, rate: int) -> bool:
    """Whether nothing but noise of rounding lies above 4 kHz: telephone audio, whatever its sampling rate says.

    Judged on at most ten seconds from the middle; 45 dB below the rest is what a resampler's slope leaves there.
    """
    if rate <= 8000:
        return True
    from scipy.fft import next_fast_len  # half of this module's time to import, and few callers come here

    middle = samples[max(0, len(samples) // 2 - 5 * rate) : len(samples) // 2 + 5 * rate]
    middle = (middle - middle.mean()) * _window(len(middle))  # the edges of a cut are energy at all frequencies
    count = next_fast_len(len(middle), real=True)  # a length with a large prime takes ten times as long
    power = np.abs(np.fft.rfft(middle, count)) ** 2
    edge = round(4200 / rate * count)
    return bool(power[edge:].sum() <= 10**-4.5 * power[:edge].sum())


def file_name(key: str, suffix: str = ".flac", letters: str = "A-Za-z0-9") -> str:
    """A file name for any key: the key itself where that is safe, else a readable part and a hash of the whole.

    A name with a hash has a `~`, which no safe key has, so that two keys never share a file.
    """
    if SAFE.fullmatch(key):
        return key + suffix
    readable = re.sub(rf"[^{letters}-]+", "_", key)[:40].strip("_-")
    return f"{readable}~{hashlib.sha256(key.encode('utf-8', 'surrogatepass')).hexdigest()[:20]}{suffix}"


def _header(path: str) -> soundfile._SoundFileInfo | None:
    try:
        return soundfile.info(path)
    except (soundfile.LibsndfileError, TypeError):  # TypeError: .raw without a rate
        return None


def _decode_soundfile(path: str, start: float, end: float | None) -> tuple[np.ndarray, int] | None:
    """Samples of shape (n, channels) and rate in Hz; None where another decoder should be asked."""
    try:
        file = soundfile.SoundFile(path)
    except (soundfile.LibsndfileError, TypeError):  # TypeError: .raw without a rate
        return None
    with file:
        rate, frames = file.samplerate, file.frames
        if _is_length_unknown(file, path):
            return None
        first, last = _bounds(frames, rate, start, end, path)
        # No other decoder is asked now: it would return what is left of a damaged file as if it were whole.
        try:
            if file.seekable():
                if first:
                    file.seek(first)
                kind = "int16" if file.subtype == "PCM_16" else "float32"
                samples = file.read(last - first, dtype=kind, always_2d=True)
            else:
                samples = _decode_unseekable(path, os.stat(path).st_mtime_ns)[first:last]
        except soundfile.LibsndfileError as error:
            raise AudioError("audio_unreadable", f"{path}: damaged or cut off: {error}") from error
        missing = _missing_bytes(path)
        if len(samples) < last - first or (missing and last == frames):
            raise AudioError("audio_unreadable", f"{path}: cut off ({len(samples)} samples, {missing} bytes missing)")
        return samples, rate


@functools.lru_cache(maxsize=1)  # as _decode_whole; PyAV would refuse GSM that SoX padded to whole words
def _decode_unseekable(path: str, _modified: int) -> np.ndarray:
    """All samples of a file in which libsndfile cannot seek, such as GSM in WAV."""
    with soundfile.SoundFile(path) as file:
        return file.read(file.frames, dtype="float32", always_2d=True)


def _is_length_unknown(header: soundfile.SoundFile | soundfile._SoundFileInfo, path: str) -> bool:
    """Whether libsndfile's number of frames is a placeholder or a guess."""
    is_mp3 = header.subtype == "MPEG_LAYER_III"  # in whatever container: recorders put it into WAV
    return header.frames >= UNKNOWN_LENGTH or (is_mp3 and not _mp3_says_length(path))


def _mp3_says_length(path: str) -> bool:
    """Whether an MP3 has the frame that counts the others; without, libsndfile and FFmpeg guess by the file's size."""
    with open(path, "rb") as file:
        tag = file.read(10)
        # The size of an ID3v2 tag has seven bits a byte.
        size = sum(byte << shift for byte, shift in zip(tag[6:], (21, 14, 7, 0), strict=False))
        file.seek(10 + size if tag[:3] == b"ID3" else 0)
        head = file.read(256)
    return any(mark in head for mark in (b"Xing", b"Info", b"VBRI"))


def _missing_bytes(path: str) -> int:
    """Bytes that the header of WAV, RF64, W64, AIFF, CAF, AU or SPHERE promises and the file does not have.

    A stream's placeholder for "unknown" promises nothing, and neither does more: SoX writes 0x7F000000 into AIFF.
    """
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        head = file.read(1024)
        promised, chunk = 8, b""
        while head[:4] == b"caff" and chunk[:4] != b"data" and promised < size:
            file.seek(promised)  # chunks of any length may stand before the samples
            chunk = file.read(12)
            promised += 12 + int.from_bytes(chunk[4:], "big")
    if head[:4] == b"RIFF":
        promised = int.from_bytes(head[4:8], "little") + 8
    elif head[:4] == b"RF64" and head[12:16] == b"ds64":
        promised = int.from_bytes(head[20:28], "little") + 8
    elif head[:4] == b"riff":  # W64
        promised = int.from_bytes(head[16:24], "little")
    elif head[:4] == b"FORM":  # AIFF
        promised = int.from_bytes(head[4:8], "big") + 8
    elif head[:4] == b".snd":  # AU
        promised = int.from_bytes(head[4:8], "big") + int.from_bytes(head[8:12], "big")
    elif head[:7] == b"NIST_1A" and b"shorten" not in head:  # which counts what is unpacked
        facts = dict(re.findall(rb"^(sample_count|channel_count|sample_n_bytes) -i (\d+)", head, re.MULTILINE))
        promised = 1024 + math.prod(map(int, facts.values()))
    short = promised - size
    return short if promised < 0x7F000000 and short > 4096 else 0


def _decode_other(path: str, start: float, end: float | None) -> tuple[np.ndarray, int]:
    samples, rate = _decode_whole(path, os.stat(path).st_mtime_ns)
    first, last = _bounds(len(samples), rate, start, end, path)
    if last == len(samples) and (missing := _missing_bytes(path)):
        raise AudioError("audio_unreadable", f"{path}: cut off ({last} samples, {missing} bytes missing)")
    return samples[first:last], rate


# The segments of one long call follow each other in a corpus: it is decoded once, not once per segment.
@functools.lru_cache(maxsize=1)
def _decode_whole(path: str, _modified: int) -> tuple[np.ndarray, int]:
    errors = []
    for decoder in (_decode_pyav, _decode_sox):
        try:
            return decoder(path)
        except AudioError:
            raise
        except Exception as error:  # libraries with their own exceptions for a file they cannot read
            errors.append(first_line(error))
    raise AudioError("audio_unreadable", f"{path}: {'; '.join(errors)}")


def _decode_pyav(path: str) -> tuple[np.ndarray, int]:
    import av  # a quarter second to import, and few corpora need it

    # A stranger's "audio" may be a playlist: it must not open addresses on the network.
    with av.open(path, metadata_errors="ignore", options={"protocol_whitelist": "file"}) as container:
        if not container.streams.audio:
            raise ValueError("no audio stream")
        if container.format.name in HEADERLESS:
            raise ValueError("no header that says its rate")
        stream = container.streams.audio[0]
        rate, promised = stream.rate, float((stream.duration or 0) * (stream.time_base or 0))
        if container.format.name == "aac" or (container.format.name == "mp3" and not _mp3_says_length(path)):
            promised = 0.0
        blocks = []
        resampler = av.AudioResampler(format="fltp")
        for frame in container.decode(audio=0):
            blocks += [part.to_ndarray().T for part in resampler.resample(frame)]
    samples = np.concatenate(blocks) if blocks else np.zeros((0, 1), np.float32)
    if len(samples) / rate < 0.95 * promised - 0.5:
        raise AudioError("audio_unreadable", f"{path}: cut off after {len(samples) / rate:.2f} of {promised:.2f} s")
    return samples, rate


def _decode_sox(path: str) -> tuple[np.ndarray, int]:
    if not shutil.which("sox"):
        raise ValueError("sox is not installed")
    if path.lower().endswith((".m3u", ".pls")):
        raise ValueError("a playlist; SoX would fetch what it names from the network")
    command = ["sox", "-V1", os.path.abspath(path), "-t", "wav", "-e", "float", "-b", "32", "-"]
    with memory_file() as decoded:
        done = subprocess.run(command, stdout=decoded, stderr=subprocess.PIPE, check=False)
        if done.returncode:
            raise ValueError(done.stderr.decode(errors="replace").strip() or "sox failed")
        decoded.seek(0)
        return soundfile.read(decoded.fileno(), dtype="float32", always_2d=True, closefd=False)


def _check_channel(channel: int | None, channels: int, path: str) -> None:
    if channel is not None and not 0 <= channel < channels:
        raise AudioError("channel_missing", f"channel {channel} of {channels} in {path}")


def _bounds(frames: int, rate: int, start: float, end: float | None, path: str) -> tuple[int, int]:
    first = round(start * rate)
    if start < 0 or (end is not None and end <= start):
        raise AudioError("bad_segment", f"start {start} s, end {end} s: {path}")
    # An annotation's last time may lie a little behind the last sample; half a second is tolerated.
    if first >= frames > 0 or (end is not None and end * rate > frames + rate / 2):
        raise AudioError("bad_segment", f"{start}-{end} s of a file of {frames / rate:.2f} s: {path}")
    return first, frames if end is None else min(round(end * rate), frames)
