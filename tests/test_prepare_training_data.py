"""Stage 0 loses no row, writes nothing outside its folder, and survives what people and systems do to it."""

import contextlib
import filecmp
import functools
import gzip
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import soundfile
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import audio
from common import UserError, progress
from corpus import Seen, group_rows, hash_share, read_rows
from corpus_filter import TextRules, spoken_length
from mini import ROOT, helper
from prepare_training_data import main, text_lengths
from sounds import encode, murmur
from telephone.resample import resample

CONF = ROOT / "conf/data_filter.yaml"
RULES = TextRules.load(CONF)
command = functools.partial(helper, "prepare_training_data.py")


def write_lines(path, rows):
    lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
    path.write_text("".join(line + "\n" for line in lines))
    return path


def read_lines(path):
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]] if path.exists() else []


def filtered(tmp_path, rows, *options, name="train"):
    """Rows kept, and the reasons of those that are not by key."""
    write_lines(tmp_path / "in.jsonl", rows)
    main(["filter", "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / f"{name}.jsonl"),
          "--conf", str(CONF), "--max_reject_ratio", "1", "--num_workers", "1", *map(str, options)])
    rejects = read_lines(tmp_path / f"rejected_{name}.jsonl")
    return read_lines(tmp_path / f"{name}.jsonl"), {row["key"]: row["reason"] for row in rejects}


@pytest.fixture
def corpus(tmp_path):
    """Six utterances of three speakers at 8 kHz."""
    rows = []
    for i in range(6):
        soundfile.write(tmp_path / f"u{i}.wav", murmur(2.0, 8000, i), 8000)
        rows.append({"key": f"u{i}", "source": f"u{i}.wav", "target": f"你好第{i}句话", "speaker": f"s{i % 3}"})
    return rows


# --- text


@pytest.mark.parametrize(
    ("raw", "normal"),
    [
        ("你 好 ，世 界", "你好，世界"), ("ＡＢＣ　１２３", "ABC 123"), ("我用 App 打 电话", "我用 App 打电话"),
        ("好的,没问题!", "好的，没问题！"), ("３：３０见", "3：30见"), ("费用是1,000元", "费用是1,000元"),
        ("二 〇 〇 八", "二〇〇八"), ("Hello, world!", "Hello, world!"),
        ("a\u200bb\tc\r\nd", "ab c d"), ("ｶﾀｶﾅ", "カタカナ"), ("", ""),
    ],
)
def test_text_is_normalised(raw, normal):
    assert RULES.normalise(raw) == normal
    assert RULES.normalise(normal) == normal, "normalising twice changes nothing"


def test_case_and_punctuation_follow_the_policy(tmp_path):
    config = yaml.safe_load(CONF.read_text())
    config["text"] = {"case": "lower", "punctuation": "remove"}
    (tmp_path / "spoken.yaml").write_text(yaml.safe_dump(config, allow_unicode=True))
    rules = TextRules.load(tmp_path / "spoken.yaml")
    assert rules.normalise("好的， 你说。Don't STOP_ it, OK?") == "好的你说 don't stop it ok"
    assert rules.normalise("利率3.5%，您好。V 1.2.") == "利率3.5% 您好 v 1.2", "what scoring compares"
    assert rules.reason("您好<Annotation_Error>"), "the policy does not hide a mark from the rules"


def test_a_rule_that_breaks_its_examples_stops_the_run(tmp_path, corpus):
    config = yaml.safe_load(CONF.read_text())
    config["rules"][0]["keeps"].append("<ANNOTATION_ERROR>")
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(config))
    done = command("filter", "--input", write_lines(tmp_path / "in.jsonl", corpus), "--output", tmp_path / "out.jsonl",
                   "--conf", tmp_path / "bad.yaml")
    assert done.returncode == 2 and "does not keep" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.parametrize(
    "change", [
        {"text": {"cas": "lower"}}, {"train_only": {"max_length": 3}}, {"train_only": {"max_speech_length": 3}},
        {"rulez": []}, {"rules": [{}]},
    ],
)
def test_a_setting_nobody_reads_is_refused(tmp_path, change):
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(yaml.safe_load(CONF.read_text()) | change))
    with pytest.raises(UserError) as caught:
        TextRules.load(tmp_path / "bad.yaml")
    assert caught.value.code == 2


@pytest.mark.parametrize("reason", [7, ["a"]])
def test_a_reason_is_text_whatever_yaml_takes_it_for(tmp_path, corpus, reason):
    config = yaml.safe_load(CONF.read_text())
    config["rules"] = [{"reason": reason, "why": "x", "pattern": "第3", "drops": ["第3"], "keeps": []}]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(config))
    _, reasons = filtered(tmp_path, [*corpus, corpus[0]], "--conf", tmp_path / "own.yaml")
    assert reasons == {"u3": str(reason), "u0": "duplicate_key"}


def test_many_tags_before_a_word_are_judged_at_once():
    began = time.process_time()
    assert RULES.reason("[嗯] " * 26 + "好") is None and RULES.reason("[嗯] " * 26)
    assert time.process_time() - began < 1, "every tag doubled the time"


def test_latin_letters_take_less_time_than_characters():
    assert spoken_length("你好12") == 4 and spoken_length("hello!") == pytest.approx(5 / 3) and spoken_length("") == 0
    assert spoken_length("二〇〇八年，人々") == 7, "the round zero and the repetition mark are spoken"


# --- filter: every reason


def test_each_fault_has_its_reason_and_nothing_else_is_dropped(tmp_path, corpus):
    good = corpus[0]
    soundfile.write(tmp_path / "silent.wav", np.zeros(16000), 8000)
    soundfile.write(tmp_path / "loud.wav", np.sign(murmur(2, 8000)) * 0.999, 8000)
    soundfile.write(tmp_path / "short.wav", murmur(0.05, 8000), 8000)
    soundfile.write(tmp_path / "copy.wav", murmur(2.0, 8000, 1), 8000)
    faults = {
        "annotation_error": {"target": "您好<ANNOTATION_ERROR>"}, "audio_missing": {"source": "none.wav"},
        "silent": {"source": "silent.wav"}, "clipped": {"source": "loud.wav"}, "too_short": {"source": "short.wav"},
        "chars_per_second": {"source": "u2.wav", "target": "说" * 60}, "bad_segment": {"start": 1.5, "end": 1.0},
        "bad_field": {"channel": "left"}, "channel_missing": {"channel": 1}, "missing_field": {"target": None},
        "duplicate_audio": {"source": "copy.wav"},
    }
    rows = [good, corpus[1], good, *(good | fault | {"key": reason} for reason, fault in faults.items()), '{"key": 1']
    kept, reasons = filtered(tmp_path, rows)
    assert [row["key"] for row in kept] == ["u0", "u1"]
    assert reasons == {reason: reason for reason in faults} | {"u0": "duplicate_key", None: "bad_json"}
    assert kept[0]["raw_target"] == good["target"] and kept[0]["source"] == str(tmp_path / "u0.wav")


def test_dev_and_test_are_not_cut_by_rules_for_train(tmp_path, corpus):
    soundfile.write(tmp_path / "long.wav", murmur(121, 8000), 8000)
    soundfile.write(tmp_path / "silent.wav", np.zeros(16000), 8000)
    rows = [corpus[0] | {"key": name, "source": f"{name}.wav"} for name in ("long", "silent")]
    with mock.patch.object(audio, "read", side_effect=audio.read) as read:
        assert filtered(tmp_path, [*rows, corpus[1]])[1] == {"long": "too_long", "silent": "silent"}
    assert {Path(call.args[0]).name for call in read.call_args_list} == {"silent.wav", "u1.wav"}, "long is not decoded"
    for split in ("dev", "test"):
        assert filtered(tmp_path, rows, "--split", split)[1] == {}
    kept, reasons = filtered(tmp_path, [*rows, corpus[1]], "--max_speech_percentile", 40)
    assert reasons == {"long": "too_long", "silent": "silent"} and len(kept) == 1


