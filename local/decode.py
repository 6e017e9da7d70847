"""Decode test sets with several checkpoints of one model, greedily and in batches; killed, it goes on where it was.

    python local/decode.py --model_dir exp_output/model --checkpoint base= --checkpoint final=final.pt \
        --test_set real_test=real_8k_telephone/test_formatted.jsonl --output_dir exp_output/eval/transcripts

Writes OUTPUT_DIR/<model>.<test_set>.jsonl with rows {"key", "hyp", "ref", "seconds", "model", "test_set",
"condition", "speaker", "call", "corpus", "audio"}, beside <model>.<test_set>.run.json that says how. An empty PATH
is the folder's own model.pt. Transcripts whose checkpoint, test set and settings are unchanged are kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from common import UserError, file_hash, progress, read_jsonl, run, write_json, write_jsonl

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_dir", required=True, help="Model folder: configuration, tokenizer, weights.")
    parser.add_argument("--checkpoint", required=True, action="append", metavar="NAME=PATH",
                        help="A checkpoint and the name to report it under; repeat it. NAME= is the folder's own.")
    parser.add_argument("--test_set", required=True, action="append", metavar="NAME=FORMATTED.jsonl",
                        help="A test set as stage 0 writes it, and its name; repeat it.")
    parser.add_argument("--output_dir", required=True, help="Where the transcripts go.")
    parser.add_argument("--conf", default="conf/decode.yaml", help="Settings. Default: %(default)s.")
    parser.add_argument("--frontend_fs", type=int, default=16000, help="Rate trained with, Hz. Default: %(default)s.")
    return parser.parse_args()


def named(pairs: list[str], what: str) -> dict[str, str]:
    """Split NAME=VALUE arguments; names become file names, with a dot between model and test set."""
    result: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not NAME.fullmatch(name) or name in result:
            raise UserError(f"{what} {pair!r}: want NAME=VALUE, each name once, of letters, digits, . _ -", code=2)
        result[name] = value
    return result


def transcript(row: dict[str, Any], hypothesis: str, model: str, test_set: str) -> dict[str, Any]:
    """One row of the output for a formatted row and what the model heard."""
    from nano.inference import parse_row

    reference = next((m["content"] for m in row["messages"] if m["role"] == "assistant"), "")
    return {
        "key": row["key"], "hyp": hypothesis, "ref": reference, "seconds": row["speech_length"] / 100,
        "model": model, "test_set": test_set, "condition": row.get("channel"), "speaker": row.get("speaker"),
        "call": row.get("call"), "corpus": row.get("corpus"), "audio": parse_row(row)[2],
    }


class PartFile:
    """Finished rows of an unfinished output, appended as they come; a torn last line is cut off on opening."""

    def __init__(self, path: Path, fingerprint: str):
        self.rows: dict[str, dict[str, Any]] = {}
        whole = 0
        if path.is_file():
            with open(path, "rb") as file:
                lines = file.read().splitlines(keepends=True)
            if lines and lines[0] == self._header(fingerprint):
                whole = len(lines[0])
                for line in lines[1:]:
                    if not line.endswith(b"\n"):
                        break
                    row = json.loads(line)
                    self.rows[row["key"]] = row
                    whole += len(line)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "r+b" if whole else "wb")  # noqa: SIM115 -- closed by close()
        self.file.truncate(whole)
        self.file.seek(whole)
        if not whole:
            self.file.write(self._header(fingerprint))

    def append(self, row: dict[str, Any]) -> None:
        self.rows[row["key"]] = row
        self.file.write((json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8"))
        self.file.flush()

    def close(self) -> None:
        self.file.close()

    @staticmethod
    def _header(fingerprint: str) -> bytes:
        return (json.dumps({"fingerprint": fingerprint}) + "\n").encode("utf-8")


def decode(recogniser, rows: list[dict[str, Any]], part: PartFile, settings: dict[str, Any]) -> Iterator[str]:
    """Decode the rows that `part` lacks and append them to it; yield each key, those found there included."""
    from nano.inference import batches

    conf = settings["conf"]
    for batch in batches(rows, conf["batch_size"], conf["batch_seconds"]):
        # A batch is decoded whole even when some of it is there: its padding must be that of an uninterrupted run.
        if any(row["key"] not in part.rows for row in batch):
            texts = recogniser.transcribe(batch, conf["max_new_tokens"], conf["max_tokens_per_second"])
            for row, text in zip(batch, texts, strict=True):
                if row["key"] not in part.rows:
                    part.append(transcript(row, text, settings["model"], settings["test_set"]))
        yield from (row["key"] for row in batch)


def is_current(output: Path, fingerprint: str) -> bool:
    """Whether a transcript is there and was made of the same weights, data and settings."""
    meta = output.with_suffix(".run.json")
    return output.is_file() and meta.is_file() and json.loads(meta.read_text("utf-8"))["fingerprint"] == fingerprint


def read_conf(path: str) -> dict[str, Any]:
    """The settings that decide what a transcript says."""
    names = ("device", "dtype", "batch_size", "batch_seconds", "max_new_tokens", "max_tokens_per_second")
    try:
        with open(path, encoding="utf-8") as file:
            conf = yaml.safe_load(file)
        return {name: conf[name] for name in names}
    except (OSError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UserError(f"{path}: {error}; want a YAML file with {', '.join(names)}", code=2) from error


def decode_test_set(
    recogniser, rows: list[dict[str, Any]], output: Path, settings: dict[str, Any], fingerprint: str
) -> None:
    """Decode one test set with the weights loaded and write transcripts and run record, in this order."""
    started, part = time.monotonic(), PartFile(output.with_suffix(".part"), fingerprint)
    title = f"{settings['model']} {settings['test_set']}"
    for _ in progress(decode(recogniser, rows, part, settings), len(rows), title):
        pass
    part.close()
    write_jsonl(output, (part.rows[row["key"]] for row in rows))
    write_json(output.with_suffix(".run.json"), {
        "fingerprint": fingerprint, **settings, "device": recogniser.device, "dtype": recogniser.dtype,
        "utterances": len(rows), "audio_seconds": round(sum(row["speech_length"] for row in rows) / 100, 1),
        "wall_seconds": round(time.monotonic() - started, 1), "command": shlex.join(["python", *sys.argv]),
    })
    output.with_suffix(".part").unlink()
    logging.info("%s: %d utterances", output, len(rows))


def main() -> None:
    args = get_args()
    checkpoints, test_sets = named(args.checkpoint, "--checkpoint"), named(args.test_set, "--test_set")
    conf, sets, recogniser = read_conf(args.conf), {}, None
    config = os.path.join(args.model_dir, "config.yaml")
    if not os.path.isfile(config):
        raise UserError(f"--model_dir {args.model_dir} is not a model folder: no config.yaml; see stage -1", code=2)
    for name, path in test_sets.items():
        sets[name] = list(read_jsonl(path))
        if not sets[name]:
            raise UserError(f"{path} has no rows; run stage 0 again")
        if len({row["key"] for row in sets[name]}) < len(sets[name]):
            raise UserError(f"{path}: a key occurs twice; keys name the rows of a transcript")
    for model, path in checkpoints.items():
        checkpoints[model] = path or os.path.join(args.model_dir, "model.pt")
        if not os.path.isfile(checkpoints[model]):
            raise UserError(f"--checkpoint {model}: {path} does not exist; run the stage that writes it", code=2)
    for model, path in checkpoints.items():
        weights_hash, loaded = file_hash(path), False
        for test_set, rows in sets.items():
            settings = {
                "model": model, "test_set": test_set, "checkpoint": path, "checkpoint_hash": weights_hash,
                "data_hash": file_hash(test_sets[test_set]), "frontend_fs": args.frontend_fs, "conf": conf,
                "config_hash": file_hash(config),
            }
            fingerprint = hashlib.sha256(json.dumps({**settings, "checkpoint": ""}).encode()).hexdigest()[:16]
            output = Path(args.output_dir) / f"{model}.{test_set}.jsonl"
            if is_current(output, fingerprint):
                logging.info("%s: up to date, %d utterances", output, len(rows))
                continue
            if recogniser is None:
                from nano.inference import Recogniser

                recogniser = Recogniser(args.model_dir, conf["device"], conf["dtype"], args.frontend_fs)
            if not loaded:
                recogniser.load(path)
                loaded = True
            decode_test_set(recogniser, rows, output, settings, fingerprint)


if __name__ == "__main__":
    run(main)
