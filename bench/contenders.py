"""One contender of bench/simulation.py, on one core: for each set named on stdin, do all its files, print the time.

    python bench/contenders.py NAME FOLDER      NAME: clean-pcma, default, scipy, sox, audiomentations or pedalboard

FOLDER holds 5s_*.wav and 60s_*.wav at 16 kHz. An answer is a line of JSON: seconds of
processor time, and such seconds by codec.
"""

from __future__ import annotations

import functools
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import soundfile

LOCAL = Path(__file__).resolve().parent.parent / "local"
SIZES = ("5s", "60s")


def scipy_chain(paths: list[Path], out: Path):
    """The plain way: scipy filters, the formula of mu-law, noise."""
    from scipy.signal import butter, filtfilt, resample_poly

    def one(path: Path) -> None:
        samples, _ = soundfile.read(path)
        samples = resample_poly(samples, 1, 2)
        samples = filtfilt(*butter(4, [300, 3400], "bandpass", fs=8000), samples)
        samples = np.clip(samples + 1e-3 * np.random.standard_normal(samples.size), -1, 1)
        code = np.round(np.sign(samples) * np.log1p(255 * np.abs(samples)) / np.log1p(255) * 127) / 127
        samples = np.sign(code) * np.expm1(np.abs(code) * np.log1p(255)) / 255
        soundfile.write(out / path.name, resample_poly(samples, 2, 1), 16000, subtype="PCM_16")

    return lambda: [one(path) for path in paths]


def sox_pair(paths: list[Path], out: Path):
    """Two processes a file: to 8 kHz A-law in the telephone band, and back to 16 kHz."""
    subprocess.run(["sox", "--version"], check=True, capture_output=True)

    def one(path: Path) -> None:
        call = str(out / "call.wav")
        band = ["highpass", "300", "lowpass", "3400"]
        subprocess.run(["sox", "-D", str(path), "-r", "8000", "-e", "a-law", call, *band], check=True)
        subprocess.run(["sox", "-D", call, "-r", "16000", "-e", "signed", "-b", "16", str(out / path.name)], check=True)

    return lambda: [one(path) for path in paths]


def audiomentations_chain(paths: list[Path], out: Path):
    """Band-pass and noise: no 8 kHz, no codec."""
    import audiomentations as am

    band = am.BandPassFilter(min_center_freq=1850, max_center_freq=1850, min_bandwidth_fraction=1.67,
                             max_bandwidth_fraction=1.67, p=1.0)  # fmt: skip
    chain = am.Compose([band, am.AddGaussianSNR(min_snr_db=30, max_snr_db=30, p=1.0)])

    def one(path: Path) -> None:
        samples, rate = soundfile.read(path, dtype="float32")
        soundfile.write(out / path.name, chain(samples, rate), rate, subtype="PCM_16")

    return lambda: [one(path) for path in paths]


def pedalboard_chain(paths: list[Path], out: Path):
    """Filters and GSM."""
    import pedalboard as pb

    chain = pb.Pedalboard([pb.HighpassFilter(300), pb.LowpassFilter(3400), pb.GSMFullRateCompressor()])

    def one(path: Path) -> None:
        samples, rate = soundfile.read(path, dtype="float32")
        soundfile.write(out / path.name, chain(samples, rate), rate, subtype="PCM_16")

    return lambda: [one(path) for path in paths]


def simulator(paths: list[Path], out: Path, preset: str | None = None, num_workers: int = 1):
    """local/data_simulation.py itself, from manifest to manifest."""
    import data_simulation

    manifest = out / "in.jsonl"
    rows = ({"key": f"{number}-{path.stem}", "source": str(path), "target": ""} for number, path in enumerate(paths))
    manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["--input", manifest, "--output", out / "out.jsonl", "--output_audio_dir", out / "audio"]
    command += ["--config", LOCAL.parent / "conf/telephone_channel.yaml", "--audio_format", "wav"]
    command += ["--num_workers", num_workers] + (["--preset", preset] if preset else [])
    args = data_simulation.get_args([str(part) for part in command])
    job = data_simulation.make_job(args)

    def work() -> None:
        for folder in (job["parts"], job["audio_dir"]):
            shutil.rmtree(folder, ignore_errors=True)
        data_simulation.simulate(args, job)

    return work


OURS = {"clean-pcma": functools.partial(simulator, preset="clean-pcma"), "default": simulator}
PEERS = {"scipy": scipy_chain, "sox": sox_pair, "audiomentations": audiomentations_chain,
         "pedalboard": pedalboard_chain}  # fmt: skip


def time_codecs() -> dict[str, float]:
    """From now on, seconds spent in every codec but G.711."""
    from telephone.codecs import CODECS

    spent: dict[str, float] = {}

    def timed(name, code):
        def run(pcm, **settings):
            began = time.process_time()
            try:
                return code(pcm, **settings)
            finally:
                spent[name] = spent.get(name, 0.0) + time.process_time() - began

        return run

    for name, codec in CODECS.items():
        if not name.startswith("g711"):
            CODECS[name] = codec._replace(code=timed(name, codec.code))
    return spent


def core_seconds() -> float:
    """Processor time of this process and of the children it has waited for: what else runs does not count."""
    usages = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def work(name: str, folder: Path) -> None:
    """Be one contender until stdin ends."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    codecs = time_codecs() if name in OURS else {}
    rounds = {}
    for size in SIZES:
        paths, out = sorted(folder.glob(f"{size}_*.wav")), folder / "out" / name / size
        out.mkdir(parents=True)
        rounds[size] = (OURS | PEERS)[name](paths, out)
    print("ready", flush=True)
    for line in sys.stdin:
        codecs.clear()
        began = core_seconds()
        rounds[line.strip()]()
        print(json.dumps({"seconds": core_seconds() - began, "codecs": codecs}), flush=True)


if __name__ == "__main__":
    if sys.argv[1] in OURS:
        sys.path.insert(0, str(LOCAL))
    work(sys.argv[1], Path(sys.argv[2]))
