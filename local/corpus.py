"""Read a corpus as people keep it (JSONL or a Kaldi data directory) into rows, and lose none of them.

    with open_ledger("train.jsonl", 0.05, "corpus/train.jsonl") as ledger:
        for entry in read_rows("corpus/train.jsonl"):   # or a folder with wav.scp and text
            ledger.add(entry)  # either a row, whose fields have the right types and whose `source` is absolute, or none

Every line becomes one entry, and every entry goes to one side, so in = out + rejected.
"""

import contextlib
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

import audio
from common import UserError, atomic_write, first_line, read_jsonl

SPLITS = ("train", "dev", "test")
OPTIONAL = ("raw_target", "speaker", "call", "language", "corpus", "band", "offered", "wideband_source")
FIELDS = ("key", "source", "target", *OPTIONAL, "channel", "start", "end")
# Why a row is none, where no rule of conf/data_filter.yaml drops it.
BROKEN = {"bad_json", "missing_field", "bad_field", "bad_segment", "source_is_command", "channel_missing",
          "audio_missing", "audio_unreadable", "audio_empty", "audio_not_finite"}  # fmt: skip
SIDES = {"A": 0, "1": 0, "B": 1, "2": 1}  # of reco2file_and_channel
SPEECH = re.compile(r"(.*)<\|startofspeech\|>!(.*)<\|endofspeech\|>", re.DOTALL)  # of a user, in a formatted row
MAX_DEPTH = 100  # brackets within brackets: far below what workers and writers of JSON can take


class Entry(NamedTuple):
    """One utterance of the input: what was given, and either the checked row or the reason it is none."""

    given: Any
    row: dict[str, Any] | None
    reason: str = ""
    detail: str = ""


def read_rows(path: str | os.PathLike) -> Iterator[Entry]:
    """Yield every utterance of a JSONL file or a Kaldi data directory, in order; UserError for another path."""
    first = corpus_files(path)[0]
    return _read_jsonl(first) if os.path.isfile(path) else _read_kaldi(first)


