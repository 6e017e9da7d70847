"""Speech codecs of the telephone network, in process: G.711, GSM-FR, AMR-NB, Opus NB, G.726, G.722, MP3.

Every codec is an entry of CODECS: a function from int16 samples to decoded int16 samples of the same length and
alignment, at the codec's sampling rate. G.711 is one table look-up; the others are the libraries' own codecs
(libsndfile through soundfile, ffmpeg through PyAV). AMR-NB loses frames inside its stream, where the decoder
conceals them; the other codecs' losses are concealed on decoded speech (packet_loss.py).

    decoded = CODECS["amr_nb"].code(pcm, kbps=12.2, lost=lost)
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import av
import numpy as np
import soundfile

from telephone.packet_loss import PACKET
from telephone.resample import resample

AMR_DELAY = 40  # the encoder looks 5 ms ahead
AMR_NO_DATA = b"\x7c"  # frame type 15, good quality bit: the decoder conceals


@dataclass(frozen=True)
class Codec:
    """One codec: its sampling rate, whether it loses packets inside its stream, and the round trip.

    `code(pcm)` takes and returns int16 samples; `kbps` where a codec has several rates, `lost` (which 20 ms frames)
    only where `loses` is set.
    """

    code: Callable[..., np.ndarray]
    fs: int = 8000
    loses: bool = False


@functools.lru_cache
def g711_tables(law: str) -> tuple[np.ndarray, np.ndarray]:
    """(code of each 16-bit value indexed as uint16, 16-bit value of each code), after ITU-T G.711."""
    values = np.arange(65536, dtype=np.uint16).view(np.int16).astype(np.int32)
    codes = np.arange(256)
    if law == "alaw":
        inverted = codes ^ 0x55
        exponent, mantissa = (inverted >> 4) & 7, inverted & 15
        step = (mantissa << 4) + 8
        magnitude = np.where(exponent > 0, (step + 0x100) << np.maximum(exponent - 1, 0), step)
        decoded = np.where(inverted & 0x80, magnitude, -magnitude)
        size = np.minimum(np.abs(values) >> 4, 2047)
        exponent = np.maximum(np.floor(np.log2(np.maximum(size, 1))).astype(int) - 3, 0)
        mantissa = (size >> np.maximum(exponent - 1, 0)) & 15
        encoded = ((exponent << 4) | mantissa) ^ 0x55 ^ np.where(values >= 0, 0x80, 0)
    else:
        inverted = ~codes & 0xFF
        exponent, mantissa = (inverted >> 4) & 7, inverted & 15
        magnitude = (((mantissa << 3) + 0x84) << exponent) - 0x84
        decoded = np.where(inverted & 0x80, -magnitude, magnitude)
        size = np.minimum((np.abs(values) >> 2) + 33, 0x1FFF)
        segment = np.floor(np.log2(size)).astype(int) - 5
        encoded = ~((segment << 4) | ((size >> (segment + 1)) & 15)) & 0xFF
        encoded = np.where(values >= 0, encoded, encoded & 0x7F)
    return encoded.astype(np.uint8), decoded.astype(np.int16)


@functools.lru_cache
def _g711_round_trip(law: str) -> np.ndarray:
    encoded, decoded = g711_tables(law)
    return decoded[encoded]


def g711(pcm: np.ndarray, law: str) -> np.ndarray:
    """A-law ("alaw") or mu-law ("ulaw") round trip."""
    return _g711_round_trip(law)[pcm.view(np.uint16)]


def to_pcm(samples: np.ndarray) -> np.ndarray:
    """Float samples to int16, saturating as a converter does."""
    scaled = samples * np.float32(32768.0)
    np.rint(scaled, out=scaled)
    return np.clip(scaled, -32768, 32767, out=scaled).astype(np.int16)


def from_pcm(pcm: np.ndarray) -> np.ndarray:
    """int16 samples to float32 in [-1, 1)."""
    return pcm.astype(np.float32) * np.float32(1 / 32768.0)


def amr_encode(pcm: np.ndarray, kbps: float, dtx: bool = False) -> list[bytes]:
    """AMR-NB frames in storage format (RFC 4867 without the magic number), one per 20 ms; `dtx` codes no pauses."""
    padded = np.concatenate([pcm, np.zeros(AMR_DELAY + (-(pcm.size + AMR_DELAY)) % PACKET, np.int16)])
    encoder = _encoder("libopencore_amrnb", 8000, kbps, {"dtx": str(int(dtx))})
    return [bytes(packet) for packet in _packets(encoder, padded)]


def amr_decode(frames: list[bytes]) -> np.ndarray:
    """Decode AMR-NB frames; AMR_NO_DATA in place of a frame makes the decoder conceal it."""
    return _decode("libopencore_amrnb", [av.Packet(frame) for frame in frames], 8000)


def _amr_nb(pcm: np.ndarray, kbps: float, dtx: bool = False, lost: np.ndarray | None = None) -> np.ndarray:
    frames = amr_encode(pcm, kbps, dtx)
    if lost is not None:
        frames = [AMR_NO_DATA if i < lost.size and lost[i] else frame for i, frame in enumerate(frames)]
    return amr_decode(frames)[AMR_DELAY:]


def opus_encode(pcm: np.ndarray, kbps: float) -> tuple[list[av.Packet], bytes]:
    """Opus packets of 20 ms of narrowband speech, and the header a decoder or an Ogg file needs."""
    encoder = _encoder("libopus", 8000, kbps, {"application": "voip"})
    return _packets(encoder, pcm), encoder.extradata


def _opus_nb(pcm: np.ndarray, kbps: float) -> np.ndarray:
    packets, header = opus_encode(pcm, kbps)
    return to_pcm(resample(from_pcm(_decode("libopus", packets, 48000, header)), 48000, 8000))


def _g722(pcm: np.ndarray) -> np.ndarray:
    # 22 samples at 16 kHz: the delay of its quadrature mirror filters
    padded = np.concatenate([pcm, np.zeros(22 + pcm.size % 2, np.int16)])
    return _decode("g722", _encode("g722", padded, 16000, 64), 16000)[22:]


def _mp3(pcm: np.ndarray, kbps: float) -> np.ndarray:
    return _decode("mp3", _encode("libmp3lame", pcm, 8000, kbps), 8000)


def _sndfile(container: str, subtypes: dict[float | None, str]) -> Callable:
    def code(pcm: np.ndarray, kbps: float | None = None) -> np.ndarray:
        file = io.BytesIO()
        soundfile.write(file, pcm, 8000, format=container, subtype=subtypes[kbps])
        file.seek(0)
        return soundfile.read(file, dtype="int16")[0]

    return code


def _encoder(name: str, fs: int, kbps: float, options: dict[str, str] | None = None) -> av.AudioCodecContext:
    encoder = av.CodecContext.create(name, "w")
    formats = [item.name for item in encoder.codec.audio_formats]
    encoder.format = "s16" if "s16" in formats else "s16p"
    encoder.sample_rate, encoder.layout, encoder.bit_rate = fs, "mono", round(kbps * 1000)
    encoder.time_base = Fraction(1, fs)
    encoder.options = options or {}
    encoder.open()
    return encoder


def _encode(name: str, pcm: np.ndarray, fs: int, kbps: float) -> list[av.Packet]:
    return _packets(_encoder(name, fs, kbps), pcm)


def _packets(encoder: av.AudioCodecContext, pcm: np.ndarray) -> list[av.Packet]:
    size, packets = encoder.frame_size or pcm.size, []
    for start in range(0, pcm.size, size):
        frame = av.AudioFrame.from_ndarray(pcm[None, start : start + size], encoder.format.name, "mono")
        frame.sample_rate, frame.pts = encoder.sample_rate, start
        packets += encoder.encode(frame)
    return packets + encoder.encode(None)


def _decode(name: str, packets: list[av.Packet], fs: int, header: bytes | None = None) -> np.ndarray:
    decoder = av.CodecContext.create(name, "r")
    decoder.sample_rate, decoder.layout = fs, "mono"
    if header:
        decoder.extradata = header
    frames = [frame for packet in [*packets, None] for frame in decoder.decode(packet)]
    return np.concatenate([frame.to_ndarray().ravel() for frame in frames])


def fitted(pcm: np.ndarray, count: int) -> np.ndarray:
    """Exactly `count` samples: codecs work in whole frames."""
    return pcm[:count] if pcm.size >= count else np.pad(pcm, (0, count - pcm.size), mode="edge")


CODECS: dict[str, Codec] = {
    "g711_alaw": Codec(lambda pcm: g711(pcm, "alaw")),
    "g711_ulaw": Codec(lambda pcm: g711(pcm, "ulaw")),
    "gsm_fr": Codec(_sndfile("WAV", {None: "GSM610"})),
    "amr_nb": Codec(_amr_nb, loses=True),
    "opus_nb": Codec(_opus_nb),
    # G.726 at 32 kbit/s is G.721, at 24 and 40 kbit/s the old G.723: libsndfile has them under those names.
    "g726": Codec(_sndfile("AU", {24: "G723_24", 32: "G721_32", 40: "G723_40"})),
    "g722": Codec(_g722, fs=16000),
    "mp3": Codec(_mp3),
}
