"""Normalise a corpus and drop the rows that are not fit for use, with the reason: `filter` of prepare_training_data.py.

    rules = TextRules.load("conf/data_filter.yaml")
    rules.normalise("你 好 ，ＡＢＣ")         # "你好，ABC"
    rules.reason("[beep]")                   # ("annotation_error", "nothing but bracketed ...")

The text is judged by the rules of that file, the audio by its samples, and the row by what came before it and by
the other sets (duplicates, leakage). Train alone is cut by limits on length, rate of speech and level.
"""

import argparse
import contextlib
import functools
import hashlib
import logging
import os
import re
import unicodedata
from array import array
from collections import Counter
from typing import Any

import numpy as np

import audio
from common import UserError, parallel, progress, read_yaml
from corpus import Entry, Seen, count_rows, filtered_rows, on_row, open_ledger, read_rows, segment, unique

CJK = "々〇\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u3040-\u30ff\U00020000-\U0003134f"
WIDE = CJK + "\u3001\u3002，！？：；（）《》「」『』【】…"
HAS_CJK = re.compile(f"[{CJK}]")
# Mandarin keeps its full-width punctuation (the model writes it so); NFKC would make it ASCII.
KEPT_WIDE = re.compile("([，！？：；（）…]+)")
HALF_AFTER_CJK = re.compile(f"(?<=[{CJK}])\\s*([,!?;:])(?![0-9A-Za-z])")
TO_WIDE = str.maketrans(",!?;:", "，！？；：")
SPACE_IN_CJK = re.compile(f"(?<=[{WIDE}])\\s+(?=[{WIDE}])")
CASES = {"keep": str, "lower": str.lower, "upper": str.upper}
LIMITS = {  # name under train_only, or of the option -> reason code, what is compared, its unit
    "min_speech_length": ("too_short", "frames", "frames of 10 ms"),
    "max_speech_length": ("too_long", "frames", "frames of 10 ms"),
    "min_chars_per_second": ("chars_per_second", "rate", "characters a second"),
    "max_chars_per_second": ("chars_per_second", "rate", "characters a second"),
    "silence_dbov": ("silent", "level", "dBov"),
    "max_clipped_ratio": ("clipped", "clipped", "of the samples at full scale"),
}


