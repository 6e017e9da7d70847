"""Speech codecs of the telephone network, in process: G.711, GSM-FR, AMR-NB, Opus NB, G.726, G.722, MP3.

Every codec is an entry of CODECS: a function from int16 samples to decoded int16 samples of the same length and
alignment, at the codec's sampling rate. G.711 is one table look-up; the others are the libraries' own codecs
(libsndfile through soundfile, ffmpeg through PyAV). AMR-NB loses frames inside its stream, where the decoder
conceals them; the other codecs' losses are concealed on decoded speech (packet_loss.py).

    decoded = CODECS["amr_nb"].code(pcm, kbps=12.2, lost=lost)
"""

import functools
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple

import av
import numpy as np
import soundfile

from common import memory_file
from telephone.packet_loss import PACKET
from telephone.resample import resample

AMR_DELAY = 40  # the encoder looks 5 ms ahead


class Codec(NamedTuple):
    """A round trip of int16 samples, with `kbps` where there are several rates; its sampling rate in Hz; and whether
    it takes `lost` (which 20 ms frames) to lose them inside its stream.
    """

    code: Callable[..., np.ndarray]
    fs: int = 8000
    loses: bool = False


def _libsndfile(pcm: np.ndarray, subtype: str) -> np.ndarray:
    with memory_file() as file:
        soundfile.write(file.fileno(), pcm, 8000, format="WAV", subtype=subtype, closefd=False)
        file.seek(0)
        return soundfile.read(file.fileno(), dtype="int16", closefd=False)[0]


@functools.lru_cache
def _g711_table(law: str) -> np.ndarray:
    """What a round trip makes of each 16-bit value, indexed as uint16."""
    return _libsndfile(np.arange(65536, dtype=np.uint16).view(np.int16), law.upper())


def g711(pcm: np.ndarray, law: str) -> np.ndarray:
    """A-law ("alaw") or mu-law ("ulaw") round trip."""
    return _g711_table(law).take(pcm.view(np.uint16))


def to_pcm(samples: np.ndarray) -> np.ndarray:
    """Float samples to int16, saturating as a converter does."""
    scaled = samples * np.float32(32768.0)
    np.rint(scaled, out=scaled)
    return np.clip(scaled, -32768, 32767, out=scaled).astype(np.int16)


def from_pcm(pcm: np.ndarray) -> np.ndarray:
    """int16 samples to float32 in [-1, 1)."""
    return pcm.astype(np.float32) * np.float32(1 / 32768.0)


def fitted(pcm: np.ndarray, count: int) -> np.ndarray:
    """Exactly `count` samples: codecs work in whole frames."""
    return pcm[:count] if pcm.size >= count else np.pad(pcm, (0, count - pcm.size), mode="edge")


def amr_encode(pcm: np.ndarray, kbps: float, dtx: bool = False) -> list[bytes]:
    """AMR-NB frames in storage format (RFC 4867 without the magic number), one per 20 ms; `dtx` codes no pauses."""
    padded = np.pad(pcm, (0, AMR_DELAY + (-(pcm.size + AMR_DELAY)) % PACKET))
    packets, _ = _encode("libopencore_amrnb", padded, 8000, kbps, dtx=str(int(dtx)))
    return [bytes(packet) for packet in packets]


def amr_decode(frames: list[bytes]) -> np.ndarray:
    """Decode AMR-NB frames; 7C in place of one (type 15, no data, good quality) makes the decoder conceal it."""
    return _decode("libopencore_amrnb", [av.Packet(frame) for frame in frames], 8000)


def _amr_nb(pcm: np.ndarray, kbps: float, dtx: bool = False, lost: np.ndarray | None = None) -> np.ndarray:
    frames = amr_encode(pcm, kbps, dtx)
    for i in np.flatnonzero([] if lost is None else lost[: len(frames)]):
        frames[i] = b"\x7c"
    return amr_decode(frames)[AMR_DELAY:]


def opus_encode(pcm: np.ndarray, kbps: float) -> tuple[list[av.Packet], bytes]:
    """Opus packets of 20 ms of narrowband speech, and the header a decoder or an Ogg file needs."""
    return _encode("libopus", pcm, 8000, kbps, application="voip")


def _opus_nb(pcm: np.ndarray, kbps: float) -> np.ndarray:
    packets, header = opus_encode(pcm, kbps)
    return to_pcm(resample(from_pcm(_decode("libopus", packets, 48000, header)), 48000, 8000))


def _g722(pcm: np.ndarray) -> np.ndarray:
    # 22 samples at 16 kHz: the delay of its quadrature mirror filters
    packets, _ = _encode("g722", np.pad(pcm, (0, 22 + pcm.size % 2)), 16000, 64)
    return _decode("g722", packets, 16000)[22:]


def _g726(pcm: np.ndarray, kbps: float) -> np.ndarray:
    packets, _ = _encode("g726", pcm, 8000, kbps)
    return _decode("g726", packets, 8000, bits_per_coded_sample=str(round(kbps / 8)))


def _mp3(pcm: np.ndarray, kbps: float) -> np.ndarray:
    # LAME's fast mode: a recorder encodes many calls at a time.
    return _decode("mp3", _encode("libmp3lame", pcm, 8000, kbps, compression_level="7")[0], 8000)


def _encode(name: str, pcm: np.ndarray, fs: int, kbps: float, **options: str) -> tuple[list[av.Packet], bytes | None]:
    """The packets of an ffmpeg encoder, and its header where it has one."""
    encoder = av.CodecContext.create(name, "w")
    encoder.format = "s16p" if name == "libmp3lame" else "s16"
    encoder.sample_rate, encoder.layout, encoder.bit_rate = fs, "mono", round(kbps * 1000)
    encoder.time_base = Fraction(1, fs)
    encoder.options = options
    encoder.open()
    size, packets = encoder.frame_size or pcm.size, []
    for start in range(0, pcm.size, size):
        frame = av.AudioFrame.from_ndarray(pcm[None, start : start + size], encoder.format.name, "mono")
        frame.sample_rate, frame.pts = fs, start
        packets += encoder.encode(frame)
    return packets + encoder.encode(None), encoder.extradata


def _decode(name: str, packets: list[av.Packet], fs: int, header: bytes | None = None, **options: str) -> np.ndarray:
    decoder = av.CodecContext.create(name, "r")
    decoder.sample_rate, decoder.layout, decoder.options = fs, "mono", options
    if header:
        decoder.extradata = header
    frames = [frame for packet in [*packets, None] for frame in decoder.decode(packet)]
    return np.concatenate([frame.to_ndarray().ravel() for frame in frames])


CODECS: dict[str, Codec] = {
    "g711_alaw": Codec(lambda pcm: g711(pcm, "alaw")),
    "g711_ulaw": Codec(lambda pcm: g711(pcm, "ulaw")),
    "gsm_fr": Codec(lambda pcm: _libsndfile(pcm, "GSM610")),
    "amr_nb": Codec(_amr_nb, loses=True),
    "opus_nb": Codec(_opus_nb),
    "g726": Codec(_g726),
    "g722": Codec(_g722, fs=16000),
    "mp3": Codec(_mp3),
}
