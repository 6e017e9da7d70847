"""A stage runs when it has to, and only then: what stage_status.py promises the driver."""

import contextlib
import fcntl
import functools
import json
import os

import pytest

import stage_status
from common import UserError
from mini import helper, log_line
from nano.train_log import read_log

command = functools.partial(helper, "stage_status.py")


@pytest.fixture
def experiment(tmp_path):
    """A finished stage 1 over two inputs and an option."""
    (tmp_path / "stage.yaml").write_text("lr: 0.1\n")
    (tmp_path / "list.jsonl").write_text('{"key": "a"}\n')
    (tmp_path / "averaged.pt").write_bytes(b"weights")
    (tmp_path / "train.jsonl").write_text('{"key": "a"}\n{"key": "b"}\n')
    now = facts(tmp_path)
    stage_status.start(str(tmp_path), 1, now)
    stage_status.done(str(tmp_path), 1, [str(tmp_path / "averaged.pt"), str(tmp_path / "train.jsonl")])
    return tmp_path


def facts(root, *config):
    return stage_status.fingerprint([str(root / "stage.yaml"), str(root / "list.jsonl")], list(config) or ["SEED=0"])


def check(root, *config, **options):
    return stage_status.check(str(root), 1, facts(root, *config), **options)


def test_touching_a_file_without_changing_it_changes_nothing(experiment):
    os.utime(experiment / "list.jsonl", (1, 1))
    assert check(experiment)[0] == stage_status.NOTHING_TO_DO


def test_a_change_is_named(experiment):
    (experiment / "list.jsonl").write_text('{"key": "b"}\n')
    code, reason = check(experiment, "SEED=1")
    assert code == stage_status.MUST_REDO
    assert "SEED 0 -> 1" in reason and "list.jsonl changed" in reason and "stage.yaml" not in reason


def test_an_input_that_disappeared_is_a_change(experiment):
    (experiment / "list.jsonl").unlink()
    assert "list.jsonl is gone" in check(experiment)[1]


def test_an_option_that_is_new_or_empty_is_a_change(experiment):
    assert "BG empty -> noise.scp" in check(experiment, "SEED=0", "BG=noise.scp")[1]
    assert check(experiment, "SEED=0", "BG=")[0] == stage_status.NOTHING_TO_DO


def test_force_redoes_what_is_up_to_date(experiment):
    assert check(experiment, force=True)[0] == stage_status.MUST_REDO


@pytest.mark.parametrize("stage", [1, 5])
def test_the_sampling_rate_is_that_of_stage_0(tmp_path, stage):
    narrow, wide = (facts(tmp_path, f"FRONTEND_FS={rate}") for rate in (8000, 16000))
    assert stage_status.check(str(tmp_path), stage, wide)[0] == stage_status.MUST_RUN  # weights from elsewhere
    stage_status.start(str(tmp_path), 0, narrow)
    assert stage_status.check(str(tmp_path), stage, narrow)[0] == stage_status.MUST_RUN
    assert stage_status.check(str(tmp_path), 0, wide)[0] == stage_status.MUST_REDO
    with pytest.raises(UserError, match="--frontend_fs 8000") as refused:
        stage_status.check(str(tmp_path), stage, wide, force=True)
    assert refused.value.code == 2


def test_a_killed_stage_goes_on_but_not_with_other_options(experiment):
    stage_status.start(str(experiment), 1, facts(experiment))
    assert check(experiment)[0] == stage_status.MUST_RUN
    assert check(experiment, "SEED=1")[0] == stage_status.MUST_REDO


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(b"torn")])
def test_an_output_that_is_gone_or_cut_off_is_made_again(experiment, damage):
    damage(experiment / "averaged.pt")
    code, reason = check(experiment)
    assert code == stage_status.MUST_RUN
    assert "averaged.pt" in reason


@pytest.mark.parametrize("content", [None, b""])
def test_a_stage_is_not_done_without_its_outputs(experiment, content):
    stage_status.start(str(experiment), 1, facts(experiment))
    missing = experiment / "missing.pt"
    if content is not None:
        missing.write_bytes(content)
    with pytest.raises(UserError, match=r"missing\.pt"):
        stage_status.done(str(experiment), 1, [str(missing)])
    assert check(experiment)[0] == stage_status.MUST_RUN


