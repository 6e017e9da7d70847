"""A training that is killed, again and again, ends with the weights of one that was not.

local/train.py runs as it is, inside a witness that writes down every batch and ends its own process with SIGKILL
where the test says. Each run is a fork of one process that has imported FunASR, which takes longer than a run.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from common import write_jsonl
from mini import ROOT, SMALL, formatted
from miniature import build_folder
from nano.train_log import read_log
from nano.trainer import Trainer

ALPHABET = "一二三四五六七八九零"
WITNESS = '''
import io, json, os, signal, sys, traceback
from pathlib import Path

sys.path.insert(0, "local")
import nano.trainer
import nano.weights
import train
from common import run

NOTES, WHERE = os.environ["NOTES"], None


def note(what, *facts):
    with open(NOTES, "a") as file:
        file.write(json.dumps([what, *facts]) + "\\n")


class Witness(nano.trainer.Trainer):
    def train_epoch(self, **kwargs):
        self.epoch = kwargs["epoch"]
        super().train_epoch(**kwargs)

    def forward_step(self, model, batch, loss_dict=None):
        if model.training:
            note("batch", self.epoch, loss_dict["step_in_epoch"], [item["key"] for item in batch["item"]])
            if WHERE == ["batch", self.epoch, loss_dict["step_in_epoch"]]:
                os.kill(os.getpid(), signal.SIGKILL)
        super().forward_step(model, batch, loss_dict)

    def save_checkpoint(self, epoch, step=None, step_in_epoch=None, **kwargs):
        if WHERE == ["save", epoch, step_in_epoch if step else None]:
            whole = nano.weights.torch.save

            def half(checkpoint, file):
                content = io.BytesIO()
                whole(checkpoint, content)
                file.write(content.getvalue()[: len(content.getvalue()) // 2])
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)

            nano.weights.torch.save = half
        super().save_checkpoint(epoch, step=step, step_in_epoch=step_in_epoch, **kwargs)

    def validate_epoch(self, **kwargs):
        super().validate_epoch(**kwargs)
        note("validated", kwargs["epoch"], self.val_loss_avg)


nano.trainer.Trainer = Witness
for WHERE in json.loads(os.environ["KILLS"]):
    note("start")
    child = os.fork()
    if not child:
        try:
            run(train.main)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    note("end", code, len(list(Path(sys.argv[sys.argv.index("--output_dir") + 1]).glob(".*.tmp"))))
'''
KILLED, DONE = -signal.SIGKILL, 0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A model folder and 23 rows of noise."""
    folder = tmp_path_factory.mktemp("resume")
    build_folder(folder / "model", ALPHABET, SMALL, seed=1)
    rng, rows = np.random.default_rng(0), []
    for number in range(23):
        samples = 0.1 * rng.standard_normal(16000 + 800 * number)
        text = "".join(rng.choice(list(ALPHABET), 3))
        rows.append(formatted(f"u{number}", folder / f"{number}.wav", samples, text))
    write_jsonl(folder / "list.jsonl", rows)
    (folder / "witness.py").write_text(WITNESS)
    return folder


class Training:
    """Runs of local/train.py with stage 1's YAML into one folder, with dropout and SpecAugment."""

    def __init__(self, corpus: Path, output: Path, **overlay):
        self.corpus, self.output = corpus, output
        self.notes, self.log = output.with_suffix(".notes"), output.with_suffix(".log")
        overlay = {
            "scheduler_conf": {"warmup_steps": 4},
            "optim_conf": {"lr": 0.003}, "dataset_conf": {"batch_size": 700, "sort_size": 8, "num_workers": 0},
            "frontend_conf": {"dither": 0.0},
        } | overlay  # fmt: skip
        self.overlay = output.with_suffix(".yaml")
        self.overlay.write_text(yaml.safe_dump(overlay))

    def run(self, *kills) -> list[list]:
        """One run after the other, each killed where its entry says; the exit code and unfinished files of each."""
        command = [
            sys.executable, self.corpus / "witness.py", "--stage_conf", "conf/stage1_encoder_adapt.yaml", "--overlay",
            self.overlay, "--model_dir", self.corpus / "model", "--init_checkpoint", self.corpus / "model/model.pt",
            "--train_list", self.corpus / "list.jsonl", "--valid_list", self.corpus / "list.jsonl", "--output_dir",
            self.output,
        ]  # fmt: skip
        environment = {**os.environ, "NOTES": str(self.notes), "KILLS": json.dumps(kills), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True,
                              timeout=1200, check=False)  # fmt: skip
        with open(self.log, "a") as file:
            file.write(done.stderr)
        ends = self.noted("end")[-len(kills) :]
        assert done.returncode == 0 and {code for code, _ in ends} <= {DONE, KILLED}, done.stderr[-3000:]
        return ends

    def noted(self, what: str) -> list[list]:
        notes = [json.loads(line) for line in self.notes.read_text().splitlines()]
        return [facts for name, *facts in notes if name == what]

    def runs(self) -> list[list[list]]:
        """The batches [epoch, step, keys] of every run."""
        found: list[list[list]] = []
        for line in self.notes.read_text().splitlines():
            name, *facts = json.loads(line)
            if name == "start":
                found.append([])
            elif name == "batch":
                found[-1].append(facts)
        return found

    def epoch_losses(self) -> dict[int, float]:
        return {row["epoch"]: row["loss"] for row in read_log(self.log) if row["tag"] == "train"}

    def averaged(self) -> dict[str, torch.Tensor]:
        return torch.load(self.output / "averaged.pt")["state_dict"]


