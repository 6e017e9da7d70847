"""Check what stage 0 wrote, and describe it: `validate` and `stats` of prepare_training_data.py.

    problems = check_files(["train_formatted.jsonl", "dev_formatted.jsonl"], fs=16000, check_all=False)
"""

import argparse
import heapq
import logging
import os
import re
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import audio
from common import UserError, atomic_write, progress, read_jsonl, table
from corpus import SPLITS, Seen, count_rows, hash_share, parse_row, read_rows

SAMPLE = 200  # files that are decoded again; all of them with --check_audio
SHOWN = 10
PICTURE = "stage0_histograms.png"
USER = re.compile(r"[^<]*<\|startofspeech\|>!(/.+)<\|endofspeech\|>")


def validate(args: argparse.Namespace) -> None:
    """Check formatted files; UserError with the number of problems, after the first ten of them."""
    count, first = 0, ""
    for count, problem in enumerate(check_files(args.input, args.fs, args.check_audio), 1):
        first = first or problem
        if count <= SHOWN:
            logging.error("%s", problem)
    if count:
        raise UserError(f"{count} problems in {', '.join(args.input)}; the first is: {first}")
    logging.info("%d files are valid", len(set(args.input)))


def check_files(paths: list[str], fs: int, check_all: bool) -> Iterator[str]:
    """Yield the problems of formatted files: structure, audio, lengths, a key twice in a set, leakage between sets."""
    seen: defaultdict[str, Seen] = defaultdict(Seen)  # names and paths, by role
    for path in dict.fromkeys(paths):  # one given twice is no leak
        name, total, valid = Path(path).stem, count_rows(path), 0
        role = next((split for split in SPLITS if split in re.split("[_-]", name)), name)
        for number, row in enumerate(progress(read_jsonl(path), total, f"validate {name}"), 1):
            if problem := structure_problem(row):
                yield f"{path}:{number}: {problem}"
                continue
            valid += 1
            # Keys, calls and speakers are names within one corpus (folder); a path is a path everywhere.
            names = [(what, row.get(what), os.path.dirname(path)) for what in ("key", "call", "speaker")]
            names += [("audio", parse_row(row)["audio"], ""), ("audio", row.get("wideband_source"), "")]
            for what, value, place in names:
                text = f"{what} {value} {place}"
                if text in seen[role]:
                    if what == "key":
                        yield f"{path}:{number}: key {value!r:.100} was there before"
                elif value:
                    seen[role].add(text)
                    owners = (owner for owner in seen if owner != role and text in seen[owner])
                    for owner in owners if what != "key" else ():  # a key is unique in its file, and only there
                        yield f"{path}:{number}: {what} {value!r:.100} is in {owner} too"
            if problem := audio_problem(row, fs, check_all or hash_share(row["key"]) * total < SAMPLE):
                yield f"{path}:{number}: {problem}"
        if not valid:
            yield f"{path}: no valid rows"


def structure_problem(row: dict[str, Any]) -> str | None:
    """What is wrong with a row's fields, or None."""
    if not isinstance(row.get("key"), str) or not row["key"]:
        return "no key"
    match row.get("messages"):
        case [
            {"role": "system", "content": str()}, {"role": "user", "content": str(user)},
            {"role": "assistant", "content": str()},
        ] if USER.fullmatch(user):
            pass
        case _:
            return ("messages are not texts of system, user, assistant, the user's with "
                    "<|startofspeech|>!/absolute/path<|endofspeech|>")
    for name in ("speech_length", "text_length"):
        if type(row.get(name)) is not int or row[name] < 1:
            return f"{name} {row.get(name)!r} is not an integer of at least 1"
    return None


def audio_problem(row: dict[str, Any], fs: int, decode: bool) -> str | None:
    """What is wrong with a row's audio by its header, and with `decode` by its samples, or None."""
    path = parse_row(row)["audio"]
    try:
        samples, rate, plain = audio.length(path)
        if decode:
            samples = len(audio.read(path)[0])
    except audio.AudioError as error:
        return str(error)
    if rate != fs or not plain:
        return f"{path} is not mono PCM at {fs} Hz (it is at {rate} Hz)"
    found = samples * 100 // fs
    return None if found == row["speech_length"] else f"speech_length {row['speech_length']}, {path} has {found} frames"