@pytest.mark.parametrize("rate", [8000, 11025, 44100, 48000])
def test_no_row_of_train_is_over_the_longest_after_resampling(tmp_path, corpus, rate):
    soundfile.write(tmp_path / "edge.wav", murmur(2.01, rate)[: -(-201 * rate // 100) - 1], rate)
    rows, limit = [corpus[0] | {"source": "edge.wav"}, corpus[1]], ("--max_speech_length", 200)
    kept, _ = filtered(tmp_path, rows, *limit)
    assert [row["key"] for row in kept] == (["u0", "u1"] if rate == 8000 else ["u1"])
    for fs in (16000, 8000):
        assert max(row["speech_length"] for row in converted(tmp_path, kept, "--do_upsample", "--output_fs", fs)) == 200


def test_an_offset_is_no_speech(tmp_path, corpus):
    soundfile.write(tmp_path / "silent.wav", np.full(16000, 0.01), 8000)
    soundfile.write(tmp_path / "offset.wav", murmur(2.0, 8000) + np.float32(0.01), 8000)
    rows = [corpus[0] | {"key": name, "source": f"{name}.wav"} for name in ("silent", "offset")]
    assert filtered(tmp_path, rows)[1] == {"silent": "silent"}


def test_a_test_set_of_no_speech_keeps_its_empty_references(tmp_path, corpus):
    rows = [corpus[0] | {"target": ""}]
    kept, _ = filtered(tmp_path, [*rows, corpus[1]], "--split", "test", "--filter_annotation_error", "false")
    assert kept[0]["target"] == ""


def test_a_row_without_speech_gets_the_text_that_the_released_model_writes_for_silence(tmp_path, corpus, caplog):
    caplog.set_level("INFO")
    rows = converted(tmp_path, [corpus[0] | {"target": ""}], "--do_upsample")
    assert rows[0]["messages"][2]["content"] == "/sil" and rows[0]["text_length"] == 4
    assert "1 rows have no text" in caplog.text
    main(["validate", "--input", str(tmp_path / "out/train_formatted.jsonl")])


def test_what_leaks_from_dev_is_dropped_and_shared_text_is_not(tmp_path, corpus):
    filtered(tmp_path, corpus[:1], name="dev")
    soundfile.write(tmp_path / "same.wav", murmur(2.0, 8000, 0), 8000)
    train = [
        corpus[1] | {"target": corpus[0]["target"]}, corpus[3], corpus[2] | {"source": "u0.wav"},
        corpus[2] | {"key": "copy", "source": "same.wav"},
    ]
    kept, reasons = filtered(tmp_path, train, "--against", tmp_path / "dev.jsonl")
    assert [row["key"] for row in kept] == ["u1"]
    assert reasons == {"u3": "leakage", "u2": "leakage", "copy": "leakage"}, "by speaker, by path, by content"
    filtered(tmp_path, [corpus[0] | {"call": "c"}], name="dev")
    assert filtered(tmp_path, [corpus[1] | {"call": "c"}, corpus[2] | {"call": "d"}], "--against",
                    tmp_path / "dev.jsonl")[1] == {"u1": "leakage"}  # fmt: skip
    for other in (tmp_path / "in.jsonl", tmp_path):
        with pytest.raises(UserError) as caught:  # rows that were not filtered have no hash of their audio
            filtered(tmp_path, train, "--against", other)
        assert caught.value.code == 2


def test_a_copy_that_was_cut_is_known_by_names_alone_and_rows_without_them_are_said(tmp_path, corpus, caplog):
    filtered(tmp_path, corpus[:1], name="dev")
    assert "no call and no speaker" not in caplog.text
    soundfile.write(tmp_path / "cut.wav", murmur(2.0, 8000, 0)[80:], 8000)
    cut = corpus[0] | {"key": "cut", "source": "cut.wav"}
    nameless = {name: value for name, value in cut.items() if name not in ("call", "speaker")}
    for row, kept in ((cut, 0), (nameless, 1)):
        rows, _ = filtered(tmp_path, [row, corpus[1]], "--against", tmp_path / "dev.jsonl", "--max_reject_ratio", "1")
        assert len(rows) == 1 + kept
    assert "1 of 2 rows have no call and no speaker" in caplog.text


def test_another_corpus_shares_recordings_but_no_names(tmp_path, corpus):
    filtered(tmp_path, corpus[:1], name="other_dev")
    train = [corpus[3], corpus[2] | {"source": "u0.wav"}]
    kept, reasons = filtered(tmp_path, train, "--against_audio", tmp_path / "other_dev.jsonl")
    assert [row["key"] for row in kept] == ["u3"], "speaker s0 of another corpus is another person"
    assert reasons == {"u2": "leakage"}


def test_a_recording_is_the_same_through_a_link(tmp_path, corpus):
    (tmp_path / "link").symlink_to(tmp_path)
    halves = [corpus[0] | {"start": 0, "end": 1}, corpus[0] | {"source": "link/u0.wav", "start": 1, "key": "half"}]
    halves = [row | {"target": "好", "speaker": row["key"]} for row in halves]
    dev, _ = filtered(tmp_path, halves, name="dev")
    assert [row["source"] for row in dev] == [str(tmp_path / "u0.wav"), str(tmp_path / "link/u0.wav")]
    assert len(group_rows(dev, ("call", "speaker"))) == 1
    filtered(tmp_path, halves[:1], name="dev")
    kept, reasons = filtered(tmp_path, [halves[1], corpus[1]], "--against", tmp_path / "dev.jsonl")
    assert reasons == {"half": "leakage"} and len(kept) == 1


def test_too_many_rejects_fail_and_show_why(tmp_path, corpus):
    rows = [*corpus, *({"key": f"n{i}", "source": "none.wav", "target": "好"} for i in range(4))]
    source, output = write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    output.write_text("from an earlier run\n")
    done = command("filter", "--input", source, "--output", output, "--max_reject_ratio", "0.3")
    assert done.returncode == 1 and "audio_missing 4" in done.stderr and "Traceback" not in done.stderr
    assert not output.exists() and len(read_lines(tmp_path / "rejected_out.jsonl")) == 4
    assert command("filter", "--input", source, "--output", output, "--max_reject_ratio", "0.4").returncode == 0


def test_rules_may_drop_half_but_broken_rows_no_more_than_was_said(tmp_path, corpus):
    rows = [*corpus, *({"key": f"n{i}", "source": "none.wav", "target": "好"} for i in range(4))]
    arguments = ["filter", "--input", write_lines(tmp_path / "in.jsonl", rows), "--output", tmp_path / "out.jsonl"]
    done = command(*arguments, "--max_reject_ratio", "0.3")
    assert done.returncode == 1 and "audio_missing 4" in done.stderr and "is 0.3, 0.5 for what rules" in done.stderr
    assert not (tmp_path / "out.jsonl").exists() and len(read_lines(tmp_path / "rejected_out.jsonl")) == 4
    noise = [row | {"target": "[noise]"} if row["source"] == "none.wav" else row for row in rows]
    write_lines(tmp_path / "in.jsonl", noise)
    assert command(*arguments, "--max_reject_ratio", "0.3").returncode == 0
    write_lines(tmp_path / "in.jsonl", [row | {"target": "[noise]"} if i > 3 else row for i, row in enumerate(noise)])
    assert command(*arguments, "--max_reject_ratio", "0.3").returncode == 1, "more than half"
    assert command(*arguments, "--max_reject_ratio", "0.7").returncode == 0


@pytest.mark.parametrize("step", ["filter", "convert", "sample", "split"])
def test_a_corpus_is_never_replaced_by_what_is_made_of_it(tmp_path, corpus, step):
    corpus = [row | {"target": "[noise]"} for row in corpus]  # the filter would have removed an output of no rows
    source = write_lines(tmp_path / "in.jsonl", corpus)
    before = source.read_bytes()
    outputs = ["--dev", tmp_path / "dev.jsonl", "--test", tmp_path / "." / "in.jsonl"] if step == "split" else [
        "--output", tmp_path / "in.jsonl"]  # fmt: skip
    done = command(step, "--input", source, *outputs)
    assert done.returncode == 2 and "in.jsonl is the input" in done.stderr.splitlines()[-1]
    assert source.read_bytes() == before and not (tmp_path / "dev.jsonl").exists()
    rejects = source.rename(tmp_path / "rejected_x.jsonl")
    if step in ("filter", "convert"):
        done = command(step, "--input", rejects, "--output", tmp_path / "x.jsonl")
        assert done.returncode == 2 and rejects.read_bytes() == before


def test_channels_that_are_counted_from_1_are_not_taken_for_others(tmp_path):
    soundfile.write(tmp_path / "call.wav", np.stack([murmur(4.0, 8000, seed) for seed in range(2)], 1), 8000)
    rows = [{"key": f"u{side}", "source": "call.wav", "target": "好", "channel": side} for side in (1, 2)]
    source, output = write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    done = command("filter", "--input", source, "--output", output, "--max_reject_ratio", "1")
    assert done.returncode == 1 and "channels count from 0" in done.stderr and not output.exists()
    kept, reasons = filtered(tmp_path, [*rows, rows[0] | {"key": "u0", "channel": 0}])
    assert [row["key"] for row in kept] == ["u1", "u0"] and reasons == {"u2": "channel_missing"}
    stray = [rows[1], *({"key": f"m{i}", "source": "call.wav", "target": "好", "channel": 1, "start": i / 2,
                         "end": i / 2 + 0.4} for i in range(6))]  # fmt: skip
    kept, reasons = filtered(tmp_path, stray)
    assert len(kept) == 6 and reasons == {"u2": "channel_missing"}, "one of many is a slip"


@pytest.mark.parametrize("place", [{"start": 0.5}, {"offset": 0.5}])
def test_an_utterance_that_is_placed_by_its_duration_is_not_cut_elsewhere(tmp_path, corpus, place):
    filtered(tmp_path, [corpus[0] | {"offset": None, "duration": 2.0}], "--max_reject_ratio", 0)
    row = corpus[0] | place | {"duration": 1.0}
    kept, reasons = filtered(tmp_path, [row, corpus[1] | {"duration": 2.0}])
    assert [row["key"] for row in kept] == ["u1"] and reasons == {"u0": "bad_field"}


def test_a_speaker_who_is_the_key_is_nobody(tmp_path, corpus, caplog):
    filtered(tmp_path, [row | {"speaker": row["key"]} for row in corpus[:2]])
    assert "2 of 2 rows have no call and no speaker" in caplog.text


@pytest.mark.parametrize(("form", "said"), [
    (b'{"key": "a", "wav": "a.wav", "txt": "x"}\n', "missing_field 1; first: no source, only key, wav, txt;"),
    (b'[\n{"key": "a"}\n]\n', "first: line 1: a JSON array, not JSON lines"),
    (gzip.compress(b"{}\n", mtime=0), "first: line 1: gzip, not JSON lines"),
    ('{"key": "逾期"}\n'.encode("gb18030"), "first: line 1: 'utf-8' codec can't decode"),
])  # fmt: skip
def test_a_corpus_of_another_form_is_told_by_its_first_line(tmp_path, form, said):
    (tmp_path / "in.jsonl").write_bytes(form)
    with pytest.raises(UserError, match=re.escape(said)):
        main(["filter", "--input", str(tmp_path / "in.jsonl"), "--output", str(tmp_path / "out.jsonl"),
              "--num_workers", "1"])


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["filter"], 2), (["filter", "--input", "none.jsonl", "--output", "o.jsonl"], 2), (["nonsense"], 2),
        (["--help"], 0), (["filter", "--help"], 0), (["convert", "--help"], 0),
        (["filter", "--input", ".", "--output", "o.jsonl", "--conf", "conf"], 2),
        (["filter", "--input", ".", "--output", "o.jsonl", "--max_speech_percentile", "200"], 2),
        (["filter", "--input", ".", "--output", "o.jsonl", "--max_reject_ratio", "five"], 2),
        (["sample", "--input", "data/README.md", "--output", "Makefile/x"], 1),
        (["validate", "--input", "none.jsonl"], 2), (["convert", "--input", "none.jsonl", "--output", "o.jsonl"], 2),
        (["convert", "--input", ".", "--output", "o.jsonl"], 2),
        (["split", "--input", ".", "--dev", "a", "--test", "b"], 2),
        (["stats", "--data_dir", "none"], 2),
    ],
)
def test_wrong_commands_exit_2_with_a_line(tmp_path, words, code):
    done = command(*[str(tmp_path / word) if word.endswith(".jsonl") else word for word in words])
    assert done.returncode == code and "Traceback" not in done.stderr


