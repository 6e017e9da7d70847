"""Checkpoints as plain dictionaries of tensors: read, fold LoRA, average, interpolate, write whole or not at all.

    state = load_folded("exp/stage3/averaged.pt")
    save_atomically({"state_dict": interpolate(base, state, alpha=0.5), "lora": None}, "final.pt")
"""

import hashlib
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from common import UserError, atomic_write

State = dict[str, torch.Tensor]
# Where FunASR and this recipe keep the tensors inside a checkpoint, outermost first.
CONTAINERS = ("state_dict", "model_state_dict", "model")
# Only time stamps and stage 2 need this branch, and the release on Hugging Face has none.
CTC_PREFIXES = ("ctc_decoder.", "ctc.")
# Tied to the embedding, so a checkpoint may leave it out.
OUTPUT_LAYER = "llm.lm_head.weight"


def load(path: str | os.PathLike) -> tuple[State, dict[str, Any] | None]:
    """Read any FunASR checkpoint: its tensors by name, and its LoRA settings {"r", "lora_alpha"} or None."""
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist; run the stage that writes it, or correct the path", code=2)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, OSError, pickle.UnpicklingError) as error:  # by where the file was cut off
        raise UserError(f"{path} is not a whole PyTorch checkpoint ({type(error).__name__}); write it again") from error
    if not isinstance(checkpoint, Mapping):
        raise UserError(f"{path} holds a {type(checkpoint).__name__}, not a dictionary of tensors")
    lora, state = checkpoint.get("lora"), checkpoint
    while inner := next((state[name] for name in CONTAINERS if isinstance(state.get(name), Mapping)), None):
        state = inner
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
    """Add each LoRA pair to its weight, W + lora_alpha / r * B A, and drop the pair; in float32, and `as_fine_as` W."""
    folded = {name: tensor for name, tensor in state.items() if not name.endswith((".lora_A", ".lora_B"))}
    for name in [name for name in state if name.endswith(".lora_A")]:
        stem = name.removesuffix(".lora_A")
        down, up = state[name].float(), state[f"{stem}.lora_B"].float()
        if down.shape[0] != lora["r"]:
            raise UserError(f"{stem}: LoRA of rank {down.shape[0]}, but the checkpoint says r = {lora['r']}")
        weight = state[f"{stem}.weight"].float()
        sum_of_both = weight + lora["lora_alpha"] / lora["r"] * (up @ down)
        folded[f"{stem}.weight"] = as_fine_as(weight, sum_of_both, stem)
    return folded


