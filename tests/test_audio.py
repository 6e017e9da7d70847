"""local/audio.py reads what call centres keep, refuses what is damaged, and writes nothing outside its folder."""

import os
import shutil
import socket
import subprocess
from unittest import mock

import numpy as np
import pytest
import soundfile
from hypothesis import example, given
from hypothesis import strategies as st

import audio
from sounds import encode, speech
from telephone.resample import resample

RNG = np.random.default_rng(0)


def tone(seconds, rate, hz=440.0, gain=0.3):
    return (gain * np.sin(2 * np.pi * hz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


# --- names


@given(st.lists(st.text(max_size=300), min_size=2, max_size=5, unique=True))
@example(["../../x", "/etc/passwd", "a/b", "a_b", "..", ".", ""])
@example(["x" * 5000, "x" * 5001, "x" * 120, "x" * 121])
@example(["好的", "好 的", "a\nb", "a\0b", "a b", "~", "-rf", "a~b"])
@example(["\ud800", "é", "e\u0301"])
def test_no_key_leaves_its_folder_and_no_two_share_a_file(keys):
    names = [audio.file_name(key) for key in keys]
    assert len(set(names)) == len(keys)
    for name in names:
        assert os.path.basename(name) == name and name.isascii() and len(name) <= 200
        assert not name.startswith((".", "-")) and name.isprintable()


def test_a_plain_key_keeps_its_name():
    assert audio.file_name("BAC009S0002W0122") == "BAC009S0002W0122.flac"


# --- formats


@pytest.mark.parametrize(
    ("name", "rate", "kind"),
    [
        ("pcm.wav", 8000, "PCM_16"), ("alaw.wav", 8000, "ALAW"), ("ulaw.wav", 8000, "ULAW"),
        ("gsm.wav", 8000, "GSM610"), ("float.wav", 44100, "FLOAT"), ("deep.wav", 96000, "PCM_24"),
        ("a.flac", 16000, "PCM_16"),
        ("a.mp3", 16000, None), ("a.ogg", 16000, None), ("a.au", 8000, "ULAW"),
        ("amr.amr", 8000, "libopencore_amrnb"), ("a.g722", 16000, "g722"), ("g726.wav", 8000, "g726"),
        ("a.m4a", 16000, "aac"), ("mp3.wav", 16000, "libmp3lame"), ("a.opus", 48000, "libopus"),
    ],
)
def test_formats_of_call_centres_are_read(tmp_path, name, rate, kind):
    path, samples = tmp_path / name, tone(2.0, rate)
    if kind is None or kind.isupper():
        soundfile.write(path, samples, rate, subtype=kind)
    else:
        encode(path, samples, rate, kind)
    decoded, decoded_rate = audio.read(path)
    assert decoded_rate == rate and decoded.dtype == np.float32 and decoded.ndim == 1
    assert abs(len(decoded) / rate - 2.0) < 0.15
    spectrum = np.abs(np.fft.rfft(decoded))
    assert abs(np.argmax(spectrum) * rate / len(decoded) - 440) < 5
    assert audio.length(path)[:2] == (len(decoded), rate)


@pytest.mark.parametrize(("name", "codec"), [("a.al", "pcm_alaw"), ("a.ul", "pcm_mulaw"), ("a.sw", "pcm_s16le")])
def test_samples_without_a_header_are_read_at_the_telephones_rate_or_not_at_all(tmp_path, name, codec):
    encode(tmp_path / name, tone(2.0, 8000), 8000, codec)
    try:
        decoded, rate = audio.read(tmp_path / name)
    except audio.AudioError as error:
        assert error.reason == "audio_unreadable" and (name == "a.sw" or not shutil.which("sox"))
    else:
        assert rate == 8000 and len(decoded) == 16000


@pytest.mark.skipif(not shutil.which("sox"), reason="sox is not installed")
def test_nist_sphere_is_read(tmp_path):
    soundfile.write(tmp_path / "a.wav", tone(1.0, 8000), 8000)
    subprocess.run(["sox", tmp_path / "a.wav", tmp_path / "-it's $(a).sph"], check=True, cwd=tmp_path)
    assert len(audio.read(tmp_path / "-it's $(a).sph")[0]) == 8000


def test_channels_and_segments(tmp_path):
    left, right = tone(3.0, 96000, 300), tone(3.0, 96000, 900)
    path = tmp_path / "call.wav"
    soundfile.write(path, np.stack([left, right], axis=1), 96000, subtype="FLOAT")
    assert np.array_equal(audio.read(path, channel=1, start=0.5, end=1.0)[0], right[48000:96000])
    assert np.allclose(audio.read(path)[0], (left + right) / 2, atol=1e-7)
    assert len(audio.read(path, start=2.9, end=3.4)[0]) == 9600, "an annotation may end a little late"
    for arguments, reason in [
        ({"channel": 2}, "channel_missing"), ({"start": 3.0}, "bad_segment"), ({"end": 9.0}, "bad_segment"),
        ({"start": 2.0, "end": 1.0}, "bad_segment"), ({"start": -1.0}, "bad_segment"),
    ]:
        for function in (audio.read, audio.length):
            with pytest.raises(audio.AudioError) as caught:
                function(path, **arguments)
            assert caught.value.reason == reason


@pytest.mark.parametrize(("name", "codec"), [("call.amr", "libopencore_amrnb"), ("gsm.wav", None)])
def test_segments_of_a_compressed_call_are_those_of_the_whole_decoded_once(tmp_path, name, codec):
    path, samples = tmp_path / name, RNG.normal(0, 0.1, 3 * 8000)
    encode(path, samples, 8000, codec) if codec else soundfile.write(path, samples, 8000, subtype="GSM610")
    whole, _ = audio.read(path)
    path.touch()  # it is another file now
    module, function = (audio, "_decode_pyav") if codec else (soundfile.SoundFile, "read")
    with mock.patch.object(module, function, autospec=True, side_effect=getattr(module, function)) as decode:
        for start in (0.0, 0.5, 1.0, 1.5):
            part, _ = audio.read(path, start=start, end=start + 1.0)
            assert np.array_equal(part, whole[int(start * 8000) :][:8000])
    assert decode.call_count == 1


@pytest.mark.skipif(not shutil.which("sox"), reason="sox is not installed")
def test_gsm_that_sox_padded_has_segments(tmp_path):
    soundfile.write(tmp_path / "a.wav", RNG.normal(0, 0.1, 48001), 8000)
    subprocess.run(["sox", "a.wav", "-e", "gsm-full-rate", "gsm.wav"], check=True, cwd=tmp_path)
    assert np.array_equal(audio.read(tmp_path / "gsm.wav", start=1.0)[0], audio.read(tmp_path / "gsm.wav")[0][8000:])


def test_a_streamed_flac_says_nothing_of_its_length_and_is_read_whole(tmp_path):
    soundfile.write(tmp_path / "a.flac", tone(1.0, 16000), 16000)
    data = bytearray((tmp_path / "a.flac").read_bytes())
    data[21] &= 0xF0  # STREAMINFO's 36 bits of total samples
    data[22:26] = bytes(4)
    (tmp_path / "a.flac").write_bytes(data)
    assert len(audio.read(tmp_path / "a.flac")[0]) == 16000
    assert audio.length(tmp_path / "a.flac").samples == 16000


@pytest.mark.parametrize(("name", "codec", "options"), [
    ("a.mp3", "libmp3lame", {"write_xing": "0"}), ("a.mp3", "libmp3lame", {"write_xing": "0", "id3v2_version": "0"}),
    ("a.aac", "aac", {}),
])  # fmt: skip
def test_a_stream_without_a_length_is_read_whole_whatever_its_size_suggests(tmp_path, name, codec, options):
    samples = np.concatenate([np.zeros(10 * 44100, np.float32), RNG.normal(0, 0.1, 10 * 44100).astype(np.float32)])
    encode(tmp_path / name, samples, 44100, codec, **options)
    for frames in (len(audio.read(tmp_path / name)[0]), audio.length(tmp_path / name).samples):
        assert abs(frames - len(samples)) < 4410
    assert len(audio.read(tmp_path / name, start=18.0, end=19.0)[0]) == 44100


def test_an_aiff_that_sox_wrote_to_a_pipe_is_read_whole(tmp_path):
    soundfile.write(tmp_path / "a.aiff", tone(1.0, 8000), 8000)
    data = bytearray((tmp_path / "a.aiff").read_bytes())
    data[4:8] = bytes.fromhex("7f000050")
    (tmp_path / "a.aiff").write_bytes(data)
    assert len(audio.read(tmp_path / "a.aiff")[0]) == 8000


# --- damage


@pytest.mark.parametrize("share", [0.95, 0.5, 0.02])
@pytest.mark.parametrize("name", ["a.flac", "a.wav", "a.mp3"])
def test_a_file_cut_off_is_refused_not_shortened(tmp_path, name, share):
    path = tmp_path / name
    soundfile.write(path, RNG.normal(0, 0.1, 48000), 16000)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(audio.AudioError) as caught:
        audio.read(path)
    assert caught.value.reason in ("audio_unreadable", "audio_empty")


@pytest.mark.parametrize(("kind", "subtype"), [
    ("NIST", "ULAW"), ("NIST", "PCM_16"), ("AU", "ULAW"), ("AIFF", "PCM_16"), ("W64", "PCM_16"), ("WAV", "ALAW"),
    ("RF64", "ULAW"), ("CAF", "ULAW"),
])  # fmt: skip
def test_a_header_that_promises_more_than_there_is_is_not_believed(tmp_path, kind, subtype):
    path = tmp_path / "a.audio"
    soundfile.write(path, RNG.normal(0, 0.1, (160000, 2)), 8000, format=kind, subtype=subtype)
    assert len(audio.read(path)[0]) == 160000
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(audio.AudioError, match="cut off"):
        audio.read(path)


def test_the_header_of_a_packed_sphere_promises_no_bytes(tmp_path):
    head = b"NIST_1A\n   1024\nsample_count -i 160000\nsample_n_bytes -i 2\nsample_coding -s26 pcm"
    for packed, missing in ((b"", 320000 - 8000), (b",embedded-shorten-v2.00", 0)):
        (tmp_path / "a.sph").write_bytes((head + packed).ljust(1024) + bytes(8000))
        assert audio._missing_bytes(tmp_path / "a.sph") == missing


def test_what_is_no_audio_has_a_reason(tmp_path):
    (tmp_path / "text.wav").write_text("hello " * 99)
    (tmp_path / "zero.wav").touch()
    (tmp_path / "folder.wav").mkdir()
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 8000)
    soundfile.write(tmp_path / "nan.wav", np.array([0, np.nan, 0]), 8000, subtype="FLOAT")
    soundfile.write(tmp_path / "huge.wav", np.array([0, -1e30, 0]), 8000, subtype="FLOAT")
    soundfile.write(tmp_path / "slow.wav", np.zeros(8000), 1)
    for name, reason in [
        ("text.wav", "audio_unreadable"), ("zero.wav", "audio_unreadable"), ("folder.wav", "audio_missing"),
        ("none.wav", "audio_missing"), ("empty.wav", "audio_empty"), ("nan.wav", "audio_not_finite"),
        ("huge.wav", "audio_not_finite"), ("slow.wav", "audio_unreadable"),
        ("a\0b", "audio_missing"),
    ]:
        with pytest.raises(audio.AudioError) as caught:
            audio.read(tmp_path / name)
        assert caught.value.reason == reason, name


@pytest.mark.parametrize("name", ["list.m3u8", "list.m3u", "LIST.PLS"])
def test_a_playlist_opens_no_address(tmp_path, name):
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0)
        url = f"http://127.0.0.1:{server.getsockname()[1]}/a.wav"
        (tmp_path / name).write_text({"m3u8": f"#EXTM3U\n#EXTINF:1,\n{url}\n#EXT-X-ENDLIST\n", "m3u": f"{url}\n"}.get(
            name.split(".")[1], f"[playlist]\nFile1={url}\n"))
        with pytest.raises(audio.AudioError) as caught:
            audio.read(tmp_path / name)
        assert caught.value.reason == "audio_unreadable"
        with pytest.raises(BlockingIOError):
            server.accept()


