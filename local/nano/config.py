"""What a stage YAML may say, and the configuration and model that FunASR makes of it.

    layers = read_stage([Path("conf/stage1_encoder_adapt.yaml")])      # UserError for a key that nothing reads
    config = effective(layers, model_dir, fs=16000)                    # the model folder's config.yaml under it
    model = build_on_meta(config)                                      # shapes and requires_grad, no memory

FunASR takes any key and leaves what it does not know in **kwargs. So a stage YAML may hold the keys below and no
other; tests/test_keys.py gives each of them two values and shows what differs in the installed FunASR.
"""

import argparse
import copy
import difflib
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import yaml

from common import UserError, first_line, read_yaml

SECTIONS = {
    "": "compiled_layers ctc_weight detach_ctc_decoder fused_attention specaug optim scheduler",
    "audio_encoder_conf": "freeze dropout_rate attention_dropout_rate",
    "audio_adaptor_conf": "freeze dropout_rate attention_dropout_rate",
    "ctc_decoder_conf": "freeze dropout_rate attention_dropout_rate",
    "llm_conf": "freeze use_lora",
    "llm_conf.lora_conf": "r lora_alpha lora_dropout target_modules",
    "frontend_conf": "dither",
    "specaug_conf": "apply_time_warp apply_freq_mask freq_mask_width_range num_freq_mask lfr_rate apply_time_mask "
    "time_mask_width_range num_time_mask",
    "optim_conf": "lr betas weight_decay fused",
    "scheduler_conf": "warmup_steps",
    "train_conf": "max_epoch accum_grad grad_clip use_bf16 use_deepspeed deepspeed_config early_stopping_patience "
    "keep_nbest_models avg_nbest_model avg_keep_nbest_models_type log_interval validate_interval "
    "save_checkpoint_interval resume",
    "dataset_conf": "batch_type batch_size batch_size_sample_max sort_size shuffle max_token_length "
    "min_source_length max_source_length max_target_length num_workers cache_gib",
}
NO_NUMBERS = {
    "specaug", "optim", "scheduler", "train_conf.deepspeed_config", "train_conf.avg_keep_nbest_models_type",
    "dataset_conf.batch_type", "optim_conf.betas", "llm_conf.lora_conf.target_modules",
    "specaug_conf.freq_mask_width_range", "specaug_conf.time_mask_width_range",
}  # fmt: skip
# Whole numbers, and the least of each. With a sort_size of 0 upstream would give processes unequal numbers of batches.
COUNTS = dict.fromkeys(["train_conf.early_stopping_patience", "dataset_conf.num_workers"], 0) | dict.fromkeys([
    "train_conf.max_epoch", "train_conf.accum_grad", "train_conf.keep_nbest_models", "train_conf.avg_nbest_model",
    "train_conf.log_interval", "train_conf.validate_interval", "train_conf.save_checkpoint_interval",
    "dataset_conf.batch_size", "dataset_conf.sort_size", "llm_conf.lora_conf.r",
], 1)  # fmt: skip
ACCEPTED = {f"{part}.{key}".lstrip(".") for part, keys in SECTIONS.items() for key in keys.split()}


