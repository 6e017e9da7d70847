"""Error rates of transcripts: one normalisation for both sides, CER, mixed WER, keywords, bootstrap.

    counts = count(["逾期了吗"], ["预期了吗"])
    rate(counts.errors, counts.lengths)   # 0.25

Alignments are jiwer's, intervals scipy's. Every function takes normalised text unless it says raw.
"""

import bisect
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jiwer
import numpy as np
from scipy import stats

from common import UserError, read_lines

# Scripts written without spaces: Han with its extensions, kana. One character is one word.
CJK = "\u3005\u3007\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
WORD = re.compile(rf"[{CJK}]|[^\s{CJK}]+")
MARKUP = re.compile(r"<\|[^|<>]*\|>")
UNSEEN = re.compile("[\ufe00-\ufe0f\u20e3\U000e0100-\U000e01ef]")  # variation selectors of emoji and Han, key caps
SPACE_AT_CJK = re.compile(rf"(?<=[{CJK}])\s+|\s+(?=[{CJK}])")
DIGITS = str.maketrans("0123456789", "零一二三四五六七八九")
# Under it an interval of 95 % holds the rate in 47 % (of two groups), 73 % (three) or 86 % (four) of cases.
MIN_GROUPS = 5
# A stretch of up to 12 characters five times in a row.
LOOP = re.compile(r"(.{1,12}?)\1{4}")
# Bounds between the groups that error rates are broken down by.
EDGES = {
    "snr": ("dB", (5, 10, 15, 20, 30)), "loss": ("%", (0.1, 1, 3, 5)), "duration": ("seconds", (2, 5, 10, 30)),
}


def normalise(raw: str, chinese_numerals: bool = False) -> str:
    """Make raw text comparable: NFKC, lower case, no markup, no punctuation, spaces only between Latin words.

    A per-cent sign and the point inside a number carry meaning and stay. `chinese_numerals` writes Arabic
    numbers in Chinese with FunASR's own text normaliser.
    """
    text = unicodedata.normalize("NFKC", UNSEEN.sub("", MARKUP.sub(" ", raw))).lower()
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)  # 1,000 is one word, and so is don't
    if chinese_numerals:
        from funasr.models.fun_asr_nano.tools.cn_tn import normalize_nsw  # imports all of funasr

        # The zeros an order number begins with are said; FunASR keeps one of them or none.
        text = normalize_nsw(re.sub(r"(?<![\d.:/-])00\d*", lambda number: number[0].translate(DIGITS), text))
    text = re.sub(r"(?<=[a-z])['’](?=[a-z])", "", text)
    kept = (" " if unicodedata.category(letter)[0] in "PSCZ" and letter not in "%." else letter for letter in text)
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", " ", "".join(kept))
    return SPACE_AT_CJK.sub("", " ".join(text.split()))


def characters(text: str) -> str:
    """The characters that CER compares: all but spaces."""
    return text.replace(" ", "")


def words(text: str) -> list[str]:
    """The words that WER compares: a CJK character or a run of anything else without spaces."""
    return WORD.findall(text)


class Counts(NamedTuple):
    """Edit operations and reference length per utterance, and how often each (reference, hypothesis) was confused."""

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
    table, confusions = np.zeros((len(references), 4), dtype=np.int64), Counter()
    for row, chunks in enumerate(align(references, hypotheses, unit)):
        for kind, old, new in chunks:
            table[row, 3] += len(old)
            if kind != "equal":
                table[row, ("substitute", "delete", "insert").index(kind)] += max(len(old), len(new))
                confusions.update(zip(old or [""] * len(new), new or [""] * len(old), strict=True))
    return Counts(*table.T, confusions)


def align(
    references: Sequence[str], hypotheses: Sequence[str], unit: str = "character"
) -> Iterator[list[tuple[str, list[str], list[str]]]]:
    """Per pair of texts, the chunks (equal, substitute, delete or insert; units of reference; of hypothesis)."""
    split = words if unit == "word" else characters
    # jiwer splits at spaces, so characters go in as words of one character.
    output = jiwer.process_words(*([" ".join(split(text)) for text in side] for side in (references, hypotheses)))
    for old, new, chunks in zip(output.references, output.hypotheses, output.alignments, strict=True):
        yield [(chunk.type, old[chunk.ref_start_idx : chunk.ref_end_idx], new[chunk.hyp_start_idx : chunk.hyp_end_idx])
               for chunk in chunks]


def rate(errors: np.ndarray, lengths: np.ndarray) -> float | None:
    """Errors over reference length of a whole set, or another such share; None when there is nothing to recognise."""
    total = int(np.sum(lengths))
    return float(np.sum(errors)) / total if total else None


def within(rate: float, base: float, allowed: float) -> bool:
    """Whether a rate is above the base's by at most `allowed`; in binary 0.05 - 0.04 is a little over 0.01."""
    return rate <= base + allowed + 1e-12