# --- writing


@pytest.mark.parametrize("suffix", [".flac", ".wav"])
def test_written_audio_is_16_bit_mono_and_appears_whole(tmp_path, suffix):
    samples = np.append(tone(0.5, 16000), [2.0, -2.0])
    audio.write(tmp_path / "new" / f"a{suffix}", samples, 16000)
    pcm = (3e4 * samples[:8000]).astype(np.int16)
    audio.write(tmp_path / f"pcm{suffix}", pcm, 16000)
    assert np.array_equal(soundfile.read(tmp_path / f"pcm{suffix}", dtype="int16")[0], pcm)
    assert [path.name for path in (tmp_path / "new").iterdir()] == [f"a{suffix}"]
    header = soundfile.info(tmp_path / "new" / f"a{suffix}")
    assert (header.frames, header.channels, header.subtype) == (8002, 1, "PCM_16")
    back, _ = audio.read(tmp_path / "new" / f"a{suffix}")
    assert np.abs(back[:8000] - samples[:8000]).max() < 2**-15
    assert back[-2] > 0.999 and back[-1] == -1.0, "overload clips, it does not wrap"
    assert audio.length(tmp_path / "new" / f"a{suffix}").plain


def test_a_full_disk_says_so_and_leaves_nothing(disk):
    folder = disk("size=64k")
    with pytest.raises(OSError, match="No space left"):
        audio.write(folder / "a.wav", np.zeros(100_000), 16000)
    assert not list(folder.iterdir())


