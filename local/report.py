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

TELEPHONE = ("real_test", "simulated_test")  # the first that was scored makes the headline
MAX_SILENCE_GAIN = 5.0  # characters a minute where nobody speaks that the final model may write over the base
AUDIO_SECONDS = 20.0  # of a recording that go into the file
CONDITIONS = {"codec": "codec", "second codec": "second codec", "recorder": "recorder's codec",
              "snr": "signal-to-noise ratio", "loss": "packet loss", "duration": "length of the utterance"}
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


def judge(summary: list[dict[str, Any]], max_wideband_loss: float) -> dict[str, Any]:
    """The headline: whether final beats base on calls, by how much, what it costs, and so whether to deploy."""
    rows = {(row["test_set"], row["model"]): row for row in summary}
    pairs = {
        name: {"test_set": name, "base": rows[name, "base"], "final": rows[name, "final"]}
        for name in (*TELEPHONE, "wideband_test", "no_speech") if {(name, "base"), (name, "final")} <= rows.keys()
    }
    calls = next((name for name in TELEPHONE if name in pairs), None)
    wideband, silence = pairs.get("wideband_test"), pairs.get("no_speech")
    cards = {"telephone": pairs.get(calls), "wideband": wideband, "silence": silence}
    if calls is None:
        return {"deploy": None, "against": ["no calls were scored with both base and final"], "cards": cards}
    against = [] if calls == "real_test" else ["no real calls were scored, only simulated ones"]
    base, final = pairs[calls]["base"], pairs[calls]["final"]
    if final["p_value"] is None or final["p_value"] >= 0.05 or final["cer"] >= base["cer"]:
        against.append(f"on {calls} the final model is not reliably better than the base (p = {final['p_value']})")
    against += [f"{name} was not scored" for name in ("wideband_test", "no_speech") if name not in pairs]
    if wideband:
        loss = wideband["final"]["cer"] - wideband["base"]["cer"]
        if loss > max_wideband_loss:
            against.append(f"wideband CER rose by {100 * loss:.2f} points, {100 * max_wideband_loss:.2f} are allowed")
    if silence:
        old, new = (silence[model]["chars_per_minute"] for model in ("base", "final"))
        if new > old + MAX_SILENCE_GAIN:
            against.append(f"it writes {new:.1f} characters a minute where nobody speaks, the base {old:.1f}")
    return {"deploy": not against, "against": against, "cards": cards}


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
    for path in sorted(exp_output.glob("data/*/*_formatted.jsonl")):
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
    """CER of base and final on simulated calls, by condition, in the order of a condition's values."""
    def order(row: dict[str, Any]) -> tuple:
        number = re.search(r"[\d.]+", row["value"])
        return not row["value"].startswith("under"), float(number[0]) if number else 1e9, row["value"], row["model"]

    shown = [row for row in details.get("conditions", []) if row["cer"] is not None
             and row["test_set"] == "simulated_test" and row["model"] in ("base", "final")]
    groups = [
        {"title": title, "rows": sorted((row for row in shown if row["condition"] == condition), key=order)}
        for condition, title in CONDITIONS.items()
    ]
    return [group for group in groups if group["rows"]]


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
    return {
        "exp_output": exp_output, "summary": summary, "choice": choice, "stages": found, "decoding": decoding,
        "verdict": judge(summary, choice["max_wideband_loss"] if choice else 0.01),
        "keywords": sorted(final, key=lambda row: (row["keyword_recall"] or 0.0, -row["reference"]))[:40],
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
        environment.filters["percent"] = lambda rate: "–" if rate is None else f"{100 * rate:.2f}"
        with atomic_write(args.output / output) as file:
            file.write(environment.get_template(f"report_template.{kind}").render(facts))
    print(f"report: {args.output / 'index.html'}")


if __name__ == "__main__":
    run(main)
