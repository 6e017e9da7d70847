"""dataset_conf.batch_size as an upper bound: a GPU with less memory than it needs gets smaller batches, and says so.

    tokens = fit(trainer, model, optim, loader)      # before the first step of a training

Tried, not estimated: a step on what stands for two batches of the epoch, the one that needs most memory for the encoder
and the one that does for the LLM.
"""

import logging
from collections.abc import Callable
from typing import Any

import torch
from funasr.train_utils import trainer_ds as stock
from funasr.train_utils.device_funcs import to_device

from common import UserError

# Of the GPU's memory that the trial may use; the rest is for pieces that fit nothing and batches of other epochs.
SHARE = 0.85
PROMPT = 24  # tokens


def largest(asked: int, longest: int, fits: Callable[[int], bool]) -> int:
    """The first of asked, 0.8 x asked, ... that fits, down to a batch of one row; UserError where that does not."""
    tokens = asked
    while not fits(tokens):
        if tokens <= longest:
            raise UserError(f"one row of {longest} frames and tokens does not fit this GPU's memory; lower "
                            "MAX_SPEECH_LENGTH of stage 0")  # fmt: skip
        tokens = max(longest, int(0.8 * tokens))
    return tokens


def heaviest(sampler: Any, dataset: Any) -> list[tuple[int, int]]:
    """(row, copies) for the encoder's heaviest batch of FunASR's sampler and for the LLM's: its largest row, repeated.

    Not of the whole list: a batch of nothing but the shortest rows, most of it prompts, hardly comes to be.
    """
    frames = dataset.get_source_len

    def said(row: int) -> float:  # speech, prompt and text in tokens; logits of text take as much again and a half
        return frames(row) / 48 + PROMPT + 2.5 * len(dataset.index_ds[row]["assistant"][0])

    batches, found = [batch for batch in sampler if batch], []
    for weight in (frames, said):
        pairs = ((max(batch, key=weight), len(batch)) for batch in batches)
        found.append(max(pairs, key=lambda pair: weight(pair[0]) * pair[1]))
    return found


def gpu_bytes(model: torch.nn.Module, config: dict[str, Any], frames: int, longest: int) -> float:
    """Rough memory of a step on batches of `frames` 10 ms frames: weights, gradients, AdamW, activations.

    On an H100 47 GiB were used in stage 1, for which it says 47; 18 of 24 in stage 2 and 12 of 13 in stage 3.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fixed = sum(p.numel() * p.element_size() for p in model.parameters()) + 12 * trained
    encoder, llm = config["audio_encoder_conf"], model.llm.config
    seen, tokens = frames / 6, frames / 20  # encoder frames; a speech token per 48, and text and prompt
    # What backward needs of each layer: norms, projections, feed-forward, upstream's matrix of scores; compiled layers
    # make half of it again.
    scores = 0 if config.get("fused_attention") else 3 * encoder["attention_heads"] * longest / 6
    layer = 8 * encoder["output_size"] + 2 * encoder["linear_units"] + scores
    kept = layer * (2 if config.get("compiled_layers") else 4)
    layers = encoder["num_blocks"] + encoder.get("tp_blocks", 0)
    heard = seen * kept * layers * any(p.requires_grad for p in model.audio_encoder.parameters())
    said = tokens * llm.num_hidden_layers * (12 * llm.hidden_size + 3 * llm.intermediate_size) * 2
    spelt = seen * model.ctc.ctc_lo.out_features if model._ctc_learns() else 0
    logits = spelt * (7 if config.get("compiled_layers") else 18) + 12 * tokens / 2 * llm.vocab_size
    return fixed + heard + said + logits


def fit(trainer: stock.Trainer, model: torch.nn.Module, optim: torch.optim.Optimizer, loader: Any) -> int | None:
    """A batch size that fits the GPU of every process. None where there is nothing to fit: CPU, DeepSpeed, examples."""
    sampler, dataset = getattr(loader.batch_sampler, "stock", None), loader.dataset
    by_length = getattr(sampler, "batch_type", "example") != "example"
    if not torch.cuda.is_available() or trainer.use_deepspeed or not by_length:
        return None
    # Without DistributedDataParallel around it: a process that runs out of memory leaves the others waiting for none.
    bare = getattr(model, "module", model).train()
    trained = [parameter for parameter in bare.parameters() if parameter.requires_grad]
    asked, longest = sampler.batch_size, max(map(dataset.get_source_len, range(len(dataset))))

    def fits(tokens: int) -> bool:
        sampler.batch_size = tokens
        try:
            # In the place of what Adam keeps of each parameter after the first step.
            _moments = [torch.empty_like(parameter) for parameter in trained for _ in range(0 if optim.state else 2)]
            for row, copies in heaviest(sampler, dataset):
                batch = dataset.collator([dataset[row]] * copies)
                result: dict[str, Any] = {}
                stock.Trainer.forward_step(trainer, bare, to_device(batch, trainer.device), result)
                stock.Trainer.backward_step(trainer, bare, None, result)
                bare.zero_grad(set_to_none=True)
            return True
        except torch.cuda.OutOfMemoryError:
            bare.zero_grad(set_to_none=True)
            return False

    logging.info("trying how large batches may be, up to %d frames and tokens; layers are compiled on the way, which "
                 "takes a minute or two", asked)  # fmt: skip
    torch.cuda.set_per_process_memory_fraction(SHARE)
    try:
        tokens = largest(asked, longest, fits)
    finally:
        sampler.batch_size = asked
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(1.0)
    if stock.dist.is_initialized():
        least = torch.tensor(tokens, device=trainer.device)
        stock.dist.all_reduce(least, op=stock.dist.ReduceOp.MIN)
        tokens = int(least)
    if tokens < asked:
        logging.warning("dataset_conf.batch_size %d does not fit this GPU; a batch has %d frames and tokens",
                        asked, tokens)  # fmt: skip
    torch.cuda.reset_peak_memory_stats()  # the log's peak is training's
    return tokens
