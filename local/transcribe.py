"""Transcribe calls: cut at their pauses, recognised, each channel a speaker, merged into one dialogue with times.

    python local/transcribe.py --audio call.wav --model_dir exp_output/final_model --output_dir exp_output/transcribed

--audio is a recording, a folder of them, or a Kaldi wav.scp: any rate and format that stage 0 reads. Writes
OUTPUT_DIR/<name>.txt for people and <name>.json for programs. A transcript whose recording, model and settings are
unchanged is kept, so that a folder that was interrupted goes on.
"""

import argparse
import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import audio
from common import UserError, atomic_write, file_hash, progress, read_lines, run, write_json
from nano.inference import Recogniser, Utterance, batches, read_conf
from telephone.resample import resample

# What people record calls in; other files of a folder (texts, lists) are left alone.
SUFFIXES = (".wav", ".flac", ".mp3", ".m4a", ".aac", ".ogg", ".opus", ".amr", ".awb", ".3gp", ".gsm", ".sph", ".nist",
            ".au", ".aif", ".aiff", ".wma", ".webm", ".mp4", ".g722", ".w64", ".caf", ".al", ".ul")
VAD_FS = 8000  # the band a call has, so that one threshold serves 8 kHz and up-sampled calls
# On 40 joined test calls of the demo these pauses and edges did best: CER 0.41, against 0.18 when cut as its corpus is.
# Its model has only met sentences that begin at once: 50 ms more before them cost as much as all of this.
VAD = {"threshold": 0.5, "min_speech_duration_ms": 100, "min_silence_duration_ms": 300, "speech_pad_ms": 100,
       "max_speech_duration_s": 30}
# What the best gain leaves of a mono call recorded twice, at its loudest second: -33 dB with G.711 or MP3 of its own on
# each channel, -23 dB with Opus. Of two speakers of whom each is 3 dB weaker in the other's channel it leaves -9 dB.
SAME_CHANNEL = 1e-2


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--audio", required=True, type=Path, help="A recording, a folder of them, or a wav.scp.")
    parser.add_argument("--model_dir", required=True, type=Path, help="Model folder, as stages 5 and -1 leave it.")
    parser.add_argument("--output_dir", required=True, type=Path, help="Where <name>.txt and <name>.json go.")
    parser.add_argument("--hotwords", default="",
                        help="Words to listen for, with commas between, or a file with one a line (what follows | or "
                             "# is left out). They go into the model's prompt.")
    parser.add_argument("--conf", default="conf/decode.yaml", help="Settings. Default: %(default)s.")
    return parser.parse_args()


def find_recordings(path: Path) -> dict[str, Path]:
    """Recordings by name: that of the file, its place in the folder, or the key in wav.scp."""
    if (path / "wav.scp").is_file():
        path /= "wav.scp"
    if path.is_dir():
        # A link to nothing is one that cannot be read; links to folders are not followed, but said.
        files = sorted(file for file in path.rglob("*") if file.is_file() or file.is_symlink())
        recordings = {str(file.relative_to(path)): file for file in files if file.suffix.lower() in SUFFIXES}
        others = [file for file in files if file.suffix.lower() not in SUFFIXES]
        if recordings and others:
            logging.info("%s: %d files of other suffixes left alone, such as %s", path, len(others), others[0])
    elif path.suffix == ".scp" and path.is_file():
        lines = [line.split(maxsplit=1) for line in read_lines(path) if line.strip()]
        if wrong := [line for line in lines if len(line) < 2]:
            raise UserError(f"{path}: {wrong[0][0]}: want a key and a path", code=2)
        recordings = {key: Path(source.strip()) for key, source in lines}
        if len(recordings) < len(lines):
            raise UserError(f"{path}: a key twice; keys name the transcripts", code=2)
    elif path.is_file():
        recordings = {path.name: path}
    else:
        raise UserError(f"--audio {path} does not exist; give a recording, a folder or a wav.scp", code=2)
    if not recordings:
        raise UserError(f"--audio {path} holds no recordings ({' '.join(SUFFIXES)})", code=2)
    return recordings


