"""One variant of training for bench/training.py: model, data and trainer, stock or ours, and a meter on its batches.

    run = Run("ours", "stage1_encoder_adapt", folder, corpus, work, device="cuda")
    meter = run.epoch(tokens=60000, seconds=6000)      # meter.seconds of audio took meter.elapsed seconds
"""

from __future__ import annotations

import copy
import gc
import math
from pathlib import Path
from typing import Any

import torch
from funasr.register import tables
from funasr.train_utils.device_funcs import to_device
from funasr.train_utils.trainer_ds import Trainer as StockTrainer
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parent.parent
NAMES = (("model_classes", "FunASRNano"), ("dataset_classes", "FunASR"), ("frontend_classes", "WavFrontend"),
         ("batch_sampler_classes", "BatchSampler"))  # fmt: skip


def classes(names=NAMES) -> dict[tuple[str, str], Any]:
    return {(table, name): getattr(tables, table)[name] for table, name in names}


import funasr  # noqa: E402, F401  fills the registry

STOCK = classes()
import full_size  # noqa: E402
import miniature  # noqa: E402
import nano.dataset  # noqa: E402
import nano.model  # noqa: E402, F401
from meter import WARM_UP, Meter, needed_flops  # noqa: E402
from nano.batch_size import fit  # noqa: E402
from nano.config import effective  # noqa: E402
from nano.trainer import Trainer as OurTrainer  # noqa: E402

OURS = classes()


def register(given: dict[tuple[str, str], Any]) -> None:
    """Let FunASR build these classes from now on."""
    for (table, name), cls in given.items():
        getattr(tables, table)[name] = cls


def build_folder(path: Path, full: bool) -> Path:
    """The miniature's folder, or one of the released model's geometry without weights: random ones are drawn."""
    if not full:
        return miniature.build_folder(path, full_size.ALPHABET)
    path.mkdir(parents=True, exist_ok=True)
    return full_size.build_folder(path)


