"""Remember what each stage of run_experiment.sh did, and say whether it has to run again.

A marker `$EXP_OUTPUT/status/stageN.json` holds the state (started, failed or done), when, how long, the rows of
every JSONL written, and a hash of every input and option. The driver asks before a stage, tells at its
start, and again after its failure or when its outputs are there: a killed stage stays "started" and simply goes on.

    python local/stage_status.py check --stage 1 --output_root exp_output --inputs conf/a.yaml --config SEED=0
    python local/stage_status.py ended --stage 1 --output_root exp_output --outputs exp_output/exp/a/averaged.pt
    python local/stage_status.py show  --output_root exp_output

`check` exits 0: nothing to do; 3: run it (first time, go on, or in place); 4: redo it from new inputs, the old
work moved aside first; 1: that would replace work, and neither --force true nor leave was given; 2: a stage of
--after, whose work this one reads, is not done, or was made from another checkpoint or base model than there is now.
"""

import argparse
import fcntl
import json
import os
import shlex
import socket
import statistics
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from common import UserError, atomic_write, file_hash, of_trainings, read_jsonl, run, table, write_json
from nano.train_log import read_log

NOTHING_TO_DO, MUST_RUN, MUST_REDO = 0, 3, 4
STAGES = {
    -1: "model", 0: "data", 1: "encoder", 2: "adaptor and CTC", 3: "LoRA", 4: "decoding and scores",
    5: "report and final model",
}
CLOCK = "%Y-%m-%d %H:%M:%S"
CHOSEN = ("TEXT_STYLE", "FRONTEND_FS")  # options that are chosen at stage 0, and kept by those after it
KALDI_FILES = ("wav.scp", "text", "segments", "utt2spk", "reco2file_and_channel")


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Say whether a stage must run, and remember that it ran.")
    add = parser.add_argument
    add("action", choices=("check", "start", "ended", "show"))
    add("--stage", type=int, help="Number of the stage, -1 to 5.")
    add("--output_root", required=True, help="The EXP_OUTPUT of the experiment.")
    add("--inputs", nargs="*", default=[], help="Files and Kaldi folders the stage reads.")
    add("--config", nargs="*", default=[], metavar="NAME=VALUE", help="Options that change its result.")
    add("--outputs", nargs="*", default=[], help="Files the stage has to have written when it `ended`.")
    add("--force", choices=("true", "false"), default="false", help="Redo the stage whatever it is.")
    add("--on_change", choices=("refuse", "redo"), default="redo",
        help="What a change of inputs means for earlier work: refuse to replace it without --force, or redo it.")
    add("--after", nargs="*", type=int, default=[], help="Stages whose work it reads: `check` wants them done.")
    add("--code", type=int, default=0, help="Exit code with which the stage `ended`; over 128, a signal stopped it.")
    add("--log", default="", help="File that says how the stage went.")
    return parser.parse_args()


def hash_input(path: str) -> str:
    """Hash of a file's content, those of a Kaldi folder's lists, or "absent"."""
    if os.path.isdir(path):
        hashes = {name: hash_input(os.path.join(path, name)) for name in KALDI_FILES}
        if hashes["reco2file_and_channel"] == "absent":  # or markers from before it was read would not hold
            del hashes["reco2file_and_channel"]
        return " ".join(f"{name}:{digest}" for name, digest in hashes.items())
    return file_hash(path) if os.path.isfile(path) else "absent"


def fingerprint(inputs: list[str], config: list[str]) -> dict[str, dict[str, str]]:
    """What a stage's result depends on: {"inputs": {path: hash}, "config": {name: value}}."""
    hashes = {os.path.abspath(path): hash_input(path) for path in inputs if path}
    return {"inputs": hashes, "config": {name: value for name, _, value in (item.partition("=") for item in config)}}


def known_as(path: str) -> str:
    """A path, but of a file of some conf/ its place in there."""
    return path[path.rindex("/conf/") + 1 :] if "/conf/" in path else path


