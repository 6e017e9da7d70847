"""What several test files need: a miniature model, rows of noise, a helper's command line and a stage's training."""

import argparse
import contextlib
import io
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

import audio
from common import run, write_json, write_jsonl
from miniature import build_folder

ROOT = Path(__file__).resolve().parent.parent
ALPHABET = "一二三四五六七八九零元月号订单"
SMALL = {
    "encoder_dim": 32, "encoder_blocks": 1, "encoder_heads": 2, "encoder_ffn": 32, "adaptor_ffn": 32, "ctc_ffn": 32,
    "llm_dim": 32, "llm_heads": 2, "llm_kv_heads": 1, "llm_head_dim": 16, "llm_ffn": 48,
}  # fmt: skip
LOG_LINE = (
    "10:00:00 (trainer_ds.py:953) INFO: {tag}, rank: {rank}, epoch: {epoch}/10, data_slice: 0/1, "
    "step_in_slice: {step}/80, step_in_epoch: {step}, total step: {total}, (loss_avg_rank: 9.200), "
    "(loss_avg_slice: {loss}), (ppl_avg_slice: 1.000e+00), (acc_avg_slice: {acc}), (lr: 1.000e-04), "
    "[('loss_llm', 1.088), ('acc', 0.637)], {{'data_load': '0.001', 'total_time': '{seconds}'}}, GPU, memory: "
    "usage: 0.000 GB, peak: {gpu} GB, cache: 0.000 GB, cache_peak: 0.000 GB\n"
)
STAGES = ["stage1_encoder_adapt", "stage2_adapter_align", "stage3_lora_domain"]
QUICK = {
    "optim_conf": {"lr": 0.003}, "scheduler_conf": {"warmup_steps": 2},
    "train_conf": {"max_epoch": 3, "keep_nbest_models": 2, "avg_nbest_model": 2, "log_interval": 2},
    "dataset_conf": {"batch_type": "example", "batch_size": 5, "num_workers": 0},
}  # fmt: skip


def helper(name: str, *arguments, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """A helper of local/ as a user runs it."""
    command = [sys.executable, str(ROOT / "local" / name), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)


def helper_here(main: Callable[[], None], *arguments) -> SimpleNamespace:
    """The same in this process, which has imported FunASR already: that takes longer than most of what is tested."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch, logged(logging.StreamHandler(err)), \
            contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [main.__module__, *map(str, arguments)])
        try:
            run(main)
        except SystemExit as end:
            code = end.code
    return SimpleNamespace(returncode=code, stdout=out.getvalue(), stderr=err.getvalue())


def make_model(folder: Path) -> Path:
    return build_folder(folder, ALPHABET, SMALL, seed=1)


def formatted(key: str, path: Path, samples: np.ndarray, text: str, fs: int = 16000, prompt="语音转写：") -> dict:
    """A row as stage 0 writes it, of samples that go to the path."""
    audio.write(path, samples.astype(np.float32), fs)
    user = f"{prompt}<|startofspeech|>!{path}<|endofspeech|>"
    messages = [("system", "You are a helpful assistant."), ("user", user), ("assistant", text)]
    return {
        "key": key, "messages": [{"role": role, "content": content} for role, content in messages],
        "speech_length": 100 * len(samples) // fs, "text_length": len(text),
    }  # fmt: skip


def make_rows(folder: Path, count: int = 12) -> list[dict]:
    """Formatted rows of noise of 1 to 2 seconds."""
    rng = np.random.default_rng(0)
    made = []
    for number in range(count):
        samples = 0.1 * rng.standard_normal(16000 + 1600 * number)
        text = "".join(rng.choice(list(ALPHABET), 3 + number % 4))
        made.append(formatted(f"u{number}", folder / f"utterance {number}.wav", samples, text))
    return made


def arguments(folder: Path, model_dir: Path, rows: list[dict], stage: str = STAGES[0], overlay: dict | None = None,
              **changed) -> argparse.Namespace:  # fmt: skip
    """What local/train.py and local/check_training.py get on their command lines; lists and overlay are written."""
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "list.jsonl", rows)
    (folder / "overlay.yaml").write_text(yaml.safe_dump(overlay or {}))
    given = {
        "stage_conf": ROOT / "conf" / f"{stage}.yaml", "overlay": [folder / "overlay.yaml"] if overlay else [],
        "model_dir": model_dir, "init_checkpoint": model_dir / "model.pt", "train_list": folder / "list.jsonl",
        "valid_list": folder / "list.jsonl", "output_dir": folder / stage, "frontend_fs": 16000, "seed": 0,
    }  # fmt: skip
    return argparse.Namespace(**given | changed)


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What `make tensorboard` draws of a stage: (step, value) by the name of the curve."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


@contextlib.contextmanager
def logged(handler: logging.Handler):
    """Everything logged goes there too, as run_experiment.sh has it."""
    root, level = logging.getLogger(), logging.getLogger().level
    root.addHandler(handler)
    root.setLevel(logging.INFO)
    try:
        yield
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()


def train_here(args: argparse.Namespace) -> None:
    """local/train.py's work, in this process, with its log in train.log; what it sets is put back for other tests."""
    from funasr.bin import train_ds

    import nano.dataset
    import train

    changed = [(nano.dataset.FunASR, "channel"), (train_ds, "Trainer"), (train_ds, "average_checkpoints"),
               (torch.cuda, "set_device")]  # fmt: skip
    args.output_dir.mkdir(parents=True, exist_ok=True)
    write_json(args.output_dir / "run.json", train.describe_run(args))
    log = logging.FileHandler(args.output_dir / "train.log", encoding="utf-8")
    with logged(log), pytest.MonkeyPatch.context() as patch:
        for owner, name in changed:
            patch.setattr(owner, name, getattr(owner, name))
        train.train(train.build_config(args))


def log_line(tag="train", rank=0, epoch=0, step=20, loss=2.5, acc=0.5, seconds=0.5, gpu=0.0) -> str:
    """A step as FunASR's trainer logs it."""
    return LOG_LINE.format(**locals(), total=80 * epoch + step)