def read_keywords(path: str | os.PathLike, chinese_numerals: bool = False) -> dict[str, re.Pattern]:
    """Read a keyword list: one a line, other spellings after `|`, `#` starts a comment; lines of one keyword are one.

    Returns, by the first spelling, a pattern that finds any of its spellings in text normalised with the same
    `chinese_numerals`.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist; give a keyword list with --keywords", code=2)
    names: dict[str, str] = {}
    found: dict[str, set[str]] = {}
    for line in read_lines(path):
        line = line.replace("＃", "#").replace("｜", "|")
        spellings = [part.strip() for part in line.split("#")[0].split("|") if normalise(part)]
        if spellings:
            normalised = [normalise(part, chinese_numerals) for part in spellings]
            found.setdefault(names.setdefault(normalised[0], spellings[0]), set()).update(normalised)
    longest_first = {name: sorted(parts, key=lambda part: (-len(part), part)) for name, parts in found.items()}
    return {name: re.compile("|".join(map(_spelling, parts))) for name, parts in longest_first.items()}


def _spelling(word: str) -> str:
    # Latin letters and digits must not be the end of a longer word, or the beginning: app in happy, 2期 in 12期.
    before, after = ("" if re.match(f"[{CJK}]", letter) else rf"[^\W{CJK}]" for letter in (word[0], word[-1]))
    return (before and f"(?<!{before})") + re.escape(word) + (after and f"(?!{after})")


def keyword_counts(texts: Sequence[str], keywords: dict[str, re.Pattern]) -> np.ndarray:
    """Occurrences, one row per text and one column per keyword; each keyword is counted on its own."""
    found = [[len(pattern.findall(text)) for pattern in keywords.values()] for text in texts]
    return np.array(found, dtype=np.int64).reshape(len(texts), len(keywords))


def keyword_rates(wanted: np.ndarray, heard: np.ndarray, found: np.ndarray) -> dict[str, float | None]:
    """Recall, precision and F1 of keywords that were found, of those in references and hypotheses."""
    return {"keyword_recall": rate(found, wanted), "keyword_precision": rate(found, heard),
            "keyword_f1": rate(2 * found, wanted + heard)}


def bootstrap(
    clusters: Sequence[Any], errors: np.ndarray, lengths: np.ndarray, resamples: int = 2000
) -> tuple[float | None, float | None]:
    """95 % interval of sum(errors) / sum(lengths), resampling whole clusters; (None, None) for under MIN_GROUPS."""
    result = _resample(clusters, errors, lengths, resamples)
    return tuple(map(float, result.confidence_interval)) if result else (None, None)


def paired_p_value(
    clusters: Sequence[Any], errors: np.ndarray, base_errors: np.ndarray, lengths: np.ndarray, resamples: int = 2000
) -> float | None:
    """Two-sided p-value of a difference in rate between two models on the same utterances, by bootstrap.

    It is below 0.05 where 0 is outside the interval that `bootstrap` gives of the difference: widened alike. None for
    under MIN_GROUPS clusters.
    """
    result = _resample(clusters, errors - base_errors, lengths, resamples)
    if result is None:
        return None
    drawn, n = result.bootstrap_distribution, len(set(clusters))
    tail = min(0.5, (min(np.sum(drawn <= 0), np.sum(drawn >= 0)) + 1) / (resamples + 1))
    return float(2 * stats.t.cdf(stats.norm.ppf(tail) * np.sqrt((n - 1) / n), n - 1))


def _resample(clusters: Sequence[Any], values: np.ndarray, lengths: np.ndarray, resamples: int):
    # Utterances of the same call or speaker are not independent of each other: the sums over them are drawn.
    _, cluster = np.unique(np.asarray(clusters), return_inverse=True)
    values, lengths = np.bincount(cluster, weights=values), np.bincount(cluster, weights=lengths)
    n = len(values)
    if n < MIN_GROUPS or lengths.sum() == 0:
        return None

    def ratio(values, lengths, axis):
        # A resample without one reference character has no rate; 1e-9 keeps it from dividing by zero.
        return values.sum(axis=axis) / np.maximum(lengths.sum(axis=axis), 1e-9)

    # Percentile intervals are too narrow for few clusters (91 % instead of 95 % at 20). Hesterberg's expanded
    # percentile interval ("What teachers should know about the bootstrap", 2015) widens them like Student's t.
    level = 1 - 2 * stats.norm.cdf(stats.t.ppf(0.025, n - 1) * np.sqrt(n / (n - 1)))
    return stats.bootstrap(
        (values, lengths), ratio, paired=True, vectorized=True, method="percentile", confidence_level=level,
        n_resamples=resamples, batch=max(1, 5_000_000 // n), rng=np.random.default_rng(0),
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
    return {name: _interval(name, value) for name, value in values.items() if value is not None}


def _interval(name: str, value: Any) -> str:
    if name not in EDGES or value == "no noise":
        return str(value)
    unit, edges = EDGES[name]
    place = bisect.bisect(edges, value)
    if 0 < place < len(edges):
        return f"{edges[place - 1]:g} to {edges[place]:g} {unit}"
    return f"{edges[-1]:g} {unit} and more" if place else f"under {edges[0]:g} {unit}"
