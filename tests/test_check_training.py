"""What is refused before training and what fails after it: one message each, and nothing that is right.

What FunASR would do instead without a word is in test_traps.py.
"""

import contextlib
import copy
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml

from check_training import (
    check_after,
    check_before,
    check_checkpoint,
    check_dev,
    check_loss,
    check_room,
    check_rows_used,
    check_shared_memory,
)
from common import UserError, write_json, write_jsonl
from mini import QUICK, ROOT, STAGES, arguments, curves, log_line, train_here
from nano import weights
from nano.batch_size import gpu_bytes
from nano.config import build_on_meta, effective, flat_items, read_stage
from nano.dataset import Once
from nano.model import FunASRNano
from nano.train_log import read_log
from nano.trainer import Trainer, stock

SORTED = {"batch_type": "token", "batch_size": 1500, "num_workers": 0}
YAMLS = [path for path in sorted(ROOT.glob("conf/**/*.yaml")) if path.stem.startswith(("stage", "base_model"))]
KEYS = [(path, key) for path in YAMLS for key in sorted(flat_items(yaml.safe_load(path.read_text())))]


@pytest.fixture
def refused(tmp_path, model_dir, rows):
    """refused(overlay=..., rows=..., ...) -> the message and exit code of the preflight."""

    def refuse(**changed) -> tuple[str, int]:
        with pytest.raises(UserError) as error:
            check_before(arguments(tmp_path, **{"model_dir": model_dir, "rows": rows} | changed))
        return str(error.value), error.value.code

    return refuse


# --- keys


def misspell(key: str) -> str:
    return key + key[-1]


