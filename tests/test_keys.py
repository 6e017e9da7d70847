"""Every key a stage YAML may hold is alive: the objects FunASR builds from two values of it differ.

A key that is not in ALIVE is refused before training (nano.config.ACCEPTED), so one that does nothing cannot be set.
"""

import copy
import inspect
import re
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from funasr.bin import train_ds
from funasr.register import tables
from funasr.train_utils import trainer_ds

import nano.dataset
import nano.trainer
from common import write_jsonl
from mini import ROOT, STAGES, make_model, make_rows
from nano.config import ACCEPTED, build_on_meta, effective, read_stage

SOURCES = [inspect.getsource(part) for part in (train_ds.main, trainer_ds.Trainer, nano.trainer.Trainer)]


class Lab:
    """A model folder, a list of rows, and what FunASR builds from a configuration over them."""

    def __init__(self, folder):
        self.folder, self.model_dir = folder, make_model(folder / "model")
        (folder / "audio").mkdir()
        write_jsonl(folder / "list.jsonl", make_rows(folder / "audio"))
        self.stage = read_stage([ROOT / "conf" / f"{STAGES[0]}.yaml"])

    def config(self, key, value, more=()):
        """Stage 1's configuration with `key` set to `value`, and what else that key needs to have an effect."""
        stage = copy.deepcopy(self.stage)
        for name, setting in [*dict(more).items(), (key, value)]:
            *sections, leaf = name.split(".")
            part = stage
            for section in sections:
                part = part.setdefault(section, {})
            part[leaf] = setting
        return effective(stage, self.model_dir, 16000) | {"given": stage}

    def dataset(self, config, **built):
        return tables.dataset_classes["FunASR"](str(self.folder / "list.jsonl"), **config["dataset_conf"], **built)

    def built(self, config):
        """Model with weights, frontend, tokenizer, as AutoModel makes them."""
        from funasr import AutoModel

        return AutoModel(**{name: value for name, value in config.items() if name != "given"} | {"device": "cpu"})

    def trainer(self, config):
        train_conf = train_ds._resolve_distributed_config(config["given"], 1)[-1]
        return nano.trainer.Trainer(output_dir=str(self.folder / "exp"), device="cpu", **train_conf)


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    return Lab(tmp_path_factory.mktemp("lab"))


# --- what can be seen of a configuration


def trained(lab, config):
    return sorted((name, tuple(p.shape)) for name, p in build_on_meta(config).named_parameters() if p.requires_grad)


def dropouts(lab, config):
    return [(name, module.p) for name, module in build_on_meta(config).named_modules() if hasattr(module, "p")]


def layers(lab, config):
    return sorted({type(module).__name__ for module in build_on_meta(config).modules()})


def compiled(lab, config):
    with mock.patch("torch.cuda.is_available", return_value=True):
        return [module._compiled_call_impl is not None for module in build_on_meta(config).modules()]


def lora_scale(lab, config):
    return [module.scaling for module in build_on_meta(config).modules() if hasattr(module, "lora_A")]


def loss(lab, config):
    """Loss of a batch, and the gradient it gives the encoder."""
    built = lab.built(config)
    dataset = lab.dataset(config, frontend=built.kwargs["frontend"], tokenizer=built.kwargs["tokenizer"])
    total, _stats, _weight = built.model.eval()(**dataset.collator([dataset[0], dataset[1]]))
    total.backward()
    return total.item(), sum(p.grad.abs().sum().item() for p in built.model.audio_encoder.parameters())


def masked(lab, config):
    model = build_on_meta(config)
    torch.manual_seed(0)
    features = torch.randn(2, 40, 560)
    return features if model.specaug is None else model.specaug(features, torch.tensor([40, 40]))[0]


def optimiser(lab, config):
    config = config | {"model": torch.nn.Linear(2, 2)}
    _model, optimizer, scheduler = lab.trainer(config).warp_optim_scheduler(**config)
    return type(optimizer), type(scheduler), optimizer.defaults, scheduler.get_last_lr()


def first_update(lab, config):
    """A weight after the first of three batches, with a gradient of 100 and plain gradient descent."""
    model = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model.weight.data.zero_()
    (100 * model.weight.sum()).backward()
    scheduler = SimpleNamespace(step=lambda: None)
    trainer = lab.trainer(config)
    trainer.loader = range(3)
    trainer.update_step(model, optimizer, scheduler, None, loss_dict={"batch_idx": 0, "log_step": 0})
    return model.weight.item()


