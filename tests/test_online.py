"""ONLINE_CHANNEL=1 in training: FunASR's dataset with a fresh channel per epoch, for the rows meant for it alone."""

import threading

import numpy as np
import pytest
import torch

import audio
import nano.dataset
from check_training import check_before
from common import UserError, write_json, write_jsonl
from mini import QUICK, arguments, formatted, make_model, train_here
from sounds import speech
from telephone import channel, noise
from test_telephone import CONF
from test_training import build


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """Frontend and tokenizer of a miniature model, four rows for the channel and one for replay, their settings."""
    folder = tmp_path_factory.mktemp("online")
    model = build(make_model(folder / "model"))
    rows, pool = [], []
    for number in range(5):
        path = folder / f"{number}.wav"
        row = formatted(f"u{number}", path, 0.5 * speech(1.5 + number / 10, seed=number), "一二三")
        rows.append(row | ({"channel": {"online": str(folder / "channel.json")}} if number < 4 else {}))
        pool.append(noise.Recording(f"u{number}", str(path)))
    settings = {"config": channel.load_config(CONF), "seed": 5, "output_fs": 16000, "pool": pool, "noises": []}
    write_json(folder / "channel.json", settings)
    return folder, model.kwargs, rows


def dataset(parts, rows=None, is_training=True, **conf):
    folder, kwargs, given = parts
    write_jsonl(folder / "list.jsonl", rows or given)
    conf = {**kwargs["dataset_conf"], "prompt_classes": None, "batch_type": "example", **conf}
    pieces = {name: kwargs[name] for name in ("frontend", "tokenizer")}
    return nano.dataset.FunASR(str(folder / "list.jsonl"), is_training=is_training, **pieces, **conf)


@pytest.fixture
def with_channel(monkeypatch):
    monkeypatch.setattr(nano.dataset.FunASR, "channel", staticmethod(channel.simulate))


def features(data):
    return [data[number]["speech"][0] for number in range(len(data))]


def test_an_epoch_has_the_features_of_the_calls_stage_0_writes(parts, with_channel, tmp_path):
    folder, _, rows = parts
    data = dataset(parts, cache_gib=1.0)
    seen = []
    for data.epoch in (0, 1, 0):
        written = []
        for row in rows:
            samples, fs = audio.read(folder / f"{row['key'][1:]}.wav")
            if "channel" in row:
                samples = channel.simulate(str(folder / "channel.json"), row["key"], samples, fs, data.epoch)
            path = tmp_path / f"{data.epoch}{row['key']}.flac"
            written.append(formatted(row["key"], path, samples, "一二三"))
        online_now, offline = features(data), features(dataset(parts, written))
        assert all(torch.equal(a, b) for a, b in zip(online_now, offline, strict=True))
        seen.append(online_now)
        write_jsonl(folder / "list.jsonl", rows)
    assert not any(torch.equal(a, b) for a, b in zip(seen[0][:4], seen[1][:4], strict=True))
    # A replay row stays as it is, and it alone is kept in memory.
    assert torch.equal(seen[0][4], seen[1][4]) and list(data.cache) == [4]


def test_the_epoch_reaches_worker_processes(parts, with_channel):
    data = dataset(parts)
    torch.set_num_threads(1)  # as in a worker: on some CPUs a matrix product is rounded otherwise by several
    data.epoch = 7
    here = features(data)
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=2)
    assert all(torch.equal(a, b["speech"][0]) for a, b in zip(here, loader, strict=True))


def test_rows_for_the_channel_are_never_used_without_it(parts, monkeypatch):
    monkeypatch.setattr(nano.dataset.FunASR, "channel", None)
    with pytest.raises(ValueError, match="drawn in training"):
        dataset(parts)
    monkeypatch.setattr(nano.dataset.FunASR, "channel", staticmethod(channel.simulate))
    with pytest.raises(ValueError, match="dev rows"):
        dataset(parts, is_training=False)
    with pytest.raises(UserError, match="u0.*no epoch"):
        dataset(parts)[0]


def test_a_channel_that_fails_stops_training_and_says_where(parts, monkeypatch):
    folder, _, rows = parts
    monkeypatch.setattr(nano.dataset.FunASR, "channel", staticmethod(channel.simulate))
    data = dataset(parts, [rows[0] | {"channel": {"online": str(folder / "nowhere.json")}}])
    data.epoch = 0
    with pytest.raises(UserError, match="u0.*nowhere.json"):
        data[0]
    monkeypatch.setattr(nano.dataset.FunASR, "channel", staticmethod(lambda *_: np.zeros(3, np.float32)))
    data = dataset(parts)
    data.epoch = 0
    with pytest.raises(UserError, match="u0.*made"):
        data[0]


def test_a_stage_trains_online_in_workers_and_stops_where_the_settings_are_gone(parts, tmp_path):
    folder, _, rows = parts
    dev = [{name: value for name, value in row.items() if name != "channel"} for row in rows]
    gone = [row | {"channel": {"online": str(tmp_path / "gone.json")}} for row in rows]
    write_jsonl(tmp_path / "dev.jsonl", dev)
    overlay = QUICK | {"dataset_conf": QUICK["dataset_conf"] | {"num_workers": 2}}
    valid = {"overlay": overlay, "valid_list": tmp_path / "dev.jsonl"}
    args, before = arguments(tmp_path / "a", folder / "model", rows, **valid), set(threading.enumerate())
    train_here(args)
    assert (args.output_dir / "averaged.pt").is_file()
    args = arguments(tmp_path / "b", folder / "model", gone, **valid)
    with pytest.raises(UserError, match="gone.json"):
        train_here(args)
    assert not (args.output_dir / "averaged.pt").exists()
    # Or tensorboardX would close its file as Python ends, and 3.12 shows a traceback for that.
    assert not [thread for thread in set(threading.enumerate()) - before if "EventLogger" in type(thread).__name__]
    with pytest.raises(UserError, match="gone.json"):
        check_before(args)
