"""Training and decoding speed: FunASR's class, dataset and trainer beside this recipe's, turn by turn in one run.

    python bench/training.py --output exp_output/bench/training.json --table docs/performance.md

With a GPU the model has the size of Fun-ASR-Nano-2512, without one it is the miniature; weights are random, nothing is
downloaded. Corpora are noise: `long` as the plan's (mean 55 s, up to 120 s), `turns` of 1-15 s; a fifth of that on a
CPU. There, a second is one of CPU time on one thread, so that other work on the machine does not show. What fails is
null in the JSON and empty in the table, both written row by row; the rest goes on, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import json
import logging
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch._dynamo.utils import counters

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "local"), str(ROOT / "demo")]

import audio  # noqa: E402
import full_size  # noqa: E402
import training_run  # noqa: E402
from common import UserError, run, write_json, write_jsonl  # noqa: E402
from meter import clock, needed_flops  # noqa: E402
from training_run import Run, build_folder  # noqa: E402

FAILED: list[str] = []  # parts that did


def attempt(part: str, function: Callable, *args: Any) -> Any:
    """What the function returns, or None after a line that says how it failed, with its memory freed."""
    try:
        return function(*args)
    except Exception as error:  # whatever it is, what else is measured must not be lost for it
        expected = isinstance(error, (UserError, torch.cuda.OutOfMemoryError))
        message = " ".join(f"error: {part}: {type(error).__name__}: {error}".split())
        logging.error("%s", message, exc_info=not expected)
    FAILED.append(part)
    gc.collect()
    with contextlib.suppress(RuntimeError):  # of a GPU that answers no more
        torch.cuda.empty_cache()
    return None


def write_corpus(folder: Path, name: str, scale: float, seconds: float) -> Path:
    """Noise with random text, 3 characters a second, `seconds` in all; 48 files, each in several rows."""
    rng = np.random.default_rng(0)
    draws = {"long": 120 * rng.beta(2.2, 2.6, 48).clip(0.02, 1), "turns": np.exp(rng.uniform(0, math.log(15), 48))}
    lengths = draws[name]
    files = []
    for number, length in enumerate(scale * lengths):
        path = folder / name / f"{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        audio.write(path, (0.1 * rng.standard_normal(int(16000 * length))).astype(np.float32), 16000)
        files.append((path, length))
    rows: list[dict[str, Any]] = []
    for number in range(math.ceil(seconds / (scale * lengths).sum()) * 48):
        path, length = files[number % 48]
        text = "".join(rng.choice(list(full_size.ALPHABET), max(1, int(3 * length))))
        user = f"语音转写：<|startofspeech|>!{path}<|endofspeech|>"
        messages = [("system", "You are a helpful assistant."), ("user", user), ("assistant", text)]
        rows.append({
            "key": f"{name}{number}", "messages": [{"role": role, "content": content} for role, content in messages],
            "speech_length": int(100 * length), "text_length": len(text),
        })  # fmt: skip
    write_jsonl(folder / f"{name}.jsonl", rows)
    return folder / f"{name}.jsonl"


def measure(run: Run, tokens: int, seconds: float, number: int, least: int | None = None) -> dict[str, float]:
    """One round: batches of all lengths, others for another number, after two that do not count.

    6 and 3 for each of the loader's workers at least: the first of all workers are made at once, and a few steps do not
    show whether the loader keeps up.
    """
    graphs = counters["stats"]["unique_graphs"]
    meter = run.epoch(tokens, seconds, least or max(6, 3 * run.kwargs["dataset_conf"]["num_workers"]), number)
    return {
        "compiled": counters["stats"]["unique_graphs"] - graphs,
        "rate": meter.seconds / meter.elapsed, "loader_share": meter.waited / meter.elapsed,
        "padding_share": 1 - meter.frames / meter.padded, "batch_seconds": meter.seconds / meter.steps,
        "flops": meter.flops / meter.elapsed, "peak_gib": meter.peak_gib,
    }  # fmt: skip


def largest_batch(run: Run, most: int) -> int:
    """Frames and tokens that fill nine tenths of the GPU's memory, found with batches of the longest utterance."""
    if run.device == "cpu":
        return most
    tokens, total = 24000, torch.cuda.mem_get_info()[1] - run.others()
    peak = run.probe(tokens)
    while peak is not None and 2 * tokens <= most:
        larger = run.probe(2 * tokens)
        if larger is None or larger > 0.9 * total:
            slope = ((larger or total) - peak) / tokens
            return int(tokens + max(0.0, 0.9 * total - peak) / slope * 0.9)
        tokens, peak = 2 * tokens, larger
    return tokens


