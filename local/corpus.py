"""Read a corpus as people keep it (JSONL or a Kaldi data directory) into rows, and lose none of them.

    for entry in read_rows("corpus/train.jsonl"):   # or a folder with wav.scp and text
        entry.row                                   # None when entry.reason says why it is no row

Whatever a stranger's file holds, every line becomes one entry: a row whose fields have the right types and
whose `source` is absolute, or a reject with its reason.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common import UserError

TEXT_FIELDS = ("key", "source", "target", "raw_target", "speaker", "call", "language", "corpus", "wideband_source")
MAX_DEPTH = 100  # brackets in one line of JSON beyond which it is read with care
SURROGATE = re.compile("[\ud800-\udfff]")


class Entry(NamedTuple):
    """One utterance of the input: what was given, and either the checked row or the reason it is none."""

    given: Any
    row: dict[str, Any] | None
    reason: str = ""
    detail: str = ""


def read_rows(path: str | os.PathLike) -> Iterator[Entry]:
    """Yield every utterance of a JSONL file or a Kaldi data directory, in order, one at a time."""
    path = Path(path)
    if path.is_dir():
        if not (path / "wav.scp").is_file() or not (path / "text").is_file():
            raise UserError(f"{path} is a folder without wav.scp and text; give a JSONL file or a Kaldi folder", code=2)
        return _read_kaldi(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a JSONL file or a Kaldi data directory", code=2)
    return _read_jsonl(path)


def count_rows(path: str | os.PathLike) -> int:
    """How many entries `read_rows` will yield, near enough for a progress bar; lines are counted, not read."""
    path = Path(path)
    if path.is_dir():
        path /= "segments" if (path / "segments").is_file() else "wav.scp"
    with open(path, "rb") as file:
        return sum(bool(line.strip()) for line in file)


def check_row(given: dict[str, Any], base: Path) -> Entry:
    """Check the types of one row's fields and make its source absolute; fields this recipe does not know are left."""
    row: dict[str, Any] = {}
    for name in TEXT_FIELDS:
        value = given.get(name)
        if name != "target" and isinstance(value, int) and not isinstance(value, bool):
            value = str(value)  # ids are often bare numbers in people's JSON
        if value is None or (value == "" and name in ("speaker", "call", "language", "corpus")):
            continue
        if not isinstance(value, str):
            return Entry(given, None, "bad_field", f"{name} is a {type(value).__name__}, not text")
        row[name] = value
    for name in ("key", "source", "target"):
        if name not in row or (name != "target" and not row[name].strip()):
            return Entry(given, None, "missing_field", f"no {name}")
    if "\0" in row["source"]:
        return Entry(given, None, "bad_field", "a NUL in source")
    channel = given.get("channel")
    if isinstance(channel, dict):
        row["channel"] = channel  # what the simulator did: a record, not an index
    elif channel is not None:
        if isinstance(channel, bool) or not isinstance(channel, int) or channel < 0:
            return Entry(given, None, "bad_field", f"channel {channel!r:.40} is not 0, 1, ...")
        row["channel"] = channel
    for name in ("start", "end"):
        value = given.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e7:
            return Entry(given, None, "bad_field", f"{name} {value!r:.40} is not a time in seconds")
        row[name] = float(value)
    if row.get("end", math.inf) <= row.get("start", 0.0):
        return Entry(given, None, "bad_segment", f"start {row.get('start', 0.0)} s, end {row['end']} s")
    row["source"] = os.path.abspath(base / row["source"])
    return Entry(given, row)


def _read_jsonl(path: Path) -> Iterator[Entry]:
    base = path.resolve().parent
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            shown = line.decode("utf-8", "replace").rstrip("\r\n")
            try:
                given = _parse(line)
            except (ValueError, RecursionError) as error:
                yield Entry(shown, None, "bad_json", f"line {number}: {str(error).splitlines()[0]:.200}")
                continue
            if isinstance(given, dict):
                yield check_row(given, base)
            else:
                yield Entry(shown, None, "bad_json", f"line {number}: a {type(given).__name__}, not an object")


