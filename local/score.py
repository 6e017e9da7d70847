"""Score transcripts: CER, WER, keywords and hallucinations per model and test set, with intervals.

    python local/score.py --transcripts exp_output/eval/transcripts --output exp_output/eval/summary.json
    python local/score.py --transcripts eval/dev --output eval/dev_summary.json --choose eval/interpolation.json

Writes the summary (one row per model and test set) and beside it details.json: error rates by codec, SNR, packet
loss, duration, speaker and corpus, every keyword, the most frequent confusions, the worst utterances. Rates are
fractions. With --choose it also picks, among models named alpha_0.25, alpha_0.50 ..., the best mix with the base.
"""

import argparse
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import metrics
from common import UserError, read_jsonl, read_yaml, run, write_json
from corpus import group_rows

FIELDS = {"key", "hyp", "ref", "seconds", "model", "test_set"}  # what a transcript cannot do without


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transcripts", required=True, help="Folder of <model>.<test_set>.jsonl as decode.py writes.")
    parser.add_argument("--output", required=True, help="summary.json to write; details.json goes beside it.")
    parser.add_argument("--models", nargs="+", help="Score these models alone. Default: all that the folder has.")
    parser.add_argument("--keywords", default="conf/keywords.txt", help="List; empty: none. Default: %(default)s.")
    parser.add_argument("--conf", default="conf/decode.yaml", help="Settings. Default: %(default)s.")
    parser.add_argument("--choose", help="File for the choice among models named alpha_*, by the scores of dev sets.")
    parser.add_argument(
        "--max_wideband_loss", type=float, default=0.01,
        help="How much wideband CER of the choice may be above the base's, as a fraction. Default: %(default)s.",
    )
    return parser.parse_args()


