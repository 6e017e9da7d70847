"""The demo's corpus: the same from run to run, and its sets are of different people."""

import itertools
from pathlib import Path

from speak_corpus import SETS, VOICES, speak_set


def test_an_utterance_sounds_alike_whatever_was_spoken_before_it(tmp_path):
    texts = [f"您的订单号是{digit}三五七" for digit in "一二四五六八"]
    for name in ("base_train", "calls_test"):
        whole = speak_set(name, texts, 0, tmp_path / "whole", seed=0)
        late = speak_set(name, texts[3:], 3, tmp_path / "late", seed=0)
        for row, again in zip(whole[3:], late, strict=True):
            assert row["speaker"] == again["speaker"]
            assert Path(row["source"]).read_bytes() == Path(again["source"]).read_bytes(), row["key"]


def test_no_voice_of_dev_or_test_is_in_a_training_set():
    lists = {voices: set(VOICES[voices].split()) for _kinds, voices, _count, _held_out in SETS.values()}
    assert all(not lists[one] & lists[other] for one, other in itertools.combinations(lists, 2))
