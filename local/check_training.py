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

import argparse
import json
import logging
import math
import os
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import soundfile
import torch

from common import UserError, progress, read_jsonl, read_yaml, run, write_json
from corpus import parse_row
from nano import weights
from nano.config import batch_frames, build_on_meta, check_settings, effective, read_stage, stage_parser
from nano.train_log import read_log

FRAME_BYTES = 560 * 4 / 6  # of features, a 10 ms frame: LFR joins seven frames of 80 numbers, every sixth time
LOSS_TARGET = 0.3  # the plan's: reported, no reason to fail
# DeepSpeed's names for what a stage's YAML says (batch_size, accum_grad, grad_clip, optim, scheduler, use_bf16).
OF_THE_YAML = {
    "train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping",
    "optimizer", "scheduler", "amp", "fp16", "bf16", "torch_autocast",
}  # fmt: skip
ONE_EPOCH = 1.1  # the first logged steps of a single epoch have other rows than the rest: a rise below this may be that


def check_before(args: argparse.Namespace) -> None:
    """Everything that can be known before training. Raises UserError for the first thing that is wrong."""
    config = effective(read_stage([args.stage_conf, *args.overlay]), args.model_dir, args.frontend_fs)
    check_settings(config, args.stage_conf)
    check_ctc(config, args.stage_conf)
    check_processes(config["train_conf"], args.stage_conf)
    model = build_on_meta(config)
    check_trained(model, config["llm_conf"], args.stage_conf)
    check_checkpoint(model, args.init_checkpoint, config)
    check_rate(model, args.init_checkpoint, args.frontend_fs)
    lists = (args.train_list, args.valid_list)
    longest, frames = map(max, zip(*(check_rows(path, config["dataset_conf"], args.frontend_fs) for path in lists),
                                   strict=True))  # fmt: skip
    check_room(model, config, args.output_dir, longest)
    check_shared_memory(config["dataset_conf"], longest, frames)


def check_ctc(config: dict[str, Any], path: Path) -> None:
    """A CTC loss has a branch to compute it and something to train, and a branch that is trained has a loss."""
    weight = config.get("ctc_weight", 0.3)
    if weight and not config.get("ctc_decoder"):
        raise UserError(f"{path}: ctc_weight {weight}, but the model folder has no ctc_decoder; set ctc_weight to 0")
    if not weight and config.get("ctc_decoder") and not config["ctc_decoder_conf"].get("freeze"):
        raise UserError(f"{path}: ctc_weight {weight}, and the CTC branch is to be trained: nothing would move it; set "
                        "ctc_decoder_conf.freeze to true, or give it a weight")  # fmt: skip
    detached = config.get("detach_ctc_decoder", True) or config["audio_encoder_conf"].get("freeze", True)
    if weight and detached and config["ctc_decoder_conf"].get("freeze"):
        raise UserError(f"{path}: ctc_weight {weight} does nothing: the CTC branch is frozen and its loss does not "
                        "reach the encoder; set ctc_weight to 0, or detach_ctc_decoder to false")  # fmt: skip


def check_trained(model: torch.nn.Module, llm: dict[str, Any], path: Path) -> None:
    """Something is trained, and LoRA has found the layers that it is for."""
    if llm.get("use_lora"):
        there = {part for name, layer in model.named_modules() if hasattr(layer, "lora_A") for part in name.split(".")}
        for name in llm.get("lora_conf", {}).get("target_modules", []):
            if name not in there:
                raise UserError(f"{path}: target_modules: the LLM has no layer {name}; Qwen3's are q_proj, k_proj, "
                                "v_proj, o_proj, gate_proj, up_proj, down_proj", code=2)  # fmt: skip
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError(f"{path}: nothing would be trained; set freeze of a part to false, or use_lora to true", code=2)