@pytest.mark.full
def test_three_kills_leave_the_weights_and_the_loss_of_an_uninterrupted_training(corpus, tmp_path):
    often = {"max_epoch": 2, "keep_nbest_models": 2, "avg_nbest_model": 2, "save_checkpoint_interval": 2,
             "early_stopping_patience": 0}  # fmt: skip
    whole = Training(corpus, tmp_path / "whole", train_conf=often)
    assert whole.run(None) == [[DONE, 0]]
    broken = Training(corpus, tmp_path / "broken", train_conf=often)
    ends = broken.run(["batch", 0, 4], ["batch", 0, 6], ["save", 1, 2], None)
    assert ends == [[KILLED, 0], [KILLED, 0], [KILLED, 1], [DONE, 0]]

    # A batch counts when the run after it did not do it again: the last record of every step.
    runs = broken.runs()
    assert [run[0][:2] for run in runs] == [[0, 1], [0, 3], [0, 5], [1, 1]]
    lineage = {(epoch, step): keys for run in runs for epoch, step, keys in run}
    for epoch in (0, 1):
        keys = [key for (of, _step), batch in lineage.items() if of == epoch for key in batch]
        assert sorted(keys) == sorted(f"u{number}" for number in range(23))
    assert lineage == {(epoch, step): keys for epoch, step, keys in whole.runs()[0]}

    assert broken.noted("validated") == whole.noted("validated")
    assert broken.epoch_losses() == whole.epoch_losses() and len(whole.epoch_losses()) == 2
    expected = whole.averaged()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in broken.averaged().items())
    assert len(list(broken.output.glob("model.pt.ep*"))) == len(list(whole.output.glob("model.pt.ep*"))) == 2


def test_a_step_draws_from_seed_epoch_step_and_process(tmp_path):
    def draw(rank: int = 0, seed: int = 0, epoch: int = 0, step: int = 0) -> float:
        trainer, drawn = Trainer(output_dir=str(tmp_path), device="cpu", rank=rank), []
        trainer.seed, trainer.row_uses = seed, torch.zeros(1, dtype=torch.int32)

        def model(**batch):
            drawn.append(torch.rand(1).item())
            return torch.zeros(1), {}, 1

        trainer.forward_step(model, {"item": [{"row": 0}]}, {"epoch": epoch, "log_step": step})
        return drawn[0]

    places = [{}, {"rank": 1}, {"seed": 1}, {"epoch": 1}, {"step": 1}]
    drawn = [draw(**place) for place in places]
    assert len(set(drawn)) == len(places) and drawn == [draw(**place) for place in places]


@pytest.mark.full
def test_an_epoch_begun_on_two_processes_is_not_ended_by_one(corpus, tmp_path):
    training = Training(corpus, tmp_path / "two", train_conf={"max_epoch": 2, "save_checkpoint_interval": 2})
    assert training.run(["batch", 0, 4]) == [[KILLED, 0]]
    saved = torch.load(training.output / "model.pt")
    torch.save(saved | {"processes": 2}, training.output / "model.pt")
    with pytest.raises(AssertionError, match="go on with as many GPUs as before"):
        training.run(None)
    assert len(training.runs()[-1]) == 0


@pytest.mark.full
def test_early_stopping_counts_on_after_a_kill_and_a_finished_training_trains_no_more(corpus, tmp_path):
    # At a rate of 0 the first epoch is the best, and patience ends with the third.
    conf = {"max_epoch": 9, "keep_nbest_models": 2, "avg_nbest_model": 2, "early_stopping_patience": 2}
    training = Training(corpus, tmp_path / "stops", train_conf=conf, optim_conf={"lr": 0.0})
    assert training.run(["batch", 2, 1], None) == [[KILLED, 0], [DONE, 0]]
    assert {epoch for epoch, *_ in training.runs()[-1]} == {2}
    first = training.averaged()
    assert training.run(None) == [[DONE, 0]]
    assert training.runs()[-1] == []
    assert all(torch.equal(tensor, first[name]) for name, tensor in training.averaged().items())


@pytest.mark.full
def test_a_checkpoint_that_was_deleted_to_save_disk_is_not_averaged(corpus, tmp_path):
    conf = {"max_epoch": 3, "keep_nbest_models": 3, "avg_nbest_model": 3, "early_stopping_patience": 0}
    training = Training(corpus, tmp_path / "deleted", train_conf=conf)
    assert training.run(["batch", 2, 1]) == [[KILLED, 0]]
    (training.output / "model.pt.ep1").unlink()
    assert training.run(None) == [[DONE, 0]]
    assert set(torch.load(training.output / "averaged.pt")["averaged"]) == {"model.pt.ep2", "model.pt.ep3"}
    for path in training.output.glob("model.pt.ep*"):
        path.unlink()
    with pytest.raises(AssertionError, match="error: no checkpoint to average.*--force true"):
        training.run(None)
