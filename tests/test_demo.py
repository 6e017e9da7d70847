"""The demo's corpus: the same from run to run, and its sets are of different people."""

import functools
import itertools
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

import miniature
import speak_corpus
import train_base
from common import read_jsonl
from metrics import keyword_counts, read_keywords
from mini import ROOT
from nano.config import build_on_meta, effective
from speak_corpus import SETS, VOICES, speak_set, write_texts


def test_an_utterance_sounds_alike_whatever_was_spoken_before_it(tmp_path):
    texts = [f"您的订单号是{digit}三五七" for digit in "一二四五六八"]
    for name in ("base_train", "calls_test"):
        whole = speak_set(name, texts, 0, tmp_path / "whole", seed=0)
        late = speak_set(name, texts[3:], 3, tmp_path / "late", seed=0)
        for row, again in zip(whole[3:], late, strict=True):
            assert row["speaker"] == again["speaker"]
            assert Path(row["source"]).read_bytes() == Path(again["source"]).read_bytes(), row["key"]


def test_a_corpus_that_was_moved_is_spoken_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(speak_corpus, "SETS", {"wideband_dev": ({"wideband": 1}, "dev", 1, True)})

    def source(folder):
        command = ["speak_corpus.py", "--output", str(tmp_path / folder), "--num_workers", "1"]
        monkeypatch.setattr(sys, "argv", command)
        speak_corpus.main()
        return Path(next(read_jsonl(tmp_path / folder / "wideband_dev.jsonl"))["source"])

    first = source("here")
    was = first.stat().st_mtime_ns
    assert source("here") == first and first.stat().st_mtime_ns == was
    (tmp_path / "here").rename(tmp_path / "there")
    assert source("there").is_file()


def test_no_voice_of_dev_or_test_is_in_a_training_set():
    lists = {voices: set(VOICES[voices].split()) for _kinds, voices, _count, _held_out in SETS.values()}
    assert all(not lists[one] & lists[other] for one, other in itertools.combinations(lists, 2))


@pytest.mark.parametrize("seed", [0, 1])
def test_texts_of_dev_and_test_are_in_no_other_set_and_business_terms_in_calls_alone(seed):
    texts = write_texts(yaml.safe_load((ROOT / "data/demo_sentences.yaml").read_text("utf-8")), SETS, seed)
    for name, (*_, held_out) in SETS.items():
        others = {text for other in SETS if other != name for text in texts[other]}
        assert not held_out or (len(set(texts[name])) == 240 and not others & set(texts[name])), name
    terms = read_keywords(ROOT / "conf/demo/keywords.txt")
    for name, drawn in texts.items():
        assert (keyword_counts(drawn, terms).any(axis=1) == name.startswith("calls")).all(), name
    known = set("".join(texts["base_train"]))
    assert all(set(text) <= known for name in texts if name.startswith("calls") for text in texts[name])


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A function that trains the base model of stand-ins for build_folder and the helpers; the folder it writes."""
    for name in ("train.jsonl", "dev.jsonl", "conf.yaml"):
        (tmp_path / name).write_text('{"target": "a"}\n')

    def build_folder(folder, _alphabet, seed):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "model.pt").write_bytes(b"random")

    def helper(name, *arguments):
        options = dict(itertools.pairwise(arguments))
        if name == "train.py":
            assert options["--init_checkpoint"].is_file()
            options["--output_dir"].mkdir(exist_ok=True)
            (options["--output_dir"] / "run.json").write_text("{}")
            torch.save({"state_dict": {"a": torch.ones(1)}}, options["--output_dir"] / "averaged.pt")

    monkeypatch.setattr(miniature, "build_folder", build_folder)
    monkeypatch.setattr(train_base, "helper", helper)
    files = [tmp_path / name for name in ("train.jsonl", "dev.jsonl", "conf.yaml")]
    return lambda output: train_base.train_base(*files[:2], [], output, files[2], seed=0)


def kill(real, calls, number, *arguments, **options):
    if next(calls) == number:
        raise KeyboardInterrupt
    return real(*arguments, **options)


def test_a_base_model_whose_making_was_killed_is_made_by_the_same_command(base, tmp_path):
    for number in itertools.count():
        output, calls = tmp_path / str(number) / "base_model", itertools.count()
        with pytest.MonkeyPatch.context() as patch:
            for owner, name in ((shutil, "rmtree"), (shutil, "copytree"), (os, "replace")):
                patch.setattr(owner, name, functools.partial(kill, getattr(owner, name), calls, number))
            try:
                base(output)
                break
            except KeyboardInterrupt:
                pass
        base(output)
        assert json.loads((output / "base_model.json").read_text()) and (output / "training/run.json").is_file()
        assert torch.equal(torch.load(output / "model.pt")["a"], torch.ones(1))
    assert number > 5


def test_another_size_of_the_miniature_is_another_base_model(base, tmp_path, monkeypatch):
    shutil.copytree(train_base.ROOT / "conf", tmp_path / "conf")
    monkeypatch.setattr(train_base, "ROOT", tmp_path)
    base(tmp_path / "base_model")
    before = (tmp_path / "base_model/base_model.json").read_text()
    with open(tmp_path / "conf/demo/miniature.yaml", "a") as file:
        file.write("dataset: FunASR\n")
    base(tmp_path / "base_model")
    assert (tmp_path / "base_model/base_model.json").read_text() != before


def test_the_readme_has_the_size_of_the_miniature(tmp_path):
    alphabet = "".join(re.findall("[一-鿿]", (train_base.ROOT / "data/demo_sentences.yaml").read_text("utf-8")))
    model = build_on_meta(effective({}, miniature.build_folder(tmp_path, alphabet), 16000))
    size = f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M"
    for name in ("README.md", "README_zh.md"):
        assert re.search(r"Fun-ASR-Nano ?[(（]([\d.]+ M)", (train_base.ROOT / name).read_text("utf-8"))[1] == size