def filtered_rows(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """Yield the rows that `filter` wrote; UserError for others."""
    for row in read_jsonl(path):
        if not isinstance(row.get("audio_hash"), str) or check_row(row, Path()).reason:
            raise UserError(f"{path} has rows without audio_hash, or worse ones; give it to `filter` first", code=2)
        yield row


def corpus_files(path: str | os.PathLike) -> list[Path]:
    """The files a corpus is in, first the one with a line for each utterance; UserError for another path."""
    folder = Path(path)
    if folder.is_file():
        return [folder]
    if not (folder / "wav.scp").is_file() or not (folder / "text").is_file():
        raise UserError(f"{path} is neither a JSONL file nor a folder with wav.scp and text", code=2)
    names = ("segments", "wav.scp", "text", "utt2spk", "reco2file_and_channel")
    return [file for name in names if (file := folder / name).is_file()]


def refuse_to_replace(source: str | os.PathLike, *outputs: str | os.PathLike) -> None:
    """UserError, code 2, where an output would take the place of a file of the corpus that it is made from."""
    files = {file.resolve() for file in corpus_files(source)}
    for output in outputs:
        if Path(output).resolve() in files:
            raise UserError(f"{output} is the input, which would be replaced; give the output another name", code=2)


def claim(folder: Path, output: str | os.PathLike) -> None:
    """Note that a folder holds the audio of the list `output`; UserError, code 2, where it holds that of another."""
    folder = folder.resolve()
    note, owner = folder / ".list", os.path.relpath(Path(output).resolve(), folder)
    if note.is_file() and (other := note.read_text("utf-8")) != owner and (folder / other).exists():
        raise UserError(f"{folder} holds the audio of {os.path.normpath(folder / other)}, which would be replaced; "
                        f"give {output} another --output_audio_dir", code=2)  # fmt: skip
    with atomic_write(note) as file:
        file.write(owner)


def count_rows(path: str | os.PathLike) -> int:
    """How many entries `read_rows` will yield, near enough for a progress bar; lines are counted, not read."""
    with open(corpus_files(path)[0], "rb") as file:
        return sum(bool(line.strip()) for line in file)


def check_row(given: dict[str, Any], base: Path) -> Entry:
    """Check the types of one row's fields and make its source absolute; fields this recipe does not know are left."""
    row = {name: given[name] for name in FIELDS if given.get(name) is not None}
    for name, value in list(row.items()):
        if name in ("start", "end"):
            good, wanted = type(value) in (int, float) and 0 <= value < 1e7, "a time in seconds"
        elif name == "channel":
            good, wanted = isinstance(value, dict) or (type(value) is int and value >= 0), "0, 1, ..."
        else:
            if name != "target" and type(value) is int:
                row[name] = value = str(value)  # ids are often bare numbers in people's JSON
            good, wanted = isinstance(value, str) and (name != "source" or "\0" not in value), "text"
        if not good:
            return Entry(given, None, "bad_field", f"{name} {value!r:.40} is not {wanted}")
        if value == "" and name in OPTIONAL:
            del row[name]
    for name in ("key", "source", "target"):
        if name not in row or (name != "target" and not row[name].strip()):
            there = ", ".join(field for field, value in given.items() if value)
            return Entry(given, None, "missing_field", f"no {name}, only {there or 'empty fields':.100}")
    if row["source"].endswith("|"):
        # A pipe is a shell command from a stranger: it is never run.
        return Entry(given, None, "source_is_command", "the source is a command; write its output to a file first")
    placed = row.get("start", given.get("offset")) is not None and given.get("duration") is not None  # as NeMo does
    if placed and "end" not in row:
        return Entry(given, None, "bad_field", "duration says where the utterance ends, but only `end` is read")
    if row.get("end", math.inf) <= row.get("start", 0.0):
        return Entry(given, None, "bad_segment", f"start {row.get('start', 0.0)} s, end {row['end']} s")
    row["source"] = os.path.abspath(base / row["source"])
    return Entry(given, row)


def parse_row(row: dict[str, Any]) -> dict[str, str]:
    """What a formatted row says, by role; that of the user as "prompt" and "audio", a path."""
    said = {message["role"]: message["content"] for message in row.get("messages", [])}
    match = SPEECH.fullmatch(said.get("user", ""))
    if match is None:
        raise UserError(f"{row.get('key')}: no user message with <|startofspeech|>!PATH<|endofspeech|>; see stage 0")
    return said | {"prompt": match[1], "audio": match[2]}


def segment(row: dict[str, Any]) -> dict[str, Any]:
    """The part of its recording that a row means, as audio.read takes it: channel, start and end where given."""
    # A simulated row's channel is a record of what was done to it, not an index.
    return {name: row[name] for name in ("channel", "start", "end") if isinstance(row.get(name), (int, float))}


def on_row(work: Callable[[dict[str, Any]], dict[str, Any]], entry: Entry) -> Entry:
    """The entry with what `work` makes of its row, or rejected for the AudioError that it raises."""
    try:
        return entry._replace(row=work(entry.row)) if entry.row else entry
    except audio.AudioError as error:
        return Entry(entry.given, None, error.reason, str(error))


def unique(entries: Iterable[Entry]) -> Iterator[Entry]:
    """Reject a repeated key, before any worker would write the same file for it."""
    seen = Seen()
    for entry in entries:
        if entry.row and entry.row["key"] in seen:
            entry = Entry(entry.given, None, "duplicate_key", f"{entry.row['key']!r:.100} was there before")
        elif entry.row:
            seen.add(entry.row["key"])
        yield entry


class Seen:
    """A set of texts by their hashes: eight bytes each where a Python set takes a hundred, for millions of rows."""

    def __init__(self) -> None:
        self.sorted, self.latest = np.empty(0, np.int64), set[int]()

    def __contains__(self, text: str) -> bool:
        wanted = hash(text)
        at = np.searchsorted(self.sorted, wanted)
        return wanted in self.latest or (at < len(self.sorted) and int(self.sorted[at]) == wanted)

    def add(self, text: str) -> None:
        """Add a text that is not there yet."""
        self.latest.add(hash(text))
        if len(self.latest) >= 2000 + len(self.sorted) // 64:
            self.sorted = np.append(self.sorted, np.fromiter(self.latest, np.int64))
            self.sorted.sort()
            self.latest = set()


def _read_jsonl(path: Path) -> Iterator[Entry]:
    base = path.resolve().parent
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            try:
                given = _parse(line)
            except (ValueError, RecursionError) as error:
                shown = line.decode("utf-8", "replace").rstrip("\r\n")
                yield Entry(shown, None, "bad_json", f"line {number}: {first_line(error):.200}")
            else:
                yield check_row(given, base)


def _parse(line: bytes) -> dict[str, Any]:
    """An object that can be written again: no NaN, no half of a surrogate pair, not nested too deep."""
    if line.startswith((b"\x1f\x8b", b"[")):
        raise ValueError(f"{'a JSON array' if line[:1] == b'[' else 'gzip'}, not JSON lines: one object a line")
    given = json.loads(line.decode("utf-8"))
    if not isinstance(given, dict):
        raise ValueError(f"a {type(given).__name__}, not an object")
    if _depth(given) > MAX_DEPTH:
        raise ValueError("nested too deep")
    json.dumps(given, ensure_ascii=False, allow_nan=False).encode()
    return given


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return 1 + max(map(_depth, inner), default=0)


def _kaldi_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (first word, rest) of a Kaldi table; a byte that is no UTF-8 becomes the replacement character."""
    if not path.is_file():
        return
    with open(path, encoding="utf-8-sig", errors="replace", newline="\n") as file:
        for line in file:
            if line.strip():
                head, _, rest = line.strip().replace("\t", " ").partition(" ")
                yield head, rest.strip()


def _kaldi_table(path: Path) -> dict[str, str]:
    table: dict[str, str] = {}
    for head, rest in _kaldi_lines(path):
        if table.setdefault(head, rest) != rest:
            raise UserError(f"{path}: {head} has two lines that differ; leave the right one", code=2)
    return table


def _read_kaldi(utterances: Path) -> Iterator[Entry]:
    folder, segments = utterances.parent, utterances.name == "segments"
    text: dict[str, str] = {}
    for key, words in _kaldi_lines(folder / "text"):
        if key in text:
            given = {"key": key, "target": words}
            yield Entry(given, None, "duplicate_key", "a second line of `text` with this key")
        else:
            text[key] = words
    speakers = _kaldi_table(folder / "utt2spk")
    recordings = _kaldi_table(folder / "wav.scp") if segments else {}
    sides = _kaldi_table(folder / "reco2file_and_channel")
    if any(side.split()[1:] == ["0"] for side in sides.values()):
        raise UserError(f"{folder / 'reco2file_and_channel'}: a side 0; the sides of a call are A and B, or 1 and 2",
                        code=2)  # fmt: skip
    unread = dict.fromkeys(text)
    for key, rest in _kaldi_lines(utterances):
        unread.pop(key, None)
        recording = key
        given: dict[str, Any] = {"key": key, "source": rest, "target": text.get(key), "speaker": speakers.get(key)}
        if segments:
            try:
                recording, start, end, *channel = rest.split()
                given["start"], given["end"] = float(start), float(end)
                if channel:  # Kaldi's extract-segments counts from 0
                    (given["channel"],) = map(int, channel)
                json.dumps(given, allow_nan=False)  # float() reads "nan"
            except ValueError:
                yield Entry({"key": key, "segment": rest}, None, "bad_segment", f"segments: {key} {rest:.100}")
                continue
            if given["end"] == -1:  # to the end of the recording
                del given["end"]
            # The segments of a recording are one call, which dev and test must not share.
            given |= {"source": recordings.get(recording, ""), "call": recording}
            if recording not in recordings:
                yield Entry(given, None, "missing_field", f"recording {recording} is not in wav.scp")
                continue
        if recording in sides:  # the sides of a call, too, are one
            given["call"], _, side = sides[recording].partition(" ")
            given["channel"] = _kaldi_channel(given["source"], side.strip())
        yield check_row(given, Path.cwd())  # Kaldi's relative paths start where the recipe is run
    for key in unread:
        given = {"key": key, "target": text[key]}
        yield Entry(given, None, "missing_field", f"{key} is in `text` and not in the list of audio")


@functools.lru_cache  # the segments of a recording follow each other
def _kaldi_channel(source: str, side: str) -> int | str | None:
    """The channel that a side of reco2file_and_channel is; None where a file of its own holds it already."""
    channel = SIDES.get(side, side)
    with contextlib.suppress(audio.AudioError, OSError):  # who reads it says so
        if channel == 1 and audio.channels(source) == 1:
            return None
    return channel


def group_rows(rows: list[dict[str, Any]], by: Iterable[str]) -> list[list[int]]:
    """Rows that share a value of any field in `by`, or a recording, directly or by way of other rows, are one group."""
    from scipy.sparse import coo_array  # slow to import, and nothing else here needs it
    from scipy.sparse.csgraph import connected_components

    shared = [{name: row.get(name) for name in by} | {"source": row.get("source") and os.path.realpath(row["source"])}
              for row in rows]  # fmt: skip
    values: dict[tuple[str, str], int] = {}
    pairs = [(i, values.setdefault((name, value), len(rows) + len(values)))
             for i, row in enumerate(shared) for name, value in row.items() if value]
    size = len(rows) + len(values)
    graph = coo_array((np.ones(len(pairs)), np.array(pairs, int).reshape(-1, 2).T), (size, size))
    label = connected_components(graph, directed=False)[1]
    order = sorted(range(len(rows)), key=label.__getitem__)
    return [list(group) for _, group in itertools.groupby(order, key=label.__getitem__)]


def hash_share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:6], "big") / 2**48


class Ledger:
    """The two sides of one pass over a corpus: rows kept and rows rejected, with counts by reason."""

    def __init__(self, kept: TextIO, rejected: TextIO):
        self.files = kept, rejected
        self.kept = 0
        self.reasons: Counter[str] = Counter()
        self.first: dict[str, str] = {}  # detail of a reason

    def add(self, entry: Entry) -> None:
        """Write an entry's row, or why it has none: key, reason code, detail and what was given."""
        row, given = entry.row, entry.given
        if row is None:
            key = given.get("key") if isinstance(given, dict) else None
            row = {"key": key, "reason": entry.reason, "detail": entry.detail, "row": given}
            self.reasons[entry.reason] += 1
            self.first.setdefault(entry.reason, entry.detail)
        else:
            self.kept += 1
        self.files[entry.row is None].write(json.dumps(row, ensure_ascii=False) + "\n")


@contextlib.contextmanager
def open_ledger(
    output: str | os.PathLike, max_reject_ratio: float, source: str | os.PathLike | None = None,
    by_rules: float = 0.0, audio_dir: str | os.PathLike | None = None,
) -> Iterator[Ledger]:  # fmt: skip
    """Open `output` and rejected_<its stem>.jsonl beside it; both appear when the block ends.

    UserError, and no output, when there are no rows, or more than `max_reject_ratio` of them were rejected, of which
    those that are not BROKEN may be `by_rules`; code 2 where the output would replace the corpus `source`, or its audio
    that of another list in `audio_dir`.
    """
    output = Path(output)
    rejects = output.with_name(f"rejected_{output.stem}.jsonl")
    if source is not None:
        refuse_to_replace(source, output, rejects)
    if audio_dir is not None:
        claim(Path(audio_dir), output)
    for path in (output, rejects):  # what a killed run left behind
        for stale in path.parent.glob(f".{path.name}.*.tmp"):
            stale.unlink(missing_ok=True)
    with atomic_write(output) as kept:
        with atomic_write(rejects) as rejected:
            ledger = Ledger(kept, rejected)
            yield ledger
        bad = ledger.reasons.total()
        total = ledger.kept + bad
        reasons = ", ".join(f"{reason} {count}" for reason, count in ledger.reasons.most_common()) or "none"
        logging.info("%s: %d rows in, %d out, %d rejected (%s)", output, total, ledger.kept, bad, reasons)
        broken = sum(count for reason, count in ledger.reasons.items() if reason in BROKEN)
        if not ledger.kept or broken > max_reject_ratio * total or bad > max(by_rules, max_reject_ratio) * total:
            output.unlink(missing_ok=True)  # an older output beside new rejects would look finished
            reasons += "".join(f"; first: {ledger.first[reason]}" for reason, _ in ledger.reasons.most_common(1))
            more = f", {by_rules} for what rules drop" if by_rules > max_reject_ratio else ""
            raise UserError(
                f"{output}: only {ledger.kept} of {total} rows were kept (rejected: {reasons}; --max_reject_ratio is "
                f"{max_reject_ratio}{more}); see {rejects}, then mend the data or raise the limit"
            )
