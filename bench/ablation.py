"""What each part of the recipe brings: the demo's stages 1 to 4 again, each time with one thing changed.

    python bench/ablation.py --demo exp_output/demo --table docs/ablation.md [--only no_ctc fs_8000]

Every variant takes the demo's corpus, base model and (but for fs_8000) the data of its stage 0, and lies beside it in
<demo>_<variant>. The table has the CER of the test sets, what the final model writes where nobody speaks, with a star
what differs from the demo as it is on the same utterances, and the error of the CTC branch on wideband test, decoded
greedily. Needs a finished `make demo`; a finished variant is not run again. `--demo` takes several, a seed each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "local"))

import metrics  # noqa: E402
from common import UserError, atomic_write, read_jsonl, run, write_json  # noqa: E402
from decode import utterance  # noqa: E402
from nano import weights  # noqa: E402
from score import Scored  # noqa: E402

STAGES = ("stage1_encoder_adapt", "stage2_adapter_align", "stage3_lora_domain")
NO_CTC = {"ctc_weight": 0, "ctc_decoder_conf": {"freeze": True}}
# name: (title, first stage to run, options, keys laid over the demo's stage YAMLs)
VARIANTS: dict[str, tuple[str, int, dict[str, str], dict[str, dict[str, Any]]]] = {
    "no_ctc": ("without the CTC loss in stages 1 and 2", 1, {}, dict.fromkeys(STAGES[:2], NO_CTC)),
    "ctc_1": ("CTC weight 1.0 in stage 1, not 0.3", 1, {}, {STAGES[0]: {"ctc_weight": 1.0}}),
    "no_specaug": ("without SpecAugment", 1, {}, dict.fromkeys(STAGES, {"specaug": None})),
    "no_replay": ("without wideband replay", 1, {"wideband_replay": "0"}, {}),
    "no_silence": ("without calls on which nobody speaks", 1, {"no_speech_share": "0"}, {}),
    "fs_8000": ("features at 8 kHz (FRONTEND_FS=8000)", -1, {"frontend_fs": "8000"}, {}),
}
COLUMNS = (
    ("simulated calls, stage 1", "stage1", "simulated_test", "cer"),
    ("simulated calls, final", "final", "simulated_test", "cer"),
    ("recorded calls, final", "final", "real_test", "cer"),
    ("KWER, final", "final", "real_test", "kwer"),
    ("wideband, final", "final", "wideband_test", "cer"),
)


def run_variant(demo: Path, name: str, seed: int) -> Path:
    """Run one variant beside the demo, or what is left of it to run; return its folder."""
    title, first, options, changes = VARIANTS[name]
    folder = demo.resolve().with_name(f"{demo.name}_{name}")
    (folder / "conf").mkdir(parents=True, exist_ok=True)
    shared = ["corpus", "base_model"] + (["model", "data"] if first > 0 else [])
    for part in shared:
        if not (folder / part).exists():
            (folder / part).symlink_to(demo.resolve() / part, target_is_directory=True)
    for stage in STAGES:
        write_overlay(ROOT / f"conf/demo/{stage}.yaml", changes.get(stage, {}), folder / f"conf/{stage}.yaml")
    options = {"config": "conf/demo/experiment.conf", "exp_output": str(folder), "seed": str(seed),
               "stage_overlay_dir": str(folder / "conf"), **options}  # fmt: skip
    command = ["bash", "run_experiment.sh", str(first), "4"]
    for option, value in options.items():
        command += [f"--{option}", value]
    print(f"{folder.name}: {title}", flush=True)
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        raise UserError(f"the variant {name} failed; see the lines above")
    return folder


def write_overlay(source: Path, changes: dict[str, Any], target: Path) -> None:
    """The demo's overlay of a stage with some keys changed."""
    from omegaconf import OmegaConf

    with atomic_write(target) as file:
        file.write(OmegaConf.to_yaml(OmegaConf.merge(OmegaConf.load(source), changes)))


