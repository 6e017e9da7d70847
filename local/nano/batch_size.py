"""dataset_conf.batch_size as an upper bound: a GPU with less memory than it needs gets smaller batches, and says so.

    tokens = fit(trainer, model, optim, loader)      # before the first step; the loader's sampler is set to it

Two small batches of the longest rows and two of the shortest, which have the most text for their length, show what a
row costs; memory grows evenly with rows because no layer keeps a matrix of scores (`fused_attention`).
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from funasr.train_utils import trainer_ds as stock
from funasr.train_utils.device_funcs import to_device

# Of the GPU's memory; the rest is for other shapes of batch and for pieces that fit nothing.
SHARE = 0.85
# Bytes a trainable parameter still needs after the first step: the two moments of Adam in fp32, and its gradient.
STATE = 12


def tokens_that_fit(asked: int, measured: list[tuple[int, int, int, int, int]], memory: float) -> int:
    """The largest batch size up to `asked` whose peak stays below `memory` bytes.

    measured: (length of a row, rows, peak bytes, more rows, their peak bytes) for rows of different lengths.
    """
    most = asked
    for length, few, low, many, high in measured:
        row = max(1.0, (high - low) / (many - few))
        most = min(most, int(few + (memory - low) / row) * length)
    # In steps, so that a resumed run, whose memory differs by a little, meets the same batches.
    return most if most == asked else most // 1024 * 1024


def gpu_bytes(model: torch.nn.Module, config: dict[str, Any], frames: int, longest: int) -> float:
    """Rough memory of a step on batches of `frames` 10 ms frames: weights, gradients, AdamW, activations."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fixed = sum(p.numel() * p.element_size() for p in model.parameters()) + 12 * trained
    encoder, llm = config["audio_encoder_conf"], model.llm.config
    seen, tokens = frames / 6, frames / 20  # encoder frames; a speech token per 48, and text and prompt
    # What backward needs of each layer in fp32 (norms, projections, feed-forward, upstream's matrix of scores).
    scores = 0 if config.get("fused_attention") else 3 * encoder["attention_heads"] * longest / 6
    layer = 11 * encoder["output_size"] + 3 * encoder["linear_units"] + scores
    layers = encoder["num_blocks"] + encoder.get("tp_blocks", 0)
    heard = seen * layer * layers * 4 * any(p.requires_grad for p in model.audio_encoder.parameters())
    said = tokens * llm.num_hidden_layers * (12 * llm.hidden_size + 3 * llm.intermediate_size) * 4
    return fixed + heard + said + tokens / 2 * llm.vocab_size * 12


def token_sampler(loader: Any) -> Any:
    """Upstream's sampler, also inside a wrapper that has it as `stock`."""
    return getattr(loader.batch_sampler, "stock", loader.batch_sampler)


def fit(trainer: stock.Trainer, model: torch.nn.Module, optim: torch.optim.Optimizer, loader: Any) -> int | None:
    """Measure on this GPU, agree with the other processes, set the sampler. None where there is nothing to measure."""
    sampler = token_sampler(loader)
    sharded = trainer.use_deepspeed or trainer.use_fsdp
    if not torch.cuda.is_available() or sharded or getattr(sampler, "batch_type", "example") == "example":
        return None
    model.train()
    dataset, asked = loader.dataset, sampler.batch_size
    rows = sorted(range(len(dataset)), key=dataset.get_source_len)
    measured = []
    for row, few, many in ((rows[-1], 1, 3), (rows[0], 8, 24)):
        peaks = [peak(trainer, model, dataset.collator([dataset[row]] * count)) for count in (few, many)]
        measured.append((dataset.get_source_len(row), few, peaks[0], many, peaks[1]))
    states = STATE * sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    there = (value for state in optim.state.values() for value in state.values() if torch.is_tensor(value))
    states -= sum(value.nbytes for value in there)  # a resumed run has them already
    memory = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    tokens = tokens_that_fit(asked, measured, SHARE * memory - states)
    if stock.dist.is_initialized():
        least = torch.tensor(tokens, device=trainer.device)
        stock.dist.all_reduce(least, op=stock.dist.ReduceOp.MIN)
        tokens = int(least)
    if tokens < min(asked, dataset.get_source_len(rows[-1])):
        raise RuntimeError("one row of the longest does not fit this GPU's memory; lower MAX_SPEECH_LENGTH of stage 0")
    if tokens < asked:
        logging.warning("dataset_conf.batch_size %d does not fit this GPU: %d frames and tokens a batch", asked, tokens)
    sampler.batch_size = tokens
    return tokens


def peak(trainer: stock.Trainer, model: torch.nn.Module, batch: dict[str, Any]) -> int:
    """Bytes in use at the most in one forward and backward pass, which leaves no trace in the model."""
    torch.cuda.reset_peak_memory_stats()
    result: dict[str, Any] = {}
    stock.Trainer.forward_step(trainer, model, to_device(batch, trainer.device), result)
    stock.Trainer.backward_step(trainer, model, None, result)
    model.zero_grad(set_to_none=True)
    return torch.cuda.max_memory_allocated()
