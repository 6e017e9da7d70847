"""One pass over a corpus: workers in order, rows kept and rows rejected written side by side.

    with open_ledger("train.jsonl", max_reject_ratio=0.05) as ledger:
        for row, problem in parallel(work, rows, num_workers=8):
            ledger.reject(row, *problem) if problem else ledger.keep(row)

Every row goes to one side, so in = out + rejected; the output appears only when enough rows were kept.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import os
import site
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


@contextlib.contextmanager
def open_ledger(output: str | os.PathLike, max_reject_ratio: float) -> Iterator[Ledger]:
    """Open `output` and rejected_<its stem>.jsonl beside it; both appear when the block ends.

    UserError, and no output, when there are no rows or more than `max_reject_ratio` of them were rejected.
    """
    output = Path(output)
    rejects = output.with_name(f"rejected_{output.stem}.jsonl")
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
        if not ledger.kept or bad > max_reject_ratio * total:
            output.unlink(missing_ok=True)  # an older output beside new rejects would look finished
            raise UserError(
                f"{output}: only {ledger.kept} of {total} rows were kept (rejected: {reasons}; --max_reject_ratio is "
                f"{max_reject_ratio}); see {rejects}, then mend the data or raise the limit"
            )


def parallel(
    function: Callable, items: Iterable, num_workers: int, dask_scheduler: str | None = None, batch_size: int = 16
) -> Iterator:
    """Yield function(item) for each item, in order, from worker processes; only some items are read ahead.

    `batch_size` items go to a worker at a time; 1 where an item is much work.

    UserError for a worker that the system killed, or a Dask scheduler (tcp://host:port) that does not answer.
    """
    if num_workers <= 1 and not dask_scheduler:
        yield from map(function, items)
        return
    import joblib
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    with _dask(dask_scheduler) if dask_scheduler else contextlib.nullcontext(num_workers) as workers:
        # Neighbours go to one worker, which decodes a long call once for all its segments.
        job = joblib.Parallel(workers, return_as="generator", batch_size=batch_size, pre_dispatch="64*n_jobs")
        try:
            yield from job(joblib.delayed(function)(item) for item in items)
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
    with client, joblib.parallel_config(backend="dask"):
        # The cluster must see this folder and the output's. The scheduler unpickles tasks too: without the path
        # it fails in silence, and joblib waits for ever.
        client.run_on_scheduler(site.addsitedir, folder)
        client.register_worker_callbacks(functools.partial(site.addsitedir, folder))
        yield max(1, sum(client.nthreads().values()))
