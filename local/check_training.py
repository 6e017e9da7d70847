"""Refuse a training run that would go wrong without a word; fail one that did.

    python local/check_training.py before --stage_conf conf/stage1_encoder_adapt.yaml --model_dir MODEL \
        --init_checkpoint CKPT --train_list trainlist.jsonl --valid_list valid.jsonl --output_dir EXP
    python local/check_training.py after  (the same arguments)

before: every YAML key is read by something, every row would be used, its audio is there at the frontend's rate.
after: frozen tensors are bit-identical to the start, every trained module moved, the loss is finite and fell.
Exit 1 with what is wrong and what to do. The traps are FunASR 1.4.16's, which goes on without a word.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import json
import logging
import math
import re
import shutil
from pathlib import Path
from typing import Any

import soundfile
import yaml

from common import UserError, progress, read_jsonl, run, write_json

# Keys that FunASR 1.4.16 or local/nano reads and the released config.yaml may not have.
MORE_KEYS = {
    "specaug", "specaug_conf.apply_time_warp", "specaug_conf.apply_freq_mask", "specaug_conf.freq_mask_width_range",
    "specaug_conf.num_freq_mask", "specaug_conf.lfr_rate", "specaug_conf.apply_time_mask",
    "specaug_conf.time_mask_width_range", "specaug_conf.num_time_mask", "optim_conf.betas", "optim_conf.weight_decay",
    "ctc_weight", "detach_ctc_decoder", "llm_conf.use_lora", "llm_conf.lora_conf.r", "llm_conf.lora_conf.lora_alpha",
    "llm_conf.lora_conf.lora_dropout", "llm_conf.lora_conf.target_modules", "train_conf.early_stopping_patience",
    "train_conf.avg_keep_nbest_models_type", "train_conf.keep_nbest_models", "train_conf.use_bf16",
    "train_conf.use_deepspeed", "dataset_conf.cache_gib", "dataset_conf.prompt_classes", "dataset_conf.data_split_num",
    "ctc_decoder_conf.freeze", "audio_adaptor_conf.freeze", "audio_encoder_conf.freeze", "scheduler_conf.warmup_steps",
}  # fmt: skip
# The released config has them; upstream accepts and ignores them.
DEAD_KEYS = {"lsm_weight", "length_normalized_loss", "audio_encoder_conf.freeze_layer_num", "dataset_conf.retry"}
LOSS = re.compile(r"train, rank: 0, epoch: (\d+)/.*?\(loss_avg_slice: ([^)]+)\)")


def flat_keys(config: dict[str, Any], prefix: str = "") -> set[str]:
    """Dotted names of a nested configuration's leaves: {"a": {"b": 1}} -> {"a.b"}."""
    keys = set()
    for name, value in config.items():
        keys |= flat_keys(value, f"{prefix}{name}.") if isinstance(value, dict) and value else {prefix + name}
    return keys


def check_keys(stage_confs: list[Path], model_dir: Path) -> dict[str, Any]:
    """Every key of the stage's YAMLs is read by something; return the merged configuration. UserError, code 2."""
    from omegaconf import OmegaConf

    model_config = OmegaConf.to_container(OmegaConf.load(model_dir / "config.yaml"))
    known = (flat_keys(model_config) | MORE_KEYS) - DEAD_KEYS
    layers = [model_config]
    for path in stage_confs:
        if not path.is_file():
            raise UserError(f"{path} does not exist; give the stage's YAML", code=2)
        try:
            layer = OmegaConf.to_container(OmegaConf.load(path))
        except yaml.YAMLError as error:
            raise UserError(f"{path}: not YAML: {error}", code=2) from error
        for key in sorted(flat_keys(layer) - known):
            near = difflib.get_close_matches(key, known, 1, 0)
            raise UserError(f"{path}: nothing reads the key {key}; the nearest that is read is {near[0]}", code=2)
        layers.append(layer)
    return OmegaConf.to_container(OmegaConf.merge(*layers), resolve=False)


def check_before(args: argparse.Namespace) -> None:
    """Everything that can be known before the model is built. Raises UserError for the first thing that is wrong."""
    config = check_keys([args.stage_conf, *args.overlay], args.model_dir)
    dataset = config["dataset_conf"]
    if dataset.get("data_split_num", 1) != 1:
        raise UserError(f"data_split_num {dataset['data_split_num']}: an epoch would be that many epochs; set it to 1")
    if dataset.get("prompt_classes"):
        raise UserError("dataset_conf.prompt_classes adds a context to prompts that decoding lacks; set it to null")
    if not any(importlib.util.find_spec(name) for name in ("kaldi_native_fbank", "torchaudio")):
        raise UserError("no fbank library: every utterance would fail to load; pip install kaldi-native-fbank")
    most = {name: dataset.get(name) for name in ("max_token_length", "max_source_length", "min_source_length")}
    for path in (args.train_list, args.valid_list):
        check_rows(path, most, args.frontend_fs)
    need = 4 * args.init_checkpoint.stat().st_size * (1 + config["train_conf"].get("keep_nbest_models", 5))
    free = shutil.disk_usage(args.output_dir.parent if args.output_dir.parent.exists() else ".").free
    if free < need:
        raise UserError(f"{free / 2**30:.1f} GiB free, checkpoints take {need / 2**30:.1f}; lower keep_nbest_models")


