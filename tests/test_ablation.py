"""The tables of the demo say what the summaries say, and a variant changes what its title says."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ablation
import results
from common import write_json, write_jsonl
from mini import ROOT, make_model, make_rows
from nano.config import flat_items, read_stage


def write_scores(folder: Path, cer: float, alpha: float) -> Path:
    rows = [
        {"model": model, "test_set": test_set, **{rate + end: cer + step + (model == "stage3") / 10
         for rate in ("cer", "kwer") for end, step in (("", 0.0), ("_low", -0.02), ("_high", 0.02))}}
        for model in ("base", "stage1", "stage3", "final")
        for test_set in ("simulated_test", "real_test", "wideband_test")
    ]  # fmt: skip
    rows += [{"model": model, "test_set": "no_speech", "chars_per_minute": 400 * cer} for model in ("stage3", "final")]
    write_json(folder / "eval/summary.json", rows)
    for model, test_set in ((row["model"], row["test_set"]) for row in rows):
        reference = "" if test_set == "no_speech" else "好" * 10
        row = {"model": model, "test_set": test_set, "ref": reference, "seconds": 60, "speaker": None}
        hypotheses = [reference + "啊" * (round(10 * cer) + number % 2) for number in range(20)]
        transcripts = [{**row, "key": f"{number}", "hyp": text} for number, text in enumerate(hypotheses)]
        write_jsonl(folder / f"eval/transcripts/{model}.{test_set}.jsonl", transcripts)
    curve = [{"alpha": 0.5, "telephone_cer": cer, "wideband_cer": 0.05}]
    write_json(folder / "eval/interpolation.json", {"alpha": alpha, "curve": curve})
    write_json(folder / "eval/ctc.json", {"base": 0.1, "stage1": 0.2, "stage2": cer})
    return folder


def test_the_table_has_a_line_a_variant_and_one_without_interpolation(tmp_path):
    demo, other = write_scores(tmp_path / "demo", 0.1, 1.0), write_scores(tmp_path / "other", 0.3, 0.5)
    lines = ablation.table(demo, {"no_replay": other}, 7).splitlines()
    assert lines[0] == "## Seed 7"
    assert lines[4].startswith("| as it is, alpha 1 | 10.0 (8.0-12.0) | ")
    assert lines[4].endswith("| 40 | 10.0 → 20.0 → 10.0 |")
    assert lines[5].startswith("| without wideband replay, alpha 0.5 | 30.0 (28.0-32.0)* | 30.0")
    assert lines[5].endswith("| 120* | 10.0 → 20.0 → 30.0 |") and "*" not in lines[4]
    assert lines[6].startswith("| without wideband replay, without interpolation | 30.0 (28.0-32.0)* | 40.0 (38")
    assert lines[10] == "| 0.5 | 10.0 | 5.0 |"


def test_a_stage_that_was_made_anew_is_of_its_new_commit(tmp_path):
    rates = {rate + end: 0.123 for rate in ("cer", "kwer", "chars_per_minute") for end in ("", "_low", "_high")}
    names = ("real_test", "simulated_test", "wideband_test", "no_speech")
    rows = [{"model": model, "test_set": name, "utterances": 9, **rates} for model in results.MODELS for name in names]
    write_json(tmp_path / "eval/summary.json", rows)
    for folder, commit in (("stage1_encoder_adapt", "new"), ("stage1_encoder_adapt.old.20261128_105535", "old")):
        write_json(tmp_path / "exp/8k_telephone" / folder / "run.json", {"commit": commit, "seed": 3})
    lines = results.table(tmp_path).splitlines()
    assert lines[0] == "`make demo SEED=3`, commit `new`, 9 utterances a test set, %:"
    assert lines[4].startswith("| recorded calls 真实通话 | 12.3 (12.3-12.3) |")


def test_without_a_demo_it_says_what_to_do_and_writes_nothing(tmp_path):
    command = [sys.executable, "bench/ablation.py", "--demo", tmp_path / "demo", "--table", tmp_path / "table.md"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "make demo" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "table.md").exists()


@pytest.mark.parametrize("name", ablation.VARIANTS)
def test_a_variant_changes_the_keys_it_names_and_no_other(name, tmp_path):
    for stage in ablation.STAGES:
        plain, changes = ROOT / f"conf/demo/{stage}.yaml", ablation.VARIANTS[name][3].get(stage, {})
        ablation.write_overlay(plain, changes, tmp_path / f"{stage}.yaml")
        stages = [read_stage([ROOT / f"conf/{stage}.yaml", overlay]) for overlay in (plain, tmp_path / f"{stage}.yaml")]
        before, after = map(flat_items, stages)
        changed = {key for key in after if after[key] != before.get(key, "absent")}
        assert changed <= flat_items(changes).keys(), changed
        assert not changes or changed


def test_greedy_ctc_joins_repeats_and_drops_blanks(tmp_path, monkeypatch):
    from funasr import AutoModel

    loaded = AutoModel(model=str(make_model(tmp_path / "model")), device="cpu", disable_update=True)
    model, (row,) = loaded.model.eval(), make_rows(tmp_path, 1)
    one, two = (model.ctc_tokenizer.encode(letter)[0] for letter in "一二")
    heard = torch.tensor([[one, one, model.blank_id, one, two, model.blank_id]])
    frames = torch.nn.functional.one_hot(heard, model.blank_id + 1).float()
    monkeypatch.setattr(model.ctc, "log_softmax", lambda decoded: frames)
    assert ablation.greedy_ctc(model, loaded.kwargs["frontend"], row) == "一一二"