def check_processes(train: dict[str, Any], path: Path) -> None:
    """Each process of this machine has a GPU, where it has any, and what use_deepspeed needs is there."""
    asked, there = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if 0 < there < asked:
        raise UserError(f"NGPU is {asked}, and torch sees {there} here; leave NGPU out to train on all of them", code=2)
    if not train.get("use_deepspeed"):
        return
    if not find_spec("deepspeed"):
        raise UserError(f"{path}: use_deepspeed, but deepspeed is not installed; .venv/bin/pip install deepspeed")
    settings = Path(train.get("deepspeed_config") or "")
    try:
        given = json.loads(settings.read_text(encoding="utf-8"))
        stage = given.get("zero_optimization", {}).get("stage", 0)
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: train_conf.deepspeed_config '{settings}' cannot be read, or is not DeepSpeed's JSON; "
                        "conf/deepspeed.json is an example", code=2) from error  # fmt: skip
    if twice := sorted(OF_THE_YAML & given.keys()):
        raise UserError(f"{settings}: {', '.join(twice)}: what the stage's YAML says; leave it out here", code=2)
    if stage not in (0, 1, 2):
        raise UserError(f"{settings}: zero_optimization.stage {stage!r}: want 0, 1 or 2; checkpoints of 3 hold no "
                        "whole weights to average", code=2)  # fmt: skip


def check_checkpoint(model: torch.nn.Module, path: Path, config: dict[str, Any]) -> None:
    """Every tensor of the model is in the checkpoint, or is new LoRA or an untrained CTC branch, which is said."""
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
    was = read_yaml(beside).get("frontend_conf", {}).get("fs", 16000)
    if was == fs:
        return
    frozen = not any(p.requires_grad for p in model.audio_encoder.parameters())
    if frozen or (checkpoint.parent / "averaged.pt").is_file():
        raise UserError(f"frontend fs {fs}, but {checkpoint} was trained at {was} Hz; the rate is chosen at stage 0, "
                        "learned at stage 1, and later stages must match")  # fmt: skip
    logging.warning("frontend fs %d, the encoder knows %d Hz: an experiment; stages 2-5 must do the same", fs, was)


def check_rows(path: Path, dataset: dict[str, Any], fs: int) -> tuple[int, int]:
    """FunASR would use every row, its audio is there, mono, at `fs`; return the longest's frames and all frames."""
    least, most = dataset.get("min_source_length", 10), dataset.get("max_source_length", 8000)
    text_most, both_most = dataset.get("max_target_length", 2048), dataset.get("max_token_length") or 2048
    keys, longest, frames = set(), 0, 0
    for number, row in enumerate(progress(read_jsonl(path), None, f"checking {path.name}"), 1):
        try:
            key, speech, text, said = row["key"], row["speech_length"], row["text_length"], parse_row(row)
            audio, target = said["audio"], said["assistant"]
            online = (row.get("channel") or {}).get("online")
        except (KeyError, AttributeError, TypeError, UserError) as error:
            raise UserError(f"{path}:{number}: no formatted row (key, messages, lengths); run stage 0") from error
        if key in keys:
            raise UserError(f"{path}: key {key} twice")
        keys.add(key)
        longest, frames = max(longest, speech), frames + speech
        if not target or not 1 <= text <= text_most or not least <= speech <= most:
            raise UserError(f"{path}: {key} has {speech} frames and {text} tokens; upstream would skip it ({least} to "
                            f"{most} frames, 1 to {text_most} tokens are used); run stage 0 with MAX_SPEECH_LENGTH up "
                            f"to {most}, or raise dataset_conf.max_source_length")  # fmt: skip
        if speech + text > both_most:
            raise UserError(f"{path}: {key} has {speech + text} frames and tokens, the sampler would skip it; raise "
                            f"dataset_conf.max_token_length above {both_most}")  # fmt: skip
        if online and not Path(online).is_file():
            raise UserError(f"{path}: {key}: no channel settings {online}; run stage 0 with --force true")
        try:
            info = soundfile.info(audio)
        except (soundfile.LibsndfileError, OSError) as error:
            raise UserError(f"{path}: {key}: cannot read {audio}; run stage 0 with --force true") from error
        if info.samplerate != fs or info.channels != 1:
            raise UserError(f"{path}: {key}: {info.samplerate} Hz, {info.channels} channels, not {fs} Hz mono; "
                            "run stage 0 with the same FRONTEND_FS")  # fmt: skip
    if not keys:
        raise UserError(f"{path} is empty: training would run no batch and succeed; see the rejected rows of stage 0")
    return longest, frames


