"""Refuse a training run that would go wrong without a word; fail one that did.

    python local/check_training.py before --stage_conf conf/stage1_encoder_adapt.yaml --model_dir MODEL \
        --init_checkpoint CKPT --train_list trainlist.jsonl --valid_list valid.jsonl --output_dir EXP
    python local/check_training.py after  (the same arguments)

before: every YAML key is read by something, every tensor of the model is in the checkpoint, every row would be used,
its audio is there at the frontend's rate, and disk and GPU have room.
after: frozen tensors are bit-identical to the start, every trained module moved and is saved, every row was used once
an epoch, the loss is finite and fell.
Exit 1 with what is wrong and what to do. docs/traps.md lists what FunASR 1.4.16 does instead, without a word.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import soundfile
import yaml

from common import UserError, progress, read_jsonl, run, write_json

if TYPE_CHECKING:
    import torch

AUDIO = re.compile(r"<\|startofspeech\|>!(.*?)<\|endofspeech\|>")


def check_before(args: argparse.Namespace) -> None:
    """Everything that can be known before training. Raises UserError for the first thing that is wrong."""
    from nano.config import build_on_meta, effective, read_stage

    stage = read_stage([args.stage_conf, *args.overlay])
    if not any(importlib.util.find_spec(name) for name in ("kaldi_native_fbank", "torchaudio")):
        raise UserError("no fbank library: every utterance would fail to load; pip install kaldi-native-fbank")
    config = effective(stage, args.model_dir, args.frontend_fs)
    check_config(config, args.stage_conf)
    model = build_on_meta(config)
    check_checkpoint(model, args.init_checkpoint, config)
    check_rate(model, args.init_checkpoint, args.frontend_fs)
    lists = (args.train_list, args.valid_list)
    longest = max(check_rows(path, config["dataset_conf"], args.frontend_fs) for path in lists)
    check_room(model, config, args.output_dir, longest)


def check_config(config: dict[str, Any], path: Path) -> None:
    """Settings that FunASR takes and then does something else with."""
    dataset, ctc = config["dataset_conf"], config.get("ctc_weight", 0.3)
    if dataset.get("data_split_num", 1) != 1:
        raise UserError(f"data_split_num {dataset['data_split_num']}: an epoch would be that many epochs; set it to 1")
    if dataset.get("prompt_classes"):
        raise UserError("dataset_conf.prompt_classes adds a context to prompts that decoding lacks; set it to null")
    if ctc and not config.get("ctc_decoder"):
        raise UserError(f"{path}: ctc_weight {ctc}, but the model folder has no ctc_decoder; set ctc_weight to 0")
    frozen = config["ctc_decoder_conf"].get("freeze") if config.get("ctc_decoder") else True
    detached = config.get("detach_ctc_decoder", True) or config["audio_encoder_conf"].get("freeze", True)
    if ctc and frozen and detached:
        raise UserError(f"{path}: ctc_weight {ctc} does nothing: the CTC branch is frozen and its loss does not reach "
                        "the encoder; set ctc_weight to 0, or detach_ctc_decoder to false")  # fmt: skip


def check_checkpoint(model: torch.nn.Module, path: Path, config: dict[str, Any]) -> None:
    """Every tensor of the model is in the checkpoint, or is new LoRA or an untrained CTC branch, which is said."""
    from nano import weights

    state, lora = weights.load(path)
    missing, misshapen = weights.misfits(model, state)
    if misshapen:
        name, mine = misshapen[0], model.state_dict()[misshapen[0]]
        raise UserError(f"{path}: {len(misshapen)} tensors of another shape, first {name} {tuple(state[name].shape)}, "
                        f"the model's is {tuple(mine.shape)}; upstream would leave them random")  # fmt: skip
    names = list(model.state_dict())
    parts = {
        "LoRA": [name for name in names if name.endswith((".lora_A", ".lora_B"))],
        "CTC": [name for name in names if name.startswith(weights.CTC_PREFIXES)],
    }
    for part, wanted in parts.items():
        absent = [name for name in wanted if name in missing]
        missing = [name for name in missing if name not in wanted]
        if absent and len(absent) < len(wanted):
            raise UserError(f"{path} lacks {len(absent)} of {len(wanted)} {part} tensors, first {absent[0]}: damaged")
        if absent and part == "LoRA":
            logging.info("LoRA: not in the checkpoint, starts at zero effect")
        elif absent:
            trained = any(p.requires_grad for p in model.ctc.parameters())
            then = "trained from random weights" if trained else "left out, and so is its loss"
            logging.warning("CTC: the checkpoint has no weights of it; the branch is %s", then)
    if missing:
        raise UserError(f"{path} lacks {len(missing)} tensors, first {missing[0]}: upstream would train them from "
                        "random weights; give a checkpoint of this model")  # fmt: skip
    if lora and not parts["LoRA"]:
        raise UserError(f"{path} has LoRA, which this stage would drop; fold it first: "
                        "local/final_model.py mix --alpha 1")  # fmt: skip
    alpha = config["llm_conf"].get("lora_conf", {}).get("lora_alpha", 32)
    if lora and lora["lora_alpha"] != alpha:
        raise UserError(f"{path}: lora_alpha {lora['lora_alpha']}, the stage says {alpha}: it would be scaled anew")


def check_rate(model: torch.nn.Module, checkpoint: Path, fs: int) -> None:
    """The features are at the rate the checkpoint was trained with; only a stage that trains the encoder may choose."""
    beside = checkpoint.parent / "config.yaml"
    if not beside.is_file():
        logging.warning("no config.yaml beside %s: the rate it was trained with is not known", checkpoint)
        return
    was = yaml.safe_load(beside.read_text(encoding="utf-8")).get("frontend_conf", {}).get("fs", 16000)
    if was == fs:
        return
    frozen = not any(p.requires_grad for p in model.audio_encoder.parameters())
    if frozen or (checkpoint.parent / "averaged.pt").is_file():
        raise UserError(f"frontend fs {fs}, but {checkpoint} was trained at {was} Hz; the rate is chosen at stage 1")
    logging.warning("frontend fs %d, the encoder knows %d Hz: an experiment; stages 2-5 must do the same", fs, was)


def check_rows(path: Path, dataset: dict[str, Any], fs: int) -> int:
    """FunASR would use every row of the list, its audio is there, mono, at `fs`; return the frames of the longest."""
    least, most = dataset.get("min_source_length", 10), dataset.get("max_source_length", 8000)
    text_most, both_most = dataset.get("max_target_length", 2048), dataset.get("max_token_length") or 2048
    rows, keys, longest = list(read_jsonl(path)), set(), 0
    if not rows:
        raise UserError(f"{path} is empty: training would run no batch and succeed; see the rejected rows of stage 0")
    for number, row in enumerate(progress(rows, len(rows), f"checking {path.name}"), 1):
        try:
            key, speech, text = row["key"], row["speech_length"], row["text_length"]
            audio, said = AUDIO.search(row["messages"][1]["content"]).group(1), row["messages"][2]["content"]
        except (KeyError, IndexError, AttributeError, TypeError) as error:
            raise UserError(f"{path}:{number}: no formatted row (key, messages, lengths); run stage 0") from error
        if key in keys:
            raise UserError(f"{path}: key {key} twice")
        keys.add(key)
        longest = max(longest, speech)
        if not said or not 1 <= text <= text_most or not least <= speech <= most:
            raise UserError(f"{path}: {key} has {speech} frames and {text} tokens; upstream would skip it ({least} to "
                            f"{most} frames, 1 to {text_most} tokens are used); run stage 0")  # fmt: skip
        if speech + text > both_most:
            raise UserError(f"{path}: {key} has {speech + text} frames and tokens, the sampler would skip it; raise "
                            f"dataset_conf.max_token_length above {both_most}")  # fmt: skip
        channel = row.get("channel")
        if isinstance(channel, dict) and "online" in channel and not Path(channel["online"]).is_file():
            raise UserError(f"{path}: {key}: no channel settings {channel['online']}; run stage 0 again")
        try:
            info = soundfile.info(audio)
        except (soundfile.LibsndfileError, OSError) as error:
            raise UserError(f"{path}: {key}: cannot read {audio}; run stage 0 again") from error
        if info.samplerate != fs or info.channels != 1:
            raise UserError(f"{path}: {key}: {info.samplerate} Hz, {info.channels} channels, not {fs} Hz mono; "
                            "run stage 0 with the same FRONTEND_FS")  # fmt: skip
    return longest


def check_room(model: torch.nn.Module, config: dict[str, Any], output_dir: Path, longest: int) -> None:
    """Disk for the checkpoints and memory of the GPU, where there is one, estimated from the model's own shapes."""
    import torch

    from nano.batch_size import gpu_bytes
    from nano.weights import checkpoint_bytes

    train, dataset = config["train_conf"], config["dataset_conf"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    need = checkpoint_bytes(model, train.get("keep_nbest_models", 500))
    need -= sum(file.stat().st_size for file in output_dir.glob("model.pt.ep*"))
    folder = next(parent for parent in (output_dir, *output_dir.absolute().parents) if parent.exists())
    if (free := shutil.disk_usage(folder).free) < need:
        raise UserError(f"{folder}: {free / 2**30:.1f} GiB free, the checkpoints take {need / 2**30:.1f}; lower "
                        "train_conf.keep_nbest_models or free space")  # fmt: skip
    batch = dataset["batch_size"] * (longest if dataset.get("batch_type") == "example" else 1)
    memory = gpu_bytes(model, config, max(batch, longest), longest)
    logging.info("%.2f M parameters trained; checkpoints take %.2f GiB at most; about %.1f GiB of GPU memory",
                 trained / 1e6, need / 2**30, memory / 2**30)  # fmt: skip
    if torch.cuda.is_available() and memory > (there := torch.cuda.get_device_properties(0).total_memory):
        raise UserError(f"about {memory / 2**30:.0f} GiB of GPU memory needed, {there / 2**30:.0f} there; lower "
                        f"dataset_conf.batch_size ({dataset['batch_size']})")  # fmt: skip


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
        logging.info("%s: every key is read, every tensor is there, every row would be used", args.stage_conf.name)
        return
    from nano.postflight import check_after

    figures = check_after(args.output_dir, args.init_checkpoint, args.train_list)
    path = args.output_dir / "run.json"
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"checked": figures})
    logging.info("%s: %s", args.output_dir.name, figures)


if __name__ == "__main__":
    run(main)
