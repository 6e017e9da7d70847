"""The telephone channel: real codecs, published responses, levels and losses as asked, the same call every time."""

import io
import json
import shutil
import subprocess
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import firwin, lfilter

import audio
from common import UserError
from sounds import speech
from telephone import filters, noise
from telephone.channel import CODED, apply, draw, load_config
from telephone.codecs import CODECS, amr_decode, amr_encode, fitted, from_pcm, g711, opus_encode, to_pcm
from telephone.packet_loss import PACKET, bursts, conceal, lost_packets
from telephone.resample import resample, resample_counted

CONF = Path(__file__).parent.parent / "conf" / "telephone_channel.yaml"
PROMPTS = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
KBPS = {"amr_nb": (4.75, 5.15, 5.9, 6.7, 7.4, 7.95, 10.2, 12.2), "opus_nb": (8, 12, 16), "g726": (24, 32, 40)}
KBPS["mp3"] = (8, 16, 24, 32)
ROUND_TRIPS = [(name, kbps) for name in CODECS for kbps in KBPS.get(name, (None,))]
DEFAULT = load_config(CONF)
CLEAN = load_config(CONF, "clean-pcma")


def call(*arguments, **sources):
    """A call as float samples."""
    return from_pcm(apply(*arguments, **sources))


def snr(reference, other):
    reference, other = np.float64(reference), np.float64(other[: len(reference)])
    return 10 * np.log10(np.sum(reference**2) / max(np.sum((reference[: len(other)] - other) ** 2), 1e-9))


def delay(reference, other, most=400):
    """Samples by which `other` comes later."""
    spectrum = np.fft.rfft(np.float64(other), 2 * len(other)) * np.conj(
        np.fft.rfft(np.float64(reference), 2 * len(other))
    )
    correlation = np.fft.irfft(spectrum)
    return int(np.argmax(np.concatenate([correlation[-most:], correlation[:most]]))) - most


def need(program):
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")


def decoded_by(command, stream, suffix, folder):
    """int16 samples that a program decodes from a stream."""
    path = folder / f"stream{suffix}"
    path.write_bytes(stream)
    command = [word.replace("IN", str(path)) for word in command.split()]
    return np.frombuffer(subprocess.run(command, capture_output=True, check=True).stdout, np.int16)


# G.711 and the other codecs


def itu_levels(law):
    """The 128 positive output values of ITU-T G.711 tables 1a and 2a on the scale of 16 bits, and the decision values
    between which they stand for the input: 8 segments of 16 even steps, each segment's twice the one before.
    """
    segment, step = np.divmod(np.arange(129), 16)
    if law == "alaw":  # the first two segments have the same step
        edges = 16 * np.where(segment < 1, step, (step + 16) << np.maximum(segment - 1, 0))
        return (edges[:-1] + edges[1:]) // 2, edges
    edges = 4 * (((step + 16) << (segment + 1)) - 33)  # a step reaches from half below to half above its value
    return 4 * (((2 * step + 33) << segment) - 33)[:-1], edges


@pytest.mark.parametrize(("law", "subtype"), [("alaw", "ALAW"), ("ulaw", "ULAW")])
def test_g711_equals_the_itu_tables_and_libsndfile(law, subtype):
    values = np.arange(-32768, 32768).astype(np.int16)
    file = io.BytesIO()
    soundfile.write(file, values, 8000, format="RAW", subtype=subtype)
    file.seek(0)
    decoded, _ = soundfile.read(file, dtype="int16", samplerate=8000, channels=1, format="RAW", subtype=subtype)
    assert np.array_equal(g711(values, law), decoded)
    levels, edges = itu_levels(law)
    assert np.array_equal(np.unique(decoded), np.unique([-levels, levels]))
    size = np.abs(values.astype(int))
    inside = np.searchsorted(edges, size, "right") - 1
    assert g711(np.zeros(1, np.int16), law)[0] == levels[0]
    # On a decision value, where both neighbours are as near, the tables leave the choice open.
    free = np.isin(size, edges) | (size >= edges[-1])
    wanted = np.where(values < 0, -1, 1) * levels[np.minimum(inside, 127)]
    assert np.array_equal(g711(values, law)[~free], wanted[~free])
    assert np.all(np.abs(np.abs(g711(values, law).astype(int)) - size)[free] <= 1024)
    if law == "alaw":
        assert np.array_equal(g711(g711(values, law), law), g711(values, law))


@pytest.mark.parametrize(("law", "name"), [("alaw", "a-law"), ("ulaw", "mu-law")])
def test_g711_is_within_one_step_of_sox(law, name, tmp_path):
    need("sox")
    values = np.arange(-32768, 32768).astype(np.int16)
    raw = "-t raw -r 8000 -c 1"
    command = f"sox -D {raw} -e signed -b 16 IN {raw} -e {name} -b 8 -"
    codes = decoded_by(command, values.tobytes(), ".raw", tmp_path).tobytes()
    decoded = decoded_by(f"sox -D {raw} -e {name} -b 8 IN {raw} -e signed -b 16 -", codes, ".raw", tmp_path)
    steps = np.unique(g711(values, law))
    ours, theirs = (np.searchsorted(steps, x) for x in (g711(values, law), decoded))
    assert np.abs(ours - theirs).max() <= 1


