"""Check what stage 0 wrote, and describe it: `validate` and `stats` of prepare_training_data.py.

    problems = check_files(["train_formatted.jsonl", "dev_formatted.jsonl"], fs=16000, check_all=False)
"""

import argparse
import heapq
import itertools
import logging
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

import audio
from common import UserError, atomic_write, progress, read_jsonl
from corpus import count_rows, hash_share, read_rows

SAMPLE = 200  # files whose audio is measured again; all of them with --check_audio
SHOWN = 10
PICTURE = "stage0_histograms.png"
USER = re.compile(r"[^<]*<\|startofspeech\|>!(/.+)<\|endofspeech\|>", re.DOTALL)


def validate(args: argparse.Namespace) -> None:
    """Check formatted files; UserError with the number of problems, after the first ten of them."""
    problems = check_files(args.input, args.fs, args.check_audio)
    first = list(itertools.islice(problems, SHOWN))
    for problem in first:
        logging.error("%s", problem)
    if first:
        more = sum(1 for _ in problems)
        raise UserError(f"{len(first) + more} problems in {', '.join(args.input)}; the first is: {first[0]}")
    logging.info("%d files are valid", len(set(args.input)))


def check_files(paths: list[str], fs: int, check_all: bool) -> Iterator[str]:
    """Yield the problems of formatted files: structure, audio, lengths, unique keys, disjoint train, dev and test."""
    owners: dict[int, str] = {}  # by hash: the names and paths of a million rows are large
    for path in dict.fromkeys(paths):  # one given twice is no leak
        name = Path(path).stem
        role = next((split for split in ("train", "dev", "test") if split in re.split("[_-]", name)), name)
        total, keys = count_rows(path) if os.path.isfile(path) else 0, set[int]()
        for number, row in enumerate(progress(read_jsonl(path), total, f"validate {name}"), 1):
            where = f"{path}:{number}"
            if problem := structure_problem(row, role):
                yield f"{where}: {problem}"
                continue
            if hash(row["key"]) in keys:
                yield f"{where}: key {row['key']!r:.100} was there before"
            keys.add(hash(row["key"]))
            # Keys, calls and speakers are names within one corpus (folder); a path is a path everywhere.
            names = [(os.path.dirname(path), what, row.get(what)) for what in ("key", "call", "speaker")]
            for place, what, value in [*names, ("", "audio", audio_path(row))]:
                owner = owners.setdefault(hash((place, what, str(value))), role) if value else role
                if owner != role:
                    yield f"{where}: {what} {value!r:.100} is in {owner} too"
            if problem := audio_problem(row, fs, check_all or hash_share(row["key"]) * total < SAMPLE):
                yield f"{where}: {problem}"
        if not keys:
            yield f"{path}: no valid rows"


def structure_problem(row: dict[str, Any], role: str) -> str | None:
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
        # FunASR leaves out rows without text: fine in a test set of no speech, a loss in training.
        least = 0 if name == "text_length" and role == "test" else 1
        if type(row.get(name)) is not int or row[name] < least:
            return f"{name} {row.get(name)!r} is not an integer of at least {least}"
    return None


def audio_problem(row: dict[str, Any], fs: int, measure: bool) -> str | None:
    """What is wrong with a row's audio, or None; without `measure` only whether it exists."""
    path, frames = audio_path(row), row["speech_length"]
    if not measure:
        return None if os.path.isfile(path) else f"{path} does not exist"
    try:
        plain = audio.length(path).plain
        samples, rate = audio.read(path)
    except audio.AudioError as error:
        return str(error)
    if rate != fs or not plain:
        return f"{path} is not mono PCM at {fs} Hz (it is at {rate} Hz)"
    found = len(samples) * 100 // fs
    return None if found == frames else f"speech_length {frames}, but {path} has {found} frames"


def audio_path(row: dict[str, Any]) -> str:
    """The path in a formatted row's user message."""
    return USER.fullmatch(row["messages"][1]["content"])[1]


