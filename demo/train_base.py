"""Train the demo's base model: a miniature Fun-ASR-Nano, from random weights, on wideband speech.

    python demo/train_base.py --train base_train.jsonl --dev wideband_dev.jsonl --output base_model

Builds a model folder of the released layout (demo/miniature.py) over the characters of --train and --alphabet,
formats the rows with prepare_training_data.py and trains every module with train.py and conf/demo/base_model.yaml.
The folder takes its name when it is trained; a rerun with the same data, seed and YAMLs does nothing.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "local"))

from common import UserError, file_hash, read_jsonl, run, write_json  # noqa: E402


def helper(name: str, *arguments: str | Path) -> None:
    """Run another helper of local/; raise UserError when it fails (it has said why)."""
    command = [sys.executable, str(ROOT / "local" / name), *map(str, arguments)]
    if subprocess.run(command, check=False).returncode:
        raise UserError(f"{name} failed; see the lines above")


def train_base(train: Path, dev: Path, extra: list[Path], output: Path, conf: Path, seed: int) -> None:
    """Build and train the model folder `output`, which takes its name with its marker, base_model.json, in it."""
    sizes = ROOT / "conf/demo/miniature.yaml"
    inputs = {str(path): file_hash(path) for path in [train, dev, *extra, conf, sizes]} | {"seed": seed}
    marker = output / "base_model.json"
    if marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) == inputs:
        logging.info("%s is trained already: nothing to do", output)
        return
    from miniature import build_folder  # FunASR takes seconds to import
    from nano.weights import save_atomically

    work = output.with_name(output.name + ".training")
    state = work / "inputs.json"
    if not (state.is_file() and json.loads(state.read_text(encoding="utf-8")) == inputs):
        shutil.rmtree(work, ignore_errors=True)
        alphabet = {letter for path in [train, *extra] for row in read_jsonl(path) for letter in row["target"]}
        build_folder(work / "model", "".join(sorted(alphabet)), seed=seed)
        for name, path in (("train", train), ("dev", dev)):
            helper(
                "prepare_training_data.py", "convert", "--input", path, "--output", work / f"{name}.jsonl",
                "--output_audio_dir", work / "audio", "--tokenizer", work / "model" / "Qwen3-0.6B",
                "--text_style", "spoken",
            )  # fmt: skip
        write_json(state, inputs)
    helper(
        "train.py", "--stage_conf", conf,
        "--model_dir", work / "model", "--init_checkpoint", work / "model" / "model.pt",
        "--train_list", work / "train.jsonl", "--valid_list", work / "dev.jsonl",
        "--output_dir", work / "exp", "--seed", seed,
    )  # fmt: skip
    import torch

    trained = torch.load(work / "exp" / "averaged.pt", map_location="cpu")["state_dict"]
    save_atomically(trained, work / "model" / "model.pt")
    logs = shutil.ignore_patterns("*.pt*")
    shutil.copytree(work / "exp", work / "model" / "training", ignore=logs, dirs_exist_ok=True)
    write_json(work / "model" / marker.name, inputs)
    shutil.rmtree(output, ignore_errors=True)
    os.replace(work / "model", output)
    shutil.rmtree(work)


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, required=True, help="Wideband JSONL to train on.")
    parser.add_argument("--dev", type=Path, required=True, help="Wideband JSONL that ranks checkpoints.")
    parser.add_argument("--alphabet", type=Path, nargs="*", default=[], help="More JSONL whose characters to include.")
    parser.add_argument("--output", type=Path, required=True, help="Model folder to write.")
    parser.add_argument("--conf", type=Path, default=ROOT / "conf/demo/base_model.yaml", help="How it is trained.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of initial weights, order and dropout.")
    return parser.parse_args()


def main() -> None:
    args = get_args()
    train_base(args.train, args.dev, args.alphabet, args.output, args.conf, args.seed)


if __name__ == "__main__":
    run(main)