def check_rows(path: Path, most: dict[str, int], fs: int) -> None:
    """FunASR would use every row of the list, and its audio is there, mono, at `fs`."""
    rows, keys = list(read_jsonl(path)), set()
    if not rows:
        raise UserError(f"{path} is empty: training would run no batch and succeed; see the rejected rows of stage 0")
    for row in progress(rows, len(rows), f"checking {path.name}"):
        key, speech, text = row["key"], row["speech_length"], row["text_length"]
        if key in keys:
            raise UserError(f"{path}: key {key} twice")
        keys.add(key)
        if text < 1 or not (most["min_source_length"] or 10) <= speech <= (most["max_source_length"] or 8000):
            raise UserError(f"{path}: {key} has {speech} frames and {text} tokens; upstream would skip it; run stage 0")
        if speech + text > most["max_token_length"]:
            raise UserError(f"{path}: {key} has {speech + text} frames and tokens, the sampler would skip it; raise "
                            f"dataset_conf.max_token_length above {most['max_token_length']}")  # fmt: skip
        channel = row.get("channel")
        if isinstance(channel, dict) and "online" in channel and not Path(channel["online"]).is_file():
            raise UserError(f"{path}: {key}: no channel settings {channel['online']}; run stage 0 again")
        audio = re.search(r"<\|startofspeech\|>!(.*?)<\|endofspeech\|>", row["messages"][1]["content"]).group(1)
        try:
            info = soundfile.info(audio)
        except (soundfile.LibsndfileError, OSError) as error:
            raise UserError(f"{path}: {key}: cannot read {audio}; run stage 0 again") from error
        if info.samplerate != fs or info.channels != 1:
            raise UserError(f"{path}: {key}: {info.samplerate} Hz, {info.channels} channels, not {fs} Hz mono; "
                            "run stage 0 with the same FRONTEND_FS")  # fmt: skip


def check_after(args: argparse.Namespace) -> dict[str, Any]:
    """What training changed is what it should change; return figures for run.json. Raises UserError otherwise."""
    import torch

    parameters = json.loads((args.output_dir / "parameters.json").read_text(encoding="utf-8"))
    trained = {module for module, count in parameters.items() if count["trainable"]}
    averaged = torch.load(args.output_dir / "averaged.pt", map_location="cpu", mmap=True)["state_dict"]
    start = torch.load(args.init_checkpoint, map_location="cpu", mmap=True)
    start = start.get("state_dict", start)
    moved: dict[str, list[int]] = {module: [0, 0] for module in trained}
    for name, tensor in averaged.items():
        module = "lora" if "lora_" in name else name.split(".")[0]
        same = name in start and torch.equal(tensor, start[name].to(tensor.dtype))
        if module in trained:
            moved[module][0] += 1
            moved[module][1] += not same
        elif not same and name in start:
            raise UserError(f"{name} is frozen but changed in averaged.pt; do not use this checkpoint")
    for module, (tensors, changed) in moved.items():
        if not changed:
            raise UserError(f"{module}: none of its {tensors} tensors moved in training; is its loss in train.log?")
    losses: dict[int, float] = {}
    for epoch, loss in LOSS.findall((args.output_dir / "train.log").read_text(encoding="utf-8", errors="replace")):
        losses[int(epoch)] = float(loss)
    if not losses or not all(math.isfinite(loss) for loss in losses.values()):
        raise UserError(f"no finite training loss in {args.output_dir}/train.log; lower optim_conf.lr or log_interval")
    first, last = losses[min(losses)], losses[max(losses)]
    if len(losses) > 1 and last >= first:
        raise UserError(f"the training loss did not fall: {first:.3f} -> {last:.3f}; check optim_conf.lr and the data")
    fallen = {"loss_first_epoch": first, "loss_last_epoch": last, "loss_fallen": 1 - last / first}
    return {"moved_tensors": {m: f"{c} of {n}" for m, (n, c) in moved.items()}, **fallen}


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("when", choices=("before", "after"), help="Check what is about to be, or has been, trained.")
    parser.add_argument("--stage_conf", type=Path, required=True, help="The stage's YAML.")
    parser.add_argument("--overlay", type=Path, action="append", default=[], help="YAML laid over it.")
    parser.add_argument("--model_dir", type=Path, required=True, help="Model folder with config.yaml.")
    parser.add_argument("--init_checkpoint", type=Path, required=True, help="Weights training starts from.")
    parser.add_argument("--train_list", type=Path, required=True, help="Formatted JSONL to train on.")
    parser.add_argument("--valid_list", type=Path, required=True, help="Formatted JSONL that ranks checkpoints.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Experiment folder of the stage.")
    parser.add_argument("--frontend_fs", type=int, default=16000, help="Sampling rate of audio and features, Hz.")
    return parser.parse_args()


def main() -> None:
    args = get_args()
    if args.when == "before":
        check_before(args)
        logging.info("%s: every key is read, every row would be used", args.stage_conf.name)
        return
    figures = check_after(args)
    path = args.output_dir / "run.json"
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"checked": figures})
    logging.info("%s: %s", args.output_dir.name, figures)


if __name__ == "__main__":
    run(main)