# --- malformed input of every kind


WAVES = ["good.wav", "stereo.wav", "cut.flac", "text.wav", "", ".", "none.wav", "/", "a\0b", "good.wav\n", "ls|"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6,
)
ROW = st.fixed_dictionaries(
    {},
    optional={
        "key": st.sampled_from(["a", "b", "../../x", "/etc/x", "k" * 500, "é\n", 7, "", "\ud800"]) | JSON,
        "source": st.sampled_from(WAVES) | JSON,
        "target": st.sampled_from(["你好世界", "[beep]", "", "。", "\ufffd", "<|im_end|>", "a" * 999]) | JSON,
        "channel": st.sampled_from([0, 1, 2, -1, True, 1.5, {"codec": "pcma"}]) | JSON,
        "start": st.sampled_from([0, 0.1, -1, 99, 1e300]) | JSON,
        "end": st.sampled_from([0, 0.5, 1, 99]) | JSON,
        "speaker": st.just("s") | JSON,
    },
)
GOOD = st.fixed_dictionaries(
    {"key": st.text(st.characters(), max_size=9), "source": st.just("good.wav"), "target": st.just("你好世界"),
     "start": st.floats(0, 0.5, allow_nan=False)}
)
DEEP = st.sampled_from(
    ["[" * 5000, '{"a":' * 5000, "[" * 200 + "]" * 200, "1" * 5000, '"\\ud800"', "NaN", '{"key": Infinity}']
)
LINE = (
    (ROW | GOOD | JSON).map(lambda value: json.dumps(value).encode())
    | GOOD.map(lambda value: json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass"))
    | DEEP.map(str.encode)
    | st.binary(max_size=30).map(lambda value: value.replace(b"\n", b"\r"))
)


@pytest.fixture(scope="module")
def waves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("waves")
    soundfile.write(folder / "good.wav", murmur(1.0, 8000), 8000)
    soundfile.write(folder / "stereo.wav", np.stack([murmur(1.0, 8000, 1), murmur(1.0, 8000, 2)], 1), 8000)
    soundfile.write(folder / "cut.flac", murmur(1.0, 8000), 8000)
    (folder / "cut.flac").write_bytes((folder / "cut.flac").read_bytes()[:500])
    (folder / "text.wav").write_text("no audio")
    return folder


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(lines=st.lists(LINE, max_size=12), split=st.sampled_from(["train", "test"]), strict=st.booleans())
def test_in_is_out_plus_rejected_whatever_is_given(waves, lines, split, strict):
    source, kept, rejected = waves / "in.jsonl", waves / "out/x.jsonl", waves / "out/rejected_x.jsonl"
    source.write_bytes(b"\n".join(lines))
    rows_in = sum(bool(line.strip()) for line in source.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n"))
    code = 0
    try:
        main(["filter", "--input", str(source), "--output", str(kept), "--conf", str(CONF), "--split", split,
              "--num_workers", "1", "--max_reject_ratio", "0.5" if strict else "1"])
    except UserError as error:
        code = error.code
    reject_rows, kept_rows = read_lines(rejected), read_lines(kept)
    assert all(row["reason"] and row["reason"].replace("_", "").isalpha() and row["detail"] for row in reject_rows)
    passed = rows_in > len(reject_rows) and len(reject_rows) <= (0.5 if strict else 1) * rows_in
    assert code == (0 if passed else 1)
    assert kept.exists() == passed
    if passed:
        assert len(kept_rows) + len(reject_rows) == rows_in
        assert len({row["key"] for row in kept_rows}) == len(kept_rows)
        formatted = waves / "out/f.jsonl"
        main(["convert", "--input", str(kept), "--output", str(formatted), "--do_upsample", "--num_workers", "1"])
        assert len(read_lines(formatted)) == len(kept_rows)
        main(["validate", "--input", str(formatted), "--check_audio"])
    written = set(waves.rglob("*.flac")) - {waves / "cut.flac"}
    assert all(path.parent == waves / "out/audio/f" for path in written)


def test_malformed_input_through_the_command_line(tmp_path, corpus):
    lines = [b"\xff\xfe\x00", b"[" * 100_000, b"null", b" ", b"{}"]
    lines += [b'{"key": "\\ud800", "source": "u0.wav", "target": "x"}']
    lines += [json.dumps(row).encode() for row in corpus]
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + b"\r\n".join(lines))
    done = command("filter", "--input", tmp_path / "in.jsonl", "--output", tmp_path / "o.jsonl", "--num_workers", 2,
                   "--max_reject_ratio", 0.5)  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    assert (len(read_lines(tmp_path / "o.jsonl")), len(read_lines(tmp_path / "rejected_o.jsonl"))) == (6, 5)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 6000).map(str), max_size=40), st.integers(0, 5000))
