"""Features at 8 kHz or at 16 kHz? The demo's stages 0 to 5 at FRONTEND_FS=8000, beside the demo itself at 16000.

    python bench/ablation_fs.py --demo exp_output/demo --seed 0 --table docs/frontend_fs.md

Both take the same corpus and the same base model, trained at 16 kHz as the released one is, so the 8 kHz run starts
from an encoder for which every mel bin meant another frequency. Needs `make demo`; `make ablation-fs` runs that first.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "local"))

from common import UserError, atomic_write, run  # noqa: E402

MODELS = {"base": "base", "stage1": "stage 1", "stage2": "stage 2", "stage3": "stage 3", "final": "final"}
TEST_SETS = {"real_test": "recorded calls", "simulated_test": "simulated calls", "wideband_test": "wideband"}
Scores = dict[tuple[str, str], dict[str, Any]]


def run_at_8000(demo: Path, seed: int) -> Path:
    """Stages -1 to 5 at 8 kHz beside the demo, on its corpus and base model; return the folder."""
    output = demo.with_name(f"{demo.name}_8000")
    output.mkdir(parents=True, exist_ok=True)
    for name in ("corpus", "base_model"):  # where conf/demo/experiment.conf looks for them
        if not (demo / name).is_dir():
            raise UserError(f"no {demo / name}; run `make demo` first", code=2)
        link = output / name
        if not link.exists():
            link.symlink_to((demo / name).resolve(), target_is_directory=True)
    command = ["bash", "run_experiment.sh", "-1", "5", "--config", "conf/demo/experiment.conf", "--exp_output",
               str(output.resolve()), "--seed", str(seed), "--frontend_fs", "8000"]  # fmt: skip
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise UserError("the run at 8000 Hz failed; see the lines above")
    return output


def read_scores(folder: Path) -> Scores:
    """Rows of eval/summary.json by (test set, model)."""
    path = folder / "eval" / "summary.json"
    if not path.is_file():
        raise UserError(f"no {path}; run `make demo` to its end first", code=2)
    return {(row["test_set"], row["model"]): row for row in json.loads(path.read_text(encoding="utf-8"))}


def verdict(wide: Scores, narrow: Scores) -> str:
    """One sentence on the final models: which rate has the lower CER, and whether beyond chance, on each test set."""
    said = []
    for test_set, name in TEST_SETS.items():
        at_16, at_8 = wide[test_set, "final"], narrow[test_set, "final"]
        better = "16000" if at_16["cer"] <= at_8["cer"] else "8000"
        apart = at_16["cer_high"] < at_8["cer_low"] or at_8["cer_high"] < at_16["cer_low"]
        said.append(f"{name}: {better}" + ("" if apart else " (intervals overlap)"))
    return "Lower CER of the final model: " + "; ".join(said) + "."


def table(wide: Scores, narrow: Scores, heading: str) -> str:
    """Markdown: CER in percent with its interval, at both rates, for every model and test set."""
    lines = [
        "# Features at 16 kHz or at 8 kHz", "", heading, "", verdict(wide, narrow), "",
        "| test set | model | FRONTEND_FS=16000 | FRONTEND_FS=8000 |", "|---|---|---|---|",
    ]
    for test_set, name in TEST_SETS.items():
        for model, title in MODELS.items():
            cells = [
                "{cer:.1f} ({cer_low:.1f}-{cer_high:.1f})".format(
                    **{field: 100 * scores[test_set, model][field] for field in ("cer", "cer_low", "cer_high")}
                ) for scores in (wide, narrow)
            ]  # fmt: skip
            lines.append(f"| {name} | {title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, required=True, help="A finished `make demo`.")
    parser.add_argument("--seed", type=int, default=0, help="The demo's seed.")
    parser.add_argument("--table", type=Path, required=True, help="Markdown file to write.")
    return parser.parse_args()


def main() -> None:
    args = get_args()
    wide = read_scores(args.demo)
    narrow = read_scores(run_at_8000(args.demo, args.seed))
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    heading = (
        f"Written by `make ablation-fs SEED={args.seed}` at commit {head.stdout.strip() or 'unknown'}: CER in percent "
        "on test with 95 % intervals. The demo's miniature model, its base trained at 16 kHz; at 8000 stage 0 writes "
        "8 kHz audio and the same mel filters cover 0-4 kHz. \"wideband\" is then the wideband speech at 8 kHz."
    )
    with atomic_write(args.table) as file:
        file.write(table(wide, narrow, heading))
    print(table(wide, narrow, heading))


if __name__ == "__main__":
    run(main)