def changes(before: dict[str, dict[str, str]], now: dict[str, dict[str, str]]) -> list[str]:
    """What differs between two fingerprints, each in a few words; conf/ of another clone is the same."""
    before, now = (facts | {"inputs": {known_as(path): digest for path, digest in facts["inputs"].items()}}
                   for facts in (before, now))  # fmt: skip
    names = sorted(before["config"].keys() | now["config"].keys())
    options = [(name, before["config"].get(name) or "empty", now["config"].get(name) or "empty") for name in names]
    found = [f"{name} {old} -> {new}" for name, old, new in options if old != new]
    for path in sorted(before["inputs"].keys() | now["inputs"].keys()):
        old, new = before["inputs"].get(path, "absent"), now["inputs"].get(path, "absent")
        if old != new:
            found.append(f"{path} {'is new' if old == 'absent' else 'is gone' if new == 'absent' else 'changed'}")
    # They stand in the order of the options that named them: dev and test may have been taken for each other.
    both = before["inputs"].keys() & now["inputs"].keys()
    orders = ([path for path in facts["inputs"] if path in both] for facts in (before, now))
    if moved := sorted(path for path, other in zip(*orders, strict=True) if path != other):
        found.append(f"{', '.join(moved)} changed places")
    return found


def marker_path(root: str, stage: int) -> Path:
    return Path(root) / "status" / f"stage{stage}.json"


def read_marker(root: str, stage: int) -> dict[str, Any] | None:
    """The marker of a stage, or None where it never started."""
    try:
        return json.loads(marker_path(root, stage).read_text("utf-8"))
    except FileNotFoundError:
        return None
    except json.JSONDecodeError as error:
        raise UserError(f"{marker_path(root, stage)} is damaged: {error}; delete it to run the stage again") from error


def base_model(inputs: dict[str, str]) -> str | None:
    """The weights of the model folder among a stage's inputs; not an INIT_CHECKPOINT of that name."""
    return next((path for path in inputs if path.endswith("/model.pt") and path[:-8] + "config.yaml" in inputs), None)


def check_parents(root: str, stage: int, parents: list[int], now: dict[str, str]) -> None:
    """The stages whose work a stage reads are done, and were made from the checkpoints that are there now.

    Without a marker, as in a folder that borrows another's data, nothing is known against the work.
    """
    here = os.path.abspath(root)
    for parent, marker in ((number, read_marker(root, number)) for number in parents):
        if marker is None:
            continue
        if marker["state"] != "done":
            raise UserError(f"stage {stage} reads the work of stage {parent}, which is not done ({marker['state']} "
                            f"{marker['time']}); finish it first: bash run_experiment.sh {parent}", code=2)  # fmt: skip
        was, asked = base_model(marker["inputs"]), base_model(now)
        if parent == 1 and was and asked and marker["inputs"][was] != now[asked]:
            raise UserError(f"stage 1 began from {was}, and stage {stage} is to compare with {asked}; go back: bash "
                            f"run_experiment.sh -1 --model {os.path.dirname(was)!r}; or train anew: bash "
                            "run_experiment.sh 1 3 --force true", code=2)  # fmt: skip
        there = marker.get("root", here)  # the experiment may have been copied or renamed since
        for path, was in marker["inputs"].items():
            folder = Path(path).parent  # one that was moved aside ends in digits, its time
            # Not the user's INIT_CHECKPOINT.
            ours = folder.parent == Path(there, "exp/8k_telephone") and folder.match("stage?_*[a-z]")
            path = path.replace(there, here, 1)
            if ours and (now.get(path) or hash_input(path)) not in (was, "absent"):  # absent: deleted, to save disk
                again = f"{parent} 3 --force true" if parent <= 3 else parent
                raise UserError(f"stage {parent} was made from another stage {folder.name[5]} than the one that is "
                                f"there now; make it anew: bash run_experiment.sh {again}", code=2)  # fmt: skip