def _parse(line: bytes) -> Any:
    """JSON as the standard has it: no NaN, no half of a surrogate pair, nothing nested beyond writing again."""
    if line.count(b"[") + line.count(b"{") > MAX_DEPTH:
        depth = 0
        for bracket in re.sub(rb'"(?:[^"\\]|\\.)*"', b"", line):
            depth += (bracket in b"[{") - (bracket in b"]}")
            if depth > MAX_DEPTH:
                raise ValueError("nested too deep")
    given = json.loads(line.decode("utf-8"), parse_constant=_no_constant)
    if b"\\u" in line and SURROGATE.search(json.dumps(given, ensure_ascii=False)):
        raise ValueError("half of a surrogate pair")
    return given


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _kaldi_lines(path: Path) -> Iterator[tuple[str, str]]:
    """Yield (first word, rest) of a Kaldi table; a byte that is no UTF-8 becomes the replacement character."""
    with open(path, encoding="utf-8-sig", errors="replace", newline="\n") as file:
        for line in file:
            if line.strip():
                head, _, rest = line.strip().replace("\t", " ").partition(" ")
                yield head, rest.strip()


def _read_kaldi(folder: Path) -> Iterator[Entry]:
    text: dict[str, str] = {}
    repeated: list[tuple[str, str]] = []
    for key, words in _kaldi_lines(folder / "text"):
        if key in text:
            repeated.append((key, words))
        else:
            text[key] = words
    speakers = dict(_kaldi_lines(folder / "utt2spk")) if (folder / "utt2spk").is_file() else {}
    segments = (folder / "segments").is_file()
    recordings = dict(_kaldi_lines(folder / "wav.scp")) if segments else {}
    seen = set()
    for key, rest in _kaldi_lines(folder / ("segments" if segments else "wav.scp")):
        seen.add(key)
        given: dict[str, Any] = {"key": key, "target": text.get(key), "speaker": speakers.get(key)}
        if segments:
            # The segments of a recording are one call, which dev and test must not share.
            fields = rest.split()
            times = _times(fields[1:])
            if times is None:
                yield Entry(f"{key} {rest}", None, "bad_segment", f"segments: {key} {rest:.100}")
                continue
            given |= {"source": recordings.get(fields[0]), "call": fields[0], "start": times[0], "end": times[1]}
        else:
            given["source"] = rest
        given = {name: value for name, value in given.items() if value is not None}
        if given.get("source", "").endswith("|"):
            # A pipe is a shell command from a stranger: it is never run.
            yield Entry(given, None, "source_is_command", "wav.scp holds a command; write its output to a file first")
        else:
            yield check_row(given, Path.cwd())  # Kaldi's relative paths start where the recipe is run
    for key, words in sorted(repeated + [(key, text[key]) for key in text.keys() - seen]):
        given = {"key": key, "target": words}
        if key in seen:
            yield Entry(given, None, "duplicate_key", "a second line of `text` with this key")
        else:
            yield Entry(given, None, "missing_field", f"{key} is in `text` and not in the list of audio")


def _times(fields: list[str]) -> tuple[float, float | None] | None:
    """Start and end of a Kaldi segment (end -1: to the end of the recording); None when they are no times."""
    try:
        start, end = (float(field) for field in fields)
    except ValueError:
        return None
    return start, None if end == -1 else end


def group_rows(rows: list[dict[str, Any]], by: Iterable[str]) -> list[list[int]]:
    """Rows that share a value of any field in `by`, or a recording, directly or by way of other rows, are one group."""
    parent = list(range(len(rows)))

    def find(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[tuple[str, str], int] = {}
    for i, row in enumerate(rows):
        for name in (*by, "source"):
            if row.get(name):
                parent[find(i)] = find(first.setdefault((name, row[name]), i))
    groups: dict[int, list[int]] = {}
    for i in range(len(rows)):
        groups.setdefault(find(i), []).append(i)
    return list(groups.values())


def hash_share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:6], "big") / 2**48
