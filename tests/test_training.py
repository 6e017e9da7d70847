"""What training promises: upstream's loss where it has one, nothing frozen moves, no row is lost without a word."""

import json
import shutil
import sys
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

import make_train_list
from common import UserError, atomic_write, read_jsonl, write_jsonl
from corpus import hash_share
from make_train_list import mix, number_repeats, take
from mini import arguments, formatted, helper, make_rows
from nano.weights import trainable_names

CORPORA = ("simulated_8k_telephone", "real_8k_telephone", "wideband_16k", "no_speech")


def build(model_dir: Path, **config):
    """The model of the folder as FunASR builds it, with this recipe's classes registered."""
    from funasr import AutoModel
    from funasr.download.download_model_from_hub import download_model

    import nano.dataset
    import nano.model  # noqa: F401

    config = download_model(model=str(model_dir), disable_update=True, device="cpu", is_training=True, **config)
    return AutoModel(**config)


def batch_of(model, rows, tmp_path, **conf):
    from funasr.register import tables

    path = tmp_path / "list.jsonl"
    write_jsonl(path, rows)
    kwargs = model.kwargs
    conf = {**kwargs["dataset_conf"], "prompt_classes": None, "batch_type": "example", **conf}
    dataset = tables.dataset_classes["FunASR"](
        str(path), frontend=kwargs["frontend"], tokenizer=kwargs["tokenizer"], is_training=True, **conf
    )
    return dataset.collator([dataset[i] for i in range(len(rows))])


def test_ctc_has_a_gradient_and_a_loss_of_its_own(model_dir, rows, tmp_path):
    model = build(model_dir, ctc_weight=0.5, ctc_decoder_conf={"freeze": False})
    batch = batch_of(model, rows, tmp_path)
    loss, stats, _ = model.model(**batch)
    loss.backward()
    assert loss.item() == pytest.approx((stats["loss_llm"] + 0.5 * stats["loss_ctc"]).item())
    assert all(parameter.grad is not None for parameter in model.model.ctc.parameters())


def test_lora_is_trained_unmerged_and_with_its_dropout(model_dir):
    model = build(model_dir, llm_conf={"use_lora": True, "freeze": True}).model.train()
    lora = [module for module in model.modules() if hasattr(module, "lora_A")]
    assert lora and not any(module.merged for module in lora)
    assert all(module.lora_dropout.training for module in lora)


def test_a_tied_output_layer_is_averaged_with_its_embedding(model_dir):
    model = build(model_dir, llm_conf={"freeze": False}).model
    names = trainable_names(model)
    assert {"llm.model.embed_tokens.weight", "llm.lm_head.weight"} <= names
    assert not any(name.startswith("audio_encoder.") for name in names)


def test_audio_at_another_rate_than_the_frontends_stops_training_and_is_not_resampled(model_dir, tmp_path):
    row = formatted("slow", tmp_path / "slow.wav", np.zeros(8000), "三", fs=8000)
    with pytest.raises(UserError, match="slow: .* is at 8000 Hz, not the frontend's 16000"):
        batch_of(build(model_dir), [row], tmp_path)


def keyed(*keys):
    return [(key, json.dumps({"key": key})) for key in keys]


def test_shares_are_counts_and_repeats_get_keys_of_their_own():
    simulated, real = keyed(*(f"s{n}" for n in range(10))), keyed("r0", "r1", "r2")
    mixed = mix(simulated, [("real_share", real, 0.5)], seed=0)
    keys = [key for key, _ in mixed]
    assert len(keys) == len(set(keys)) == 15
    assert sum(key.startswith("r") for key in keys) == 5
    assert sum(key.endswith("#2") for key in keys) == 2
    assert mix(reversed(simulated), [("real_share", real, 0.5)], seed=0) == mixed
    assert take(real, 3, seed=1) != take(real, 3, seed=2)
    for count in (0, 1, 2, 3, 8):
        drawn = sorted(real, key=lambda row: hash_share(f"1/{row[0]}"))
        assert take(iter(real), count, seed=1) == ((3 * drawn)[:count], 3)
    replayed = mix(simulated, [("wideband_replay", simulated, 0.5)], seed=0)  # the originals have the same keys
    assert len({key for key, _ in replayed}) == 15
    taken = keyed("k", "k", "k#2", "k", "k#2", "k#4")
    assert [key for key, _ in number_repeats(taken)] == ["k", "k#3", "k#2", "k#5", "k#2#2", "k#4"]


