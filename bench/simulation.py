"""Measure the telephone simulation beside other ways to do the same job, on the same files, in one run.

    python bench/simulation.py --peers PEERS_VENV/bin/python --output exp_output/bench/simulation.json

Every contender is a process of its own with one thread on one core, on files in memory. They take turns, round after
round, over 5 s and 60 s files in WAV, so that whatever else the machine does hits all alike; the best round of each
counts, in processor time. The default mix is set against a bound in which nothing but its codecs takes time; they are
timed inside the same run.
`make bench` calls this; a peer that is not installed is null.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path

import numpy as np
import soundfile

import stage0
from common import progress  # stage0 has put local/ on the path
from contenders import LOCAL, OURS, PEERS, simulator

FILES = {"5s": (5, 200), "60s": (60, 20)}  # name: (seconds, files)
ROUNDS, ROWS = 5, (1000, 100_000)  # turns, of which the best counts; corpora whose memory is compared
THREADS = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def make_files(folder: Path) -> None:
    """Speech of several voices, cut at another place for every file."""
    for size, (seconds, count) in FILES.items():
        for number, samples in enumerate(stage0.spoken(count, seconds, 16000)):
            soundfile.write(folder / f"{size}_{number:03d}.wav", samples, 16000)


def start(name: str, folder: Path, peers: str) -> subprocess.Popen | None:
    """Start a contender; None, and a message, where it cannot run here."""
    python = peers if name in ("audiomentations", "pedalboard") else sys.executable
    command = [python, str(LOCAL.parent / "bench/contenders.py"), name, str(folder)]
    environment = os.environ | THREADS | {"PYTHONWARNINGS": "ignore"}
    log = folder / f"{name}.log"
    try:
        with open(log, "w") as errors:
            process = subprocess.Popen(command, stdin=-1, stdout=-1, stderr=errors, text=True, env=environment)
    except OSError as error:
        print(f"{name}: not measured: {error}")
        return None
    if process.stdout.readline() == "ready\n":
        return process
    process.wait()
    print(f"{name}: not measured: {(log.read_text().strip().splitlines() or ['it did not start'])[-1]}")
    return None


def two_workers(folder: Path, rounds: int) -> float:
    """How much sooner two workers finish the default mix than one."""
    paths = 3 * sorted(folder.glob("5s_*.wav"))  # enough work that its last pieces do not decide
    contenders = {}
    for count in (1, 2):
        out = folder / "out" / f"workers{count}"
        out.mkdir(parents=True)
        contenders[count] = simulator(paths, out, num_workers=count)
        contenders[count]()  # the workers start once
    best = dict.fromkeys(contenders, np.inf)
    for _ in range(rounds):
        for count, run in contenders.items():
            began = time.perf_counter()
            run()
            best[count] = min(best[count], time.perf_counter() - began)
    return best[1] / best[2]


def memory_peak(folder: Path, count: int) -> float:
    """Peak memory in MiB of simulating `count` short utterances."""
    wav, rows, out = folder / "short.wav", folder / "rows.jsonl", folder / f"rows{count}"
    soundfile.write(wav, 0.1 * np.random.default_rng(0).standard_normal(3200), 16000)
    stage0.write_jsonl(rows, ({"key": f"k{i}", "source": str(wav), "target": "x"} for i in range(count)))
    _, _, peak = stage0.run("data_simulation.py", input=rows, output=out / "out.jsonl", output_audio_dir=out,
                            preset="clean-pcma", audio_format="wav")  # fmt: skip
    shutil.rmtree(out)
    return round(peak, 1)


def describe_machine() -> dict:
    """Processor, cores and load: what a speed means nothing without."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {"cpu": models[0] if models else platform.processor(), "cores": len(os.sched_getaffinity(0)),
            "system": platform.platform(), "load_before": round(os.getloadavg()[0], 2)}  # fmt: skip


