"""What a user can get wrong, file by file, ends in one line that says where and what to do; Ctrl-C does, too."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial

import numpy as np
import pytest
import torch

import audio
import corpus
import decode
import final_model
import listen
import make_train_list
import metrics
import plan
import prepare_training_data
import score
import stage0_report
import stage_status
from common import UserError, read_jsonl, write_json, write_jsonl
from corpus_filter import TextRules
from download_model import check_model
from mini import ROOT, formatted, helper, helper_here, make_model, make_rows
from nano import weights

ENCODE = """import sys
sys.path.insert(0, sys.argv[1])
import numpy, audio
from common import run
samples = numpy.random.default_rng(0).integers(-3000, 3000, 16000 * 600, numpy.int16)
def main():
    print("begun", flush=True)
    while True:
        audio.encode(samples, 16000, "FLAC", "PCM_16")
run(main)"""


def refused(code, *arguments, words):
    with pytest.raises(UserError) as caught:
        code(*arguments)
    assert all(word in str(caught.value) for word in words), caught.value


def text_file(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, "utf-8")
    return path


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("model") / "base")


@pytest.mark.parametrize("moment", (0.05, 0.1, 0.15, 0.2))
def test_ctrl_c_while_audio_is_encoded_is_not_lost_in_libsndfile(moment):
    process = subprocess.Popen([sys.executable, "-c", ENCODE, ROOT / "local"], stdout=-1, stderr=-1, text=True)
    assert process.stdout.readline() == "begun\n"
    time.sleep(moment)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 130
    assert said == "error: interrupted; the same command goes on, without --force if it had that\n"


@pytest.mark.parametrize("workers", (1, 2))
def test_ctrl_c_ends_a_simulation_in_one_line_and_the_same_command_goes_on(tmp_path, workers):
    noise = 0.1 * np.random.default_rng(0).standard_normal(16000 * 8)
    audio.write(tmp_path / "noise.flac", noise, 16000)
    rows = ({"key": f"k{i}", "source": "noise.flac", "target": "x"} for i in range(96))
    write_jsonl(tmp_path / "in.jsonl", rows)
    command = [sys.executable, ROOT / "local/data_simulation.py", "--input", "in.jsonl", "--output", "out/sim.jsonl",
               "--output_audio_dir", "out/audio", "--config", ROOT / "conf/telephone_channel.yaml"]  # fmt: skip
    command += ["--num_workers", str(workers)]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=-1, text=True, start_new_session=True)
    while not list(tmp_path.glob("out/.sim.parts/*.json")) and process.poll() is None:
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and not (tmp_path / "out/sim.jsonl").exists()
    assert "Traceback" not in said and "Exception" not in said
    assert [line for line in said.splitlines() if line.startswith("error: interrupted; the same command goes on")]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    made = list(read_jsonl(tmp_path / "out/sim.jsonl"))
    assert len(made) == 96 and all(audio.length(row["source"]).samples == len(noise) for row in made)


def test_the_audio_may_be_under_another_field(tmp_path):
    audio.write(tmp_path / "a.wav", 0.1 * np.random.default_rng(0).standard_normal(16000), 16000)
    write_jsonl(tmp_path / "in.jsonl", [{"key": "a", "wav": "a.wav", "target": "x"}, {"key": "b", "target": "x"}])
    done = helper("data_simulation.py", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "out/sim.jsonl",
                  "--output_audio_dir", tmp_path / "out", "--audio_key", "wav", "--max_reject_ratio", 0.5)  # fmt: skip
    assert done.returncode == 0, done.stderr
    (row,), (lost,) = read_jsonl(tmp_path / "out/sim.jsonl"), read_jsonl(tmp_path / "out/rejected_sim.jsonl")
    assert row["key"] == "a" and row["wideband_source"] == str(tmp_path / "a.wav") and os.path.isfile(row["source"])
    assert lost["key"] == "b" and lost["reason"] == "missing_field"


def test_rows_are_read_as_people_write_them(tmp_path):
    number = {"key": 7, "source": "a.wav", "target": "x", "speaker": 12, "call": ""}
    deep = json.loads("[" * 150 + "]" * 150)
    write_jsonl(tmp_path / "in.jsonl", [number, number | {"more": deep}])
    good, bad = corpus.read_rows(tmp_path / "in.jsonl")
    assert good.row == {"key": "7", "source": str(tmp_path / "a.wav"), "target": "x", "speaker": "12"}
    assert (bad.row, bad.reason) == (None, "bad_json") and "nested too deep" in bad.detail


def test_files_of_the_recipe_that_are_no_json_lines_are_named_by_line(tmp_path):
    path = text_file(tmp_path / "a.jsonl", '{"key": "a"}\n{"key"\n')
    with pytest.raises(UserError, match=r"a\.jsonl:2: not JSON"):
        list(read_jsonl(path))
    with pytest.raises(UserError, match=r"a\.jsonl:1: a list, not a JSON object"):
        list(read_jsonl(text_file(path, "[1]\n")))


def test_audio_without_a_sample_is_rejected(tmp_path):
    audio.write(tmp_path / "a.wav", np.zeros(16000), 16000)
    for read in (audio.length, audio.read):
        with pytest.raises(audio.AudioError) as caught:
            read(tmp_path / "a.wav", start=0.5, end=0.50001)
        assert caught.value.reason == "audio_empty"


def test_without_sox_what_only_sox_reads_is_rejected_and_sox_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    path = text_file(tmp_path / "a.sph", "no audio")
    with pytest.raises(audio.AudioError, match="sox is not installed"):
        audio.read(path)


def test_rules_on_text_and_lengths_of_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="punctuation is keep or remove"):
        TextRules({"text": {"punctuation": "drop"}})
    write_jsonl(tmp_path / "in.jsonl", [{"key": "a", "source": "gone.wav", "target": "x"}])
    done = helper_here(prepare_training_data.main, "filter", "--input", tmp_path / "in.jsonl", "--output",
                       tmp_path / "out.jsonl", "--max_speech_percentile", 99.5)  # fmt: skip
    assert done.returncode == 1 and "so there is no --max_speech_percentile" in done.stderr


def test_a_test_set_must_have_rows_of_different_keys_and_audio_that_can_be_read(tmp_path):
    row = formatted("a", tmp_path / "a.wav", np.zeros(16000), "一")
    refused(decode.read_test_set, text_file(tmp_path / "none.jsonl", ""), words=["has no rows"])
    write_jsonl(tmp_path / "twice.jsonl", [row, row])
    refused(decode.read_test_set, tmp_path / "twice.jsonl", words=["a key occurs twice"])
    text_file(tmp_path / "a.wav", "no audio")
    refused(decode.utterance, row, 16000, words=["a: ", "a.wav", "run stage 0 with --force true"])


def test_a_model_folder_must_be_whole_and_without_lora(tmp_path, model_dir):
    lora = {"state_dict": torch.load(model_dir / "model.pt"), "lora": {"r": 4, "lora_alpha": 8}}
    folder = make_model(tmp_path / "lora")
    torch.save(lora, folder / "model.pt")
    refused(check_model, folder, words=["holds LoRA tensors; fold them first"])
    (folder / "configuration.json").unlink()
    copy = partial(final_model.copy_configuration, folder, tmp_path / "out", 16000)
    refused(copy, True, words=["is not a whole model folder", "run stage -1 again"])


def test_an_export_needs_scores_and_a_folder_that_funasr_loads_whole(tmp_path, model_dir):
    scores = tmp_path / "summary.json"
    command = ("export", "--model_dir", model_dir, "--checkpoint", model_dir / "model.pt", "--summary", scores,
               "--output", tmp_path / "final")  # fmt: skip
    done = helper_here(final_model.main, *command)
    assert done.returncode == 1 and "summary.json" in done.stderr and "run stage 4 first" in done.stderr
    write_json(scores, [])
    (tmp_path / "final").mkdir()
    stale = text_file(tmp_path / "final/stale", "of an earlier export")
    assert helper_here(final_model.main, *command).returncode == 0
    assert (tmp_path / "final/model.pt").is_file() and not stale.exists()
    state = torch.load(tmp_path / "final/model.pt")
    name = next(name for name in state if name.startswith("audio_encoder."))
    del state[name]
    torch.save(state, tmp_path / "final/model.pt")
    refused(final_model.check_loads, tmp_path / "final", words=[f"FunASR did not load {name}"])


def test_checkpoints_that_hold_no_tensors_are_refused(tmp_path):
    for content, words in (([1], "holds a list, not a dictionary of tensors"), ({"epoch": 1}, "holds no tensors")):
        torch.save(content, tmp_path / "a.pt")
        refused(weights.load, tmp_path / "a.pt", words=[words])


def test_training_needs_rows_to_train_on_and_rows_of_dev(tmp_path):
    refused(make_train_list.mix, [], [], 0, words=["no training rows", "rejected_train.jsonl"])
    rows = make_rows(tmp_path)
    for name in ("simulated_8k_telephone", "real_8k_telephone", "wideband_16k", "no_speech"):
        for split in ("train", "dev"):
            write_jsonl(tmp_path / name / f"{split}_formatted.jsonl", rows if split == "train" else [])
    done = helper_here(make_train_list.main, "--stage", 1, "--data_dir", tmp_path, "--output", tmp_path / "list.jsonl",
                       "--valid_output", tmp_path / "valid.jsonl")  # fmt: skip
    assert done.returncode == 1 and "the dev list is empty" in done.stderr and not (tmp_path / "list.jsonl").exists()


def test_scores_need_transcripts_and_keywords_a_file(tmp_path):
    refused(list, score.read_transcripts(str(tmp_path)), words=["has no transcripts"])
    text_file(tmp_path / "a.jsonl", "")
    refused(list, score.read_transcripts(str(tmp_path)), words=["a.jsonl is empty; decode again"])
    refused(metrics.read_keywords, tmp_path / "gone.txt", words=["gone.txt does not exist", "--keywords"])


def test_a_plan_of_recordings_that_cannot_be_read_names_the_corpus(tmp_path, caplog):
    rows = [{"key": "a", "source": "gone.wav", "target": "x"}, {"key": "b", "source": "b.wav", "target": "x"}]
    write_jsonl(tmp_path / "in.jsonl", rows)
    sampled = partial(plan.sampled, str(tmp_path / "in.jsonl"), 16000)
    refused(sampled, True, words=["no recording could be read", "test_data_prep.sh"])
    audio.write(tmp_path / "b.wav", np.zeros(16000), 16000)
    assert sampled(True) == ([(100, 1)] * 2, 0.0) and "gone.wav does not exist" in caplog.text


def test_the_report_of_stage_0_counts_only_what_is_there(tmp_path):
    row = make_rows(tmp_path, 1)[0]
    assert stage0_report.structure_problem(row | {"key": ""}) == "no key"
    write_jsonl(tmp_path / "real/train_formatted.jsonl", [row])
    write_jsonl(tmp_path / "real/rejected_train.jsonl", [])
    done = helper_here(prepare_training_data.main, "stats", "--data_dir", tmp_path, "--source", "real/dev=x.jsonl")
    assert done.returncode == 2 and "there is no real/dev in" in done.stderr


def test_a_stage_that_never_started_has_not_ended_and_a_model_that_is_gone_is_found_again(tmp_path):
    refused(stage_status.done, str(tmp_path), 1, [], words=["stage 1 never started"])
    now = stage_status.fingerprint([], [])
    named = text_file(tmp_path / "model/model_dir.txt", f"{tmp_path}/cache\n")
    weights_file = text_file(tmp_path / "cache/model.pt", "x")
    stage_status.start(str(tmp_path), -1, now)
    stage_status.done(str(tmp_path), -1, [str(named)])
    assert stage_status.check(str(tmp_path), -1, now)[0] == stage_status.NOTHING_TO_DO
    weights_file.unlink()
    code, why = stage_status.check(str(tmp_path), -1, now)
    assert code == stage_status.MUST_RUN and f"{weights_file} is gone since" in why


def test_a_training_without_its_list_names_it(tmp_path, model_dir):
    stage = ROOT / "conf/stage1_encoder_adapt.yaml"
    done = helper("train.py", "--stage_conf", stage, "--model_dir", model_dir, "--init_checkpoint",
                  model_dir / "model.pt", "--train_list", tmp_path / "gone.jsonl", "--valid_list",
                  tmp_path / "gone.jsonl", "--output_dir", tmp_path / "exp")  # fmt: skip
    assert done.returncode == 2 and "error: list " in done.stderr and "gone.jsonl does not exist" in done.stderr


def test_make_listen_shows_the_experiments_corpus_or_the_demos_that_is_there(tmp_path):
    options = {"RAW_16K_DEV": "", "EXP_OUTPUT": str(tmp_path), "SEED": "0"}
    spoken = text_file(tmp_path / "demo/corpus/wideband_dev.jsonl", "")
    assert listen.given_corpus(options) == spoken
    assert listen.given_corpus(options | {"RAW_16K_DEV": "/my/dev.jsonl"}).as_posix() == "/my/dev.jsonl"