def check(root: str, stage: int, now: dict, force: bool = False, refuse: bool = False) -> tuple[int, str]:
    """Decide about a stage: (exit code, one line that says why).

    Raises UserError where the stage would replace work of other inputs and may not, where an option of CHOSEN is not
    what it was at stage 0, and where the experiment was moved.
    """
    marker, here = read_marker(root, stage), os.path.abspath(root)
    was_at = (marker or {}).get("root", here)
    if was_at != here and (not os.path.exists(was_at) or os.path.samefile(was_at, here)):
        link = f" after moving it back, or: ln -s {shlex.quote(here)} {shlex.quote(was_at)}"
        raise UserError(f"{here} was made as {was_at}, by which its lists name the audio; give --exp_output {was_at!r}"
                        + link * (not os.path.exists(was_at)), code=2)  # fmt: skip
    chosen = (read_marker(root, 0) if stage > 0 else None) or now
    for name in CHOSEN:
        was, asked = (facts["config"].get(name) for facts in (chosen, now))
        if name in now["config"] and asked != was:
            raise UserError(f"{name} is {asked}, but stage 0 had {was}; add --{name.lower()} {was}, or begin "
                            "again at stage 0 in another --exp_output", code=2)  # fmt: skip
    if marker is None:
        return MUST_RUN, "not run yet"
    changed = changes(marker, now)
    if force:
        return MUST_REDO, "redone, as --force true asks" + (f" (changed: {'; '.join(changed)})" if changed else "")
    if changed:
        if refuse:
            raise UserError(f"stage {stage} was {marker['state']} on {marker['time']} with other inputs: "
                            f"{'; '.join(changed)}; take the change back, or redo it (the old folder is moved aside): "
                            f"bash run_experiment.sh {stage} --force true")  # fmt: skip
        # Stages 4 and 5 replace what no longer holds themselves, and keep transcripts that do.
        return MUST_REDO if stage < 4 else MUST_RUN, f"redone, changed: {'; '.join(changed)}"
    if marker["state"] != "done":
        return MUST_RUN, f"goes on from where it stopped ({marker['state']} {marker['time']})"
    for path, size in marker["outputs"].items():
        if not os.path.isfile(path) or os.path.getsize(path) != size:
            return MUST_RUN, f"{path} is gone or was changed since {marker['time']}"
    if stage == -1:  # an id was found in a hub's cache, which may have been cleared
        weights = Path(Path(root, "model/model_dir.txt").read_text("utf-8").strip(), "model.pt")
        if not weights.is_file():
            return MUST_RUN, f"{weights} is gone since {marker['time']}"
    return NOTHING_TO_DO, f"nothing to do, inputs and options are those of {marker['time']}"


def start(root: str, stage: int, now: dict) -> None:
    """Write down that a stage began, with what it reads."""
    facts = {"state": "started", "time": time.strftime(CLOCK), "began": time.time(), "host": socket.gethostname()}
    write_json(marker_path(root, stage), facts | {"root": os.path.abspath(root)} | now)


def failed(root: str, stage: int, log: str) -> None:
    """Write down that a stage failed, and where that is said."""
    found = {"state": "failed", "time": time.strftime(CLOCK), "log": log}
    write_json(marker_path(root, stage), (read_marker(root, stage) or {}) | found)


def done(root: str, stage: int, outputs: list[str]) -> dict[str, Any]:
    """Write down that a stage ended, over outputs that exist and are not empty; return the marker."""
    marker = read_marker(root, stage)
    if marker is None:
        raise UserError(f"stage {stage} never started under {root}", code=2)
    for path in outputs:
        if not os.path.isfile(path) or os.path.getsize(path) == 0:
            raise UserError(f"stage {stage} ended without writing {path}; its log says why")
    marker |= {
        "state": "done", "seconds": round(time.time() - marker["began"], 1), "time": time.strftime(CLOCK),
        "outputs": {path: os.path.getsize(path) for path in outputs},
        "counts": {
            os.path.relpath(path, root).removeprefix("data/").removesuffix(".jsonl").removesuffix("_formatted"):
            len(Path(path).read_bytes().splitlines()) for path in outputs if path.endswith(".jsonl")
        },
    }
    write_json(marker_path(root, stage), marker)
    return marker


def training_row(folder: Path, running: bool) -> list[str]:
    """Epoch, loss, fall, accuracy, speed, memory and time left of a training; empty before its first logged step.

    Loss and fall are those of the epochs' means where the training has been checked, else of the logged steps.
    """
    rows, lines, record = folder / "trainlist.jsonl", read_log(folder / "train.log"), folder / "run.json"
    trained = [line for line in lines if line["tag"] == "train"]
    if not trained:
        return []
    now, checked = trained[-1], json.loads(record.read_text("utf-8")).get("checked", {}) if record.is_file() else {}
    first = checked.get("loss_first_epoch", trained[0]["loss"])
    epoch, epochs, steps, loss = (now[name] for name in ("epoch", "epochs", "steps", "loss"))
    accuracy = [f"{line['acc']:.1%}" for line in lines if line["tag"] == "val"]
    pace = statistics.median(line["seconds"] for line in trained[-50:])
    audio = sum(row["speech_length"] for row in read_jsonl(rows)) / 100 if rows.is_file() else 0
    # An early stop makes it less, validation a little more.
    left = str(timedelta(seconds=round(((epochs - epoch) * steps - now["step"]) * pace))) if running else ""
    return [f"{epoch + 1}/{epochs}", f"{first:.3f} -> {loss:.3f}", f"{1 - loss / first:.0%}", *(accuracy or [""])[-1:],
            f"{audio / (steps * pace):,.0f}", str(now["gpu"] or "CPU"), left]  # fmt: skip


