"""The whole recipe on human recordings: Debian's Asterisk prompts, as G.722 (16 kHz), WAV and GSM 06.10 (8 kHz)."""

import gzip
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

import audio
from mini import ROOT

SOUNDS = Path("/usr/share/asterisk/sounds/en_US_f_Allison")
TRANSCRIPTS = Path("/usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz")

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        not (TRANSCRIPTS.is_file() and all((SOUNDS / f"added.{kind}").is_file() for kind in ("g722", "wav", "gsm"))),
        reason="needs Debian's asterisk-core-sounds-en and its -g722, -wav and -gsm packages",
    ),
]

OVERLAY = """
optim_conf: {lr: %s}
scheduler_conf: {warmup_steps: 20}
train_conf: {max_epoch: %d, keep_nbest_models: 2, avg_nbest_model: 2, log_interval: 5}
dataset_conf: {batch_size: 6000, batch_size_sample_max: 64, sort_size: 128, num_workers: 0, cache_gib: 1.0}
"""


def run(*command: str | Path) -> str:
    """Run a command of the recipe as a user does; return what it printed."""
    command = [str(part) for part in command]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=1500)
    assert done.returncode == 0, f"{command[:3]} exited {done.returncode}:\n{done.stdout[-4000:]}"
    return done.stdout


def transcripts() -> dict[str, str]:
    lines = gzip.decompress(TRANSCRIPTS.read_bytes()).decode("utf-8").splitlines()
    pairs = [line.split(":", 1) for line in lines if ":" in line and not line.startswith(";")]
    return {name.strip(): text.strip() for name, text in pairs}


def split_of(name: str) -> str:
    place = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 10
    return {0: "dev", 1: "test"}.get(place, "train")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory) -> Path:
    """Stages -1 to 5 in a folder whose name has a space."""
    folder = tmp_path_factory.mktemp("real input")
    texts = transcripts()
    for split in ("train", "dev", "test"):
        names = [name for name in texts if split_of(name) == split and (SOUNDS / f"{name}.g722").is_file()]
        for corpus, kinds in (("raw", ["g722"]), ("real", ["wav", "gsm"])):
            rows = [
                {"key": f"{name}.{kind}", "source": str(SOUNDS / f"{name}.{kind}"), "target": texts[name]}
                for name in names for kind in kinds
            ]  # fmt: skip
            (folder / f"{corpus}_{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    (folder / "conf").mkdir()
    base = (ROOT / "conf/demo/base_model.yaml").read_text("utf-8")
    base = re.sub(r"max_epoch: \d+", "max_epoch: 8", base)
    # Prompts last from one to twenty seconds: batches by length, or most of each would be padding.
    base = base.replace("batch_type: example\n  batch_size: 16", "batch_size: 6000\n  batch_size_sample_max: 64")
    (folder / "conf/base_model.yaml").write_text(base, "utf-8")
    for name, rate, epochs in (
        ("stage1_encoder_adapt", "5.0e-4", 3),
        ("stage2_adapter_align", "5.0e-4", 3),
        ("stage3_lora_domain", "1.0e-3", 3),
    ):
        (folder / f"conf/{name}.yaml").write_text(OVERLAY % (rate, epochs), "utf-8")
    python = sys.executable
    for split in ("train", "dev"):
        run(python, "local/prepare_training_data.py", "filter", "--input", folder / f"raw_{split}.jsonl",
            "--output", folder / f"base_{split}.jsonl", "--split", split, "--max_reject_ratio", "0.2")  # fmt: skip
    run(python, "demo/train_base.py", "--train", folder / "base_train.jsonl", "--dev", folder / "base_dev.jsonl",
        "--output", folder / "base_model", "--conf", folder / "conf/base_model.yaml")  # fmt: skip
    options = {
        "exp_output": folder / "exp", "model": folder / "base_model", "max_reject_ratio": "0.2",
        "stage_overlay_dir": folder / "conf", "alphas": "0.5 1.0", "python": python, "wideband_replay": "0.2",
        **{f"raw_16k_{split}": folder / f"raw_{split}.jsonl" for split in ("train", "dev", "test")},
        **{f"real_8k_{split}": folder / f"real_{split}.jsonl" for split in ("train", "dev", "test")},
    }  # fmt: skip
    run("bash", "run_experiment.sh", "-1", "5", *[part for name in options for part in (f"--{name}", options[name])])
    return folder


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


@pytest.mark.parametrize(("corpus", "data"), [("raw", "simulated_8k_telephone"), ("real", "real_8k_telephone")])
def test_every_prompt_is_formatted_or_rejected_with_a_reason(experiment, corpus, data):
    for split in ("train", "dev", "test"):
        given = sorted(row["key"] for row in rows(experiment / f"{corpus}_{split}.jsonl"))
        rejected = rows(experiment / f"exp/data/{data}/rejected_{split}.jsonl")
        formatted = rows(experiment / f"exp/data/{data}/{split}_formatted.jsonl")
        assert sorted([row["key"] for row in formatted] + [row["key"] for row in rejected]) == given
        assert all(row["reason"] for row in rejected)


def test_a_prompt_that_only_describes_a_tone_is_an_annotation_error(experiment):
    tones = {name for name, text in transcripts().items() if re.fullmatch(r"\[[^\]]*\]|\([^)]*\)", text)}
    assert tones
    seen = set()
    for split in ("train", "dev", "test"):
        for row in rows(experiment / f"exp/data/simulated_8k_telephone/rejected_{split}.jsonl"):
            if row["key"].removesuffix(".g722") in tones:
                assert row["reason"] == "annotation_error", row
                seen.add(row["key"].removesuffix(".g722"))
    assert seen == {name for name in tones if (SOUNDS / f"{name}.g722").is_file()}


@pytest.mark.parametrize("stage", ["stage1_encoder_adapt", "stage2_adapter_align", "stage3_lora_domain"])
def test_the_training_loss_falls(experiment, stage):
    checked = json.loads((experiment / f"exp/exp/8k_telephone/{stage}/run.json").read_text("utf-8"))["checked"]
    assert checked["loss_last_epoch"] < checked["loss_first_epoch"]


def test_every_model_is_scored_on_every_test_set(experiment):
    scores = json.loads((experiment / "exp/eval/summary.json").read_text("utf-8"))
    cells = {(row["model"], row["test_set"]) for row in scores}
    assert cells == {
        (model, test_set)
        for model in ("base", "stage1", "stage2", "stage3", "final")
        for test_set in ("simulated_test", "real_test", "wideband_test", "no_speech")
    }


def test_the_final_model_transcribes_a_call_with_stock_funasr_alone(experiment, tmp_path):
    samples, rate = audio.read(SOUNDS / "activated.gsm")
    assert rate == 8000
    soundfile.write(tmp_path / "call.wav", samples, rate)
    script = (
        "import sys\nfrom funasr import AutoModel\n"
        "model = AutoModel(model=sys.argv[1], disable_update=True, device='cpu', ctc_decoder=None)\n"
        "print('TEXT', repr(model.generate(sys.argv[2])[0]['text']))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", script, str(experiment / "exp/final_model"), str(tmp_path / "call.wav")],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert re.search(r"TEXT '.+'", done.stdout), done.stdout[-2000:]
