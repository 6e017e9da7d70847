"""Stage 0 around the simulator: filter a corpus, split dev from test, write FunASR-Nano rows, validate them.

    python local/prepare_training_data.py filter --input corpus.jsonl --output work/raw_train.jsonl --split train
    python local/prepare_training_data.py split --input work/raw_dev.jsonl --dev dev.jsonl --test test.jsonl
    python local/prepare_training_data.py convert --input work/real_train.jsonl --output train_formatted.jsonl \
        --output_audio_dir audio_upsampled --do_upsample --tokenizer MODEL_DIR/Qwen3-0.6B
    python local/prepare_training_data.py validate --input train_formatted.jsonl dev_formatted.jsonl

Every row that goes in comes out in the output or, with a reason code, in rejected_<output's stem>.jsonl beside it.
"""

import argparse
import functools
import heapq
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import audio
import corpus
from common import NO_SPEECH, UserError, atomic_write, batches, between, file_hash, parallel, progress, run, write_jsonl
from corpus_filter import filter_corpus
from stage0_report import stats, validate
from telephone.resample import resample

# What tells of the style: nearly every text that is "written" has it, hardly any "spoken" one.
WRITTEN, NOT_SPOKEN = re.compile("[0-9，。？！,.?!]"), re.compile("[0-9]")
PROMPTS = {"written": "语音转写：", "spoken": "语音转写，不进行文本规整："}


def split(args: argparse.Namespace) -> None:
    """Cut a dev set in two halves that share no call, no speaker and no recording."""
    corpus.refuse_to_replace(args.input, args.dev, args.test)
    rows = list(corpus.filtered_rows(args.input))
    groups = corpus.group_rows(rows, ("call", "speaker")) if rows else []
    if len(groups) < 2:
        raise UserError(f"{args.input}: all rows hang together by call or speaker; give a test set of its own")
    halves: tuple[list[int], list[int]] = ([], [])
    # The largest first, each to the smaller half; ties by a hash, so that no order of the file matters.
    for group in sorted(groups, key=lambda group: (-len(group), min(corpus.hash_share(rows[i]["key"]) for i in group))):
        min(halves, key=len).extend(group)
    for path, half in zip((args.dev, args.test), halves, strict=True):
        write_jsonl(path, (rows[i] for i in sorted(half)))
    logging.info("%s: %d rows in, %d dev, %d test, %d groups", args.input, len(rows), *map(len, halves), len(groups))
    if 4 * len(halves[1]) < len(rows):
        largest = [rows[i] for i in max(groups, key=len)]
        shared = Counter(row[name] for name in ("speaker", "call", "source") for row in largest if row.get(name))
        name, count = shared.most_common(1)[0]
        logging.warning("test has %d of %d rows, as %d hang together, %d of them by %s; give a test set of its own",
                        len(halves[1]), len(rows), len(largest), count, name)  # fmt: skip


def sample(args: argparse.Namespace) -> None:
    """Write some rows of a corpus, bad ones too, chosen by a hash, calls in turn: a trial of what the whole will do."""
    corpus.refuse_to_replace(args.input, args.output)
    entries = progress(corpus.read_rows(args.input), corpus.count_rows(args.input), "sample")
    pool = heapq.nsmallest(100 * args.rows, entries, key=lambda entry: corpus.hash_share(str(entry.given)))
    taken: Counter[str] = Counter()
    turns = []  # a second row of a call comes after the first of every other: `split` needs two of them
    for entry in pool:
        given = entry.row or (entry.given if isinstance(entry.given, dict) else {})
        call = str(given.get("call") or given.get("speaker") or given.get("source"))
        turns.append(taken[call])
        taken[call] += 1
    with atomic_write(args.output) as file:
        for number in sorted(range(len(pool)), key=turns.__getitem__)[: args.rows]:
            given = pool[number].row or pool[number].given
            file.write((given if isinstance(given, str) else json.dumps(given, ensure_ascii=False)) + "\n")


