"""Build a miniature Fun-ASR-Nano folder with random weights: the released layout and classes, a few MB.

The demo trains one from scratch, the tests decode with one. Both tokenizers are closed over the given
alphabet and give one token per character, so a vocabulary of some hundred symbols is learnt in minutes.

    build_folder("exp_output/demo/base_model", alphabet="你好我是……0123456789", size={}, seed=0)
"""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import torch
import yaml

# Decodes best of the geometries tried on two CPU cores; initializer_range 0.02 (Qwen3's own) does not learn to
# align in minutes, and downsample_rate 8 gives the LLM every adaptor frame instead of the first eighth.
DEFAULT_SIZE = {
    "encoder_dim": 128, "encoder_blocks": 4, "encoder_heads": 4, "encoder_ffn": 256, "dropout": 0.1,
    "adaptor_ffn": 256, "adaptor_layers": 1, "adaptor_downsample_rate": 8,
    "llm_dim": 128, "llm_layers": 2, "llm_heads": 4, "llm_kv_heads": 2, "llm_head_dim": 32, "llm_ffn": 384,
    "llm_initializer_range": 0.08, "ctc_ffn": 256, "ctc_layers": 1,
}

LLM_FOLDER = "Qwen3-0.6B"
CTC_VOCABULARY = "multilingual.tiktoken"
# The fixed parts of FunASR's prompt as single tokens, or they would cost more positions than the speech does.
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PROMPT_TOKENS = [
    "system\n", "user\n", "assistant\n", "You are a helpful assistant.", "语音转写：", "语音转写，不进行文本规整：",
]


def build_folder(path: str | os.PathLike, alphabet: str, size: dict[str, Any] | None = None, seed: int = 0) -> Path:
    """Write the model folder `path`: config.yaml, configuration.json, model.pt, LLM tokenizer, CTC vocabulary.

    `size` overrides entries of DEFAULT_SIZE. The same arguments give the same weights.
    """
    from funasr import AutoModel  # seconds to import, and only this function needs it

    path, size = Path(path), {**DEFAULT_SIZE, **(size or {})}
    path.mkdir(parents=True, exist_ok=True)
    (path / "model.pt").unlink(missing_ok=True)  # FunASR would load it into the new model
    symbols = sorted(set(alphabet) | {"\n"})
    _write_llm(path / LLM_FOLDER, symbols, size)
    _write_ctc_vocabulary(path / CTC_VOCABULARY, symbols)
    _write_json(path / "configuration.json", _configuration())
    # The tokenizer's special tokens and 1,501 time stamps follow the vocabulary; no text encodes to them.
    config = _config(size, ctc_vocab_size=len((path / CTC_VOCABULARY).read_bytes().splitlines()) + 1)
    (path / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True, sort_keys=False), encoding="utf-8")
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
        initializer_range=size["llm_initializer_range"], max_position_embeddings=2048, tie_word_embeddings=True,
        eos_token_id=fast.eos_token_id, pad_token_id=fast.pad_token_id, bos_token_id=fast.pad_token_id,
    ).save_pretrained(folder)


def _write_ctc_vocabulary(path: Path, symbols: list[str]) -> None:
    # tiktoken joins the adjacent pair of lowest rank, so a character of three bytes is one token
    # only when its first two bytes are a token of lower rank.
    tokens = [bytes([value]) for value in range(256)]
    encoded = [symbol.encode("utf-8") for symbol in symbols]
    for length in range(2, 5):
        tokens += sorted({code[:length] for code in encoded if len(code) >= length})
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    path.write_text("".join(lines), encoding="ascii")


