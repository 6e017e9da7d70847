"""Write the list of utterances one stage trains on, so that what an epoch holds can be read.

    python local/make_train_list.py --stage 1 --data_dir exp_output/data --output trainlist.jsonl \
        --valid_output valid.jsonl

Stages 1 and 2: all simulated rows, and real, wideband and silent ones as shares of their count; stage 3: all real rows,
and simulated, wideband and silent ones as shares. Shares are counts: with fewer rows than a share asks for, rows
repeat, under keys key#2, key#3. Choice and order are a function of (seed, key).
The dev list holds telephone speech only: it ranks checkpoints by what is to be recognised.
"""

import argparse
import functools
import heapq
import itertools
import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from common import UserError, between, read_jsonl, run, write_jsonl
from corpus import hash_share

SHORTEST = 10  # frames: FunASR's min_source_length
Row = tuple[str, str]  # its key, and all of it as JSON: a tenth of what it takes as a dict


def read(path: Path) -> Iterator[Row]:
    return map(pack, read_jsonl(path))


def pack(row: dict[str, Any]) -> Row:
    return row["key"], json.dumps(row)


def write(path: Path, rows: Iterable[Row]) -> None:
    """Write rows under their keys, which may not be those they were read with."""
    write_jsonl(path, (json.loads(line) | {"key": key} for key, line in rows))


def place(row: Row, seed: int) -> float:
    """Where a row stands in an order that depends on (seed, key) alone."""
    return hash_share(f"{seed}/{row[0]}")


def take(rows: Iterable[Row], count: int, seed: int) -> tuple[list[Row], int]:
    """`count` rows in a drawn order: each once, then each again, and so on; and of how many rows they were drawn."""
    total = itertools.count()
    counted = (row for row, _ in zip(rows, total, strict=False))
    drawn = heapq.nsmallest(max(count, 1), counted, key=functools.partial(place, seed=seed))
    return list(itertools.islice(itertools.cycle(drawn), count)), next(total)


def number_repeats(rows: list[Row]) -> list[Row]:
    """Give the second row of one key the key key#2, and so on; an utterance and its wideband original share a key.

    A key#2 that is some row's own is passed over.
    """
    seen: Counter[str] = Counter()
    own, numbered = {key for key, _ in rows}, []
    for key, line in rows:
        name = key
        seen[key] += 1
        while seen[key] > 1 and (name := f"{key}#{seen[key]}") in own:
            seen[key] += 1
        numbered.append((name, line))
    return numbered


def mix(main: Iterable[Row], shares: list[tuple[str, Iterable[Row], float]], seed: int) -> list[Row]:
    """All rows of `main`, and share x as many of each (name, rows, share). UserError for an empty source."""
    rows = list(main)
    if not rows:
        raise UserError("no training rows; see rejected_train.jsonl beside the formatted list of stage 0")
    size = len(rows)
    for name, source, share in shares:
        count = round(share * size)
        taken, total = take(source, count, seed)
        if count and not total:
            raise UserError(f"{name} is {share} but there are no such rows; set --{name} 0 or run stage 0 with them", 2)
        rows += taken
        logging.info("%s %s: %d of %d rows%s", name, share, count, total, " (repeated)" * (count > total))
    return sorted(number_repeats(rows), key=functools.partial(place, seed=seed))


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", type=int, choices=(1, 2, 3), required=True, help="Stage the list is for.")
    parser.add_argument("--data_dir", type=Path, required=True, help="What stage 0 wrote: CORPUS/*_formatted.jsonl.")
    share = between(0, math.inf)
    parser.add_argument("--real_share", type=share, default=0.1, help="Stages 1, 2: real rows per simulated row.")
    parser.add_argument("--wideband_replay", type=share, default=0.1, help="Wideband rows per row of the main source.")
    parser.add_argument("--no_speech_share", type=share, default=0.02, help="Calls without speech per such row.")
    parser.add_argument("--simulated_share", type=share, default=0.3, help="Stage 3: simulated rows per real row.")
    parser.add_argument("--max_speech_length", type=int, default=12000, help="Longest dev row, frames of 10 ms.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the choice and the order.")
    parser.add_argument("--output", type=Path, required=True, help="Train list to write.")
    parser.add_argument("--valid_output", type=Path, required=True, help="Dev list to write.")
    return parser.parse_args()


def main() -> None:
    args = get_args()

    def path(corpus: str, split: str = "train") -> Path:
        return args.data_dir / corpus / f"{split}_formatted.jsonl"

    shares = [("wideband_replay", read(path("wideband_16k")), args.wideband_replay),
              ("no_speech_share", read(path("no_speech")), args.no_speech_share)]  # fmt: skip
    simulated, real = read(path("simulated_8k_telephone")), read(path("real_8k_telephone"))
    dev = [path("real_8k_telephone", "dev")]
    if args.stage == 3:
        rows = mix(real, [("simulated_share", simulated, args.simulated_share), *shares], args.seed)
    else:
        rows = mix(simulated, [("real_share", real, args.real_share), *shares], args.seed)
        dev.insert(0, path("simulated_8k_telephone", "dev"))
    # Stage 0 never cuts dev, and FunASR would leave such rows out without a word; they are scored all the same.
    lengths = [(row["speech_length"], pack(row)) for row in itertools.chain(*map(read_jsonl, dev))]
    fit = [row for length, row in lengths if SHORTEST <= length <= args.max_speech_length]
    if len(fit) < len(lengths):
        logging.warning("dev: %d of %d rows are not of %d to %d frames: no checkpoint is chosen by them",
                        len(lengths) - len(fit), len(lengths), SHORTEST, args.max_speech_length)  # fmt: skip
    if not fit:
        raise UserError("the dev list is empty: no checkpoint could be chosen; see rejected_dev.jsonl of stage 0")
    logging.info("stage %d: %d rows to train on, %d for dev", args.stage, len(rows), len(fit))
    write(args.output, rows)
    write(args.valid_output, number_repeats(fit))


if __name__ == "__main__":
    run(main)