def setting(lab, config):
    """Trainer's attribute of that name, which the trainer or main() reads somewhere other than where it is set."""
    name = config["key"].split(".")[-1]
    assert sum(len(re.findall(rf"(?:self|trainer)\.{name}\b(?! = )", source)) for source in SOURCES) > 0
    return getattr(lab.trainer(config), name)


def precision(lab, config):
    return lab.trainer(config).dtype


def launcher(lab, config):
    return train_ds._resolve_distributed_config(config, 1)[:4]


def stops(lab, config):
    """Whether a third epoch runs after two without a better loss."""
    trainer = lab.trainer(config)
    trainer.epochs_no_improve = 2
    try:
        trainer.train_epoch(epoch=2, dataloader_train=None)
    except AttributeError:  # it goes on, and there is no data
        return False
    return trainer.idle


def average_of(lab, config):
    """Checkpoints kept and averaged out of three, of which accuracy and loss rank another one first."""
    trainer = lab.trainer(config)
    for number, (accuracy, value) in enumerate([(0.1, 1.0), (0.2, 2.0), (0.3, 3.0)]):
        name = f"model.pt.ep{number}"
        torch.save({"state_dict": {"w": torch.zeros(1)}}, lab.folder / "exp" / name)
        trainer.val_acc_step_or_epoch[name], trainer.val_loss_step_or_epoch[name] = accuracy, value
        trainer._rank_checkpoint(name)
    torch.save({"w": torch.zeros(1)}, lab.folder / "exp" / "start.pt")
    trainer.initial, trainer.lora = str(lab.folder / "exp" / "start.pt"), None
    trainer.close()
    return torch.load(lab.folder / "exp" / "averaged.pt")["averaged"]


def batches(lab, config):
    sampler = tables.batch_sampler_classes["BatchSampler"](lab.dataset(config), **config["dataset_conf"])
    return list(sampler["batch_sampler"]), sampler["num_workers"]


def rows_used(lab, config):
    return len(lab.dataset(config))


def cached(lab, config):
    built = lab.built(config)
    dataset = lab.dataset(config, frontend=built.kwargs["frontend"], tokenizer=built.kwargs["tokenizer"])
    return dataset[0] is dataset[0]


def features(lab, config):
    frontend = tables.frontend_classes[config["frontend"]](**config["frontend_conf"])
    noise = torch.from_numpy(np.random.default_rng(0).standard_normal((1, 16000)).astype(np.float32) / 10)
    torch.manual_seed(0)
    return frontend(noise, torch.tensor([16000]))[0]


