"""Build a miniature Fun-ASR-Nano folder with random weights: the released layout and classes, a few MB.

The demo trains one from scratch, the tests decode with one. Both tokenizers are closed over the given
alphabet and give one token per character, so a vocabulary of some hundred symbols is learnt in minutes.

    build_folder("exp_output/demo/base_model", alphabet="你好我是……0123456789", size={}, seed=0)
"""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from common import NO_SPEECH, write_json

CONFIG = Path(__file__).resolve().parents[1] / "conf" / "demo" / "miniature.yaml"
LLM_FOLDER = "Qwen3-0.6B"
CTC_VOCABULARY = "multilingual.tiktoken"
# The fixed parts of FunASR's prompt, and its mark of silence, as single tokens, or they would cost more positions than
# the speech does.
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PROMPT_TOKENS = [
    "system\n", "user\n", "assistant\n", "You are a helpful assistant.", "语音转写：", "语音转写，不进行文本规整：",
    NO_SPEECH,
]
# FunASR makes exactly these relative paths absolute when it loads the folder.
FILE_PATH_METAS = {
    "init_param": "model.pt",
    "config": "config.yaml",
    "llm_conf": {"init_param_path": LLM_FOLDER},
    "tokenizer_conf": {"init_param_path": LLM_FOLDER},
    "dataset_conf": {"ctc_tokenizer_conf": {"vocab_path": CTC_VOCABULARY}},
}


def build_folder(path: str | os.PathLike, alphabet: str, size: dict[str, Any] | None = None, seed: int = 0) -> Path:
    """Write the model folder `path`: config.yaml, configuration.json, model.pt, LLM tokenizer, CTC vocabulary.

    `size` overrides entries of `size` in conf/demo/miniature.yaml. The same arguments give the same weights.
    """
    from funasr import AutoModel  # seconds to import, and only this function needs it

    path, config = Path(path), OmegaConf.merge(OmegaConf.load(CONFIG), {"size": size or {}})
    path.mkdir(parents=True, exist_ok=True)
    (path / "model.pt").unlink(missing_ok=True)  # FunASR would load it into the new model
    symbols = sorted(set(alphabet) | {"\n"})
    _write_llm(path / LLM_FOLDER, symbols, config["size"])
    # The tokenizer's special tokens and 1,501 time stamps follow the vocabulary; no text encodes to them.
    config["ctc_vocab_size"] = _write_ctc_vocabulary(path / CTC_VOCABULARY, symbols) + 1
    OmegaConf.resolve(config)
    del config["size"]
    OmegaConf.save(config, path / "config.yaml")
    write_json(path / "configuration.json", {
        "framework": "pytorch", "task": "auto-speech-recognition", "model": {"type": "funasr"},
        "pipeline": {"type": "funasr-pipeline"}, "file_path_metas": FILE_PATH_METAS,
    })
    model, _ = AutoModel.build_model(
        model=str(path), device="cpu", seed=seed, disable_update=True, ncpu=torch.get_num_threads()
    )
    torch.save(model.state_dict(), path / "model.pt")
    return path


def _write_llm(folder: Path, symbols: list[str], size: dict[str, Any]) -> None:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config

    vocabulary = {token: index for index, token in enumerate([*SPECIAL_TOKENS, "<unk>", *symbols])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in [*SPECIAL_TOKENS, *PROMPT_TOKENS]])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<|endoftext|>", eos_token="<|im_end|>",
        clean_up_tokenization_spaces=False,
    )
    fast.save_pretrained(folder)
    Qwen3Config(
        vocab_size=len(fast), hidden_size=size["llm_dim"], intermediate_size=size["llm_ffn"],
        num_hidden_layers=size["llm_layers"], num_attention_heads=size["llm_heads"],
        num_key_value_heads=size["llm_kv_heads"], head_dim=size["llm_head_dim"],
        initializer_range=0.08,  # Qwen3's own 0.02 does not learn to align in minutes
        max_position_embeddings=2048, tie_word_embeddings=True,
        eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id, bos_token_id=fast.pad_token_id,
    ).save_pretrained(folder)


def _write_ctc_vocabulary(path: Path, symbols: list[str]) -> int:
    # tiktoken joins the adjacent pair of lowest rank, so a character of three bytes is one token
    # only when its first two bytes are a token of lower rank.
    tokens = [bytes([value]) for value in range(256)]
    encoded = [symbol.encode("utf-8") for symbol in symbols]
    for length in range(2, 5):
        tokens += sorted({code[:length] for code in encoded if len(code) >= length})
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    path.write_text("".join(lines), encoding="ascii")
    return len(tokens)