def convert(args: argparse.Namespace) -> None:
    """Write formatted rows, and the audio of those that training cannot read in place."""
    folder = Path(args.output_audio_dir or Path(args.output).parent / "audio")
    # Train and dev of one corpus share the folder, and a stranger's keys may repeat between them.
    folder /= Path(args.output).stem.removesuffix("_formatted")
    corpus.claim(folder, args.output)
    for stale in folder.glob(".*.tmp"):
        stale.unlink(missing_ok=True)
    # Audio newer than the marker of a killed run with the same input and settings is finished.
    marker, hashes = folder / ".unfinished", " ".join(map(file_hash, corpus.corpus_files(args.input)))
    fingerprint = f"{hashes} {args.output_fs} {args.do_upsample}"
    if not marker.exists() or marker.read_text() != fingerprint:
        with atomic_write(marker) as file:
            file.write(fingerprint)
    count, silent, of_style = text_lengths(args.tokenizer), 0, 0
    style = NOT_SPOKEN if args.text_style == "spoken" else WRITTEN
    work = functools.partial(format_row, folder=folder, since=marker.stat().st_mtime, args=args)
    work = functools.partial(corpus.on_row, work)
    with corpus.open_ledger(args.output, args.max_reject_ratio, args.input) as ledger:
        done = parallel(work, corpus.unique(corpus.read_rows(args.input)), args.num_workers, args.dask_scheduler)
        for batch in batches(progress(done, corpus.count_rows(args.input), "convert"), 1000):
            texts = [entry.row["messages"][-1]["content"] if entry.row else "" for entry in batch]
            silent += texts.count(NO_SPEECH)
            of_style += sum(style.search(text) is not None for text in texts if text != NO_SPEECH)
            for entry, tokens in zip(batch, count(texts), strict=True):
                ledger.add(entry._replace(row=entry.row and entry.row | {"text_length": tokens}))
    marker.unlink()
    if silent:
        logging.info("%s: %d rows have no text: nobody speaks in them", args.output, silent)
    said = ledger.kept - silent
    if said >= 100 and (of_style < 0.1 * said) == (style is WRITTEN):
        what = "digits or punctuation" if style is WRITTEN else "digits"
        logging.warning("%s: %d of %d texts have %s; does TEXT_STYLE=%s fit, by which the model is asked?",
                        args.output, of_style, said, what, args.text_style)  # fmt: skip


