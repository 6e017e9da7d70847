"""FunASR's Trainer with what it lacks: a CPU, checkpoints that are whole or absent, averaging that leaves frozen alone.

Set as `funasr.bin.train_ds.Trainer` by local/train.py. What differs from funasr/train_utils/trainer_ds.py (1.4.16):
  * `device` is "cpu" where there is no GPU; upstream's main() sets it to a GPU number;
  * a checkpoint is written once, under a temporary name, then linked to model.pt; upstream writes it up to three times
    in place, and a torn model.pt is a traceback at every later start;
  * a checkpoint inside an epoch counts its steps from the epoch's start, so a second resume repeats no data;
  * the loss of an epoch is that of all its steps, those before a resume too; its last step is logged;
  * dropout and SpecAugment of a step are drawn from seed, epoch, step and process: a resume draws what an uninterrupted
    training would have; upstream's repeats the first epoch's, and its processes all draw the same;
  * the dataset is told the epoch before its workers start: a channel drawn online depends on it;
  * dataset_conf.batch_size is made to fit the GPU's memory;
  * the last batches of an epoch, fewer than accum_grad, still make a step; upstream forgets them;
  * DeepSpeed goes by the stage's YAML: without a word in its own settings it clips nothing and turns bf16 off;
  * early stopping counts on after a resume, from what the checkpoint says; upstream starts anew;
  * the average of the best checkpoints takes frozen tensors from the initial checkpoint: averaging rounds them;
  * it counts how often each row was used in an epoch, and run.json says so ("rows_used").
"""

import json
import logging
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from funasr.train_utils import trainer_ds as stock

from common import UserError, write_json
from nano import weights
from nano.batch_size import fit

RANKING = ("saved_ckpts", "val_acc_step_or_epoch", "val_loss_step_or_epoch", "avg_keep_nbest_models_type",
           "batch_total")  # fmt: skip
OURS = ("best_val_loss", "epochs_no_improve", "rows_used", "batch_tokens")  # what upstream's checkpoint does not have