def test_the_marker_holds_counts_and_duration(experiment):
    marker = json.loads((experiment / "status/stage1.json").read_text())
    assert marker["counts"] == {"train": 2}
    assert marker["seconds"] >= 0
    assert marker["state"] == "done"


def test_a_change_in_the_middle_of_a_large_checkpoint_is_seen(tmp_path):
    import torch

    state = {f"layer{index}": torch.zeros(1 << 18) for index in range(8)}
    torch.save(state, tmp_path / "a.pt")
    state["layer4"][1000] = 1.0
    torch.save(state, tmp_path / "b.pt")
    assert (tmp_path / "a.pt").stat().st_size == (tmp_path / "b.pt").stat().st_size > 8 << 20
    assert stage_status.hash_input(str(tmp_path / "a.pt")) != stage_status.hash_input(str(tmp_path / "b.pt"))


def test_a_kaldi_folder_is_known_by_its_lists(tmp_path):
    (tmp_path / "wav.scp").write_text("a a.wav\n")
    (tmp_path / "text").write_text("a 你好\n")
    before = stage_status.hash_input(str(tmp_path))
    (tmp_path / "notes.txt").write_text("not an input\n")
    assert stage_status.hash_input(str(tmp_path)) == before
    (tmp_path / "text").write_text("a 您好\n")
    text = stage_status.hash_input(str(tmp_path))
    (tmp_path / "reco2file_and_channel").write_text("a a A\n")
    assert len({before, text, stage_status.hash_input(str(tmp_path))}) == 3
    assert "reco2file" not in text, "markers from before it was read still hold"


def test_exit_codes_of_the_command(experiment):
    root = ("--output_root", experiment, "--inputs", experiment / "stage.yaml", experiment / "list.jsonl")
    assert command("check", "--stage", 1, *root, "--config", "SEED=0").returncode == 0
    assert command("check", "--stage", 2, *root, "--config", "SEED=0").returncode == 3
    assert command("check", "--stage", 1, *root, "--config", "SEED=1").returncode == 4
    refused = command("check", "--stage", 1, *root, "--config", "SEED=1", "--on_change", "refuse")
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1 and "SEED 0 -> 1" in refused.stderr
    assert command("check", "--stage", 9, *root).returncode == 2


def test_a_damaged_marker_is_told_not_traced(experiment):
    (experiment / "status/stage1.json").write_text('{"state": ')
    shown = command("show", "--output_root", experiment)
    assert shown.returncode == 1
    assert "stage1.json is damaged" in shown.stderr and "Traceback" not in shown.stderr


@pytest.fixture
def training(experiment):
    """Stage 2 in its second epoch, 400 s of audio in an epoch of 80 steps of half a second."""
    folder = experiment / "exp/8k_telephone/stage2_adapter_align"
    folder.mkdir(parents=True)
    (folder / "train.log").write_text(
        log_line(step=20, loss=2.5) + log_line(step=20, loss=7.5, rank=1) + log_line(step=80, loss=2.0, seconds=0.4)
        + log_line("val", epoch=1, step=4, loss=1.75, acc=0.875, seconds=9) + log_line(epoch=1, step=40, loss=1.5)
    )
    (folder / "trainlist.jsonl").write_text('{"speech_length": 30000}\n{"speech_length": 10000}\n')
    stage_status.start(str(experiment), 2, facts(experiment))
    return folder


def tables(root):
    shown = command("show", "--output_root", root)
    assert shown.returncode == 0, shown.stderr
    assert (root / "README_EXPERIMENT_STATUS.md").read_text(encoding="utf-8") == shown.stdout
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in shown.stdout.splitlines() if line[:1] == "|"]
    half = [index for index, row in enumerate(rows) if row[0] == "stage"][1:]
    states, trainings = (rows[: half[0]], rows[half[0] + 2 :]) if half else (rows, [])
    return {row[0]: row for row in states}, {row[0]: row for row in trainings}


