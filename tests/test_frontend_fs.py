"""FRONTEND_FS=8000: what decoding hears is what training heard."""

import sys

import numpy as np
import pytest
import torch

import decode
from common import write_jsonl
from mini import SMALL, formatted
from miniature import build_folder


@pytest.mark.parametrize("fs", [8000, 16000])
def test_decoding_gives_the_encoder_the_features_of_training(tmp_path, monkeypatch, fs):
    model = build_folder(tmp_path / "model", "一二三四五", SMALL, seed=1)
    samples = 0.1 * np.random.default_rng(0).standard_normal(2 * fs)
    write_jsonl(tmp_path / "list.jsonl", [formatted("a", tmp_path / "a.wav", samples, "三五", fs)])

    from funasr.models.sense_voice.model import SenseVoiceEncoderSmall

    heard = []

    def listen(module, inputs):
        if isinstance(module, SenseVoiceEncoderSmall):
            heard.append(inputs[0].clone())  # upstream's encoder scales it in place

    monkeypatch.setattr(sys, "argv", [
        "decode.py", "--model_dir", str(model), "--checkpoint", f"base={model}/model.pt", "--test_set",
        f"t={tmp_path}/list.jsonl", "--output_dir", str(tmp_path / "out"), "--frontend_fs", str(fs),
    ])  # fmt: skip
    hook = torch.nn.modules.module.register_module_forward_pre_hook(listen)
    try:
        decode.main()
    finally:
        hook.remove()

    from funasr.register import tables
    from omegaconf import OmegaConf

    import nano.dataset  # noqa: F401  features as training makes them

    config = OmegaConf.to_container(OmegaConf.load(model / "config.yaml"))
    frontend = tables.frontend_classes["WavFrontend"](**config["frontend_conf"] | {"fs": fs})
    tokenizer = tables.tokenizer_classes["HuggingfaceTokenizer"](init_param_path=str(model / "Qwen3-0.6B"))
    conf = config["dataset_conf"] | {"prompt_classes": None}
    dataset = tables.dataset_classes["FunASR"](
        str(tmp_path / "list.jsonl"), frontend=frontend, tokenizer=tokenizer, is_training=True, **conf
    )
    trained_on = dataset.collator([dataset[0]])["speech"]
    assert len(heard) == 1 and heard[0].shape == trained_on.shape
    torch.testing.assert_close(heard[0], trained_on, rtol=0, atol=0.01)  # of a natural logarithm: rounding
