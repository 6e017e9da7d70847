"""Fail a training run that did not do what it should have: called by local/check_training.py after.

    check_after(Path("exp/stage1"), Path("model/model.pt"), Path("exp/stage1/trainlist.jsonl"))  # figures or UserError
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from common import UserError, read_jsonl
from nano import weights
from nano.train_log import read_log

LOSS_TARGET = 0.3  # the plan's: reported, no reason to fail


def check_after(folder: Path, initial: Path, train_list: Path) -> dict[str, Any]:
    """What training changed is what it should change; return figures for run.json. Raises UserError otherwise."""
    described = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    return {
        **check_tensors(folder, initial),
        **check_rows_used(described, sum(1 for _ in read_jsonl(train_list))),
        **check_loss(folder / "train.log"),
    }


def check_tensors(folder: Path, initial: Path) -> dict[str, Any]:
    """Frozen tensors are the initial checkpoint's, each trained module moved, all of them are saved."""
    averaged = torch.load(folder / "averaged.pt", map_location="cpu", mmap=True)
    # Of one checkpoint, not of the mean: a mean of equal numbers is not always that number.
    best = torch.load(folder / averaged["averaged"][0], map_location="cpu", mmap=True)["state_dict"]
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
        if count["repeated"] and described.get("processes", 1) == 1:
            raise UserError(f"epoch {epoch} used rows more than once: {count['repeated']} repeats")
    return {"repeated_rows": sum(count["repeated"] for count in used.values())}


def check_loss(log: Path) -> dict[str, float | bool]:
    """The training loss of each epoch is finite and the last one is below the first."""
    losses = {row["epoch"]: row["loss"] for row in read_log(log) if row["tag"] == "train"}
    if not losses or not all(math.isfinite(loss) for loss in losses.values()):
        raise UserError(f"no finite training loss in {log}; lower optim_conf.lr or log_interval")
    first, last = losses[min(losses)], losses[max(losses)]
    if len(losses) > 1 and last >= first:
        raise UserError(f"the training loss did not fall: {first:.3f} -> {last:.3f}; check optim_conf.lr and the data")
    fallen = 1 - last / first
    return {"loss_first_epoch": first, "loss_last_epoch": last, "loss_fallen": fallen,
            "loss_target_met": fallen >= LOSS_TARGET}  # fmt: skip