class Scored:
    """One model's transcripts of one test set, normalised and counted."""

    def __init__(self, rows: list[dict[str, Any]], keywords: dict[str, re.Pattern], chinese_numerals: bool):
        self.rows, self.keywords, self.keys = rows, list(keywords), [row["key"] for row in rows]
        self.model, self.test_set = rows[0]["model"], rows[0]["test_set"]
        self.references = [metrics.normalise(row["ref"], chinese_numerals) for row in rows]
        self.hypotheses = [metrics.normalise(row["hyp"], chinese_numerals) for row in rows]
        self.characters = metrics.count(self.references, self.hypotheses)
        self.wanted = metrics.keyword_counts(self.references, keywords)
        self.heard = metrics.keyword_counts(self.hypotheses, keywords)
        self.found = np.minimum(self.wanted, self.heard)
        # What shares a call or a speaker, directly or by way of others, is drawn together; else an utterance by itself.
        self.clusters = np.zeros(len(rows), np.int64)
        for number, group in enumerate(group_rows(rows, ("call", "speaker"))):
            self.clusters[group] = number

    def summary(self, base: "Scored | None", resamples: int) -> dict[str, Any]:
        """The row of summary.json. `base` gives the paired p-value; None leaves it out."""
        counts, wanted, found = self.characters, self.wanted.sum(axis=1), self.found.sum(axis=1)
        words = metrics.count(self.references, self.hypotheses, "word")
        low, high = metrics.bootstrap(self.clusters, counts.errors, counts.lengths, resamples)
        kwer_low, kwer_high = metrics.bootstrap(self.clusters, wanted - found, wanted, resamples)
        minutes = np.array([row["seconds"] / 60 for row in self.rows])
        silent = not counts.lengths.any() and minutes.any()
        # Where nobody speaks every character is an insertion, and there are minutes in place of a reference.
        per = minutes if silent else counts.lengths
        written_low, written_high = (
            metrics.bootstrap(self.clusters, counts.errors, minutes, resamples) if silent else (None, None))
        p_value = None
        if base is not None and base.keys == self.keys:
            p_value = metrics.paired_p_value(self.clusters, counts.errors, base.characters.errors, per, resamples)
        return {
            "model": self.model, "test_set": self.test_set, "utterances": len(self.rows),
            "cer": metrics.rate(counts.errors, counts.lengths), "cer_low": low, "cer_high": high,
            "wer": metrics.rate(words.errors, words.lengths), "kwer": metrics.rate(wanted - found, wanted),
            "chars_per_minute": float(counts.errors.sum() / minutes.sum()) if silent else None,
            "chars_per_minute_low": written_low, "chars_per_minute_high": written_high,
            "p_value": p_value, "kwer_low": kwer_low, "kwer_high": kwer_high,
            **metrics.keyword_rates(self.wanted, self.heard, self.found),
            "keyword_occurrences": int(wanted.sum()), "characters": int(counts.lengths.sum()),
            "groups": len(set(self.clusters)),
            **{name: int(getattr(counts, name).sum()) for name in ("substitutions", "deletions", "insertions")},
            "loops": sum(map(metrics.has_loop, self.references, self.hypotheses)),
            "empties": sum(not hyp and bool(ref) for ref, hyp in zip(self.references, self.hypotheses, strict=True)),
        }

    def details(self) -> dict[str, list[dict[str, Any]]]:
        """Its rows of details.json: CER by condition, every keyword that occurs, confusions, worst utterances."""
        groups: dict[tuple[str, str], list[int]] = {}
        for index, row in enumerate(self.rows):
            for item in metrics.conditions(row).items():
                groups.setdefault(item, []).append(index)
        tables: dict[str, list[dict[str, Any]]] = {
            "conditions": [], "keywords": [],
            "confusions": [{"reference": old, "hypothesis": new, "count": count}
                           for (old, new), count in self.characters.confusions.most_common(30)],
            "worst": [self.utterance(index) for index in np.argsort(-self.characters.errors, kind="stable")[:20]
                      if self.characters.errors[index]],
        }
        for (name, value), members in groups.items():
            errors, lengths = self.characters.errors[members], self.characters.lengths[members]
            low, high = metrics.bootstrap(self.clusters[members], errors, lengths, 1000)
            tables["conditions"].append({
                "condition": name, "value": value, "utterances": len(members), "characters": int(lengths.sum()),
                "cer": metrics.rate(errors, lengths), "cer_low": low, "cer_high": high,
            })
        for name, wanted, heard, found in zip(self.keywords, self.wanted.T, self.heard.T, self.found.T, strict=True):
            if wanted.sum() + heard.sum():
                tables["keywords"].append({
                    "keyword": name, "reference": int(wanted.sum()), "hypothesis": int(heard.sum()),
                    "found": int(found.sum()), **metrics.keyword_rates(wanted, heard, found),
                })
        return {table: [{"model": self.model, "test_set": self.test_set, **row} for row in rows]
                for table, rows in tables.items()}

    def utterance(self, index: int) -> dict[str, Any]:
        """One utterance with its errors, aligned: chunks of (kind, of the reference, of the hypothesis)."""
        row, (chunks,) = self.rows[index], metrics.align([self.references[index]], [self.hypotheses[index]])
        return {
            **{name: row.get(name) for name in ("key", "ref", "hyp", "audio")}, "conditions": metrics.conditions(row),
            "errors": int(self.characters.errors[index]), "characters": int(self.characters.lengths[index]),
            "chunks": [(kind, "".join(old), "".join(new)) for kind, old, new in chunks],
        }


def read_transcripts(folder: str, models: list[str] | None = None) -> Iterator[list[dict[str, Any]]]:
    """The rows of every transcript in a folder, or of those by `models`, file by file."""
    paths = sorted(Path(folder).glob("*.jsonl"))
    if not paths:
        raise UserError(f"{folder} has no transcripts (*.jsonl); decode first")
    for path in paths:
        rows = list(read_jsonl(path))
        if not rows:
            raise UserError(f"{path} is empty; decode again")
        if missing := [name for row in rows for name in sorted(FIELDS - row.keys())]:
            raise UserError(f"{path} is no transcript of decode.py: a row has no {missing[0]}", code=2)
        if models is None or rows[0]["model"] in models:
            yield rows


def mean_cer(rows: list[dict[str, Any]], model: str, *test_sets: str) -> float | None:
    """CER of a model, the mean over test sets; None without characters.

    Weighted by characters, a corpus's simulated dev would outvote the calls that the model is for.
    """
    mine = [row["cer"] for row in rows if row["model"] == model and row["test_set"] in test_sets]
    rates = [rate for rate in mine if rate is not None]
    return sum(rates) / len(rates) if rates else None


