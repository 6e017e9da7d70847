"""How fast stage 0 is here, what the plan's 1,200 h would take, and whether its memory grows with the rows.

    python bench/stage0.py [--output exp_output/bench/stage0.json] [--segments 96]

Runs the steps of `run_experiment.sh 0` on few and many spoken rows (55 s segments, 4 % calls) and counts what the
additional ones take, so that start-up is not counted. What workers do not share is bounded by what 100,000 rows of
0.2 s take one process. It errs to the slow side: babble is made of 200 utterances at most, so here of all.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "local"), str(ROOT / "demo")]
import audio  # noqa: E402
from common import write_json, write_jsonl  # noqa: E402
from speak_corpus import open_espeak  # noqa: E402
from telephone.resample import resample  # noqa: E402

PLAN = {"hours": 1200, "rows": 65_170 + 13_825 + 21_173, "workers": 64, "took_hours": [4, 6]}
TEXT = "您好，这里是客户服务中心，请问您现在方便接听电话吗？我们想和您核对一下上个月的账单，谢谢您的配合。"
CORPORA = {"raw": (55.0, 16000, "flac", 1.0), "real": (8.5, 8000, "wav", 0.04 * 55 / 8.5)}  # s, Hz, format, per segment
FEW, ROWS = 4, (1_000, 100_000)  # segments of the small run; rows of manifests
# A process of its own: a child's peak starts at the size of the process that it was forked from.
CHILD = """import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)"""
CORES = len(os.sched_getaffinity(0))


def run(helper: str, **options: object) -> np.ndarray:
    """Run a helper; seconds on the clock, seconds of all processors, MiB of its largest process."""
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-c", CHILD, sys.executable, *f"local/{helper}".split(), *words]
    start = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)  # its log and progress are seen
    if done.returncode:
        sys.exit(f"error: {helper} failed, see above")
    return np.array([time.monotonic() - start, *map(float, done.stdout.split())])


def spoken(count: int, seconds: float, rate: int) -> Iterator[np.ndarray]:
    """Recordings of the same voices, each cut at another place."""
    with open_espeak() as speak:
        voices = np.concatenate([speak(TEXT, voice, 160, 50) for voice in ("m1", "f1", "m3", "steph", "m4", "f4")])
    samples = 0.5 * resample(voices, 22050, rate)
    for number in range(count):
        yield np.resize(np.roll(samples, -7919 * number), round(seconds * rate))


def speak_corpora(folder: Path, segments: int) -> dict[int, float]:
    """Write both corpora in two sizes; return the seconds of each size."""
    lengths = {FEW: 0.0, segments: 0.0}
    for name, (seconds, rate, suffix, share) in CORPORA.items():
        rows = []
        for i, samples in enumerate(spoken(max(2, round(segments * share)), seconds, rate)):
            path = folder / name / f"{i}.{suffix}"
            audio.write(path, samples, rate)
            rows.append({"key": f"{name}-{i}", "source": str(path), "target": TEXT[: round(4 * seconds)]})
        for size in lengths:
            some = rows[: max(1, round(size * share))]
            write_jsonl(folder / f"{name}_{size}.jsonl", some)
            lengths[size] += len(some) * seconds
    return lengths


def run_steps(folder: Path, size: int, workers: int) -> dict[str, np.ndarray]:
    """What each step of stage 0 takes, as `run` gives it."""
    out, took, given = folder / f"{size}-{workers}", {}, {"num_workers": workers, "max_reject_ratio": 0}
    for name in CORPORA:
        files = {"input": folder / f"{name}_{size}.jsonl", "output": out / f"{name}.jsonl"}
        took[f"filter {name}"] = run("prepare_training_data.py filter", **files, **given)
    files = {"input": out / "raw.jsonl", "output": out / "simulated.jsonl", "output_audio_dir": out / "audio"}
    took["simulate"] = run("data_simulation.py", **files, **given)
    for name in ("simulated", *CORPORA):
        files = {"input": out / f"{name}.jsonl", "output": out / name / "train_formatted.jsonl"}
        took[f"convert {name}"] = run("prepare_training_data.py convert --do_upsample", **files, **given,
                                      tokenizer=folder / "model/Qwen3-0.6B")
    return took


def throughput(folder: Path, lengths: dict[int, float]) -> dict:
    """Audio seconds a second with one worker and with all cores, and of a core by step."""
    few, many = lengths
    seconds, speed = lengths[many] - lengths[few], {}
    for workers in sorted({CORES, 1}, reverse=True):
        once = run_steps(folder, few, workers)
        took = {name: both - once[name] for name, both in run_steps(folder, many, workers).items()}
        speed[workers] = seconds / sum(clock for clock, _, _ in took.values())
    busy = sum(part for _, part, _ in took.values())
    share = {name: part / busy for name, (_, part, _) in took.items()}
    return {"audio_seconds": seconds, "x_realtime": speed, "x_realtime_per_core": seconds / busy, "share": share}


def measure_rows(folder: Path) -> dict:
    """MiB of the largest process and rows a second of each helper, by number of rows, which refer to few files."""
    noise = np.random.default_rng(0).normal(0, 0.05, 16000 * (ROWS[1] // 100 + 1))
    audio.write(folder / "filter.wav", noise, 16000)
    audio.write(folder / "convert.wav", noise[:3200], 16000)
    cuts = {"filter": lambda i: {"start": i / 100, "end": i / 100 + 0.2}, "convert": lambda i: {}}
    data, peaks, speed = folder / "data", {}, {}
    output = {"filter": folder / "out.jsonl", "convert": data / "rows/train_formatted.jsonl"}
    for count in ROWS:
        took = {}
        for name, cut in cuts.items():
            row = {"target": "你好", "source": f"{name}.wav"}
            write_jsonl(folder / f"{name}.jsonl", (row | cut(i) | {"key": f"row-{i:06d}"} for i in range(count)))
            tokens = {"tokenizer": folder / "model/Qwen3-0.6B"} if name == "convert" else {}
            took[name] = run(f"prepare_training_data.py {name}", input=folder / f"{name}.jsonl", output=output[name],
                             num_workers=1, **tokens)
        took["validate"] = run("prepare_training_data.py validate", input=output["convert"])
        took["stats"] = run("prepare_training_data.py stats", data_dir=data,
                            source=f"rows/train={folder / 'convert.jsonl'}")
        for name, (_, busy, peak) in took.items():
            peaks.setdefault(name, {})[count], speed[name] = peak, count / busy
    return {"peak_mib": peaks, "rows_per_second": speed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "exp_output/bench/stage0.json", help="JSON to write.")
    parser.add_argument("--segments", type=int, default=96, help="16 kHz segments of the large run.")
    args = parser.parse_args()
    from miniature import build_folder  # imports torch

    with tempfile.TemporaryDirectory(prefix="stage0_bench_") as name:
        lengths = speak_corpora(Path(name), args.segments)
        build_folder(Path(name) / "model", "".join(sorted(set(TEXT))))
        result = throughput(Path(name), lengths) | measure_rows(Path(name)) | {"plan": PLAN}
    shared = PLAN["hours"] / result["x_realtime_per_core"]
    alone = PLAN["rows"] * sum(1 / speed for speed in result["rows_per_second"].values()) / 3600
    result["projected_hours"] = {cores: shared / cores + alone for cores in (2, 16, 64)}
    name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    result |= {"machine": name[1] if name else platform.machine(), "cores": CORES, "commit": commit.stdout.strip()}
    result["versions"] = {name: metadata.version(name) for name in ("av", "joblib", "numpy", "soundfile", "soxr")}
    write_json(args.output, result)
    print(f"\nstage 0 on {result['machine']}, {CORES} cores, commit {result['commit']}")
    for workers, speed in sorted(result["x_realtime"].items()):
        print(f"{workers:>8} workers  {speed:8.1f} x real time")
    print("   time goes to", ", ".join(f"{name} {part:.0%}" for name, part in result["share"].items()))
    for cores, hours in result["projected_hours"].items():
        print(f"{cores:>8} cores    {hours:8.2f} h for {PLAN['hours']} h of audio (projected)")
    print(f"{PLAN['workers']:>8} workers  {'-'.join(map(str, PLAN['took_hours'])):>8} h in the plan's own run")
    for name, peaks in result["peak_mib"].items():
        low, high = peaks.values()
        print(f"{name:>8}  {low:.0f} MiB for {ROWS[0]} rows, {high:.0f} for {ROWS[1]}, "
              f"{result['rows_per_second'][name]:.0f} rows/s of a core")


if __name__ == "__main__":
    main()