class Part:
    """What one corpus has in one split: lengths and texts of all rows, rejects by reason, and a sample of the rows."""

    def __init__(self, path: Path):
        split = path.stem.removesuffix("_formatted")
        self.path, self.name = path, f"{path.parent.name}/{split}"
        self.frames, self.texts, self.other_bands = array("I"), array("q"), Counter()
        self.sample = heapq.nsmallest(SAMPLE, self._rows(), key=lambda row: hash_share(row["key"]))
        # The driver gathers the rejects of all steps under the first name; one step has but its own.
        gathered = path.with_name(f"rejected_{split}.jsonl")
        self.rejects = gathered if gathered.is_file() else path.with_name(f"rejected_{path.name}")
        self.reasons, self.worst = Counter(), defaultdict(list)
        for row in progress(read_jsonl(self.rejects), count_rows(self.rejects), f"report rejects of {self.name}"):
            reason, reject = row["reason"], (self.name, str(row["key"])[:80], row["detail"][:200])
            self.reasons[reason] += 1
            self.worst[reason] = heapq.nlargest(SHOWN, [*self.worst[reason], reject], key=excess)
        self.rejected = self.reasons.total()
        self.rows = len(self.frames) + self.rejected
        self.hours = sum(self.frames) / 360_000
        self.source_rows: int | str = "not counted"

    def _rows(self) -> Iterator[dict[str, Any]]:
        for row in progress(read_jsonl(self.path), count_rows(self.path), f"report {self.name}"):
            self.frames.append(row["speech_length"])  # 10 ms each
            self.texts.append(hash(row["messages"][-1]["content"]))
            if row.get("offered", row.get("band")) != row.get("band"):
                self.other_bands[row["band"]] += 1
            yield row

    def shared_texts(self, parts: Iterable["Part"]) -> int:
        """Rows whose text is in another set of the corpus too: no reason to drop them, everybody says 好的."""
        others = (part.texts for part in parts if part is not self and part.path.parent == self.path.parent)
        return int(np.isin(self.texts, sum(others, array("q"))).sum())


def stats(args: argparse.Namespace) -> None:
    """Write the report of stage 0 from the files it left in --data_dir; UserError when rows were lost."""
    folder, lost = Path(args.data_dir), []
    found = (path for path in sorted(folder.glob("*/*_formatted.jsonl")) if not path.name.startswith("rejected_"))
    parts = {part.name: part for part in map(Part, found)}
    if not parts:
        raise UserError(f"{folder} has no */*_formatted.jsonl; run stage 0 first", code=2)
    for source in args.source:
        names, _, path = source.partition("=")
        corpus, _, splits = names.partition("/")
        if missing := [split for split in splits.split(",") if f"{corpus}/{split}" not in parts]:
            raise UserError(f"{source}: there is no {corpus}/{missing[0]} in {folder}", code=2)
        chosen = [parts[f"{corpus}/{split}"] for split in splits.split(",")]
        rows = sum(1 for _ in progress(read_rows(path), count_rows(path), f"count {path}"))
        chosen[0].source_rows, seen = rows, sum(part.rows for part in chosen)
        if args.estimate is not None:
            train = parts.get("simulated_8k_telephone/train")
            per_hour = args.estimate / train.hours if train and train.hours and corpus in train.name else None
            print(estimate(source, rows, chosen, per_hour))
        elif rows != seen:
            lost.append(f"{source} has {rows} rows, {seen} are valid or filtered")
    if args.estimate is None:
        draw(parts.values(), folder / PICTURE)
        with atomic_write(folder / "STAGE0_COMPLETION_REPORT.md") as file:
            file.write("\n".join(sections(list(parts.values()))))
        logging.info("%s: the report of %d sets is written", folder, len(parts))
    if lost:
        raise UserError(f"rows were lost: {'; '.join(lost)}")


def estimate(source: str, rows: int, sample: list[Part], seconds_per_hour: float | None) -> str:
    """What the `rows` of a whole corpus will take, from what became of a sample of them."""
    factor = rows / max(sum(part.rows for part in sample), 1)
    hours = factor * sum(part.hours for part in sample)
    paths = [(part, parse_row(row)["audio"]) for part in sample for row in part.sample]
    # Audio that is used in place takes no room.
    size = sum(os.path.getsize(path) for part, path in paths if path.startswith(os.path.abspath(part.path.parent)))
    text = f"{source}: about {rows} utterances, {hours:.1f} hours, {factor * size / 1e9:.2f} GB"
    if seconds_per_hour is None:
        return text
    return f"{text}, {hours * seconds_per_hour / 3600:.3g} core-hours of simulation, which is most of stage 0"


