"""Put the scores of finished experiments, as Markdown, between the marks in README.md and README_zh.md.

    .venv/bin/python bench/results.py exp_output/demo /elsewhere/exp_output/demo --into README.md README_zh.md

Each folder is one EXP_OUTPUT after stage 4. Commit and seed come from its run.json files, rates from its summary.json.
"""

import argparse
import json
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "local"))

from common import of_trainings  # noqa: E402

BEGIN, END = "<!-- results: bench/results.py writes this -->\n", "<!-- end of results -->"
MODELS = ("base", "stage1", "stage2", "stage3", "final")
ROWS = (
    ("recorded calls 真实通话", "real_test", "cer"),
    ("simulated calls 仿真电话", "simulated_test", "cer"),
    ("wideband 宽带", "wideband_test", "cer"),
    ("recorded calls, KWER 关键词", "real_test", "kwer"),
)


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiments", nargs="+", type=Path, help="EXP_OUTPUT folders with scores.")
    parser.add_argument("--into", nargs="*", type=Path, default=[], help="Markdown files with the two marks.")
    return parser.parse_args()


def table(experiment: Path) -> str:
    """Scores of one experiment in percent with 95 % intervals, under a line that says what was run."""
    summary = json.loads((experiment / "eval/summary.json").read_text("utf-8"))
    scores = {(row["model"], row["test_set"]): row for row in summary}
    runs = [json.loads(path.read_text()) for path in of_trainings(experiment, "run.json")]
    commits, seeds = {run["commit"] for run in runs}, {run["seed"] for run in runs}
    if len(commits) != 1 or len(seeds) != 1:
        sys.exit(f"error: {experiment}: stages of commits {commits} and seeds {seeds}; run the experiment in one piece")
    utterances = {scores["base", name]["utterances"] for _, name, _ in ROWS}
    lines = [
        f"`make demo SEED={seeds.pop()}`, commit `{commits.pop()[:7]}`, {min(utterances)} utterances a test set, %:",
        "", "| test set | " + " | ".join(MODELS) + " |", "|---" * (len(MODELS) + 1) + "|",
    ]
    for title, name, rate in ROWS:
        cells = [scores[model, name] for model in MODELS]
        cells = [f"{100 * c[rate]:.1f} ({100 * c[rate + '_low']:.1f}-{100 * c[rate + '_high']:.1f})" for c in cells]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    silent = (scores[model, "no_speech"] for model in MODELS)
    rates = ([row[f"chars_per_minute{end}"] for end in ("", "_low", "_high")] for row in silent)
    written = ("{:.1f} ({:.1f}-{:.1f})".format(*rate) for rate in rates)
    lines.append("| characters a minute where nobody speaks 无人说话时每分钟字数 | " + " | ".join(written) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    args = get_args()
    text = "\n".join(table(experiment) for experiment in args.experiments)
    print(text)
    for path in args.into:
        marked = re.compile(f"{re.escape(BEGIN)}.*?{re.escape(END)}", re.DOTALL)
        new, count = marked.subn(lambda _: BEGIN + text + END, path.read_text("utf-8"))
        if count != 1:
            sys.exit(f"error: {path} lacks the marks {BEGIN.strip()} and {END}")
        path.write_text(new, "utf-8")


if __name__ == "__main__":
    main()
