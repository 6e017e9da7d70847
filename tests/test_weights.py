"""Folding LoRA and interpolating change what they should, nothing else, and never leave half a file."""

import pytest
import torch

import final_model
from common import UserError
from mini import helper_here
from nano import weights
from score import choose_alpha


def make_lora_state(rank=4):
    torch.manual_seed(0)
    return {
        "llm.q_proj.weight": torch.randn(8, 6),
        "llm.q_proj.lora_A": torch.randn(rank, 6),
        "llm.q_proj.lora_B": torch.randn(8, rank),
        "llm.q_proj.bias": torch.randn(8),
        "encoder.weight": torch.randn(3, 3),
    }


def test_folding_adds_the_scaled_product_in_float32_and_drops_the_pair(tmp_path):
    state = make_lora_state()
    torch.save({"state_dict": state, "lora": {"r": 4, "lora_alpha": 8}}, tmp_path / "a.pt")
    folded = weights.load_folded(tmp_path / "a.pt")
    assert sorted(folded) == ["encoder.weight", "llm.q_proj.bias", "llm.q_proj.weight"]
    expected = state["llm.q_proj.weight"].double() + 2.0 * (
        state["llm.q_proj.lora_B"].double() @ state["llm.q_proj.lora_A"].double())
    assert folded["llm.q_proj.weight"].dtype == torch.float32
    torch.testing.assert_close(folded["llm.q_proj.weight"].double(), expected, atol=1e-5, rtol=1e-5)
    assert folded["encoder.weight"].equal(state["encoder.weight"])


@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_an_llm_of_bfloat16_keeps_updates_that_are_smaller_than_its_steps(alpha):
    torch.manual_seed(0)
    down, up = torch.randn(16, 1024) / 32, 1.5e-4 * torch.randn(256, 16)
    base = {"llm.q_proj.weight": (0.03 * torch.randn(256, 1024)).bfloat16()}
    pair = {"llm.q_proj.lora_A": down, "llm.q_proj.lora_B": up}
    adapted = weights.fold_lora(base | pair, {"r": 16, "lora_alpha": 32})
    mixed, again = (weights.interpolate(base, adapted, alpha)["llm.q_proj.weight"] for _ in range(2))
    assert mixed.equal(mixed.bfloat16().float()) and mixed.equal(again)
    assert mixed.equal(adapted["llm.q_proj.weight"]) == (alpha == 1)
    assert weights.interpolate(base, adapted, 0.0)["llm.q_proj.weight"].equal(base["llm.q_proj.weight"].float())
    heard = torch.randn(64, 16) @ down
    wanted, found = heard @ (alpha * 2 * (up @ down)).T, heard @ (mixed - base["llm.q_proj.weight"].float()).T
    assert (wanted * found).sum() / wanted.square().sum() == pytest.approx(1, abs=0.02)
    nearest = (base["llm.q_proj.weight"].float() + alpha * 2 * (up @ down)).bfloat16()
    lost = heard @ (nearest.float() - base["llm.q_proj.weight"].float()).T
    assert (wanted * lost).sum() / wanted.square().sum() < 0.8, "what it is for"


def test_lora_without_its_settings_or_of_another_rank_is_refused(tmp_path):
    torch.save({"state_dict": make_lora_state()}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="lora_alpha"):
        weights.load(tmp_path / "a.pt")
    with pytest.raises(UserError, match="rank 4"):
        weights.fold_lora(make_lora_state(), {"r": 8, "lora_alpha": 16})


@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s}, lambda s: {"model": {"state_dict": s}},
                                  lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}, "epoch": 3}])
def test_every_container_funasr_writes_is_read(tmp_path, wrap):
    state = {"a": torch.ones(2), "b": torch.zeros(1)}
    torch.save(wrap(state), tmp_path / "m.pt")
    assert sorted(weights.load_folded(tmp_path / "m.pt")) == ["a", "b"]


def test_interpolation_is_exact_at_both_ends_and_leaves_frozen_and_tied_tensors_alone():
    torch.manual_seed(0)
    shared, frozen = torch.randn(4, 4), torch.randn(5).to(torch.bfloat16)
    base = {"emb": shared, "head": shared, "frozen": frozen, "w": torch.randn(3), "steps": torch.tensor(3)}
    moved = shared + 1.0
    adapted = {"emb": moved, "head": moved, "frozen": frozen.clone(), "w": torch.randn(3), "steps": torch.tensor(9)}
    for alpha, expected in ((0.0, base), (1.0, adapted)):
        mixed = weights.interpolate(base, adapted, alpha)
        assert all(mixed[name].equal(expected[name]) for name in ("emb", "head", "frozen", "w"))
    mixed = weights.interpolate(base, adapted, 0.25)
    torch.testing.assert_close(mixed["w"], 0.75 * base["w"] + 0.25 * adapted["w"])
    assert mixed["frozen"].equal(frozen) and mixed["frozen"].dtype == torch.bfloat16
    assert mixed["emb"].data_ptr() == mixed["head"].data_ptr()
    assert mixed["steps"] == 9


