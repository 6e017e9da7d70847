"""Every key of channel, filter and decoding YAML is alive; the keys of training are those of test_keys.py."""

import copy

import pytest
import yaml

import decode
import score
from common import UserError, write_jsonl
from corpus_filter import LIMITS, TextRules, over_limit
from mini import ROOT, helper_here, make_rows
from nano.config import flat_items, read_stage
from nano.inference import SCORING, read_conf
from telephone.channel import PROBABILITY, SCHEMA, draw, load_config

CHANNEL = ROOT / "conf" / "telephone_channel.yaml"
# Whatever the YAML's own shares: everything that can happen does, in some of the draws.
EVERYTHING = {
    "noise.probability": 1.0, "room.probability": 1.0, "packet_loss.probability": 1.0, "line.noise_probability": 1.0,
    "line.hum_probability": 1.0, "line.echo_probability": 1.0,
}


def two_values(allowed: tuple) -> list:
    """Two ends of what a key may be: never and always, low and high, one name and another."""
    if allowed == PROBABILITY:
        return [0.0, 1.0]
    if isinstance(allowed[0], str):
        return [{name: 1.0} for name in allowed[:2]]
    low, high = allowed
    return [[low, low + (high - low) / 4], [high - (high - low) / 4, high]]


def plans(key: str, value) -> list[dict]:
    config = load_config(CHANNEL)
    for name, setting in [*EVERYTHING.items(), (key, value)]:
        config[name] = setting
    return [{**draw(config, 0, f"utterance {number}"), "draw": None} for number in range(400)]


@pytest.mark.parametrize("key", [name for name in SCHEMA if name != "noise.own_file_probability"])
def test_a_key_of_the_channel_changes_what_is_drawn(key):
    one, other = (plans(key, value) for value in two_values(SCHEMA[key]))
    assert one != other


@pytest.mark.parametrize("share", [0.25, 0.75])
def test_own_recordings_take_their_share_of_the_noise(tmp_path, share):
    config = yaml.safe_load(CHANNEL.read_text())
    config["noise"]["own_file_probability"] = share
    (tmp_path / "channel.yaml").write_text(yaml.safe_dump(config))
    assert load_config(tmp_path / "channel.yaml", own_noise=True)["noise.kind"]["file"] == share


def test_the_channel_yaml_holds_every_key_and_no_other():
    given = yaml.safe_load(CHANNEL.read_text())
    given.pop("presets")
    assert {f"{section}.{name}" for section, names in given.items() for name in names} == set(SCHEMA)


# --- data_filter.yaml

FILTER = yaml.safe_load((ROOT / "conf" / "data_filter.yaml").read_text())
TEXT = "Ａbc，好的。"


@pytest.mark.parametrize(("key", "values"), [("case", ["lower", "upper"]), ("punctuation", ["keep", "remove"])])
def test_a_key_of_the_text_policy_changes_the_text(key, values):
    texts = []
    for value in values:
        config = copy.deepcopy(FILTER)
        config["text"][key] = value
        texts.append(TextRules(config).normalise(TEXT))
    assert texts[0] != texts[1]


@pytest.mark.parametrize("key", FILTER["train_only"])
def test_a_limit_drops_a_row_or_does_not(key):
    facts = {what: 5.0 for _reason, what, _unit in LIMITS.values()}
    limit = {True: 4.0, False: 6.0}[key.startswith("max")]
    assert over_limit(facts, {key: limit})[0] == LIMITS[key][0]
    assert over_limit(facts, {key: 10.0 - limit}) is None


@pytest.mark.parametrize("number", range(len(FILTER["rules"])))
def test_every_rule_is_what_drops_its_examples(number):
    without = copy.deepcopy(FILTER)
    rule = without["rules"].pop(number)
    why = [TextRules(FILTER).reason(example) for example in rule["drops"]]
    assert all(why)
    assert why != [TextRules(without).reason(example) for example in rule["drops"]]


# --- decode.yaml

DECODE = yaml.safe_load((ROOT / "conf" / "decode.yaml").read_text())