def check_room(model: torch.nn.Module, config: dict[str, Any], output_dir: Path, longest: int) -> None:
    """Disk for the checkpoints and memory of the GPU, where there is one, estimated from the model's own shapes."""
    from nano.batch_size import gpu_bytes

    train, dataset = config["train_conf"], config["dataset_conf"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    need = weights.checkpoint_bytes(model, train.get("keep_nbest_models", 500), train.get("use_deepspeed", False))
    need -= sum(file.stat().st_size for file in [*output_dir.glob("model.pt.ep*"), *output_dir.glob("model.pt.ep*/*")])
    folder = next(parent for parent in (output_dir, *output_dir.absolute().parents) if parent.exists())
    if (free := shutil.disk_usage(folder).free) < need:
        raise UserError(f"{folder}: {free / 2**30:.1f} GiB free, the checkpoints take {need / 2**30:.1f}; lower "
                        "train_conf.keep_nbest_models or free space")  # fmt: skip
    by_length, batch = batch_frames(dataset, longest)
    memory = gpu_bytes(model, config, batch, longest)
    logging.info("%.2f M parameters trained; checkpoints take %.2f GiB at most; about %.1f GiB of GPU memory",
                 trained / 1e6, need / 2**30, memory / 2**30)  # fmt: skip
    if by_length and not train.get("use_deepspeed"):  # nano/batch_size.py makes batches smaller, down to one row
        memory = gpu_bytes(model, config, longest, longest)
    if torch.cuda.is_available() and memory > (there := torch.cuda.get_device_properties(0).total_memory):
        raise UserError(f"about {memory / 2**30:.0f} GiB of GPU memory needed, {there / 2**30:.0f} there; lower "
                        f"batch_size ({dataset['batch_size']}), or MAX_SPEECH_LENGTH of stage 0")  # fmt: skip


def check_shared_memory(dataset: dict[str, Any], longest: int, frames: int) -> None:
    """Shared memory for two batches of each loader worker, of a list of so many frames: a container may have 64 MiB."""
    shared = Path("/dev/shm")
    workers = dataset["num_workers"] * int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # every GPU's process has its own
    need = min(2 * workers * batch_frames(dataset, longest)[1], frames) * FRAME_BYTES
    if dataset["num_workers"] and shared.is_dir() and (free := shutil.disk_usage(shared).free) < need:
        raise UserError(f"{shared}: {free / 2**20:.0f} MiB free, batches on their way from loader workers take "
                        f"{need / 2**20:.0f}; start the container with --shm-size=8g, or lower "
                        f"dataset_conf.num_workers ({dataset['num_workers']}; 0 needs none)")  # fmt: skip


def check_after(folder: Path, initial: Path, train_list: Path) -> dict[str, Any]:
    """What training changed is what it should change; return figures for run.json. Raises UserError otherwise."""
    described = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return {
        **check_tensors(folder, initial),
        **check_rows_used(described, sum(1 for _ in read_jsonl(train_list))),
        **check_loss(folder / "train.log"),
        **check_dev(described),
    }


def check_tensors(folder: Path, initial: Path) -> dict[str, Any]:
    """Frozen tensors are the initial checkpoint's, each trained module moved, all of them are saved."""
    averaged = torch.load(folder / "averaged.pt", map_location="cpu", mmap=True)
    # Of one checkpoint, not of the mean: a mean of equal numbers is not always that number.
    best = weights.read_checkpoint(folder / averaged["averaged"][0])["state_dict"]
    start, _lora = weights.load(initial)
    digests = json.loads((folder / "start.json").read_text(encoding="utf-8"))
    for name, state in (("averaged.pt", averaged["state_dict"]), (averaged["averaged"][0], best)):
        if absent := sorted((digests.keys() | best.keys()) - state.keys()):
            raise UserError(f"{folder}/{name} lacks {len(absent)} tensors, first {absent[0]}; do not use it")
        for key in state.keys() - digests.keys():
            if key in start and not torch.equal(state[key], start[key].to(state[key].dtype)):
                raise UserError(f"{key} is frozen but changed in {folder}/{name}; do not use this checkpoint")
    moved: dict[str, list[int]] = {}
    for name, digest in digests.items():
        counts = moved.setdefault("lora" if "lora_" in name else name.split(".")[0], [0, 0])
        counts[0] += 1
        counts[1] += weights.digest(best[name]) != digest
    for module, (tensors, changed) in moved.items():
        if not changed:
            raise UserError(f"{module}: none of its {tensors} tensors moved in training; is its loss in train.log?")
    return {"moved_tensors": {module: f"{changed} of {tensors}" for module, (tensors, changed) in moved.items()}}


def check_rows_used(described: dict[str, Any], rows: int) -> dict[str, int]:
    """Each epoch used each row of the list: once on one process, at least once on several."""
    used = described.get("rows_used")
    if not used:
        raise UserError("run.json does not say which rows were used; train with local/train.py")
    for epoch, count in used.items():
        if count["rows"] != rows or count["missed"]:
            raise UserError(f"epoch {epoch} used {count['rows'] - count['missed']} of the list's {rows} rows")
        if count["repeated"] and count["processes"] == 1:
            raise UserError(f"epoch {epoch} used rows more than once: {count['repeated']} repeats")
    return {"repeated_rows": sum(count["repeated"] for count in used.values())}


def check_loss(log: Path) -> dict[str, float | bool]:
    """The training loss of each epoch is finite and the last one is below the first; one epoch may rise a little."""
    steps = [row for row in read_log(log) if row["tag"] == "train"]
    losses = {row["epoch"]: row["loss"] for row in steps}  # the last of an epoch is its mean
    if not losses or not all(math.isfinite(loss) for loss in losses.values()):
        raise UserError(f"no finite training loss in {log}; lower optim_conf.lr")
    first, last = losses[min(losses)] if len(losses) > 1 else steps[0]["loss"], losses[max(losses)]
    said = f"the training loss did not fall: {first:.3f} -> {last:.3f}"
    if len(steps) > 1 and last >= first * (ONE_EPOCH if len(losses) == 1 else 1):
        raise UserError(f"{said}; lower optim_conf.lr in the stage's YAML or mend the data, then redo the stage with "
                        "--force true")  # fmt: skip
    if len(steps) > 1 and last >= first:
        logging.warning("%s, in one epoch, which is too little to tell; see the scores on dev", said)
    fallen = 1 - last / first
    return {"loss_first_epoch": first, "loss_last_epoch": last, "loss_fallen": fallen,
            "loss_target_met": fallen >= LOSS_TARGET}  # fmt: skip


def check_dev(described: dict[str, Any]) -> dict[str, bool]:
    """Say where dev was best after the last epoch: the training may have been too short, or too slow."""
    best_at_end = len(described["rows_used"]) > 1 and not described["epochs_no_improve"]
    if best_at_end:
        logging.info("the loss on dev was lowest after the last epoch: a higher max_epoch or optim_conf.lr may help")
    return {"dev_best_at_end": best_at_end}


def get_args() -> argparse.Namespace:
    parser = stage_parser(__doc__)
    parser.add_argument("when", choices=("before", "after"), help="Check what is about to be, or has been, trained.")
    return parser.parse_args()


def main() -> None:
    args = get_args()
    if args.when == "before":
        check_before(args)
        logging.info("%s: every key is read, every tensor is there, every row would be used", args.stage_conf.name)
        return
    figures = check_after(args.output_dir, args.init_checkpoint, args.train_list)
    path = args.output_dir / "run.json"
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"checked": figures})
    logging.info("%s: %s", args.output_dir.name, figures)


if __name__ == "__main__":
    run(main)