@pytest.mark.parametrize("zipped", [True, False])
def test_frozen_tensors_of_an_average_are_the_initial_checkpoints_in_whatever_form_it_is(tmp_path, zipped):
    initial = {"model": {"module.frozen": torch.tensor([1.0]), "module.w": torch.tensor([1.0])}}
    torch.save(initial, tmp_path / "model.pt", _use_new_zipfile_serialization=zipped)
    for number in (2.0, 4.0):
        state = {"frozen": torch.tensor([number]), "w": torch.tensor([number])}
        torch.save({"state_dict": state}, tmp_path / f"{number}.pt")
    mean = weights.average([tmp_path / "2.0.pt", tmp_path / "4.0.pt"], {"w"}, tmp_path / "model.pt")
    assert mean == {"frozen": torch.tensor([1.0]), "w": torch.tensor([3.0])}


def test_models_that_do_not_belong_together_are_refused():
    with pytest.raises(UserError, match="lacks 1 tensors, first b"):
        weights.interpolate({"a": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)}, 0.5)
    with pytest.raises(UserError, match="a is"):
        weights.interpolate({"a": torch.ones(1)}, {"a": torch.ones(2)}, 0.5)


def mix(*arguments):
    return helper_here(final_model.main, "mix", *arguments)


def test_mixing_on_the_command_line_folds_lora_and_is_exact_at_both_ends(tmp_path):
    base = {name: t for name, t in make_lora_state().items() if "lora" not in name}
    torch.save(base, tmp_path / "model.pt")
    torch.save({"state_dict": make_lora_state(), "lora": {"r": 4, "lora_alpha": 8}}, tmp_path / "averaged.pt")
    ends = base, weights.load_folded(tmp_path / "averaged.pt")
    for alpha, expected in enumerate(ends):
        done = mix("--base", tmp_path / "model.pt", "--adapted", tmp_path / "averaged.pt", "--alpha", alpha,
                   "--output", tmp_path / "mixed.pt")
        assert done.returncode == 0, done.stderr
        state, lora = weights.load(tmp_path / "mixed.pt")
        assert lora is None and all(state[name].equal(expected[name].to(state[name].dtype)) for name in expected)
    assert mix("--base", "a", "--adapted", "b", "--alpha", 1.5, "--output", tmp_path / "c.pt").returncode == 2


def test_the_weight_may_be_the_choice_of_score(tmp_path):
    torch.save({"w": torch.zeros(3)}, tmp_path / "base.pt")
    torch.save({"w": torch.ones(3)}, tmp_path / "adapted.pt")
    (tmp_path / "chosen.json").write_text('{"alpha": 0.75, "reason": "lowest"}')
    paths = "--base", tmp_path / "base.pt", "--adapted", tmp_path / "adapted.pt", "--output", tmp_path / "mixed.pt"
    assert mix(*paths, "--alpha", tmp_path / "chosen.json").returncode == 0
    assert weights.load(tmp_path / "mixed.pt")[0]["w"].equal(torch.full((3,), 0.75))
    (tmp_path / "other.json").write_text('{"beta": 1}')
    for wrong in ("other.json", "none.json"):
        refused = mix(*paths, "--alpha", tmp_path / wrong)
        assert refused.returncode == 2 and f"{wrong} is no choice of score.py" in refused.stderr


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_a_broken_checkpoint_is_one_line_and_leaves_nothing(tmp_path, content):
    if content is not None:
        (tmp_path / "x.pt").write_bytes(content)
    done = mix("--base", tmp_path / "x.pt", "--adapted", tmp_path / "x.pt", "--alpha", 1, "--output", tmp_path / "y.pt")
    assert done.returncode in (1, 2)
    assert done.stderr.count("\n") == 1 and "x.pt" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "y.pt").exists()


def score_row(model, test_set, cer):
    return {"model": model, "test_set": test_set, "cer": cer}


def test_a_checkpoint_that_finds_no_space_left_is_one_line_and_leaves_nothing(tmp_path, disk):
    torch.save({"w": torch.ones(300_000)}, tmp_path / "a.pt")
    folder = disk("size=64k")
    done = helper_here(final_model.main, "mix", "--base", tmp_path / "a.pt", "--adapted", tmp_path / "a.pt",
                       "--alpha", 0.5, "--output", folder / "mix.pt")  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith("error: No space left") and done.stderr.count("\n") == 1
    assert not list(folder.iterdir())


def test_the_best_telephone_model_within_the_wideband_budget_is_chosen():
    rows = [score_row("base", "wideband_dev", 0.050)]
    for alpha, simulated, real, wideband in (("0.25", 0.3, 0.4, 0.052), ("0.50", 0.2, 0.3, 0.058),
                                             ("1.00", 0.1, 0.2, 0.090)):  # fmt: skip
        rows += [score_row(f"alpha_{alpha}", "simulated_dev", simulated),
                 score_row(f"alpha_{alpha}", "real_dev", real),
                 score_row(f"alpha_{alpha}", "wideband_dev", wideband)]
    assert choose_alpha(rows, 0.01)["alpha"] == 0.5
    choice = choose_alpha(rows, 0.05)
    assert choice["alpha"] == 1.0
    assert [point["alpha"] for point in choice["curve"]] == [0.25, 0.5, 1.0]
    assert choice["curve"][0]["telephone_cer"] == pytest.approx(0.35)
    choice = choose_alpha(rows, 0.00125)
    assert choice["alpha"] == 0.25 and "0.125 points of wideband CER; this one loses least" in choice["reason"]


def test_without_wideband_dev_nothing_is_chosen():
    with pytest.raises(UserError, match="wideband_dev"):
        choose_alpha([score_row("alpha_0.50", "real_dev", 0.2), score_row("base", "real_dev", 0.1)], 0.01)