def test_gsm_gives_the_samples_sox_gives(tmp_path):
    need("sox")
    pcm = to_pcm(speech(3, 8000))
    raw = "-t raw -r 8000 -c 1 -e signed -b 16"
    stream = decoded_by(f"sox -D {raw} IN -t gsm -", pcm.tobytes(), ".raw", tmp_path).tobytes()
    theirs = decoded_by(f"sox -D -t gsm -r 8000 IN {raw} -", stream, ".gsm", tmp_path)
    assert np.array_equal(CODECS["gsm_fr"].code(pcm)[: pcm.size], theirs[: pcm.size])


@pytest.mark.parametrize("kbps", KBPS["amr_nb"])
def test_amr_stream_decoded_by_sox_and_ffmpeg_is_ours(kbps, tmp_path):
    frames = amr_encode(to_pcm(speech(2, 8000)), kbps)
    ours = amr_decode(frames)
    commands = {"sox": "sox -D -t amr-nb IN -t raw -e signed -b 16 -", "ffmpeg": "ffmpeg -v error -i IN -f s16le -"}
    present = [name for name in commands if shutil.which(name)]
    if not present:
        pytest.skip("neither sox nor ffmpeg is installed")
    # ffmpeg's own decoder works in floating point and is not bit-exact.
    for name in present:
        theirs = decoded_by(commands[name], b"#!AMR\n" + b"".join(frames), ".amr", tmp_path)
        assert snr(ours, theirs) > {"sox": 30, "ffmpeg": 20}[name]


def test_opus_stream_decoded_by_ffmpeg_is_ours(tmp_path):
    need("ffmpeg")
    pcm = to_pcm(speech(3, 8000))
    packets, header = opus_encode(pcm, 12)
    path = tmp_path / "stream.ogg"
    with av.open(path, "w") as file:
        stream = file.add_stream("libopus", rate=8000, layout="mono")
        stream.codec_context.extradata = header
        for packet in packets:
            packet.stream = stream
            file.mux(packet)
    # ffmpeg's native decoder up-samples with another phase; Debian's libopus in it is a build of its own.
    theirs = decoded_by("ffmpeg -v error -c:a libopus -i IN -f s16le -", path.read_bytes(), ".opus", tmp_path)
    theirs = resample(from_pcm(theirs), 48000, 8000) * 32768
    assert snr(CODECS["opus_nb"].code(pcm, kbps=12)[: pcm.size - 400], theirs) > 30


@pytest.mark.parametrize(("name", "kbps"), ROUND_TRIPS)
def test_every_codec_keeps_speech_where_it_was(name, kbps):
    codec = CODECS[name]
    pcm = to_pcm(speech(3.01, codec.fs))
    settings = {} if kbps is None else {"kbps": kbps}
    decoded = codec.code(pcm, **settings)
    assert decoded.dtype == np.int16 and decoded.size >= pcm.size - codec.fs // 50
    assert abs(delay(pcm, fitted(decoded, pcm.size))) <= codec.fs // 1000
    assert snr(pcm, fitted(decoded, pcm.size)) < 40  # that of A-law is 38
    assert np.array_equal(decoded, codec.code(pcm, **settings))


@pytest.mark.parametrize("name", KBPS)
def test_every_rate_of_a_codec_sounds_otherwise(name):
    pcm = to_pcm(speech(2, 8000))
    assert len({CODECS[name].code(pcm, kbps=kbps).tobytes() for kbps in KBPS[name]}) == len(KBPS[name])


def test_amr_sends_less_in_pauses_with_dtx():
    hiss = np.random.default_rng(0).integers(-9, 9, 16000).astype(np.int16)
    whole, pauses = (sum(map(len, amr_encode(hiss, 12.2, dtx))) for dtx in (False, True))
    assert pauses < whole / 3


def test_amr_conceals_lost_frames_in_its_decoder():
    pcm = to_pcm(speech(2, 8000))
    lost = np.zeros(101, bool)
    lost[[20, 21, 60]] = True
    whole, damaged = (CODECS["amr_nb"].code(pcm, kbps=12.2, lost=x)[: pcm.size] for x in (None, lost))
    differs = np.flatnonzero(whole != damaged)
    assert 20 * 160 - 80 <= differs[0] <= 21 * 160
    assert np.any(damaged[20 * 160 : 21 * 160])
    # The decoder's memory makes the error last beyond the gap, which concealment on samples would not.
    assert np.any(differs > 23 * 160)


# Loss and concealment


@given(st.integers(0, 2**32), st.sampled_from([(0.5, 1.1), (1, 1.5), (3, 2), (5, 2.5), (10, 3)]))
@settings(max_examples=40, deadline=None)
def test_loss_rate_and_burst_length_are_as_asked(seed, preset):
    percent, burst = preset
    lost = lost_packets(np.random.default_rng(seed), 400_000, percent / 100, burst)
    lengths = [count for _, count in bursts(lost)]
    assert lost.mean() * 100 == pytest.approx(percent, rel=0.15)
    assert np.mean(lengths) == pytest.approx(burst, rel=0.1)


