"""Check what stage 0 wrote, and describe it: `validate` and `stats` of prepare_training_data.py.

    problems = check_files(["train_formatted.jsonl", "dev_formatted.jsonl"], fs=16000, check_all=False)
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

import audio
from common import UserError, atomic_write, progress, read_jsonl
from corpus import count_rows, hash_share

SAMPLE = 200  # files whose audio is measured again; all of them with --check_audio
SHOWN = 10
USER = re.compile(r"[^<]*<\|startofspeech\|>!(/.+)<\|endofspeech\|>", re.DOTALL)
SPLITS = ("train", "dev", "test")
SIMULATED_TRAIN = "simulated_8k_telephone/train"


# --- validate


def validate(args: argparse.Namespace) -> None:
    """Check formatted files; exit 1 with the first ten problems."""
    problems = check_files(args.input, args.fs, args.check_audio)
    first = list(itertools.islice(problems, SHOWN))
    for problem in first:
        logging.error("%s", problem)
    if first:
        more = sum(1 for _ in problems)
        raise UserError(f"{len(first) + more} problems in {', '.join(args.input)}; the first is: {first[0]}")
    logging.info("%s: valid", ", ".join(args.input))


def check_files(paths: list[str], fs: int, check_all: bool) -> Iterator[str]:
    """Yield the problems of formatted files: structure, audio, lengths, unique keys, disjoint train, dev and test."""
    owners: dict[tuple[str, str, str], str] = {}
    for path in paths:
        role = split_of(path)
        total, keys = count_rows(path) if os.path.isfile(path) else 0, set()
        for number, row in enumerate(progress(read_jsonl(path), total, f"validate {Path(path).name}"), 1):
            where = f"{path}:{number}"
            problem = structure_problem(row, role)
            if problem:
                yield f"{where}: {problem}"
                continue
            if row["key"] in keys:
                yield f"{where}: key {row['key']!r:.100} was there before"
            keys.add(row["key"])
            # Keys, calls and speakers are names within one corpus (folder); a path is a path everywhere.
            names = [(str(Path(path).parent), name, row.get(name)) for name in ("key", "call", "speaker")]
            for identity in (*names, ("", "audio", audio_path(row))):
                if identity[2] and owners.setdefault(identity, role) != role:
                    yield f"{where}: {identity[1]} {identity[2]!r:.100} is in {owners[identity]} too"
            if check_all or total <= SAMPLE or hash_share(row["key"]) < SAMPLE / total:
                problem = audio_problem(row, fs)
            elif not os.path.isfile(audio_path(row)):
                problem = f"{audio_path(row)} does not exist"
            if problem:
                yield f"{where}: {problem}"
        if not keys:
            yield f"{path}: no valid rows"


def structure_problem(row: dict[str, Any], role: str) -> str | None:
    """What is wrong with a row's fields, or None."""
    messages = row.get("messages")
    if not isinstance(row.get("key"), str) or not row["key"]:
        return "no key"
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return "messages is not a list of objects"
    if [message.get("role") for message in messages] != ["system", "user", "assistant"]:
        return "messages are not system, user, assistant"
    if not all(isinstance(message.get("content"), str) for message in messages):
        return "a message without text"
    if not USER.fullmatch(messages[1]["content"]):
        return "the user message has no <|startofspeech|>!/absolute/path<|endofspeech|>"
    for name in ("speech_length", "text_length"):
        # FunASR leaves out rows without text: fine in a test set of no speech, a loss in training.
        least = 0 if name == "text_length" and role == "test" else 1
        if not isinstance(row.get(name), int) or isinstance(row[name], bool) or row[name] < least:
            return f"{name} {row.get(name)!r} is not an integer of at least {least}"
    return None


def audio_problem(row: dict[str, Any], fs: int) -> str | None:
    """What is wrong with a row's audio, measured again from its samples, or None."""
    path = audio_path(row)
    try:
        plain = audio.length(path).plain
        samples, rate = audio.read(path)
    except audio.AudioError as error:
        return str(error)
    if rate != fs or not plain:
        return f"{path} is not mono PCM at {fs} Hz (it is at {rate} Hz)"
    if len(samples) * 100 // fs != row["speech_length"]:
        return f"speech_length {row['speech_length']}, but {path} has {len(samples) * 100 // fs} frames"
    return None


def audio_path(row: dict[str, Any]) -> str:
    """The path in a formatted row's user message."""
    return USER.fullmatch(row["messages"][1]["content"])[1]


def split_of(path: str | os.PathLike) -> str:
    """train, dev or test by the file's name; the name itself for another."""
    words = re.split("[_-]", Path(path).stem)
    return next((split for split in SPLITS if split in words), Path(path).stem)


# --- stats


@dataclass
class Part:
    """What one corpus has in one split."""

    name: str
    rows: int = 0
    frames: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    tenths: Counter[int] = field(default_factory=Counter)
    sample: list[tuple[float, str, str, str]] = field(default_factory=list)  # hash, key, path, text
    given: int | None = None

    @property
    def rejected(self) -> int:
        return sum(self.reasons.values())

    @property
    def hours(self) -> float:
        return self.frames / 360_000


def stats(args: argparse.Namespace) -> None:
    """Write the report of stage 0 from the files it left in --data_dir."""
    worst: dict[str, list] = {}
    parts = [read_part(folder, split, worst) for folder, split in _find(Path(args.data_dir))]
    if not parts:
        raise UserError(f"{args.data_dir} has no */*_formatted.jsonl; run stage 0 first", code=2)
    lost = [
        f"{path} has {whole} rows, {names} {seen}"
        for names, path, _, whole, seen in count_sources(args.source, parts) if whole != seen
    ]
    simulated = sum(part.frames for part in parts if part.name == SIMULATED_TRAIN)
    for names, path, chosen, whole, seen in count_sources(args.estimate, parts):
        cost = args.simulation_seconds / max(simulated, 1) if names.startswith("simulated") else 0.0
        estimate(names, path, chosen, whole / max(seen, 1), cost)
    output = Path(args.output or Path(args.data_dir) / "STAGE0_COMPLETION_REPORT.md")
    output.parent.mkdir(parents=True, exist_ok=True)
    levels = {part.name: measure_levels(part) for part in parts if part.rows}
    pictures = draw(parts, levels, output)
    sections = [summary(parts, lost), by_reason(parts), lengths(parts, levels), offenders(worst), listening(parts)]
    with atomic_write(output) as file:
        file.write("# Stage 0 completion report\n\n" + "\n".join(sections).replace("PICTURES", pictures))
    logging.info("%s: %d rows valid, %d rejected", output, sum(p.rows for p in parts), sum(p.rejected for p in parts))
    if lost:
        raise UserError(f"rows were lost: {'; '.join(lost)}")


def _find(data_dir: Path) -> list[tuple[Path, str]]:
    found = {(path.parent, path.stem.removesuffix("_formatted")) for path in data_dir.glob("*/*_formatted.jsonl")}
    found = {(folder, split) for folder, split in found if not split.startswith("rejected_")}
    order = {split: number for number, split in enumerate(SPLITS)}
    return sorted(found, key=lambda item: (item[0].name, order.get(item[1], 9), item[1]))


def read_part(folder: Path, split: str, worst: dict[str, list]) -> Part:
    """Count the rows and rejects of one split; keep a sample of rows, and the worst rejects per reason in `worst`."""
    part = Part(f"{folder.name}/{split}")
    for row in read_jsonl(folder / f"{split}_formatted.jsonl"):
        part.rows += 1
        part.frames += row["speech_length"]
        part.tenths[row["speech_length"] // 10] += 1
        item = (-hash_share(row["key"]), row["key"], audio_path(row), row["messages"][2]["content"])
        (heapq.heappush if len(part.sample) < SAMPLE else heapq.heappushpop)(part.sample, item)
    rejects = [folder / f"rejected_{split}.jsonl", folder / f"rejected_{split}_formatted.jsonl"]
    for row in read_jsonl(next(path for path in rejects if path.is_file())) if any(map(Path.is_file, rejects)) else ():
        part.reasons[row["reason"]] += 1
        item = (excess(row["detail"]), -part.rejected, part.name, str(row["key"]), row["detail"])
        heap = worst.setdefault(row["reason"], [])
        (heapq.heappush if len(heap) < SHOWN else heapq.heappushpop)(heap, item)
    return part


def excess(detail: str) -> float:
    """How far a reject was from its limit, read from `VALUE ..., NAME is LIMIT`; 0 where nothing is measured."""
    match = re.match(r"(-?[\d.e+]+) .*, \w+ is (-?[\d.e+]+)$", detail)
    return abs(float(match[1]) - float(match[2])) if match else 0.0


def count_sources(sources: Iterable[str], parts: list[Part]) -> Iterator[tuple[str, str, list[Part], int, int]]:
    """For each `CORPUS/SPLIT[,SPLIT]=PATH`: names, path, the parts, rows in the file and in the parts."""
    by_name = {part.name: part for part in parts}
    for source in sources:
        names, _, path = source.partition("=")
        corpus, _, splits = names.partition("/")
        try:
            chosen = [by_name[f"{corpus}/{split}"] for split in splits.split(",")]
        except KeyError as error:
            raise UserError(f"--source {source}: there is no {error} in --data_dir", code=2) from error
        chosen[0].given = count_rows(path)
        yield names, path, chosen, chosen[0].given, sum(part.rows + part.rejected for part in chosen)


def estimate(names: str, path: str, sampled: list[Part], factor: float, seconds_per_frame: float) -> None:
    """Say what the whole of a corpus will take, from the parts that a sample of it became."""
    rows, frames = sum(part.rows for part in sampled), sum(part.frames for part in sampled)
    size = sum(os.path.getsize(item[2]) for part in sampled for item in part.sample)
    hours = frames * factor * seconds_per_frame / 3600
    print(
        f"{names}: {path}: about {rows * factor:.0f} utterances, {frames * factor / 360_000:.1f} hours, "
        f"{size * factor / 1e9:.2f} GB" + (f", {hours:.3g} core-hours of simulation" if hours else "")
    )


def measure_levels(part: Part) -> list[tuple[float, bool]]:
    """Level in dBov and whether only the telephone band is used, of the part's sample of files."""
    measured = []
    for _, _, path, _ in progress(sorted(part.sample, reverse=True), len(part.sample), f"levels {part.name}"):
        samples, rate = audio.read(path)
        power = float(np.mean(np.square(samples, dtype=np.float64)))
        measured.append((10 * np.log10(max(power, 1e-10)), audio.is_narrow_band(samples, rate)))
    return measured


def draw(parts: list[Part], levels: dict[str, list], output: Path) -> str:
    """Draw the histograms of length and level beside the report; return the lines that show them."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 4), layout="constrained")
    longest = max(max(part.tenths, default=0) for part in parts) / 10 + 0.1
    for part in parts:
        if part.rows:
            seconds, shares = np.array(list(part.tenths)) / 10, np.array(list(part.tenths.values())) / part.rows
            axes[0].hist(seconds, bins=np.linspace(0, longest, 61), weights=shares, histtype="step", label=part.name)
            axes[1].hist([level for level, _ in levels[part.name]], bins=np.arange(-80, 1, 2), histtype="step",
                         density=True, label=part.name)
    axes[0].set(title="Length", xlabel="seconds", ylabel="share of the utterances")
    axes[1].set(title=f"Level (at most {SAMPLE} files each)", xlabel="RMS, dBov", ylabel="density")
    axes[0].legend(fontsize="small")
    picture = output.with_name("stage0_histograms.png")
    with atomic_write(picture, "wb") as file:
        figure.savefig(file, format="png", metadata={"Software": None})
    pyplot.close(figure)
    return f"![Histograms of length and level]({picture.name})\n"


def table(head: str, rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table; a cell cannot break out of it."""
    columns = head.split(" | ")
    lines = [f"| {head} |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(" ".join(str(cell).replace("|", "\\|").split()) for cell in row) + " |")
    return "\n".join(lines) + "\n"


def summary(parts: list[Part], lost: list[str]) -> str:
    rows = [
        (p.name, p.rows + p.rejected, p.rows, p.rejected, f"{p.rejected / max(p.rows + p.rejected, 1):.1%}",
         f"{p.hours:.2f}", "not counted" if p.given is None else p.given)
        for p in parts
    ]
    hours = sum(part.hours for part in parts)
    rows.append(("all", *(sum(row[column] for row in rows) for column in (1, 2, 3)), "", f"{hours:.2f}", ""))
    verdict = "**Rows were lost: " + "; ".join(lost) + "**\n" if lost else ""
    head = "set | rows in | valid | filtered | share filtered | hours | rows in the source, counted again"
    return (
        "## Valid rows\n\n" + table(head, rows) + "\nIn = valid + filtered. Rules on length, rate of speech and level "
        "hold for train only; dev and test are cut by none of them. A test set taken from dev shares dev's "
        "filtered rows and source.\n" + verdict
    )


def by_reason(parts: list[Part]) -> str:
    rows = [(p.name, reason, count) for p in parts for reason, count in p.reasons.most_common()]
    return "## Filtered by reason\n\n" + table("set | reason | rows", rows)


def lengths(parts: list[Part], levels: dict[str, list]) -> str:
    rows = []
    for part in parts:
        if part.rows:
            seconds = np.repeat(*map(np.array, zip(*part.tenths.items(), strict=True))) / 10
            quartiles = [f"{value:.1f}" for value in np.percentile(seconds, (0, 50, 99, 99.5, 100))]
            level = [level for level, _ in levels[part.name]]
            narrow = sum(narrow for _, narrow in levels[part.name])
            rows.append((part.name, *quartiles, f"{np.median(level):.1f}", f"{narrow} of {len(level)}"))
    head = "set | shortest, s | median | 99 % | 99.5 % | longest | median level, dBov | nothing above 4 kHz"
    return "## Lengths and levels\n\nPICTURES\n" + table(head, rows)


def offenders(worst: dict[str, list]) -> str:
    text = f"## The {SHOWN} worst per reason\n\n"
    for reason in sorted(worst):
        rows = [(name, key[:80], detail[:200]) for _, _, name, key, detail in sorted(worst[reason], reverse=True)]
        text += f"### {reason}\n\n" + table("set | key | detail", rows) + "\n"
    return text


def listening(parts: list[Part]) -> str:
    rows = [(p.name, path, text[:80]) for p in parts for _, _, path, text in sorted(p.sample, reverse=True)[:3]]
    return "## Listening examples\n\n" + table("set | file | text", rows)
