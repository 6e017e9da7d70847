"""Write the report of an experiment: one self-contained HTML file, and the same in Markdown.

    python local/report.py --exp_output exp_output --output exp_output/report --report_audio false

Everything shown is read from what the stages left: scores, transcripts, logs, run records. A part that is not there
is named as missing. `--report_audio false` keeps the callers' voices out of the file.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import jinja2
import soundfile

import audio
import metrics
from common import UserError, atomic_write, read_jsonl, run

SETS = {"real_test": "recorded calls", "simulated_test": "simulated calls", "wideband_test": "wideband speech",
        "no_speech": "no speech"}
TELEPHONE = ("real_test", "simulated_test")  # the first that was scored makes the headline
MAX_SILENCE_GAIN = 5.0  # characters a minute where nobody speaks that the final model may write over the base
MAX_SILENCE = 10.0  # and above this the report says what to do about it
AUDIO_SECONDS = 20.0  # of a recording that go into the file
CONDITIONS = {"codec": "codec", "second codec": "second codec", "recorder": "recorder's codec",
              "snr": "signal-to-noise ratio", "loss": "packet loss", "duration": "length of the utterance",
              "corpus": "corpus", "speaker": "speaker, the five with most errors"}
# The line that funasr/train_utils/trainer_ds.py logs.
LOG_LINE = re.compile(r"\b(train|val), rank: 0, .*?total step: (\d+), .*?\(loss_avg_slice: ([\d.]+)\)")


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--exp_output", required=True, type=Path, help="The experiment's folder (EXP_OUTPUT).")
    parser.add_argument("--output", required=True, type=Path, help="Folder for index.html and report.md.")
    parser.add_argument("--report_audio", choices=("true", "false"), default="true",
                        help="Whether recordings go into the file. Default: %(default)s.")
    return parser.parse_args()


def read_json(path: Path, missing: list[str], default: Any) -> Any:
    """A JSON file's value; where it is not there, note that and return `default`."""
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        missing.append(f"{path} ({type(error).__name__})")
        return default


def percent(rate: float | None) -> str:
    return "–" if rate is None else f"{100 * rate:.2f}"


def compare(title: str, pair: tuple, name: str, allowed: float, note: str) -> dict[str, Any]:
    """One figure of base and final for the headline; `state` judges its rise."""
    base, final = pair[0][name], pair[1][name]
    state = "good" if final <= base else "fair" if final - base <= allowed else "bad"
    if name == "chars_per_minute":
        shown = {"base": f"{base:.1f}", "final": f"{final:.1f}", "unit": "chars/min"}
    else:
        shown = {"base": percent(base), "final": percent(final), "unit": "%"}
    return {"title": title, "state": state, "note": note, **shown}


def judge(summary: list[dict[str, Any]], max_wideband_loss: float) -> dict[str, Any]:
    """The headline: whether to deploy, what speaks against it, what to know, and base against final in figures."""
    rows = {(row["test_set"], row["model"]): row for row in summary}
    pairs = {name: (rows[name, "base"], rows[name, "final"])
             for name in SETS if {(name, "base"), (name, "final")} <= rows.keys()}
    calls = next((name for name in TELEPHONE if name in pairs), None)
    if calls is None:
        headline = "Nothing to decide on yet: no calls were scored with both base and final."
        return {"deploy": None, "headline": headline, "against": [], "notes": [], "cards": []}
    base, final = pairs[calls]
    p_value = "unknown" if final["p_value"] is None else f"{final['p_value']:.3f}"
    interval = f"95 % interval {percent(final['cer_low'])} to {percent(final['cer_high'])}, p = {p_value}"
    cards = [compare(f"CER, {SETS[calls]}", pairs[calls], "cer", 0, f"{interval}; {final['utterances']} utterances")]
    if final["kwer"] is not None:
        note = f"of {final['keyword_occurrences']} spoken; precision {percent(final['keyword_precision'])} %"
        cards.append(compare(f"Keywords missed, {SETS[calls]}", pairs[calls], "kwer", 0, note))
    if "wideband_test" in pairs:
        change = 100 * (pairs["wideband_test"][1]["cer"] - pairs["wideband_test"][0]["cer"])
        note = f"what was forgotten: {change:+.2f} points; {100 * max_wideband_loss:.2f} are allowed"
        cards.append(compare("CER, wideband speech", pairs["wideband_test"], "cer", max_wideband_loss, note))
    notes = []
    if "no_speech" in pairs:
        note = "on hum, ringing, music: all of it made up"
        silence = pairs["no_speech"]
        cards.append(compare("Written where nobody speaks", silence, "chars_per_minute", MAX_SILENCE_GAIN, note))
        if silence[1]["chars_per_minute"] > MAX_SILENCE:
            notes.append("where nobody speaks it still writes: let it hear speech only, cut as make transcribe does")
    against = [f"{SETS[name]}: not scored" for name in SETS if name not in pairs and name != "simulated_test"]
    if final["p_value"] is None or final["p_value"] >= 0.05 or final["cer"] >= base["cer"]:
        against.append(f"on {SETS[calls]} the final model is not reliably better than the base (p = {p_value})")
    against += [f"{card['title']}: {card['base']} → {card['final']} {card['unit']} ({card['note']})"
                for card in cards[1:] if card["state"] == "bad"]
    verdict = "Do not deploy before looking at this" if against else "Deploy"
    errors = f"{cards[0]['final']} % of characters on {SETS[calls]} are wrong, {cards[0]['base']} % with the base"
    return {"deploy": not against, "headline": f"{verdict}: {errors}.", "against": against, "notes": notes,
            "cards": cards}