@pytest.mark.parametrize(("path", "key"), KEYS, ids=[f"{path.parent.name}/{path.stem}:{key}" for path, key in KEYS])
def test_a_typo_in_any_key_of_any_stage_yaml_is_refused_with_the_nearest(tmp_path, path, key):
    config = yaml.safe_load(path.read_text())
    *sections, name = key.split(".")
    part = config
    for section in sections:
        part = part[section]
    part[misspell(name)] = part.pop(name)
    typo = ".".join([*sections, misspell(name)])
    (tmp_path / "typo.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(UserError, match=f"the key {typo}; the nearest that is read is {key}$") as error:
        read_stage([tmp_path / "typo.yaml"])
    assert error.value.code == 2


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_stage_yaml_holds_accepted_keys_only_and_at_most_twenty_five(path):
    keys = flat_items(read_stage([path]))
    assert 0 < len(keys) <= (25 if path.stem.startswith("stage") else 40)


@pytest.mark.parametrize(("text", "message"), [
    ("train_conf: 5\n", "nothing reads the key train_conf"), ("- 1\n", "a list"), ("a: [\n", "as YAML"),
    ("5\n", "type: int"), ("optim: adam  # 优化\n", "can't decode"), (None, "No such file"),
    ("model_conf: {ctc_weight: 1}\n", "model_conf.ctc_weight"), ("frontend_conf: {fs: 8000}\n", "frontend_conf.fs"),
    ("dataset_conf: {batch_size_token_max: 9}\n", "batch_size_token_max"), ("lsm_weight: 0.1\n", "lsm_weight"),
])  # fmt: skip
def test_what_is_no_stage_yaml_is_refused(tmp_path, text, message):
    if text is not None:
        (tmp_path / "stage.yaml").write_text(text, "gb18030")
    with pytest.raises(UserError, match=message) as error:
        read_stage([tmp_path / "stage.yaml"])
    assert error.value.code == 2


# --- before


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_is_right_passes(tmp_path, model_dir, rows, stage):
    check_before(arguments(tmp_path, model_dir, rows, stage, QUICK))


@pytest.mark.parametrize(("overlay", "message"), [
    ({"dataset_conf": {"data_split_num": 4}}, "nothing reads the key dataset_conf.data_split_num"),
    ({"dataset_conf": {"prompt_classes": "MultiContextPrompt"}}, "nothing reads the key dataset_conf.prompt_classes"),
    ({"train_conf": {"keep_nbest_models": 10**9}}, "lower train_conf.keep_nbest_models"),
    ({"dataset_conf": {"max_source_length": 150}}, "upstream would skip it"),
    ({"dataset_conf": {"min_source_length": 150}}, "upstream would skip it"),
    ({"dataset_conf": {"max_target_length": 3}}, "upstream would skip it"),
    ({"dataset_conf": {"batch_size": "60k"}}, "dataset_conf.batch_size is '60k', not a number"),
    ({"optim_conf": {"lr": "fast"}}, "optim_conf.lr is 'fast', not a number"),
    ({"train_conf": {"keep_nbest_models": 0}}, "keep_nbest_models is 0; want a whole number from 1"),
    ({"train_conf": {"max_epoch": 2.5}}, "max_epoch is 2.5; want a whole number from 1"),
    ({"dataset_conf": {"sort_size": 0}}, "sort_size is 0; want a whole number from 1"),
    ({"optim_conf": {"lr": -0.001}}, "optim_conf.lr is -0.001; want a number from 0"),
    ({"train_conf": {"grad_clip": None}}, "train_conf.grad_clip is None, not a number"),
    ({"audio_encoder_conf": {"dropout_rate": 1.5}}, "dropout_rate is 1.5; want a number from 0 to 1"),
    ({"optim_conf": {"betas": [0.9, 1.5]}}, "'betas': [0.9, 1.5]}: Invalid beta parameter at index 1"),
    ({"scheduler_conf": {"warmup_steps": 0}}, "scheduler_conf {'warmup_steps': 0}: "),
    ({"specaug_conf": {"freq_mask_width_range": [5, 3]}}, "'freq_mask_width_range': [5, 3]}: AssertionError"),
    ({"specaug_conf": {"num_time_mask": 1.5}}, "'num_time_mask': 1.5}: "),
    ({"train_conf": {"avg_keep_nbest_models_type": "wer"}}, "avg_keep_nbest_models_type wer: FunASR has acc, loss"),
    ({"dataset_conf": {"batch_type": "exmple"}}, "batch_type exmple: FunASR has example, length, token"),
    ({"optim": "adamz"}, "optim adamz: FunASR has adadelta"),
    ({"scheduler": "cosine"}, "scheduler cosine: FunASR has"),
    ({"specaug": "SpecAugLRF"}, "specaug SpecAugLRF: FunASR has SpecAug, SpecAugLFR"),
])  # fmt: skip
def test_a_setting_that_would_lose_data_or_cannot_be_is_refused(refused, overlay, message):
    assert refused(overlay=overlay)[0].count(message) == 1


@pytest.mark.parametrize(("stage", "overlay", "message"), [
    (0, {"audio_encoder_conf": {"freeze": True}, "ctc_weight": 0}, "nothing would be trained"),
    (1, {"ctc_weight": 0}, "the CTC branch is to be trained: nothing would move it"),
    (2, {"llm_conf": {"use_lora": False}}, "nothing would be trained"),
    (2, {"llm_conf": {"lora_conf": {"target_modules": ["q_proj", "v_prj"]}}}, "the LLM has no layer v_prj"),
    (2, {"llm_conf": {"lora_conf": {"target_modules": "q_proj"}}}, "target_modules is 'q_proj', not a list"),
    (2, {"llm_conf": {"lora_conf": {"target_modules": None}}}, "target_modules is None, not a list"),
])  # fmt: skip
def test_a_stage_that_would_not_train_what_it_names_is_refused(refused, stage, overlay, message):
    assert message in refused(stage=STAGES[stage], overlay=overlay)[0]


def edit(row, content=None, **changed):
    row = copy.deepcopy(row) | changed
    if content is not None:
        row["messages"][1]["content"] = content
    return row


@pytest.mark.parametrize(("change", "message"), [
    ({"speech_length": 15000}, "upstream would skip it"), ({"speech_length": 5}, "upstream would skip it"),
    ({"key": "u0"}, "key u0 twice"),
    ({"content": "语音转写："}, "no formatted row"), ({"text_length": None}, None),
])  # fmt: skip
def test_a_row_that_would_not_be_used_is_refused(refused, rows, change, message):
    if message is None:
        bad = {key: value for key, value in rows[3].items() if key != "text_length"}
        message = "list.jsonl:4: no formatted row"
    else:
        bad = edit(rows[3], **change)
    assert message in refused(rows=[*rows[:3], bad])[0]


def test_a_checkpoint_of_another_rate_is_refused(refused, model_dir, rows, tmp_path):
    assert "was trained at 16000 Hz" in refused(frontend_fs=8000, stage=STAGES[2])[0]
    shutil.copytree(model_dir, tmp_path / "stage1")
    shutil.copy(tmp_path / "stage1" / "model.pt", tmp_path / "stage1" / "averaged.pt")
    message, _code = refused(frontend_fs=8000, init_checkpoint=tmp_path / "stage1" / "averaged.pt")
    assert "was trained at 16000 Hz" in message
    (tmp_path / "stage1/config.yaml").write_text("frontend_conf: [")
    message, _code = refused(init_checkpoint=tmp_path / "stage1/averaged.pt")
    assert "stage1/config.yaml: cannot be read as YAML" in message


def test_an_empty_list_and_a_missing_checkpoint_are_refused(refused, tmp_path):
    assert "is empty" in refused(rows=[])[0]
    assert refused(init_checkpoint=tmp_path / "none.pt") == (
        f"{tmp_path}/none.pt does not exist; run the stage that writes it, or correct the path", 2)


@pytest.mark.parametrize(("missing", "message"), [
    ("multilingual.tiktoken", "the CTC vocabulary"), ("Qwen3-0.6B", "the LLM folder"),
])  # fmt: skip
def test_a_folder_without_ctc_vocabulary_or_llm_is_refused_by_name(refused, model_dir, tmp_path, missing, message):
    folder = shutil.copytree(model_dir, tmp_path / "model")
    shutil.move(folder / missing, tmp_path / missing)
    assert message in refused(model_dir=folder, init_checkpoint=model_dir / "model.pt")[0]


def test_features_are_without_noise_where_the_model_folder_says_nothing(model_dir, tmp_path):
    config = yaml.safe_load((model_dir / "config.yaml").read_text())
    del config["frontend_conf"]["dither"]
    shutil.copytree(model_dir, tmp_path / "model")
    (tmp_path / "model/config.yaml").write_text(yaml.safe_dump(config))
    assert effective({}, tmp_path / "model", 16000)["frontend_conf"]["dither"] == 0
    assert effective({"frontend_conf": {"dither": 0.5}}, tmp_path / "model", 16000)["frontend_conf"]["dither"] == 0.5


def test_a_relative_model_folder_is_as_good_as_an_absolute_one(model_dir, monkeypatch):
    monkeypatch.chdir(model_dir.parent)
    assert effective({}, Path(model_dir.name), 16000)["llm_conf"]["init_param_path"] == str(model_dir / "Qwen3-0.6B")


@pytest.fixture(scope="module")
def meta(model_dir):
    """Per stage: the effective configuration and the model without memory."""
    made = {}
    for stage in STAGES:
        config = effective(read_stage([ROOT / "conf" / f"{stage}.yaml"]), model_dir, 16000)
        made[stage] = (config, build_on_meta(config))
    return made


def test_every_tensor_of_the_model_is_accounted_for(meta, model_dir, tmp_path, caplog):
    state, _lora = weights.load(model_dir / "model.pt")
    caplog.set_level("INFO")

    def check(state, stage=STAGES[0], **more):
        torch.save({"state_dict": state, **more}, tmp_path / "c.pt")
        caplog.clear()
        check_checkpoint(meta[stage][1], tmp_path / "c.pt", meta[stage][0])
        return caplog.text

    check(state)
    check({f"module.{name}": tensor for name, tensor in state.items()})
    check({name: tensor for name, tensor in state.items() if name != weights.OUTPUT_LAYER})
    assert "LoRA: not in the checkpoint" in check(state, STAGES[2])
    one = next(name for name in state if name.startswith("audio_encoder."))
    with pytest.raises(UserError, match=f"lacks 1 tensors, first {one}"):
        check({name: tensor for name, tensor in state.items() if name != one})
    with pytest.raises(UserError, match=f"another shape, first {one}"):
        check(state | {one: torch.zeros(1, 2, 3)})
    without = {name: tensor for name, tensor in state.items() if not name.startswith(weights.CTC_PREFIXES)}
    assert "left out, and so is its loss" in check(without)
    assert "trained from random weights" in check(without, STAGES[1])
    with pytest.raises(UserError, match="CTC tensors.*damaged"):
        check({name: tensor for name, tensor in state.items() if name != "ctc.ctc_lo.bias"})
    lora = {name: torch.zeros(tensor.shape) for name, tensor in meta[STAGES[2]][1].state_dict().items()
            if "lora_" in name}  # fmt: skip
    assert lora and "LoRA" not in check(state | lora, STAGES[2], lora={"r": 16, "lora_alpha": 32})
    with pytest.raises(UserError, match="fold it first"):
        check(state | lora, lora={"r": 16, "lora_alpha": 32})
    with pytest.raises(UserError, match="lora_alpha 8, the stage says 32"):
        check(state | lora, STAGES[2], lora={"r": 16, "lora_alpha": 8})


def test_room_is_estimated_from_the_model_and_the_batch(meta, tmp_path):
    config, model = meta[STAGES[0]]
    assert gpu_bytes(model, config, 8192, 2000) > gpu_bytes(model, config, 4096, 2000)
    config3, model3 = meta[STAGES[2]]
    assert gpu_bytes(model, config, 8192, 8192) > gpu_bytes(model3, config3, 8192, 8192)
    check_room(model, config, tmp_path / "not" / "there yet", 2000)


@pytest.mark.parametrize(("share", "fails"), [(1.1, False), (0.9, True)])
def test_a_gpu_that_cannot_hold_a_batch_of_one_row_is_refused(meta, tmp_path, monkeypatch, share, fails):
    config, model = meta[STAGES[0]]
    there = SimpleNamespace(total_memory=share * gpu_bytes(model, config, 2000, 2000))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: there)
    with pytest.raises(UserError, match=r"of GPU memory needed, .* lower batch_size") if fails \
            else contextlib.nullcontext():
        check_room(model, config, tmp_path, 2000)


