"""Normalise transcripts and say which are none, by the rules of conf/data_filter.yaml.

    rules = TextRules.load("conf/data_filter.yaml")
    rules.normalise("你 好 ，ＡＢＣ")         # "你好，ABC"
    rules.reason("[beep]")                   # ("annotation_error", "nothing but bracketed ...")

Every rule carries examples of what it drops and keeps; `load` runs them and refuses rules that break their word.
"""

from __future__ import annotations

import os
import re
import unicodedata
from typing import Any

import yaml

from common import UserError

CJK = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u3040-\u30ff\U00020000-\U0003134f"
WIDE = CJK + "\u3001\u3002，！？：；（）《》「」『』【】…"
HAS_CJK = re.compile(f"[{CJK}]")
# Mandarin keeps its full-width punctuation (the model writes it so); NFKC would make it ASCII.
KEPT_WIDE = re.compile("([，！？：；（）…]+)")
HALF_AFTER_CJK = re.compile(f"(?<=[{CJK}])\\s*([,!?;:])(?![0-9A-Za-z])")
TO_WIDE = str.maketrans(",!?;:", "，！？；：")
SPACE_IN_CJK = re.compile(f"(?<=[{WIDE}])\\s+(?=[{WIDE}])")
CASES = {"keep": str, "lower": str.lower, "upper": str.upper}

TRAIN_ONLY = {
    "min_speech_length", "max_speech_length", "min_chars_per_second", "max_chars_per_second",
    "silence_dbov", "max_clipped_ratio",
}


class TextRules:
    """The text policy and the rules of one YAML file."""

    def __init__(self, config: dict[str, Any], name: str):
        self.name = name
        policy = config.get("text") or {}
        self.case, self.punctuation = policy.get("case", "keep"), policy.get("punctuation", "keep")
        if self.case not in CASES or self.punctuation not in ("keep", "remove"):
            raise UserError(f"{name}: text: case is keep, lower or upper; punctuation is keep or remove", code=2)
        self.rules = [self._compile(rule) for rule in config.get("rules") or []]
        self.train_only: dict[str, float | None] = config.get("train_only") or {}
        self._run_examples(config.get("rules") or [])

    @classmethod
    def load(cls, path: str | os.PathLike) -> TextRules:
        """Read a YAML file and run its examples."""
        try:
            with open(path, encoding="utf-8") as file:
                config = yaml.safe_load(file)
        except FileNotFoundError as error:
            raise UserError(f"{path} does not exist; --conf is such as conf/data_filter.yaml", code=2) from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not YAML: {error}", code=2) from error
        if not isinstance(config, dict):
            raise UserError(f"{path} holds no settings", code=2)
        unknown = config.keys() - {"text", "rules", "train_only"}
        unknown |= (config.get("text") or {}).keys() - {"case", "punctuation"}
        unknown |= (config.get("train_only") or {}).keys() - TRAIN_ONLY
        if unknown:
            raise UserError(f"{path}: nobody reads {', '.join(sorted(map(str, unknown)))}; correct the name", code=2)
        return cls(config, os.fspath(path))

    def normalise(self, text: str) -> str:
        """The text as it is trained on: `clean`, then the policy on case and punctuation."""
        text = clean(text)
        if self.punctuation == "remove":
            text = re.sub(r"(?<=\w)['’](?=\w)", "\0", text)  # don't is one word
            text = re.sub(r"[^\w\s\0]|_", " ", text).replace("\0", "'")
            text = SPACE_IN_CJK.sub("", " ".join(text.split()))
        return CASES[self.case](text)

    def reason(self, text: str) -> tuple[str, str] | None:
        """(reason code, why) of the first rule that a raw text breaks, or None; the policy must not hide a mark."""
        text = clean(text)
        for reason, why, pattern in self.rules:
            if pattern.search(text):
                return reason, why
        return None

    def _compile(self, rule: dict[str, Any]) -> tuple[str, str, re.Pattern]:
        try:
            return str(rule["reason"]), str(rule["why"]), re.compile(rule["pattern"])
        except (KeyError, TypeError) as error:
            raise UserError(f"{self.name}: a rule has reason, why, pattern, drops, keeps ({error})", code=2) from error
        except re.error as error:
            raise UserError(f"{self.name}: pattern {rule['pattern']!r}: {error}", code=2) from error

    def _run_examples(self, rules: list[dict[str, Any]]) -> None:
        for rule, (_, why, pattern) in zip(rules, self.rules, strict=True):
            if not rule.get("drops") or not rule.get("keeps"):
                raise UserError(f"{self.name}: the rule {why!r} needs examples under drops and keeps", code=2)
            for wanted, examples in ((True, rule["drops"]), (False, rule["keeps"])):
                for example in examples:
                    if bool(pattern.search(clean(str(example)))) is not wanted:
                        verb = "drop" if wanted else "keep"
                        raise UserError(f"{self.name}: the rule {why!r} does not {verb} {example!r}", code=2)


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
    cjk = len(HAS_CJK.findall(text))
    return cjk + sum(char.isdigit() for char in text) + (sum(char.isalpha() for char in text) - cjk) / 3