class Part:
    """What one corpus has in one split: lengths and texts of all rows, rejects by reason, and a sample of the rows."""

    def __init__(self, path: Path):
        split = path.stem.removesuffix("_formatted")
        self.path, self.name = path, f"{path.parent.name}/{split}"
        self.frames, self.texts, self.bands = array("I"), array("q"), Counter()
        for row in read_jsonl(path):
            self.frames.append(row["speech_length"])  # 10 ms each
            self.texts.append(hash(row["messages"][-1]["content"]))
            self.bands[row.get("band")] += 1
        self.sample = heapq.nsmallest(SAMPLE, read_jsonl(path), key=lambda row: hash_share(row["key"]))
        # The driver gathers the rejects of all steps under the first name; one step has but its own.
        gathered = path.with_name(f"rejected_{split}.jsonl")
        self.rejects = gathered if gathered.is_file() else path.with_name(f"rejected_{path.name}")
        self.reasons = Counter(row["reason"] for row in read_jsonl(self.rejects))
        self.rejected = self.reasons.total()
        self.rows = len(self.frames) + self.rejected
        self.hours = sum(self.frames) / 360_000
        self.source_rows = "not counted"

    def shared_texts(self, parts: Iterable["Part"]) -> int:
        """Rows whose text is in another set of the corpus too: no reason to drop them, everybody says 好的."""
        others = (part.texts for part in parts if part is not self and part.path.parent == self.path.parent)
        return int(np.isin(self.texts, sum(others, array("q"))).sum())


def stats(args: argparse.Namespace) -> None:
    """Write the report of stage 0 from the files it left in --data_dir; UserError when rows were lost."""
    found = sorted(Path(args.data_dir).glob("*/*_formatted.jsonl"))
    parts = {part.name: part for part in (Part(path) for path in found if not path.name.startswith("rejected_"))}
    if not parts:
        raise UserError(f"{args.data_dir} has no */*_formatted.jsonl; run stage 0 first", code=2)
    folder, lost = Path(args.data_dir), []
    for source in args.source:
        chosen, rows = count_source(source, parts)
        chosen[0].source_rows = str(rows)
        if rows != (seen := sum(part.rows for part in chosen)):
            lost.append(f"{source} has {rows} rows, {seen} are valid or filtered")
    for source in args.estimate:
        print(estimate(source, parts, args.simulation_seconds))
    draw(parts.values(), folder / PICTURE)
    with atomic_write(folder / "STAGE0_COMPLETION_REPORT.md") as file:
        file.write("\n".join(sections(parts.values())))
    if lost:
        raise UserError(f"rows were lost: {'; '.join(lost)}")
    logging.info("%s: the report of %d sets is written", folder, len(parts))


def count_source(source: str, parts: dict[str, Part]) -> tuple[list[Part], int]:
    """Of `CORPUS/SPLIT[,SPLIT]=PATH`: the parts that are named, and the rows in the file, read again."""
    names, _, path = source.partition("=")
    corpus, _, splits = names.partition("/")
    try:
        chosen = [parts[f"{corpus}/{split}"] for split in splits.split(",")]
    except KeyError as error:
        raise UserError(f"{source}: there is no {error} in --data_dir", code=2) from error
    return chosen, sum(1 for _ in read_rows(path))


def estimate(source: str, parts: dict[str, Part], simulation_seconds: float) -> str:
    """What the whole of a corpus will take, from what became of a sample and the time to simulate its train set."""
    chosen, rows = count_source(source, parts)
    factor = rows / max(sum(part.rows for part in chosen), 1)
    hours = factor * sum(part.hours for part in chosen)
    size = factor * sum(os.path.getsize(audio_path(row)) for part in chosen for row in part.sample)
    text = f"{source}: about {rows} utterances, {hours:.1f} hours, {size / 1e9:.2f} GB"
    train = parts.get("simulated_8k_telephone/train")
    if train and train.hours and source.startswith("simulated"):
        text += f", {hours / train.hours * simulation_seconds / 3600:.3g} core-hours of simulation"
    return text


