"""`make listen`: one page that holds what it shows, every kind of line before and after."""

import base64
import html
import io
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import soundfile

import audio
import listen
from mini import ROOT, helper
from sounds import speech
from telephone.channel import apply, draw, load_config


def run(folder, *more):
    channel = ROOT / "conf/telephone_channel.yaml"
    return helper("listen.py", "--output", "out/index.html", *more, "--config", channel, cwd=folder)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("listen")
    rows = [{"key": "<b>gone", "source": "nowhere.wav", "target": "x"}]
    for number in range(3):
        audio.write(folder / f"{number}.wav", 0.5 * speech(2, seed=number), 16000)
        rows.append({"key": f"<b>{number}", "source": f"{number}.wav", "target": "你好 <script>"})
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(folder, "--input", "in.jsonl")
    assert done.returncode == 0, done.stderr
    return folder, (folder / "out/index.html").read_text(encoding="utf-8")


def test_every_kind_has_both_sounds_and_both_spectrograms(page):
    _, text = page
    assert len(listen.KINDS) >= 12
    sounds = re.findall(r'src="data:audio/flac;base64,([^"]+)"', text)
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    assert len(sounds) == len(pictures) == 2 * len(listen.KINDS)
    assert len(set(sounds[1::2])) == len(listen.KINDS)
    for before, after in zip(sounds[::2], sounds[1::2], strict=True):
        (x, fs), (y, _) = (soundfile.read(io.BytesIO(base64.b64decode(sound))) for sound in (before, after))
        assert fs == 16000 and x.size == y.size == 32000
        power = np.abs(np.fft.rfft(y)) ** 2
        assert power[power.size // 2 + 1000 :].sum() < 1e-4 * power.sum()  # a telephone has nothing above 4 kHz
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    titles = [title for title, _, _ in listen.KINDS]
    assert list(map(html.unescape, re.findall("<h2>(.*?)</h2>", text))) == titles


def test_what_was_drawn_is_said_in_words(page):
    _, text = page
    lines = dict(zip(re.findall("<h2>(.*?)</h2>", text), re.findall("<small>(.*?)</small>", text), strict=True))
    assert "hop1 codec amr_nb, kbps 12.2, dtx False" in lines["Mobile: AMR at 12.2 kbit/s"]
    assert "packet_loss percent 10.0, burst 3.0" in lines["10 % of the packets lost, in bursts"]
    assert all("measured sent_dbov -" in line and "{" not in line and "draw" not in line for line in lines.values())
    assert text.count("<p>recording</p>") == text.count("<p>call</p>") == len(listen.KINDS)


def test_packets_are_lost_where_the_users_channel_has_no_first_hop():
    config = load_config(ROOT / "conf/telephone_channel.yaml", "no_codec", "no_noise")
    (changes,) = (changes for title, _, changes in listen.KINDS if "packets lost" in title)
    plan = draw(config, 0, "x") | changes
    apply(plan, speech(4), 16000, 16000)
    assert plan["measured"]["packets_lost"] > 0


def test_the_page_needs_no_network_and_runs_nothing_from_a_corpus(page):
    folder, text = page
    assert not re.search(r'(src|href)="(?!data:)', text)
    assert "<script" not in text and "<b>" not in text and "&lt;script&gt;" in text
    first = (folder / "out/index.html").read_bytes()
    assert run(folder, "--input", "in.jsonl").returncode == 0
    assert (folder / "out/index.html").read_bytes() == first


def test_a_corpus_without_speech_is_one_line(page):
    folder, _ = page
    (folder / "none.jsonl").write_text(json.dumps({"key": "x", "source": "nowhere.wav", "target": "x"}) + "\n")
    done = run(folder, "--input", "none.jsonl")
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith("error: --input none.jsonl")
    assert run(folder, "--input", "no.jsonl").returncode == 2


def test_an_experiment_is_heard_with_its_own_corpus_and_channel(page, tmp_path, monkeypatch):
    folder, _ = page
    (tmp_path / "my channel.yaml").write_text((ROOT / "conf/telephone_channel.yaml").read_text("utf-8"), "utf-8")
    (tmp_path / "my.conf").write_text(f"EXP_OUTPUT={tmp_path}/exp\nRAW_16K_DEV={folder}/in.jsonl\nSEED=7\n"
                                      f'CHANNEL_CONF="{tmp_path}/my channel.yaml"\n')  # fmt: skip
    monkeypatch.setenv("CONFIG", str(tmp_path / "my.conf"))
    monkeypatch.setattr(sys, "argv", ["listen.py"])
    listen.main()
    text = (tmp_path / "exp/listen/index.html").read_text("utf-8")
    assert f"{tmp_path}/my channel.yaml, seed 7" in text and html.escape("<b>1: ") in text
    assert [path.name for path in (tmp_path / "exp").iterdir()] == ["listen"]
    made = subprocess.check_output(["make", "-n", "listen", "LISTEN=a.jsonl"], cwd=ROOT, text=True)
    assert 'local/listen.py --input "a.jsonl"' in made and "speak_corpus" not in made