class TextRules:
    """The text policy, the rules on text and the limits of conf/data_filter.yaml; ValueError for a bad one."""

    def __init__(self, config: dict[str, Any]):
        policy, train_only = config.get("text") or {}, config.get("train_only") or {}
        unknown = config.keys() - {"text", "rules", "train_only"} | policy.keys() - {"case", "punctuation"}
        unknown |= train_only.keys() - (LIMITS.keys() - {"max_speech_length"})
        if unknown:
            names = ", ".join(sorted(map(str, unknown)))
            raise ValueError(f"nobody reads {names} here; correct the name (--max_speech_length is an option)")
        self.case, self.punctuation = policy.get("case", "keep"), policy.get("punctuation", "keep")
        if self.case not in CASES or self.punctuation not in ("keep", "remove"):
            raise ValueError("text: case is keep, lower or upper; punctuation is keep or remove")
        self.limits = {name: float(value) for name, value in train_only.items() if value is not None}
        self.rules = []
        for rule in config.get("rules") or []:
            pattern = re.compile(rule["pattern"])
            for verb in ("drop", "keep"):
                for example in rule[f"{verb}s"]:
                    if bool(pattern.search(clean(str(example)))) != (verb == "drop"):
                        raise ValueError(f"the rule {rule['why']!r} does not {verb} {example!r}")
            self.rules.append((str(rule["reason"]), rule["why"], pattern))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "TextRules":
        """Read a YAML file and run its examples; UserError, code 2, where it is not as it should be."""
        try:
            return cls(read_yaml(path))
        except (re.error, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is not in the form of conf/data_filter.yaml: {error}", code=2) from error

    def normalise(self, text: str) -> str:
        """The text as it is trained on: `clean`, then the policy on case and punctuation."""
        text = clean(text)
        if self.punctuation == "remove":
            text = re.sub(r"(?<=\w)['’](?=\w)", "\0", text)  # don't is one word
            text = re.sub(r"(?!(?<=\d)\.(?=\d))[^\w\s\0%]|_", " ", text).replace("\0", "'")  # 3.5% is one word, too
            text = SPACE_IN_CJK.sub("", " ".join(text.split()))
        return CASES[self.case](text)

    def reason(self, text: str) -> tuple[str, str] | None:
        """(reason code, why) of the first rule that a raw text breaks, or None; the policy must not hide a mark."""
        text = clean(text)
        return next(((reason, why) for reason, why, pattern in self.rules if pattern.search(text)), None)


def clean(text: str) -> str:
    """NFKC, half-width letters and digits, Mandarin punctuation full-width, no spaces between CJK characters."""
    # Controls become spaces; format characters (zero-width, direction marks) are not there to the ear.
    text = "".join(
        " " if category == "Cc" else char
        for char, category in ((char, unicodedata.category(char)) for char in text)
        if category != "Cf"
    )
    if HAS_CJK.search(text):
        parts = KEPT_WIDE.split(text)
        parts[::2] = [unicodedata.normalize("NFKC", part) for part in parts[::2]]
        text = HALF_AFTER_CJK.sub(lambda match: match[1].translate(TO_WIDE), "".join(parts))
    else:
        text = unicodedata.normalize("NFKC", text)
    return SPACE_IN_CJK.sub("", " ".join(text.split()))


def spoken_length(text: str) -> float:
    """Characters as they take time: CJK characters and digits whole, other letters a third (15 are 5 syllables)."""
    return sum(1 if char.isnumeric() or HAS_CJK.match(char) else 1 / 3 for char in text if char.isalnum())


def filter_corpus(args: argparse.Namespace) -> None:
    """Read a corpus, normalise its text, drop what breaks a rule and say why."""
    rules, total = TextRules.load(args.conf), count_rows(args.input)
    others = read_others(args.against, args.against_audio)
    settings = {"rules": rules, "check_text": args.filter_annotation_error == "true", "offered": args.expect_band}
    work = functools.partial(on_row, functools.partial(inspect, limits=train_limits(args, rules, total), **settings))
    heard, wrong, mixed, nameless, channels = Seen(), 0, 0, 0, Counter()
    with open_ledger(args.output, args.max_reject_ratio, args.input, by_rules=0.5) as ledger:
        inspected = parallel(work, unique(read_rows(args.input)), args.num_workers, args.dask_scheduler)
        for entry in progress(inspected, total, f"filter {args.split}"):
            if isinstance(given := entry.row or entry.given, dict):
                channels[segment(given).get("channel"), entry.reason == "channel_missing"] += 1
            if entry.row and (problem := find_copy(entry.row, heard, others)):
                entry = Entry(entry.given, None, *problem)
            elif entry.row:
                heard.add(entry.row["audio_hash"])
                wrong += args.expect_band not in (None, entry.row["band"])
                mixed += "channels" in entry.row
                # Where nobody is known, Kaldi has the key for a speaker.
                nameless += "call" not in entry.row and entry.row.get("speaker") in (None, entry.row["key"])
            ledger.add(entry)
        if mixed:  # said before the ledger may fail: two sides that are one mix are duplicates
            logging.warning("%d of %d rows are the mix of several channels: no `channel` was given", mixed, ledger.kept)
        lacking = channels[2, True]
        if lacking > channels[1, False] / 4 > 0 and not any(channels[side] for side in ((0, False), (2, False))):
            raise UserError(f"{args.input}: {lacking} rows name channel 2, which no audio has, and none channel 0; "
                            "channels count from 0: take one from each")  # fmt: skip
    if nameless:
        message = "%d of %d rows have no call and no speaker: who is in two sets is not seen, intervals are too narrow"
        logging.warning(message, nameless, ledger.kept)
    if wrong:
        message = "%d of %d rows offered as %s are not, by their energy above 4 kHz"
        logging.warning(message, wrong, ledger.kept, args.expect_band)


def train_limits(args: argparse.Namespace, rules: TextRules, total: int) -> dict[str, float]:
    """The limits that the command line and the rules set on a train set; none for dev and test."""
    if args.split != "train":
        logging.info("%s is never cut by the train-only rules on length, rate of speech, level", args.split)
        return {}
    longest = float(args.max_speech_length)
    if args.max_speech_percentile is not None:
        frames = array("I")
        for entry in progress(read_rows(args.input), total, "lengths"):
            with contextlib.suppress(audio.AudioError):
                if entry.row:
                    samples, rate, _ = audio.length(entry.row["source"], **segment(entry.row))
                    frames.append(_frames_at_most(samples, rate))
        if not frames:
            raise UserError(f"{args.input}: no row has audio that can be read, so there is no --max_speech_percentile")
        longest = float(np.percentile(frames, args.max_speech_percentile))
        logging.info("max_speech_length is %.0f frames, from %d rows", longest, len(frames))
    return {"max_speech_length": longest} | rules.limits


def inspect(
    row: dict[str, Any], rules: TextRules, check_text: bool, limits: dict[str, float], offered: str | None
) -> dict[str, Any]:
    """Judge one utterance by its text and its samples (in a worker); its row gets seconds, band and audio_hash."""
    raw, cut = row["target"], segment(row)
    if check_text and (broken := rules.reason(raw)):
        raise audio.AudioError(broken[0], f"{broken[1]}: {raw[:100]!r}")
    if "max_speech_length" in limits:  # by the header: an hour of speech is not decoded to be dropped
        samples, rate, _ = audio.length(row["source"], **cut)
        longest = {"max_speech_length": limits["max_speech_length"]}
        if problem := over_limit({"frames": _frames_at_most(samples, rate)}, longest):
            raise audio.AudioError(*problem)
    x, rate = audio.read(row["source"], **cut)
    text = rules.normalise(raw)
    facts = {
        "frames": len(x) * 100 // rate,
        "rate": spoken_length(text) * rate / len(x),
        "level": audio.rms_level(x.astype(np.float64) - x.mean(dtype=np.float64)),  # recorders add an offset
        "clipped": float(np.mean(np.abs(x) >= 0.98)),  # full scale of mu-law is 0.9803, of A-law 0.984
    }
    if problem := over_limit(facts, limits):
        raise audio.AudioError(*problem)
    row = {"raw_target": raw} | row | {"target": text, "seconds": round(len(x) / rate, 3)}
    row["audio_hash"] = hashlib.sha256(x.tobytes()).hexdigest()[:16]
    row["band"] = "telephone" if audio.is_narrow_band(x, rate) else "wideband"
    if "channel" not in row and (channels := audio.channels(row["source"])) > 1:
        row["channels"] = channels  # which were mixed
    return row | ({"offered": offered} if offered else {})


def _frames_at_most(samples: int, rate: int) -> int:
    """Frames of 10 ms at 16 or 8 kHz: the resampler rounds up, and training takes no row that is over by one."""
    return round(samples * 8000 / rate) // 80


def over_limit(facts: dict[str, float], limits: dict[str, float]) -> tuple[str, str] | None:
    """Reason and detail of the first limit that is broken, or None."""
    for name, limit in limits.items():
        reason, what, unit = LIMITS[name]
        if facts[what] > limit if name.startswith("max") else facts[what] < limit:
            return reason, f"{facts[what]:.6g} {unit}, {name} is {limit:g}"
    return None


def read_others(same_corpus: list[str], other_corpora: list[str]) -> dict[tuple[str, str], str]:
    """The set that each audio, call and speaker of other sets is in; of another corpus the audio alone."""
    owners: dict[tuple[str, str], str] = {}
    for path in (*same_corpus, *other_corpora):
        for row in filtered_rows(path):
            for identity in _identities(row):
                if path in same_corpus or identity[0] == "audio":
                    owners.setdefault(identity, path)
    return owners


def _identities(row: dict[str, Any]) -> list[tuple[str, str]]:
    fields = {"source": "audio", "audio_hash": "audio", "call": "call", "speaker": "speaker"}
    row = row | {"source": os.path.realpath(row["source"])}  # the same by whatever links; only the row keeps its name
    return [(what, row[field]) for field, what in fields.items() if row.get(field)]


def find_copy(row: dict[str, Any], heard: Seen, others: dict[tuple[str, str], str]) -> tuple[str, str] | None:
    """Reason and detail of what a row shares with an earlier one or with other sets, or None."""
    if row["audio_hash"] in heard:
        return "duplicate_audio", f"the same audio came before under another key: {row['source']}"
    for what, value in _identities(row):
        if (what, value) in others:
            return "leakage", f"{what} {value!r:.150} is in {others[what, value]} too"
    return None
