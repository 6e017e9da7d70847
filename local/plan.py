"""Say what an experiment will take, from its own data and options: $EXP_OUTPUT/EXPERIMENT_EXECUTION_PLAN.md.

    python local/plan.py --config my.conf      # options as of run_experiment.sh; or: make plan CONFIG=my.conf

Before stage 0 the corpora are counted and the lengths of 200 recordings of each are read; after it, its lists are.
Parameters, batches and memory come from the model folder of stage -1, times from what `make bench` measured in this
EXP_OUTPUT. What is not known yet is said to be so, with the command that makes it known.
"""

import argparse
import heapq
import json
import logging
import os
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path

import audio
from common import ROOT, UserError, atomic_write, read_jsonl, read_options, run, table
from corpus import SPLITS, count_rows, hash_share, read_rows, segment

SAMPLE = 200  # recordings of a set whose length is read before stage 0
SIMULATED, REAL, WIDEBAND, SILENCE = "simulated_8k_telephone", "real_8k_telephone", "wideband_16k", "no_speech"
OPTION = {SIMULATED: "RAW_16K", REAL: "REAL_8K", WIDEBAND: "RAW_16K"}
STAGES = ("stage1_encoder_adapt", "stage2_adapter_align", "stage3_lora_domain")
Lengths = list[tuple[int, int]]  # 10 ms frames and tokens of each row
NOBODY = (517, 2)  # a row on which nobody speaks, on average: (15 - 1) / ln 15 seconds, and two tokens
NOBODY_IN_TEST = 60  # rows, by run_experiment.sh


