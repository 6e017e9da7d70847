"""Mix an adapted model with its base, and export the result for people who do not have this repository.

Fine-tuning gains on telephone speech and forgets wideband speech. The straight line between the two sets of
weights often holds a model that keeps most of both (Wortsman et al., WiSE-FT, CVPR 2022).

    python local/final_model.py mix --base model/model.pt --adapted stage3/averaged.pt --alpha 0.5 --output final.pt
    python local/final_model.py export --model_dir MODEL --checkpoint final.pt \
        --summary exp_output/eval/summary.json --output exp_output/final_model

The exported folder loads in stock funasr.AutoModel: what the source folder's configuration.json names, model.pt with
LoRA folded, README.md with the lines that load it, MODEL_CARD.md made from the run.
"""

import argparse
import datetime
import json
import logging
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from common import UserError, file_hash, of_trainings, run
from nano import weights
from nano.config import flat_items

README = """# {name}

Fun-ASR-Nano adapted to telephone speech. MODEL_CARD.md says how well it does and how it was made.

```python
from funasr import AutoModel
model = AutoModel(model="{name}", disable_update=True, ctc_decoder=None)
print(model.generate("call.wav")[0]["text"])
```

Run it where {name}/ lies. It needs `pip install funasr=={funasr} "transformers>=5.2,<6" tiktoken` (5.0 and 5.1 garble
batches). `ctc_decoder=None` leaves out the branch for time stamps, which needs torchaudio and keeps FunASR from
decoding in batches.

- It hears audio at {fs} Hz. Upsample 8 kHz calls with a good resampler (soxr, SoX) rather than leave it to FunASR,
  whose filter depends on what is installed.
- It was trained on {style} text. `itn: {itn}` in config.yaml gives `generate` the prompt of the training.
- Hot words go into the prompt: `model.generate("call.wav", hotwords=["退款", "逾期"])`.
- vLLM: `from funasr.auto.auto_model_vllm import AutoModelVLLM`, then
  `AutoModelVLLM(model="{name}").generate(["call.wav"], itn={itn})`; it does not read `itn` from config.yaml.
  It takes the LLM's weights out of model.pt into Qwen3-0.6B-vllm/ on first use.
- Server with an OpenAI-style API (`pip install vllm fastapi uvicorn python-multipart`):
  `funasr-server --model-path {name} --device cuda`. It cuts calls with fsmn-vad, which it downloads.{server}
"""
# funasr/bin/_server_app.py of 1.4.16 passes hot words and language on, but no itn.
SERVER_NOTE = """
  With vLLM it asks for written text whatever config.yaml says, a prompt that this model was not trained with."""


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("mix", help="write (1 - alpha) * base + alpha * adapted, LoRA folded").add_argument
    add("--base", required=True, help="model.pt of the model folder training started from.")
    add("--adapted", required=True, help="averaged.pt of a training stage.")
    add("--alpha", required=True, type=read_alpha, metavar="ALPHA",
        help="0 is the base, 1 the adapted model; or the JSON file in which score.py --choose wrote it.")
    add("--output", required=True, help="Checkpoint to write.")
    add = commands.add_parser("export", help="write a folder that stock FunASR loads").add_argument
    add("--model_dir", required=True, type=Path, help="Model folder that training started from.")
    add("--checkpoint", required=True, type=Path, help="Weights of the final model.")
    add("--summary", required=True, type=Path, help="summary.json of the test sets.")
    add("--output", required=True, type=Path, help="Folder to write; one that is there is replaced.")
    add("--frontend_fs", type=int, default=16000, help="Rate trained with, Hz. Default: %(default)s.")
    add("--text_style", choices=("written", "spoken"), default="written",
        help="How the corpus is written, which chose the prompt. Default: %(default)s.")
    return parser.parse_args()


def read_alpha(text: str) -> float:
    """A number, or the "alpha" of a JSON file."""
    try:
        return float(json.loads(Path(text).read_text("utf-8"))["alpha"] if text.endswith(".json") else text)
    except (OSError, KeyError) as error:
        raise argparse.ArgumentTypeError(f"{text} is no choice of score.py: {error}") from error


def copy_configuration(source: Path, target: Path, frontend_fs: int, itn: bool) -> None:
    """Copy everything FunASR reads from a model folder except the weights; note frontend and prompt of training."""
    try:
        named = json.loads((source / "configuration.json").read_text("utf-8"))["file_path_metas"]
        config = yaml.safe_load((source / "config.yaml").read_text("utf-8"))
    except (OSError, ValueError, KeyError, yaml.YAMLError) as error:
        raise UserError(f"{source} is not a whole model folder ({error!r}); run stage -1 again") from error
    licences = {path.name for path in source.glob("LICEN[CS]E*")}
    names = {*flat_items(named).values(), *licences, "configuration.json"} - {"model.pt", "config.yaml"}
    for name in sorted(names):
        # One by one: copytree says of a full disk only that something could not be copied.
        for path in [source / name, *(source / name).rglob("*")]:
            if path.is_file():
                copy = target / path.relative_to(source)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, copy)
    # FunASR's default dither is noise in the features; training, decoding and scoring had none.
    config["frontend_conf"] |= {"fs": frontend_fs, "dither": 0.0}
    config["itn"] = itn  # AutoModel hands it to generate(); without it every model gets the prompt for written text
    (target / "config.yaml").write_text(yaml.safe_dump(config, allow_unicode=True, sort_keys=False), "utf-8")