def test_a_compact_set_is_a_set(texts, before):
    seen, expected = Seen(), {str(i) for i in range(before)}
    for text in expected:
        seen.add(text)
    for text in texts:
        assert (text in seen) == (text in expected)
        if text not in seen:
            seen.add(text)
            expected.add(text)


# --- Kaldi


def test_a_kaldi_folder_with_segments(tmp_path, monkeypatch):
    soundfile.write(tmp_path / "call 1.wav", murmur(9.0, 8000), 8000)
    (tmp_path / "wav.scp").write_text(f"rec1 {tmp_path}/call 1.wav\nrec2 sph2pipe -f wav x.sph |\n")
    lines = ("a rec1 0.5 2.5", "b rec1 3 -1 0", "c rec2 0 1", "d rec9 0 1", "e rec1 nan 2", "f rec1 0 1",
             "h rec1 0 1 A", "i rec1 0 1 -1")
    write_lines(tmp_path / "segments", lines)
    (tmp_path / "text").write_text("a 你 好 啊\nb\t再见 了\nc 好\nd 好\ne 好\ng 好\nb 又一次\nh 好\ni 好\n")
    (tmp_path / "utt2spk").write_text("a zhang\nb li\n")
    entries = {(entry.row or entry.given)["key"]: entry
               for entry in read_rows(tmp_path) if entry.reason != "duplicate_key"}
    assert {key: entry.reason for key, entry in entries.items()} == {
        "a": "", "b": "", "c": "source_is_command", "d": "missing_field", "e": "bad_segment", "f": "missing_field",
        "g": "missing_field", "h": "bad_segment", "i": "bad_field",
    }
    assert [entry.reason for entry in read_rows(tmp_path)].count("duplicate_key") == 1
    assert entries["a"].row == {
        "key": "a", "source": f"{tmp_path}/call 1.wav", "target": "你 好 啊", "speaker": "zhang", "call": "rec1",
        "start": 0.5, "end": 2.5,
    }
    assert "end" not in entries["b"].row and entries["b"].row["channel"] == 0
    assert entries["d"].detail == "recording rec9 is not in wav.scp"
    done = command("filter", "--input", tmp_path, "--output", tmp_path / "o.jsonl", "--max_reject_ratio", "1")
    assert done.returncode == 0 and [row["seconds"] for row in read_lines(tmp_path / "o.jsonl")] == [2.0, 6.0]
    done = command("convert", "--input", tmp_path, "--output", tmp_path / "f.jsonl", "--do_upsample",
                   "--max_reject_ratio", "1")
    assert done.returncode == 0 and [row["speech_length"] for row in read_lines(tmp_path / "f.jsonl")] == [200, 600]


def test_the_sides_of_a_kaldi_call_are_its_channels_and_a_mix_is_said(tmp_path):
    sides = [murmur(4.0, 8000, seed) for seed in range(3)]
    soundfile.write(tmp_path / "stereo.wav", np.stack(sides[:2], 1), 8000)
    encode(tmp_path / "mono.amr", sides[2], 8000, "libopencore_amrnb")
    write_lines(tmp_path / "wav.scp", (f"{name} {tmp_path}/{file}" for name, file in
                (("x-A", "stereo.wav"), ("x-B", "stereo.wav"), ("y-B", "mono.amr"), ("z", "stereo.wav"))))
    write_lines(tmp_path / "text", ("a 一", "b 二", "c 三", "d 四"))
    write_lines(tmp_path / "segments", ("a x-A 0 2", "b x-B 0 2", "c y-B 0 2", "d z 0 2"))
    write_lines(tmp_path / "reco2file_and_channel", ("x-A x A", "x-B x\t2", "y-B y B", "z z C"))
    found = [(entry.reason, entry.given["call"], entry.row and entry.row.get("channel"))
             for entry in read_rows(tmp_path)]
    assert found == [("", "x", 0), ("", "x", 1), ("", "y", None), ("bad_field", "z", None)]
    write_lines(tmp_path / "reco2file_and_channel", ("x-A x 0", "x-B x 1"))
    with pytest.raises(UserError, match="a side 0; the sides of a call are A and B"):
        list(read_rows(tmp_path))
    write_lines(tmp_path / "reco2file_and_channel", ("x-A x A", "x-B x B", "y-B y B"))
    done = command("filter", "--input", tmp_path, "--output", tmp_path / "o.jsonl", "--split", "dev")
    assert [row.get("channels") for row in read_lines(tmp_path / "o.jsonl")] == [None, None, None, 2]
    assert "1 of 4 rows are the mix of several channels: no `channel` was given" in done.stderr


@pytest.mark.parametrize("name, lines", [("wav.scp", "rec1 a.wav\nrec1 b.wav\n"), ("utt2spk", "a zhang\na li\n")])
def test_a_kaldi_table_with_two_lines_for_one_id_is_refused(tmp_path, name, lines):
    for other, text in (("wav.scp", "rec1 a.wav\n"), ("segments", "a rec1 0 1\n"), ("text", "a 好\n"), (name, lines)):
        (tmp_path / other).write_text(text)
    done = command("filter", "--input", tmp_path, "--output", tmp_path / "o.jsonl")
    assert done.returncode == 2 and f"{name}: {lines.split()[0]} has two lines" in done.stderr.splitlines()[-1]


# --- split


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=30))
def test_groups_share_no_call_and_no_speaker(pairs):
    rows = [{"key": str(i), "source": str(i), "call": f"c{c}", "speaker": f"s{s}"} for i, (c, s) in enumerate(pairs)]
    groups = group_rows(rows, ("call", "speaker"))
    assert sorted(i for group in groups for i in group) == list(range(len(rows)))
    for name in ("call", "speaker"):
        owners = [{rows[i][name] for i in group} for group in groups]
        assert sum(map(len, owners)) == len(set().union(*owners))


def test_split_gives_two_halves_of_different_people(tmp_path, corpus):
    names = [(row, f"{row['key']}-{i}") for row in corpus for i in range(20)]
    rows = [row | {"key": name, "source": f"/x/{name}.wav", "audio_hash": name} for row, name in names]
    source, dev, test = write_lines(tmp_path / "in.jsonl", rows), tmp_path / "dev.jsonl", tmp_path / "test.jsonl"
    main(["split", "--input", str(source), "--dev", str(dev), "--test", str(test)])
    first, second = read_lines(dev), read_lines(test)
    assert sorted(first + second, key=rows.index) == rows and min(len(first), len(second)) == 40
    assert not {row["speaker"] for row in first} & {row["speaker"] for row in second}
    calls = [row | {"speaker": None, "call": row["speaker"]} for row in rows]
    main(["split", "--input", str(write_lines(source, calls)), "--dev", str(dev), "--test", str(test)])
    assert not {row["call"] for row in read_lines(dev)} & {row["call"] for row in read_lines(test)}
    write_lines(source, random.Random(0).sample(rows, len(rows)))
    main(["split", "--input", str(source), "--dev", str(dev), "--test", str(test)])
    assert {row["key"] for row in read_lines(dev)} == {row["key"] for row in first}, "whatever the order of the file"
    write_lines(source, [row | {"speaker": "one"} for row in rows])
    for rows in (read_lines(source), []):
        with pytest.raises(UserError, match="hang together"):
            main(["split", "--input", str(write_lines(source, rows)), "--dev", str(dev), "--test", str(test)])


