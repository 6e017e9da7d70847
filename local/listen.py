r"""Write one HTML page of utterances before and after the telephone: a player and a spectrogram each, a kind a row.

    python local/listen.py --input corpus/dev.jsonl --output listen.html     # or: make listen CONFIG=my.conf

Corpus, channel, seed and place of the page are those of the experiment (RAW_16K_DEV, CHANNEL_CONF, SEED, EXP_OUTPUT in
the environment or its CONFIG) where no flag says otherwise; without any corpus, the demo's is spoken.
Every row is another utterance. Its channel is drawn as stage 0 draws it, from (seed, key); then what the row's title
names is put in, and the line below says what else there was, by the names of the YAML. The page needs no network.
"""

import argparse
import base64
import contextlib
import io
import itertools
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

import audio
from common import ROOT, UserError, atomic_write, read_options, run
from corpus import read_rows, segment
from telephone import noise
from telephone.channel import apply, draw, load_config
from telephone.codecs import from_pcm
from telephone.resample import resample

FS = 16000
SECONDS = 8.0  # of an utterance that go into the page
# Title, presets, what is changed in the plan that was drawn.
KINDS: list[tuple[str, list[str], dict[str, Any]]] = [
    ("The plain band, 300-3400 Hz, and A-law", ["clean-pcma"], {}),
    ("Landline: a handset's response, A-law", ["landline"], {}),
    ("Mobile: AMR at 12.2 kbit/s", [], {"hop1": {"codec": "amr_nb", "kbps": 12.2, "dtx": False}}),
    ("Cell edge: AMR at 4.75 kbit/s, comfort noise", [], {"hop1": {"codec": "amr_nb", "kbps": 4.75, "dtx": True}}),
    ("Old mobile: GSM 06.10", ["gsm"], {}),
    ("An app: Opus", ["opus"], {}),
    ("HD leg: G.722, cut to 8 kHz by the exchange", ["g722"], {}),
    ("Cordless set: G.726", ["g726"], {}),
    ("Recorder: MP3 at 8 kbit/s", [], {"recorder": {"codec": "mp3", "kbps": 8.0}}),
    ("10 % of the packets lost, in bursts", [], {"hop1": {"codec": "g711_alaw"},  # whose packets are lost
                                                 "packet_loss": {"percent": 10.0, "burst": 3.0}}),
    ("Voices around, 6 dB below", [], {"noise": {"kind": "babble", "snr_db": 6.0}}),
    ("Hands-free in a small room", [], {"room": {"rt60_s": 0.5, "direct_db": 3.0}}),
    ("Overdriven", [], {"limiter": {"kind": "hard_clip"}, "active_dbov": -9.0}),
    ("A bad line: noise, hum, echo", [], {"line": {"noise": "white", "noise_dbm0": -50.0, "hum_dbm0": -45.0,
                                                   "echo_ms": 90.0, "echo_loss_db": 20.0}}),
]  # fmt: skip
PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>How the simulated calls sound</title>
<style>body{font:16px/1.45 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;color:#222}
.pair{display:flex;flex-wrap:wrap;gap:1rem}.pair>div{flex:1 1 20rem}img,audio{width:100%}h2{margin:2rem 0 0}
p{margin:.3rem 0}small{color:#666;overflow-wrap:anywhere}</style>
<h1>How the simulated calls sound</h1>
<p>Distributions: {{ config }}, seed {{ seed }}. Below each pair, what was drawn.</p>
{% for row in rows %}<h2>{{ row.title }}</h2><p>{{ row.text }}</p><div class="pair">
{% for name in ("recording", "call") %}
<div><p>{{ name }}</p><audio controls src="{{ row[name].sound }}" aria-label="{{ name }}"></audio>
<img src="{{ row[name].picture }}" alt="spectrogram, {{ name }}"></div>
{% endfor %}</div><small>{{ row.key }}: {{ row.plan }}</small>{% endfor %}</html>
"""


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, help="Wideband corpus: JSONL or a Kaldi folder.")
    parser.add_argument("--output", type=Path, help="HTML file to write.")
    parser.add_argument("--config", type=Path, help="Distributions, as conf/telephone_channel.yaml.")
    return parser.parse_args()


def given_corpus(options: dict[str, str]) -> Path:
    """The experiment's wideband dev corpus; without one, the demo's, which is spoken where it is not there."""
    if options["RAW_16K_DEV"]:
        return ROOT / options["RAW_16K_DEV"]
    corpus = ROOT / options["EXP_OUTPUT"] / "demo/corpus"
    if not (corpus / "wideband_dev.jsonl").exists():
        command = [sys.executable, ROOT / "demo/speak_corpus.py", "--output", corpus, "--seed", options["SEED"]]
        if code := subprocess.call(command):
            sys.exit(code)
    return corpus / "wideband_dev.jsonl"


def utterances(path: Path) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
    """The rows that can be read and hold a second of wideband speech, each with its first seconds."""
    for entry in read_rows(path):
        with contextlib.suppress(audio.AudioError):
            if entry.row:
                samples, fs = audio.read(entry.row["source"], **segment(entry.row))
                samples = resample(samples[: int(SECONDS * fs)], fs, FS)
                if fs >= FS and samples.size >= FS and noise.active_level(samples, FS) > noise.SILENT_DBOV:
                    yield entry.row, samples


def shown(samples: np.ndarray) -> dict[str, str]:
    """A sound and its spectrogram as data URIs."""
    from matplotlib.figure import Figure  # slow to import

    picture = io.BytesIO()
    figure = Figure(figsize=(6, 2.2), layout="constrained")
    axes = figure.subplots()
    faint = 1e-5 * np.random.default_rng(0).standard_normal(samples.size)  # the logarithm of nothing is no number
    axes.specgram(samples + faint, NFFT=512, Fs=FS, noverlap=384, vmin=-120, vmax=-40, cmap="magma")
    axes.set(xlabel="s", ylabel="Hz")
    figure.savefig(picture, format="png", dpi=80, metadata={"Software": None})
    flac = audio.encode(samples, FS, "FLAC", "PCM_16")
    data = {"sound": ("audio/flac", flac), "picture": ("image/png", picture.getvalue())}
    return {n: f"data:{kind};base64,{base64.b64encode(content).decode()}" for n, (kind, content) in data.items()}


def described(plan: dict[str, Any]) -> str:
    """What was drawn and measured, in one line."""
    items = {name: value if isinstance(value, dict) else {"": value} for name, value in plan.items() if value}
    del items["draw"]  # the number all noise comes from says nothing to a reader
    return "; ".join(
        f"{name} " + ", ".join(f"{what} {value}".strip() for what, value in drawn.items())
        for name, drawn in items.items()
    )


def main() -> None:
    args, options = get_args(), read_options()
    args.input = args.input or given_corpus(options)
    args.output = args.output or ROOT / options["EXP_OUTPUT"] / "listen/index.html"
    args.config = args.config or ROOT / options["CHANNEL_CONF"]
    configs = [load_config(args.config, *presets) for _, presets, _ in KINDS]
    voices = list(itertools.islice(utterances(args.input), len(KINDS)))
    if not voices:
        raise UserError(f"--input {args.input} has no wideband utterance of a second or more that can be read")
    pool = [noise.Recording(row["key"], row["source"], **segment(row)) for row, _ in voices]
    rows = []
    for number, ((title, _, changes), config) in enumerate(zip(KINDS, configs, strict=True)):
        row, samples = voices[number % len(voices)]
        plan = draw(config, int(options["SEED"]), row["key"]) | changes
        call = from_pcm(apply(plan, samples, FS, FS, row["key"], pool))
        rows.append({"title": title, "text": row["target"], "key": row["key"], "plan": described(plan),
                     "recording": shown(samples), "call": shown(call)})  # fmt: skip
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(PAGE)
    with atomic_write(args.output) as file:
        file.write(page.render(rows=rows, config=args.config, seed=options["SEED"]))
    print(f"listen: {args.output}")


if __name__ == "__main__":
    run(main)