def describe_versions(peers: str) -> dict:
    """Versions of everything that was measured; None for what is not installed."""
    names = ("numpy", "scipy", "soxr", "soundfile", "av")
    found = {"python": platform.python_version()} | {name: metadata.version(name) for name in names}
    code = "import sys; from importlib.metadata import version; print(version(sys.argv[1]))"
    for name in ("audiomentations", "pedalboard"):
        asked = shutil.which(peers) and subprocess.run([peers, "-c", code, name], capture_output=True, text=True)
        found[name] = asked.stdout.strip() or None if asked else None
    sox = shutil.which("sox") and subprocess.run(["sox", "--version"], capture_output=True, text=True).stdout
    return found | {"sox": sox.split()[-1] if sox else None}


def measure(folder: Path, peers: str, rounds: int) -> dict:
    """All contenders in turn; speeds in audio-seconds per second, and what follows from them."""
    contenders = {name: process for name in (*OURS, *PEERS) if (process := start(name, folder, peers))}
    best: dict[tuple[str, str], dict] = {}
    turns = list(itertools.product(range(rounds + 1), FILES, contenders))
    for number, size, name in progress(turns, len(turns), "turns of all contenders"):
        print(size, file=contenders[name].stdin, flush=True)
        answer = contenders[name].stdout.readline()
        if not answer:
            raise SystemExit(f"error: {name} stopped: {(folder / f'{name}.log').read_text()[-400:]}")
        done = json.loads(answer)
        if number and done["seconds"] < best.get((name, size), done)["seconds"] + 1e-9:  # the first round warms up
            best[name, size] = done
    for process in contenders.values():
        process.stdin.close()
        process.wait()
    audio = {size: seconds * count for size, (seconds, count) in FILES.items()}
    speed = {pair: audio[pair[1]] / done["seconds"] for pair, done in best.items()}
    bound = {size: audio[size] / sum(best["default", size]["codecs"].values()) for size in FILES}
    compared = [(name, size) for size in ("60s", "5s") for name in PEERS if size == "60s" or name in ("scipy", "sox")]
    ratio = {
        f"{name}_{size}": round(speed["clean-pcma", size] / speed[name, size], 2) if (name, size) in speed else None
        for name, size in compared
    }
    print(f"\n{'audio-seconds per second and core':34}{'5 s files':>10}{'60 s files':>12}")
    for name in (*OURS, *PEERS):
        row = [f"{speed[name, size]:.0f}" if (name, size) in speed else "-" for size in FILES]
        print(f"{name:34}{row[0]:>10}{row[1]:>12}")
    print(f"{'bound of the default mix':34}{bound['5s']:10.0f}{bound['60s']:12.0f}")
    for name, value in ratio.items():
        print(f"clean-pcma / {name:21}{'-' if value is None else format(value, '.2f'):>10}")
    return {
        "x_realtime_per_core": {f"{name}_{size}": round(speed[name, size]) for name in OURS for size in ("60s", "5s")},
        "ratio_to": ratio,
        "default_bound": round(bound["60s"]),
        "default_to_bound": {size: round(speed["default", size] / bound[size], 3) for size in FILES},
    }


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("exp_output/bench/simulation.json"), help="JSON to write.")
    parser.add_argument("--peers", default="", help="Python that has audiomentations and pedalboard.")
    return parser.parse_args()


def main() -> None:
    args = get_args()
    facts = {"machine": describe_machine(), "versions": describe_versions(args.peers)}
    # In memory where that is possible: a disk is not what is measured.
    place = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="bench_", dir=place) as folder:
        make_files(Path(folder))
        facts = measure(Path(folder), args.peers, ROUNDS) | facts
        facts["two_workers_speedup"] = round(two_workers(Path(folder), ROUNDS), 2)
    with tempfile.TemporaryDirectory(prefix="bench_") as folder:  # 100,000 files are too many to hold in memory
        facts["memory_peak_mib"] = {str(count): memory_peak(Path(folder), count) for count in ROWS}
    print("default mix to its bound:", facts["default_to_bound"])
    print("two workers to one:", facts["two_workers_speedup"])
    print("peak memory in MiB by rows:", facts["memory_peak_mib"])
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(f"written to {args.output}; load before: {facts['machine']['load_before']}")


if __name__ == "__main__":
    main()