def same_loss(runs: dict[str, Run], device: str) -> dict[str, float]:
    """Both models' losses on one batch with the same weights; UserError when they differ by more than rounding."""
    runs["ours"].model.load_state_dict(runs["stock"].model.state_dict(), strict=False)
    batch = runs["stock"].sample()
    losses = {kind: run.loss(batch) for kind, run in runs.items()}
    limit = 5e-3 if device == "cuda" else 1e-4
    if not abs(losses["ours"] - losses["stock"]) <= limit * losses["stock"]:
        raise UserError(f"{runs['ours'].stage}: losses {losses} of the same batch differ by more than {limit:.2%}")
    return losses


def batch_size(name: str, run: Run, args: argparse.Namespace) -> int:
    """Frames and tokens of a variant's batches; on a GPU, ours is compiled on the way."""
    if name == "stock":
        return 6000
    if name == "stock_largest":
        return largest_batch(run, args.most_tokens)
    tokens = run.fitting()
    if args.device == "cpu":
        return min(tokens, args.most_tokens)
    measure(run, tokens, 0, 0, least=6)  # what is compiled for a batch of another kind shall not be in the times
    return tokens


def bench_stage(stage: str, corpus: Path, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """The row of one stage on one corpus: ours, stock at its default batch and at its largest; None for what fails."""
    title = f"{corpus.stem} {stage}"
    runs = {kind: Run(kind, stage, folder, corpus, args.work, args.device) for kind in ("stock", "ours")}
    losses = attempt(f"{title} losses", same_loss, runs, args.device)
    tokens: dict[str, int] = {}
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in ("ours", "stock", "stock_largest")}

    def one_round(name: str, number: int) -> None:
        run = runs[name.partition("_")[0]]
        if name not in tokens:  # found in its turn, so that no search stands before figures that do not need it
            tokens[name] = batch_size(name, run, args)
        rounds[name].append(measure(run, tokens[name], args.round_seconds, number))
        logging.info("%s %s, round %d: %s", title, name, number, {
            key: round(value, 3) for key, value in rounds[name][-1].items() if value is not None
        })  # fmt: skip

    for number in range(1, args.rounds + 1):
        for name in rounds:
            attempt(f"{title} {name}", one_round, name, number)
    row: dict[str, Any] = {"stage": stage, "corpus": corpus.stem, "losses": losses, "details": {}}
    row |= dict.fromkeys(rounds)
    for name, results in rounds.items():
        if not results:
            continue
        middle = {key: statistics.median(r[key] for r in results) for key in results[0] if results[0][key] is not None}
        row[name] = round(middle["rate"], 1)
        row["details"][name] = {
            "tokens": tokens[name], **{key: round(value, 4) for key, value in middle.items() if key != "flops"},
            "mfu": round(middle["flops"] / args.peak_flops, 4), "rates": [round(r["rate"], 1) for r in results],
        }  # fmt: skip
    mine = row["details"].get("ours", {})
    if args.profile and mine:
        path = args.work / f"profile.{corpus.stem}.{stage}.txt"
        attempt(f"{title} profile", runs["ours"].profile, tokens["ours"], path)
    return row | {"peak_gib": mine.get("peak_gib"), "mfu": mine.get("mfu")} | ratios(row)


def ratios(row: dict[str, Any]) -> dict[str, float | None]:
    """Medians over rounds are compared; the spread of the rounds is in `details`."""
    ours, stocks = row["ours"], {"ratio": row["stock"], "ratio_largest": row["stock_largest"]}
    return {name: round(ours / stock, 2) if ours and stock else None for name, stock in stocks.items()}