def test_a_list_takes_little_more_memory_than_its_file(tmp_path, monkeypatch):
    row = make_rows(tmp_path, 1)[0] | {"channel": {"noise": {"kind": "pink", "snr_db": 12.5}, "hop1": {"codec": "gsm"}}}
    for name in CORPORA:
        for split, count in (("train", 2000), ("dev", 2)):
            many = (row | {"key": f"{name}{n}"} for n in range(count))
            write_jsonl(tmp_path / name / f"{split}_formatted.jsonl", many)
    command = ["make_train_list.py", "--stage", 1, "--data_dir", tmp_path, "--output", tmp_path / "t.jsonl"]
    monkeypatch.setattr(sys, "argv", [*map(str, command), "--valid_output", str(tmp_path / "v.jsonl")])
    tracemalloc.start()
    make_train_list.main()
    assert tracemalloc.get_traced_memory()[1] < 3 * (tmp_path / "t.jsonl").stat().st_size
    tracemalloc.stop()


def test_a_share_of_nothing_is_refused():
    with pytest.raises(UserError, match="real_share"):
        mix(keyed("s"), [("real_share", [], 1.0)], seed=0)


def test_the_stage_list_can_be_written_from_stage_0_files(rows, tmp_path):
    for name, count in (*((name, 8) for name in CORPORA), ("real_8k_telephone", 4)):
        for split in ("train", "dev"):
            part = [row | {"key": f"{name}-{row['key']}"} for row in rows[:count]]
            write_jsonl(tmp_path / name / f"{split}_formatted.jsonl", part)
    command = ("make_train_list.py", "--stage", 3, "--data_dir", tmp_path, "--simulated_share", 0.5)
    done = helper(*command, "--output", tmp_path / "t.jsonl", "--wideband_replay", 0, "--no_speech_share", 0.25,
                  "--valid_output", tmp_path / "v.jsonl")  # fmt: skip
    assert done.returncode == 0, done.stderr
    listed = Counter(row["key"].split("-")[0] for row in read_jsonl(tmp_path / "t.jsonl"))
    assert listed == {"real_8k_telephone": 4, "simulated_8k_telephone": 2, "no_speech": 1}
    assert all(row["key"].startswith("real") for row in read_jsonl(tmp_path / "v.jsonl"))
    longest = max(row["speech_length"] for row in rows[:4])
    done = helper(*command, "--output", tmp_path / "t.jsonl", "--valid_output", tmp_path / "v.jsonl",
                  "--max_speech_length", longest - 1)  # fmt: skip
    assert done.returncode == 0 and "of 4 rows are not of 10 to" in done.stderr
    assert all(row["speech_length"] < longest for row in read_jsonl(tmp_path / "v.jsonl"))
    shutil.rmtree(tmp_path / "real_8k_telephone")
    assert helper(*command, "--output", tmp_path / "t2.jsonl", "--valid_output", tmp_path / "v2.jsonl").returncode == 2
    assert not (tmp_path / "t2.jsonl").exists()


def test_corpora_that_use_the_same_keys_make_lists_without_a_key_twice(rows, tmp_path):
    for name in CORPORA:
        for split in ("train", "dev"):
            write_jsonl(tmp_path / name / f"{split}_formatted.jsonl", rows)
    lists = tmp_path / "train.jsonl", tmp_path / "valid.jsonl"
    done = helper("make_train_list.py", "--stage", 1, "--data_dir", tmp_path, "--output", lists[0],
                  "--valid_output", lists[1])  # fmt: skip
    assert done.returncode == 0, done.stderr
    for path in lists:
        keys = [row["key"] for row in read_jsonl(path)]
        assert len(set(keys)) == len(keys) > len(rows)


def test_machines_with_the_same_process_number_may_write_the_same_list_at_once(tmp_path):
    path = tmp_path / "trainlist.jsonl"
    with atomic_write(path) as one, atomic_write(path) as other:
        one.write("rows\n")
        other.write("rows\n")
    assert path.read_text() == "rows\n" and list(tmp_path.iterdir()) == [path]


def test_audio_that_is_gone_in_the_middle_of_training_is_one_line(model_dir, tmp_path):
    made = make_rows(tmp_path, 3)
    args = arguments(tmp_path, model_dir, made, overlay={"dataset_conf": {"num_workers": 1}})
    (tmp_path / "utterance 1.wav").unlink()
    given = [word for name in ("stage_conf", "model_dir", "init_checkpoint", "train_list", "valid_list", "output_dir")
             for word in (f"--{name}", getattr(args, name))]  # fmt: skip
    done = helper("train.py", *given, "--overlay", args.overlay[0])
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and last.startswith("error: u1: cannot read") and "Traceback" not in done.stderr, last