def test_concealment_goes_on_with_the_pitch():
    time = np.arange(8000) / 8000
    voiced = sum(np.sin(2 * np.pi * 125 * k * time + k) / k for k in range(1, 12)).astype(np.float32) / 4
    lost = np.zeros(50, bool)
    lost[20] = True
    concealed = conceal(voiced, lost, PACKET)
    gap = slice(20 * PACKET, 20 * PACKET + 80)
    assert snr(voiced[gap], concealed[gap]) > 25
    touched = np.flatnonzero(concealed != voiced)
    # Back over a quarter of the 64 samples of a period and 4 ms for the second 10 ms.
    assert touched[0] >= 20 * PACKET - 30 and touched[-1] - 21 * PACKET == pytest.approx(16 + 32, abs=3)


def test_concealment_goes_a_period_further_back_after_10_and_20_ms():
    time = np.arange(8000)
    tone, gap = np.sin(2 * np.pi * time / 50), 3200
    loudness = np.where(time < gap - 50, np.where(time < gap - 100, 0.25, 0.5), 1)  # of the last three periods
    concealed = conceal((tone * loudness).astype(np.float32), np.isin(time[:50], (20, 21)), PACKET)[gap:] / tone[gap:]
    heard = [concealed[after] for after in (20, 97, 190)] / np.clip(1.2 - np.array([20, 97, 190]) / 400, 0, 1)
    assert heard == pytest.approx([1, 0.5, 0.25], rel=0.02)


def test_a_long_gap_fades_within_60_ms_and_never_jumps():
    voiced = np.sin(2 * np.pi * 150 * np.arange(16000) / 8000).astype(np.float32)
    lost = np.zeros(100, bool)
    lost[30:36] = True
    concealed = conceal(voiced, lost, PACKET)
    start = 30 * PACKET
    sizes = [np.abs(concealed[start + 80 * i : start + 80 * (i + 1)]).max() for i in range(7)]
    assert sizes[0] > 0.9 and all(a > b for a, b in zip(sizes[1:], sizes[2:6], strict=False)) and sizes[6] == 0
    assert np.abs(np.diff(concealed)).max() < 2 * np.abs(np.diff(voiced)).max()


