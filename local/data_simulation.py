r"""Send 16 kHz speech through simulated telephone calls: one channel per utterance, written as FLAC.

    python local/data_simulation.py --input raw_train.jsonl --output simulated_train.jsonl \
        --output_audio_dir audio --num_workers 8

Each row of the output is the input row with `source` naming the simulated call, `channel` holding everything
drawn for it and `wideband_source` the original. What cannot be used goes to rejected_<output's stem>.jsonl.
The audio of an utterance depends on (seed, key), the distributions and the babble pool alone, so any number of
workers, a resume after a crash or a Dask cluster give the same bytes. Run it again to go on after an interruption.

With --online no call is written: training draws a fresh one per epoch, by the settings in channel_<output's stem>.json,
and only audio that is not mono at --output_fs already is written, cut and resampled.
"""

import argparse
import contextlib
import ctypes
import functools
import hashlib
import heapq
import itertools
import json
import logging
import os
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

import audio
from common import UserError, batches, between, file_hash, file_stamp, parallel, progress, run, write_json, write_jsonl
from corpus import SPLITS, Entry, check_row, count_rows, hash_share, on_row, open_ledger, read_rows, segment, unique
from telephone import filters, noise
from telephone.channel import apply, draw, load_config
from telephone.resample import resample

POOL = 200  # utterances that babble is made of
SILENT = "no speech in the telephone band above the idle noise of a line"
Job = dict[str, Any]


