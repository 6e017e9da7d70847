"""Fold LoRA, interpolate an adapted model with its base, and choose the interpolation weight on dev.

Fine-tuning gains on telephone speech and forgets wideband speech. The straight line between the two sets of
weights often holds a model that keeps most of both (Wortsman et al., WiSE-FT, CVPR 2022).

    python local/interpolate.py fold --checkpoint exp/stage3/averaged.pt --output folded.pt
    python local/interpolate.py mix --base model/model.pt --adapted folded.pt --alpha 0.5 --output alpha_0.50.pt
    python local/interpolate.py choose --summary dev_summary.json --output interpolation.json
"""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

from common import UserError, run, write_json


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    fold = commands.add_parser("fold", help="add a checkpoint's LoRA to the weights it belongs to")
    fold.add_argument("--checkpoint", required=True, help="averaged.pt of a training stage.")
    mix = commands.add_parser("mix", help="write (1 - alpha) * base + alpha * adapted")
    mix.add_argument("--base", required=True, help="model.pt of the model folder training started from.")
    mix.add_argument("--adapted", required=True, help="A folded checkpoint.")
    mix.add_argument("--alpha", required=True, type=float, help="0 is the base, 1 the adapted model.")
    choose = commands.add_parser("choose", help="pick alpha from the scores of dev sets")
    choose.add_argument("--summary", required=True, help="Summary of score.py over models named alpha_0.50 and base.")
    choose.add_argument(
        "--max_wideband_loss", type=float, default=0.01,
        help="How much wideband CER may rise over the base, as a fraction: 0.01 is one point. Default: %(default)s.",
    )
    for command in (fold, mix, choose):
        command.add_argument("--output", required=True, help="File to write.")
    return parser.parse_args()


def pooled_cer(rows: list[dict[str, Any]], model: str, *test_sets: str) -> float | None:
    """CER of a model over several test sets at once, weighted by their characters; None without characters."""
    rows = [row for row in rows if row["model"] == model and row["test_set"] in test_sets]
    total = sum(row["characters"] for row in rows)
    errors = sum(row["substitutions"] + row["deletions"] + row["insertions"] for row in rows)
    return errors / total if total else None


def choose_alpha(rows: list[dict[str, Any]], max_wideband_loss: float) -> dict[str, Any]:
    """The alpha of lowest telephone CER on dev among those that lose at most `max_wideband_loss` on wideband dev.

    When every alpha loses more, the one that loses least. Without wideband dev, telephone alone decides.
    Returns the choice, the reason, and the whole curve.
    """
    curve = [
        {
            "model": name, "alpha": float(name.removeprefix("alpha_")),
            "telephone_cer": pooled_cer(rows, name, "simulated_dev", "real_dev"),
            "wideband_cer": pooled_cer(rows, name, "wideband_dev"),
        }
        for name in {row["model"] for row in rows} if name.startswith("alpha_")
    ]
    curve.sort(key=lambda point: point["alpha"])
    if not curve or any(point["telephone_cer"] is None for point in curve):
        raise UserError("some model alpha_* or all of them lack telephone scores; score simulated_dev or real_dev")
    base = pooled_cer(rows, "base", "wideband_dev")
    allowed, reason = curve, "lowest telephone CER on dev; wideband dev was not scored"
    if base is not None and all(point["wideband_cer"] is not None for point in curve):
        allowed = [point for point in curve if point["wideband_cer"] <= base + max_wideband_loss + 1e-12]
        reason = f"lowest telephone CER on dev among those that lose at most {max_wideband_loss:.2%} wideband CER"
    if allowed:
        chosen = min(allowed, key=lambda point: point["telephone_cer"])
    else:
        chosen = min(curve, key=lambda point: point["wideband_cer"])
        reason = f"every alpha loses more than {max_wideband_loss:.2%} wideband CER; this one loses least"
    return {
        "alpha": chosen["alpha"], "model": chosen["model"], "reason": reason, "max_wideband_loss": max_wideband_loss,
        "base_wideband_cer": base, "curve": curve,
    }


def main() -> None:
    args = get_args()
    if args.command == "choose":
        try:
            rows = json.loads(Path(args.summary).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{args.summary}: {error}; decode and score dev first") from error
        choice = choose_alpha(rows, args.max_wideband_loss)
        write_json(args.output, choice)
        logging.info("alpha = %.2f: %s", choice["alpha"], choice["reason"])
        return
    from nano import weights  # imports torch, which `choose` does not need

    if args.command == "fold":
        state = weights.load_folded(args.checkpoint)
    else:
        if not 0.0 <= args.alpha <= 1.0:
            raise UserError(f"--alpha {args.alpha} is outside 0 to 1", code=2)
        state = weights.interpolate(weights.load_folded(args.base), weights.load_folded(args.adapted), args.alpha)
    weights.save_atomically({"state_dict": state, "lora": None}, args.output)
    logging.info("wrote %s", args.output)


if __name__ == "__main__":
    run(main)
