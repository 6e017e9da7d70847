"""Stage 0's simulator on the command line: same bytes whatever the workers, resume, bad input, one line of error."""

import hashlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile

import audio
import common
import data_simulation
from common import UserError
from mini import ROOT
from sounds import speech
from telephone import channel, filters, noise

COMMAND = [sys.executable, str(ROOT / "local" / "data_simulation.py")]


def simulate(folder, *more, manifest="in.jsonl", output="out", **environment):
    command = [*COMMAND, "--output", f"{output}/sim.jsonl", "--output_audio_dir", f"{output}/audio"]
    command += ["--config", str(ROOT / "conf" / "telephone_channel.yaml")]
    command += ["--input", manifest] if manifest else []
    environment = os.environ | environment
    return subprocess.run([*command, *map(str, more)], cwd=folder, capture_output=True, text=True, env=environment)


def rows(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def fingerprint(folder, output):
    """Rows and audio, without the name of the output folder."""
    digest = hashlib.sha256((folder / output / "sim.jsonl").read_bytes().replace(f"/{output}/".encode(), b"/"))
    for path in sorted((folder / output / "audio").rglob("*.flac")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def assert_one_line(done, code, *words):
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in done.stderr
    assert all(word in lines[0] for word in words), lines


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Twelve utterances of about two seconds at 16 kHz."""
    folder = tmp_path_factory.mktemp("corpus")
    with open(folder / "in.jsonl", "w", encoding="utf-8") as file:
        for i in range(12):
            audio.write(folder / "wav" / f"{i}.wav", 0.5 * speech(1.5 + i / 10, seed=i), 16000)
            row = {"key": f"发言 {i}", "source": f"wav/{i}.wav", "target": "你好", "speaker": f"s{i}", "note": i}
            row["probe"] = "idle"  # the user's own field
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    assert simulate(folder).returncode == 0
    return folder


def test_rows_keep_order_and_fields_and_name_the_audio(corpus):
    given, simulated = rows(corpus / "in.jsonl"), rows(corpus / "out" / "sim.jsonl")
    assert [row["key"] for row in simulated] == [row["key"] for row in given]
    for before, after in zip(given, simulated, strict=True):
        assert all(after[name] == before[name] for name in ("target", "speaker", "note", "probe"))
        assert "probe" not in after["channel"]
        assert after["wideband_source"] == str(corpus / before["source"])
        wide, call = soundfile.info(after["wideband_source"]), soundfile.info(after["source"])
        assert (call.format, call.samplerate, call.channels) == ("FLAC", 16000, 1)
        assert abs(call.frames - wide.frames) <= 1
        assert after["channel"]["g711"] == "alaw" and after["channel"]["seed"] == 0
    assert rows(corpus / "out" / "rejected_sim.jsonl") == []
    pool = rows(corpus / "out" / "babble_pool_sim.jsonl")
    assert {row["key"] for row in pool} == {row["key"] for row in given}
    for row in simulated:
        assert row["key"] not in row["channel"].get("noise", {}).get("sources", [])


def test_workers_do_not_change_a_byte(corpus):
    assert simulate(corpus, "--num_workers", 2, output="two").returncode == 0
    assert fingerprint(corpus, "two") == fingerprint(corpus, "out")
    assert simulate(corpus, output="thread", OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1").returncode == 0
    assert fingerprint(corpus, "thread") == fingerprint(corpus, "out")
    assert simulate(corpus, "--seed", 1, output="seed1").returncode == 0
    assert fingerprint(corpus, "seed1") != fingerprint(corpus, "out")


def test_the_order_of_the_input_does_not_change_the_audio(corpus):
    lines = (corpus / "in.jsonl").read_text(encoding="utf-8").splitlines(True)
    (corpus / "backwards.jsonl").write_text("".join(reversed(lines)), encoding="utf-8")
    assert simulate(corpus, manifest="backwards.jsonl", output="backwards").returncode == 0
    assert rows(corpus / "backwards/sim.jsonl")[0]["key"] == rows(corpus / "out/sim.jsonl")[-1]["key"]
    for path in sorted((corpus / "out/audio").rglob("*.flac")):
        assert path.read_bytes() == (corpus / "backwards" / path.relative_to(corpus / "out")).read_bytes()


@pytest.mark.full
def test_dask_does_not_change_a_byte(corpus):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        done = simulate(corpus, "--dask_scheduler", cluster.scheduler_address, output="dask")
    assert done.returncode == 0, done.stderr
    assert fingerprint(corpus, "dask") == fingerprint(corpus, "out")


def test_a_killed_run_goes_on_to_the_same_bytes(corpus):
    manifest = corpus / "many.jsonl"
    given = [row | {"source": str(corpus / row["source"])} for row in rows(corpus / "in.jsonl")]
    many = [row | {"key": f"{row['key']} {i}"} for i in range(8) for row in given]
    manifest.write_text("".join(json.dumps(row) + "\n" for row in many))
    assert simulate(corpus, manifest="many.jsonl", output="whole").returncode == 0
    command = [*COMMAND, "--input", "many.jsonl", "--output", "killed/sim.jsonl", "--output_audio_dir", "killed/audio"]
    command += ["--config", str(ROOT / "conf" / "telephone_channel.yaml")]
    for parts in (1, 6):
        process = subprocess.Popen(command, cwd=corpus, stderr=subprocess.DEVNULL, start_new_session=True)
        while len(list((corpus / "killed").glob(".sim.parts/*.json"))) < parts and process.poll() is None:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert not (corpus / "killed/sim.jsonl").exists()
    kept = {path: path.stat().st_mtime_ns for path in (corpus / "killed/audio").rglob("*.flac")}
    # A torn file in place of a finished one, as a full disk or a foreign hand leaves it
    torn = min(kept, key=kept.get)
    torn.write_bytes(torn.read_bytes()[:1000])
    assert simulate(corpus, manifest="many.jsonl", output="killed").returncode == 0
    assert fingerprint(corpus, "killed") == fingerprint(corpus, "whole")
    same = sum(path.stat().st_mtime_ns == changed for path, changed in kept.items())
    assert same >= len(kept) - 16  # the rest was kept, not made again


def test_other_settings_over_the_same_folder_leave_nothing_stale(corpus):
    for more in (("--preset", "clean-pcma"), ("--seed", 3), ()):
        assert simulate(corpus, *more, output="again").returncode == 0
    assert fingerprint(corpus, "again") == fingerprint(corpus, "out")


def test_stereo_and_segments_are_cut(corpus):
    left, right = speech(6, seed=1), speech(6, seed=2)
    soundfile.write(corpus / "call.wav", np.stack([left, right], 1) * 0.5, 16000)
    row = {"key": "seg", "source": "call.wav", "target": "x", "channel": 1, "start": 2.0, "end": 4.5}
    (corpus / "stereo.jsonl").write_text(json.dumps(row) + "\n")
    assert simulate(corpus, "--preset", "clean-pcma", manifest="stereo.jsonl", output="stereo").returncode == 0
    (simulated,) = rows(corpus / "stereo/sim.jsonl")
    call, fs = soundfile.read(simulated["source"])
    assert call.size == 40000
    likeness = [
        np.corrcoef(call, filters.send(side[32000:72000], 16000, "band", 300, 3400, None))[0, 1]
        for side in (left, right)
    ]
    assert abs(likeness[0]) < 0.3 and likeness[1] > 0.85
    assert not {"start", "end"} & set(simulated)
    assert (simulated["wideband_channel"], simulated["wideband_start"], simulated["wideband_end"]) == (1, 2.0, 4.5)


def test_every_kind_of_bad_input_is_rejected_by_name(corpus):
    bad = corpus / "bad"
    bad.mkdir()
    good = speech(1)
    soundfile.write(bad / "nan.wav", np.where(np.arange(good.size) == 99, np.nan, good), 16000, subtype="FLOAT")
    soundfile.write(bad / "inf.flac.wav", np.where(np.arange(good.size) == 9, -np.inf, good), 16000, subtype="DOUBLE")
    soundfile.write(bad / "empty.wav", good[:0], 16000)
    soundfile.write(bad / "one.wav", good[:1], 16000)
    soundfile.write(bad / "zeros.wav", 0 * good, 16000)
    soundfile.write(bad / "offset.wav", 0 * good + 0.1, 16000)
    soundfile.write(bad / "hum.wav", 0.1 * np.sin(2 * np.pi * 20 * np.arange(16000) / 16000), 16000)
    soundfile.write(bad / "whole.flac", good, 16000)
    (bad / "cut.flac").write_bytes((bad / "whole.flac").read_bytes()[:9000])
    whole = bytearray((corpus / "wav/0.wav").read_bytes())
    whole[20:22] = b"\xef\xbe"  # a format tag no codec has
    (bad / "codec.wav").write_bytes(whole)
    (bad / "folder.wav").mkdir()
    (bad / "text.wav").write_text("this is no audio\n" * 99)
    soundfile.write(bad / "96k.wav", np.repeat(good, 6), 96000)
    soundfile.write(bad / "51.wav", np.stack([good] * 6, 1), 16000)
    wanted = {
        "nan.wav": "audio_not_finite", "empty.wav": "audio_empty", "one.wav": "too_short", "zeros.wav": "silent",
        "cut.flac": "audio_unreadable", "text.wav": "audio_unreadable", "nowhere.wav": "audio_missing",
        "inf.flac.wav": "audio_not_finite", "codec.wav": "audio_unreadable", "folder.wav": "audio_missing",
        "offset.wav": "silent", "96k.wav": None, "51.wav": None,
    }  # fmt: skip
    lines = [json.dumps({"key": name, "source": f"bad/{name}", "target": "x"}) for name in wanted]
    wanted |= {"no_source": "missing_field", "twice": "duplicate_key", "again": "already_simulated", None: "bad_json"}
    twice = json.dumps({"key": "twice", "source": "wav/1.wav", "target": "x"})
    again = json.dumps({"key": "again", "source": "wav/1.wav", "target": "x", "channel": {"seed": 0}})
    lines += ['{"key": "no_source", "target": "x"}', twice, twice, again, '{"key": "torn', "[1, 2]"]
    (corpus / "bad.jsonl").write_text("\n".join(lines) + "\n")
    done = simulate(corpus, "--max_reject_ratio", 0.9, manifest="bad.jsonl", output="bad_out")
    assert done.returncode == 0, done.stderr
    rejected = rows(corpus / "bad_out/rejected_sim.jsonl")
    assert {row["key"]: row["reason"] for row in rejected} == {k: v for k, v in wanted.items() if v}
    assert all(row["detail"] and row["row"] for row in rejected)
    kept = rows(corpus / "bad_out/sim.jsonl")
    assert [row["key"] for row in kept] == ["96k.wav", "51.wav", "twice"] and len(kept) + len(rejected) == len(lines)
    assert not {"zeros.wav", "offset.wav"} & {row["key"] for row in rows(corpus / "bad_out/babble_pool_sim.jsonl")}
    assert soundfile.info(kept[0]["source"]).frames == 16000
    failed = simulate(corpus, manifest="bad.jsonl", output="bad_out")
    assert_one_line(failed, 1, "--max_reject_ratio")
    assert not (corpus / "bad_out/sim.jsonl").exists()


def test_a_wrong_command_is_told_in_one_line(corpus):
    (corpus / "empty.scp").write_text("")
    (corpus / "nowhere.scp").write_text("n1 nowhere/at/all.wav\n")
    (corpus / "text.scp").write_text("n1 in.jsonl\n")
    (corpus / "none.jsonl").write_text("")
    assert_one_line(simulate(corpus, manifest="no.jsonl", output="e"), 2, "no.jsonl")
    assert_one_line(simulate(corpus, manifest="none.jsonl", output="e"), 1, "none.jsonl")
    assert_one_line(simulate(corpus, "--preset", "brilliant", output="e"), 2, "brilliant", "clean-pcma")
    assert_one_line(simulate(corpus, "--bg_noise_scp", "nowhere.scp", output="e"), 2, "nowhere.scp")
    nothing = np.zeros(16000)
    for name, samples in (("cut.flac", speech(5)), ("silent.wav", nothing), ("offset.wav", nothing + 0.1)):
        soundfile.write(corpus / name, samples, 16000)
        (corpus / f"{name}.scp").write_text(f"good wav/1.wav\nn1 {name}\n")
    (corpus / "cut.flac").write_bytes((corpus / "cut.flac").read_bytes()[:20000])
    for scp in ("empty.scp", "nowhere.scp", "text.scp", "no.scp", "cut.flac.scp", "silent.wav.scp", "offset.wav.scp"):
        with pytest.raises(UserError, match=scp) as error:
            noise.read_scp(corpus / scp)
        assert error.value.code == 2
    config = corpus / "channel.yaml"
    config.write_text((ROOT / "conf/telephone_channel.yaml").read_text().replace("rt60_s", "rt60_ms"))
    assert_one_line(simulate(corpus, "--config", config, output="e"), 2, "rt60_ms")
    assert simulate(corpus, "--target_fs", 16000, manifest=None, output="e").returncode == 2
    none = simulate(corpus, "--no_speech_probe", 0, manifest=None, output="e")
    assert none.returncode == 2 and "give --input, or --no_speech_probe N" in none.stderr
    assert not (corpus / "e/sim.jsonl").exists()


def test_own_noise_flags_and_presets_reach_the_channel(corpus):
    audio.write(corpus / "street.wav", 0.1 * np.random.default_rng(0).standard_normal(8000).astype(np.float32), 8000)
    (corpus / "noise.scp").write_text("street street.wav\n")
    flags = ["--bg_noise_scp", "noise.scp", "--codec_type", "gsm", "--low_freq", 300, "--high_freq", 3300]
    flags += ["--snr_db_min", 10, "--snr_db_max", 12, "--output_fs", 8000]
    assert simulate(corpus, *flags, output="flags").returncode == 0
    plans = [row["channel"] for row in rows(corpus / "flags/sim.jsonl")]
    assert all(plan["hop1"]["codec"] == "gsm_fr" for plan in plans)
    assert all(plan["send"] == {"shape": "band", "low_hz": 300.0, "high_hz": 3300.0} for plan in plans)
    noises = [plan["noise"] for plan in plans if "noise" in plan]
    assert all(10 <= noise["snr_db"] <= 12 for noise in noises)
    assert ["street"] in [noise.get("sources") for noise in noises]
    assert soundfile.info(rows(corpus / "flags/sim.jsonl")[0]["source"]).samplerate == 8000
    assert simulate(corpus, "--no_noise", "--no_codec", output="plain").returncode == 0
    for plan in (row["channel"] for row in rows(corpus / "plain/sim.jsonl")):
        assert plan["g711"] == "none" and not {"noise", "hop1", "hop2", "recorder"} & set(plan)


def test_no_noise_recording_is_heard_in_two_splits(corpus, caplog):
    recordings = [noise.Recording(f"street{number}", f"{number}.wav") for number in range(40)]
    split = {name: data_simulation.of_split(recordings, name) for name in data_simulation.SPLITS}
    assert {name: len(part) for name, part in split.items()} == {"train": 32, "dev": 4, "test": 4}
    assert sorted(sum(split.values(), [])) == sorted(recordings)
    assert data_simulation.of_split(recordings[::-1], "test") == split["test"]
    assert [len(data_simulation.of_split(recordings[:3], name)) for name in split] == [1, 1, 1]
    assert data_simulation.of_split(recordings[:2], "dev") == recordings[:2] and "cannot be shared out" in caplog.text
    renamed = [noise.Recording(f"again{recording.key}", recording.source) for recording in recordings]
    for twice in (recordings + recordings, recordings + renamed):
        parts = [{recording.source for recording in data_simulation.of_split(twice, name)} for name in split]
        assert [len(part) for part in parts] == [32, 4, 4] and len(set.union(*parts)) == 40
    for number in range(5):
        audio.write(corpus / f"{number}.wav", np.random.default_rng(number).normal(0, 0.1, 8000), 8000)
    (corpus / "five.scp").write_text("".join(f"street{number} {number}.wav\n" for number in range(5)))
    heard = []
    for name in split:
        done = simulate(corpus, "--bg_noise_scp", "five.scp", "--split", name, output=name)
        assert done.returncode == 0, done.stderr
        plans = [row["channel"] for row in rows(corpus / name / "sim.jsonl")]
        heard += [{key for plan in plans for key in plan.get("noise", {}).get("sources", ()) if "street" in key}]
    assert all(heard) and not heard[0] & heard[1] | heard[0] & heard[2] | heard[1] & heard[2], heard


def test_another_recording_under_the_name_of_a_noise_or_a_voice_makes_the_calls_anew(corpus):
    rng = np.random.default_rng(0)
    audio.write(corpus / "voice.wav", speech(2), 16000)
    audio.write(corpus / "hall.wav", 0.1 * rng.standard_normal(8000), 8000)
    (corpus / "hall.scp").write_text("hall hall.wav\n")
    (corpus / "voice.jsonl").write_text(json.dumps({"key": "v", "source": "voice.wav", "target": "x"}) + "\n")
    command = ["--input", corpus / "voice.jsonl", "--output", corpus / "mixed/sim.jsonl", "--bg_noise_scp"]
    command += [corpus / "hall.scp", "--output_audio_dir", corpus, "--config", ROOT / "conf/telephone_channel.yaml"]
    args = data_simulation.get_args([str(word) for word in command])
    seen = {data_simulation.make_job(args)["identity"], data_simulation.make_job(args)["identity"]}
    assert len(seen) == 1
    for name in ("hall.wav", "voice.wav"):
        audio.write(corpus / name, 0.2 * rng.standard_normal(9000), 8000)
        seen.add(data_simulation.make_job(args)["identity"])
    assert len(seen) == 3


def test_calls_without_speech(tmp_path):
    done = simulate(tmp_path, "--no_speech_probe", 12, manifest=None)
    assert done.returncode == 0, done.stderr
    probes = rows(tmp_path / "out/sim.jsonl")
    assert {row["channel"]["probe"] for row in probes} == {"idle", "ringback", "busy", "hum", "loss", "music"}
    for row in probes:
        samples, fs = soundfile.read(row["source"])
        assert row["target"] == "" and "wideband_source" not in row
        assert 1 <= samples.size / fs <= 15.1
        assert np.all(samples[: samples.size // 160 * 160].reshape(-1, 160).std(axis=1) > 0), row
        if row["channel"]["probe"] == "ringback":
            loudest = np.argmax(np.abs(np.fft.rfft(samples))) * fs / samples.size
            assert loudest == pytest.approx(450, abs=5)


def test_a_corpus_of_one_utterance_does_not_babble_with_its_own_voice(corpus):
    (corpus / "alone.jsonl").write_text(json.dumps({"key": "alone", "source": "wav/3.wav", "target": "x"}) + "\n")
    command = ["--input", corpus / "alone.jsonl", "--output", corpus / "alone/sim.jsonl"]
    command += ["--output_audio_dir", corpus / "alone", "--config", ROOT / "conf/telephone_channel.yaml"]
    job = data_simulation.make_job(data_simulation.get_args([str(word) for word in command]))
    assert len(job["pool"]) == 1 and set(job["config"]["noise.kind"]) == {"pink", "white"}


def test_workers_are_given_few_large_items_at_a_time():
    numbers = itertools.count()
    results = common.parallel(str, numbers, num_workers=2, batch_size=1)
    assert [next(results) for _ in range(40)] == [str(i) for i in range(40)]
    assert next(numbers) < 100
    results.close()


@pytest.mark.full
def test_memory_is_flat_in_the_number_of_rows(corpus):
    code = (
        "import resource, runpy, sys; sys.argv = sys.argv[1:]; sys.path.insert(0, sys.argv[0].rsplit('/', 1)[0])\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    audio.write(corpus / "short.wav", speech(0.2), 16000)
    peaks = []
    for count in (1000, 20000):
        row = {"source": str(corpus / "short.wav"), "target": "x"}
        lines = (json.dumps(row | {"key": f"k{i}"}) + "\n" for i in range(count))
        (corpus / "flat.jsonl").write_text("".join(lines))
        command = [sys.executable, "-c", code, *COMMAND[1:], "--input", "flat.jsonl", "--preset", "clean-pcma"]
        command += ["--output", "flat/sim.jsonl", "--output_audio_dir", "flat/audio"]
        command += ["--config", str(ROOT / "conf/telephone_channel.yaml")]
        peaks.append(int(subprocess.run(command, cwd=corpus, capture_output=True, text=True, check=True).stdout))
    assert peaks[1] < 1.1 * peaks[0]


# The channel in training


def test_online_leaves_wideband_audio_to_training_and_cuts_what_must_be(corpus):
    audio.write(corpus / "96k.wav", np.repeat(speech(1.5), 6), 96000)
    both = np.stack([speech(4, seed=1), speech(4, seed=2)], 1)
    soundfile.write(corpus / "both.wav", both, 16000, subtype="FLOAT")
    audio.write(corpus / "8k.wav", speech(1, 8000), 8000)
    soundfile.write(corpus / "nothing.wav", np.full(16000, 0.1), 16000)
    given = [
        {"key": "plain", "source": "wav/1.wav"}, {"key": "fast", "source": "96k.wav"},
        {"key": "side", "source": "both.wav", "channel": 1, "start": 1.0, "end": 2.5},
        {"key": "narrow", "source": "8k.wav"}, {"key": "nothing", "source": "nothing.wav"},
    ]  # fmt: skip
    (corpus / "online.jsonl").write_text("".join(json.dumps(row | {"target": "x"}) + "\n" for row in given))
    done = simulate(corpus, "--online", "--max_reject_ratio", 0.5, manifest="online.jsonl", output="online")
    assert done.returncode == 0, done.stderr
    found = {row["key"]: row for row in rows(corpus / "online/sim.jsonl")}
    assert list(found) == ["plain", "fast", "side"]
    assert {row["channel"]["online"] for row in found.values()} == {str(corpus / "online/channel_sim.json")}
    assert found["plain"]["source"] == str(corpus / "wav/1.wav")
    assert len(list((corpus / "online/audio").rglob("*.flac"))) == 2
    samples, fs = soundfile.read(found["side"]["source"])
    assert fs == 16000 and np.abs(samples - both[16000:40000, 1]).max() < 2e-4
    assert soundfile.info(found["fast"]["source"]).frames == 24000
    reasons = {row["key"]: row["reason"] for row in rows(corpus / "online/rejected_sim.jsonl")}
    assert reasons == {"narrow": "sampling_rate", "nothing": "silent"}
    assert simulate(corpus, "--online", "--output_fs", 8000, output="online8").returncode == 2


def test_other_settings_of_an_online_channel_are_another_list(corpus):
    lists = []
    for noises in ("wav/1.wav", "wav/2.wav"):  # of train alone, as dev and test may hear the same as before
        (corpus / "own.scp").write_text(f"a {corpus / 'wav/0.wav'}\nb {corpus / noises}\n")
        assert simulate(corpus, "--online", "--bg_noise_scp", "own.scp", output="others").returncode == 0
        lists.append((corpus / "others/sim.jsonl").read_bytes())
    assert lists[0] != lists[1]


def test_training_hears_in_an_epoch_what_stage_0_writes_for_it(corpus):
    assert simulate(corpus, "--online", "--seed", 3, output="live").returncode == 0
    settings = str(corpus / "live/channel_sim.json")
    for epoch in (0, 1):
        assert simulate(corpus, "--seed", 3, "--epoch", epoch, output=f"epoch{epoch}").returncode == 0
        lists = rows(corpus / "live/sim.jsonl"), rows(corpus / f"epoch{epoch}/sim.jsonl")
        for live, written in zip(*lists, strict=True):
            samples, fs = audio.read(live["source"])
            heard = channel.simulate(settings, live["key"], samples, fs, epoch)
            assert np.array_equal(heard, audio.read(written["source"])[0])
    assert fingerprint(corpus, "epoch0") != fingerprint(corpus, "epoch1")
    with pytest.raises(ValueError, match="8000"):
        channel.simulate(settings, "x", samples[::2], 8000, 0)


def test_two_lists_do_not_share_their_audio(corpus):
    assert simulate(corpus, "--preset", "clean-pcma").returncode == 0
    before = fingerprint(corpus, "out")
    done = simulate(corpus, "--preset", "gsm", "--output", "elsewhere/sim.jsonl")
    assert done.returncode == 2 and "out/sim.jsonl, which would be replaced" in done.stderr
    assert fingerprint(corpus, "out") == before and not (corpus / "elsewhere/sim.jsonl").exists()
    (corpus / "out/sim.jsonl").unlink()
    assert simulate(corpus, "--preset", "gsm", "--output", "elsewhere/sim.jsonl").returncode == 0