@given(st.integers(1, 4000), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_concealment_works_at_either_end_of_any_length(count, seed):
    samples = np.random.default_rng(seed).standard_normal(count).astype(np.float32) * 0.1
    lost = lost_packets(np.random.default_rng(seed), -(-count // PACKET), 0.5, 3)
    concealed = conceal(samples, lost, PACKET)
    assert concealed.shape == samples.shape and np.isfinite(concealed).all() and np.abs(concealed).max() < 1


# The up-sampler


@given(
    st.integers(1, 9999), st.sampled_from([(8000, 16000), (16000, 8000), (44100, 16000), (96000, 8000), (11025, 16000)])
)
@settings(max_examples=40, deadline=None)
def test_resampled_length_is_within_one_sample(count, rates):
    out = resample(np.zeros(count, np.float32), *rates)
    assert abs(out.size - count * rates[1] / rates[0]) <= 1 and out.dtype == np.float32


def test_resampling_does_not_delay():
    pcm = speech(2, 8000)
    assert delay(np.repeat(pcm, 2), resample(pcm, 8000, 16000)) in (-1, 0, 1)


@pytest.mark.parametrize("dbov", [-40, -26, -14])
def test_upsampled_calls_have_nothing_above_4_khz(dbov):
    plan = draw(CLEAN, 0, "x") | {"active_dbov": dbov}
    heard = call(plan, speech(5), 16000, 16000)
    power = np.abs(np.fft.rfft(heard)) ** 2
    edge = power.size // 2
    assert 10 * np.log10(power[:edge].sum() / power[edge:].sum()) > 55


def test_overshoots_are_counted_and_do_not_clip():
    full = np.sign(speech(1, 8000)).astype(np.float32)
    out, overshoots = resample_counted(full, 8000, 16000)
    assert overshoots > 0 and np.abs(out).max() < 1.0
    assert resample_counted(0.5 * full, 8000, 16000)[1] == 0
    quieter = resample(0.5 * full, 8000, 16000)
    gain = np.dot(out, quieter) / np.dot(quieter, quieter)
    assert np.allclose(out, gain * quieter, atol=1e-5)  # turned down as a whole, not bent


# Levels and noise


@given(st.floats(-40, -14), st.floats(0, 3), st.integers(0, 99))
@settings(max_examples=20, deadline=None)
def test_active_level_does_not_depend_on_pauses(dbov, pause, seed):
    talk = speech(6, 8000, seed)
    talk *= noise.db_to_gain(dbov - noise.active_level(talk, 8000))
    assert noise.active_level(talk, 8000) == pytest.approx(dbov, abs=0.1)
    padded = np.concatenate([np.zeros(int(8000 * pause), np.float32), talk, np.zeros(int(8000 * pause), np.float32)])
    assert noise.active_level(padded, 8000) == pytest.approx(dbov, abs=0.5)  # P.56's hangover counts


@pytest.mark.parametrize("seed", range(5))
def test_active_level_is_that_of_p56_sample_by_sample(seed):
    fs, talk = 8000, speech(5, 8000, seed) * np.float32(0.1)
    keep = np.exp(-1 / (fs * 0.03))
    envelope = lfilter([1 - keep], [1, -keep], lfilter([1 - keep], [1, -keep], np.abs(talk)))
    before = None
    for threshold in 2.0 ** -np.arange(15, 0, -1):
        crossed = np.cumsum(np.concatenate([np.zeros(fs // 5), envelope >= threshold]))
        active = np.sum(crossed[fs // 5 :] > crossed[: -fs // 5])
        level = 10 * np.log10(np.sum(np.float64(talk) ** 2) / active)
        gap = level - 20 * np.log10(threshold) - 15.9
        if gap <= 0:
            level = np.interp(0, [gap, before[0]], [level, before[1]])
            break
        before = gap, level
    assert noise.active_level(talk, fs) == pytest.approx(level, abs=0.3)


def test_active_level_of_a_full_scale_sine():
    sine = np.sin(2 * np.pi * 1000 * np.arange(16000) / 8000).astype(np.float32)
    assert noise.active_level(sine, 8000) == pytest.approx(-3.01, abs=0.05)
    assert noise.active_level(np.zeros(8000, np.float32), 8000) == -np.inf


@pytest.mark.parametrize("law, dbm0", [("alaw", -66), ("ulaw", -68)])
def test_idle_noise_of_a_line(law, dbm0):
    for line in ({}, {"noise": "white", "noise_dbm0": -74}, {"noise": "pink", "noise_dbm0": -69}):
        plan = draw(CLEAN, 0, "x") | {"line": line, "g711": law}
        heard = call(plan, np.zeros(16000 * 3, np.float32), 16000, 8000)
        assert np.all(heard.reshape(-1, 80).std(axis=1) > 0)
        assert noise.rms_level(heard) + noise.DBM0 == pytest.approx(dbm0, abs=3)


@pytest.mark.parametrize("shape", filters.SHAPES)
@pytest.mark.parametrize("offset", [0.01, 0.1])
def test_a_recording_with_an_offset_leaves_no_digital_silence_in_pauses(shape, offset):
    talk = np.concatenate([0.3 * speech(2), np.zeros(16000, np.float32)]) + np.float32(offset)
    for i in range(20):
        plan = draw(load_config(CONF, "a-law", "no_noise"), 1, f"k{i}") | {"send": {"shape": shape}}
        pause = call(plan, talk, 16000, 8000)[-7400:-400]
        assert np.all(pause.reshape(-1, 200).std(axis=1) > 0), plan


@pytest.mark.parametrize("law", ["alaw", "ulaw"])
@pytest.mark.parametrize("codec", ["g711_alaw", "g711_ulaw", "gsm_fr", "g722"])
def test_a_long_gap_on_a_line_without_noise_is_no_digital_silence(codec, law):
    loss = {"percent": 50.0, "burst": 10.0}
    plan = draw(CLEAN, 0, "x") | {"hop1": {"codec": codec}, "packet_loss": loss, "g711": law}
    assert plan["line"] == {}
    heard = call(plan, speech(4), 16000, 8000)
    assert plan["measured"]["packets_lost"] > 50
    assert np.all(heard.reshape(-1, 80).std(axis=1) > 0)


@given(st.integers(0, 2**32), st.floats(-60, -45), st.sampled_from(["white", "pink"]))
@settings(max_examples=15, deadline=None)
def test_a_line_has_the_noise_floor_drawn(seed, dbm0, kind):
    plan = draw(CLEAN, seed, "x") | {"line": {"noise": kind, "noise_dbm0": dbm0}}
    heard = call(plan, np.zeros(16000 * 4, np.float32), 16000, 8000)
    assert noise.rms_level(heard) + noise.DBM0 == pytest.approx(dbm0, abs=1)


def test_calls_lose_as_many_packets_as_the_presets_say():
    config = load_config(CONF, "bad-line", "a-law", "no_noise")
    silence, seen = np.zeros(8000 * 20, np.float32), {}
    for i in range(300):
        plan = draw(config, 4, f"k{i}")
        apply(plan, silence, 8000, 8000)
        counts = seen.setdefault(plan["packet_loss"]["percent"], [0, 0, 0])
        for place, value in enumerate((1, plan["measured"]["packets"], plan["measured"]["packets_lost"])):
            counts[place] += value
    shares = config["packet_loss.preset"]
    for preset, share in shares.items():
        if share:
            calls, packets, lost = seen[float(preset.split("/")[0])]
            assert calls / 300 == pytest.approx(share, abs=0.08)
            assert 100 * lost / packets == pytest.approx(float(preset.split("/")[0]), rel=0.15)


@given(st.text(min_size=1), st.floats(0, 30), st.sampled_from(["white", "pink"]))
@settings(max_examples=15, deadline=None)
def test_noise_has_the_drawn_snr_and_speech_the_drawn_level(key, snr_db, kind):
    config = load_config(CONF, "clean-pcma", "no_codec")
    plan, talk = draw(config, 0, key), speech(3)
    clean = call(dict(plan), talk, 16000, 8000)
    noisy = call(plan | {"noise": {"kind": kind, "snr_db": snr_db}}, talk, 16000, 8000)
    assert noise.active_level(clean, 8000) == pytest.approx(plan["active_dbov"], abs=0.5)
    assert noise.active_level(clean, 8000) - noise.rms_level(noisy - clean) == pytest.approx(snr_db, abs=0.5)
    sent = np.abs(np.fft.rfft(noisy - clean)) ** 2  # 3 s: through the same telephone, 300-3400 Hz
    assert sent[300:450].mean() < sent[3000:6000].mean() / 10


def test_echo_is_as_late_and_as_faint_and_hum_as_loud_as_drawn():
    plan, talk = draw(load_config(CONF, "clean-pcma", "no_codec"), 0, "x"), speech(3)
    clean = call(dict(plan), talk, 16000, 8000)
    echo = call(plan | {"line": {"echo_ms": 40.0, "echo_loss_db": 20.0}}, talk, 16000, 8000) - clean
    assert delay(clean, echo) == 320
    assert noise.rms_level(echo[320:]) - noise.rms_level(clean[:-320]) == pytest.approx(-20, abs=0.1)
    hum = call(plan | {"line": {"hum_dbm0": -45.0}}, talk, 16000, 8000) - clean
    assert noise.rms_level(hum) + noise.DBM0 == pytest.approx(-45, abs=0.1)
    assert np.argmax(np.abs(np.fft.rfft(hum[:8000]))) == 50


def test_a_room_falls_by_60_db_in_its_time_under_the_direct_sound():
    plan, talk = draw(load_config(CONF, "clean-pcma", "no_codec"), 0, "x"), speech(3)
    rooms = {}, {"room": {"rt60_s": 0.5, "direct_db": 6.0}}
    assert snr(*(call(plan | room, talk, 16000, 8000) for room in rooms)) == pytest.approx(6, abs=2)
    impulse = np.zeros(8000, np.float32)
    impulse[0] = 1
    heard = filters.room(np.random.default_rng(0), impulse, 8000, rt60_s=0.5, direct_db=6.0)
    assert heard[0] == pytest.approx(1, abs=1e-3) and np.square(heard[1:]).sum() == pytest.approx(10**-0.6, rel=0.01)
    early, late = (noise.rms_level(heard[start : start + 400]) for start in (400, 2400))
    assert early - late == pytest.approx(30, abs=2)


def test_colour_of_noise_and_hum():
    def band(samples, low, high):
        power = np.abs(np.fft.rfft(samples)) ** 2
        hz = np.fft.rfftfreq(samples.size, 1 / 8000)
        return 10 * np.log10(power[(hz >= low) & (hz < high)].sum() / (high - low))

    rng = np.random.default_rng(0)
    for kind, slope in (("white", 0.0), ("pink", -3.0)):
        samples = noise.coloured(rng, kind, 800_000, 8000)
        for low in (200, 400, 900):
            assert band(samples, 2 * low, 4 * low) - band(samples, low, 2 * low) == pytest.approx(slope, abs=0.7)
    hum = noise.hum(rng, 80_000, 8000)
    assert noise.rms_level(hum) == pytest.approx(0, abs=0.1)
    assert band(hum, 49, 51) > band(hum, 149, 151) + 5 > band(hum, 99, 101) + 40


def test_noise_recorded_with_an_offset_does_not_click_at_the_ends(tmp_path):
    hiss = 0.1 + 0.003 * np.random.default_rng(0).standard_normal(160_000)
    soundfile.write(tmp_path / "hiss.wav", hiss, 16000)
    recorded = [noise.Recording("hiss", str(tmp_path / "hiss.wav"))]
    rng = np.random.default_rng(1)
    for around, _ in (noise.excerpt(rng, 32000, 8000, recorded), noise.babble(rng, 32000, 8000, recorded, "x")):
        sent = filters.send(around, 8000, "mobile")
        assert np.abs(sent[:200]).max() < 5 * sent.std()


def test_an_excerpt_begins_anywhere_and_goes_round_a_short_recording(tmp_path):
    soundfile.write(tmp_path / "hiss.wav", 0.1 * np.random.default_rng(0).standard_normal(80_000), 8000)
    recorded = [noise.Recording("hiss", str(tmp_path / "hiss.wav"))]
    short = [noise.excerpt(np.random.default_rng(seed), 4000, 8000, recorded)[0] for seed in (0, 1)]
    assert np.abs(np.corrcoef(*short)[0, 1]) < 0.2
    long, keys = noise.excerpt(np.random.default_rng(0), 100_000, 8000, recorded)
    assert np.array_equal(long[80_000:], long[:20_000]) and keys == ["hiss"]


def test_babble_is_others_voices_never_ones_own(tmp_path):
    pool = []
    for i in range(5):
        audio.write(tmp_path / f"{i}.wav", speech(2, seed=i), 16000)
        pool.append(noise.Recording(f"call#{i}", str(tmp_path / f"{i}.wav")))
    for seed in range(20):
        key = ("call#3", "call#3#2")[seed % 2]
        samples, names = noise.babble(np.random.default_rng(seed), 40_000, 16000, pool, key)
        assert 3 <= len(names) <= 4 and "call#3" not in names
        assert samples.size == 40_000 and noise.rms_level(samples) > -20


# Send responses, after ITU-T G.191 (STL), dB relative to 1 kHz

HERTZ = (315, 400, 630, 1000, 1600, 2000, 2500, 3150)
RESPONSES = {
    "irs": (-6.8, -4.1, -1.9, 0, 3.6, 4.4, 5.5, 5.5),
    "modified_irs": (-4.6, -3.3, -2.2, 0, 3.2, 3.6, 5.0, 5.8),
    "g712": (0.1, 0.4, 0.2, 0, -0.1, 0, 0.1, 0.4),
    "mobile": (0, 0, 0, 0, 0, 0, 0, 0),
}


@pytest.mark.parametrize("fs, fs_out", [(8000, 8000), (16000, 16000), (16000, 8000)])
@pytest.mark.parametrize("shape", RESPONSES)
def test_send_responses_follow_the_published_shapes(shape, fs, fs_out):
    impulse = np.zeros(fs, np.float32)
    impulse[fs // 2] = 1
    response = filters.send(impulse, fs, shape, fs_out=fs_out)
    decibels = 20 * np.log10(np.abs(np.fft.rfft(response)) + 1e-9)
    for hz, wanted in zip(HERTZ, RESPONSES[shape], strict=True):
        assert decibels[hz] - decibels[1000] == pytest.approx(wanted, abs=2)
    assert decibels[50] < -15 and np.argmax(np.abs(response)) == fs_out // 2
    assert decibels[0] < -60


@pytest.mark.parametrize("hz", [4050, 4500, 6000, 7900])
def test_halving_the_rate_folds_nothing_back(hz):
    tone = (0.5 * np.sin(2 * np.pi * hz * np.arange(32000) / 16000)).astype(np.float32)
    heard = filters.send(tone, 16000, "mobile", fs_out=8000)[1000:-1000]
    assert noise.rms_level(heard) < noise.rms_level(tone) - 85


@pytest.mark.parametrize("shape", ["mobile", "band"])
@pytest.mark.parametrize("count", [1, 2, 3, 1599, 80001])
def test_halving_the_rate_in_the_send_response_is_resampling_and_then_the_response(shape, count):
    wideband = speech(6, 16000)[:count]
    edges = {"low_hz": 300, "high_hz": 3400} if shape == "band" else {}
    at_once = filters.send(wideband, 16000, shape, **edges, fs_out=8000)
    by_steps = filters.send(resample(wideband, 16000, 8000), 8000, shape, **edges)
    assert at_once.size == by_steps.size
    if count > 10000:
        inside = slice(400, -400)
        assert noise.rms_level((at_once - by_steps)[inside]) < noise.rms_level(by_steps) - 45


def test_band_has_the_edges_asked_for():
    impulse = np.zeros(8000, np.float32)
    impulse[100] = 1
    decibels = 20 * np.log10(np.abs(np.fft.rfft(filters.send(impulse, 8000, "band", 300, 3400, None))) + 1e-9)
    assert decibels[[300, 3400]] == pytest.approx([-3, -3], abs=0.5)
    assert decibels[1000] == pytest.approx(0, abs=0.1) and decibels[100] < -30


def test_a_peak_is_as_high_as_drawn():
    impulse = np.zeros(8000, np.float32)
    impulse[4000] = 1
    flat, peaked = (np.abs(np.fft.rfft(filters.send(impulse, 8000, "mobile", peaks=peaks)))
                    for peaks in ([], [[2000, 6.0]]))  # fmt: skip
    decibels = 20 * np.log10(peaked[300:3400] / flat[300:3400])
    assert decibels.max() == pytest.approx(6, abs=0.2) and abs(np.argmax(decibels) + 300 - 2000) < 50
    assert abs(decibels[700]) < 0.5


def test_limiters_and_gain_control():
    loud = speech(3, 8000) * 4
    for kind in ("hard_clip", "soft_clip"):
        assert np.abs(filters.limit(loud, kind)).max() <= 1.0
    talk = speech(6, 8000)
    for gain in (0.05, 0.5):
        after = filters.agc(talk * np.float32(gain), 8000, -20)
        before = noise.active_level(talk * np.float32(gain), 8000)
        assert abs(noise.active_level(after[24000:], 8000) + 20) < abs(before + 20)
    assert noise.active_level(after[24000:], 8000) == pytest.approx(-20 - 4, abs=1.5)  # as the config says
    plan = draw(load_config(CONF, "clean-pcma", "no_codec"), 0, "x") | {"active_dbov": -9.0}
    kinds = [{}, *({"limiter": {"kind": kind, "target_dbov": -20.0}} for kind in ("hard_clip", "soft_clip", "agc"))]
    calls = [call(plan | kind, speech(6), 16000, 8000) for kind in kinds]
    assert len({heard.tobytes() for heard in calls}) == 4
    assert noise.active_level(calls[3][24000:], 8000) == pytest.approx(-20 - 4, abs=1.5)


# The whole channel


@given(st.text(), st.integers(0, 2**31), st.one_of(st.none(), st.integers(0, 9)))
@settings(max_examples=50, deadline=None)
def test_a_draw_is_a_function_of_seed_key_and_epoch(key, seed, epoch):
    plan = draw(DEFAULT, seed, key, epoch)
    assert plan == draw(DEFAULT, seed, key, epoch) == json.loads(json.dumps(plan))
    assert plan != draw(DEFAULT, seed + 1, key, epoch) and plan != draw(DEFAULT, seed, key + "'", epoch)
    assert plan != draw(DEFAULT, seed, key, (epoch or 0) + 1)


def test_narrowing_one_value_leaves_the_others_as_drawn():
    narrowed = load_config(CONF, "amr-nb", snr_db_min=5, snr_db_max=9)
    for i in range(200):
        free, held = draw(DEFAULT, 0, f"k{i}"), draw(narrowed, 0, f"k{i}")
        assert held["hop1"]["codec"] == "amr_nb" and 5 <= held.get("noise", {"snr_db": 5})["snr_db"] <= 9
        assert all(free.get(name) == held.get(name) for name in ("send", "active_dbov", "line", "recorder", "limiter"))


def test_draws_follow_the_distributions():
    plans = [draw(DEFAULT, 1, f"k{i}") for i in range(4000)]
    for hop in ("hop1", "recorder"):
        for codec, share in DEFAULT[f"{hop}.codec"].items():
            name = {"g711": "g711_alaw"}.get(codec, codec)
            seen = np.mean([plan.get(hop, {"codec": "none"})["codec"] == name for plan in plans])
            assert seen == pytest.approx(share, abs=0.025)
    overdriven = [plan.get("limiter", {"kind": ""})["kind"].endswith("clip") for plan in plans]
    levels = np.array([plan["active_dbov"] for plan, loud in zip(plans, overdriven, strict=True) if not loud])
    assert levels.mean() == pytest.approx(-26, abs=0.4) and levels.std() == pytest.approx(5, abs=0.4)
    assert levels.min() >= -42 and levels.max() <= -14
    assert np.mean(["noise" in plan for plan in plans]) == pytest.approx(DEFAULT["noise.probability"], abs=0.025)
    floors = [plan["line"]["noise_dbm0"] for plan in plans]
    assert np.mean(floors) == pytest.approx(np.mean(DEFAULT["line.noise_dbm0"]), abs=0.5)


@pytest.mark.parametrize("part", range(4))
def test_every_channel_keeps_length_and_time_and_is_never_silent(part, tmp_path):
    audio.write(tmp_path / "voice.wav", speech(3, seed=7), 16000)
    pool = [noise.Recording("voice", str(tmp_path / "voice.wav"))]
    talk = np.concatenate([speech(2), np.zeros(16000, np.float32), speech(1.003, seed=3)])
    for i in range(part, 60, 4):
        plan = draw(DEFAULT, 2, f"k{i}")
        heard = call(plan, talk, 16000, 16000, pool=pool)
        assert heard.size == talk.size and heard.dtype == np.float32 and np.abs(heard).max() <= 1
        again = call(draw(DEFAULT, 2, f"k{i}"), talk, 16000, 16000, pool=pool)
        assert np.array_equal(heard, again)
        # A pause must hold a line's noise: true zeros are 24 nats away in log-mel.
        pause = heard[36000:47000].reshape(-1, 100)
        assert np.all(pause.std(axis=1) > 0), plan
        if plan.get("noise", {"snr_db": 30})["snr_db"] > 15 and "echo_ms" not in plan["line"]:
            band = firwin(401, [800, 3000], pass_zero=False, fs=16000)
            assert abs(delay(*(np.convolve(x, band, "same") for x in (talk, heard)))) <= 16, plan


def test_a_recorder_in_g726_leaves_a_quiet_line_its_idle_noise():
    recorded = load_config(CONF, "no_noise") | {"recorder.codec": {"g726": 1}}
    for rate, share in ((rate, {rate: 1}) for rate in ("24", "32", "40")):
        for i in range(4):
            plan = draw(recorded | {"hop1.g726_kbps": share}, 0, f"k{i}")
            heard = apply(plan, np.concatenate([speech(1), np.zeros(16000, np.float32)]), 16000, 8000)
            assert np.all(heard[9600:].reshape(-1, 160).std(axis=1) > 0), (rate, plan)


def test_wideband_leg_and_every_codec_in_every_hop():
    talk = speech(2)
    uncoded = call(draw(CLEAN, 0, "x"), talk, 16000, 8000)
    hops = [("hop1", name) for name in ("g722", *CODED)] + [("hop2", name) for name in CODED]
    for hop, name in [*hops, ("recorder", "gsm_fr"), ("recorder", "mp3"), ("recorder", "g726")]:
        settings = {"kbps": KBPS[name][-1]} if name in KBPS else {}
        plan = draw(CLEAN, 0, "x") | {hop: {"codec": name, **settings}}
        # The 300 Hz corner of a band-pass delays the bass by its nature; the band of speech must not be late.
        band = firwin(201, [800, 3000], pass_zero=False, fs=8000)
        heard = (resample(talk, 16000, 8000), call(plan, talk, 16000, 8000))
        assert abs(delay(*(np.convolve(samples, band, "same") for samples in heard))) <= 8, (hop, name)
        assert 1 < snr(uncoded, heard[1]) < 35, (hop, name)


def test_clean_pcma_is_the_plain_band_and_a_law():
    plan = draw(CLEAN, 5, "x")
    assert set(plan) == {"seed", "epoch", "draw", "send", "active_dbov", "line", "g711"}
    assert plan["send"] == {"shape": "band", "low_hz": 300, "high_hz": 3400} and plan["g711"] == "alaw"
    heard = apply(plan, speech(1), 16000, 8000)
    assert heard.dtype == np.int16 and np.array_equal(g711(heard, "alaw"), heard)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("packet_loss:  ", "packet_lost:  "),
        ("  low_hz: [150, 350]", "  low_hz: [350, 150]"),
        ("  codec: {g711: ", "  codec: {g711: 1"),
        ("probability: 0.65", "probability: 1.65"),
        ("{mean: -26, std: 5,", "{mean: -26, sd: 5,"),
        ("gsm_fr: ", "g729: "),
        ("  rt60_s: [0.2, 0.6]", "  rt60_s: long"),
        ("noise:  ", "noise: [ "),
        ("{mean: -26, std: 5,", "{mean: -26, std: 5, mode: -20,"),
        ("{mean: -26, std: 5,", "{mean: -26, std: -5,"),
        ("{mean: -26, std: 5,", "{mean: -50, std: 5,"),
        ("probability: 0.65", "probability: .nan"),
        ("probability: 0.65", "probability: often"),
        ("probability: 0.65", "probability: !!int often"),
        ("probability: 0.65", "probability: 0.2\n  probability: 0.65"),
        ("  low_hz: [150, 350]", "  low_hz: [150, 250, 350]"),
        ("  low_hz: [150, 350]", "  low_hz: [-150, 350]"),
        ("  low_hz: [150, 350]", "  low_hz: [.nan, 350]"),
        ("{white: 0.5, pink: 0.5}", "{white: 1.5, pink: -0.5}"),
        ("{white: 0.5, pink: 0.5}", "{}"),
        ("  echo_loss_db: [20, 50]", "  # no echo_loss_db"),
        ("  hum_probability: 0.05", "  hum_probability: 0.05\n  hiss: 1"),
    ],
)
def test_an_impossible_config_is_one_clear_line(change, said, tmp_path):
    text = CONF.read_text()
    assert change in text
    path = tmp_path / "channel.yaml"
    path.write_text(text.replace(change, said, 1))
    with pytest.raises(UserError) as error:
        load_config(path)
    assert error.value.code == 2 and str(path) in str(error.value)


@pytest.mark.parametrize("text", ["", "[1, 2]", "noise", "noise: 3", "\t", "presets: {x: 1}"])
def test_a_file_that_holds_no_distributions_is_one_clear_line(text, tmp_path):
    (tmp_path / "channel.yaml").write_text(text)
    for path in (tmp_path / "channel.yaml", tmp_path / "nowhere.yaml", tmp_path):
        with pytest.raises(UserError) as error:
            load_config(path)
        assert error.value.code == 2 and str(path) in str(error.value)


@pytest.mark.parametrize(
    ("presets", "edges"),
    [
        (["no-such"], {}), (["landline", "g729"], {}), ([], {"low_freq": 5000}),
        ([], {"snr_db_min": 20, "snr_db_max": 10}), (["bad-line"], {"snr_db_min": 20}),
    ],
)
def test_an_impossible_narrowing_is_told(presets, edges):
    with pytest.raises(UserError) as error:
        load_config(CONF, *presets, **edges)
    assert error.value.code == 2


@pytest.mark.parametrize("preset", ["clean-pcma", "landline", "mobile", "bad-line"])
def test_presets_can_be_drawn(preset):
    config = load_config(CONF, preset)
    assert all(draw(config, 0, f"k{i}")["g711"] == "alaw" for i in range(50))


def log_mel(samples):
    """Mean-free log-mel of 8 kHz speech, loud frames only."""
    edges = 700 * (np.exp(np.linspace(np.log1p(100 / 700), np.log1p(3800 / 700), 26)) - 1)
    frames = np.lib.stride_tricks.sliding_window_view(samples, 256)[::80] * np.hanning(256)
    power = np.abs(np.fft.rfft(frames, 512)) ** 2
    hz = np.fft.rfftfreq(512, 1 / 8000)
    up = (hz[:, None] - edges[:-2]) / np.diff(edges[:-1])
    down = (edges[2:] - hz[:, None]) / np.diff(edges[1:])
    return np.log(power @ np.clip(np.minimum(up, down), 0, None) + 1e-7)


@pytest.mark.skipif(not PROMPTS.is_dir(), reason="asterisk-core-sounds-en-{g722,gsm} are not installed")
def test_simulated_gsm_is_as_near_to_real_gsm_files_as_sox_is(tmp_path):
    need("sox")
    distances = {"ours": [], "sox": []}
    config = load_config(CONF, "clean-pcma")
    for real in sorted(PROMPTS.glob("vm-*.gsm"))[:12]:
        wide, fs = audio.read(real.with_suffix(".g722"))
        audio.write(tmp_path / "wide.wav", wide, fs)
        truth = decoded_by("sox -D -t gsm -r 8000 IN -t raw -e signed -b 16 -", real.read_bytes(), ".gsm", tmp_path)
        subprocess.run(f"sox -D {tmp_path}/wide.wav -r 8000 -c 1 {tmp_path}/s.gsm".split(), check=True)
        stream = (tmp_path / "s.gsm").read_bytes()
        sox = decoded_by("sox -D -t gsm -r 8000 IN -t raw -e signed -b 16 -", stream, ".gsm", tmp_path)
        plan = draw(config, 0, real.name) | {"hop1": {"codec": "gsm_fr"}, "g711": "none"}
        plan |= {"send": {"shape": "mobile"}, "active_dbov": noise.active_level(from_pcm(truth), 8000)}
        ours = call(plan, wide, fs, 8000)
        for name, samples in (("ours", ours), ("sox", from_pcm(sox))):
            count = min(samples.size, truth.size)
            shift = delay(truth[:count], samples[:count])
            a, b = log_mel(from_pcm(truth)[max(0, -shift) :]), log_mel(samples[max(0, shift) :])
            rows = min(len(a), len(b))
            loud = a[:rows].mean(axis=1) > a.mean()
            difference = (a[:rows] - b[:rows])[loud]
            distances[name].append(np.abs(difference - difference.mean()).mean())
    assert np.mean(distances["ours"]) <= 1.1 * np.mean(distances["sox"])
