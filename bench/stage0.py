"""How fast stage 0 is here, what the plan's 1,200 h would take, and whether its memory grows with the rows.

    python bench/stage0.py [--output exp_output/bench/stage0.json] [--segments 24]

Runs `bash run_experiment.sh 0` on few and many rows of a spoken corpus (55 s segments, 4 % calls) and counts what the
additional rows take. It errs to the slow side: the report and `validate` look at 200 rows at most, so here at all.
"""

import argparse
import os
import platform
import re
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "local"), str(ROOT / "demo")]
import audio  # noqa: E402
from common import write_json, write_jsonl  # noqa: E402
from miniature import build_folder  # noqa: E402
from speak_corpus import VOICES, fill, generator, open_espeak  # noqa: E402
from telephone.resample import resample  # noqa: E402

PLAN = {"hours": 1200, "workers": 64, "took_hours": [4, 6]}
# Kind of sentences, seconds of a recording, rate, suffix.
RAW, REAL = ("wideband", 55.0, 16000, "flac"), ("calls", 8.5, 8000, "wav")
FEW, ROWS = 4, (1_000, 100_000)  # segments of the small run; rows of manifests
# A process of its own: a child's peak starts at the size of the process that it was forked from.
PEAK = """import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"""
CORES = len(os.sched_getaffinity(0))


def speak_set(folder: Path, name: str, count: int, kind: str, seconds: float, rate: int, suffix: str) -> list[dict]:
    """Speak recordings of `seconds` each; return their rows."""
    sentences = yaml.safe_load((ROOT / "data/demo_sentences.yaml").read_text(encoding="utf-8"))[kind]
    voices, rows = VOICES["train" if name.endswith("train") else "test"].split(), []
    with open_espeak() as speak:
        for i in range(count):
            key, texts, parts = f"{name}-{i}", [], []
            rng = generator(0, key)
            while sum(map(len, parts)) < seconds * 22050:
                texts.append(fill(str(rng.choice(sentences)), rng))
                parts.append(speak(texts[-1], voices[i % len(voices)], 150, 50))
            path = folder / name / f"{key}.{suffix}"
            audio.write(path, resample(np.concatenate(parts)[: round(seconds * 22050)], 22050, rate), rate)
            rows.append({"key": key, "source": str(path), "target": "，".join(texts), "speaker": key})
    return rows


def speak_corpus(folder: Path, segments: int) -> tuple[dict[int, float], str]:
    """Write the dev sets, and train sets of two sizes; return the seconds of each size, and all that is said."""
    lengths, said = {FEW: 0.0, segments: 0.0}, ""
    for name, kind, share in (("raw_16k", RAW, 1.0), ("real_8k", REAL, 0.04 * RAW[1] / REAL[1])):
        dev, train = (speak_set(folder, f"{name}_{split}", count, *kind)
                      for split, count in (("dev", 2), ("train", max(2, round(segments * share)))))
        write_jsonl(folder / f"{name}_dev.jsonl", dev)
        for size in lengths:
            some = train[: max(1, round(size * share))]
            write_jsonl(folder / f"{name}_train_{size}.jsonl", some)
            lengths[size] += len(some) * kind[1]
        said += "".join(row["target"] for row in dev + train)
    return lengths, said


