"""What every helper needs: errors a user can act on, JSON lines, atomic files, progress, workers."""

import argparse
import contextlib
import errno
import functools
import hashlib
import itertools
import json
import logging
import os
import secrets
import signal
import site
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, TextIO

from tqdm import tqdm

# A full disk, no permission to write, a file where a folder should be, or the reverse; others are bugs.
USERS_TO_MEND = {errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR,
                 errno.EISDIR, errno.ENAMETOOLONG}
# The text of a row in which nobody speaks: what the released model writes for silence and noise, and FunASR takes out
# of what was recognised (funasr/models/fun_asr_nano/model.py, 1.4.16). Rows without text it would not train on.
NO_SPEECH = "/sil"
ROOT = Path(__file__).resolve().parent.parent
READ_OPTIONS = """set -euo pipefail
source local/parse_options.sh
parse_options "$@"
check_options
for name in "${OPTIONS[@]}"; do printf '%s=%s\\0' "$name" "${!name}"; done"""


class UserError(Exception):
    """A mistake the user can mend: what is wrong, where, and what to do, in one line.

    `code` is the exit code: 1 when data or a run failed a check, 2 when the command was wrong.
    """

    def __init__(self, message: str, code: int = 1):
        super().__init__(message)
        self.code = code


def run(main: Callable[[], None]) -> None:
    """Run a helper's `main()` with logging set up; a user's mistake ends in one line on stderr and an exit code."""
    line = "%(asctime)s (%(filename)s:%(lineno)d) %(levelname)s: %(message)s"
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format=line, datefmt="%H:%M:%S")
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not ignored, as in the background of a script
        signal.signal(signal.SIGINT, _interrupt)
    try:
        main()
    except UserError as error:
        # PyTorch raises what a loader worker did with the worker's traceback before it, as text.
        message, code = str(error).rpartition("common.UserError: ")[2], error.code
    except OSError as error:
        if error.errno not in USERS_TO_MEND:
            raise
        message, code = f"{error.strerror}: {error.filename or 'output'}; free space or choose another EXP_OUTPUT", 1
    except KeyboardInterrupt:
        message, code = "interrupted; the same command goes on, without --force if it had that", 130
    else:
        return
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _interrupt(*_signal: Any) -> None:
    """Ctrl-C: the threads that end with it show no tracebacks of their own; once more ends the process at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.excepthook = lambda _failed: None
    raise KeyboardInterrupt


def first_line(error: Exception) -> str:
    """What a library's exception says, in its first line; its name where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def read_yaml(path: str | os.PathLike) -> dict[Any, Any]:
    """Keys and values of a YAML file. UserError, code 2, where it is missing, no YAML, or has a key twice."""
    import yaml
    from omegaconf import OmegaConf  # whose loader refuses a key that is there twice; PyYAML's keeps the last
    from omegaconf.errors import OmegaConfBaseException

    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, ValueError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: cannot be read as YAML: {error}", code=2) from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: a {type(content).__name__}, not keys and values", code=2)
    return content


def between(low: float, high: float) -> Callable[[str], float]:
    """A type of argparse: a number from `low` to `high`."""

    def number(text: str) -> float:
        if not low <= float(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} is not between {low:g} and {high:g}")
        return float(text)

    return number


@contextlib.contextmanager
def atomic_write(path: str | os.PathLike, mode: str = "w", sync: bool = True) -> Iterator[TextIO]:
    """Open a temporary file beside `path` that takes its name only when the block ends without an error.

    Without `sync` a power failure may leave it empty: for small files by the million, which are read again.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # No process number: machines that train together write the same lists, and in containers all have the same numbers.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def memory_file() -> BinaryIO:
    """An empty file in memory that libsndfile is given by its number, `fileno()`.

    For a file of Python's own it calls Python at every block: what is raised there, Ctrl-C too, is lost with the block.
    """
    return open(os.memfd_create("audio"), "w+b", buffering=0)


def read_options(given: Iterable[str] = (), stage: int = 1) -> dict[str, str]:
    """The options of run_experiment.sh by name, as the shell itself reads them: `given`, the environment, --config.

    Relative paths start at ROOT. UserError for a mistake that would keep stages `stage` to 5 from starting.
    """
    command = ["bash", "-c", READ_OPTIONS, "options", str(stage), "5", *given]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(done.stderr.rpartition("error: ")[2], done.returncode)  # bash may have warned before it
    return dict(line.split("=", 1) for line in done.stdout.split("\0")[:-1])


def read_lines(path: str | os.PathLike) -> list[str]:
    """Lines of a text file of the user's, in UTF-8 with or without a byte order mark; UserError, code 2, otherwise."""
    try:
        return Path(path).read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8; iconv -f GB18030 -t UTF-8 makes it so", code=2) from error


