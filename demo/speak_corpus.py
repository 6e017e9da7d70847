"""Speak the demo's two corpora: 16 kHz wideband recordings and 8 kHz recorded calls, with espeak-ng's Mandarin.

    python demo/speak_corpus.py --output exp_output/demo/corpus --seed 0

writes base_train, wideband_{train,dev,test} (16 kHz FLAC) and calls_{train,dev,test} (8 kHz A-law WAV, all of them
through a mobile network, as a third of what stage 0 simulates) as JSONL of {"key", "source", "target",
"speaker", "call"}. Dev and test are other people: their voices and their texts occur in no training set.
Sentences come from data/demo_sentences.yaml. Everything is a function of (seed, key), on one kind of CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import json
import logging
import multiprocessing
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import soundfile
import yaml

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "local"))

import audio  # noqa: E402
from common import UserError, file_hash, progress, run, write_json, write_jsonl  # noqa: E402
from telephone.channel import apply, draw, load_config  # noqa: E402
from telephone.codecs import from_pcm  # noqa: E402
from telephone.resample import resample  # noqa: E402

DIGITS = "零一二三四五六七八九"
COUNTS = {"digits": (4, 8), "few": (1, 4), "phone": (4, 5)}  # digits of a slot: at least, fewer than

# espeak-ng voice variants: ordinary adult voices only, no whisper, robot, echo or other effect.
# No voice is in two lists of different rows: train, dev and test are different people. By ear, too: steph, steph2 and
# steph3 are all but one. None breathes as f2, f3, f5 and Alicia do: espeak-ng's breath is another one in every run.
VOICES = {
    "train": "m1 m2 m3 m4 m7 f1 Andy Denis Michael linda steph steph3 aunty Nguyen",
    "dev": "m6 Annie Reed",
    "test": "m5 m8 f4",
    "calls_train": "paul edward Lee david anika steph2 Andrea Mario Gene quincy Jacky Henrique Mike",
    "calls_dev": "ed shelby rob",
    "calls_test": "ian belinda travis",
}
# name: (shares of kinds of sentences, voices, utterances, held out: texts with slots, which no other set has)
SETS = {
    "calls_test": ({"calls": 1}, "calls_test", 240, True),
    "calls_dev": ({"calls": 1}, "calls_dev", 240, True),
    "wideband_test": ({"wideband": 1}, "test", 240, True),
    "wideband_dev": ({"wideband": 1}, "dev", 240, True),
    "base_train": ({"wideband": 0.82, "short": 0.15, "silence": 0.03}, "train", 3600, False),
    "wideband_train": ({"wideband": 1}, "train", 1400, False),
    "calls_train": ({"calls": 1}, "calls_train", 800, False),
}
# What makes texts of a pattern many, so that some can be held out.
SLOT = re.compile(r"\{(digits|phone|amount|date|few)\}")


def say_number(value: int) -> str:
    """Read a whole number from 1 to 99,999 aloud in Mandarin: 1520 -> 一千五百二十."""
    spoken, gap = "", False
    for unit, name in ((10000, "万"), (1000, "千"), (100, "百"), (10, "十"), (1, "")):
        digit, value = divmod(value, unit)
        if digit:
            spoken += ("零" if gap else "") + DIGITS[digit] + name
            gap = False
        elif spoken and value:
            gap = True
    return spoken.removeprefix("一") if spoken.startswith("一十") else spoken


def fill(sentence: str, rng: np.random.Generator) -> str:
    """Fill the slots of one sentence pattern."""

    def slot(match: re.Match) -> str:
        name = match.group(1)
        if name in COUNTS:
            return "".join(DIGITS[d] for d in rng.integers(0, 10, rng.integers(*COUNTS[name])))
        if name == "amount":
            low, high = [(10, 100), (100, 1000), (1000, 10000)][rng.integers(0, 3)]
            return say_number(int(rng.integers(low, high))) + "元"
        if name == "date":
            return f"{say_number(int(rng.integers(1, 13)))}月{say_number(int(rng.integers(1, 29)))}号"
        return str(rng.choice(name.split("|")))

    return re.sub(r"\{([^}]*)\}", slot, sentence)


def write_texts(sentences: dict[str, list[str]], sets: dict, seed: int) -> dict[str, list[str]]:
    """Draw each set's texts; a text of a held-out set occurs in no other set.

    Raises UserError when the sentences cannot give as many distinct held-out texts as asked for.
    """
    reserved: set[str] = set()
    texts = {}
    for name, (kinds, _, count, held_out) in sets.items():
        patterns, weights = [], []
        for kind, share in kinds.items():
            mine = [s for s in sentences[kind] if not held_out or SLOT.search(s)]
            # A pattern without slots is one sentence: a third of the weight keeps it from filling the training set.
            weight = np.array([1.0 if SLOT.search(s) else 0.3 for s in mine])
            patterns += mine
            weights += list(share * weight / weight.sum())
        rng = generator(seed, name)
        drawn: list[str] = []
        for _ in range(count * 100):
            text = fill(patterns[rng.choice(len(patterns), p=weights)], rng)
            if text in reserved or (held_out and text in drawn):
                continue
            drawn.append(text)
            if len(drawn) == count:
                break
        else:
            raise UserError(f"{name}: only {len(drawn)} distinct texts of {count}; add patterns to the sentences file")
        if held_out:
            reserved.update(drawn)
        texts[name] = drawn
    return texts


def generator(seed: int, key: str) -> np.random.Generator:
    """Random numbers that depend on (seed, key) alone."""
    return np.random.default_rng(np.frombuffer(hashlib.sha256(f"{seed}/{key}".encode()).digest(), np.uint32))


def speak_apart(text: str, voice: str, rate: int, pitch: int) -> np.ndarray:
    """Speak in a process of its own: what espeak-ng says depends on what it has said before, even after a restart."""
    receiver, sender = multiprocessing.Pipe(duplex=False)
    # Forked, so that nothing is imported again.
    child = multiprocessing.get_context("fork").Process(
        target=_speak_into, args=(receiver, sender, text, voice, rate, pitch)
    )
    child.start()
    sender.close()
    try:
        said = receiver.recv()
    except EOFError:
        said = UserError(f"espeak-ng could not speak {text!r} as cmn+{voice}; the lines above say why")
    child.join()
    if isinstance(said, UserError):
        raise said
    return said


def _speak_into(receiver: Connection, sender: Connection, *sentence: Any) -> None:
    receiver.close()  # or the child of a killed parent would wait for ever for somebody to listen
    with contextlib.suppress(KeyboardInterrupt):  # the parent says it
        try:
            with open_espeak() as speak:
                sender.send(speak(*sentence))
        except UserError as error:
            sender.send(error)


@contextlib.contextmanager
def open_espeak() -> Iterator[Callable[[str, str, int, int], np.ndarray]]:
    """Start libespeak-ng; give speak(text, variant, words per minute, pitch 0-99) -> float32 at 22,050 Hz.

    The calls are those of espeak-ng's speak_lib.h; 1 is AUDIO_OUTPUT_RETRIEVAL, espeakCHARS_UTF8 and espeakRATE.
    """
    import espeakng_loader

    library = ctypes.cdll.LoadLibrary(espeakng_loader.get_library_path())
    if library.espeak_Initialize(1, 0, os.fsencode(espeakng_loader.get_data_path()), 0) != 22050:
        raise UserError("espeak-ng did not start; reinstall with: pip install --force-reinstall espeakng-loader")
    blocks: list[np.ndarray] = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)
    def collect(samples, count, _events):
        if samples and count > 0:
            blocks.append(np.ctypeslib.as_array(samples, (count,)).copy())
        return 0

    library.espeak_SetSynthCallback(collect)

    def speak(text: str, variant: str, rate: int, pitch: int) -> np.ndarray:
        blocks.clear()
        if library.espeak_SetVoiceByName(f"cmn+{variant}".encode()):
            raise UserError(f"espeak-ng has no voice cmn+{variant}")
        library.espeak_SetParameter(1, rate, 0)
        library.espeak_SetParameter(3, pitch, 0)
        data = text.encode()
        library.espeak_Synth(data, ctypes.c_size_t(len(data) + 1), 0, 1, 0, 1, None, None)
        library.espeak_Synchronize()
        return np.concatenate(blocks).astype(np.float32) / 32768

    try:
        yield speak
    finally:
        library.espeak_Terminate()  # a second start in one process without it never returns


def speak_set(name: str, texts: list[str], first: int, folder: Path, seed: int) -> list[dict]:
    """Speak texts[0], ... as utterances number `first`, ... of one set; write their audio; return their rows."""
    mobile = load_config(ROOT / "conf/telephone_channel.yaml", "mobile", no_babble=True)
    voices = VOICES[SETS[name][1]].split()
    rows = []
    for number, text in enumerate(texts, first):
        key = f"{name}-{number:05d}"
        rng = generator(seed, key)
        voice = voices[rng.integers(len(voices))]
        # Eight people a voice: another pitch and pace each.
        person = generator(seed, f"{voice}/{rng.integers(8)}")
        rate, pitch = int(person.integers(125, 171)), int(person.integers(35, 66))
        # Another pace of the samples is another head: more speakers than fourteen voices (effect not measured).
        # No noise, no dull recordings: a base that has heard some is hardly worse on the telephone (CER of 10-20 %
        # in single runs), and there would be little to adapt to.
        size = rng.uniform(0.88, 1.12) if name == "base_train" else 1
        if text:
            samples = resample(speak_apart(text, voice, rate, pitch), round(22050 * size), 16000)
        else:
            noise = rng.standard_normal(rng.integers(16000, 64000), np.float32)
            samples = np.float32(10 ** rng.uniform(-4, -2)) * noise
        if name.startswith("calls"):
            path = folder / name / f"{key}.wav"
            samples = from_pcm(apply(draw(mobile, seed, key), samples, 16000, 8000))
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, samples, 8000, subtype="ALAW")
        else:
            path = folder / name / f"{key}.flac"
            audio.write(path, samples, 16000)
        speaker = f"{voice}-{rate}-{pitch}"
        row = {"key": key, "source": str(path), "target": text, "speaker": speaker, "call": f"{speaker}-{key}"}
        rows.append(row)
    return rows


def inputs(output: Path, sentences: Path, seed: int) -> dict:
    """What the corpus depends on, and where its lists say it lies; beside it when it is whole."""
    files = [sentences, Path(__file__), ROOT / "conf/telephone_channel.yaml"]
    return {"folder": str(output.resolve()), "seed": seed, **{path.name: file_hash(path) for path in files}}


def make_corpus(output: Path, sentences: Path, seed: int, workers: int) -> dict[str, int]:
    """Speak every set into `output`, which takes its name when it is whole; return rows a set."""
    texts = write_texts(yaml.safe_load(sentences.read_text(encoding="utf-8")), SETS, seed)
    temporary = output.with_name(output.name + ".partial")
    shutil.rmtree(temporary, ignore_errors=True)
    jobs = [(name, i, texts[name][i : i + 100]) for name in SETS for i in range(0, len(texts[name]), 100)]
    parallel = joblib.Parallel(n_jobs=workers, return_as="generator")
    spoken = parallel(joblib.delayed(speak_set)(name, part, first, temporary, seed) for name, first, part in jobs)
    rows: dict[str, list[dict]] = {name: [] for name in SETS}
    for (name, _, _), part in zip(jobs, progress(spoken, len(jobs), "speaking, hundreds of utterances"), strict=True):
        for row in part:
            row["source"] = str(output.resolve() / Path(row["source"]).relative_to(temporary))
        rows[name] += part
    for name, part in rows.items():
        write_jsonl(temporary / f"{name}.jsonl", part)
    write_json(temporary / "corpus.json", inputs(output, sentences, seed))
    shutil.rmtree(output, ignore_errors=True)
    temporary.rename(output)
    return {name: len(part) for name, part in rows.items()}


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="Folder to write the corpus to.")
    parser.add_argument("--sentences", type=Path, default=ROOT / "data/demo_sentences.yaml", help="Sentence patterns.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of every random choice.")
    parser.add_argument("--num_workers", type=int, default=os.cpu_count(), help="Processes that speak side by side.")
    return parser.parse_args()


def main() -> None:
    args = get_args()
    marker, wanted = args.output / "corpus.json", inputs(args.output, args.sentences, args.seed)
    if marker.is_file() and json.loads(marker.read_text(encoding="utf-8")) == wanted:
        logging.info("%s is spoken already: nothing to do", args.output)
        return
    counts = make_corpus(args.output, args.sentences, args.seed, args.num_workers)
    logging.info("%s: %s", args.output, ", ".join(f"{name} {count}" for name, count in counts.items()))


if __name__ == "__main__":
    run(main)
