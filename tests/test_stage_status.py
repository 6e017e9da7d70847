"""A stage runs when it has to, and only then: what stage_status.py promises the driver."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import stage_status
from common import UserError

HELPER = Path(stage_status.__file__)


@pytest.fixture
def experiment(tmp_path):
    """A finished stage 1 over two inputs and an option."""
    (tmp_path / "stage.yaml").write_text("lr: 0.1\n")
    (tmp_path / "list.jsonl").write_text('{"key": "a"}\n')
    (tmp_path / "averaged.pt").write_bytes(b"weights")
    (tmp_path / "train.jsonl").write_text('{"key": "a"}\n{"key": "b"}\n')
    now = facts(tmp_path)
    stage_status.start(str(tmp_path), 1, now, pid=0)
    stage_status.done(str(tmp_path), 1, [str(tmp_path / "averaged.pt"), str(tmp_path / "train.jsonl")])
    return tmp_path


def facts(root, *config):
    return stage_status.fingerprint([str(root / "stage.yaml"), str(root / "list.jsonl")], list(config) or ["SEED=0"])


def check(root, *config, **options):
    return stage_status.check(str(root), 1, facts(root, *config), **options)


def command(*arguments):
    return subprocess.run([sys.executable, HELPER, *map(str, arguments)], capture_output=True, text=True, check=False)


def test_a_stage_that_never_ran_must_run(tmp_path):
    assert stage_status.check(str(tmp_path), 0, facts(tmp_path))[0] == stage_status.MUST_RUN


def test_a_finished_stage_with_nothing_changed_has_nothing_to_do(experiment):
    code, reason = check(experiment)
    assert code == stage_status.NOTHING_TO_DO
    assert "nothing to do" in reason


def test_touching_a_file_without_changing_it_changes_nothing(experiment):
    os.utime(experiment / "list.jsonl", (1, 1))
    assert check(experiment)[0] == stage_status.NOTHING_TO_DO


def test_a_change_is_named(experiment):
    (experiment / "list.jsonl").write_text('{"key": "b"}\n')
    code, reason = check(experiment, "SEED=1")
    assert code == stage_status.MUST_REDO
    assert "SEED 0 -> 1" in reason and "list.jsonl changed" in reason and "stage.yaml" not in reason


def test_a_change_that_would_replace_work_is_refused_in_one_line(experiment):
    with pytest.raises(UserError, match="SEED 0 -> 1.*--force true") as refused:
        check(experiment, "SEED=1", refuse=True)
    assert refused.value.code == 1
    assert check(experiment, "SEED=1", refuse=True, force=True)[0] == stage_status.MUST_REDO


def test_an_input_that_disappeared_is_a_change(experiment):
    (experiment / "list.jsonl").unlink()
    assert "list.jsonl is gone" in check(experiment)[1]


def test_an_option_that_is_new_or_empty_is_a_change(experiment):
    assert "BG empty -> noise.scp" in check(experiment, "SEED=0", "BG=noise.scp")[1]
    assert check(experiment, "SEED=0", "BG=")[0] == stage_status.NOTHING_TO_DO


def test_force_redoes_what_is_up_to_date(experiment):
    assert check(experiment, force=True)[0] == stage_status.MUST_REDO


def test_a_killed_stage_goes_on_but_not_with_other_options(experiment):
    stage_status.start(str(experiment), 1, facts(experiment), pid=0)
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
    stage_status.start(str(experiment), 1, facts(experiment), pid=0)
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
    assert stage_status.hash_input(str(tmp_path)) != before


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


def test_status_shows_stages_and_the_last_step_of_a_training(experiment):
    log = experiment / "exp/8k_telephone/stage1_encoder_adapt/train.log"
    log.parent.mkdir(parents=True)
    line = (
        "[2026-01-05 10:00:00,000][root][INFO] - {tag}, rank: 0, epoch: {epoch}/10, data_slice: 0/1, "
        "step_in_slice: {step}/80, step_in_epoch: {step}, total step: 99, (loss_avg_rank: 1.2), "
        "(loss_avg_slice: {loss}), (ppl_avg_slice: 1.0e+00), (acc_avg_slice: 0.9), (lr: 1.000e-04), [], {{}}, GPU\n"
    )
    log.write_text(
        line.format(tag="train", epoch=1, step=20, loss=2.5)
        + line.format(tag="val", epoch=1, step=4, loss=2.25)
        + line.format(tag="train", epoch=2, step=40, loss=1.125)
    )
    stage_status.start(str(experiment), 2, facts(experiment), pid=os.getpid())
    stage_status.start(str(experiment), 3, facts(experiment), pid=0)
    shown = command("show", "--output_root", experiment)
    assert shown.returncode == 0
    rows = {line.split("|")[1].strip(): line for line in shown.stdout.splitlines() if line.startswith("|")}
    assert "done" in rows["1"]
    assert "train epoch 2/10 step 40/80 loss 1.125" in rows["1"] and "val epoch 1/10 step 4/80 loss 2.25" in rows["1"]
    assert "running" in rows["2"] and "stopped" in rows["3"] and "not run" in rows["0"]
    assert (experiment / "README_EXPERIMENT_STATUS.md").read_text(encoding="utf-8") == shown.stdout


def test_status_of_nothing_says_how_to_begin(tmp_path):
    shown = command("show", "--output_root", tmp_path / "none")
    assert shown.returncode == 2
    assert shown.stderr.count("\n") == 1