# --- band


def test_telephone_audio_is_told_by_its_spectrum_not_its_rate():
    noise = RNG.normal(0, 0.1, 16000 * 4).astype(np.float32)
    telephone = noise.copy()
    spectrum = np.fft.rfft(telephone)
    spectrum[len(spectrum) * 34 // 80 :] = 0
    telephone = np.round(np.fft.irfft(spectrum) * 32768) / 32768
    assert audio.is_narrow_band(telephone, 16000) and audio.is_narrow_band(noise, 8000)
    assert not audio.is_narrow_band(noise, 16000)
    spectrum = np.fft.rfft(noise)
    spectrum[len(spectrum) * 50 // 80 :] = 0
    assert not audio.is_narrow_band(np.fft.irfft(spectrum), 16000), "up to 5 kHz"
    assert not audio.is_narrow_band(telephone + 0.02 * noise, 16000), "images of a poor resampler are energy too"


def test_a_second_cut_out_anywhere_is_of_the_band_of_the_whole():
    wideband = speech(60) + RNG.normal(0, 0.003, 60 * 16000).astype(np.float32)  # it has no breath of its own
    telephone = resample(resample(wideband, 16000, 8000), 8000, 16000)
    for start in RNG.integers(0, 59 * 16000, 200):
        cut = slice(start, start + 16000)
        assert audio.is_narrow_band(telephone[cut], 16000)
        for offset in (0.0, 0.1):
            assert not audio.is_narrow_band(wideband[cut] + offset, 16000)


def test_a_folder_that_cannot_be_written_to_is_what_the_error_says():
    with pytest.raises(PermissionError):  # root too may create no file there
        audio.write("/sys/kernel/a.wav", np.zeros(16, np.int16), 8000)