def flat_items(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves of a nested configuration by their dotted names: {"a": {"b": 1}} -> {"a.b": 1}."""
    items = {}
    for name, value in config.items():
        items |= flat_items(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return items


def read_stage(paths: list[Path]) -> dict[str, Any]:
    """The YAMLs laid over one another. UserError, code 2, for one that is missing, no YAML, or says what cannot be."""
    from omegaconf import OmegaConf

    layers = [read_yaml(path) for path in paths]
    for path, layer in zip(paths, layers, strict=True):
        for key, value in flat_items(layer).items():
            if key not in ACCEPTED:
                near = difflib.get_close_matches(key, sorted(ACCEPTED), 1, 0)
                raise UserError(f"{path}: nothing reads the key {key}; the nearest that is read is {near[0]}", code=2)
            if key == "llm_conf.lora_conf.target_modules" and not isinstance(value, list):
                raise UserError(f"{path}: {key} is {value!r}, not a list of the LLM's layers: [q_proj, v_proj]", code=2)
            if key in NO_NUMBERS:
                continue
            if not isinstance(value, (bool, int, float)):
                raise UserError(f"{path}: {key} is {value!r}, not a number, true or false", code=2)
            whole, least, most = key in COUNTS, COUNTS.get(key, 0), 1 if "dropout" in key else math.inf
            if not least <= value <= most or whole and type(value) is not int:
                want = f"a {'whole ' * whole}number from {least} to {most}"
                raise UserError(f"{path}: {key} is {value!r}; want {want}", code=2)
    return OmegaConf.to_container(OmegaConf.merge(*layers))


def effective(stage: dict[str, Any], model_dir: Path, fs: int) -> dict[str, Any]:
    """The configuration FunASR builds from: the folder's config.yaml, paths made absolute, under the stage's keys."""
    from funasr.download.download_model_from_hub import download_model

    model_dir = model_dir.absolute()  # FunASR joins its paths to it
    config = copy.deepcopy(stage) | {"model": str(model_dir), "hub": "ms", "disable_update": True}
    config.setdefault("frontend_conf", {})["fs"] = fs
    dataset = config.setdefault("dataset_conf", {})
    # The released config reads one list 256 times an epoch, and puts a context before prompts that decoding has not.
    dataset |= {"data_split_num": 1, "prompt_classes": None}
    # batch_size alone sizes a batch: upstream's limit of ten utterances makes batches of short turns tiny.
    dataset.setdefault("batch_size_sample_max", 10**6)
    # Features are made by the workers: as many as there are cores for each process, up to what a GPU can use.
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    dataset.setdefault("num_workers", max(1, min(16, cores)))
    if not torch.cuda.is_available():
        # CPUs have no fast bf16 path for this model.
        config.setdefault("train_conf", {})["use_bf16"] = False
        config.setdefault("llm_conf", {})["llm_dtype"] = "fp32"
    try:
        config = download_model(is_training=True, **config)
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise UserError(f"{model_dir}: config.yaml or configuration.json cannot be read: {error}") from error
    if absent := [name for name in ("audio_encoder", "audio_adaptor", "llm", "frontend") if not config.get(name)]:
        raise UserError(f"{model_dir}/config.yaml says nothing of {', '.join(absent)}: not a Fun-ASR-Nano folder")
    config["frontend_conf"].setdefault("dither", 0.0)  # upstream's 1.0 is noise, in dev and decoding too
    paths = {"the LLM folder": config["llm_conf"].get("init_param_path")}
    if config.get("ctc_decoder"):
        paths["the CTC vocabulary"] = config["dataset_conf"].get("ctc_tokenizer_conf", {}).get("vocab_path")
    for what, path in paths.items():
        # FunASR makes a path absolute that exists in the folder and is named in configuration.json, and no other.
        if not path or not Path(path).is_absolute() or not Path(path).exists():
            raise UserError(f"{model_dir}: {what} ({path}) is not there, or configuration.json does not name it under "
                            "file_path_metas; download the model again")  # fmt: skip
    return config


def check_settings(config: dict[str, Any], path: Path) -> None:
    """What an effective configuration chooses by name is FunASR's, and takes its settings; else UserError, code 2."""
    from funasr.optimizers import optim_classes
    from funasr.register import tables
    from funasr.schedulers import scheduler_classes

    def check(key: str, name: Any, names: Iterable[str]) -> None:
        if name not in list(names):
            raise UserError(f"{path}: {key} {name}: FunASR has {', '.join(sorted(names))}", code=2)

    def make(key: str, takes: Callable) -> Any:
        conf = config.get(key) or {}
        try:
            return takes(**conf)
        except Exception as error:  # each library has its own
            raise UserError(f"{path}: {key} {conf}: {first_line(error)}", code=2) from error

    optim, scheduler, specaug = config.get("optim", "adam"), config.get("scheduler", "warmuplr"), config.get("specaug")
    check("avg_keep_nbest_models_type", config["train_conf"].get("avg_keep_nbest_models_type", "acc"), ("acc", "loss"))
    check("batch_type", config["dataset_conf"].get("batch_type", "example"), ("example", "length", "token"))
    check("optim", optim, optim_classes)
    check("scheduler", scheduler, scheduler_classes)
    optimizer = make("optim_conf", lambda **conf: optim_classes[optim]([torch.nn.Parameter(torch.zeros(1))], **conf))
    make("scheduler_conf", lambda **conf: scheduler_classes[scheduler](optimizer, **conf))
    if specaug:
        check("specaug", specaug, tables.specaug_classes)
        make("specaug_conf", lambda **conf: tables.specaug_classes[specaug](**conf)(torch.zeros(1, 100, 560)))


def batch_frames(dataset: dict[str, Any], longest: int) -> tuple[bool, int]:
    """Whether batches are made by length, not of so many rows; the most 10 ms frames of one."""
    by_length = dataset.get("batch_type", "example") != "example"
    return by_length, max(longest, dataset["batch_size"] * (1 if by_length else longest))


def build_on_meta(config: dict[str, Any]) -> torch.nn.Module:
    """The model that an effective configuration describes, in this recipe's class, without memory for its tensors."""
    from funasr.auto.auto_model import deep_update
    from funasr.register import tables

    import nano.model  # noqa: F401  registers the class

    model_class = tables.model_classes.get(config["model"])
    if model_class is None:
        raise UserError(f"FunASR has no model {config['model']}; this recipe is for FunASRNano")
    frontend = tables.frontend_classes.get(config["frontend"])(**config.get("frontend_conf", {}))
    arguments = dict(config.get("model_conf", {}))
    deep_update(arguments, {**config, "input_size": frontend.output_size(), "vocab_size": -1})
    with torch.device("meta"):
        return model_class(**arguments)


def stage_parser(description: str) -> argparse.ArgumentParser:
    """A command line that names a stage's training: for train.py, and check_training.py before and after it."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage_conf", type=Path, required=True, help="The stage's YAML: what it changes, no more.")
    parser.add_argument("--overlay", type=Path, action="append", default=[], help="YAML laid over it (the demo's).")
    parser.add_argument("--model_dir", type=Path, required=True, help="Model folder with config.yaml and tokenizer.")
    parser.add_argument("--init_checkpoint", type=Path, required=True, help="Weights training starts from.")
    parser.add_argument("--train_list", type=Path, required=True, help="Formatted JSONL to train on.")
    parser.add_argument("--valid_list", type=Path, required=True, help="Formatted JSONL that ranks checkpoints.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Experiment folder of the stage.")
    parser.add_argument("--frontend_fs", type=int, default=16000, help="Sampling rate of audio and features, Hz.")
    return parser
