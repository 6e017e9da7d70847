"""Write the report of an experiment: one self-contained HTML file, and most of it in Markdown.

    python local/report.py --exp_output exp_output --output exp_output/report --report_audio false

Everything shown is read from what the stages left: scores, transcripts, logs, run records. A part that is not there
is named as missing. `--report_audio false` keeps the callers' voices out of the file.
"""

import argparse
import base64
import io
import itertools
import json
import re
from pathlib import Path
from typing import Any

import jinja2

import audio
import metrics
from common import UserError, atomic_write, of_trainings, read_jsonl, run
from nano.train_log import read_log

SETS = {"real_test": "recorded calls", "simulated_test": "simulated calls", "wideband_test": "wideband speech",
        "no_speech": "no speech"}
TELEPHONE = ("real_test", "simulated_test")  # the first that was scored makes the headline
MAX_SILENCE_GAIN = 5.0  # characters a minute where nobody speaks that the final model may write over the base
MAX_SILENCE = 10.0  # and above this the report says what to do about it
AUDIO_SECONDS = 20.0  # of a recording that go into the file
CONDITIONS = {"codec": "codec", "second codec": "second codec", "recorder": "recorder's codec",
              "snr": "signal-to-noise ratio", "loss": "packet loss", "duration": "length of the utterance",
              "corpus": "corpus", "speaker": "speaker, the five with most errors"}


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
    state = "good" if final <= base else "fair" if metrics.within(final, base, allowed) else "bad"
    unit, show = ("chars/min", "{:.1f}".format) if name == "chars_per_minute" else ("%", percent)
    return {"title": title, "state": state, "note": note, "base": show(base), "final": show(final), "unit": unit}


def judge(summary: list[dict[str, Any]], max_wideband_loss: float) -> dict[str, Any]:
    """The headline: whether to deploy, what speaks against it, what to know, and base against final in figures."""
    rows = {(row["test_set"], row["model"]): row for row in summary}
    pairs = {name: (rows[name, "base"], rows[name, "final"])
             for name in SETS if {(name, "base"), (name, "final")} <= rows.keys()}
    # Of references that normalise to nothing there is no rate.
    pairs = {name: pair for name, pair in pairs.items() if name == "no_speech" or pair[0]["cer"] is not None}
    calls = next((name for name in TELEPHONE if name in pairs), None)
    if calls is None:
        headline = "Nothing to decide on yet: no calls with text were scored with both base and final."
        return {"deploy": None, "headline": headline, "against": [], "notes": [], "cards": []}
    base, final = pairs[calls]
    p_value = "unknown" if final["p_value"] is None else f"{final['p_value']:.3f}"
    interval = f"95 % interval {percent(final['cer_low'])} to {percent(final['cer_high'])}, p = {p_value}"
    cards = [compare(f"CER, {SETS[calls]}", pairs[calls], "cer", 0, f"{interval}; {final['utterances']} utterances")]
    notes = []
    if final["kwer"] is not None:
        note = f"of {final['keyword_occurrences']} spoken; precision {percent(final['keyword_precision'])} %"
        cards.append(compare(f"Keywords missed, {SETS[calls]}", pairs[calls], "kwer", 0, note))
    if wideband := pairs.get("wideband_test"):
        change = 100 * (wideband[1]["cer"] - wideband[0]["cer"])
        note = f"what was forgotten: {change:+.2f} points; {100 * max_wideband_loss:g} are allowed"
        cards.append(compare("CER, wideband speech", wideband, "cer", max_wideband_loss, note))
    if silence := pairs.get("no_speech"):
        note = "on hum, ringing, music: all of it made up"
        cards.append(compare("Written where nobody speaks", silence, "chars_per_minute", MAX_SILENCE_GAIN, note))
        if silence[1]["chars_per_minute"] > MAX_SILENCE:
            notes.append("where nobody speaks it still writes: let it hear speech only, cut as make transcribe does")
    against = [f"{SETS[name]}: {'nothing to compare' if (name, 'final') in rows else 'not scored'}"
               for name in SETS if name not in pairs and name != "simulated_test"]
    if final["p_value"] is None or final["p_value"] >= 0.05 or final["cer"] >= base["cer"]:
        unsure = f"on {SETS[calls]} the final model is not reliably better than the base (p = {p_value})"
        if final["groups"] < metrics.MIN_GROUPS:
            unsure += (f"; groups that share no call and no speaker: {final['groups']}, to tell it takes "
                       f"{metrics.MIN_GROUPS}")  # fmt: skip
        against.append(unsure)
    if (simulated := pairs.get("simulated_test")) and calls != "simulated_test":
        old, new = simulated
        if new["cer"] > old["cer"] and new["p_value"] is not None and new["p_value"] < 0.05:
            rates = f"{percent(old['cer'])} → {percent(new['cer'])} %"
            against.append(f"simulated calls are recognised worse: CER {rates} (p = {new['p_value']:.3f})")
    against += [f"{card['title']}: {card['base']} → {card['final']} {card['unit']} ({card['note']})"
                for card in cards[1:] if card["state"] == "bad"]
    verdict = "Do not deploy before looking at this" if against else "Deploy"
    errors = f"{cards[0]['final']} % of characters on {SETS[calls]} are wrong, {cards[0]['base']} % with the base"
    return {"deploy": not against, "headline": f"{verdict}: {errors}.", "against": against, "notes": notes,
            "cards": cards}