@pytest.mark.parametrize(("key", "values"), [
    ("device", ("cpu", "cuda")), ("dtype", ("fp32", "fp16")), ("batch_size", (2, 4)), ("batch_seconds", (2, 600)),
    ("max_new_tokens", (5, 60)), ("max_tokens_per_second", (1, 15)),
])  # fmt: skip
def test_a_key_of_decoding_changes_what_the_model_is_asked_for(tmp_path, monkeypatch, key, values):
    (tmp_path / "config.yaml").touch()
    (tmp_path / "model.pt").touch()
    write_jsonl(tmp_path / "list.jsonl", make_rows(tmp_path, 4))
    asked = []

    class Recogniser:
        fs = 16000

        def __init__(self, *made_of):
            asked[-1].append(made_of)

        def load(self, _checkpoint):
            pass

        def transcribe(self, utterances, *limits):
            asked[-1].append((len(utterances), *limits))
            return [""] * len(utterances)

    monkeypatch.setattr(decode, "Recogniser", Recogniser)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: True)
    fixed = {"dtype": "fp32", "batch_size": 4, "batch_seconds": 600}  # which `auto` has by the device
    for value in values:
        asked.append([])
        (tmp_path / "conf.yaml").write_text(yaml.safe_dump({**DECODE, **fixed, key: value}))
        done = helper_here(decode.main, "--model_dir", tmp_path, "--checkpoint=base=", "--conf", tmp_path / "conf.yaml",
                           f"--test_set=t={tmp_path}/list.jsonl", "--output_dir", tmp_path / "out")  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert len(asked[0]) > 1 and asked[0] != asked[1]


@pytest.mark.parametrize(("key", "values"), [("chinese_numerals", (False, True)), ("bootstrap_resamples", (3, 2000))])
def test_a_key_of_scoring_changes_the_scores(tmp_path, key, values):
    rows = [{"key": str(number), "hyp": "一共12元", "ref": "一共十二元" if number % 3 else "一共十二块", "seconds": 1.0,
             "model": "base", "test_set": "real_test"} for number in range(20)]  # fmt: skip
    write_jsonl(tmp_path / "t/base.real_test.jsonl", rows)
    scores = []
    for value in values:
        (tmp_path / "decode.yaml").write_text(yaml.safe_dump(DECODE | {key: value}))
        done = helper_here(score.main, "--transcripts", tmp_path / "t", "--conf", tmp_path / "decode.yaml",
                           "--output", tmp_path / "summary.json", "--keywords", "")  # fmt: skip
        assert done.returncode == 0, done.stderr
        scores.append((tmp_path / "summary.json").read_text())
    assert scores[0] != scores[1]


def test_decode_yaml_holds_the_keys_that_are_read_and_no_other():
    read = {*read_conf(ROOT / "conf" / "decode.yaml"), *SCORING}
    assert flat_items(DECODE).keys() == read


def test_a_key_of_decode_yaml_that_nothing_reads_is_refused(tmp_path):
    conf = tmp_path / "decode.yaml"
    conf.write_text((ROOT / "conf/decode.yaml").read_text("utf-8") + "beam_size: 5\n", "utf-8")
    with pytest.raises(UserError, match="beam_size: missing, or nothing reads it"):
        read_conf(conf)


# --- all of them


@pytest.mark.parametrize(("name", "read"), [
    ("stage1_encoder_adapt", lambda path: read_stage([path])), ("decode", read_conf),
    ("data_filter", TextRules.load), ("telephone_channel", load_config),
])  # fmt: skip
def test_a_key_that_is_there_twice_is_refused(tmp_path, name, read):
    text = (ROOT / f"conf/{name}.yaml").read_text("utf-8")
    again = next(line for line in text.splitlines() if ":" in line and line[0].islower())
    (tmp_path / "twice.yaml").write_text(f"{text}\n{again}\n", "utf-8")
    with pytest.raises(UserError, match="(?s)twice.yaml: cannot be read as YAML: .*duplicate key"):
        read(tmp_path / "twice.yaml")
