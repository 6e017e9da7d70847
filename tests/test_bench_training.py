"""The benchmark compares like with like: the same loss from both variants, and figures that can be right."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.full
def test_the_benchmark_runs_end_to_end_on_a_cpu(tmp_path):
    """One stage, one corpus, small batches: rows in the agreed form, and the table in the page."""
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- table -->\nold\n<!-- end -->\nafter\n")
    command = [sys.executable, "bench/training.py", "--work", tmp_path / "work", "--output", tmp_path / "t.json",
               "--table", page, "--corpora", "turns", "--stages", "2", "4", "--rounds", "1", "--round_seconds", "5",
               "--most_tokens", "6000"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    stage, decoding = json.loads((tmp_path / "t.json").read_text())
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
