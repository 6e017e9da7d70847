"""Error rates of transcripts: one normalisation for both sides, CER, mixed WER, keywords, bootstrap.

    counts = count(["逾期了吗"], ["预期了吗"])
    rate(counts.errors, counts.lengths)   # 0.25

Alignments are jiwer's, intervals scipy's. Every function takes normalised text unless it says raw.
"""

from __future__ import annotations

import dataclasses
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jiwer
import numpy as np
from scipy import stats

from common import UserError

# Scripts written without spaces: Han with its extensions, kana. One character is one word.
CJK = "\u3005\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"[{CJK}]|[^\s{CJK}]+")
MARKUP = re.compile(r"<\|[^|<>]*\|>")
SPACE_AT_CJK = re.compile(rf"(?<=[{CJK}])\s+|\s+(?=[{CJK}])")
# A stretch of up to 12 characters five times in a row.
LOOP = re.compile(r"(.{1,12}?)\1{4}")
# Bounds between the groups that error rates are broken down by.
EDGES = {
    "snr": ("dB", (5, 10, 15, 20, 30)), "loss": ("%", (0.1, 1, 3, 5)),
    "duration": ("seconds", (2, 5, 10, 30)),
}


def normalise(raw: str, chinese_numerals: bool = False) -> str:
    """Make raw text comparable: NFKC, lower case, no markup, no punctuation, spaces only between Latin words.

    A per-cent sign and the point inside a number carry meaning and stay. `chinese_numerals` writes Arabic
    numbers in Chinese with FunASR's own text normaliser.
    """
    text = unicodedata.normalize("NFKC", MARKUP.sub(" ", raw)).lower()
    if chinese_numerals:
        from funasr.models.fun_asr_nano.tools.cn_tn import normalize_nsw  # imports all of funasr

        text = normalize_nsw(text)
    text = re.sub(r"(?<=[a-z])['’](?=[a-z])|(?<=\d),(?=\d{3})", "", text)  # don't and 1,000 are one word each
    kept = []
    for index, character in enumerate(text):
        inside_number = character == "." and text[index - 1 : index].isdigit() and text[index + 1 : index + 2].isdigit()
        dropped = unicodedata.category(character)[0] in "PSCZ" and character != "%" and not inside_number
        kept.append(" " if dropped else character)
    return SPACE_AT_CJK.sub("", " ".join("".join(kept).split()))


def characters(text: str) -> str:
    """The characters that CER compares: all but spaces."""
    return text.replace(" ", "")


def words(text: str) -> list[str]:
    """The words that WER compares: a CJK character or a run of anything else without spaces."""
    return WORD.findall(text)


@dataclasses.dataclass(frozen=True)
class Counts:
    """Edit operations per utterance, as arrays of one length, and pairs (reference, hypothesis) confused."""

    substitutions: np.ndarray
    deletions: np.ndarray
    insertions: np.ndarray
    lengths: np.ndarray
    confusions: Counter

    @property
    def errors(self) -> np.ndarray:
        return self.substitutions + self.deletions + self.insertions


def count(references: Sequence[str], hypotheses: Sequence[str], unit: str = "character") -> Counts:
    """Align normalised texts with jiwer by "character" or "word" and count per utterance."""
    split = (lambda text: list(characters(text))) if unit == "character" else words
    # jiwer splits at spaces, so characters go in as words of one character.
    output = jiwer.process_words(
        [" ".join(split(text)) for text in references], [" ".join(split(text)) for text in hypotheses]
    ) if references else None
    table = np.zeros((len(references), 4), dtype=np.int64)
    confusions: Counter = Counter()
    for row in range(len(references)):
        reference, hypothesis = output.references[row], output.hypotheses[row]
        table[row, 3] = len(reference)
        for chunk in output.alignments[row]:
            old = reference[chunk.ref_start_idx : chunk.ref_end_idx]
            new = hypothesis[chunk.hyp_start_idx : chunk.hyp_end_idx]
            if chunk.type != "equal":
                column = ("substitute", "delete", "insert").index(chunk.type)
                table[row, column] += max(len(old), len(new))
                confusions.update(zip(old or [""] * len(new), new or [""] * len(old), strict=True))
    return Counts(table[:, 0], table[:, 1], table[:, 2], table[:, 3], confusions)


def align(reference: str, hypothesis: str) -> list[tuple[str, str, str]]:
    """Align two normalised texts by character: (equal, substitute, delete or insert; reference; hypothesis)."""
    output = jiwer.process_words(" ".join(characters(reference)), " ".join(characters(hypothesis)))
    old, new = output.references[0], output.hypotheses[0]
    return [
        (chunk.type, "".join(old[chunk.ref_start_idx : chunk.ref_end_idx]),
         "".join(new[chunk.hyp_start_idx : chunk.hyp_end_idx]))
        for chunk in output.alignments[0]
    ]


def rate(errors: np.ndarray, lengths: np.ndarray) -> float | None:
    """Errors over reference length of a whole set; None when there is nothing to recognise."""
    total = int(np.sum(lengths))
    return float(np.sum(errors)) / total if total else None


