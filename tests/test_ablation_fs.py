"""The table of `make ablation-fs` says what the two summaries say."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "bench"))
import ablation_fs  # noqa: E402


def write_scores(folder: Path, cer: float, width: float) -> ablation_fs.Scores:
    rows = [
        {"model": model, "test_set": test_set, "cer": cer, "cer_low": cer - width, "cer_high": cer + width}
        for model in ablation_fs.MODELS for test_set in [*ablation_fs.TEST_SETS, "no_speech"]
    ]  # fmt: skip
    (folder / "eval").mkdir(parents=True)
    (folder / "eval/summary.json").write_text(json.dumps(rows))
    return ablation_fs.read_scores(folder)


def test_the_table_has_every_model_at_both_rates_and_the_verdict_knows_chance(tmp_path):
    wide, near, far = (write_scores(tmp_path / f"{cer}", cer, 0.02) for cer in (0.1, 0.13, 0.2))
    text = ablation_fs.table(wide, far, "heading")
    assert text.count("| 10.0 (8.0-12.0) | 20.0 (18.0-22.0) |") == 15
    assert "recorded calls: 16000; simulated calls: 16000" in text
    assert "recorded calls: 8000;" in ablation_fs.table(far, wide, "heading")
    assert "recorded calls: 16000 (intervals overlap)" in ablation_fs.table(wide, near, "heading")


def test_without_a_demo_it_says_what_to_do_and_writes_nothing(tmp_path):
    command = [sys.executable, "bench/ablation_fs.py", "--demo", tmp_path / "demo", "--table", tmp_path / "table.md"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "make demo" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "table.md").exists()


def test_the_run_at_8000_finds_the_demos_corpus_and_model(tmp_path):
    for name in ("corpus", "base_model"):
        (tmp_path / "demo" / name).mkdir(parents=True)
    (tmp_path / "demo/base_model/config.yaml").write_text("not a model")
    command = [sys.executable, "-c", "import sys; sys.path.insert(0, 'bench'); import ablation_fs; from pathlib import "
               "Path; ablation_fs.run_at_8000(Path(sys.argv[1]), 0)", tmp_path / "demo"]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    # The driver starts, and refuses the first thing that is not there in the linked corpus.
    assert f"{tmp_path}/demo_8000/corpus/wideband_train.jsonl does not exist" in done.stderr
