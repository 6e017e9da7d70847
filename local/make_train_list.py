"""Write the list of utterances one stage trains on, so that what an epoch holds can be read.

    python local/make_train_list.py --stage 1 --data_dir exp_output/data --output trainlist.jsonl \
        --valid_output valid.jsonl

Stages 1 and 2: all simulated rows, and real, wideband and silent ones as shares of their count; stage 3: all real rows,
and simulated, wideband and silent ones as shares. Shares are counts: with fewer rows than a share asks for, rows
repeat, under keys key#2, key#3. Choice and order are a function of (seed, key).
The dev list holds telephone speech only: it ranks checkpoints by what is to be recognised.
"""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from pathlib import Path
from typing import Any

from common import UserError, read_jsonl, run, write_jsonl
from corpus import hash_share

SHORTEST = 10  # frames: FunASR's min_source_length


def order(rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Rows in an order that depends on (seed, key) alone."""
    return sorted(rows, key=lambda row: hash_share(f"{seed}/{row['key']}"))


def take(rows: list[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """`count` rows in a drawn order: each once, then each again, and so on."""
    rows = order(rows, seed)
    return [rows[number % len(rows)] for number in range(count)]


def number_repeats(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Give the second row of one key the key key#2, and so on; an utterance and its wideband original share a key.

    A key#2 that is some row's own is passed over.
    """
    seen: Counter[str] = Counter()
    own, numbered = {row["key"] for row in rows}, []
    for row in rows:
        key = name = row["key"]
        seen[key] += 1
        while seen[key] > 1 and (name := f"{key}#{seen[key]}") in own:
            seen[key] += 1
        numbered.append(row | {"key": name})
    return numbered


def mix(main: list[dict], shares: list[tuple[str, list[dict], float]], seed: int) -> list[dict]:
    """All rows of `main`, and share x len(main) of each (name, rows, share). UserError for an empty source."""
    if not main:
        raise UserError("no training rows; see rejected_train.jsonl beside the formatted list of stage 0")
    rows = list(main)
    for name, source, share in shares:
        count = round(share * len(main))
        if count and not source:
            raise UserError(f"{name} is {share} but there are no such rows; set --{name} 0 or run stage 0 with them", 2)
        rows += take(source, count, seed)
        logging.info("%s %s: %d of %d rows%s", name, share, count, len(source), " (repeated)" * (count > len(source)))
    return order(number_repeats(rows), seed)


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), required=True, help="Stage the list is for.")
    parser.add_argument("--data_dir", type=Path, required=True, help="What stage 0 wrote: CORPUS/*_formatted.jsonl.")
    parser.add_argument("--real_share", type=float, default=0.1, help="Stages 1, 2: real rows per simulated row.")
    parser.add_argument("--wideband_replay", type=float, default=0.1, help="Wideband rows per row of the main source.")
    parser.add_argument("--no_speech_share", type=float, default=0.02, help="Calls without speech per such row.")
    parser.add_argument("--simulated_share", type=float, default=0.3, help="Stage 3: simulated rows per real row.")
    parser.add_argument("--max_speech_length", type=int, default=12000, help="Longest dev row, frames of 10 ms.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the choice and the order.")
    parser.add_argument("--output", type=Path, required=True, help="Train list to write.")
    parser.add_argument("--valid_output", type=Path, required=True, help="Dev list to write.")
    return parser.parse_args()


def main() -> None:
    args = get_args()
    for name in ("real_share", "wideband_replay", "no_speech_share", "simulated_share"):
        if getattr(args, name) < 0:
            raise UserError(f"--{name} {getattr(args, name)}: a share is 0 or more", code=2)

    def read(corpus: str, split: str = "train") -> list[dict[str, Any]]:
        return list(read_jsonl(args.data_dir / corpus / f"{split}_formatted.jsonl"))

    shares = [("wideband_replay", read("wideband_16k"), args.wideband_replay),
              ("no_speech_share", read("no_speech"), args.no_speech_share)]  # fmt: skip
    simulated, real = read("simulated_8k_telephone"), read("real_8k_telephone")
    dev = read("real_8k_telephone", "dev")
    if args.stage == 3:
        rows = mix(real, [("simulated_share", simulated, args.simulated_share), *shares], args.seed)
    else:
        rows = mix(simulated, [("real_share", real, args.real_share), *shares], args.seed)
        dev = read("simulated_8k_telephone", "dev") + dev
    # Stage 0 never cuts dev, and FunASR would leave such rows out without a word; they are scored all the same.
    fit = [row for row in dev if SHORTEST <= row["speech_length"] <= args.max_speech_length]
    if len(fit) < len(dev):
        logging.warning("dev: %d of %d rows are not of %d to %d frames: no checkpoint is chosen by them",
                        len(dev) - len(fit), len(dev), SHORTEST, args.max_speech_length)  # fmt: skip
    if not fit:
        raise UserError("the dev list is empty: no checkpoint could be chosen; see rejected_dev.jsonl of stage 0")
    logging.info("stage %d: %d rows to train on, %d for dev", args.stage, write_jsonl(args.output, rows), len(fit))
    write_jsonl(args.valid_output, number_repeats(fit))


if __name__ == "__main__":
    run(main)