def read_jsonl(path: str | os.PathLike) -> Iterator[dict[str, Any]]:
    """Yield the rows of a JSONL file written by this recipe, one at a time.

    Raises UserError for a missing file and for the first line that is not a JSON object.
    """
    if not os.path.isfile(path):
        raise UserError(f"{path} is no file; run the stage that writes it, or correct the path", code=2)
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{path}:{number}: not JSON ({error}); one JSON object per line") from error
            if not isinstance(row, dict):
                raise UserError(f"{path}:{number}: a {type(row).__name__}, not a JSON object")
            yield row


def write_jsonl(path: str | os.PathLike, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines, atomically."""
    with atomic_write(path) as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Write one JSON value, indented, atomically."""
    with atomic_write(path) as file:
        json.dump(value, file, ensure_ascii=False, indent=1)
        file.write("\n")


def table(head: str, rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table; a cell cannot break out of it."""
    lines = [f"| {head} |", "|" + "---|" * len(head.split(" | "))]
    for row in rows:
        lines.append("| " + " | ".join(" ".join(str(cell).replace("|", "\\|").split()) for cell in row) + " |")
    return "\n".join(lines) + "\n"


def progress(items: Iterable, total: int | None, title: str) -> Iterable:
    """Show rate and time left on stderr: a bar on a terminal, a line every five seconds in a log."""
    terminal, line = sys.stderr.isatty(), "{desc}: {n_fmt}/{total_fmt} in {elapsed}, {rate_fmt}, {remaining} left\n"
    in_log = {"mininterval": 5.0, "delay": 5.0, "bar_format": line}
    return tqdm(items, total=total, desc=title, unit="", dynamic_ncols=terminal, **({} if terminal else in_log))


def of_trainings(exp_output: Path, name: str) -> list[Path]:
    """The file `name` of each training stage that has it, not of folders that were moved aside: they end in a time."""
    return sorted(exp_output.glob(f"exp/8k_telephone/*[a-z]/{name}"))


def file_hash(path: str | os.PathLike) -> str:
    """SHA-256 of a file's bytes, first 16 hex digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def file_stamp(path: str | os.PathLike) -> list[int]:
    """Size and time of a file; of a missing one, -1."""
    try:
        found = os.stat(path)
    except OSError:
        return [-1, -1]
    return [found.st_size, found.st_mtime_ns]


def parallel(
    function: Callable, items: Iterable, num_workers: int, dask_scheduler: str | None = None, batch_size: int = 16
) -> Iterator:
    """Yield function(item) for each item, in order, from worker processes that take `batch_size` items at a time.

    UserError for a worker that the system killed, or a Dask scheduler (tcp://host:port) that does not answer.
    """
    if num_workers <= 1 and not dask_scheduler:
        yield from map(function, items)
        return
    import joblib
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    with _dask(dask_scheduler) if dask_scheduler else contextlib.nullcontext(num_workers) as workers:
        # Neighbours go to one worker, which decodes a long call once for all its segments. joblib reads on however
        # many results wait to be taken: what it is given at a time bounds them.
        job = joblib.Parallel(workers, return_as="generator", batch_size=batch_size, pre_dispatch="all")
        try:
            for part in batches(items, 16 * batch_size * workers):
                yield from job(joblib.delayed(_undisturbed)(function, item) for item in part)
        except TerminatedWorkerError as error:
            raise UserError(
                "a worker was killed by the system (out of memory?); finished files are kept: "
                "run the same command again with a smaller --num_workers"
            ) from error


def _undisturbed(function: Callable, item: Any) -> Any:
    """function(item), in a worker: Ctrl-C is for the parent, which ends its workers; theirs would show a traceback."""
    if threading.current_thread() is threading.main_thread():  # not a Dask worker's
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return function(item)


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
        client.wait_for_workers(1, timeout=60)
    except (OSError, TimeoutError, ValueError) as error:  # ValueError: no address at all
        raise UserError(f"no Dask scheduler with workers at {address}: {error}", code=2) from error
    folder = os.path.dirname(os.path.abspath(__file__))
    with client, joblib.parallel_config(backend="dask", wait_for_workers_timeout=60):
        # The cluster must see this folder and the output's. The scheduler unpickles tasks too: without the path
        # it fails in silence, and joblib waits for ever.
        client.run_on_scheduler(site.addsitedir, folder)
        client.register_worker_callbacks(functools.partial(site.addsitedir, folder))
        yield max(1, sum(client.nthreads().values()))