def choose_alpha(rows: list[dict[str, Any]], max_wideband_loss: float) -> dict[str, Any]:
    """The alpha of lowest telephone CER on dev among those that lose at most `max_wideband_loss` on wideband dev.

    When every alpha loses more, the one that loses least. Returns the choice, the reason, and the whole curve.
    """
    base = mean_cer(rows, "base", "wideband_dev")
    curve = [{
        "model": name, "alpha": float(name.removeprefix("alpha_")),
        "telephone_cer": mean_cer(rows, name, "simulated_dev", "real_dev"),
        "wideband_cer": mean_cer(rows, name, "wideband_dev"),
    } for name in sorted({row["model"] for row in rows}) if name.startswith("alpha_")]
    if base is None or not curve or any(None in point.values() for point in curve):
        raise UserError("--choose needs wideband_dev, and simulated_dev or real_dev, of base and of models alpha_*")
    limit = f"{100 * max_wideband_loss:g} points of wideband CER"
    if allowed := [point for point in curve if metrics.within(point["wideband_cer"], base, max_wideband_loss)]:
        chosen = min(allowed, key=lambda point: point["telephone_cer"])
        reason = f"lowest telephone CER on dev among those that lose at most {limit}"
    else:
        chosen = min(curve, key=lambda point: point["wideband_cer"])
        reason = f"every alpha loses more than {limit}; this one loses least"
    return {**chosen, "reason": reason, "max_wideband_loss": max_wideband_loss, "base_wideband_cer": base,
            "curve": curve}


def print_table(summary: list[dict[str, Any]]) -> None:
    """Print models by test sets, for a person."""
    columns = {"cer": "CER %", "cer_low": "from", "cer_high": "to", "wer": "WER %", "kwer": "KWER %"}
    print(f"{'test set':<16}{'model':<12}{'utts':>7}" + "".join(f"{title:>9}" for title in [*columns.values(), "p"]))
    for row in summary:
        cells = ["-" if row[name] is None else f"{100 * row[name]:.2f}" for name in columns]
        cells.append("-" if row["p_value"] is None else f"{row['p_value']:.3f}")
        if row["chars_per_minute"] is not None:
            rates = [row["chars_per_minute" + end] for end in ("", "_low", "_high")]
            cells = ["-" if rate is None else f"{rate:.1f}" for rate in rates]
            cells.append(" characters a minute where nobody speaks")
        text = "".join(f"{cell:>9}" for cell in cells)
        print(f"{row['test_set']:<16}{row['model']:<12}{row['utterances']:>7}{text}")


def main() -> None:
    args = get_args()
    conf = read_yaml(args.conf)
    chinese_numerals, resamples = conf.get("chinese_numerals"), conf.get("bootstrap_resamples")
    if not isinstance(chinese_numerals, bool) or type(resamples) is not int or resamples < 1:
        raise UserError(f"{args.conf}: chinese_numerals {chinese_numerals!r}, bootstrap_resamples {resamples!r}; want "
                        "true or false, and a whole number from 1", code=2)  # fmt: skip
    keywords = metrics.read_keywords(args.keywords, chinese_numerals) if args.keywords else {}
    scored = [Scored(rows, keywords, chinese_numerals) for rows in read_transcripts(args.transcripts, args.models)]
    if not scored:
        raise UserError(f"--transcripts {args.transcripts} has none of --models {' '.join(args.models)}", code=2)
    # Models in the order of the training, the test set without speech last.
    scored.sort(key=lambda one: (
        one.test_set == "no_speech", one.test_set, one.model != "base", one.model == "final", one.model
    ))
    # Dev chose the model, so a p-value there would flatter it.
    bases = {one.test_set: one for one in scored if one.model == "base" and not one.test_set.endswith("_dev")}
    summary = [one.summary(bases.get(one.test_set) if one.model != "base" else None, resamples) for one in scored]
    tables = [one.details() for one in scored]
    details = {name: [row for table in tables for row in table[name]] for name in tables[0]}
    write_json(Path(args.output).parent / "details.json", details)
    write_json(args.output, summary)
    print_table(summary)
    for one in scored:
        if bases.get(one.test_set, one).keys != one.keys:
            logging.warning("%s: %s has not the rows of base, in their order: no p-value", one.test_set, one.model)
    for test_set, rows in {one.test_set: row for one, row in zip(scored, summary, strict=True)}.items():
        if rows["groups"] < metrics.MIN_GROUPS:
            logging.warning("%s: no intervals and no p-values, for which it takes %d groups that share no call and no "
                            "speaker; here are %d", test_set, metrics.MIN_GROUPS, rows["groups"])  # fmt: skip
    logging.info("%d transcripts scored, %s", len(scored), args.output)
    if args.choose:
        choice = choose_alpha(summary, args.max_wideband_loss)
        write_json(args.choose, choice)
        logging.info("alpha = %g: %s", choice["alpha"], choice["reason"])


if __name__ == "__main__":
    run(main)
