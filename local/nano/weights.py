"""Checkpoints as plain dictionaries of tensors: read, fold LoRA, interpolate, write whole or not at all.

    state, lora = load("exp/stage3/averaged.pt")
    state = fold_lora(state, lora)
    save("folded.pt", interpolate(base, state, alpha=0.5))
"""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from typing import Any

import torch

from common import UserError, atomic_write

State = dict[str, torch.Tensor]
# Where FunASR and this recipe keep the tensors inside a checkpoint, outermost first.
CONTAINERS = ("state_dict", "model_state_dict", "model")


def load(path: str | os.PathLike) -> tuple[State, dict[str, Any] | None]:
    """Read any FunASR checkpoint: its tensors by name, and its LoRA settings {"r", "lora_alpha"} or None."""
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist; run the stage that writes it, or correct the path", code=2)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is not a whole PyTorch checkpoint ({type(error).__name__}); write it again") from error
    if not isinstance(checkpoint, Mapping):
        raise UserError(f"{path} holds a {type(checkpoint).__name__}, not a dictionary of tensors")
    lora, state = checkpoint.get("lora"), checkpoint
    while (name := next((name for name in CONTAINERS if isinstance(state.get(name), Mapping)), None)) is not None:
        state = state[name]
    state = {key.removeprefix("module."): value for key, value in state.items() if isinstance(value, torch.Tensor)}
    if not state:
        raise UserError(f"{path} holds no tensors")
    if lora is None and any(key.endswith(".lora_A") for key in state):
        raise UserError(f'{path} has LoRA tensors but no "lora" entry with r and lora_alpha; use the averaged.pt')
    return state, lora


def load_folded(path: str | os.PathLike) -> State:
    """Read a checkpoint as the tensors of a model without LoRA."""
    return fold_lora(*load(path))


def fold_lora(state: State, lora: Mapping[str, Any] | None) -> State:
    """Add each LoRA pair to its weight, W + lora_alpha / r * B A, and drop the pair.

    Computed and kept in float32: in bfloat16 most of a small update would be rounded away before it is scaled.
    """
    if lora is None:
        return dict(state)
    scale = lora["lora_alpha"] / lora["r"]
    folded: State = {}
    for name, tensor in state.items():
        if name.endswith((".lora_A", ".lora_B")):
            continue
        stem = name.removesuffix(".weight")
        if name.endswith(".weight") and f"{stem}.lora_A" in state:
            down, up = state[f"{stem}.lora_A"].float(), state[f"{stem}.lora_B"].float()
            if down.shape[0] != lora["r"]:
                raise UserError(f"{stem}: LoRA of rank {down.shape[0]}, but the checkpoint says r = {lora['r']}")
            tensor = tensor.float() + scale * (up @ down)
        folded[name] = tensor
    return folded


def interpolate(base: State, adapted: State, alpha: float) -> State:
    """(1 - alpha) * base + alpha * adapted for every tensor, computed in float32, in the dtype of `adapted`.

    Tensors that training left alone stay bit-identical; tied tensors (embedding and output layer) stay tied.
    Raises UserError when `adapted` has a tensor that `base` has not, or of another shape.
    """
    names = adapted.keys() - base.keys()
    if names:
        raise UserError(f"the base lacks {len(names)} tensors, first {min(names)}; are both of one model folder?")
    mixed: State = {}
    done: dict[tuple[int, int], torch.Tensor] = {}
    for name, new in adapted.items():
        old = base[name]
        if old.shape != new.shape:
            raise UserError(f"{name} is {tuple(old.shape)} in the base and {tuple(new.shape)} in the adapted model")
        tied = (old.data_ptr(), new.data_ptr())
        if tied not in done or done[tied].shape != new.shape:
            done[tied] = _mix(old, new, alpha)
        mixed[name] = done[tied]
    return mixed


def _mix(old: torch.Tensor, new: torch.Tensor, alpha: float) -> torch.Tensor:
    if not new.is_floating_point() or torch.equal(old, new):
        return new
    # torch.lerp gives exactly `old` at 0 and exactly `new` at 1.
    return torch.lerp(old.float(), new.float(), alpha).to(new.dtype)


def save(path: str | os.PathLike, state: State, **extra: Any) -> None:
    """Write {"state_dict": state, "lora": None, **extra}; the name appears when the file is whole."""
    with atomic_write(path, "wb") as file:
        torch.save({"state_dict": state, "lora": None, **extra}, file)