def draw(parts: Iterable[Part], picture: Path) -> None:
    """Draw the histograms of length (all rows) and level (a sample of each part)."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=(12, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    colours: dict[str, str] = {}
    for part in parts:
        corpus, _, split = part.name.partition("/")
        style = {"train": "-", "dev": "--", "test": ":"}.get(split, "-")
        files = [parse_row(row)["audio"] for row in progress(part.sample, len(part.sample), f"levels {part.name}")]
        levels = [audio.rms_level(audio.read(path)[0].astype(np.float64)) for path in files]
        options = {"histtype": "step", "density": True, "label": part.name, "linestyle": style,
                   "color": colours.setdefault(corpus, f"C{len(colours)}")}  # fmt: skip
        axes[0].hist(np.array(part.frames) / 100, bins=60, **options)
        axes[1].hist(np.clip(levels, -80, 0), bins=np.arange(-80, 1, 2), **options)
    axes[0].set(title="Length", xlabel="seconds", ylabel="density")
    axes[1].set(title=f"Level (at most {SAMPLE} files each)", xlabel="RMS, dBov", ylabel="density")
    axes[0].legend(fontsize="small")
    with atomic_write(picture, "wb") as file:
        figure.savefig(file, format="png", metadata={"Software": None})


def sections(parts: list[Part]) -> Iterator[str]:
    """Yield the report: valid rows, filtered by reason, lengths and levels, worst rejects, files to listen to."""
    yield "# Stage 0 completion report\n\n## Valid rows\n"
    yield table(
        "set | rows in | valid | filtered | share filtered | hours | rows in the source, counted again | "
        "valid, but of another band than offered | text in another set too",
        ((p.name, p.rows, len(p.frames), p.rejected, f"{p.rejected / max(p.rows, 1):.1%}", f"{p.hours:.2f}",
          p.source_rows, ", ".join(f"{count} {band}" for band, count in p.other_bands.items()) or 0,
          p.shared_texts(parts)) for p in parts),
    )
    yield "In = valid + filtered. Rules on length, rate of speech and level hold for train only: dev and test are"
    yield "never cut by them. A test set taken from dev shares dev's filtered rows and source. Of another band: without"
    yield "energy above 4 kHz and offered as wideband, or with it and offered as telephone speech. A text that another"
    yield "set of the corpus has too is no reason to drop a row; shared audio, call or speaker is (leakage).\n"
    yield "## Filtered by reason\n"
    yield table("set | reason | rows", ((p.name, *counted) for p in parts for counted in p.reasons.most_common()))
    yield f"## Lengths and levels\n\n![Histograms of length and level]({PICTURE})\n"
    yield f"## The {SHOWN} worst per reason\n"
    for reason in sorted({reason for part in parts for reason in part.reasons}):
        # The 16 kHz corpus is there twice, simulated and wideband: its rejects are told once.
        rejects = [reject for part in reversed(parts) for reject in part.worst[reason]]
        once = {(Path(reject[0]).name, *reject[1:]): reject for reject in rejects}.values()
        yield f"### {reason}\n"
        yield table("set | key | detail", heapq.nlargest(SHOWN, once, key=excess))
    yield "## Paths\n"
    yield table("set | valid rows | filtered rows", ((p.name, p.path, p.rejects) for p in parts))
    yield "## Listening examples\n"
    examples = [(part.name, parse_row(row)) for part in parts for row in part.sample[:3]]
    cells = [(name, said["audio"], said["assistant"][:80]) for name, said in examples]
    yield table("set | file | text", cells)


def excess(reject: tuple[str, str, str]) -> float:
    """How far a reject was from its limit, read from its detail `VALUE ..., NAME is LIMIT`; 0 where there is none."""
    match = re.match(r"(-?(?:inf|[\d.e+-]+)) .*, \w+ is (-?[\d.e+-]+)$", reject[2])
    return abs(float(match[1]) - float(match[2])) if match else 0.0
