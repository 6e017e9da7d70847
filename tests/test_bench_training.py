"""The benchmark compares like with like: the same loss from both variants, and figures that can be right."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from common import UserError
from mini import ROOT


@pytest.mark.full
def test_the_benchmark_runs_end_to_end_on_a_cpu(tmp_path):
    """Decoding, then a stage, as bench/gpu.sh does; small batches: rows in the agreed form, the table in the page."""
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table -->\nold\n<!-- end -->\nafter\n")
    command = [sys.executable, "bench/training.py", "--work", tmp_path / "work", "--output", tmp_path / "t.json",
               "--table", page, "--corpora", "turns", "--stages", "4", "2", "--rounds", "1", "--round_seconds", "5",
               "--most_tokens", "6000"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    decoding, stage = json.loads((tmp_path / "t.json").read_text())
    assert {"machine", "model", "stage", "stock", "ours", "ratio", "peak_gib", "mfu"} <= stage.keys() & decoding.keys()
    assert stage["losses"]["ours"] == pytest.approx(stage["losses"]["stock"], rel=1e-4)
    for variant in stage["details"].values():
        assert 0 < variant["loader_share"] < 1
        assert 0 <= variant["padding_share"] < 0.5
        assert 0 < variant["mfu"] < 1
    assert decoding["ratio"] > 0
    text = page.read_text()
    assert text.startswith("before\n<!-- table -->\n") and text.endswith("<!-- end -->\nafter\n")
    assert "| turns | stage2_adapter_align |" in text and "old" not in text


def test_what_fails_is_null_and_the_rest_is_measured(tmp_path, monkeypatch, caplog):
    """Stage 1 loses stock at its largest batch, stage 2 all, stage 3 ours; each row is written before the next one."""
    import training

    written, output, page = [], tmp_path / "t.json", tmp_path / "page.md"
    page.write_text("<!-- table -->\n<!-- end -->\n")

    def run(kind, stage, *_):
        written.append(output.is_file() and len(json.loads(output.read_text())))
        if stage.startswith("stage2"):
            raise RuntimeError("no model\nat all")
        return SimpleNamespace(kind=kind, stage=stage, fitting=lambda: 12000)

    def measure(run, tokens, *_):
        if (run.kind, run.stage[:6]) == ("ours", "stage3"):
            raise UserError("one row does not fit")
        return {"rate": tokens / 1000, "flops": 1.0, "peak_gib": None}

    def largest_batch(run, most):
        if run.stage.startswith("stage1"):
            raise torch.cuda.OutOfMemoryError("Tried to allocate 2 GiB")
        return most

    fakes = {"Run": run, "measure": measure, "largest_batch": largest_batch, "FAILED": [],
             "same_loss": lambda *_: {}, "build_folder": lambda *_, **__: tmp_path,
             "write_corpus": lambda *_: Path("long.jsonl"), "matmul_flops": lambda _: 1e9}  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(training, name, fake)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["training.py", "--output", str(output), "--table", str(page), "--corpora", "long",
                                      "--stages", "1", "2", "3", "--rounds", "1"])  # fmt: skip
    with pytest.raises(UserError, match="stage1_.* stock_largest, long stage 2, .* stage3_lora_domain ours;"):
        training.main()
    rows = [[row[key] for key in ("ours", "stock", "stock_largest", "ratio", "ratio_largest")]
            for row in json.loads(output.read_text())]  # fmt: skip
    assert rows == [[12.0, 6.0, None, 2.0, None], [None, 6.0, 12.0, None, None]]
    assert "| stage1_encoder_adapt | 6.0 |  | 12.0 | 2.0 |  |" in page.read_text()
    assert written == [False, False, 1, 1, 1]
    assert [record.getMessage() for record in caplog.records if record.levelname == "ERROR"] == [
        "error: long stage1_encoder_adapt stock_largest: OutOfMemoryError: Tried to allocate 2 GiB",
        "error: long stage 2: RuntimeError: no model at all",
        "error: long stage3_lora_domain ours: UserError: one row does not fit",
    ]


def test_ours_is_measured_first_after_a_short_warm_up(monkeypatch):
    """And the search for stock's largest batch comes when all else is measured."""
    import training

    done = []

    def epoch(kind, tokens, seconds, least, first):
        done.append((kind, tokens, least))
        return SimpleNamespace(seconds=1, elapsed=1, waited=0, frames=1, padded=1, steps=1, flops=1, peak_gib=1)

    def run(kind, *_):
        return SimpleNamespace(kwargs={"dataset_conf": {"num_workers": 16 if kind == "ours" else 4}},
                               fitting=lambda: 110000, epoch=lambda *given: epoch(kind, *given))  # fmt: skip

    def largest_batch(run, most):
        done.append("search")
        return most

    for name, fake in {"Run": run, "same_loss": lambda *_: {}, "largest_batch": largest_batch, "FAILED": []}.items():
        monkeypatch.setattr(training, name, fake)
    args = SimpleNamespace(device="cuda", work=None, rounds=1, round_seconds=400, most_tokens=400000, peak_flops=1,
                           profile=False)  # fmt: skip
    training.bench_stage("stage2_adapter_align", Path("long.jsonl"), Path(), args)
    assert done == [("ours", 110000, 6), ("ours", 110000, 48), ("stock", 6000, 12), "search", ("stock", 400000, 12)]