def test_a_sample_takes_bad_rows_too_and_starts_anywhere(tmp_path, corpus):
    source, output = write_lines(tmp_path / "in.jsonl", [*corpus, "no json"]), tmp_path / "elsewhere/sample.jsonl"
    main(["sample", "--input", str(source), "--output", str(output), "--rows", "9"])
    assert sorted(entry.reason for entry in read_rows(output)) == ["", "", "", "", "", "", "bad_json"]
    sources = {entry.row["source"] for entry in read_rows(output) if entry.row}
    assert sources == {str(tmp_path / row["source"]) for row in corpus}


@pytest.mark.parametrize("name", ["call", "speaker"])
def test_a_sample_can_be_split(tmp_path, name):
    rows = [{"key": f"{i}", "source": "a.wav" if i else "b.wav", "target": "好", name: f"{i % 200 == 0:d}"}
            for i in range(600)]  # fmt: skip
    main(["sample", "--input", str(write_lines(tmp_path / "in.jsonl", rows)), "--output", str(tmp_path / "out.jsonl")])
    assert sorted(row[name] for row in read_lines(tmp_path / "out.jsonl")) == ["0"] * 7 + ["1"] * 3


def test_a_split_that_leaves_test_small_says_by_whom_it_hangs_together(tmp_path, caplog):
    rows = [{"key": f"u{i}", "source": f"/x/{i}.wav", "target": "好", "audio_hash": f"{i}", "call": f"{i % 30}",
             "speaker": "agent7" if i % 30 else "agent8"} for i in range(60)]  # fmt: skip
    source, dev, test = write_lines(tmp_path / "in.jsonl", rows), tmp_path / "dev.jsonl", tmp_path / "test.jsonl"
    main(["split", "--input", str(source), "--dev", str(dev), "--test", str(test)])
    assert len(read_lines(test)) == 2
    assert "test has 2 of 60 rows, as 58 hang together, 58 of them by agent7; give a test set" in caplog.text


def test_a_sample_of_a_kaldi_folder_is_rejected_for_the_reasons_of_the_folder(tmp_path):
    (tmp_path / "wav.scp").write_text("a sph2pipe -f wav a.sph |\n")
    (tmp_path / "text").write_text("a 好\n")
    main(["sample", "--input", str(tmp_path), "--output", str(tmp_path / "elsewhere/sample.jsonl")])
    sampled = read_rows(tmp_path / "elsewhere/sample.jsonl")
    assert [entry.reason for entry in (*read_rows(tmp_path), *sampled)] == ["source_is_command"] * 2


# --- convert


def converted(tmp_path, rows, *options, name="train", workers=1):
    source = write_lines(tmp_path / f"{name}_in.jsonl", rows)
    main(["convert", "--input", str(source), "--output", str(tmp_path / f"out/{name}_formatted.jsonl"),
          "--num_workers", str(workers), *map(str, options)])
    return read_lines(tmp_path / f"out/{name}_formatted.jsonl")


def path_of(row):
    return row["messages"][1]["content"].split("|>!")[1].removesuffix("<|endofspeech|>")


@pytest.mark.parametrize(("style", "text", "warned"), [
    ("spoken", "一共三百元。", False), ("spoken", "一共300元", True), ("written", "一共三百元", True),
    ("written", "一共300元", False), ("written", "Hello, how are you?", False),
])  # fmt: skip
def test_a_text_style_that_does_not_fit_the_corpus_is_said(tmp_path, corpus, caplog, style, text, warned):
    rows = [corpus[0] | {"key": f"u{i}", "target": text} for i in range(100)]
    converted(tmp_path, rows, "--do_upsample", "--text_style", style)
    assert (f"TEXT_STYLE={style} fit" in caplog.text) == warned


def test_a_formatted_row_is_what_funasr_reads(tmp_path, corpus):
    rows = converted(tmp_path, corpus, "--do_upsample", "--text_style", "spoken")
    assert [row["key"] for row in rows] == [row["key"] for row in corpus]
    path = str(tmp_path / "out/audio/train/u0.flac")
    assert rows[0] == {
        "key": "u0", "speech_length": 200, "text_length": 6, "speaker": "s0",
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": f"语音转写，不进行文本规整：<|startofspeech|>!{path}<|endofspeech|>"},
            {"role": "assistant", "content": "你好第0句话"},
        ],
    }
    header = soundfile.info(path)
    assert (header.samplerate, header.channels, header.frames) == (16000, 1, 32000)


def test_stereo_calls_segments_and_rates_become_16_khz_mono(tmp_path):
    left, right = murmur(3.0, 48000, 1), murmur(3.0, 48000, 2)
    soundfile.write(tmp_path / "call.wav", np.stack([left, right], 1), 48000)
    soundfile.write(tmp_path / "low.wav", murmur(1.0, 11025), 11025)
    soundfile.write(tmp_path / "whole.flac", murmur(1.0, 16000), 16000)
    rows = converted(tmp_path, [
        {"key": "l", "source": "call.wav", "target": "好", "channel": 0, "start": 1.0, "end": 2.505},
        {"key": "r", "source": "call.wav", "target": "好", "channel": 1},
        {"key": "low", "source": "low.wav", "target": "好"},
        {"key": "whole", "source": "whole.flac", "target": "好", "channel": {"codec": "pcma"}},
        {"key": "half", "source": "whole.flac", "target": "好", "end": 0.5},
    ], "--do_upsample")
    assert [row["speech_length"] for row in rows] == [150, 300, 100, 100, 50]
    assert path_of(rows[3]) == str(tmp_path / "whole.flac") and rows[3]["channel"] == {"codec": "pcma"}
    assert "channel" not in rows[0]
    expected = resample(left[48000:120240], 48000, 16000)
    assert np.abs(audio.read(path_of(rows[0]))[0] - expected).max() < 2**-14


@pytest.mark.parametrize("suffix", ["flac", "wav"])
def test_audio_is_written_as_flac_or_wav(tmp_path, corpus, suffix):
    rows = converted(tmp_path, corpus[:1], "--do_upsample", "--audio_format", suffix)
    assert path_of(rows[0]) == str(tmp_path / f"out/audio/train/u0.{suffix}")
    assert soundfile.info(path_of(rows[0])).format == suffix.upper()


def test_low_rates_need_do_upsample(tmp_path, corpus):
    with pytest.raises(UserError, match="sampling_rate 6"):
        converted(tmp_path, corpus)
    assert {row["reason"] for row in read_lines(tmp_path / "out/rejected_train_formatted.jsonl")} == {"sampling_rate"}
    rows = converted(tmp_path, corpus, "--output_fs", 8000)
    assert path_of(rows[0]) == str(tmp_path / "u0.wav"), "8 kHz files serve an 8 kHz front end in place"


def test_audio_that_is_no_window_of_the_features_goes_from_dev_too(tmp_path, corpus):
    for name, samples in (("short", 199), ("window", 200)):
        soundfile.write(tmp_path / f"{name}.wav", murmur(2.0, 8000)[:samples], 8000)
    rows = [corpus[0] | {"key": name, "source": f"{name}.wav"} for name in ("short", "window")]
    kept = converted(tmp_path, rows, "--do_upsample", "--max_reject_ratio", 0.5, name="dev")
    assert [(row["key"], row["speech_length"]) for row in kept] == [("window", 2)]
    assert [row["reason"] for row in read_lines(tmp_path / "out/rejected_dev_formatted.jsonl")] == ["too_short"]