def losses(log: str) -> dict[str, list[tuple[int, float]]]:
    """(step, loss) of training and validation out of a train.log; a validation's last line counts."""
    curves: dict[str, dict[int, float]] = {"train": {}, "val": {}}
    for kind, step, loss in LOG_LINE.findall(log):
        curves[kind][int(step)] = float(loss)
    return {kind: sorted(points.items()) for kind, points in curves.items()}


def stages(exp_output: Path, missing: list[str]) -> list[dict[str, Any]]:
    """What each training stage recorded: run.json, parameters.json, loss curves."""
    found = []
    for record in sorted(exp_output.glob("exp/*/*[a-z]/run.json")):  # a folder moved aside ends in its time
        folder, log = record.parent, record.with_name("train.log")
        if not log.is_file():
            missing.append(str(log))
        found.append({
            "name": folder.name, "run": read_json(record, missing, {}),
            "curves": losses(log.read_text("utf-8", errors="replace") if log.is_file() else ""),
            "parameters": read_json(folder / "parameters.json", missing, {}),
        })
    if not found:
        missing.append(f"{exp_output}/exp/*/*/run.json")
    return found


def data_counts(exp_output: Path, missing: list[str]) -> list[dict[str, Any]]:
    """Rows and hours of every formatted list, and how many rows were rejected."""
    counts = []
    for path in sorted(exp_output.glob("data/*/[!r]*_formatted.jsonl")):  # not rejected_…
        split = path.name.removesuffix("_formatted.jsonl")
        rejected = path.with_name(f"rejected_{split}.jsonl")
        lengths = [row["speech_length"] for row in read_jsonl(path)]
        counts.append({
            "name": path.parent.name, "split": split, "rows": len(lengths), "hours": sum(lengths) / 360000,
            "rejected": len(rejected.read_bytes().splitlines()) if rejected.is_file() else None,
        })
    if not counts:
        missing.append(f"{exp_output}/data/*/*_formatted.jsonl")
    return counts


def commands(exp_output: Path) -> list[str]:
    """The commands that the stages wrote at the head of their logs, in the order of the stages."""
    paths = sorted(exp_output.glob("logs/*.log"), key=lambda path: ("stage-1" not in path.name, path.name))
    lines = [line for path in paths for line in path.read_text("utf-8", errors="replace").splitlines()]
    return list(dict.fromkeys(line[2:].strip() for line in lines if line.startswith("# bash ")))


def transcripts(exp_output: Path, test_set: str, model: str) -> dict[str, dict[str, Any]]:
    path = exp_output / "eval" / "transcripts" / f"{model}.{test_set}.jsonl"
    return {row["key"]: row for row in read_jsonl(path)} if path.is_file() else {}


def worst(exp_output: Path, missing: list[str], with_audio: bool) -> list[dict[str, Any]]:
    """The twenty utterances of calls with most errors of the final model, aligned with their reference."""
    found = []
    for test_set in TELEPHONE:
        base = transcripts(exp_output, test_set, "base")
        for key, row in transcripts(exp_output, test_set, "final").items():
            chunks = metrics.align(metrics.normalise(row["ref"]), metrics.normalise(row["hyp"]))
            found.append({
                "key": key, "row": row, "chunks": chunks, "base": base.get(key, {}).get("hyp"),
                "errors": sum(max(len(old), len(new)) for kind, old, new in chunks if kind != "equal"),
                "length": sum(len(old) for _, old, _ in chunks), "conditions": metrics.conditions(row),
            })
    found = sorted((item for item in found if item["errors"]), key=lambda item: (-item["errors"], item["key"]))[:20]
    for item in found:
        item["audio"] = embed(item["row"].get("audio"), missing) if with_audio else None
    return found