def get_args(command: list[str] | None = None) -> argparse.Namespace:
    """Command line of the helper."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--input", type=Path, help="JSONL with key, source, target[, channel, start, end], or a Kaldi folder.")
    add("--output", type=Path, required=True, help="JSONL to write.")
    add("--output_audio_dir", type=Path, required=True, help="Folder for the audio, in a sub-folder per output.")
    add("--audio_key", default="source", help="Field of a row that names the audio file.")
    add("--target_fs", type=int, default=8000, choices=[8000], help="Sampling rate of the call; a telephone has 8000.")
    add("--output_fs", type=int, default=16000, choices=[8000, 16000], help="Sampling rate of the audio written.")
    add("--audio_format", default="flac", choices=["flac", "wav"], help="FLAC is half as big, WAV is faster.")
    add("--config", type=Path, default=Path("conf/telephone_channel.yaml"), help="Distributions to draw from.")
    add("--preset", help="A preset of the config, for instance clean-pcma.")
    add("--codec_type", help="Use this codec in every call: a-law, mu-law, gsm, amr-nb, opus, g726, g722 or mp3.")
    add("--low_freq", type=float, help="Lower edge of a plain band-pass in Hz, in place of the send responses.")
    add("--high_freq", type=float, help="Upper edge of a plain band-pass in Hz, in place of the send responses.")
    add("--snr_db_min", type=float, help="Lowest SNR of background noise in dB; with it, every SNR is as likely.")
    add("--snr_db_max", type=float, help="Highest SNR of background noise in dB; with it, every SNR is as likely.")
    add("--bg_noise_scp", type=Path, help="Kaldi wav.scp of noise recordings to use as background noise.")
    add("--split", choices=SPLITS, help="Of the noise recordings, those of this split alone. Default: all.")
    add("--no_noise", action="store_true", help="No background noise, line noise, hum or echo.")
    add("--no_codec", action="store_true", help="No codec and no packet loss.")
    add("--no_speech_probe", type=int, metavar="N", help="Write N calls without speech instead of reading --input.")
    add("--max_reject_ratio", type=between(0, 1), default=0.05, help="Exit 1 when a larger share is rejected.")
    add("--online", action="store_true", help="Leave the channel to training (ONLINE_CHANNEL=1).")
    add("--seed", type=int, default=0, help="Another seed draws other channels.")
    add("--epoch", type=int, help="Draw the channels that training with --online draws in this epoch.")
    add("--num_workers", type=int, default=1, help="Local processes.")
    add("--dask_scheduler", help="Use the Dask cluster of this scheduler, tcp://host:port, instead.")
    args = parser.parse_args(command)
    if (args.input is None) != ((args.no_speech_probe or 0) > 0):
        parser.error("give --input, or --no_speech_probe N")
    if args.online and (args.output_fs != 16000 or args.no_speech_probe or args.epoch is not None):
        parser.error("--online is for 16 kHz training rows; no --no_speech_probe, --epoch or other --output_fs with it")
    return args


def simulate_row(row: dict[str, Any], job: Job) -> dict[str, Any]:
    """Simulate one utterance and write its audio; return the output row. Raises audio.AudioError."""
    plan = draw(job["config"], job["seed"], row["key"], job["epoch"])
    path = f"{job['audio_dir']}/{int(256 * hash_share(row['key'])):02x}/{audio.file_name(row['key'], job['suffix'])}"
    out = {name: value for name, value in row.items() if name not in ("channel", "start", "end")}
    if "source" not in row:  # as --no_speech_probe makes them; a row of the input may have a "probe" of its own
        samples, fs = noise.render_probe(out.pop("probe"), plan), 8000
    else:
        if isinstance(row.get("channel"), dict):
            raise audio.AudioError("already_simulated", "the row's channel is that of a simulated call")
        cut = segment(row)
        samples, fs = audio.read(row["source"], **cut)
        if samples.size < 0.1 * fs:
            raise audio.AudioError("too_short", f"{samples.size / fs:.4f} s")
        out |= {"wideband_source": row["source"]} | {f"wideband_{name}": value for name, value in cut.items()}
    if job["online"]:
        source = leave_wideband(row["source"], cut, samples, fs, path, job["output_fs"])
        return out | {"source": source, "channel": job["online"]}
    call = apply(plan, samples, fs, job["output_fs"], row["key"], job["pool"], job["noises"])
    if "source" in row and plan["measured"]["sent_dbov"] is None:
        raise audio.AudioError("silent", SILENT)
    audio.write(path, call, job["output_fs"])
    return out | {"source": path, "channel": plan}


def leave_wideband(source: str, cut: dict[str, Any], samples: np.ndarray, fs: int, path: str, output_fs: int) -> str:
    """The audio that training will simulate: the source where it is mono and at `output_fs`, else written to `path`."""
    if fs < output_fs:
        raise audio.AudioError("sampling_rate", f"{fs} Hz is no wideband recording: {source}")
    heard = resample(samples, fs, output_fs)
    band = filters.send(noise.without_offset(heard), output_fs, "band", 300.0, 3400.0)
    if noise.active_level(band, output_fs) <= noise.SILENT_DBOV:
        raise audio.AudioError("silent", SILENT)
    if fs == output_fs and audio.length(source, **cut).plain:
        return source
    audio.write(path, heard, output_fs)
    return path


def simulate_part(job: Job, numbered: tuple[int, list[Entry]]) -> str:
    """Simulate some rows of the input into a part file, and return its path; a finished part is kept.

    The part file appears after all audio of its rows, and goes before any of it is written anew: audio is
    reused only under a part that names these very rows and settings, and with the sizes noted there.
    """
    _keep_freed_memory()
    index, entries = numbered
    part = Path(job["parts"]) / f"{index:06d}.json"
    stamps = [file_stamp(entry.row["source"]) for entry in entries if entry.row and "source" in entry.row]
    identity = hashlib.sha256(json.dumps([job["identity"], entries, stamps]).encode()).hexdigest()
    if part.is_file():
        done = json.loads(part.read_text(encoding="utf-8"))
        same = done["identity"] == identity
        if same and done["sizes"] == [file_stamp(row["source"])[0] for _, row, *_ in done["entries"] if row]:
            return str(part)
        part.unlink()
    done = [on_row(functools.partial(simulate_row, job=job), entry) for entry in entries]
    sizes = [file_stamp(entry.row["source"])[0] for entry in done if entry.row]
    write_jsonl(part, [{"identity": identity, "entries": done, "sizes": sizes}])
    return str(part)


def _keep_freed_memory() -> None:
    """Let malloc reuse large arrays: glibc hands each back to the system, and faulting it in anew costs a third."""
    with contextlib.suppress(AttributeError, OSError):  # another libc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-1, 1 << 28)  # M_TRIM_THRESHOLD, in bytes
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD, the most it takes


def read_entries(args: argparse.Namespace) -> Iterator[Entry]:
    """The rows of the input, or those of calls without speech."""
    if args.no_speech_probe:
        for number in range(args.no_speech_probe):
            kind, key = noise.PROBES[number % len(noise.PROBES)], f"{args.output.stem}_{number:06d}"
            row = {"key": key, "target": "", "probe": kind}
            yield Entry(row, row)
        return
    base = args.input.resolve().parent
    for entry in read_rows(args.input):
        if args.audio_key != "source" and isinstance(entry.given, dict):
            entry = check_row({**entry.given, "source": entry.given.get(args.audio_key)}, base)
        yield entry._replace(row={**entry.given, **entry.row}) if entry.row else entry


def babble_pool(entries: Iterator[Entry]) -> list[noise.Recording]:
    """The utterances babble is made of: those of the lowest hashes that hold speech."""
    given = (entry.row for entry in entries if entry.row and "source" in entry.row)
    wideband = (row for row in given if not isinstance(row.get("channel"), dict))
    first = heapq.nsmallest(POOL + POOL // 2, wideband, key=lambda row: hash_share(f"babble {row['key']}"))
    first = progress(first, len(first), "listening for voices that babble can be made of")
    voices = (noise.Recording(row["key"], row["source"], **segment(row)) for row in first)
    return list(itertools.islice(filter(_is_voice, voices), POOL))


def _is_voice(voice: noise.Recording) -> bool:
    try:
        samples, fs = audio.read(*voice[1:])
    except audio.AudioError:
        return False
    return samples.size >= fs / 2 and noise.active_level(noise.without_offset(samples), fs) > noise.SILENT_DBOV


def of_split(noises: list[noise.Recording], split: str | None) -> list[noise.Recording]:
    """The noise recordings of one split, by a hash of their keys: a tenth each for dev and test, train the rest.

    Else a model would be scored in the noises it was trained in; one under two names, too. Without a split, or of
    fewer than three: all.
    """
    order = sorted(noises, key=lambda recording: hash_share(f"noise {recording.key}"))
    files = [*dict.fromkeys(os.path.realpath(recording.source) for recording in order)]
    if split is None or len(files) < len(SPLITS):
        if split:
            logging.warning("%d noise recordings cannot be shared out: train, dev and test hear the same", len(files))
        return noises
    tenth = -(-len(files) // 10)
    chosen = set({"dev": files[:tenth], "test": files[tenth : 2 * tenth], "train": files[2 * tenth :]}[split])
    return [recording for recording in order if os.path.realpath(recording.source) in chosen]


def make_job(args: argparse.Namespace) -> Job:
    """Everything a worker needs besides its rows; `identity` is a hash of all that the audio depends on."""
    presets = [args.preset, args.codec_type, args.no_noise and "no_noise", args.no_codec and "no_codec"]
    edges = {name: getattr(args, name) for name in ("low_freq", "high_freq", "snr_db_min", "snr_db_max")}
    load = functools.partial(load_config, args.config, *filter(None, presets), **edges)
    load()  # a mistake there is told before a long manifest is read
    noises = of_split(noise.read_scp(args.bg_noise_scp), args.split) if args.bg_noise_scp else []
    count = args.no_speech_probe or count_rows(args.input)
    if count == 0:
        raise UserError(f"--input {args.input} has no rows", code=1)
    pool = babble_pool(progress(read_entries(args), count, "choosing voices"))
    if pool:
        rows = ({name: value for name, value in voice._asdict().items() if value is not None} for voice in pool)
        write_jsonl(args.output.with_name(f"babble_pool_{args.output.stem}.jsonl"), rows)
    job: Job = {
        "config": load(own_noise=bool(noises), no_babble=len(pool) < 2),
        "seed": args.seed, "epoch": args.epoch, "output_fs": args.output_fs, "online": None,
        "suffix": f".{args.audio_format}", "count": count, "pool": pool, "noises": noises,
        "audio_dir": os.path.abspath(args.output_audio_dir / args.output.stem),
        "parts": os.path.abspath(args.output.with_name(f".{args.output.stem}.parts")),
    }  # fmt: skip
    if args.online:
        settings = os.path.abspath(args.output.with_name(f"channel_{args.output.stem}.json"))
        write_json(settings, {name: job[name] for name in ("config", "seed", "output_fs", "pool", "noises")})
        # By their hash the list is another one when they are, and a stage that trained on it is out of date.
        job["online"] = {"online": settings, "settings": file_hash(settings)}
    code = [file_hash(path) for path in [__file__, *sorted(Path(__file__).parent.glob("telephone/*.py"))]]
    libraries = [metadata.version(name) for name in ("av", "numpy", "scipy", "soundfile", "soxr")]
    mixed_in = [file_stamp(recording.source) for recording in [*pool, *noises]]
    job["identity"] = hashlib.sha256(json.dumps([job, code, libraries, mixed_in]).encode()).hexdigest()
    return job


def simulate(args: argparse.Namespace, job: Job) -> None:
    """Send all rows of the input through their channels; write the output and what was rejected."""
    for stale in [*Path(job["audio_dir"]).glob("*/.*.tmp"), *Path(job["parts"]).glob(".*.tmp")]:
        stale.unlink(missing_ok=True)  # what a killed run left half-written
    size = min(max(job["count"] // 2000, 8), 64)  # rows a killed run may do twice
    tasks = enumerate(batches(unique(read_entries(args)), size))
    work = functools.partial(simulate_part, job)
    with open_ledger(args.output, args.max_reject_ratio, args.input, audio_dir=job["audio_dir"]) as ledger:
        parts = parallel(work, tasks, args.num_workers, args.dask_scheduler, batch_size=1)
        for part in progress(parts, -(-job["count"] // size), f"simulating, {size} rows each"):
            for entry in json.loads(Path(part).read_text(encoding="utf-8"))["entries"]:
                ledger.add(Entry(*entry))


def main() -> None:
    """Simulate the whole input."""
    args = get_args()
    simulate(args, make_job(args))


if __name__ == "__main__":
    run(main)