def format_row(row: dict[str, Any], folder: Path, since: float, args: argparse.Namespace) -> dict[str, Any]:
    """Bring one utterance into the form of FunASR-Nano's dataset (in a worker), its audio mono at --output_fs.

    A file that is so already is referred to, others are written; one newer than `since` and its source is kept.
    """
    path, cut, fs = row["source"], corpus.segment(row), args.output_fs
    samples, rate, plain = audio.length(path, **cut)
    if rate < fs and not args.do_upsample:
        raise audio.AudioError("sampling_rate", f"{rate} Hz, {fs} wanted; --do_upsample raises it: {path}")
    # "<|" would end the prompt's audio token, and FunASR finds no token that goes on in another line.
    if not plain or rate != fs or "<|" in path or "\n" in path:
        path = os.path.abspath(folder / audio.file_name(row["key"], f".{args.audio_format}"))
        made = os.path.exists(path) and os.path.getsize(path)  # a power failure leaves empty files
        if not made or os.stat(path).st_mtime < max(since, os.stat(row["source"]).st_mtime):
            x, rate = audio.read(row["source"], **cut)
            audio.write(path, resample(x, rate, fs), fs)
        samples = audio.length(path).samples
    if samples * 40 < fs:  # FunASR makes its window shorter then, and fails where too few bins are left for 80 mels
        raise audio.AudioError("too_short", f"{samples} samples at {fs} Hz are no window of 25 ms")
    messages = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": f"{PROMPTS[args.text_style]}<|startofspeech|>!{path}<|endofspeech|>"},
        {"role": "assistant", "content": row["target"] or NO_SPEECH},
    ]
    lengths = {"speech_length": samples * 100 // fs, "text_length": None}  # counted where the tokenizer is
    carried = {name: row[name] for name in ("channel", *corpus.OPTIONAL) if name in row and name not in cut}
    return {"key": row["key"], "messages": messages} | lengths | carried


def text_lengths(folder: str | None) -> Callable[[list[str]], list[int]]:
    """A function from texts to their lengths in tokens of the tokenizer in `folder`; without one, in characters."""
    if not folder:
        logging.warning("no --tokenizer: text_length counts characters, not the model's tokens")
        return lambda texts: [len(text) for text in texts]
    from tokenizers import Tokenizer  # what transformers wraps, without the seconds that importing it takes

    try:
        tokenizer = Tokenizer.from_file(os.path.join(folder, "tokenizer.json"))
    except Exception as error:  # the library raises nothing more special
        message = f"--tokenizer {folder} is not the LLM's folder, such as MODEL_DIR/Qwen3-0.6B: {error}"
        raise UserError(message, code=2) from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return lambda texts: [len(row.ids) for row in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]


def get_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    shared = argparse.ArgumentParser(add_help=False)
    add = shared.add_argument
    add("--input", required=True, help="JSONL file or Kaldi data directory.")
    add("--output", required=True, help="JSONL of the rows kept; rejects go to rejected_<stem>.jsonl beside it.")
    add("--num_workers", type=int, default=len(os.sched_getaffinity(0)), help="Worker processes.")
    add("--dask_scheduler", help="Run on this Dask cluster (tcp://host:port) instead of local processes.")

    def command(function: Callable, text: str, *parents: argparse.ArgumentParser) -> Callable:
        name = function.__name__.removesuffix("_corpus")
        parser = commands.add_parser(name, help=text, description=text, parents=parents)
        parser.set_defaults(function=function)
        return parser.add_argument

    add = command(filter_corpus, "Drop rows that break a rule of --conf, with the reason.", shared)
    add("--conf", default="conf/data_filter.yaml", help="Rules on text and audio.")
    add("--split", default="train", choices=corpus.SPLITS, help="Only train is cut by the train_only rules.")
    add("--max_reject_ratio", type=between(0, 1), default=0.05,
        help="Exit 1 when a larger share is broken; rules may drop half, or this where it is more.")
    add("--filter_annotation_error", type=str.lower, choices=("true", "false"), default="true",
        help="Whether the rules on text drop rows.")
    add("--max_speech_length", type=int, default=12000, help="Longest, frames of 10 ms. Default: %(default)s, 120 s.")
    add("--max_speech_percentile", type=between(0, 100), help="Fit --max_speech_length to this percentile of --input.")
    add("--against", nargs="*", default=[], help="Other sets, filtered: what shares audio, call or speaker is dropped.")
    add("--against_audio", nargs="*", default=[], help="Sets of other corpora, whose calls and speakers are others.")
    add("--expect_band", choices=("wideband", "telephone"), help="Report rows whose spectrum says otherwise.")

    add = command(convert, "Write rows and audio in the form training reads.", shared)
    add("--output_audio_dir", help="Where audio goes that cannot be used in place (default: audio beside the output).")
    add("--do_upsample", action="store_true", help="Raise audio below --output_fs to it (else rejected).")
    add("--output_fs", type=int, default=16000, choices=(8000, 16000), help="Sampling rate in Hz of every row's audio.")
    add("--audio_format", default="flac", choices=("flac", "wav"), help="FLAC is half as big, WAV is faster.")
    add("--tokenizer", help="Folder of the LLM's tokenizer, which counts text_length.")
    add("--text_style", default="written", choices=tuple(PROMPTS), help="How the corpus is written; picks the prompt.")
    add("--max_reject_ratio", type=between(0, 1), default=0.05, help="Exit 1 when a larger share is rejected.")

    add = command(split, "Cut a dev set in two that share no call and no speaker.")
    add("--input", required=True, help="JSONL of filtered rows.")
    add("--dev", required=True, help="JSONL of the first half.")
    add("--test", required=True, help="JSONL of the second half.")

    add = command(sample, "Write some rows of a corpus, chosen by a hash.")
    add("--input", required=True, help="JSONL file or Kaldi data directory.")
    add("--output", required=True, help="JSONL to write.")
    add("--rows", type=int, default=10, help="How many.")

    add = command(validate, "Check formatted files; exit 1 and ten problems.")
    add("--input", required=True, nargs="+", help="Formatted JSONL; train, dev and test are told by the files' names.")
    add("--check_audio", action="store_true", help="Decode every file, not a sample of 200 beside all headers.")
    add("--fs", type=int, default=16000, help="Sampling rate in Hz that the audio must have.")

    add = command(stats, "Write the completion report of stage 0.")
    add("--data_dir", required=True, help="Folder with <corpus>/<split>_formatted.jsonl; the report is written there.")
    add("--source", nargs="*", default=[], metavar="CORPUS/SPLIT[,SPLIT]=PATH",
        help="Count this input again; exit 1 when a row of it is neither valid nor rejected.")
    add("--estimate", type=float, metavar="SECONDS",
        help="Say what the whole of each --source will take: of --data_dir, a sample, simulating train took SECONDS.")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = get_args(argv)
    args.function(args)


if __name__ == "__main__":
    run(main)
