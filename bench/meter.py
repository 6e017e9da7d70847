"""How fast batches are trained: audio, waiting, padding, operations and memory, of all but the first steps.

    meter = Meter(loader, run)         # in the place of the data loader; run: device, others(), flops()
    trainer.train_epoch(..., dataloader_train=meter)
    meter.seconds / meter.elapsed      # audio-seconds per second
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch

WARM_UP = 2


def clock(device: str) -> float:
    """Seconds: of the wall once the GPU has finished, or of this process's CPU time."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def needed_flops(model: torch.nn.Module, stage: str, frames: int, tokens: int, labels: int, downsample: int) -> float:
    """Operations a step needs: 2 per weight and position, again for a gradient of its input, again for one of it.

    Encoder, adaptor, LLM and output layer; not CTC, not the products of attention, nothing for padding.
    """

    def weights(module: torch.nn.Module) -> int:
        return sum(p.numel() for name, p in module.named_parameters() if p.dim() > 1 and "lora_" not in name)

    encoder, adaptor, llm = {"1": (3, 2, 2), "2": (1, 3, 2), "3": (1, 1, 2)}[stage[5]]
    return 2.0 * (
        encoder * weights(model.audio_encoder) * frames + adaptor * weights(model.audio_adaptor) * frames / downsample
        + llm * weights(model.llm.model.layers) * tokens + llm * model.llm.lm_head.weight.numel() * labels
    )


class Meter:
    """The data loader a trainer loops over: notes what the batches hold, how long they were waited for and took."""

    def __init__(self, loader: torch.utils.data.DataLoader, run: Any):
        self.loader, self.run, self.dataset, self.batch_sampler = loader, run, loader.dataset, loader.batch_sampler
        self.steps = self.seconds = self.frames = self.padded = self.waited = self.flops = 0
        self.elapsed, self.peak_gib = 0.0, None

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        device, batches = self.run.device, iter(self.loader)
        for number in range(len(self.loader)):
            if number == WARM_UP:
                if device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                start = clock(device)
            began = time.process_time() if device == "cpu" else time.perf_counter()
            batch = next(batches)
            if number >= WARM_UP:
                self.waited += (time.process_time() if device == "cpu" else time.perf_counter()) - began
                self.count(batch)
            yield batch
        self.elapsed = clock(device) - start
        if device == "cuda":
            self.peak_gib = (torch.cuda.max_memory_allocated() - self.run.others()) / 2**30

    def count(self, batch: dict[str, Any]) -> None:
        self.steps += 1
        frames = int(batch["speech_lengths"].sum())
        self.frames += frames
        self.padded += batch["speech"].shape[0] * batch["speech"].shape[1]
        self.seconds += 0.06 * frames
        tokens, labels = int((batch["attention_mask"] > 0).sum()), int((batch["labels_ids"] >= 0).sum())
        self.flops += self.run.flops(frames, tokens, labels)