def sampled(path: str, fs: int, in_place: bool) -> tuple[Lengths, float]:
    """Lengths of a corpus, those of a sample repeated, and bytes of audio that stage 0 writes of it, as WAV.

    `in_place`: what is mono PCM at `fs` already is not written again. Tokens are characters: stage 0 counts tokens.
    """
    rows = (entry.row for entry in read_rows(path) if entry.row)
    lengths, seconds = [], 0.0
    for row in heapq.nsmallest(SAMPLE, rows, key=lambda row: hash_share(row["key"])):
        try:
            samples, rate, plain = audio.length(row["source"], **segment(row))
        except audio.AudioError as error:
            logging.warning("%s: %s", row["key"], error)
            continue
        lengths.append((samples * 100 // rate, len(row["target"])))
        seconds += 0 if in_place and plain and rate == fs else samples / rate
    if not lengths:
        raise UserError(f"{path}: no recording could be read; bash test_data_prep.sh says why")
    count = count_rows(path)
    return list(islice(cycle(lengths), count)), seconds / len(lengths) * count * 2 * fs


def read_sets(options: dict[str, str]) -> tuple[dict[tuple[str, str], Lengths], float, list[str]]:
    """Lengths of every set of every corpus, bytes of audio that stage 0 has written or, at most, will write, and the
    sets it has written."""
    sets, size, known, data = {}, 0.0, [], Path(options["EXP_OUTPUT"], "data")
    for corpus, split in ((corpus, split) for corpus in OPTION for split in SPLITS):
        path, name = data / corpus / f"{split}_formatted.jsonl", OPTION[corpus]
        if path.is_file():
            sets[corpus, split] = [(row["speech_length"], row["text_length"]) for row in read_jsonl(path)]
            known.append(f"{corpus}/{split}")
            continue
        given = options[f"{name}_{split.upper()}"] or options[f"{name}_DEV"]
        lengths, written = sampled(given, int(options["FRONTEND_FS"]), in_place=corpus != SIMULATED)
        if split != "train" and not options[f"{name}_TEST"]:  # stage 0 halves dev
            lengths, written = lengths[split == "test" :: 2], written / 2
        online = (corpus, split, options["ONLINE_CHANNEL"]) == (SIMULATED, "train", "1")
        sets[corpus, split], size = lengths, size + written * (not online)
    return sets, size + sum(file.stat().st_size for file in data.glob("*/audio*/**/*") if file.is_file()), known


def hours(lengths: Lengths) -> float:
    return sum(frames for frames, _ in lengths) / 360_000


def epoch(stage: int, sets: dict[tuple[str, str], Lengths], options: dict[str, str]) -> dict[str, Lengths]:
    """The rows of an epoch by corpus, as many as make_train_list.py takes."""
    main, other, share = (REAL, SIMULATED, "SIMULATED_SHARE") if stage == 3 else (SIMULATED, REAL, "REAL_SHARE")
    shares = {main: "1", other: options[share], WIDEBAND: options["WIDEBAND_REPLAY"],
              SILENCE: options["NO_SPEECH_SHARE"]}  # fmt: skip
    sets = sets | {(SILENCE, "train"): [NOBODY]}
    count = len(sets[main, "train"])
    rows = {corpus: cycle(sets[corpus, "train"]) for corpus in shares}
    return {corpus: list(islice(rows[corpus], round(float(share) * count))) for corpus, share in shares.items()}


def describe(name: str, model_dir: Path, options: dict[str, str], lengths: list[int]) -> tuple[dict, str, int]:
    """Of a stage with rows of so many frames and tokens: what it takes, in words; "full" or "mini"; the epochs."""
    from funasr.register import tables

    import nano.dataset  # noqa: F401  registers the sampler
    from nano.batch_size import gpu_bytes
    from nano.config import batch_frames, build_on_meta, effective, read_stage
    from nano.weights import checkpoint_bytes

    layers = [Path("conf", f"{name}.yaml"), Path(options["STAGE_OVERLAY_DIR"], f"{name}.yaml")]
    stage = read_stage([path for path in layers if path.is_file()])
    config = effective(stage, model_dir, int(options["FRONTEND_FS"]))
    model, dataset, train = build_on_meta(config), config["dataset_conf"], config["train_conf"]
    trained: Counter[str] = Counter()
    for key, parameter in model.named_parameters():
        trained["LoRA" if ".lora_" in key else key.split(".")[0]] += parameter.numel() * parameter.requires_grad
    # The sampler of training, on lengths in place of a dataset.
    rows = type("Lengths", (list,), {"get_source_len": list.__getitem__})(lengths)
    sampler = tables.batch_sampler_classes["BatchSampler"](rows, is_training=True, **dataset)["batch_sampler"]
    by_length, frames = batch_frames(dataset, max(lengths))
    disk = checkpoint_bytes(model, train["keep_nbest_models"], train["use_deepspeed"])
    size = f"{dataset['batch_size']:,} {'frames and tokens' if by_length else 'rows'}"
    return {
        "trained parameters": ", ".join(f"{module} {count / 1e6:.2f} M" for module, count in trained.items() if count),
        "batches an epoch": f"{sum(1 for _ in sampler):,} of {size}",
        "epochs, at most": str(train["max_epoch"]),
        "GPU memory, estimated": f"{gpu_bytes(model, config, frames, max(lengths)) / 2**30:.1f} GiB",
        "disk for checkpoints": f"{disk / 2**30:.2f} GiB",
    }, "full" if sum(p.numel() for p in model.parameters()) > 1e8 else "mini", train["max_epoch"]  # fmt: skip


def time_of(bench: Path, stage: str, size: str, audio_hours: float, mean_seconds: float) -> str:
    """Time for so much audio at the speed that bench/training.py found for a model of this size, or what finds it."""
    found = json.loads(bench.read_text("utf-8")) if bench.is_file() else []
    found = [row for row in found if (row["stage"], row["model"]) == (stage, size) and row["ours"]]
    if not found:
        return "not measured: `make bench`"
    row = min(found, key=lambda row: (row["corpus"] == "long") != (mean_seconds > 15))  # of 55 s, or of 1-15 s
    return f"{audio_hours / row['ours']:.2g} h on {'one' if size == 'full' else 'a thread of'} {row['machine']}"


def sections(options: dict[str, str], given: list[str]) -> Iterator[str]:
    """Yield the plan in Markdown."""
    (sets, size, known), output = read_sets(options), Path(options["EXP_OUTPUT"])
    done, source = len(known) == len(sets), f"unfiltered, hours from {SAMPLE} rows of a set"
    source += f", but those of stage 0 for {', '.join(known)}" if known else ""
    yield f"# What this experiment will take\n\nWritten by `make plan`. Everything goes to `{output}`.\n\n## Data\n"
    yield table("set | rows | hours", (("/".join(name), f"{len(lengths):,}", f"{hours(lengths):.2f}")
                                       for name, lengths in sets.items()))  # fmt: skip
    yield f"Rows and hours are {'those of stage 0' if done else source}."
    yield f"Stage 0 {'wrote' if done else 'writes, as WAV (FLAC takes about half),'} {size / 1e9:.3f} GB of audio."
    heard, bench = sum(hours(sets[name]) for name in sets if name[0] != WIDEBAND), output / "bench/stage0.json"
    if bench.is_file():
        facts = json.loads(bench.read_text("utf-8"))
        yield f"It takes {heard / facts['x_realtime_per_core']:.2g} core-hours on {facts['machine']}.\n"
    else:
        yield "Its time is not measured: `make bench`; `bash test_data_prep.sh` measures ten rows of each corpus.\n"
    if options["ONLINE_CHANNEL"] == "1":
        speed = "at a speed that is not measured: `make bench`"
        if (bench := output / "bench/simulation.json").is_file():
            x_realtime = json.loads(bench.read_text("utf-8"))["x_realtime_per_core"]
            speed = f"at {min(x_realtime['default_60s'], x_realtime['default_5s'])} audio-seconds a second"
        yield f"Training draws the channel of every utterance anew; a core does so {speed}.\n"

    named, bench, columns = output / "model/model_dir.txt", output / "bench/training.json", []
    folder = Path(named.read_text("utf-8").strip()) if named.is_file() else output / "model"
    there = all((folder / name).is_file() for name in ("config.yaml", "configuration.json"))
    for number, name in enumerate(STAGES, 1):
        rows = {corpus: lengths for corpus, lengths in epoch(number, sets, options).items() if lengths}
        total = sum(map(hours, rows.values()))
        columns.append({"rows an epoch": " + ".join(f"{len(rows[c]):,} {re.split('_[0-9]', c)[0]}" for c in rows),
                        "hours an epoch": f"{total:.2f}"})  # fmt: skip
        if there:
            lengths = [sum(pair) for part in rows.values() for pair in part]
            facts, model, epochs = describe(name, folder, options, lengths)
            time = time_of(bench, name, model, total * epochs, total * 3600 / len(lengths))
            columns[-1] |= facts | {"time of all epochs": time}
    yield "## Training\n"
    yield table(" | ".join(("", *STAGES)), ((title, *(column[title] for column in columns)) for title in columns[0]))
    if there:
        decoded = {"dev": 1 + len(options["ALPHAS"].split()), "test": 5}  # models: base and mixtures; base to final
        sets |= {(SILENCE, "test"): [NOBODY] * NOBODY_IN_TEST}
        total = sum(hours(lengths) * decoded.get(split, 0) for (_, split), lengths in sets.items())
        yield "Batches are those of one process; a GPU that is too small for them gets smaller ones. What several"
        yield "GPUs gain is not measured."
        yield f"Stage 4 decodes {total:.2f} hours: {time_of(bench, 'decoding', model, total, 0)}."
        # Mixtures and the final model, which stage 5 exports.
        yield f"Stages 4 and 5 keep {2 + len(options['ALPHAS'].split())} models of model.pt's size, more in fp32.\n"
    else:
        yield "Parameters, batches, memory, disk and time: run stage -1 first, which gets the model.\n"
    words = shlex.join(given)
    yield f"## Commands\n\n```bash\nbash run_experiment.sh -1 {words}\nbash test_data_prep.sh {words}"
    yield from (f"bash run_experiment.sh {stage} {words}" for stage in range(6))
    yield f"make status EXP_OUTPUT={shlex.quote(options['EXP_OUTPUT'])}\n```"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     usage="%(prog)s [--option value ...]", allow_abbrev=False)  # fmt: skip
    given = parser.parse_known_args()[1]
    os.chdir(ROOT)  # as run_experiment.sh does
    options = read_options(given)
    lists = [Path(options["EXP_OUTPUT"], "data", corpus, f"{split}_formatted.jsonl")
             for corpus in OPTION for split in SPLITS]  # fmt: skip
    if not all(path.is_file() for path in lists):
        read_options(given, stage=0)  # which is still to come and needs the corpora
    # What the environment sets is there now; who copies the commands elsewhere needs it said. A later word wins.
    outside = [name for name in ("CONFIG", *options) if name in os.environ]
    given = [word for name in outside for word in (f"--{name.lower()}", os.environ[name])] + given
    path = Path(options["EXP_OUTPUT"], "EXPERIMENT_EXECUTION_PLAN.md")
    text = "\n".join(line.rstrip(" ") for line in sections(options, given)) + "\n"
    with atomic_write(path) as file:
        file.write(text)
    print(text)
    logging.info("written to %s", path)


if __name__ == "__main__":
    run(main)