def error_rates(root: str) -> dict[str, str]:
    """CER of every model that stage 4 scored: {"stage1": "real 12.3%, simulated 4.5%"}."""
    path, found = Path(root) / "eval/summary.json", {}
    for row in json.loads(path.read_text("utf-8")) if path.is_file() else []:
        if row["test_set"] in ("real_test", "simulated_test") and row["cer"] is not None:
            found.setdefault(row["model"], []).append(f"{row['test_set'].removesuffix('_test')} {row['cer']:.1%}")
    return {model: ", ".join(rates) for model, rates in found.items()}


def locked(root: str) -> bool:
    """Whether a run holds the lock of the experiment, or what a killed one left behind does."""
    try:
        with open(Path(root) / ".lock0") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    return False


def show(root: str) -> str:
    """The state of every stage, and how each training goes, as Markdown tables."""
    markers = {stage: read_marker(root, stage) or {"state": "not run", "time": ""} for stage in STAGES}
    stages, trainings, rates, scored = [], [], error_rates(root), markers[4].get("began", 0)
    started = [(marker["began"], stage) for stage, marker in markers.items() if marker["state"] == "started"]
    at_work = max(started)[1] if started and locked(root) else None
    for stage, what in STAGES.items():
        marker, state = markers[stage], markers[stage]["state"]
        elsewhere = marker.get("host", socket.gethostname()) != socket.gethostname()  # whose lock may not be seen here
        running = state == "started" and (elsewhere or stage == at_work)
        if running:
            state = f"started on {marker['host']}" if elsewhere else "running"
        elif state == "started":
            state = "stopped; run it again"
        elif state == "failed":
            state = f"failed: see {marker['log']}"
        models = ("base", "final") if stage == 4 else (f"stage{stage}",)
        # A stage that was begun again after its model was scored has no rates yet.
        models = models if marker.get("began", 0) <= scored else ()
        details = [f"{model}: {rates[model]}" for model in models if model in rates]
        details = details or [f"{name} {count:,}" for name, count in marker.get("counts", {}).items()]
        for log in of_trainings(Path(root), "train.log"):
            if log.parent.name.startswith(f"stage{stage}_") and (row := training_row(log.parent, running)):
                trainings.append((stage, *row))
        took = timedelta(seconds=round(marker["seconds"])) if "seconds" in marker else ""
        stages.append((stage, what, state, marker["time"], took, ", ".join(details)))
    text = f"# Status of the experiment in {root}\n\nWritten {time.strftime(CLOCK)} by `make status`.\n\n"
    text += table("stage | what | state | when | took | rows, or CER on test", stages)
    if trainings:
        text += "\n" + table("stage | epoch | training loss, first to now | fallen (target 30 %) | accuracy on dev | "
                             "audio seconds a second | GPU peak, GiB | left, at most", trainings)  # fmt: skip
    return text


def main() -> None:
    args = get_args()
    if args.action == "show":
        if not (Path(args.output_root) / "status").is_dir():
            raise UserError(f"no stage has run under {args.output_root}; the first is: make model", code=2)
        text = show(args.output_root)
        print(text, end="")
        with atomic_write(Path(args.output_root) / "README_EXPERIMENT_STATUS.md") as file:
            file.write(text)
        return
    if args.stage not in STAGES:
        raise UserError(f"--stage {args.stage}: expected one of {', '.join(map(str, STAGES))}", code=2)
    if args.action == "ended" and args.code:
        if args.code <= 128:
            failed(args.output_root, args.stage, args.log)
        return
    if args.action == "ended":
        marker = done(args.output_root, args.stage, args.outputs)
        rows = ", ".join(f"{name} {count:,} rows" for name, count in marker["counts"].items())
        print(f"stage {args.stage}: done" + (f": {rows}" if rows else ""))
        return
    now = fingerprint(args.inputs, args.config)
    if args.action == "start":
        start(args.output_root, args.stage, now)
        return
    check_parents(args.output_root, args.stage, args.after, now["inputs"])
    code, reason = check(args.output_root, args.stage, now, args.force == "true", args.on_change == "refuse")
    print(f"stage {args.stage} ({STAGES[args.stage]}): {reason}")
    sys.exit(code)


if __name__ == "__main__":
    run(main)