def gallery(exp_output: Path, missing: list[str]) -> list[dict[str, Any]]:
    """One simulated call per kind of line, beside the wideband recording it was made of."""
    wideband, shown = transcripts(exp_output, "wideband_test", "final"), {}
    for key, row in transcripts(exp_output, "simulated_test", "final").items():
        codec = metrics.conditions(row).get("codec")
        if codec and codec not in shown:
            shown[codec] = {
                "codec": codec, "conditions": metrics.conditions(row), "ref": row["ref"],
                "telephone": embed(row["audio"], missing),
                "wideband": embed(wideband.get(key, {}).get("audio"), missing),
            }
    return list(shown.values())


def embed(path: str | None, missing: list[str]) -> str | None:
    """The start of a recording as an MP3 data URI, which every browser plays."""
    if path is None:
        return None
    try:
        samples, rate = audio.read(path)
    except audio.AudioError as error:
        missing.append(str(error))
        return None
    buffer = io.BytesIO()
    soundfile.write(buffer, samples[: int(AUDIO_SECONDS * rate)], rate, format="MP3")
    return "data:audio/mpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def condition_groups(details: dict[str, Any]) -> list[dict[str, Any]]:
    """CER of base and final on calls, by condition, in the order of a condition's values."""
    def order(row: dict[str, Any]) -> tuple:
        number = re.search(r"[\d.]+", row["value"])
        return not row["value"].startswith("under"), float(number[0]) if number else 1e9, row["value"], row["model"]

    groups = []
    for test_set in TELEPHONE:
        for condition, title in CONDITIONS.items():
            rows = [row for row in details.get("conditions", []) if row["model"] in ("base", "final")
                    and row["test_set"] == test_set and row["condition"] == condition and row["cer"] is not None]
            final = sorted((row for row in rows if row["model"] == "final"), key=lambda row: -row["cer"])
            shown = {row["value"] for row in final[: 5 if condition == "speaker" else None]}
            if len(shown) > 1:
                rows = sorted((row for row in rows if row["value"] in shown), key=order)
                groups.append({"title": f"{SETS[test_set]} by {title}", "rows": rows})
    return groups


def loss_curve(curves: dict[str, list[tuple[int, float]]]) -> str:
    """Losses by step as an SVG data URI."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # The same numbers give the same bytes; letters stay letters, in the reader's font.
    with pyplot.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        figure, axes = pyplot.subplots(figsize=(4.6, 3.0))
        for name, points in curves.items():
            axes.plot([step for step, _ in points], [loss for _, loss in points], label=name)
        axes.set(xlabel="step", ylabel="loss (mean of the epoch so far)")
        axes.legend()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
        pyplot.close(figure)
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()


def gather(exp_output: Path, with_audio: bool) -> dict[str, Any]:
    """Everything the templates show."""
    missing: list[str] = []
    evaluation = exp_output / "eval"
    summary = read_json(evaluation / "summary.json", missing, [])
    details = read_json(evaluation / "details.json", missing, {})
    choice = read_json(evaluation / "interpolation.json", missing, None)
    found = stages(exp_output, missing)
    decoding = [json.loads(path.read_text("utf-8")) for path in sorted(evaluation.glob("transcripts/*.run.json"))]
    final = [row for row in details.get("keywords", []) if row["model"] == "final" and row["test_set"] in TELEPHONE]
    final.sort(key=lambda row: (row["reference"] == 0, row["keyword_recall"], -row["reference"]))
    return {
        "exp_output": exp_output, "summary": summary, "choice": choice, "stages": found, "decoding": decoding,
        "verdict": judge(summary, choice["max_wideband_loss"] if choice else 0.01),
        "sets": SETS, "keywords": final[:40],
        "confusions": [row for row in details.get("confusions", [])
                       if row["model"] == "final" and row["test_set"] in TELEPHONE][:20],
        "data": data_counts(exp_output, missing), "worst": worst(exp_output, missing, with_audio),
        "gallery": gallery(exp_output, missing) if with_audio else [], "with_audio": with_audio,
        "commands": commands(exp_output), "missing": missing,
        "charts": [{"title": f"Loss, {stage['name']}", "uri": loss_curve(stage["curves"])} for stage in found],
        "condition_groups": condition_groups(details),
    }


def main() -> None:
    args = get_args()
    if not args.exp_output.is_dir():
        raise UserError(f"--exp_output {args.exp_output} is not a folder; run the stages first", code=2)
    facts = gather(args.exp_output, args.report_audio == "true")
    for kind, output in (("html", "index.html"), ("md", "report.md")):
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=kind == "html", trim_blocks=True,
            lstrip_blocks=True, undefined=jinja2.StrictUndefined,
        )
        environment.filters["percent"] = percent
        with atomic_write(args.output / output) as file:
            file.write(environment.get_template(f"report_template.{kind}").render(facts))
    print(f"report: {args.output / 'index.html'}")


if __name__ == "__main__":
    run(main)
