"""Train one stage with FunASR's own trainer, extended by local/nano, from short YAML overlays.

    python local/train.py --stage_conf conf/stage1_encoder_adapt.yaml --model_dir MODEL \
        --init_checkpoint MODEL/model.pt --train_list trainlist.jsonl --valid_list valid.jsonl --output_dir EXP

The effective configuration is the model folder's config.yaml, under the stage's YAML, under --overlay.
Writes checkpoints, averaged.pt, config.yaml, run.json and tensorboard/ into --output_dir, and goes on from the last
checkpoint there. `torchrun` starts one process a GPU with the same command line.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from common import ROOT, UserError, file_hash, run, write_json
from nano.config import effective, read_stage, stage_parser

# Batches of all shapes leave the GPU's memory in pieces that fit nothing; torch reads this when it first allocates.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def build_config(args: argparse.Namespace) -> dict[str, Any]:
    """The model folder's config.yaml, over it the stage's YAMLs, over all of it what the command line says."""
    import torch

    config = effective(read_stage([args.stage_conf, *args.overlay]), args.model_dir, args.frontend_fs)
    config |= {
        "init_param": str(args.init_checkpoint),
        "train_data_set_list": str(args.train_list),
        "valid_data_set_list": str(args.valid_list),
        "output_dir": str(args.output_dir),
        "seed": args.seed,
    }
    if not torch.cuda.is_available():
        config |= {"device": "cpu", "backend": "gloo", "ncpu": torch.get_num_threads()}
    return config


def describe_run(args: argparse.Namespace) -> dict[str, Any]:
    """What is needed to repeat the run: command, commit, versions, data."""
    versions = {}
    for package in ("funasr", "torch", "transformers", "kaldi-native-fbank", "torchaudio", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    lists = {"train": args.train_list, "valid": args.valid_list}
    return {
        "command": [sys.executable, *sys.argv],
        "commit": commit.stdout.strip() or None,
        "versions": versions,
        "seed": args.seed,
        "init_checkpoint": {"path": str(args.init_checkpoint), "sha256": file_hash(args.init_checkpoint)},
        "data": {name: {"path": str(path), "sha256": file_hash(path)} for name, path in lists.items()},
        "rows_per_epoch": sum(1 for _ in open(args.train_list, encoding="utf-8")),
        "processes": int(os.environ.get("WORLD_SIZE", 1)),
    }


def train(config: dict[str, Any]) -> None:
    """Hand the configuration to funasr.bin.train_ds.main with this recipe's classes in place of the stock ones."""
    import torch
    from funasr.bin import train_ds

    import nano.dataset
    import nano.model  # noqa: F401  registers the model
    from nano.trainer import Trainer
    from telephone.channel import simulate

    nano.dataset.FunASR.channel = staticmethod(simulate)
    Trainer.initial = config["init_param"]
    Trainer.lora = dict(config["llm_conf"]["lora_conf"]) if config["llm_conf"].get("use_lora") else None
    train_ds.Trainer = Trainer
    # The Trainer averages when it closes; upstream's function would average frozen tensors too.
    train_ds.average_checkpoints = lambda *_args, **_kwargs: None
    if not torch.cuda.is_available():
        torch.cuda.set_device = lambda _device: None  # main() calls it for DDP on any machine
    if int(os.environ.get("RANK", 0)) > 0:
        # Upstream opens a writer in every process, and tensorboardX names files by second and host: two of one machine
        # would write into one. Without the package upstream does without.
        sys.modules["tensorboardX"] = None
    try:
        train_ds.main(**config)
    finally:
        # Upstream does not. The last curves wait in memory; of a training that failed before it logged a step, Python
        # 3.12 would show a traceback, for at its end no thread can be started.
        if Trainer.curves:
            Trainer.curves.close()


def get_args() -> argparse.Namespace:
    parser = stage_parser(__doc__)
    parser.add_argument("--seed", type=int, default=0, help="Seed of new weights, dropout and SpecAugment.")
    return parser.parse_args()


def main() -> None:
    args = get_args()
    for path, what in [(args.init_checkpoint, "checkpoint"), (args.train_list, "list"), (args.valid_list, "list")]:
        if not path.is_file():
            raise UserError(f"{what} {path} does not exist; run the stage before this one, or correct the path", code=2)
    config = build_config(args)
    if config["train_conf"].get("use_deepspeed") and "RANK" not in os.environ:
        raise UserError("use_deepspeed is for several processes, NGPU=2 or more; set it to false for one", code=2)
    if int(os.environ.get("RANK", 0)) == 0:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        write_json(args.output_dir / "run.json", describe_run(args))
    logging.info("configuration: %s", json.dumps(config, ensure_ascii=False))
    train(config)


if __name__ == "__main__":
    run(main)
