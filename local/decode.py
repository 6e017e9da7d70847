"""Decode test sets with several checkpoints of one model, greedily and in batches; killed, it goes on where it was.

    python local/decode.py --model_dir MODEL --checkpoint base= --checkpoint final=final.pt \
        --test_set real_test=real_8k_telephone/test_formatted.jsonl --output_dir exp_output/eval/transcripts

Writes OUTPUT_DIR/<model>.<test_set>.jsonl with rows {"key", "hyp", "ref", "seconds", "model", "test_set",
"condition", "speaker", "call", "corpus", "audio"}, beside <model>.<test_set>.run.json that says how. An empty PATH
is the folder's own model.pt. Transcripts whose checkpoint, test set and settings are unchanged are kept.
"""

import argparse
import hashlib
import json
import logging
import os
import re
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import audio
from common import NO_SPEECH, UserError, file_hash, file_stamp, progress, read_jsonl, run, write_json, write_jsonl
from corpus import parse_row
from nano.inference import Recogniser, Utterance, batches, read_conf

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


def audio_stamp(row: dict[str, Any]) -> list[int]:
    """Size and time of a row's audio. UserError where it is gone: before transcripts go that cannot be made anew."""
    stamp = file_stamp(path := parse_row(row)["audio"])
    if stamp[0] < 0:
        raise UserError(f"{row['key']}: {path} does not exist; run stage 0 with --force true")
    return stamp


def utterance(row: dict[str, Any], frontend_fs: int) -> Utterance:
    """The audio and the prompt of a formatted row."""
    said = parse_row(row)
    try:
        samples, rate = audio.read(said["audio"])
    except audio.AudioError as error:
        raise UserError(f"{row['key']}: {error}; run stage 0 with --force true") from error
    if rate != frontend_fs:
        # FunASR would resample without a word, with another filter than training data had.
        raise UserError(f"{row['key']}: {said['audio']} is at {rate} Hz, the frontend at {frontend_fs} Hz; see stage 0")
    return Utterance(row["key"], samples, said["prompt"], *([said["system"]] if "system" in said else []))


def transcript(row: dict[str, Any], hypothesis: str, model: str, test_set: str) -> dict[str, Any]:
    """One row of the output for a formatted row and what the model heard."""
    said = parse_row(row)
    return {
        "key": row["key"], "hyp": hypothesis, "ref": said.get("assistant", "").replace(NO_SPEECH, ""),
        "seconds": row["speech_length"] / 100, "model": model, "test_set": test_set,
        "condition": row.get("channel"), **{name: row.get(name) for name in ("speaker", "call", "corpus")},
        "audio": said["audio"],
    }


def is_current(output: Path, record: dict[str, Any]) -> bool:
    """Whether a transcript is there and was made of the same weights, data and settings.

    If it was not, what there is of it goes, and the record of the run to come is written.
    """
    path = output.with_suffix(".run.json")
    if path.is_file() and json.loads(path.read_text("utf-8"))["fingerprint"] == record["fingerprint"]:
        return output.is_file()
    output.unlink(missing_ok=True)
    output.with_suffix(".part").unlink(missing_ok=True)
    write_json(path, record)
    return False


def decode_test_set(recogniser: Recogniser, rows: list[dict[str, Any]], output: Path, record: dict[str, Any]) -> None:
    """Decode one test set with the weights loaded, going on from the whole lines of OUTPUT's .part file."""
    part, conf = output.with_suffix(".part"), record["conf"]
    written = part.read_bytes() if part.is_file() else b""
    whole = written[: written.rfind(b"\n") + 1]
    done = {row["key"]: row for row in map(json.loads, whole.splitlines())}
    todo = list(batches(rows, conf["batch_size"], conf["batch_seconds"]))
    with open(part, "wb") as file:
        file.write(whole)
        for batch in progress(todo, len(todo), f"{record['model']} {record['test_set']}, batches"):
            # Decoded whole even when some of it is there: its padding must be that of an uninterrupted run.
            if all(row["key"] in done for row in batch):
                continue
            texts = recogniser.transcribe(
                [utterance(row, recogniser.fs) for row in batch], conf["max_new_tokens"], conf["max_tokens_per_second"])
            for row, text in zip(batch, texts, strict=True):
                done[row["key"]] = transcript(row, text, record["model"], record["test_set"])
                file.write((json.dumps(done[row["key"]], ensure_ascii=False) + "\n").encode())
            file.flush()
    write_jsonl(output, (done[row["key"]] for row in rows))
    part.unlink()
    logging.info("%s: %d utterances", output, len(rows))


def named(pairs: list[str], what: str) -> dict[str, str]:
    """Split NAME=VALUE arguments; names become file names, with a dot between model and test set."""
    result: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not NAME.fullmatch(name) or name in result:
            raise UserError(f"{what} {pair!r}: want NAME=VALUE, each name once, of letters, digits, . _ -", code=2)
        result[name] = value
    return result


def read_test_set(path: str) -> list[dict[str, Any]]:
    rows = list(read_jsonl(path))
    if not rows:
        raise UserError(f"{path} has no rows; see the rejected rows of stage 0")
    if len({row["key"] for row in rows}) < len(rows):
        raise UserError(f"{path}: a key occurs twice; keys name the rows of a transcript")
    return rows


def short_hash(value: Any) -> str:
    """SHA-256 of a JSON value, first 16 hex digits."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def main() -> None:
    args = get_args()
    checkpoints, test_sets = named(args.checkpoint, "--checkpoint"), named(args.test_set, "--test_set")
    conf, model_dir, recogniser = read_conf(args.conf), Path(args.model_dir), None
    if not (model_dir / "config.yaml").is_file():
        raise UserError(f"--model_dir {model_dir} is not a model folder: no config.yaml; see stage -1", code=2)
    checkpoints = {model: path or str(model_dir / "model.pt") for model, path in checkpoints.items()}
    for model, path in checkpoints.items():
        if not os.path.isfile(path):
            raise UserError(f"--checkpoint {model}: {path} does not exist; run the stage that writes it", code=2)
    sets = {name: read_test_set(path) for name, path in test_sets.items()}
    # Of the audio sizes and times: another channel or cut of a call leaves its row as it is.
    hashes = {name: {"data_hash": file_hash(test_sets[name]),
                     "audio_hash": short_hash([audio_stamp(row) for row in rows])}
              for name, rows in sets.items()}  # fmt: skip
    made_with = {
        **{name: version(name) for name in ("funasr", "torch", "transformers")},
        "code_hash": short_hash([file_hash(path) for path in sorted(Path(__file__).parent.glob("nano/*.py"))]),
        "config_hash": file_hash(model_dir / "config.yaml"), "frontend_fs": args.frontend_fs, "conf": conf,
    }
    for model, path in checkpoints.items():
        weights, loaded = file_hash(path), False
        for test_set, rows in sets.items():
            record = {"model": model, "test_set": test_set, "checkpoint_hash": weights, **hashes[test_set], **made_with}
            record |= {"fingerprint": short_hash(record), "checkpoint": path, "utterances": len(rows),
                       "command": shlex.join(["python", *sys.argv])}
            output = Path(args.output_dir) / f"{model}.{test_set}.jsonl"
            if is_current(output, record):
                logging.info("%s: up to date, %d utterances", output, len(rows))
                continue
            recogniser = recogniser or Recogniser(args.model_dir, conf["device"], conf["dtype"], args.frontend_fs)
            if not loaded:
                recogniser.load(path)
                loaded = True
            decode_test_set(recogniser, rows, output, record)


if __name__ == "__main__":
    run(main)
