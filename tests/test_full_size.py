"""The recipe fits the released model: its geometry is built from FunASR's classes, without memory for the weights."""

from pathlib import Path

import pytest
import torch

import full_size
from check_training import check_checkpoint
from download_model import check_model
from nano.config import build_on_meta, effective
from nano.trainer import count_parameters


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return full_size.build_folder(tmp_path_factory.mktemp("Fun-ASR-Nano-2512"))


def millions(counts: dict[str, int]) -> dict[str, float]:
    return {name: round(count / 1e6, 2) for name, count in counts.items()}


@pytest.mark.parametrize(("stage", "expected"), [
    ("stage1_encoder_adapt", {"audio_encoder": 221.14}),
    ("stage2_adapter_align", {"audio_adaptor": 12.60, "ctc_decoder": 8.02, "ctc": 31.04}),
    ("stage3_lora_domain", {"lora": 2.29}),
])  # fmt: skip
def test_each_stage_trains_its_module_of_the_real_model(folder, stage, expected):
    counts = count_parameters(build_on_meta(full_size.stage_config(folder, stage)))
    assert millions({name: count["trainable"] for name, count in counts.items() if count["trainable"]}) == expected


def test_the_whole_model_has_the_published_size(folder):
    model = build_on_meta(effective({}, folder, 16000))
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in model.named_children()}
    assert millions(sizes)["llm"] == 596.05
    assert sum(sizes.values()) == pytest.approx(0.87e9, rel=0.01)


def released(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors as ModelScope's model.pt holds them: the LLM in bf16, the rest in fp32; shapes only."""
    state = build_on_meta(effective({}, folder, 16000)).state_dict()
    return {name: tensor.to(torch.bfloat16) if name.startswith("llm.") else tensor for name, tensor in state.items()}


@pytest.mark.parametrize("with_ctc", [True, False])
def test_a_checkpoint_of_the_released_layout_is_accepted_with_and_without_ctc(folder, with_ctc, caplog):
    state = released(folder)
    if not with_ctc:
        state = {name: tensor for name, tensor in state.items() if not name.startswith(("ctc.", "ctc_decoder."))}
    torch.save({"state_dict": state}, folder / "model.pt")
    checked = check_model(folder)
    assert checked["ctc"] is with_ctc
    assert sum(checked["parameters"].values()) == pytest.approx(0.87e9, rel=0.01)
    config = full_size.stage_config(folder, "stage1_encoder_adapt")
    check_checkpoint(build_on_meta(config), folder / "model.pt", config)
    assert ("CTC: the checkpoint has no weights of it" in caplog.text) is not with_ctc