def run_stage(folder: Path, size: int, workers: int) -> np.ndarray:
    """Seconds that stage 0 takes, on the clock and of all processors."""
    output = folder / f"out-{size}-{workers}"
    (output / "model").mkdir(parents=True)
    (output / "model/model_dir.txt").write_text(f"{folder / 'model'}\n")
    options = {f"{name}_{split}": folder / f"{name}_{split}{part}.jsonl"
               for name in ("raw_16k", "real_8k") for split, part in (("train", f"_{size}"), ("dev", ""))}
    options |= {"exp_output": output, "num_workers": workers, "python": sys.executable, "max_reject_ratio": 0}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    start = os.times()
    done = subprocess.run(["bash", "run_experiment.sh", "0", *words], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    took = np.subtract(os.times(), start)  # user, system, the children's user and system, the clock
    return np.array([took[4], took[2] + took[3]])


def throughput(folder: Path, lengths: dict[int, float]) -> dict:
    """Audio seconds a second with one worker and with all cores, and the hours projected to more cores."""
    few, many = lengths
    seconds, took = lengths[many] - lengths[few], {}
    for workers in sorted({1, CORES}):
        took[workers], busy = (run_stage(folder, many, workers) - run_stage(folder, few, workers)).tolist()
        print(f"{workers} workers: {seconds:.0f} s of audio, {took[workers]:.1f} s, {busy:.1f} of a core", flush=True)
    # What more workers do not make faster shows from two counts of them; one core alone cannot tell.
    serial = max(0.0, (CORES * took[CORES] - took[1]) / (CORES - 1)) if CORES > 1 else 0.0
    hours = {n: PLAN["hours"] / seconds * (serial + (took[1] - serial) / n) for n in (2, 16, 64)}
    return {"x_realtime": {workers: seconds / clock for workers, clock in took.items()},
            "x_realtime_per_core": seconds / busy, "serial_share": serial / took[1], "projected_hours": hours}


def peak_memory(folder: Path) -> dict:
    """MiB of the largest process of `filter` and `convert`, by number of rows, which refer to one file."""
    noise = np.random.default_rng(0).normal(0, 0.05, 8000 * (ROWS[1] // 100 + 1))
    audio.write(folder / "filter.wav", noise, 8000)
    audio.write(folder / "convert.wav", noise[:3200], 16000)
    peaks: dict[str, dict[int, float]] = {"filter": {}, "convert": {}}
    for name, count in ((name, count) for name in peaks for count in ROWS):
        cuts = {"filter": lambda i: {"start": i / 100, "end": i / 100 + 0.2}, "convert": lambda i: {}}
        row = {"target": "你好", "source": f"{name}.wav"}
        write_jsonl(folder / "rows.jsonl", (row | cuts[name](i) | {"key": f"row-{i:06d}"} for i in range(count)))
        command = [sys.executable, "-c", PEAK, sys.executable, "local/prepare_training_data.py", name,
                   "--input", folder / "rows.jsonl", "--output", folder / "out.jsonl"]
        command += ["--tokenizer", folder / "model/Qwen3-0.6B"] if name == "convert" else []
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        peaks[name][count] = int(done.stdout) / 1024
    return peaks


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "exp_output/bench/stage0.json", help="JSON to write.")
    parser.add_argument("--segments", type=int, default=24, help="16 kHz segments of the large run.")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stage0_bench_") as name:
        lengths, said = speak_corpus(Path(name), args.segments)
        build_folder(Path(name) / "model", "".join(sorted(set(said))))
        result = throughput(Path(name), lengths) | {"plan": PLAN, "peak_mib": peak_memory(Path(name))}
    name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    result |= {"machine": name[1] if name else platform.machine(), "cores": CORES, "commit": commit.stdout.strip()}
    result["versions"] = {name: metadata.version(name) for name in ("av", "joblib", "numpy", "soundfile", "soxr")}
    write_json(args.output, result)
    print(f"\nstage 0 on {result['machine']}, {CORES} cores, commit {result['commit']}")
    for workers, speed in result["x_realtime"].items():
        print(f"{workers:>8} workers  {speed:8.1f} x real time")
    for cores, hours in result["projected_hours"].items():
        print(f"{cores:>8} cores    {hours:8.1f} h for {PLAN['hours']} h of audio (projected)")
    print(f"{PLAN['workers']:>8} workers  {'-'.join(map(str, PLAN['took_hours'])):>8} h in the plan's own run")
    for name, peaks in result["peak_mib"].items():
        low, high = peaks.values()
        print(f"{name:>8}  {low:.0f} MiB for {ROWS[0]} rows, {high:.0f} for {ROWS[1]}: {high / low - 1:+.1%}")


if __name__ == "__main__":
    main()