def draw(parts: Iterable[Part], picture: Path) -> None:
    """Draw the histograms of length (all rows) and level (a sample of each part)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4), layout="constrained")
    for part in parts:
        files = [audio_path(row) for row in progress(part.sample, len(part.sample), f"levels {part.name}")]
        levels = [audio.rms_level(audio.read(path)[0].astype(np.float64)) for path in files]
        options = {"histtype": "step", "density": True, "label": part.name}
        axes[0].hist(np.array(part.frames) / 100, bins=60, **options)
        axes[1].hist(levels, bins=np.arange(-80, 1, 2), **options)
    axes[0].set(title="Length", xlabel="seconds", ylabel="density")
    axes[1].set(title=f"Level (at most {SAMPLE} files each)", xlabel="RMS, dBov", ylabel="density")
    axes[0].legend(fontsize="small")
    with atomic_write(picture, "wb") as file:
        figure.savefig(file, format="png", metadata={"Software": None})
    pyplot.close(figure)


def table(head: str, rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table; a cell cannot break out of it."""
    lines = [f"| {head} |", "|" + "---|" * len(head.split(" | "))]
    for row in rows:
        lines.append("| " + " | ".join(" ".join(str(cell).replace("|", "\\|").split()) for cell in row) + " |")
    return "\n".join(lines) + "\n"


def sections(parts: Iterable[Part]) -> Iterator[str]:
    """Yield the report: valid rows, filtered by reason, lengths and levels, worst rejects, files to listen to."""
    yield "# Stage 0 completion report\n\n## Valid rows\n"
    yield table(
        "set | rows in | valid | filtered | share filtered | hours | rows in the source, counted again | "
        "recorded without energy above 4 kHz | text in another set too",
        ((p.name, p.rows, len(p.frames), p.rejected, f"{p.rejected / max(p.rows, 1):.1%}", f"{p.hours:.2f}",
          p.source_rows, p.bands["telephone"], p.shared_texts(parts)) for p in parts),
    )
    yield "In = valid + filtered. Rules on length, rate of speech and level hold for train only: dev and test are"
    yield "never cut by them. A test set taken from dev shares dev's filtered rows and source. A text that another set"
    yield "of the corpus has too is no reason to drop a row; shared audio, call or speaker is (leakage).\n"
    yield "## Filtered by reason\n"
    yield table("set | reason | rows", ((p.name, *counted) for p in parts for counted in p.reasons.most_common()))
    yield f"## Lengths and levels\n\n![Histograms of length and level]({PICTURE})\n"
    yield f"## The {SHOWN} worst per reason\n"
    for reason in sorted({reason for part in parts for reason in part.reasons}):
        rejects = ((part.name, row) for part in parts for row in read_jsonl(part.rejects) if row["reason"] == reason)
        worst = heapq.nlargest(SHOWN, rejects, key=lambda item: excess(item[1]["detail"]))
        yield f"### {reason}\n"
        yield table("set | key | detail", ((name, str(row["key"])[:80], row["detail"][:200]) for name, row in worst))
    yield "## Paths\n"
    yield table("set | valid rows | filtered rows", ((p.name, p.path, p.rejects) for p in parts))
    yield "## Listening examples\n"
    examples = [(part.name, row) for part in parts for row in part.sample[:3]]
    cells = [(name, audio_path(row), row["messages"][-1]["content"][:80]) for name, row in examples]
    yield table("set | file | text", cells)


def excess(detail: str) -> float:
    """How far a reject was from its limit, read from `VALUE ..., NAME is LIMIT`; 0 where nothing is measured."""
    match = re.match(r"(-?(?:inf|[\d.e+-]+)) .*, \w+ is (-?[\d.e+-]+)$", detail)
    return abs(float(match[1]) - float(match[2])) if match else 0.0