class RandomOnGPU(TorchDispatchMode):
    """Draws the random weights of a model built on the CPU on the GPU, in a fraction of the 20 s of one core."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten, kwargs = torch.ops.aten, kwargs or {}
        if func not in (aten.normal_.default, aten.uniform_.default) or not torch.cuda.is_available():
            return func(*args, **kwargs)
        kwargs.pop("generator", None)
        return args[0].copy_(func(torch.empty_like(args[0], device="cuda"), *args[1:], **kwargs))


class Chosen:
    """A batch sampler of given batches."""

    def __init__(self, batches: list[list[int]]):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    def set_epoch(self, epoch: int) -> None:
        """The batches are the same in every epoch."""


class Run:
    """Model, optimiser, dataset and trainer of one variant of one stage, kept for all its rounds."""

    alive: list[Run] = []

    def __init__(self, kind: str, stage: str, folder: Path, corpus: Path, work: Path, device: str):
        self.kind, self.stage, self.device = kind, stage, device
        register(STOCK if kind == "stock" else OURS)
        config = self.config(folder, corpus)
        from funasr import AutoModel

        Run.alive = [run for run in Run.alive if (run.stage, run.corpus) == (stage, corpus)]
        self.corpus = corpus
        gc.collect()
        with RandomOnGPU():
            model, self.kwargs = AutoModel.build_model(**config)
        self.kwargs.pop("model", None)
        OurTrainer.initial, OurTrainer.lora = "", None
        base = StockTrainer if kind == "stock" else OurTrainer
        # Upstream's main() has a GPU's number for a device, and its Trainer no other way to run on a CPU.
        place = {"device": property(lambda _: 0 if device == "cuda" else "cpu", lambda _, value: None)}
        settings = {name: value for name, value in self.kwargs["train_conf"].items() if "deepspeed" not in name}
        settings |= dict.fromkeys(("log_interval", "validate_interval", "save_checkpoint_interval"), 10**9)
        output = work / f"{kind}.{stage}"
        self.trainer = type("Placed", (base,), place)(output_dir=str(output), **settings)
        self.model = self.trainer.warp_model(model, **self.kwargs | {"device": device})
        _, self.optim, self.scheduler = self.trainer.warp_optim_scheduler(self.model, **self.kwargs)
        self.dataset = tables.dataset_classes["FunASR"](
            str(corpus), frontend=self.kwargs["frontend"], tokenizer=self.kwargs["tokenizer"], is_training=True,
            **self.kwargs["dataset_conf"],
        )
        self.sampler = tables.batch_sampler_classes["BatchSampler"]
        Run.alive.append(self)

    def config(self, folder: Path, corpus: Path) -> dict[str, Any]:
        """What local/train.py would build from; stock with FunASR's number of workers and no classes of ours."""
        stage = OmegaConf.to_container(OmegaConf.load(ROOT / "conf" / f"{self.stage}.yaml"))
        # The released config leaves dither at its default, and it costs as much as the rest of the features.
        stage["frontend_conf"] = {"dither": 1.0}
        if self.kind == "stock":
            for key in ("compiled_layers", "fused_attention", "specaug", "specaug_conf"):
                stage.pop(key, None)
            stage["optim_conf"].pop("fused")
            stage["dataset_conf"]["num_workers"] = 4
        if self.device == "cpu":
            stage["dataset_conf"]["num_workers"] = 0
        config = effective(stage, folder, 16000)
        config |= {"device": self.device, "ncpu": 1, "seed": 0, "train_data_set_list": str(corpus),
                   "valid_data_set_list": str(corpus)}  # fmt: skip
        config["train_conf"] |= {"use_bf16": self.device == "cuda"}
        config["llm_conf"] |= {"llm_dtype": "bf16" if self.device == "cuda" else "fp32"}
        return config

    def epoch(self, tokens: int, seconds: float, least: int = 6, first: int = 0) -> Meter:
        """Train on about `seconds` of audio in batches of `tokens`, from short to long, `least` of them at least."""
        most = {"batch_size_sample_max": 10 if self.kind == "stock" and tokens == 6000 else 10**6}
        self.dataset.batch_size_token_max = max(tokens, 6000) if self.kind == "stock" else float("inf")
        arguments = self.sampler(self.dataset, **self.kwargs["dataset_conf"] | {"batch_size": tokens} | most)
        batches = list(arguments.pop("batch_sampler"))
        each = len(self.dataset) / len(batches) * self.mean_seconds()
        count = min(len(batches), WARM_UP + max(least, math.ceil(seconds / each)))
        chosen = [(first + index * len(batches) // count) % len(batches) for index in range(count)]
        return self.train([batches[index] for index in chosen], arguments)

    def mean_seconds(self) -> float:
        lengths = [self.dataset.get_source_len(index) for index in range(0, len(self.dataset), 7)]
        return sum(lengths) / len(lengths) / 100

    def train(self, batches: list[list[int]], arguments: dict[str, Any]) -> Meter:
        loader = torch.utils.data.DataLoader(
            self.dataset, batch_sampler=Chosen(batches), collate_fn=self.dataset.collator, **arguments
        )
        meter = Meter(loader, self)
        self.use_own_kernels()
        self.trainer.step_in_epoch = 0
        try:
            self.trainer.train_epoch(
                model=self.model, optim=self.optim, scheduler=self.scheduler, scaler=None, dataloader_train=meter,
                dataloader_val=None, epoch=0,
            )  # fmt: skip
        finally:
            self.optim.zero_grad(set_to_none=True)  # a step that fails leaves gradients in memory others are timed in
        return meter

    def sample(self) -> dict[str, Any]:
        """A batch of three rows."""
        step = max(1, len(self.dataset) // 3)
        return self.dataset.collator([self.dataset[row] for row in range(0, 3 * step, step)])

    def use_own_kernels(self) -> None:
        """Leave PyTorch's choice of attention kernels as this variant finds it or sets it, for all of the process."""
        torch.backends.cuda.enable_cudnn_sdp(self.kind == "stock")

    def loss(self, batch: dict[str, Any]) -> float:
        """The LLM's loss on a batch, without dropout, CTC and compilation, in the precision of training."""
        weight, self.model.ctc_weight = self.model.ctc_weight, 0
        self.use_own_kernels()
        self.model.train(False)
        result: dict[str, Any] = {}
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            batch = to_device(copy.deepcopy(batch), self.trainer.device)
            StockTrainer.forward_step(self.trainer, self.model, batch, result)
        self.model.ctc_weight = weight
        return round(result["stats"]["loss"].item(), 6)

    def fitting(self) -> int:
        """The recipe's own choice of a batch size, which compiles the layers too."""
        arguments = self.sampler(self.dataset, **self.kwargs["dataset_conf"])
        tokens = arguments["batch_sampler"].stock.batch_size
        loader = torch.utils.data.DataLoader(self.dataset, collate_fn=self.dataset.collator, **arguments)
        self.use_own_kernels()
        return fit(self.trainer, self.model, self.optim, loader) or tokens

    def probe(self, tokens: int) -> float | None:
        """Peak bytes of steps on a batch of the longest row, or None where it does not fit."""
        row = max(range(len(self.dataset)), key=self.dataset.get_source_len)
        self.dataset.batch_size_token_max = float("inf")
        batch = self.dataset.collator([self.dataset[row]] * max(1, tokens // self.dataset.get_source_len(row)))
        self.use_own_kernels()
        self.model.train()
        torch.cuda.reset_peak_memory_stats()
        try:
            for _ in range(2):
                result: dict[str, Any] = {"batch_idx": 0}
                StockTrainer.forward_step(self.trainer, self.model, to_device(batch, self.trainer.device), result)
                StockTrainer.backward_step(self.trainer, self.model, None, result)
                StockTrainer.update_step(self.trainer, self.model, self.optim, self.scheduler, None, result)
            return torch.cuda.max_memory_allocated() - self.others()
        except torch.cuda.OutOfMemoryError:
            self.optim.zero_grad(set_to_none=True)
            return None
        finally:
            torch.cuda.empty_cache()

    def flops(self, frames: int, tokens: int, labels: int) -> float:
        return needed_flops(self.model, self.stage, frames, tokens, labels, self.model.audio_adaptor.k)

    def others(self) -> int:
        """Bytes of the other variants' weights and optimiser states, which lie on the same GPU."""
        return sum(
            tensor.numel() * tensor.element_size() for run in Run.alive if run is not self
            for tensor in [*run.model.parameters(), *(
                value for state in run.optim.state.values() for value in state.values() if torch.is_tensor(value)
            )]
        )  # fmt: skip

    def profile(self, tokens: int, path: Path) -> None:
        """Write where the time of one round goes, operator by operator, and what compilation took."""
        from torch._dynamo.utils import compile_times
        from torch.profiler import ProfilerActivity, profile

        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.device == "cuda")
        with profile(activities=activities) as result:
            self.epoch(tokens, 1.0)
        order = "self_device_time_total" if self.device == "cuda" else "self_cpu_time_total"
        table = result.key_averages().table(sort_by=order, row_limit=40, max_name_column_width=80)
        path.write_text(f"{table}\n{compile_times()}\n", "utf-8")