@contextlib.contextmanager
def held(root):
    """The lock of the experiment, as a run and whatever it starts holds it."""
    with open(root / ".lock0", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def test_status_shows_the_state_of_every_stage(experiment):
    stage_status.start(str(experiment), 3, facts(experiment))
    stage_status.start(str(experiment), 2, facts(experiment))
    with held(experiment):
        states, trainings = tables(experiment)
    assert [states[stage][2] for stage in "0123"] == ["not run", "done", "running", "stopped; run it again"]
    for code, state in ((130, "stopped; run it again"), (7, "failed: see train.log")):
        told = command("ended", "--stage", 3, "--output_root", experiment, "--code", code, "--log", "train.log")
        assert told.returncode == 0
        assert tables(experiment)[0]["3"][2] == state
    assert states["1"][5] == "train 2"
    assert not trainings


def test_what_a_killed_driver_left_behind_is_not_called_stopped(training, experiment):
    for stage in (1, 2):  # stage 1 was stopped some time before
        stage_status.start(str(experiment), stage, facts(experiment))
    with held(experiment):
        states, trainings = tables(experiment)
        assert states["1"][2] == "stopped; run it again" and states["2"][2] == "running"
        assert trainings["2"][-1] == "0:05:40"
    assert tables(experiment)[0]["2"][2] == "stopped; run it again"
    with open(experiment / ".lock0") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_status_on_another_machine_does_not_call_a_training_stopped(experiment):
    stage_status.start(str(experiment), 2, facts(experiment))
    path = experiment / "status/stage2.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"host": "node7"}))
    assert tables(experiment)[0]["2"][2] == "started on node7"


def test_status_shows_how_a_training_goes(training, experiment):
    with held(experiment):
        _states, trainings = tables(experiment)
    # 8 epochs of 80 steps and half of this one, at half a second each
    assert trainings["2"] == ["2", "2/10", "2.500 -> 1.500", "40%", "87.5%", "10", "CPU", "0:05:40"]
    means = {"loss_first_epoch": 2.0, "loss_last_epoch": 1.5}
    for record, told in (({"seed": 0}, ["2.500 -> 1.500", "40%"]), ({"checked": means}, ["2.000 -> 1.500", "25%"])):
        (training / "run.json").write_text(json.dumps(record))
        assert tables(experiment)[1]["2"][2:4] == told


def test_a_log_cut_off_in_a_line_or_without_a_step_is_no_trouble(training, experiment):
    log = training / "train.log"
    text = log.read_text()
    log.write_text(text + log_line(epoch=1, step=60, loss=0.1, gpu=71.5)[:-80])
    assert tables(experiment)[1]["2"][2] == "2.500 -> 1.500"
    log.write_text(text + log_line(epoch=1, step=60, loss=1.25, gpu=71.5))
    assert tables(experiment)[1]["2"][2:7] == ["2.500 -> 1.250", "50%", "87.5%", "10", "71.5"]
    log.write_text("no step yet\n")
    assert not tables(experiment)[1]


def test_the_log_says_of_each_step_what_the_first_process_wrote(training):
    rows = read_log(training / "train.log")
    assert [(row["tag"], row["epoch"], row["step"]) for row in rows] == [
        ("train", 0, 20), ("train", 0, 80), ("val", 1, 4), ("train", 1, 40)]
    assert rows[2] == {"tag": "val", "epoch": 1, "epochs": 10, "step": 4, "steps": 80, "total_step": 84, "loss": 1.75,
                       "acc": 0.875, "seconds": 9.0, "gpu": 0.0}  # fmt: skip
    assert read_log(training / "no such log") == []


def test_status_shows_the_error_rates_where_they_were_scored(training, experiment):
    rows = [{"model": model, "test_set": test_set, "cer": cer} for model, test_set, cer in (
        ("base", "real_test", 0.5), ("base", "simulated_test", None), ("stage1", "simulated_test", 0.123),
        ("stage1", "real_test", 0.4), ("stage1", "wideband_test", 0.1), ("stage1", "no_speech", None),
        ("final", "real_test", 0.3),
    )]  # fmt: skip
    (experiment / "eval").mkdir()
    (experiment / "eval/summary.json").write_text(json.dumps(rows))
    stage_status.start(str(experiment), 4, facts(experiment))
    states, _trainings = tables(experiment)
    assert states["1"][5] == "stage1: simulated 12.3%, real 40.0%"
    assert states["4"][5] == "base: real 50.0%, final: real 30.0%"


def test_status_of_nothing_says_how_to_begin(tmp_path):
    shown = command("show", "--output_root", tmp_path / "none")
    assert shown.returncode == 2
    assert shown.stderr.count("\n") == 1