def _config(size: dict[str, Any], ctc_vocab_size: int) -> dict[str, Any]:
    """The keys of the released config.yaml, with the sizes of the miniature."""
    return {
        "model": "FunASRNano",
        "model_conf": {"lsm_weight": 0.1, "length_normalized_loss": True},
        "audio_encoder": "SenseVoiceEncoderSmall",
        "audio_encoder_conf": {
            "output_size": size["encoder_dim"], "attention_heads": size["encoder_heads"],
            "linear_units": size["encoder_ffn"], "num_blocks": size["encoder_blocks"], "tp_blocks": 0,
            "dropout_rate": size["dropout"], "positional_dropout_rate": size["dropout"],
            "attention_dropout_rate": size["dropout"], "input_layer": "pe",
            "pos_enc_class": "SinusoidalPositionEncoder", "normalize_before": True, "kernel_size": 11,
            "sanm_shfit": 0, "selfattention_layer_type": "sanm", "freeze": True, "freeze_layer_num": -1,
            "feat_permute": True,
        },
        "llm": "Qwen3-0.6b",
        "llm_conf": {
            "hub": "hf", "freeze": True, "llm_dtype": "fp32", "init_param_path": LLM_FOLDER, "use_lora": False,
            "lora_conf": {
                "task_type": "CAUSAL_LM", "r": 16, "lora_alpha": 32, "lora_dropout": 0.05, "bias": "none",
                "target_modules": ["q_proj", "v_proj"],
            },
        },
        "audio_adaptor": "Transformer",
        "audio_adaptor_conf": {
            "downsample_rate": size["adaptor_downsample_rate"], "use_low_frame_rate": True,
            "ffn_dim": size["adaptor_ffn"], "llm_dim": size["llm_dim"], "encoder_dim": size["encoder_dim"],
            "n_layer": size["adaptor_layers"], "freeze": True,
        },
        "ctc_decoder": "Transformer",
        "detach_ctc_decoder": True,
        "ctc_decoder_conf": {
            "downsample_rate": 1, "ffn_dim": size["ctc_ffn"], "llm_dim": size["encoder_dim"],
            "encoder_dim": size["encoder_dim"], "n_layer": size["ctc_layers"], "freeze": False,
        },
        "ctc_weight": 1.0,
        "ctc_vocab_size": ctc_vocab_size,
        "ctc_conf": {"dropout_rate": 0.0, "ctc_type": "builtin", "reduce": True, "ignore_nan_grad": True},
        "frontend": "WavFrontend",
        # Features are random with FunASR's default dither of 1.0; 0 makes a transcript repeatable.
        "frontend_conf": {
            "fs": 16000, "window": "hamming", "n_mels": 80, "frame_length": 25, "frame_shift": 10,
            "lfr_m": 7, "lfr_n": 6, "dither": 0.0, "cmvn_file": None,
        },
        **_training_config(),
        "tokenizer": "HuggingfaceTokenizer",
        "tokenizer_conf": {"init_param_path": "${llm_conf.init_param_path}"},
        "enable_tf32": True, "debug": False, "train_data_set_list": None, "valid_data_set_list": None,
        "init_param": None, "output_dir": None,
    }


def _training_config() -> dict[str, Any]:
    return {
        "train_conf": {
            "accum_grad": 1, "grad_clip": 5, "max_epoch": 2, "keep_nbest_models": 200, "log_interval": 100,
            "effective_save_name_excludes": ["llm."], "resume": True, "validate_interval": 2000,
            "save_checkpoint_interval": 2000, "avg_nbest_model": 100, "use_bf16": False, "use_deepspeed": True,
            "deepspeed_config": None, "save_init_model": False,
        },
        "optim": "adamw",
        "optim_conf": {"lr": 5.0e-06, "weight_decay": 0.0},
        "scheduler": "warmuplr",
        "scheduler_conf": {"warmup_steps": 2500},
        "dataset": "FunASR",
        "dataset_conf": {
            "index_ds": "FunASR", "batch_sampler": "BatchSampler", "batch_type": "token", "batch_size": 6000,
            "max_token_length": 3500, "shuffle": True, "sort_size": 1024, "batch_size_scale_ratio_max": 2,
            "num_workers": 4, "audio_adaptor_downsample_rate": "${audio_adaptor_conf.downsample_rate}",
            "audio_encoder_downsample_rate": 6, "data_split_num": 256, "batch_size_sample_max": 10, "retry": 2000,
            "batch_size_token_max": 6000, "max_source_length": 12000, "max_target_length": 2048,
            "prompt_classes": "MultiContextPrompt",
            "prompt_conf": {
                "max_neg_hotwords_num": 0, "min_neg_hotwords_num": 0, "use_hist": False, "use_one_pass_result": True,
                "use_hotwords": True, "use_asr_hotwords": True, "chinese_hotwords_list": None,
                "english_hotwords_list": None,
            },
            "ctc_tokenizer": "SenseVoiceTokenizer",
            "ctc_target_normalize": True,
            "ctc_tokenizer_conf": {"vocab_path": None, "is_multilingual": True, "num_languages": 2},
            "min_source_length": 10, "batch_size_scale_threshold": 3000, "use_dynamic_output_ratio": 0.0,
        },
    }


def _configuration() -> dict[str, Any]:
    # FunASR makes exactly these relative paths absolute when it loads the folder.
    return {
        "framework": "pytorch",
        "task": "auto-speech-recognition",
        "model": {"type": "funasr"},
        "pipeline": {"type": "funasr-pipeline"},
        "file_path_metas": {
            "init_param": "model.pt",
            "config": "config.yaml",
            "llm_conf": {"init_param_path": LLM_FOLDER},
            "tokenizer_conf": {"init_param_path": LLM_FOLDER},
            "dataset_conf": {"ctc_tokenizer_conf": {"vocab_path": CTC_VOCABULARY}},
        },
    }


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
