"""Every key of channel, filter and decoding YAML is alive; the keys of training are those of test_keys.py."""

import copy

import numpy as np
import pytest
import yaml

import metrics
from common import UserError
from corpus_filter import LIMITS, TextRules, over_limit
from mini import ROOT
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


def test_resamples_change_the_interval():
    clusters, errors, lengths = np.arange(20), np.arange(20) % 3, np.full(20, 5)
    assert metrics.bootstrap(clusters, errors, lengths, 3) != metrics.bootstrap(clusters, errors, lengths, 2000)


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