class Trainer(stock.Trainer):
    """Upstream's Trainer; `initial` is the checkpoint training started from, `lora` what averaged.pt says of LoRA."""

    initial: str
    lora: dict | None
    curves: Any = None  # the first process's writer of tensorboard/, which local/train.py closes

    def __init__(self, **kwargs: Any):
        super().__init__(**kwargs)
        Trainer.curves = self.writer
        self.folder = Path(self.output_dir)
        self.trainable: set[str] = set()
        self.batch_tokens: int | None = None
        self.patience = kwargs.get("early_stopping_patience", 0)
        self.best_val_loss, self.epochs_no_improve, self.idle = float("inf"), 0, False
        self.loader: Any = None
        # Gradients of an accumulation that is not over are in no checkpoint.
        self.save_checkpoint_interval = math.ceil(self.save_checkpoint_interval / self.accum_grad) * self.accum_grad
        # How often each row of the list was used in the running epoch, over all processes, and past epochs' sums.
        self.row_uses = torch.zeros(0, dtype=torch.int32)
        self.rows_used: dict[str, dict[str, int]] = {}
        self.before_resume = (0, 0.0, 0.0)

    @property
    def device(self) -> Any:
        """The GPU number FunASR sets, or "cpu" where there is none."""
        return self._device if torch.cuda.is_available() else "cpu"

    @device.setter
    def device(self, value: Any) -> None:
        self._device = value

    def warp_model(self, model: torch.nn.Module, **kwargs: Any) -> torch.nn.Module:
        """Note seed and what is trained, in run.json too, then wrap the model for its device and processes."""
        self.seed = kwargs.get("seed", 0)
        kwargs["train_conf"]["early_stopping_patience"] = 0  # or main() stops too, counting from the last resume
        self.trainable = weights.trainable_names(model)
        if self.rank == 0:
            counts = count_parameters(model)
            self._describe(parameters=counts)
            trained = [f"{module} {count['trainable']:,}" for module, count in counts.items() if count["trainable"]]
            logging.info("trainable parameters: %s", ", ".join(trained))
            state = model.state_dict()
            write_json(self.folder / "start.json", {key: weights.digest(state[key]) for key in sorted(self.trainable)})
        if self.use_ddp and not torch.cuda.is_available():
            return torch.nn.parallel.DistributedDataParallel(model)
        return super().warp_model(model, **kwargs)

    def warp_optim_scheduler(self, model: torch.nn.Module, **kwargs: Any) -> tuple[Any, Any, Any]:
        """Model, optimiser and scheduler; DeepSpeed's settings are its file's and, in deepspeed.json, the YAML's."""
        if self.use_deepspeed:
            settings = json.loads(Path(self.deepspeed_config).read_text(encoding="utf-8")) | {
                "train_micro_batch_size_per_gpu": 1,  # it has to be said, and nothing goes by it
                "gradient_accumulation_steps": self.accum_grad, "gradient_clipping": self.grad_clip,
                "torch_autocast": {"enabled": self.use_bf16, "dtype": "bfloat16"},
            }  # fmt: skip
            self.deepspeed_config = str(self.folder / "deepspeed.json")
            if self.rank == 0:
                write_json(self.deepspeed_config, settings)
            stock.dist.barrier()
        return super().warp_optim_scheduler(model, **kwargs)

    def resume_checkpoint(self, **kwargs: Any) -> None:
        """Go on from model.pt, early stopping and rows used too; remove what a kill in the middle of a save left."""
        if self.rank == 0:
            for torn in self.folder.glob(".*.tmp"):
                remove(torn)
        path = self.folder / "model.pt"
        saved = weights.read_checkpoint(path) if self.resume and path.exists() else None
        # Steps that are skipped are of as many rows as there are processes, and ZeRO's optimiser is in as many parts.
        if saved and (saved["step"] or self.use_deepspeed) and saved["processes"] != self.world_size:
            raise UserError(f"{path} is of {saved['processes']} processes, here are {self.world_size}; "
                            "go on with as many GPUs as before")  # fmt: skip
        super().resume_checkpoint(**kwargs)
        if saved:
            for field in OURS:
                setattr(self, field, saved[field])
            # One that was deleted to save disk would be missed by the average alone, at the end of the training.
            self.saved_ckpts = {name: score for name, score in self.saved_ckpts.items()
                                if (self.folder / name).exists()}  # fmt: skip
            if not self.start_step:  # within an epoch its steps are counted; here this machine's GPU may be another
                self.batch_tokens = None
            # Those of all processes, counted once.
            self.row_uses = saved["row_uses"].clone() if self.rank == 0 else torch.zeros_like(saved["row_uses"])

    def train_epoch(self, model=None, optim=None, dataloader_train=None, epoch=None, start_step=0, **kwargs: Any):
        """Train one epoch in batches that fit the GPU, or nothing where early stopping has ended the training (main()
        cannot be told).
        """
        self.idle = 0 < self.patience <= self.epochs_no_improve
        if self.idle:
            return
        self.loader, dataloader_train.dataset.epoch = dataloader_train, epoch
        self.batch_tokens = self.batch_tokens or fit(self, model, optim, dataloader_train)
        if self.batch_tokens:
            dataloader_train.batch_sampler.stock.batch_size = self.batch_tokens
        self.before_resume = (start_step, self.train_loss_avg, self.train_acc_avg)
        if not start_step:
            self.row_uses = torch.zeros(len(dataloader_train.dataset), dtype=torch.int32)
        try:
            super().train_epoch(model=model, optim=optim, dataloader_train=dataloader_train, epoch=epoch,
                                start_step=start_step, **kwargs)  # fmt: skip
        except torch.cuda.OutOfMemoryError as error:
            raise UserError("the GPU's memory is full in the middle of training; end other programs on it (nvidia-smi) "
                            "and give the same command again: it goes on from the last checkpoint") from error
        uses = self._uses_of_all_processes()
        self.rows_used[str(epoch + 1)] = {
            "rows": len(uses), "missed": int((uses == 0).sum()), "repeated": int((uses - 1).clamp(min=0).sum()),
            "processes": self.world_size,
        }
        self._describe(rows_used=self.rows_used)

    def validate_epoch(self, **kwargs: Any) -> None:
        """Validate; after an epoch, count those without a better loss."""
        if self.idle:
            return
        if self.batch_tokens:
            kwargs["dataloader_val"].batch_sampler.stock.batch_size = self.batch_tokens
        super().validate_epoch(**kwargs)
        if kwargs.get("step_in_epoch") is None:
            self.epochs_no_improve += 1
            if self.val_loss_avg < self.best_val_loss:
                self.best_val_loss, self.epochs_no_improve = self.val_loss_avg, 0
            if self.patience:
                logging.info("no better loss for %d of %d epochs", self.epochs_no_improve, self.patience)

    def forward_step(self, model, batch, loss_dict=None) -> None:
        """One batch forward; in training, with chance of its own, its rows noted."""
        if not torch.is_grad_enabled():
            super().forward_step(model, batch, loss_dict)
            return
        if self.use_deepspeed:
            whole = (loss_dict["batch_idx"] + 1) % self.accum_grad == 0
            model.set_gradient_accumulation_boundary(whole or self._ends_epoch(loss_dict))
        elif self.use_ddp and self._ends_epoch(loss_dict):
            model.require_backward_grad_sync = True  # although upstream goes on accumulating
        drawn_from = [self.seed, loss_dict["epoch"], loss_dict["log_step"], self.rank]
        torch.manual_seed(int(np.random.SeedSequence(drawn_from).generate_state(1)[0]))
        super().forward_step(model, batch, loss_dict)
        rows = torch.tensor([item["row"] for item in batch["item"]])
        self.row_uses.index_add_(0, rows, torch.ones(len(rows), dtype=torch.int32))

    def update_step(self, model, optim, scheduler, scaler, loss_dict=None) -> None:
        """Step where accum_grad batches, or the epoch's last, have given their gradients."""
        asked = self.accum_grad
        self.accum_grad = 1 if self._ends_epoch(loss_dict) else asked
        super().update_step(model, optim, scheduler, scaler, loss_dict)
        self.accum_grad = asked

    def _ends_epoch(self, loss_dict: dict[str, Any]) -> bool:
        return loss_dict["log_step"] + 1 == len(self.loader)

    def log(self, loss_dict: dict[str, Any], tag: str = "train", **kwargs: Any) -> None:
        """Log every log_interval steps, and the last of an epoch: its mean is then the epoch's."""
        kept = {name: getattr(self, name) for name in ("log_interval", "train_loss_avg", "train_acc_avg")}
        if loss_dict["log_step"] + 1 == loss_dict["batch_num_epoch"]:
            self.log_interval = 1
        if tag == "train":
            self.train_loss_avg, self.train_acc_avg = self._epoch_means(loss_dict["batch_idx"] + 1)
        try:
            super().log(loss_dict, tag, **kwargs)
        except OverflowError as error:  # of the perplexity
            raise UserError(f"the loss is {getattr(self, f'{tag}_loss_avg'):.0f}, training diverges; lower "
                            "optim_conf.lr in the stage's YAML, then redo the stage with --force true") from error
        vars(self).update(kept)

    def _epoch_means(self, steps: int) -> tuple[float, float]:
        """Loss and accuracy since the epoch's start; upstream's are those of the `steps` since a resume."""
        before, loss, accuracy = self.before_resume
        pairs = (loss, self.train_loss_avg), (accuracy, self.train_acc_avg)
        return tuple((before * old + steps * new) / (before + steps) for old, new in pairs)

    def _describe(self, **facts: Any) -> None:
        if self.rank == 0:
            path = self.folder / "run.json"
            described = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            write_json(path, described | facts)

    def _uses_of_all_processes(self) -> torch.Tensor:
        if not stock.dist.is_initialized():
            return self.row_uses
        total = self.row_uses.clone().to(self.device)
        stock.dist.all_reduce(total)
        return total.cpu()

    def save_checkpoint(
        self, epoch: int, step: int | None = None, model=None, optim=None, scheduler=None, scaler=None,
        step_in_epoch: int | None = None, **kwargs: Any,
    ) -> None:
        """Save everything a resume needs as model.pt.ep<epoch>[.<step>] and model.pt; drop the worst beyond n-best."""
        if self.idle:
            return
        row_uses = self._uses_of_all_processes()
        inside = step_in_epoch if step is not None else None
        name = f"model.pt.ep{epoch}" if inside is None else f"model.pt.ep{epoch}.{inside}"
        loss, accuracy = (0.0, 0.0) if inside is None else self._epoch_means(step)
        discard = self._rank_checkpoint(name) if self.rank == 0 else []
        state = {
            "epoch": epoch, "step": inside, "step_in_epoch": inside, "train_loss_avg": loss, "train_acc_avg": accuracy,
            "row_uses": row_uses, "processes": self.world_size,
            **{field: getattr(self, field) for field in (*OURS, *RANKING)},
        }  # fmt: skip
        if self.use_deepspeed:
            # A folder in which each process writes its part of the optimiser, the first the model and `state`.
            model.save_checkpoint(self.output_dir, f".{name}.tmp", state, save_latest=False)
            stock.dist.barrier()
        if self.rank == 0:
            # model.pt, by which a resume goes, is a second name of the newest.
            link = self.folder / ".model.pt.link"
            link.unlink(missing_ok=True)
            if self.use_deepspeed:
                remove(self.folder / name)
                os.replace(self.folder / f".{name}.tmp", self.folder / name)
                link.symlink_to(name)
            else:
                state |= {
                    "optimizer": optim.state_dict(), "scheduler": scheduler.state_dict(),
                    "state_dict": (model.module if hasattr(model, "module") else model).state_dict(),
                } | ({"scaler_state": scaler.state_dict()} if scaler else {})  # fmt: skip
                weights.save_atomically(state, self.folder / name)
                os.link(self.folder / name, link)
            os.replace(link, self.folder / "model.pt")
            for old in discard:
                remove(self.folder / old)
            logging.info("Checkpoint saved to %s", self.folder / name)
        if self.use_ddp or self.use_deepspeed:
            stock.dist.barrier()

    def _rank_checkpoint(self, name: str) -> list[str]:
        """Enter a checkpoint in the n-best list by its validation metric; return the files that fall out.

        The previous checkpoint of the running epoch falls out too: it was for resuming only.
        """
        loss_ranks = self.avg_keep_nbest_models_type == "loss"
        scores = self.val_loss_step_or_epoch if loss_ranks else self.val_acc_step_or_epoch
        keep = {saved: scores[saved] for saved in [*self.saved_ckpts, name] if saved in scores}
        kept = sorted(keep, key=keep.get, reverse=not loss_ranks)[: self.keep_nbest_models]
        self.saved_ckpts = {saved: keep[saved] for saved in kept}
        on_disk = {path.name for path in self.folder.glob("model.pt.ep*")}
        return sorted(on_disk - set(kept) - {name})

    def close(self) -> None:
        """Average the best checkpoints into averaged.pt, then close upstream's way."""
        if self.rank == 0:
            best = sorted(self.saved_ckpts, key=self.saved_ckpts.get, reverse=self.avg_keep_nbest_models_type != "loss")
            best = best[: self.avg_nbest_model]
            state = weights.average([self.folder / name for name in best], self.trainable, Path(self.initial))
            content = {"state_dict": state, "lora": self.lora, "averaged": best}
            weights.save_atomically(content, self.folder / "averaged.pt")
            logging.info("averaged.pt is the mean of %s", ", ".join(best))
        # train.py writes run.json anew; of a resumed run the last epoch may be all done.
        self._describe(rows_used=self.rows_used, epochs_no_improve=self.epochs_no_improve)
        if self.use_ddp and not torch.cuda.is_available():
            # Gloo's thread drops the tensors of its last work under Python's lock, which torch (2.13) holds when it
            # waits for that thread to end: seen to hang at the end of a training on two processes.
            stock.dist.barrier()
            time.sleep(1)
        super().close()


def remove(path: Path) -> None:
    """A checkpoint, where there is one: a file, or DeepSpeed's folder."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def count_parameters(model: torch.nn.Module) -> dict[str, dict[str, int]]:
    """{"module": {"parameters", "trainable"}} of the model's top modules, LoRA as one of its own."""
    counts: dict[str, dict[str, int]] = {}
    for name, parameter in model.named_parameters():
        module = "lora" if "lora_" in name else name.split(".")[0]
        count = counts.setdefault(module, {"parameters": 0, "trainable": 0})
        count["parameters"] += parameter.numel()
        count["trainable"] += parameter.numel() * parameter.requires_grad
    return counts
