"""One pass over a corpus: workers in order, rows kept and rows rejected written side by side, resume after a kill.

    with open_ledger("train.jsonl", max_reject_ratio=0.05) as ledger:
        for row, problem in parallel(work, read_rows("corpus.jsonl"), num_workers=8):
            ledger.reject(row, *problem) if problem else ledger.keep(row)

Every row goes to one side, so in = out + rejected; the output appears only when enough rows were kept.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, TextIO

from common import UserError, atomic_write


class Ledger:
    """The two sides of one pass over a corpus: rows kept and rows rejected, with counts by reason."""

    def __init__(self, kept: TextIO, rejected: TextIO):
        self.files = kept, rejected
        self.kept = 0
        self.reasons: Counter[str] = Counter()

    @property
    def rejected(self) -> int:
        return sum(self.reasons.values())

    def keep(self, row: dict[str, Any]) -> None:
        """Write a row to the output."""
        self.files[0].write(json.dumps(row, ensure_ascii=False) + "\n")
        self.kept += 1

    def reject(self, given: Any, reason: str, detail: str) -> None:
        """Write a reject row: key, reason code, detail and what was given."""
        key = given.get("key") if isinstance(given, dict) else None
        row = {"key": key, "reason": reason, "detail": detail, "row": given}
        self.files[1].write(json.dumps(row, ensure_ascii=False) + "\n")
        self.reasons[reason] += 1


def rejects_path(output: str | os.PathLike) -> Path:
    """Where the rejects of an output file go: rejected_<its stem>.jsonl beside it."""
    output = Path(output)
    return output.with_name(f"rejected_{output.stem}.jsonl")


@contextlib.contextmanager
def open_ledger(output: str | os.PathLike, max_reject_ratio: float) -> Iterator[Ledger]:
    """Open output and rejects; both appear when the block ends, the output only if enough rows were kept."""
    output, rejects = Path(output), rejects_path(output)
    for path in (output, rejects):  # what a killed run left behind
        for stale in path.parent.glob(f".{path.name}.*.tmp"):
            stale.unlink(missing_ok=True)
    with atomic_write(output) as kept:
        with atomic_write(rejects) as rejected:
            ledger = Ledger(kept, rejected)
            yield ledger
        total = ledger.kept + ledger.rejected
        reasons = ", ".join(f"{reason} {count}" for reason, count in ledger.reasons.most_common()) or "none"
        logging.info("%s: %d rows in, %d out, %d rejected (%s)", output, total, ledger.kept, ledger.rejected, reasons)
        problem = ""
        if not total:
            problem = "the input has no rows"
        elif not ledger.kept:
            problem = f"all {total} rows were rejected ({reasons}); see {rejects}"
        elif ledger.rejected > max_reject_ratio * total:
            problem = (
                f"{ledger.rejected} of {total} rows were rejected ({reasons}), more than --max_reject_ratio "
                f"{max_reject_ratio}; see {rejects}, then mend the data or raise the limit"
            )
        if problem:
            output.unlink(missing_ok=True)  # an older output beside new rejects would look finished
            raise UserError(f"{output}: {problem}")


def parallel(
    function: Callable, items: Iterable, num_workers: int, dask_scheduler: str | None = None
) -> Iterator:
    """Yield function(item) for each item, in order, from worker processes; only some items are read ahead."""
    if num_workers <= 1 and not dask_scheduler:
        yield from map(function, items)
        return
    import joblib
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    with _dask(dask_scheduler) if dask_scheduler else contextlib.nullcontext(num_workers) as workers:
        job = joblib.Parallel(workers, return_as="generator", pre_dispatch="4*n_jobs")
        try:
            # Neighbours go to one worker, which decodes a long call once for all its segments.
            for results in job(joblib.delayed(_each)(function, chunk) for chunk in batches(items, 16)):
                yield from results
        except TerminatedWorkerError as error:
            raise UserError(
                "a worker was killed by the system (out of memory?); finished files are kept: "
                "run the same command again with a smaller --num_workers"
            ) from error


def batches(items: Iterable, size: int) -> Iterator[list]:
    """Cut any iterable into lists of at most `size` items."""
    items = iter(items)
    while batch := list(itertools.islice(items, size)):
        yield batch


def _each(function: Callable, items: list) -> list:
    return [function(item) for item in items]


@contextlib.contextmanager
def _dask(address: str) -> Iterator[int]:
    """Let joblib run on the Dask cluster at `address`; yields how many threads it has."""
    import joblib
    from dask.distributed import Client

    try:
        client = Client(address, timeout=10)
    except (OSError, TimeoutError) as error:
        raise UserError(f"no Dask scheduler at {address}: {error}", code=2) from error
    folder = os.path.dirname(os.path.abspath(__file__))

    def add_to_path() -> None:  # travels by value: this module cannot be imported there yet
        import sys

        if folder not in sys.path:
            sys.path.insert(0, folder)

    with client, joblib.parallel_config(backend="dask"):
        # The cluster must see this folder and the output's. The scheduler unpickles tasks too: without the path
        # it fails in silence, and joblib waits for ever.
        client.run_on_scheduler(add_to_path)
        client.register_worker_callbacks(add_to_path)
        yield max(1, sum(client.nthreads().values()))


class Resume:
    """Which files of a folder a killed run with the same inputs and settings has finished already.

    A marker file is written before the first audio file and removed after the last row: a file is finished
    when it is newer than the marker of a run that had the same fingerprint.
    """

    def __init__(self, folder: str | os.PathLike, fingerprint: str):
        self.marker = Path(folder) / ".unfinished"
        self.marker.parent.mkdir(parents=True, exist_ok=True)
        for stale in self.marker.parent.glob(".*.tmp"):
            stale.unlink(missing_ok=True)
        if not self.marker.exists() or self.marker.read_text() != fingerprint:
            temporary = self.marker.with_name(".unfinished.tmp")
            temporary.write_text(fingerprint)
            os.replace(temporary, self.marker)
        self.since = self.marker.stat().st_mtime

    def finish(self) -> None:
        """Say that every file is there."""
        self.marker.unlink(missing_ok=True)


def is_older(path: str | os.PathLike, since: float) -> bool:
    """Whether a file is missing or was written before `since` (seconds since the epoch)."""
    try:
        return os.stat(path).st_mtime < since
    except FileNotFoundError:
        return True