def write_weights(model_dir: Path, checkpoint: Path, target: Path) -> None:
    """Write model.pt: the checkpoint folded, each tensor in the number format the source folder has it in."""
    source, state = weights.load_folded(model_dir / "model.pt"), weights.load_folded(checkpoint)
    missing = sorted(source.keys() - state.keys())
    if missing:
        raise UserError(f"{checkpoint} lacks {len(missing)} tensors of {model_dir}/model.pt, first {missing[0]}")
    # clone: FunASR hands the LLM to vLLM as safetensors, which refuses tied tensors that share their memory.
    state = {name: tensor.to(source.get(name, tensor).dtype).clone() for name, tensor in state.items()}
    weights.save_atomically(state, target / "model.pt")


def check_loads(folder: Path) -> None:
    """Load the folder as a user would and compare every tensor: FunASR leaves what it cannot load at random."""
    from funasr import AutoModel

    loaded = AutoModel(model=str(folder), disable_update=True, device="cpu", ncpu=torch.get_num_threads()).model
    state = weights.load_folded(folder / "model.pt")
    for name, tensor in loaded.state_dict().items():
        if name not in state or not torch.equal(tensor, state[name].to(tensor.dtype)):
            raise UserError(f"{folder}: FunASR did not load {name}; is the model folder complete? run stage -1 again")


def model_card(args: argparse.Namespace, summary: list[dict[str, Any]], model: Path) -> str:
    """A model card out of the scores and the run records of the training stages."""
    lines = [
        f"# Model card: {args.output.name}", "",
        f"Made {datetime.date.today()} from {args.model_dir}, funasr {version('funasr')}, torch {version('torch')}.",
        "Intended for Mandarin 8 kHz telephone calls upsampled to the frontend's rate; other use was not measured.",
        "", "## Scores on test sets (percent; intervals are 95 %)", "",
        "| test set | model | utterances | CER | from | to | WER | KWER | characters a minute of no speech |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in summary:
        if row["model"] in ("base", "final"):
            rates = [row[name] for name in ("cer", "cer_low", "cer_high", "wer", "kwer")]
            cells = ["-" if rate is None else f"{100 * rate:.2f}" for rate in rates]
            cells.append("-" if row["chars_per_minute"] is None else f"{row['chars_per_minute']:.1f}")
            lines.append(f"| {row['test_set']} | {row['model']} | {row['utterances']} | {' | '.join(cells)} |")
    lines += ["", "## How it was made", ""]
    choice = args.summary.parent / "interpolation.json"
    if choice.is_file():
        chosen = json.loads(choice.read_text("utf-8"))
        lines.append(f"- {chosen['alpha']:g} of the adapted model, the rest of the base: {chosen['reason']}.")
    for path in of_trainings(args.summary.parent.parent, "run.json"):
        record = json.loads(path.read_text("utf-8"))
        facts = ", ".join(f"{name} {record.get(name)}" for name in ("rows_per_epoch", "seed", "commit"))
        lines.append(f"- {path.parent.name}: {facts}")
    lines += [
        f"- model.pt, sha256 {file_hash(model)}…, is {args.checkpoint.name}; frontend at {args.frontend_fs} Hz",
        "", "## Limits", "",
        "- The numbers hold for calls like those of the test sets. Other lines, handsets, dialects and topics differ.",
        "- It can write text where nobody speaks (the last column) and can repeat itself; guard against both.", "",
    ]
    return "\n".join(lines)


def export(args: argparse.Namespace) -> None:
    itn = args.text_style == "written"
    try:
        summary = json.loads(args.summary.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{args.summary}: {error}; run stage 4 first") from error
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for stale in args.output.parent.glob(f".{args.output.name}.*.tmp"):  # gigabytes, of an export that was killed
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory(".tmp", f".{args.output.name}.", args.output.parent) as beside:
        part = Path(beside) / args.output.name
        part.mkdir()
        copy_configuration(args.model_dir, part, args.frontend_fs, itn)
        write_weights(args.model_dir, args.checkpoint, part)
        check_loads(part)
        readme = README.format(name=args.output.name, fs=args.frontend_fs, style=args.text_style, itn=itn,
                               funasr=version("funasr"), server="" if itn else SERVER_NOTE)
        (part / "README.md").write_text(readme, "utf-8")
        (part / "MODEL_CARD.md").write_text(model_card(args, summary, part / "model.pt"), "utf-8")
        if args.output.exists():
            shutil.rmtree(args.output)
        part.rename(args.output)
    logging.info("%s loads with funasr %s", args.output, version("funasr"))


def main() -> None:
    args = get_args()
    if args.command == "export":
        export(args)
        return
    if not 0.0 <= args.alpha <= 1.0:
        raise UserError(f"--alpha {args.alpha} is outside 0 to 1", code=2)
    state = weights.interpolate(weights.load_folded(args.base), weights.load_folded(args.adapted), args.alpha)
    weights.save_atomically({"state_dict": state, "lora": None}, args.output)
    logging.info("wrote %s", args.output)


if __name__ == "__main__":
    run(main)