def as_fine_as(old: torch.Tensor, new: torch.Tensor, name: str) -> torch.Tensor:
    """`new`, float32; where `old` has no finer steps than bfloat16's, in those, up or down by chance, by name.

    An LLM that runs in bfloat16 would round it to the nearest step: most of an update of half a step and less would be
    gone (of a quarter of an update of 0.5 % of the weights, 40 %). By chance its mean stays (stochastic rounding: Gupta
    et al., "Deep learning with limited numerical precision", 2015), and so does what a product sums over a row.
    """
    if not torch.equal(old, old.bfloat16().float()):
        return new
    seed = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1
    chance = torch.randint(1 << 16, new.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    # The lower half of a float32 is what bfloat16 lacks; a number that has none there stays.
    return ((new.contiguous().view(torch.int32) + chance) & -(1 << 16)).view(torch.float32)


def interpolate(base: State, adapted: State, alpha: float) -> State:
    """(1 - alpha) * base + alpha * adapted for every tensor, computed in float32, in the dtype of `adapted`; of the LLM
    `as_fine_as` the base.

    Tensors that training left alone stay bit-identical, tied tensors (embedding and output layer) stay tied, and
    a CTC branch or output layer that `base` lacks is that of `adapted`.
    Raises UserError when `adapted` has another tensor that `base` has not, or one of another shape.
    """
    lacking = adapted.keys() - base.keys()
    if unknown := sorted(name for name in lacking if not name.startswith((*CTC_PREFIXES, OUTPUT_LAYER))):
        raise UserError(f"the base lacks {len(unknown)} tensors, first {unknown[0]}; are both of one model folder?")
    mixed: State = {}
    done: dict[tuple[int, int, torch.Size], torch.Tensor] = {}
    for name, new in adapted.items():
        old = base.get(name, new)
        if old.shape != new.shape:
            raise UserError(f"{name} is {tuple(old.shape)} in the base and {tuple(new.shape)} in the adapted model")
        tied = (old.data_ptr(), new.data_ptr(), new.shape)
        if tied not in done:
            done[tied] = new
            if new.is_floating_point() and not torch.equal(old, new):
                # torch.lerp gives exactly `old` at 0 and exactly `new` at 1.
                between = torch.lerp(old.float(), new.float(), alpha)
                if name.startswith("llm."):
                    between = as_fine_as(old.float(), between, name)
                done[tied] = between.to(new.dtype)
        mixed[name] = done[tied]
    return mixed


def average(checkpoints: list[Path], trainable: set[str], initial: Path) -> State:
    """Mean of the trainable tensors over the checkpoints, in fp32; all else bit for bit from `initial`.

    A frozen tensor that `initial` lacks (an untrained CTC branch) is taken from the last checkpoint.
    """
    if not checkpoints:
        raise UserError("no checkpoint to average: the loss of the dev list was not finite, or every model.pt.ep* was "
                        "deleted; see the log, then redo the stage with --force true")  # fmt: skip
    states = [read_checkpoint(path)["state_dict"] for path in checkpoints]
    start, _lora = load(initial)
    averaged = {}
    for name, last in states[-1].items():
        kept = torch.stack([state[name].float() for state in states]).mean(0) if name in trainable else start.get(name)
        averaged[name] = last if kept is None else kept.to(last.dtype)
    return averaged


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint that training saved; of DeepSpeed's, a folder, all but the optimiser."""
    file = path / "mp_rank_00_model_states.pt" if path.is_dir() else path
    checkpoint = torch.load(file, map_location="cpu", mmap=True)
    if path.is_dir():
        checkpoint["state_dict"] = checkpoint["module"]
    return checkpoint


def trainable_names(model: torch.nn.Module) -> set[str]:
    """Names in the state dict that training changes: a tied output layer is there under two, a parameter under one."""
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    return {name for name, tensor in model.state_dict(keep_vars=True).items() if id(tensor) in trained}


def misfits(model: torch.nn.Module, state: State) -> tuple[list[str], list[str]]:
    """Names of the model's tensors that `state` lacks, and of those it has in another shape.

    FunASR leaves both at random. A tied tensor may be there under either of its names.
    """
    tensors = model.state_dict(keep_vars=True)
    there = {id(tensor) for name, tensor in tensors.items() if name in state}
    missing = [name for name, tensor in tensors.items() if id(tensor) not in there]
    misshapen = [name for name in tensors if name in state and state[name].shape != tensors[name].shape]
    return sorted(missing), sorted(misshapen)


def checkpoint_bytes(model: torch.nn.Module, kept: int, deepspeed: bool = False) -> int:
    """Bytes that a training's checkpoints take at most, when it keeps that many of the best."""
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    # With AdamW's two moments, and ZeRO's copy; beside the best: the newest, the one being written, averaged.pt.
    return (size + (12 if deepspeed else 8) * trained) * (kept + 2) + size


def digest(tensor: torch.Tensor) -> str:
    """Hash of a tensor's bytes."""
    content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def save_atomically(checkpoint: Any, path: str | os.PathLike) -> None:
    """torch.save under a temporary name, then rename: a checkpoint is whole or absent."""
    with atomic_write(path, "wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:  # on a full disk PyTorch's archive cannot be closed, and that is all it says
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise
