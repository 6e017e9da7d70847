"""Drop the rows of a corpus that are not fit for use, and say why: `filter` of prepare_training_data.py.

The text is judged by the rules of conf/data_filter.yaml, the audio by its samples, and the row by what came
before it and by the other sets (duplicates, leakage). Train alone is cut by limits on length, rate of speech and level.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import logging
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

import audio
from common import UserError, progress
from corpus import Entry, count_rows, read_rows
from ledger import open_ledger, parallel
from text_rules import TextRules, spoken_length


def filter_corpus(args: argparse.Namespace) -> None:
    """Read a corpus, normalise its text, drop what breaks a rule and say why."""
    rules = TextRules.load(args.conf)
    limits = {name: value for name, value in rules.train_only.items() if value is not None}
    if args.max_speech_length is not None:
        limits["max_speech_length"] = args.max_speech_length
    if args.split != "train":
        limits = {}
        logging.info("%s is never cut by the train-only rules on length, rate of speech, level", args.split)
    elif args.max_speech_percentile is not None:
        limits["max_speech_length"] = _percentile_length(args.input, args.max_speech_percentile)
    others = Against(args.against)
    seen: dict[str, set] = {"key": set(), "audio": set()}
    bands: Counter[bool | None] = Counter()
    decode = not args.headers_only
    entries = (_apply_text(entry, rules, args.filter_annotation_error) for entry in read_rows(args.input))
    with open_ledger(args.output, args.max_reject_ratio) as ledger:
        inspected = parallel(functools.partial(inspect, decode=decode), entries, args.num_workers)
        for entry, facts in progress(inspected, count_rows(args.input), f"filter {args.split}"):
            entry = _first_problem(entry, facts, seen, others, limits)
            if entry.row is None:
                ledger.reject(entry.given, entry.reason, entry.detail)
                continue
            bands[facts["narrow"]] += 1
            measured = {"seconds": round(facts["seconds"], 3), "audio_hash": facts["hash"]}
            ledger.keep(entry.row | {name: value for name, value in measured.items() if value is not None})
    _warn_of_band(bands, args.expect_band)
    others.report()


def _apply_text(entry: Entry, rules: TextRules, filter_annotation_error: bool) -> Entry:
    if entry.row is None:
        return entry
    raw = entry.row["target"]
    broken = rules.reason(raw) if filter_annotation_error else None
    if broken:
        return Entry(entry.given, None, broken[0], f"{broken[1]}: {raw[:100]!r}")
    return Entry(entry.given, {"raw_target": raw} | entry.row | {"target": rules.normalise(raw)})


def inspect(entry: Entry, decode: bool) -> tuple[Entry, dict[str, Any]]:
    """Measure one utterance's audio (in a worker); without `decode` only its length, from the header."""
    if entry.row is None:
        return entry, {}
    segment = [entry.row.get(name) for name in ("channel", "start", "end")]
    facts: dict[str, Any] = {"hash": None, "narrow": None}
    try:
        if not decode:
            samples, rate, _ = audio.length(entry.row["source"], *segment)
            return entry, facts | {"seconds": samples / rate}
        x, rate = audio.read(entry.row["source"], *segment)
    except audio.AudioError as error:
        return Entry(entry.given, None, error.reason, str(error)), {}
    facts |= {"seconds": len(x) / rate, "hash": hashlib.sha256(x.tobytes()).hexdigest()[:16]}
    facts["level"] = 20 * np.log10(max(np.sqrt(np.mean(np.square(x, dtype=np.float64))), 1e-10))
    facts["clipped"] = float(np.mean(np.abs(x) >= 0.98))  # full scale of mu-law is 0.9803, of A-law 0.984
    facts["narrow"] = audio.is_narrow_band(x, rate)
    return entry, facts


def _first_problem(
    entry: Entry, facts: dict[str, Any], seen: dict[str, set], others: Against, limits: dict[str, float]
) -> Entry:
    """The entry itself, or the reject that earlier rows, other sets or a train-only limit make of it."""
    row = entry.row
    if row is None:
        return entry
    audios = {"|".join(str(row.get(name)) for name in ("source", "channel", "start", "end")), facts["hash"]} - {None}
    problem = None
    if row["key"] in seen["key"]:
        problem = "duplicate_key", f"{row['key']!r:.100} was there before"
    elif audios & seen["audio"]:
        problem = "duplicate_audio", f"the same audio came before under another key: {row['source']}"
    else:
        seen["key"].add(row["key"])
        problem = others.leak(row, facts["hash"]) or _train_only_problem(row, facts, limits)
    if problem:
        return Entry(entry.given, None, *problem)
    seen["audio"] |= audios
    return entry


def _train_only_problem(row: dict[str, Any], facts: dict[str, Any], limits: dict[str, float]) -> tuple[str, str] | None:
    frames = int(facts["seconds"] * 100)
    rate = spoken_length(row["target"]) / facts["seconds"]
    checks = (
        ("too_short", frames, "min_speech_length", "frames of 10 ms"),
        ("too_long", frames, "max_speech_length", "frames of 10 ms"),
        ("chars_per_second", rate, "min_chars_per_second", "characters a second"),
        ("chars_per_second", rate, "max_chars_per_second", "characters a second"),
        ("silent", facts.get("level"), "silence_dbov", "dBov"),
        ("clipped", facts.get("clipped"), "max_clipped_ratio", "of the samples at full scale"),
    )
    for reason, value, name, unit in checks:
        limit = limits.get(name)
        if limit is None or value is None:
            continue
        if (value > limit) if name.startswith("max") else (value < limit):
            return reason, f"{value:.6g} {unit}, {name} is {limit:g}"
    return None


class Against:
    """What other sets hold: a row that shares audio, a call or a speaker with them leaks; text alone may be shared."""

    def __init__(self, paths: Iterable[str]):
        self.known: dict[str, dict[str, str]] = {"audio": {}, "call": {}, "speaker": {}}
        self.texts: set[int] = set()
        self.paths = list(paths)
        self.shared_texts = self.rows = 0
        for path in self.paths:
            for entry in read_rows(path):
                if entry.row is None:
                    raise UserError(f"{path}: {entry.detail}; --against takes the output of `filter`")
                for what, value in self._identities(entry.row, entry.given.get("audio_hash")):
                    self.known[what].setdefault(value, path)
                self.texts.add(hash(entry.row["target"]))

    @staticmethod
    def _identities(row: dict[str, Any], audio_hash: str | None) -> list[tuple[str, str]]:
        pairs = [("audio", row["source"]), ("audio", audio_hash)]
        pairs += [(what, row.get(what)) for what in ("call", "speaker")]
        return [(what, value) for what, value in pairs if value]

    def leak(self, row: dict[str, Any], audio_hash: str | None) -> tuple[str, str] | None:
        """The reject reason of a row that the other sets must not share with this one."""
        for what, value in self._identities(row, audio_hash):
            if value in self.known[what]:
                return "leakage", f"{what} {value!r:.150} is in {self.known[what][value]} too"
        self.rows += 1
        self.shared_texts += hash(row["target"]) in self.texts
        return None

    def report(self) -> None:
        """Say how much text is shared, which is no reason to drop a row: everybody says 好的."""
        if self.paths:
            names = ", ".join(self.paths)
            logging.info("%d of %d rows share their text with %s (kept)", self.shared_texts, self.rows, names)


def _percentile_length(path: str, percentile: float) -> float:
    frames = []
    for entry in progress(read_rows(path), count_rows(path), "lengths"):
        entry, facts = inspect(entry, decode=False)
        if entry.row is not None:
            frames.append(int(facts["seconds"] * 100))
    if not frames:
        raise UserError(f"{path}: no row has audio that can be read, so there is no --max_speech_percentile")
    limit = float(np.percentile(np.array(frames), percentile))
    logging.info("max_speech_length %.0f frames: percentile %g of %d rows", limit, percentile, len(frames))
    return limit


def _warn_of_band(bands: Counter, expected: str | None) -> None:
    measured = bands[True] + bands[False]
    if measured:
        logging.info("%d of %d rows have nothing above 4 kHz (telephone band)", bands[True], measured)
    if expected == "wideband" and bands[True]:
        logging.warning("%d of %d rows offered as wideband are telephone audio by spectrum", bands[True], measured)
    if expected == "telephone" and bands[False]:
        logging.warning("%d of %d rows offered as telephone have energy above 4 kHz", bands[False], measured)