def read_scores(folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows of eval/summary.json by (model, test set)."""
    path = folder / "eval/summary.json"
    if not path.is_file():
        raise UserError(f"no {path}; run `make demo` to its end first", code=2)
    return {(row["model"], row["test_set"]): row for row in json.loads(path.read_text("utf-8"))}


def ctc_errors(folder: Path) -> dict[str, float]:
    """CER of the CTC branch, decoded greedily, on wideband test: of the base and after stages 1 and 2; kept on disk."""
    kept = folder / "eval/ctc.json"
    if kept.is_file():
        return json.loads(kept.read_text("utf-8"))
    from funasr import AutoModel

    model_dir = (folder / "model/model_dir.txt").read_text("utf-8").strip()
    trained = folder / "exp/8k_telephone" / STAGES[0]
    fs = int(json.loads((folder / "status/stage1.json").read_text("utf-8"))["config"]["FRONTEND_FS"])
    loaded = AutoModel(model=model_dir, device="cpu", disable_update=True, ncpu=torch.get_num_threads(),
                       frontend_conf={"fs": fs, "dither": 0.0})  # fmt: skip
    model, frontend = loaded.model.eval(), loaded.kwargs["frontend"]
    rows = list(read_jsonl(folder / "data/wideband_16k/test_formatted.jsonl"))
    references = [metrics.normalise(row["messages"][2]["content"]) for row in rows]
    checkpoints = {"base": Path(model_dir) / "model.pt", "stage1": trained / "averaged.pt",
                   "stage2": trained.with_name(STAGES[1]) / "averaged.pt"}  # fmt: skip
    errors = {}
    for name, checkpoint in checkpoints.items():
        model.load_state_dict(weights.load_folded(checkpoint), strict=False)
        heard = [metrics.normalise(greedy_ctc(model, frontend, row)) for row in rows]
        counts = metrics.count(references, heard)
        errors[name] = metrics.rate(counts.errors, counts.lengths)
    write_json(kept, errors)
    return errors


def greedy_ctc(model: Any, frontend: Any, row: dict[str, Any]) -> str:
    """What the CTC branch hears: the best symbol of each frame, repeats and blanks removed."""
    samples = torch.from_numpy(utterance(row, frontend.fs).samples)
    with torch.inference_mode():
        features, lengths = frontend(samples[None], [len(samples)])
        decoded, _ = model.ctc_decoder(*model.encode(features, lengths))
        best = torch.unique_consecutive(model.ctc.log_softmax(decoded)[0].argmax(-1)).tolist()
    return model.ctc_tokenizer.decode([symbol for symbol in best if symbol != model.blank_id])


def star(demo: Path, folder: Path, model: str, test_set: str, final: str) -> str:
    """`*` where what a model of a variant writes differs from the demo's: p below 0.05, paired by utterance."""
    paths = (demo / f"eval/transcripts/{model}.{test_set}.jsonl",
             folder / f"eval/transcripts/{final if model == 'final' else model}.{test_set}.jsonl")  # fmt: skip
    ours, theirs = (Scored(list(read_jsonl(path)), {}, False) for path in paths)
    p_value = theirs.summary(ours, 2000)["p_value"]
    return "*" if p_value is not None and p_value < 0.05 else ""


def line(title: str, demo: Path, folder: Path, final: str = "final") -> str:
    """A row of the table; `final` names the model that the columns of the final model show."""
    scores, errors, cells = read_scores(folder), ctc_errors(folder), []
    for _, model, test_set, rate in COLUMNS:
        row = scores[final if model == "final" else model, test_set]
        cell = "{:.1f} ({:.1f}-{:.1f})".format(*(100 * row[rate + end] for end in ("", "_low", "_high")))
        cells.append(cell + (star(demo, folder, model, test_set, final) if rate == "cer" else ""))
    written = scores[final, "no_speech"]["chars_per_minute"]
    cells.append(f"{written:.0f}{star(demo, folder, 'final', 'no_speech', final)}")
    cells.append(" → ".join(f"{100 * errors[model]:.1f}" for model in ("base", "stage1", "stage2")))
    return f"| {title} | {' | '.join(cells)} |"


def table(demo: Path, folders: dict[str, Path], seed: int) -> str:
    """Markdown of one seed: the demo as it is and each variant, each with what interpolation (alpha below 1) brings."""
    head = ["variant", *(title for title, *_ in COLUMNS), "characters a minute where nobody speaks, final",
            "CTC on wideband, base → stage 1 → stage 2"]  # fmt: skip
    lines = [f"## Seed {seed}", "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, folder in {"": demo, **folders}.items():
        title = VARIANTS[name][0] if name else "as it is"
        alpha = json.loads((folder / "eval/interpolation.json").read_text("utf-8"))["alpha"]
        lines.append(line(f"{title}, alpha {alpha:g}", demo, folder))
        if alpha < 1:
            lines.append(line(f"{title}, without interpolation", demo, folder, "stage3"))
    lines += ["", "| alpha, as it is, on dev | telephone | wideband |", "|---|---|---|"]
    for point in json.loads((demo / "eval/interpolation.json").read_text("utf-8"))["curve"]:
        lines.append("| {alpha:g} | {telephone_cer:.1%} | {wideband_cer:.1%} |".format(**point).replace("%", ""))
    return "\n".join(lines) + "\n"


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, nargs="+", required=True, help="Finished demos, each of another seed.")
    parser.add_argument("--only", nargs="+", default=list(VARIANTS), choices=VARIANTS, help="Variants. Default: all.")
    parser.add_argument("--table", type=Path, required=True, help="Markdown file to write.")
    return parser.parse_args()


def main() -> None:
    args = get_args()
    parts = []
    for demo in args.demo:
        read_scores(demo)
        described = json.loads((demo / "exp/8k_telephone" / STAGES[0] / "run.json").read_text("utf-8"))
        folders = {name: run_variant(demo, name, described["seed"]) for name in args.only}
        parts.append(table(demo, folders, described["seed"]))
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    commit = head.stdout.strip() or "unknown"
    text = f"""# What each part of the recipe brings

Written by `make ablation` at commit {commit}: error rates in percent on test, with 95 % intervals, of the
demo's miniature model. A star: another CER, or number of characters, than as it is on the same utterances, p below
0.05 (of one training each: another seed may have none; by chance one of twenty has one). Alpha is the weight of the
adapted model that dev chose; at 1 there is no interpolation.

"""
    with atomic_write(args.table) as file:
        file.write(text + "\n".join(parts))
    print("\n".join(parts))


if __name__ == "__main__":
    run(main)