# key: (one value, another, what differs, what else has to be set)
LORA = {"llm_conf.use_lora": True}
MASKS = {"specaug_conf.apply_freq_mask": True, "specaug_conf.apply_time_mask": True}
SORTED = {"dataset_conf.batch_size": 700}
ALIVE = {
    "audio_encoder_conf.freeze": (True, False, trained, {}),
    "audio_encoder_conf.dropout_rate": (0.1, 0.3, dropouts, {}),
    "audio_encoder_conf.attention_dropout_rate": (0.1, 0.3, dropouts, {}),
    "audio_adaptor_conf.freeze": (True, False, trained, {}),
    "audio_adaptor_conf.dropout_rate": (0.1, 0.3, dropouts, {}),
    "audio_adaptor_conf.attention_dropout_rate": (0.1, 0.3, dropouts, {}),
    "ctc_decoder_conf.freeze": (True, False, trained, {}),
    "ctc_decoder_conf.dropout_rate": (0.1, 0.3, dropouts, {}),
    "ctc_decoder_conf.attention_dropout_rate": (0.1, 0.3, dropouts, {}),
    "llm_conf.freeze": (True, False, trained, {}),
    "llm_conf.use_lora": (True, False, trained, {}),
    "llm_conf.lora_conf.r": (2, 4, trained, LORA),
    "llm_conf.lora_conf.lora_alpha": (8, 32, lora_scale, LORA),
    "llm_conf.lora_conf.lora_dropout": (0.1, 0.3, dropouts, LORA),
    "llm_conf.lora_conf.target_modules": (["q_proj"], ["v_proj"], trained, LORA),
    "ctc_weight": (0.0, 0.5, loss, {}),
    "detach_ctc_decoder": (True, False, loss, {"ctc_decoder_conf.freeze": False}),
    "compiled_layers": (True, False, compiled, {}),
    "fused_attention": (True, False, layers, {}),
    "frontend_conf.dither": (0.0, 1.0, features, {}),
    "specaug": (None, "SpecAugLFR", masked, {}),
    "specaug_conf.apply_time_warp": (True, False, masked, {}),
    "specaug_conf.apply_freq_mask": (True, False, masked, MASKS),
    "specaug_conf.freq_mask_width_range": ([0, 10], [15, 30], masked, MASKS),
    "specaug_conf.num_freq_mask": (1, 4, masked, MASKS),
    "specaug_conf.lfr_rate": (0, 6, masked, MASKS),
    "specaug_conf.apply_time_mask": (True, False, masked, MASKS),
    "specaug_conf.time_mask_width_range": ([0, 3], [8, 12], masked, MASKS),
    "specaug_conf.num_time_mask": (1, 4, masked, MASKS),
    "optim": ("adamw", "adam", optimiser, {}),
    "optim_conf.lr": (1e-3, 1e-4, optimiser, {}),
    "optim_conf.betas": ([0.9, 0.98], [0.9, 0.999], optimiser, {}),
    "optim_conf.weight_decay": (0.0, 0.1, optimiser, {}),
    "optim_conf.fused": (True, False, optimiser, {}),
    "scheduler": ("warmuplr", "noamlr", optimiser, {}),
    "scheduler_conf.warmup_steps": (10, 1000, optimiser, {}),
    "train_conf.max_epoch": (1, 2, setting, {}),
    "train_conf.accum_grad": (1, 2, first_update, {}),
    "train_conf.grad_clip": (1, 5, first_update, {}),
    "train_conf.use_bf16": (True, False, precision, {}),
    "train_conf.use_deepspeed": (True, False, launcher, {}),
    "train_conf.deepspeed_config": ("a.json", "b.json", launcher, {}),
    "train_conf.early_stopping_patience": (2, 3, stops, {}),
    "train_conf.keep_nbest_models": (1, 2, average_of, {"train_conf.avg_nbest_model": 3}),
    "train_conf.avg_nbest_model": (1, 2, average_of, {"train_conf.keep_nbest_models": 3}),
    "train_conf.avg_keep_nbest_models_type": ("acc", "loss", average_of, {}),
    "train_conf.log_interval": (1, 50, setting, {}),
    "train_conf.validate_interval": (10, 50, setting, {}),
    "train_conf.save_checkpoint_interval": (10, 50, setting, {}),
    "train_conf.resume": (True, False, setting, {}),
    "dataset_conf.batch_type": ("token", "example", batches, SORTED),
    "dataset_conf.batch_size": (300, 700, batches, {}),
    "dataset_conf.batch_size_sample_max": (3, 10, batches, {"dataset_conf.batch_size": 8000}),
    "dataset_conf.sort_size": (4, 1024, batches, SORTED),
    "dataset_conf.shuffle": (True, False, batches, {"dataset_conf.batch_type": "example"}),
    "dataset_conf.max_token_length": (150, 14000, batches, SORTED),
    "dataset_conf.min_source_length": (10, 150, rows_used, {}),
    "dataset_conf.max_source_length": (150, 12000, rows_used, {}),
    "dataset_conf.max_target_length": (4, 2048, rows_used, {}),
    "dataset_conf.num_workers": (0, 2, batches, {}),
    "dataset_conf.cache_gib": (0.0, 1.0, cached, {}),
}


@pytest.mark.parametrize("key", ALIVE)
def test_two_values_of_a_key_make_a_difference(lab, key):
    one, other, look, more = ALIVE[key]
    seen = []
    for value in (one, other):
        more = {name: setting for name, setting in more.items() if name != key}
        seen.append(look(lab, lab.config(key, value, more) | {"key": key}))
    if isinstance(seen[0], torch.Tensor):
        assert seen[0].shape != seen[1].shape or not torch.equal(*seen)
    else:
        assert seen[0] != seen[1]


def test_the_same_value_twice_makes_none(lab):
    for key, look in (("specaug", masked), ("optim_conf.lr", optimiser), ("dataset_conf.batch_size", batches)):
        value, _other, _look, more = ALIVE[key]
        value = "SpecAugLFR" if key == "specaug" else value
        seen = [look(lab, lab.config(key, value, more)) for _ in range(2)]
        assert torch.equal(*seen) if isinstance(seen[0], torch.Tensor) else seen[0] == seen[1]


def test_no_key_is_accepted_that_was_not_shown_alive():
    assert set(ALIVE) == ACCEPTED