def read_hotwords(given: str) -> list[str]:
    is_file = os.path.isfile(given)
    if not is_file and (given.startswith(("/", "./", "../", "~")) or given.endswith(".txt")):
        raise UserError(f"--hotwords {given} is no file; correct the path, or give the words themselves", code=2)
    lines = read_lines(given) if is_file else re.split("[,，、;；]", given)
    words = [re.split("[#＃|｜]", line)[0].strip() for line in lines]
    return [word for word in words if word]


def read_channels(path: Path) -> list[tuple[np.ndarray, int]]:
    """Samples and rate of every channel; the loudest for a mono call that was recorded on all."""
    channels = [audio.read(path, channel) for channel in range(audio.channels(str(path)))]
    if all(is_same(channels[0][0], *other) for other in channels[1:]):
        return [max(channels, key=lambda channel: np.vdot(channel[0], channel[0]))]
    return channels


def is_same(first: np.ndarray, other: np.ndarray, rate: int) -> bool:
    """Whether a channel is another but for a gain and a codec's noise; a silent one is not."""
    gain = np.vdot(first, other) / max(np.vdot(first, first), 1e-20)  # least squares
    # By the second, or a word that only one channel has would be nothing beside a long call.
    left, power = (np.add.reduceat(np.square(samples), np.arange(0, len(samples), rate)).max()
                   for samples in (other - gain * first, other))
    return bool(left < SAME_CHANNEL * power)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """The VAD's matrices are too small to share; importing it would leave the whole process at one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def load_vad() -> torch.nn.Module:
    with one_thread():
        from silero_vad import load_silero_vad

        return load_silero_vad()


def find_speech(samples: np.ndarray, rate: int, vad: torch.nn.Module) -> list[tuple[float, float]]:
    """Start and end in seconds of what is spoken, cut at pauses, no piece longer than half a minute."""
    from silero_vad import get_speech_timestamps

    heard = torch.from_numpy(resample(samples, rate, VAD_FS))
    with one_thread(), torch.inference_mode():
        found = get_speech_timestamps(heard, vad, sampling_rate=VAD_FS, **VAD)
    return [(round(piece["start"] / VAD_FS, 2), round(piece["end"] / VAD_FS, 2)) for piece in found]


def transcribe(
    path: Path, recogniser: Recogniser, vad: torch.nn.Module, prompt: str, conf: dict[str, Any]
) -> dict[str, Any]:
    """The dialogue of one recording: {"seconds", "channels", "segments": [{"channel", "start", "end", "text"}]}."""
    channels, segments = read_channels(path), []
    for channel, (samples, rate) in enumerate(channels):
        upsampled = resample(samples, rate, recogniser.fs)
        for start, end in find_speech(samples, rate, vad):
            segments.append({
                "channel": channel, "start": start, "end": end, "key": f"{channel}-{start:.2f}",
                "speech_length": round(100 * (end - start)),
                "samples": upsampled[round(start * recogniser.fs) : round(end * recogniser.fs)],
            })
    for batch in batches(segments, conf["batch_size"], conf["batch_seconds"]):
        utterances = [Utterance(segment["key"], segment["samples"], prompt) for segment in batch]
        texts = recogniser.transcribe(utterances, conf["max_new_tokens"], conf["max_tokens_per_second"])
        for segment, text in zip(batch, texts, strict=True):
            segment["text"] = text
    segments.sort(key=lambda segment: (segment["start"], segment["channel"]))
    return {
        "seconds": round(len(channels[0][0]) / channels[0][1], 2), "channels": len(channels),
        "segments": [{name: segment[name] for name in ("channel", "start", "end", "text")} for segment in segments],
    }


def identify(path: Path) -> str:
    """Hash of a recording. AudioError for one that is not there or may not be read, or whose name is not UTF-8."""
    if path.name.endswith("|"):  # a shell command from a stranger is never run
        raise audio.AudioError("source_is_command", f"{path}: a command; write its output to a file first")
    try:
        str(path).encode()
        return file_hash(path)
    except UnicodeEncodeError as error:
        detail = f"{path!r}: a name that is not UTF-8; convmv -f GB18030 -t UTF-8 --notest renames it"
        raise audio.AudioError("audio_unreadable", detail) from error
    except OSError as error:
        raise audio.AudioError("audio_unreadable", f"{path}: {error.strerror}") from error


def read_kept(path: Path) -> dict[str, Any]:
    """The transcript that an earlier run left there, where it is whole; else nothing."""
    try:
        kept = json.loads(path.read_text("utf-8"))
        return kept if {"audio", "segments", "channels"} <= kept.keys() else {}
    except (OSError, ValueError, AttributeError):
        return {}


def as_text(dialogue: dict[str, Any]) -> str:
    """One line per segment with words: its times, the speaker where there are several, the words."""
    lines = []
    for segment in dialogue["segments"]:
        speaker = f" {chr(ord('A') + segment['channel'])}:" if dialogue["channels"] > 1 else ""
        if segment["text"].strip():
            lines.append(f"[{clock(segment['start'])} - {clock(segment['end'])}]{speaker} {segment['text']}\n")
    return "".join(lines)


def clock(seconds: float) -> str:
    return f"{int(seconds // 3600)}:{int(seconds // 60 % 60):02d}:{seconds % 60:05.2f}"


def main() -> None:
    args = get_args()
    recordings, hotwords, conf = find_recordings(args.audio), read_hotwords(args.hotwords), read_conf(args.conf)
    weights, config = args.model_dir / "model.pt", args.model_dir / "config.yaml"
    if not (weights.is_file() and config.is_file()):
        raise UserError(f"--model_dir {args.model_dir} has no model.pt and config.yaml; run stage 5 first", code=2)
    settings = [file_hash(weights), file_hash(config), hotwords, conf, VAD, SAME_CHANNEL]
    recogniser, vad, failed = None, None, []
    for name, path in progress(recordings.items(), len(recordings), "recordings"):
        stem = args.output_dir / audio.file_name(name, "", letters=r"\w")
        output, text_output = (stem.with_name(stem.name + suffix) for suffix in (".json", ".txt"))
        try:
            made_of = hashlib.sha256(json.dumps([identify(path), *settings]).encode()).hexdigest()[:16]
            kept = read_kept(output)
            dialogue = kept if kept.get("made_of") == made_of else None
            if dialogue is None:
                if os.path.abspath(kept.get("audio", path)) != os.path.abspath(path):
                    advice = "give another --output_dir (TRANSCRIBED= of make)"
                    raise audio.AudioError("duplicate_key", f"{output} is the transcript of {kept['audio']}; {advice}")
                if recogniser is None:
                    recogniser, vad = Recogniser(args.model_dir, conf["device"], conf["dtype"]), load_vad()
                dialogue = transcribe(path, recogniser, vad, recogniser.prompt(hotwords), conf)
                write_json(output, {"audio": str(path), **dialogue, "hotwords": hotwords, "model": str(args.model_dir),
                                    "made_of": made_of})
        except audio.AudioError as error:
            logging.error("%s: %s", name, error)
            failed.append(name)
            continue
        with atomic_write(text_output) as file:
            file.write(as_text(dialogue))
        empty = "(speech found, but no words recognised)" if dialogue["segments"] else "(no speech)"
        print(f"# {name} -> {text_output}\n{as_text(dialogue) or empty}", flush=True)
    if failed:
        raise UserError(f"{len(failed)} of {len(recordings)} recordings not transcribed, first {failed[0]}; see above")


if __name__ == "__main__":
    run(main)