def read_keywords(path: str | os.PathLike) -> dict[str, re.Pattern]:
    """Read a keyword list: one a line, other spellings after `|`, `#` starts a comment.

    Returns, by the first spelling, a pattern that finds any of its spellings in normalised text.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist; give a keyword list with --keywords", code=2)
    patterns = {}
    with open(path, encoding="utf-8") as file:
        for line in file:
            spellings = [normalise(part) for part in line.split("#")[0].split("|")]
            spellings = sorted(filter(None, spellings), key=len, reverse=True)
            if spellings:
                # A Latin keyword must not be found inside a longer word: app in happy.
                any_of = "|".join(
                    rf"(?<![^\W{CJK}]){re.escape(word)}(?![^\W{CJK}])" if not re.search(rf"[{CJK}]", word)
                    else re.escape(word) for word in spellings
                )
                patterns[line.split("#")[0].split("|")[0].strip()] = re.compile(any_of)
    return patterns


def keyword_counts(texts: Sequence[str], keywords: dict[str, re.Pattern]) -> np.ndarray:
    """Occurrences, one row per text and one column per keyword; each keyword is counted on its own."""
    found = [[len(pattern.findall(text)) for pattern in keywords.values()] for text in texts]
    return np.array(found, dtype=np.int64).reshape(len(texts), len(keywords))


def by_cluster(clusters: Sequence[str], *columns: np.ndarray) -> list[np.ndarray]:
    """Sum columns over utterances of the same call or speaker: those are not independent of each other."""
    _, index = np.unique(np.asarray(clusters), return_inverse=True)
    return [np.bincount(index, weights=column) for column in columns]


def bootstrap(
    clusters: Sequence[str], errors: np.ndarray, lengths: np.ndarray, resamples: int = 2000, seed: int = 0
) -> tuple[float | None, float | None]:
    """95 % interval of sum(errors) / sum(lengths), resampling whole clusters. (None, None) for less than two."""
    errors, lengths = by_cluster(clusters, errors, lengths)
    if len(lengths) < 2 or lengths.sum() == 0:
        return None, None
    result = _resample(errors, lengths, resamples, seed)
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def paired_p_value(
    clusters: Sequence[str], errors: np.ndarray, base_errors: np.ndarray, lengths: np.ndarray,
    resamples: int = 2000, seed: int = 0,
) -> float | None:
    """Two-sided p-value of a difference in rate between two models on the same utterances, by bootstrap."""
    differences, lengths = by_cluster(clusters, errors - base_errors, lengths)
    if len(lengths) < 2 or lengths.sum() == 0:
        return None
    resampled = _resample(differences, lengths, resamples, seed).bootstrap_distribution
    tail = min(np.sum(resampled <= 0), np.sum(resampled >= 0))
    return float(min(1.0, 2 * (tail + 1) / (resamples + 1)))


def _resample(values: np.ndarray, lengths: np.ndarray, resamples: int, seed: int):
    def ratio(values, lengths, axis):
        # A resample without one reference character has no rate; 1e-9 keeps it from dividing by zero.
        return values.sum(axis=axis) / np.maximum(lengths.sum(axis=axis), 1e-9)

    # Percentile intervals are too narrow for few clusters (91 % instead of 95 % at 20). Hesterberg's expanded
    # percentile interval ("What teachers should know about the bootstrap", 2015) widens them like Student's t.
    n = len(values)
    level = 1 - 2 * stats.norm.cdf(stats.t.ppf(0.025, n - 1) * np.sqrt(n / (n - 1)))
    return stats.bootstrap(
        (values, lengths), ratio, paired=True, vectorized=True, method="percentile", confidence_level=level,
        n_resamples=resamples, batch=max(1, 5_000_000 // n), rng=np.random.default_rng(seed),
    )


def has_loop(reference: str, hypothesis: str) -> bool:
    """Whether a hypothesis repeats itself in a way its reference does not: the LLM's repetition loop."""
    return LOOP.search(characters(hypothesis)) is not None and LOOP.search(characters(reference)) is None


def conditions(row: dict[str, Any]) -> dict[str, str]:
    """What is known of an utterance, as condition -> value: codecs, SNR, loss, duration, speaker, corpus."""
    values: dict[str, Any] = {"duration": row["seconds"], "speaker": row.get("speaker"), "corpus": row.get("corpus")}
    if channel := row.get("condition"):  # the plan that telephone/channel.py drew; recorded calls have none
        for name, hop in (("codec", "hop1"), ("second codec", "hop2"), ("recorder", "recorder")):
            values[name] = channel.get(hop, {}).get("codec", "none")
        values["snr"] = channel.get("noise", {}).get("snr_db", "no noise")
        values["loss"] = channel.get("packet_loss", {}).get("percent", 0.0)
    return {
        name: _interval(value, *EDGES[name]) if name in EDGES and value != "no noise" else str(value)
        for name, value in values.items() if value is not None
    }


def _interval(value: float, unit: str, edges: tuple[float, ...]) -> str:
    above = [edge for edge in edges if value >= edge]
    below = [edge for edge in edges if value < edge]
    if above and below:
        return f"{above[-1]:g} to {below[0]:g} {unit}"
    return f"under {below[0]:g} {unit}" if below else f"{above[-1]:g} {unit} and more"