def bench_decoding(corpus: Path, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Greedy decoding, 3 tokens a second: one utterance at a time as FunASR does with a CTC branch, beside batches."""
    from decode import utterance
    from nano import inference

    class Stock(inference.Recogniser):
        """FunASR's own model class and features, one utterance at a time."""

        def __init__(self, folder: Path, device: str, dtype: str):
            from funasr import AutoModel

            self.dtype, self.most_samples = dtype, sys.maxsize
            self.auto_model = AutoModel(
                model=str(folder), device=device, disable_update=True, ncpu=1, ctc_decoder=None,
                frontend_conf={"dither": 0.0}, llm_conf={"llm_dtype": dtype},
            )  # fmt: skip
            self.fs = self.auto_model.kwargs["frontend"].fs

        def decode(self, messages: list, limits: list[int], **options: Any) -> list[str]:
            infer = self.auto_model.model.inference_llm
            return [infer([given], key=["utterance"], max_length=limit, **options)[0][0]["text"]
                    for given, limit in zip(messages, limits, strict=True)]

    conf = inference.read_conf(ROOT / "conf" / "decode.yaml")
    rows = [json.loads(line) for line in corpus.read_text("utf-8").splitlines()]
    recognisers = {}
    for name, cls, classes in (("stock", Stock, training_run.STOCK), ("ours", inference.Recogniser, training_run.OURS)):
        training_run.register(classes)
        with training_run.RandomOnGPU():
            recognisers[name] = cls(folder, conf["device"], conf["dtype"])
        # Noise of random weights does not end by itself: every hypothesis runs to its limit.
        recognisers[name].auto_model.model.llm.generation_config.eos_token_id = None
    many = list(inference.batches(rows[: 4 * conf["batch_size"]], conf["batch_size"], conf["batch_seconds"]))
    # Two utterances of the middle for FunASR, for ours a batch of the longer and one of the shorter half.
    typical = sorted(rows, key=lambda row: row["speech_length"])[len(rows) // 2 :][:2]
    work = {"stock": [[row] for row in typical], "ours": [many[len(many) // 4], many[3 * len(many) // 4]]}
    rates: dict[str, list[float]] = {"stock": [], "stock_largest": [], "ours": []}

    def one_round(name: str, number: int) -> None:
        torch.backends.cuda.enable_cudnn_sdp(name == "stock")
        began = clock(args.device)
        for batch in work[name]:
            recognisers[name].transcribe([utterance(row, 16000) for row in batch], 512, 3.0)
        seconds = sum(row["speech_length"] for batch in work[name] for row in batch) / 100
        rates[name].append(seconds / (clock(args.device) - began))
        logging.info("%s decoding %s, round %d: %.1f", corpus.stem, name, number, rates[name][-1])

    for number in range(1, args.rounds + 1):
        for name in work:
            attempt(f"{corpus.stem} decoding {name}", one_round, name, number)
    middle = {name: round(statistics.median(values), 1) if values else None for name, values in rates.items()}
    return {"stage": "decoding", "corpus": corpus.stem, **middle, **ratios(middle), "peak_gib": None, "mfu": None,
            "details": {"batch_size": conf["batch_size"], "rates": rates}}  # fmt: skip


def matmul_flops(device: str) -> float:
    """Operations a second of a large matrix product, bf16 on a GPU, fp32 on a CPU: what the MFU is a share of."""
    size, dtype = (8192, torch.bfloat16) if device == "cuda" else (1024, torch.float32)
    a = torch.randn(size, size, device=device, dtype=dtype)
    best = 0.0
    for _ in range(5):
        began = clock(device)
        for _ in range(4):
            a @ a
        best = max(best, 8 * size**3 / (clock(device) - began))
    return best


def table(rows: list[dict[str, Any]], facts: dict[str, Any]) -> str:
    """docs/performance.md's table in Markdown."""
    head = ("corpus", "stage", "stock", "stock, largest batch", "ours", "ratio", "to largest", "batch s",
            "loader share", "padding share", "MFU", "peak GiB")  # fmt: skip
    lines = [" | ".join(head), " | ".join("---" for _ in head)]
    for row in rows:
        part = [row["details"].get(name, {}) for name in ("stock", "stock_largest", "ours")]

        def three(key: str, form: str, part=part) -> str:
            cells = [format(p[key], form) if key in p else "-" for p in part]
            return " / ".join(cells) if any(key in p for p in part) else ""

        cells = [row["corpus"], row["stage"], row["stock"], row["stock_largest"], row["ours"], row["ratio"],
                 row["ratio_largest"], three("batch_seconds", ".0f"), three("loader_share", ".0%"),
                 three("padding_share", ".0%"), three("mfu", ".1%"), three("peak_gib", ".1f")]  # fmt: skip
        lines.append(" | ".join("" if cell is None else str(cell) for cell in cells))
    unit = "second" if facts["model"] == "full" else "second of CPU time, one thread"
    return (f"{facts['machine']}, {facts['model']} model, commit {facts['commit']}, "
            f"{', '.join(f'{name} {number}' for name, number in facts['versions'].items())}; "
            f"audio-seconds per {unit}, medians of {facts['rounds']} rounds\n\n"
            + "\n".join(f"| {line} |" for line in lines) + "\n")  # fmt: skip


def write(args: argparse.Namespace, rows: list[dict[str, Any]], text: str) -> None:
    """Rows as JSON, and as the table of --table's file."""
    write_json(args.output, rows)
    if args.table:
        before, mark, after = args.table.read_text("utf-8").partition("<!-- table -->\n")
        rest = after.partition("<!-- end -->\n")
        args.table.write_text(f"{before}{mark}{text}<!-- end -->\n{rest[2]}", "utf-8")


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("exp_output/bench/training.json"), help="Results, JSON.")
    parser.add_argument("--table", type=Path, help="Markdown file whose table is exchanged.")
    parser.add_argument("--work", type=Path, default=Path("exp_output/bench/work"), help="Model folder and audio.")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3, 4], help="Stages to time; 4 is decoding.")
    parser.add_argument("--corpora", nargs="+", default=["long", "turns"], choices=["long", "turns"])
    parser.add_argument("--rounds", type=int, default=2, help="Turns each variant gets. Default: %(default)s.")
    parser.add_argument("--round_seconds", type=float, help="Audio of a turn. Default: 6000 on a GPU, 30 on a CPU.")
    parser.add_argument("--most_tokens", type=int, help="No larger batch is tried. Default: 400000, on a CPU 12000.")
    parser.add_argument("--profile", action="store_true", help="Also write where our time goes to --work.")
    return parser.parse_args()


def main() -> None:
    args = get_args()
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    gpu = args.device == "cuda"
    args.round_seconds = args.round_seconds or (6000 if gpu else 30)
    args.most_tokens = args.most_tokens or (400000 if gpu else 12000)
    if not gpu:
        torch.set_num_threads(1)
    folder = build_folder(args.work / "model", full=gpu)
    args.peak_flops = matmul_flops(args.device)
    command = ["git", "-C", ROOT, "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False)
    facts = {
        "machine": torch.cuda.get_device_name() if gpu else f"{platform.machine()} CPU, {os.cpu_count()} cores",
        "model": "full" if gpu else "mini", "commit": commit.stdout.strip() or None, "rounds": args.rounds,
        "versions": {name: version(name) for name in ("funasr", "torch", "transformers")},
        "matmul_tflops": round(args.peak_flops / 1e12, 3), "counted": needed_flops.__doc__,
    }  # fmt: skip
    rows: list[dict[str, Any]] = []
    for name in args.corpora:
        corpus = write_corpus(args.work, name, 1.0 if gpu else 0.2, (30 if gpu else 9) * args.most_tokens / 100)
        for number in args.stages:
            began = time.monotonic()
            bench = [*(functools.partial(bench_stage, stage) for stage in full_size.STAGES), bench_decoding][number - 1]
            row = attempt(f"{name} stage {number}", bench, corpus, folder, args)
            if row:
                rows.append({**facts, **row, "took_seconds": round(time.monotonic() - began, 1)})
                write(args, rows, table(rows, facts))  # what is measured is kept, whatever becomes of the next one
    print(table(rows, facts))
    if FAILED:
        raise UserError(f"failed: {', '.join(FAILED)}; see the lines above")


if __name__ == "__main__":
    run(main)