def stages(exp_output: Path, missing: list[str]) -> list[dict[str, Any]]:
    """What each training stage recorded: run.json, losses of train.log."""
    found = []
    for record in of_trainings(exp_output, "run.json"):
        log = record.with_name("train.log")
        if not log.is_file():
            missing.append(str(log))
        losses: dict[str, dict[int, float]] = {"train": {}, "val": {}}
        for step in read_log(log):  # of a validation's lines, and of a step that was done twice, the last counts
            losses[step["tag"]][step["total_step"]] = step["loss"]
        curves = {tag: sorted(points.items()) for tag, points in losses.items()}
        found.append({
            "name": record.parent.name, "run": read_json(record, missing, {}), "losses": curves,
            "chart": loss_curve(curves),
        })
    if not found:
        missing.append(f"{exp_output}/exp/*/*/run.json")
    return found


def loss_curve(curves: dict[str, list[tuple[int, float]]]) -> str:
    """Losses by step as an SVG data URI."""
    import matplotlib
    from matplotlib.figure import Figure

    # The same numbers give the same bytes; letters stay letters, in the reader's font.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        figure = Figure(figsize=(4.6, 3.0))
        axes = figure.subplots()
        for name, points in curves.items():
            axes.plot([step for step, _ in points], [loss for _, loss in points], label=name)
        axes.set(xlabel="step", ylabel="loss (mean of the epoch so far)")
        axes.legend()
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return data_uri("image/svg+xml", buffer.getvalue())


def data_uri(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def embed(path: str | None, missing: list[str]) -> str | None:
    """The start of a recording as an MP3 data URI, which every browser plays."""
    if path is None:
        return None
    try:
        samples, rate = audio.read(path)
    except audio.AudioError as error:
        missing.append(str(error))
        return None
    return data_uri("audio/mpeg", audio.encode(samples[: int(AUDIO_SECONDS * rate)], rate, "MP3"))


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
    logs = {path.name: path for path in exp_output.glob("logs/*.log")}
    logs |= {path.parent.name: path for path in of_trainings(exp_output, "train.log")}
    paths = [logs[name] for name in sorted(logs)]
    lines = [line for path in paths for line in path.read_text("utf-8", errors="replace").splitlines()]
    return list(dict.fromkeys(line[2:].strip() for line in lines if re.match(r"# (\w+=.*)?bash run_experiment", line)))


def gallery(simulated: dict[str, dict], wideband: dict[str, dict], missing: list[str]) -> list[dict[str, Any]]:
    """One simulated call per kind of line, beside the wideband recording it was made of."""
    shown: dict[str, dict[str, Any]] = {}
    for key, row in simulated.items():
        conditions = metrics.conditions(row)
        if (codec := conditions.get("codec")) and codec not in shown:
            shown[codec] = {
                "codec": codec, "conditions": conditions, "ref": row["ref"], "telephone": embed(row["audio"], missing),
                "wideband": embed(wideband.get(key, {}).get("audio"), missing),
            }
    return list(shown.values())


def condition_groups(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """CER of base and final on calls, by condition, in the order of its values; speakers with most errors first."""
    def order(value: str) -> tuple:
        number = re.search(r"\d+(\.\d+)?", value)
        return not value.startswith("under"), float(number[0]) if number else 1e9, value

    groups = []
    for test_set, (condition, title) in itertools.product(TELEPHONE, CONDITIONS.items()):
        group = [row for row in rows if row["model"] in ("base", "final") and row["cer"] is not None
                 and row["test_set"] == test_set and row["condition"] == condition]
        # Not by CER, or speakers of one short utterance would come first.
        worst_first = sorted((row for row in group if row["model"] == "final"),
                             key=lambda row: -row["cer"] * row["characters"])
        values = [row["value"] for row in worst_first]
        values = values[:5] if condition == "speaker" else sorted(values, key=order)
        if len(values) > 1:
            rows_shown = [row for value in values for row in group if row["value"] == value]
            groups.append({"title": f"{SETS[test_set]} by {title}", "rows": rows_shown})
    return groups


def gather(exp_output: Path, with_audio: bool) -> dict[str, Any]:
    """Everything the templates show."""
    missing: list[str] = []
    evaluation = exp_output / "eval"
    summary = read_json(evaluation / "summary.json", missing, [])
    details = read_json(evaluation / "details.json", missing, {"conditions": []})
    choice = read_json(evaluation / "interpolation.json", missing, None)
    paths = {test_set: evaluation / "transcripts" / f"base.{test_set}.jsonl" for test_set in SETS}
    base = {test_set: {row["key"]: row for row in read_jsonl(path)} if path.is_file() else {}
            for test_set, path in paths.items()}
    calls = {table: [row for row in rows if row["model"] == "final" and row["test_set"] in TELEPHONE]
             for table, rows in details.items()}
    worst = sorted(calls.get("worst", []), key=lambda row: (-row["errors"], row["key"]))[:20]
    for row in worst:
        row["base"] = base[row["test_set"]].get(row["key"], {}).get("hyp")
        row["audio"] = embed(row["audio"], missing) if with_audio else None
    keywords = sorted(calls.get("keywords", []),
                      key=lambda row: (row["reference"] == 0, row["keyword_recall"], -row["reference"]))
    confusions = sorted(calls.get("confusions", []), key=lambda row: -row["count"])
    return {
        "exp_output": exp_output, "summary": summary, "choice": choice, "sets": SETS, "with_audio": with_audio,
        "verdict": judge(summary, choice["max_wideband_loss"] if choice else 0.01),
        "condition_groups": condition_groups(details["conditions"]), "worst": worst, "keywords": keywords[:40],
        "confusions": confusions[:20], "stages": stages(exp_output, missing),
        "gallery": gallery(base["simulated_test"], base["wideband_test"], missing) if with_audio else [],
        "data": data_counts(exp_output, missing), "commands": commands(exp_output), "missing": missing,
        "decoding": [json.loads(path.read_text("utf-8")) for path in sorted(evaluation.glob("transcripts/*.run.json"))],
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
