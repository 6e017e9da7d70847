"""One forward and backward of each training stage at the size of Fun-ASR-Nano-2512, with random weights, on a CPU.

    python bench/full_size.py --work exp_output/full_size

Builds a folder of the released layout and geometry (not its weights), takes each conf/stage*.yaml, and prints seconds
and peak memory of a training step. Fails when a gradient is missing, not finite, or where none belongs.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "local"), str(ROOT / "demo")]

import audio  # noqa: E402
from common import UserError, run, write_json, write_jsonl  # noqa: E402

STAGES = ("stage1_encoder_adapt", "stage2_adapter_align", "stage3_lora_domain")
ALPHABET = "您好请问订单号是多少一二三四五六七八九零"
UTTERANCES, SECONDS = 2, 10  # of the batch
# What the released config.yaml says where the miniature's says something smaller.
GEOMETRY = {
    "size": {"encoder_dim": 512, "encoder_blocks": 50, "encoder_ffn": 2048, "adaptor_ffn": 2048, "ctc_ffn": 2048,
             "llm_dim": 1024},
    "audio_encoder_conf": {"tp_blocks": 20},
    "audio_adaptor_conf": {"downsample_rate": 1, "n_layer": 2},
    "ctc_decoder_conf": {"n_layer": 5},
    "ctc_vocab_size": 60515,
}  # fmt: skip
QWEN3 = {
    "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True,
    "max_position_embeddings": 40960, "rope_theta": 1000000,
}  # fmt: skip


def build_folder(path: Path) -> Path:
    """Write a model folder of the real geometry without weights; its tokenizers know ALPHABET only."""
    from transformers import Qwen3Config

    import miniature

    config = OmegaConf.merge(OmegaConf.load(miniature.CONFIG), GEOMETRY)
    llm = path / miniature.LLM_FOLDER
    small = {"llm_layers": 1, "llm_heads": 1, "llm_kv_heads": 1, "llm_head_dim": 16, "llm_ffn": 16}
    miniature._write_llm(llm, sorted(set(ALPHABET)), OmegaConf.to_container(config["size"]) | small)
    Qwen3Config(**QWEN3).save_pretrained(llm)
    miniature._write_ctc_vocabulary(path / miniature.CTC_VOCABULARY, sorted(set(ALPHABET)))
    OmegaConf.resolve(config)
    del config["size"]
    OmegaConf.save(config, path / "config.yaml")
    write_json(path / "configuration.json", {"file_path_metas": miniature.FILE_PATH_METAS})
    return path


def stage_config(folder: Path, stage: str) -> dict[str, Any]:
    """The folder's config.yaml under a stage's YAML."""
    import nano.dataset
    import nano.model  # noqa: F401  registered under FunASR's names
    from nano.config import effective, read_stage

    return effective(read_stage([ROOT / "conf" / f"{stage}.yaml"]), folder, 16000)


def make_batch(kwargs: dict[str, Any], work: Path) -> dict[str, Any]:
    """A training batch of noise with a text, by the real dataset and frontend."""
    from funasr.register import tables

    rng, rows = np.random.default_rng(0), []
    for number in range(UTTERANCES):
        path = work / f"{number}.wav"
        audio.write(path, (0.1 * rng.standard_normal(16000 * SECONDS)).astype(np.float32), 16000)
        user = f"语音转写：<|startofspeech|>!{path}<|endofspeech|>"
        texts = [("system", "You are a helpful assistant."), ("user", user), ("assistant", ALPHABET)]
        messages = [{"role": role, "content": content} for role, content in texts]
        rows.append({"key": f"u{number}", "messages": messages, "speech_length": 100 * SECONDS,
                     "text_length": len(ALPHABET)})  # fmt: skip
    write_jsonl(work / "list.jsonl", rows)
    dataset = tables.dataset_classes["FunASR"](
        str(work / "list.jsonl"), frontend=kwargs["frontend"], tokenizer=kwargs["tokenizer"], is_training=True,
        **kwargs["dataset_conf"],
    )  # fmt: skip
    return dataset.collator([dataset[index] for index in range(UTTERANCES)])


def step(stage: str, work: Path) -> None:
    """Build the stage's model, run one training step without the optimiser, print what it took."""
    from funasr import AutoModel

    began = time.perf_counter()
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # on a CPU, whatever else the machine has
    config = stage_config(work / "model", stage)
    built, kwargs = AutoModel.build_model(**config | {"device": "cpu", "ncpu": torch.get_num_threads(), "seed": 0})
    batch = make_batch(kwargs, work)
    built.train()
    ready = time.perf_counter()
    loss, _stats, _weight = built(**batch)
    forward = time.perf_counter()
    loss.backward()
    done = time.perf_counter()
    for name, parameter in built.named_parameters():
        if parameter.requires_grad and (parameter.grad is None or not torch.isfinite(parameter.grad).all()):
            raise UserError(f"{stage}: {name} has no finite gradient")
        if not parameter.requires_grad and parameter.grad is not None:
            raise UserError(f"{stage}: {name} is frozen but has a gradient")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    from nano.trainer import count_parameters

    counts = {module: count["trainable"] for module, count in count_parameters(built).items() if count["trainable"]}
    trained = ", ".join(f"{module} {count / 1e6:.2f} M" for module, count in counts.items())
    print(f"{stage}: trains {trained}; loss {loss.item():.2f}; built in {ready - began:.0f} s, forward "
          f"{forward - ready:.1f} s, backward {done - forward:.1f} s for {UTTERANCES} x {SECONDS} s of audio, "
          f"peak {peak:.1f} GiB")  # fmt: skip


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="Folder for the model's config and the audio.")
    parser.add_argument("--stage", choices=STAGES, help="This stage only, in this process.")
    return parser.parse_args()


def main() -> None:
    args = get_args()
    if args.stage:
        step(args.stage, args.work)
        return
    build_folder(args.work / "model")
    for stage in STAGES:  # a process each: a peak of memory is one of a process
        command = [sys.executable, __file__, "--work", args.work, "--stage", stage]
        if subprocess.run(command, check=False).returncode:
            raise UserError(f"{stage} failed; see the lines above")


if __name__ == "__main__":
    run(main)