def test_a_container_with_too_little_shared_memory_is_refused_before_the_loader_fails_in_it(monkeypatch):
    plenty = {"batch_type": "token", "batch_size": 120000, "num_workers": 16}
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=64 << 20))
    with pytest.raises(UserError, match="64 MiB free, .* take 1367; start the container with --shm-size=8g"):
        check_shared_memory(plenty, 12000, 10**9)
    check_shared_memory(plenty, 12000, 10**5)  # of so few rows all batches together are less
    check_shared_memory(plenty | {"num_workers": 0}, 12000, 10**9)


def test_more_processes_than_gpus_are_refused(refused, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert "NGPU is 4, and torch sees 2 here" in refused()[0]


def test_deepspeed_and_its_settings_are_looked_at_before_the_data_are_read(refused, monkeypatch, tmp_path):
    settings = tmp_path / "deepspeed.json"
    overlay = {"train_conf": {"use_deepspeed": True, "deepspeed_config": str(settings)}}
    monkeypatch.setattr("check_training.find_spec", lambda name: None)
    assert "deepspeed is not installed" in refused(overlay=overlay)[0]
    monkeypatch.setattr("check_training.find_spec", lambda name: True)
    said = f"deepspeed_config '{settings}' cannot be read"
    assert said in refused(overlay=overlay)[0]
    for content, expected in {
        "{": said, "[]": said, '{"zero_optimization": 1}': said,
        '{"gradient_clipping": 1.0, "bf16": {"enabled": true}}': "bf16, gradient_clipping: what the stage's YAML says",
        '{"zero_optimization": {"stage": 3}}': "zero_optimization.stage 3: want 0, 1 or 2",
    }.items():  # fmt: skip
        settings.write_text(content)
        assert expected in refused(overlay=overlay)[0]


def test_where_the_gpu_takes_smaller_batches_validation_does_too_and_full_memory_is_one_line(
    tmp_path, model_dir, rows, monkeypatch
):
    """A GPU's trial and its memory are what this machine lacks: the trial's outcome and the failure are given."""
    seen: dict[bool, int] = {}
    forward = FunASRNano.forward

    def watched(self, speech, **batch):
        training = torch.is_grad_enabled()
        seen[training] = max(seen.get(training, 0), 6 * speech.shape[0] * speech.shape[1])
        if full:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return forward(self, speech=speech, **batch)

    monkeypatch.setattr(FunASRNano, "forward", watched)
    monkeypatch.setattr("nano.trainer.fit", lambda *_: 400)
    args = arguments(tmp_path, model_dir, rows, overlay=QUICK | {"dataset_conf": SORTED})
    full = False
    train_here(args)
    assert seen == {True: pytest.approx(390, abs=40), False: pytest.approx(390, abs=40)}
    full, args.output_dir = True, tmp_path / "full"
    with pytest.raises(UserError, match="memory is full in the middle of training"):
        train_here(args)


@pytest.mark.full
def test_doctor_runs_the_preflight_of_every_stage_on_what_is_there(tmp_path, model_dir, rows):
    def doctor(**given) -> str:
        environment = {**os.environ, "EXP_OUTPUT": str(tmp_path), **given}
        done = subprocess.run(["bash", "setup.sh", "doctor"], cwd=ROOT, env=environment, capture_output=True, text=True,
                              timeout=600, check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    assert doctor().count("not checked, no model (stage -1) or no data (stage 0)") == 3
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model_dir.txt").write_text(f"{model_dir}\n")
    gone = edit(rows[3], content="语音转写：<|startofspeech|>!/nowhere.wav<|endofspeech|>")
    for corpus, train in (("simulated_8k_telephone", rows), ("real_8k_telephone", [*rows[:3], gone])):
        write_jsonl(tmp_path / "data" / corpus / "train_formatted.jsonl", train)
        write_jsonl(tmp_path / "data" / corpus / "dev_formatted.jsonl", rows)
    said = doctor()
    assert f"{STAGES[0]}: ready to train from {model_dir}/model.pt" in said
    assert f"{STAGES[1]}: its data and config are in order; it starts from {STAGES[0]}, which is not done yet" in said
    assert f"{STAGES[2]}: would not start" in said
    assert "u3: cannot read /nowhere.wav; run stage 0 with --force true" in said
    mine = {"INIT_CHECKPOINT": shutil.copy(model_dir / "model.pt", tmp_path / "mine.pt")}
    assert f"{STAGES[0]}: ready to train from {tmp_path}/mine.pt" in doctor(**mine)
    stage1 = tmp_path / "exp/8k_telephone" / STAGES[0] / "averaged.pt"
    stage1.parent.mkdir(parents=True)
    shutil.copy(model_dir / "model.pt", stage1)
    assert f"{STAGES[1]}: ready to train from {tmp_path}/mine.pt" in doctor(**mine)
    write_json(tmp_path / "status/stage1.json", {"inputs": {str(tmp_path / "mine.pt"): "0"}})
    shutil.copytree(stage1.parent, stage1.parent.with_name(STAGES[1]))
    write_json(tmp_path / "status/stage2.json", {"inputs": {}, "state": "failed"})
    said = doctor(**mine)
    assert f"{STAGES[1]}: ready to train from {stage1}" in said
    assert f"{STAGES[2]}: would not start from {stage1}" in said, "what a check refused feeds no other stage"


# --- during and after


def test_a_loss_whose_perplexity_is_no_number_ends_training_in_one_line(tmp_path, model_dir, rows):
    overlay = QUICK | {"optim_conf": {"lr": 1000.0}}
    with pytest.raises(UserError, match=r"training diverges; lower optim_conf\.lr"):
        train_here(arguments(tmp_path, model_dir, rows, STAGES[1], overlay))


class Stock:
    num_replicas = 1

    def __iter__(self):
        return iter([[3, 1], [], [0, 2, 0], [4, 3]])

    def __len__(self):
        return 4


def test_the_sampler_repeats_nothing_on_one_process_and_emits_no_empty_batch():
    assert list(Once(Stock(), 0)) == [[3, 1], [0, 2], [4]]
    assert list(Once(Stock(), 2)) == [[4]]
    several = Stock()
    several.num_replicas = 2
    assert list(Once(several, 0)) == [[3, 1], [3, 1], [0, 2, 0], [4, 3]]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model_dir, rows):
    """Stages 1 to 3 on twelve rows in batches of five, checked before and after: the folder of each, by name."""
    folder, initial, done = tmp_path_factory.mktemp("exp with space"), model_dir / "model.pt", {}
    for stage in STAGES:
        args = arguments(folder, model_dir, rows, stage, QUICK, init_checkpoint=initial)
        check_before(args)
        train_here(args)
        done[stage] = (args, check_after(args.output_dir, initial, args.train_list))
        initial = args.output_dir / "averaged.pt"
    return done


@pytest.mark.parametrize(("stage", "modules"), [
    (STAGES[0], {"audio_encoder"}), (STAGES[1], {"audio_adaptor", "ctc_decoder", "ctc"}), (STAGES[2], {"lora"}),
])  # fmt: skip
def test_what_each_stage_trained_has_moved_and_each_row_was_used_once(trained, stage, modules):
    args, figures = trained[stage]
    assert set(figures["moved_tensors"]) == modules
    assert figures["repeated_rows"] == 0
    described = json.loads((args.output_dir / "run.json").read_text())
    dev = {row["epoch"]: row["loss"] for row in read_log(args.output_dir / "train.log") if row["tag"] == "val"}
    assert figures["dev_best_at_end"] is (min(dev, key=dev.get) == 3)
    assert {module for module, count in described["parameters"].items() if count["trainable"]} == modules
    uses = {"rows": 12, "missed": 0, "repeated": 0, "processes": 1}
    assert described["rows_used"] == {str(epoch): uses for epoch in (1, 2, 3)}


def test_a_ctc_branch_that_the_checkpoint_lacks_is_trained_and_saved(tmp_path, model_dir, rows):
    state, _lora = weights.load(model_dir / "model.pt")
    without = {name: tensor for name, tensor in state.items() if not name.startswith(weights.CTC_PREFIXES)}
    torch.save(without, tmp_path / "huggingface.pt")
    args = arguments(tmp_path, model_dir, rows, STAGES[1], QUICK, init_checkpoint=tmp_path / "huggingface.pt")
    train_here(args)
    moved = check_after(args.output_dir, args.init_checkpoint, args.train_list)["moved_tensors"]
    assert set(moved) == {"audio_adaptor", "ctc_decoder", "ctc"}
    assert torch.load(args.output_dir / "averaged.pt")["state_dict"].keys() == state.keys()


@pytest.mark.parametrize("stage", STAGES)
def test_every_second_step_and_the_last_of_an_epoch_are_logged_and_drawn(trained, stage):
    folder = trained[stage][0].output_dir
    rows = [row for row in read_log(folder / "train.log") if row["tag"] == "train"]
    assert [(row["epoch"], row["step"], row["steps"]) for row in rows] == [
        (epoch, step, 3) for epoch in range(3) for step in (2, 3)]
    assert [row["epoch"] for row in read_log(folder / "train.log") if row["tag"] == "val"] == [1, 1, 2, 2, 3, 3]
    drawn = curves(folder)
    assert [step for step, _loss in drawn["rank0_loss/train"]] == [row["total_step"] for row in rows]
    assert ("stats_rank0_loss_ctc/train" in drawn) == (stage != STAGES[2]) and "stats_rank0_loss_llm/train" in drawn
    assert ("loss_ctc" in (folder / "train.log").read_text()) == (stage != STAGES[2])


def test_the_last_batches_of_an_epoch_make_a_step_though_fewer_than_accum_grad(tmp_path, model_dir, rows):
    overlay = {**QUICK, "train_conf": {**QUICK["train_conf"], "accum_grad": 2}}
    args = arguments(tmp_path, model_dir, rows, STAGES[0], overlay)
    train_here(args)
    state = torch.load(args.output_dir / "model.pt")["optimizer"]["state"]
    assert {int(one["step"]) for one in state.values()} == {6}, "two of the three batches, and the third, in 3 epochs"


def test_no_checkpoint_is_written_inside_an_accumulation_of_gradients(tmp_path):
    trainer = Trainer(output_dir=str(tmp_path), device="cpu", accum_grad=4, save_checkpoint_interval=10)
    assert trainer.save_checkpoint_interval == 12, "gradients of 2 batches would be lost in a kill"


def test_checkpoints_on_disk_are_bounded(trained):
    on_disk = sorted(path.name for path in trained[STAGES[0]][0].output_dir.glob("model.pt.ep*"))
    assert 2 <= len(on_disk) <= 3


@pytest.fixture
def spoilt(trained, tmp_path):
    """spoilt(file, change) -> the postflight's message for stage 1's folder with that file changed."""

    def spoil(name, change, stage=STAGES[0]):
        args, _figures = trained[stage]
        folder = shutil.copytree(args.output_dir, tmp_path / "spoilt", dirs_exist_ok=True)
        path = folder / name
        if path.suffix == ".json":
            path.write_text(json.dumps(change(json.loads(path.read_text()))))
        else:
            checkpoint = torch.load(path)
            change(checkpoint["state_dict"])
            path.unlink()
            torch.save(checkpoint, path)
        with pytest.raises(UserError) as error:
            check_after(folder, args.init_checkpoint, args.train_list)
        return str(error.value)

    return spoil


def test_a_frozen_tensor_that_changed_or_a_saved_one_that_is_gone_fails_the_stage(spoilt, trained):
    best = torch.load(trained[STAGES[0]][0].output_dir / "averaged.pt")["averaged"][0]
    for name in ("averaged.pt", best):
        assert "is frozen but changed" in spoilt(name, lambda state: state["llm.lm_head.weight"].add_(1e-6))
    assert "lacks 1 tensors, first audio_encoder" in spoilt(
        "averaged.pt", lambda state: state.pop("audio_encoder.after_norm.weight"))


def test_a_module_that_did_not_move_fails_the_stage(spoilt, trained):
    args, _figures = trained[STAGES[2]]
    best = torch.load(args.output_dir / "averaged.pt")["averaged"][0]
    state = torch.load(args.output_dir / best)["state_dict"]
    still = {name: weights.digest(state[name]) for name in json.loads((args.output_dir / "start.json").read_text())}
    assert "lora: none of its" in spoilt("start.json", lambda _start: still, STAGES[2])


@pytest.mark.parametrize(("count", "processes", "message"), [
    ({"rows": 12, "missed": 2, "repeated": 0}, 1, "used 10 of the list's 12 rows"),
    ({"rows": 11, "missed": 0, "repeated": 0}, 1, "used 11 of the list's 12 rows"),
    ({"rows": 12, "missed": 0, "repeated": 3}, 1, "3 repeats"),
    ({"rows": 12, "missed": 1, "repeated": 3}, 2, "used 11 of the list's 12 rows"),
])  # fmt: skip
def test_a_row_that_was_missed_or_repeated_fails_the_stage(count, processes, message):
    with pytest.raises(UserError, match=message):
        check_rows_used({"rows_used": {"1": count | {"processes": processes}}}, 12)


def test_repeats_of_several_processes_are_counted_though_one_went_on(tmp_path):
    epochs = {"1": {"rows": 12, "missed": 0, "repeated": 3, "processes": 2},
              "2": {"rows": 12, "missed": 0, "repeated": 0, "processes": 1}}  # fmt: skip
    assert check_rows_used({"rows_used": epochs}, 12) == {"repeated_rows": 3}


@pytest.mark.parametrize(("losses", "message"), [
    ([2.0, 2.0], "did not fall"), ([2.0, "nan"], "no finite"), ([], "no finite"),
])  # fmt: skip
def test_a_loss_that_is_not_finite_or_did_not_fall_fails_the_stage(tmp_path, losses, message):
    (tmp_path / "train.log").write_text("".join(log_line(epoch=epoch, loss=loss) for epoch, loss in enumerate(losses)))
    with pytest.raises(UserError, match=message):
        check_loss(tmp_path / "train.log")


@pytest.mark.parametrize(("last", "fails"), [(2.01, False), (2.5, True)])
def test_a_single_epoch_fails_only_where_the_loss_rose_beyond_noise(tmp_path, caplog, last, fails):
    (tmp_path / "train.log").write_text(log_line(step=20, loss=2.0) + log_line(step=80, loss=last))
    with pytest.raises(UserError, match="--force true") if fails else contextlib.nullcontext():
        assert not check_loss(tmp_path / "train.log")["loss_target_met"]
    assert fails or "did not fall: 2.000 -> 2.010, in one epoch" in caplog.text


def test_the_thirty_percent_target_is_reported_and_no_reason_to_fail(tmp_path):
    for last, met in ((1.9, False), (1.3, True)):
        (tmp_path / "train.log").write_text(log_line(epoch=0, loss=2.0) + log_line(epoch=1, loss=last))
        assert check_loss(tmp_path / "train.log")["loss_target_met"] is met


@pytest.mark.parametrize(("epochs", "no_better", "said"), [(3, 0, True), (3, 1, False), (1, 0, False)])
def test_a_training_that_ends_while_dev_gets_better_is_said(caplog, epochs, no_better, said):
    caplog.set_level("INFO")
    described = {"rows_used": dict.fromkeys(map(str, range(epochs))), "epochs_no_improve": no_better}
    assert check_dev(described)["dev_best_at_end"] is said
    assert ("lowest after the last epoch" in caplog.text) is said


@pytest.mark.parametrize(("losses", "no_better"), [((1.0, 1.2, 1.1), 1), ((1.0, 0.8, 0.9), 0)])
def test_a_validation_inside_an_epoch_does_not_count_for_where_dev_was_best(tmp_path, monkeypatch, losses, no_better):
    trainer = Trainer(output_dir=str(tmp_path), device="cpu")
    given = iter(losses)
    monkeypatch.setattr(stock.Trainer, "validate_epoch", lambda self, **_: setattr(self, "val_loss_avg", next(given)))
    for inside in ({}, {"step_in_epoch": 2}, {}):
        trainer.validate_epoch(**inside)
    assert trainer.epochs_no_improve == no_better


@pytest.mark.parametrize("stage", [STAGES[0], STAGES[2]])
def test_saving_after_no_step_and_loading_again_decodes_the_same(model_dir, tmp_path, stage):
    from funasr import AutoModel

    from nano.inference import Recogniser, Utterance

    config = effective(read_stage([ROOT / "conf" / f"{stage}.yaml"]), model_dir, 16000)
    (tmp_path / "exp").mkdir()
    trainer = Trainer(output_dir=str(tmp_path / "exp"), device="cpu", **config["train_conf"])
    trainer.initial, trainer.lora = str(model_dir / "model.pt"), config["llm_conf"].get("lora_conf")
    model = AutoModel(**config | {"device": "cpu"}).model
    model = trainer.warp_model(model, device="cpu", train_conf={})
    optimizer = torch.optim.AdamW(model.parameters())
    trainer.val_acc_step_or_epoch["model.pt.ep0"] = 0.5
    trainer.save_checkpoint(0, model=model, optim=optimizer, scheduler=SimpleNamespace(state_dict=dict))
    trainer.close()
    recogniser = Recogniser(model_dir, "cpu")
    noise = np.random.default_rng(0).standard_normal((3, 16000)).astype(np.float32) / 10
    utterances = [Utterance(str(number), samples, recogniser.prompt()) for number, samples in enumerate(noise)]
    heard = []
    for path in (model_dir / "model.pt", tmp_path / "exp" / "averaged.pt"):
        recogniser.load(path)
        state = recogniser.auto_model.model.state_dict()
        tensors = {name: weights.digest(tensor) for name, tensor in state.items()}
        heard.append((recogniser.transcribe(utterances, max_new_tokens=12), tensors))
    assert heard[0] == heard[1]