def test_keys_from_strangers_stay_in_the_output_folder(tmp_path, corpus):
    keys = ["../../x", "/etc/passwd", "..", "好的", "a\nb", "a b", "a/b", "x" * 4000, "$(touch pwned)", "'; rm -rf ~;'"]
    rows = converted(tmp_path, [corpus[0] | {"key": key} for key in keys], "--do_upsample")
    assert [row["key"] for row in rows] == keys
    assert len({path_of(row) for row in rows}) == len(keys)
    assert all(Path(path_of(row)).parent == tmp_path / "out/audio/train" for row in rows)
    main(["validate", "--input", str(tmp_path / "out/train_formatted.jsonl"), "--check_audio"])


def test_the_same_key_in_train_and_dev_has_two_files(tmp_path, corpus):
    train = converted(tmp_path, corpus[:1], "--do_upsample")
    dev = converted(tmp_path, [corpus[1] | {"key": "u0"}], "--do_upsample", name="dev")
    assert path_of(train[0]) != path_of(dev[0])


@pytest.mark.parametrize("name", ["a<|endofspeech|>b.wav", "a\nb.wav"])
def test_a_path_that_would_break_the_prompt_is_copied(tmp_path, corpus, name):
    soundfile.write(tmp_path / name, murmur(1.0, 16000), 16000)
    rows = converted(tmp_path, [corpus[0] | {"source": name}])
    assert path_of(rows[0]) == str(tmp_path / "out/audio/train/u0.flac")


def test_workers_do_not_change_a_byte(tmp_path, corpus):
    converted(tmp_path, corpus, "--do_upsample", "--output_audio_dir", tmp_path / "one")
    first = (tmp_path / "out/train_formatted.jsonl").read_text().replace(str(tmp_path / "one"), "")
    converted(tmp_path, corpus, "--do_upsample", "--output_audio_dir", tmp_path / "two", workers=2)
    assert (tmp_path / "out/train_formatted.jsonl").read_text().replace(str(tmp_path / "two"), "") == first
    assert same_tree(tmp_path / "one", tmp_path / "two")


