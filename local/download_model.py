"""Stage -1: find or download the pretrained model, check that nothing of it is missing, write down where it is.

    python local/download_model.py --model FunAudioLLM/Fun-ASR-Nano-2512 --output exp_output/model
    python local/download_model.py --model /data/models/Fun-ASR-Nano-2512 --output exp_output/model

Writes OUTPUT/model_dir.txt (the folder's absolute path) and OUTPUT/check.json (parameters by module, CTC present
or not). FunASR itself starts from random weights, with a warning at most, when a file or a tensor is missing.
"""

import argparse
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import UserError, atomic_write, first_line, run, write_json
from nano import weights
from nano.config import build_on_meta, effective

HUBS = {"ModelScope": "https://www.modelscope.cn", "Hugging Face": "https://huggingface.co"}


def get_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="A folder, or an id on ModelScope or Hugging Face.")
    parser.add_argument("--output", type=Path, required=True, help="Folder for model_dir.txt and check.json.")
    return parser.parse_args()


def find_model(model: str) -> dict[str, Any]:
    """What check_model found of a model: of its folder, of the first whole one in a cache of a hub's, or downloaded."""
    folder = Path(model).expanduser()
    if folder.is_dir():
        return check_model(folder.resolve())
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        raise UserError(f"--model {model} is neither a folder nor an id of the form owner/name", code=2)
    there = (f.resolve() for f in cached_folders(model) if (f / "config.yaml").is_file() and (f / "model.pt").is_file())
    damaged = []
    for folder in list(dict.fromkeys(there)) or [download(model)]:
        logging.info("found %s", folder)
        try:
            return check_model(folder)
        except UserError as error:
            damaged.append(UserError(f"{error}. Remove {folder} before, or it is found again", error.code))
    raise damaged[0]


def cached_folders(model: str) -> Iterator[Path]:
    """Every folder in which a release of modelscope or huggingface_hub would have put this model."""
    owner, name = model.split("/")
    # MODELSCOPE_CACHE has been the cache itself or its parent, and dots in names were written as ___ up to 1.37.
    roots = [os.environ.get("MODELSCOPE_CACHE"), "~/.cache/modelscope"]
    for root in [Path(root).expanduser() for root in roots if root]:
        for layout in ("hub", "hub/models", "models", ""):
            for written in dict.fromkeys((name, name.replace(".", "___"))):
                yield root / layout / owner / written
            yield from sorted((root / layout / f"{owner}--{name}" / "snapshots").glob("*"))
    hub = Path(os.environ.get("HF_HOME", "~/.cache/huggingface")).expanduser() / "hub"
    hub = Path(os.environ.get("HF_HUB_CACHE", hub)).expanduser()
    cache = hub / f"models--{owner}--{name}"
    main = (cache / "refs/main").read_text("utf-8").strip() if (cache / "refs/main").is_file() else ""
    yield from sorted((cache / "snapshots").glob("*"), key=lambda snapshot: (snapshot.name != main, snapshot))


def download(model: str) -> Path:
    """Download from ModelScope, else from Hugging Face; raise UserError with the way round where neither answers."""
    failures = []
    for hub, address in HUBS.items():
        # Without a network the hubs' own clients retry for half a minute before they say so.
        if not reachable(address):
            failures.append(f"{hub} does not answer")
            continue
        logging.info("downloading %s from %s, about 2 GB", model, hub)
        if hub == "ModelScope":
            from modelscope import snapshot_download
        else:
            from huggingface_hub import snapshot_download
        try:
            return Path(snapshot_download(model)).resolve()
        except Exception as error:  # of network, id, access or a hub that is busy: each client has its own
            failures.append(f"{hub}: {first_line(error)[:200]}")
    name = model.split("/")[1]
    cache = Path(os.environ.get("MODELSCOPE_CACHE") or "~/.cache/modelscope").expanduser() / "models" / model
    raise UserError(
        f"{model} is in no local cache and cannot be downloaded ({'; '.join(failures)}). On a connected machine run "
        f"`modelscope download --model {model} --local_dir {name}`, then copy that folder to {cache} "
        f"on this machine, or anywhere and give --model FOLDER"
    )


def reachable(address: str) -> bool:
    """Whether an address answers within seconds."""
    import requests

    try:
        requests.head(address, timeout=5, allow_redirects=False)
    except requests.RequestException:
        return False
    return True


def check_model(folder: Path) -> dict[str, Any]:
    """Check a model folder against the model its config describes; return what check.json holds.

    Raises UserError for a missing file, a tokenizer or checkpoint that does not load, a missing or misshapen tensor.
    """
    for name in ("config.yaml", "configuration.json", "model.pt"):
        if not (folder / name).is_file():
            raise UserError(f"{folder} has no {name}: not a whole Fun-ASR-Nano folder; download it again")
    config = effective({}, folder, 16000)
    check_tokenizer(config["llm_conf"]["init_param_path"])
    state, lora = weights.load(folder / "model.pt")
    if lora is not None:
        raise UserError(f"{folder}/model.pt holds LoRA tensors; fold them first (local/final_model.py mix --alpha 1)")
    model = build_on_meta(config)
    missing, misshapen = weights.misfits(model, state)
    needed = [name for name in missing if not name.startswith(weights.CTC_PREFIXES)]
    for names, what in ((needed, "lacks"), (misshapen, "has in another shape than config.yaml says")):
        if names:
            raise UserError(f"{folder}/model.pt {what} {len(names)} tensors, first {names[0]}; download it again")
    return {
        "model_dir": str(folder),
        "ctc": bool(config.get("ctc_decoder")) and missing == needed,
        "parameters": {name: sum(p.numel() for p in module.parameters()) for name, module in model.named_children()},
    }


def check_tokenizer(folder: str) -> None:
    """Load the LLM's tokenizer from its folder alone, with the file that stage 0 counts by."""
    from transformers import AutoTokenizer

    try:
        # Where files are missing transformers makes a Qwen2Tokenizer that knows no text.
        if not AutoTokenizer.from_pretrained(folder, local_files_only=True).encode("1"):
            raise ValueError("it knows no text; files of it are missing")
        os.stat(os.path.join(folder, "tokenizer.json"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # by file missing or damaged
        raise UserError(f"{folder}: the tokenizer does not load ({first_line(error)[:160]}); "
                        "download the model again") from error


def main() -> None:
    args = get_args()
    found = find_model(args.model)
    write_json(args.output / "check.json", found)
    with atomic_write(args.output / "model_dir.txt") as file:
        file.write(found["model_dir"] + "\n")
    millions = ", ".join(f"{name} {count / 1e6:.2f} M" for name, count in found["parameters"].items())
    logging.info("%s: every tensor is there; %s", found["model_dir"], millions)
    if not found["ctc"]:
        logging.warning("no CTC weights (the Hugging Face release has none): no time stamps, stage 2 trains CTC anew")


if __name__ == "__main__":
    run(main)