def test_text_length_counts_tokens_of_the_models_tokenizer(tmp_path, corpus):
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(["你好"] * 9, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.save_pretrained(tmp_path / "tokenizer")
    rows = converted(tmp_path, corpus, "--do_upsample", "--tokenizer", tmp_path / "tokenizer")
    assert [row["text_length"] for row in rows] == [len(fast.tokenize(row["target"])) for row in corpus]
    texts = [f"您好，这里是第{i}号客服，请问有什么可以帮您的吗？" for i in range(10_000)]
    count, start = text_lengths(str(tmp_path / "tokenizer")), time.process_time()
    assert len(count(texts)) == 10_000 and time.process_time() - start < 12, "100,000 rows in a minute on two cores"
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(UserError) as caught:
            text_lengths(str(folder))
        assert caught.value.code == 2


# --- validate and stats


def asking(row, content):
    system, _, assistant = row["messages"]
    return {"messages": [system, {"role": "user", "content": content}, assistant]}


def test_validate_finds_each_fault_and_exits_1(tmp_path, corpus):
    converted(tmp_path, corpus[:3], "--do_upsample")
    converted(tmp_path, corpus[4:5], "--do_upsample", name="dev")
    train, dev = tmp_path / "out/train_formatted.jsonl", tmp_path / "out/dev_formatted.jsonl"
    done = command("validate", "--input", train, dev)
    assert done.returncode == 1 and "speaker 's1'" in done.stderr, "u1 and u4 are one person's"
    assert command("validate", "--input", train).returncode == 0
    rows = read_lines(train)
    soundfile.write(tmp_path / "low.wav", murmur(2.0, 8000), 8000)
    prompt = "<|startofspeech|>!{}<|endofspeech|>"
    faults = [
        ({"speech_length": 201}, "speech_length"), ({"text_length": 0}, "text_length"), ({"key": "u1"}, "was there"),
        ({"messages": rows[0]["messages"][:2]}, "system, user, assistant"), ({"messages": None}, "messages"),
        (asking(rows[0], prompt.format("/none.wav")), "does not exist"),
        (asking(rows[0], prompt.format(tmp_path / "low.wav")), "8000 Hz"), (asking(rows[0], "x"), "startofspeech"),
        (asking(rows[0], prompt.format("/a\nb.wav")), "startofspeech"),
    ]
    for fault, message in faults:
        write_lines(train, [*rows[1:], rows[0] | fault])
        with pytest.raises(UserError, match=message) as caught:
            main(["validate", "--input", str(train)])
        assert caught.value.code == 1
    write_lines(train, [rows[0]] * 13)
    done = command("validate", "--input", train)
    assert done.returncode == 1 and done.stderr.count("ERROR") == 10 and "error: 12 problems" in done.stderr
    train.write_text("")
    assert command("validate", "--input", train).returncode == 1


def test_validate_reads_every_header_and_decodes_what_it_is_told_to(tmp_path, corpus):
    row = converted(tmp_path, corpus[:1], "--do_upsample")[0]
    rows = sorted((row | {"key": f"k{i}"} for i in range(2000)), key=lambda row: hash_share(row["key"]))
    soundfile.write(tmp_path / "low.wav", murmur(2.0, 8000), 8000)
    whole = Path(path_of(row)).read_bytes()
    (tmp_path / "damaged.flac").write_bytes(whole[: len(whole) // 2])
    prompt = "<|startofspeech|>!{}<|endofspeech|>"
    train = tmp_path / "train.jsonl"
    for name, options, message in (("low.wav", [], "8000 Hz"), ("damaged.flac", ["--check_audio"], "damaged")):
        write_lines(train, [*rows[:-1], rows[-1] | asking(row, prompt.format(tmp_path / name))])
        with pytest.raises(UserError, match=f"1 problems.*{message}"):
            main(["validate", "--input", str(train), *options])


def test_validate_decodes_a_sample_unasked(tmp_path, corpus):
    row = converted(tmp_path, corpus[:1], "--do_upsample")[0]
    Path(path_of(row)).write_bytes(Path(path_of(row)).read_bytes()[:20_000])
    with pytest.raises(UserError, match="1 problems.*damaged"):
        main(["validate", "--input", str(tmp_path / "out/train_formatted.jsonl")])


@pytest.mark.parametrize("shared", ["call", "wideband_source"])
def test_validate_finds_a_call_and_a_recording_before_the_channel_in_two_sets(tmp_path, corpus, shared):
    for name, row in (("train", corpus[0]), ("dev", corpus[1])):
        converted(tmp_path, [row | {shared: "/x"}], "--do_upsample", name=name)
    with pytest.raises(UserError, match="1 problems.*'/x' is in train too"):
        main(["validate", "--input", *(str(tmp_path / f"out/{name}_formatted.jsonl") for name in ("train", "dev"))])


def test_validate_finds_a_recording_that_two_corpora_share(tmp_path, corpus):
    row = converted(tmp_path, corpus[:1], "--do_upsample")[0]
    for name in ("one/train.jsonl", "two/test.jsonl"):
        (tmp_path / name).parent.mkdir()
        write_lines(tmp_path / name, [row])
    with pytest.raises(UserError, match="1 problems.*audio '.*' is in train too"):
        main(["validate", "--input", str(tmp_path / "one/train.jsonl"), str(tmp_path / "two/test.jsonl")])


def test_validate_has_nothing_against_the_same_key_in_two_sets(tmp_path, corpus):
    converted(tmp_path, corpus[:1], "--do_upsample")
    converted(tmp_path, [corpus[1] | {"key": "u0"}], "--do_upsample", name="dev")
    main(["validate", "--input", *(str(tmp_path / f"out/{name}_formatted.jsonl") for name in ("train", "dev"))])


def test_the_report_adds_up_and_says_when_it_does_not(tmp_path, corpus):
    source = write_lines(tmp_path / "train.jsonl", [*corpus, "no json"])
    data = tmp_path / "data/real_8k_telephone"
    main(["filter", "--input", str(source), "--output", str(tmp_path / "w.jsonl"), "--conf", str(CONF),
          "--max_reject_ratio", "0.2"])  # fmt: skip
    output = data / "train_formatted.jsonl"
    main(["convert", "--input", str(tmp_path / "w.jsonl"), "--output", str(output), "--do_upsample"])
    (tmp_path / "rejected_w.jsonl").rename(data / "rejected_train.jsonl")
    (data / "dev_formatted.jsonl").write_text("".join(output.read_text().splitlines(keepends=True)[:2]))
    (data / "rejected_dev.jsonl").touch()
    words = ["stats", "--data_dir", str(tmp_path / "data"), "--source", f"real_8k_telephone/train={source}"]
    main(words)
    report = (tmp_path / "data/STAGE0_COMPLETION_REPORT.md").read_text()
    assert "| real_8k_telephone/train | 7 | 6 | 1 | 14.3% | 0.00 | 7 | 0 | 2 |" in report, "two texts are dev's too"
    assert "| bad_json | 1 |" in report and "dev and test are\nnever cut by them" in report
    assert f"| {output} | {data}/rejected_train.jsonl |" in report
    assert (tmp_path / "data/stage0_histograms.png").stat().st_size > 10_000
    write_lines(source, [*corpus, "no json", "one more"])
    with pytest.raises(UserError, match="has 8 rows"):
        main(words)


def test_the_pictures_of_the_report_are_of_seconds_and_of_dbov(tmp_path, corpus):
    paths = [path_of(row) for row in converted(tmp_path, corpus, "--do_upsample")]
    drawn = {}

    def hist(axes, values, **options):
        drawn[axes] = sorted(values)

    with mock.patch("matplotlib.axes.Axes.hist", hist), mock.patch("matplotlib.axes.Axes.legend"):
        main(["stats", "--data_dir", str(tmp_path)])
    lengths, levels = drawn.values()
    assert lengths == pytest.approx(sorted(soundfile.info(path).duration for path in paths), abs=0.01)
    rms = [np.sqrt(np.mean(soundfile.read(path)[0] ** 2)) for path in paths]
    assert levels == pytest.approx(sorted(20 * np.log10(rms)), abs=0.01)


@pytest.mark.parametrize(("offered", "count"), [("wideband", "2 telephone"), ("telephone", "1 wideband")])
def test_the_report_counts_audio_of_another_band_than_offered(tmp_path, corpus, caplog, offered, count):
    soundfile.write(tmp_path / "wide.wav", murmur(2.0, 16000), 16000)
    soundfile.write(tmp_path / "upsampled.wav", resample(murmur(2.0, 8000, 7), 8000, 16000), 16000)
    rows = [corpus[0] | {"key": name, "source": f"{name}.wav"} for name in ("u0", "wide", "upsampled")]
    filtered(tmp_path, rows, "--expect_band", offered)
    assert f"{count.split()[0]} of 3 rows offered as {offered} are not" in caplog.text
    output = tmp_path / "data/c/train_formatted.jsonl"
    main(["convert", "--input", str(tmp_path / "train.jsonl"), "--output", str(output), "--do_upsample"])
    main(["stats", "--data_dir", str(tmp_path / "data")])
    report = (tmp_path / "data/STAGE0_COMPLETION_REPORT.md").read_text()
    assert f"| c/train | 3 | 3 | 0 | 0.0% | 0.00 | not counted | {count} | 0 |" in report


def test_hours_disk_and_time_of_the_whole_are_told_by_a_sample(tmp_path, corpus, capsys):
    source, data = write_lines(tmp_path / "in.jsonl", corpus), tmp_path / "data/simulated_8k_telephone"
    output, whole = data / "train_formatted.jsonl", write_lines(tmp_path / "whole.jsonl", many(corpus, 6000))
    main(["convert", "--input", str(source), "--output", str(output), "--do_upsample"])
    main(["stats", "--data_dir", str(tmp_path / "data"), "--estimate", "6", "--source", f"{data.name}/train={whole}"])
    size = 1000 * sum(path.stat().st_size for path in data.rglob("*.flac")) / 1e9
    told = f"{whole}: about 6000 utterances, 3.3 hours, {size:.2f} GB, 1.67 core-hours of simulation"
    assert told in capsys.readouterr().out, "12 s of sample took 6 s"


def test_the_report_shows_the_ten_that_are_furthest_from_the_limit(tmp_path, corpus):
    lengths = [2.1 + 0.1 * i for i in range(12)]
    random.Random(0).shuffle(lengths)
    for i, length in enumerate(lengths):
        soundfile.write(tmp_path / f"w{i}.wav", murmur(length, 8000, 50 + i), 8000)
    rows = [{"key": f"long{lengths[i]:.1f}", "source": f"w{i}.wav", "target": "你好世界"} for i in range(12)]
    filtered(tmp_path, [corpus[0], *rows], "--max_speech_length", 200)
    data = tmp_path / "data/c"
    main(["convert", "--input", str(tmp_path / "train.jsonl"), "--output", str(data / "train_formatted.jsonl"),
          "--do_upsample"])
    (tmp_path / "rejected_train.jsonl").rename(data / "rejected_train.jsonl")
    main(["stats", "--data_dir", str(tmp_path / "data")])
    worst = (tmp_path / "data/STAGE0_COMPLETION_REPORT.md").read_text().split("### too_long")[1].split("##")[0]
    assert re.findall(r"long[\d.]+", worst) == [f"long{length:.1f}" for length in sorted(lengths)[:1:-1]]


# --- faults


def test_progress_in_a_log_is_a_line_now_and_then_and_nothing_for_short_work(capsys, monkeypatch):
    now = [0]
    monkeypatch.setattr("tqdm.std.time", lambda: now[0])
    for title, count in (("short", 4), ("long", 100)):
        for _ in progress(range(count), count, title):
            now[0] += 1
    lines = capsys.readouterr().err.split("\n")
    assert all("short" not in line for line in lines)
    assert 15 < len([line for line in lines if "long: " in line and " left" in line]) < 25


def same_tree(one, two):
    compared = filecmp.dircmp(one, two, ignore=[])
    if compared.left_only or compared.right_only or compared.funny_files:
        return False
    _, different, errors = filecmp.cmpfiles(one, two, compared.common_files, shallow=False)
    return not different and not errors and all(same_tree(one / name, two / name) for name in compared.common_dirs)


def many(corpus, count):
    return [corpus[i % 6] | {"key": f"k{i}"} for i in range(count)]


def start_convert(tmp_path, source, *options):
    line = [sys.executable, ROOT / "local/prepare_training_data.py", "convert", "--input", source, "--do_upsample",
            "--output", tmp_path / "train_formatted.jsonl", "--output_audio_dir", tmp_path / "audio", *options]
    return subprocess.Popen(list(map(str, line)), stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_files(folder, process, count=20):
    while process.poll() is None and len(list(folder.rglob("*.flac"))) < count:
        time.sleep(0.02)


def test_a_worker_killed_by_the_system_is_a_clear_error_and_work_is_kept(tmp_path, corpus):
    source = write_lines(tmp_path / "in.jsonl", many(corpus, 3000))
    process = start_convert(tmp_path / "out", source, "--num_workers", 2)
    wait_for_files(tmp_path / "out", process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [int(child) for child in children if "popen_loky" in Path(f"/proc/{child}/cmdline").read_text()]
    os.kill(workers[0], signal.SIGKILL)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 1 and "killed by the system" in log, log
    assert list((tmp_path / "out/audio").rglob("*.flac")) and not (tmp_path / "out/train_formatted.jsonl").exists()


def test_a_full_disk_is_one_line_and_finished_work_is_kept(tmp_path, corpus, disk):
    source, folder = write_lines(tmp_path / "in.jsonl", many(corpus, 80)), disk("size=1m")
    process = start_convert(folder, source, "--num_workers", 2)
    _, log = process.communicate(timeout=120)
    assert process.returncode == 1 and "error: No space left" in log and "Traceback" not in log, log
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*.flac")}
    assert written and all(soundfile.info(path).frames == 32000 for path in written)
    subprocess.run(["mount", "-o", "remount,size=16m", folder], check=True)
    assert start_convert(folder, source, "--num_workers", 2).wait() == 0
    assert len(read_lines(folder / "train_formatted.jsonl")) == 80
    assert all(path.stat().st_mtime_ns == time for path, time in written.items())


def bash_quoted(words):
    quoted = ["bash", "-c", 'printf %s "${*@Q}"', "bash", *map(str, words)]
    return subprocess.run(quoted, capture_output=True, text=True, check=True).stdout


def test_a_trial_is_of_stage_0_alone(tmp_path):
    line = ["bash", ROOT / "test_data_prep.sh", "1", "--exp_output", tmp_path / "exp"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "a trial of stage 0 alone" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.full
def test_data_prep_takes_ten_of_each_corpus_and_says_what_the_whole_would_take(tmp_path):
    from miniature import build_folder

    home = tmp_path / "it's my $(data)"
    home.mkdir()
    for name, rate in (("raw_16k", 16000), ("real_8k", 8000)):
        for split in ("train", "dev"):
            rows = []
            for i in range(15):
                key = f"{name}-{split}-{i}"
                soundfile.write(home / f"{key}.wav", murmur(1.0, rate, len(rows) + 99 * len(name + split)), rate)
                rows.append({"key": key, "source": f"{key}.wav", "target": "你好世界", "speaker": key})
            write_lines(home / f"{name}_{split}.jsonl", [*rows, "no json", rows[0] | {"key": "x", "target": "[noise]"}])
    build_folder(home / "base", "你好世界")
    (home / "exp/model").mkdir(parents=True)
    (home / "exp/model/model_dir.txt").write_text(f"{home / 'base'}\n")
    sets = [f"{name}_{split}" for name in ("raw_16k", "real_8k") for split in ("train", "dev")]
    options = [f"--{name}={home / name}.jsonl" for name in sets]
    line = ["bash", ROOT / "test_data_prep.sh", "--exp_output", home / "exp", "--python", sys.executable, *options]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    assert f"simulated_8k_telephone/train={home}/raw_16k_train.jsonl: about 17 utterances, 0.0 hours" in done.stdout
    assert "core-hours of simulation" in done.stdout and done.stdout.count(": about 17 utterances") == 6
    assert f"wideband_16k/train={home}/raw_16k_train.jsonl: about 17 utterances, 0.0 hours, 0.00 GB\n" in done.stdout
    for part in ("simulated_8k_telephone", "real_8k_telephone", "wideband_16k"):
        names = ("train_formatted", "rejected_train", "dev_formatted", "rejected_dev", "test_formatted")
        rows = [len(read_lines(home / f"exp/test_data_prep/data/{part}/{name}.jsonl")) for name in names]
        assert rows[0] + rows[1] == 10 and sum(rows[2:]) == 10, (part, rows)
    report = (home / "exp/test_data_prep/data/STAGE0_COMPLETION_REPORT.md").read_text()
    assert "| real_8k_telephone/train | 10 |" in report and "| simulated_8k_telephone/train | 10 |" in report
    assert sorted(path.name for path in (home / "exp").iterdir() if path.name[0] != ".") == ["model", "test_data_prep"]
    assert done.stdout.splitlines()[-1].endswith(f"bash run_experiment.sh 0 {bash_quoted(line[2:])}")


@pytest.mark.full
def test_twenty_kills_and_a_rerun_end_in_the_same_bytes(tmp_path, corpus):
    source, folder = write_lines(tmp_path / "in.jsonl", many(corpus, 3000)), tmp_path / "out"
    assert start_convert(folder, source, "--num_workers", 2).wait() == 0
    folder.rename(tmp_path / "whole")
    rng, left = random.Random(0), []
    for files in range(0, 3000, 150):  # by what is written, not by the clock: a run may be faster than the one before
        process = start_convert(folder, source, "--num_workers", 2)
        wait_for_files(folder, process, files)
        time.sleep(rng.uniform(0, 0.1))
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        left.append(len(list(folder.rglob("*.flac"))))
    assert any(0 < count < 3000 for count in left), f"no kill came between the first file and the last: {left}"
    assert start_convert(folder, source, "--num_workers", 2).wait() == 0
    assert same_tree(tmp_path / "whole", folder)


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, corpus, read_only):
    source = write_lines(tmp_path / "in.jsonl", corpus)
    for words in (["convert", "--output", read_only / "o.jsonl"], ["filter", "--output", read_only / "o.jsonl"],
                  ["convert", "--output", tmp_path / "o.jsonl", "--output_audio_dir", read_only, "--do_upsample"]):
        done = command(*words, "--input", source)
        assert done.returncode == 1 and str(read_only) in done.stderr, done.stderr
        assert "choose another EXP_OUTPUT" in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr


def test_changed_settings_or_input_after_a_kill_redo_the_files(tmp_path, corpus):
    source = write_lines(tmp_path / "in.jsonl", many(corpus, 400))
    process = start_convert(tmp_path / "out", source, "--num_workers", 1)
    wait_for_files(tmp_path / "out", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    soundfile.write(tmp_path / "u0.wav", murmur(1.0, 8000, 9), 8000)
    rows = [row | {"source": "u5.wav"} if row["source"] == "u1.wav" else row for row in many(corpus, 400)]
    assert start_convert(tmp_path / "out", write_lines(source, rows), "--num_workers", 1).wait() == 0
    lengths = [row["speech_length"] for row in read_lines(tmp_path / "out/train_formatted.jsonl")]
    assert lengths[::6] == [100] * len(lengths[::6])
    first, fifth = (audio.read(tmp_path / f"out/audio/train/k{i}.flac")[0] for i in (1, 5))
    assert np.array_equal(first, fifth)


def test_what_a_power_failure_left_empty_is_written_anew(tmp_path, corpus):
    rows = [*corpus, corpus[0] | {"key": "gone", "source": "gone.wav"}]
    with pytest.raises(UserError):  # the run ends before its end
        converted(tmp_path, rows, "--do_upsample")
    empty = tmp_path / "out/audio/train/u0.flac"
    kept, whole = empty.with_name("u1.flac").stat().st_mtime_ns, empty.read_bytes()
    empty.write_bytes(b"")
    assert len(converted(tmp_path, rows, "--do_upsample", "--max_reject_ratio", 0.5)) == 6
    assert empty.read_bytes() == whole and empty.with_name("u1.flac").stat().st_mtime_ns == kept


@pytest.mark.full
def test_a_dask_cluster_writes_the_same_bytes(tmp_path, corpus):
    source = write_lines(tmp_path / "in.jsonl", many(corpus, 200))
    assert start_convert(tmp_path / "local", source, "--num_workers", 2).wait() == 0
    for nowhere in ("tcp://127.0.0.1:1", "no address"):
        process = start_convert(tmp_path / "none", source, "--dask_scheduler", nowhere)
        _, log = process.communicate(timeout=120)
        assert process.returncode == 2 and "error: no Dask scheduler" in log and "Traceback" not in log, log
    dask = str(Path(sys.executable).with_name("dask"))
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": tmp_path}
    port = random.randrange(20000, 60000)
    address = f"tcp://127.0.0.1:{port}"
    cluster = [subprocess.Popen([dask, "scheduler", "--host", address, "--no-dashboard"], **quiet)]
    cluster += [subprocess.Popen([dask, "worker", address, "--nthreads", "1", "--no-dashboard"], **quiet) for _ in "ab"]
    try:
        deadline = time.time() + 120
        while socket.socket().connect_ex(("127.0.0.1", port)) and time.time() < deadline:
            time.sleep(0.2)
        process = start_convert(tmp_path / "dask", source, "--dask_scheduler", address)
        assert process.wait(timeout=300) == 0, process.stderr.read()
        for name, options in (("here", []), ("there", ["--dask_scheduler", address])):
            words = ["--input", write_lines(tmp_path / "few.jsonl", corpus), "--output", tmp_path / f"{name}.jsonl"]
            assert command("filter", *words, *options).returncode == 0
    finally:
        for part in reversed(cluster):
            part.terminate()
            part.wait()
    assert same_tree(tmp_path / "local/audio", tmp_path / "dask/audio")
    texts = [(tmp_path / name / "train_formatted.jsonl").read_text() for name in ("local", "dask")]
    assert texts[0].replace("/local/", "/dask/") == texts[1]
    assert (tmp_path / "here.jsonl").read_bytes() == (tmp_path / "there.jsonl").read_bytes()
