"""What the documents name exists, what exists is named, both languages name the same, and their commands run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

import audio
from common import write_jsonl
from corpus import OPTIONAL
from corpus_filter import LIMITS
from mini import ALPHABET, QUICK, ROOT, STAGES, make_model
from nano.config import ACCEPTED
from prepare_training_data import format_row, get_args
from score import Scored
from sounds import murmur
from telephone.channel import apply, draw, load_config

DOCUMENTS = sorted(path for pattern in ("*.md", "docs/*.md", "data/*.md") for path in ROOT.glob(pattern))
PAIRS = [(path.with_name(path.name.replace("_zh", "")), path) for path in DOCUMENTS if path.stem.endswith("_zh")]
SOURCES = [path for pattern in ("local/**/*", "demo/*", "bench/*", "conf/**/*", "*.sh", "Makefile", "*.txt", "*.toml")
           for path in ROOT.glob(pattern) if path.is_file() and path.suffix != ".pyc"]  # fmt: skip
SOURCE = "\n".join(path.read_text("utf-8") for path in SOURCES)
OPTIONS = set(re.findall(r"^([A-Z][A-Z0-9_]*)=", (ROOT / "conf/experiment.conf").read_text("utf-8"), re.MULTILINE))
# Variables of make, of setup.sh and of other programs.
VARIABLES = OPTIONS | {"WHEELS", "TORCH", "PLATFORM", "AUDIO", "HOTWORDS", "TRANSCRIBED", "MODEL_DIR",
                       "MODELSCOPE_CACHE", "CONFIG"}
TARGETS = {target for line in re.findall(r"^([a-z0-9 -]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
           for target in line.split()}  # fmt: skip
FLAGS = {f"--{option.lower()}" for option in OPTIONS} | set(re.findall(r'"(--[a-z][a-z0-9_]+)"', SOURCE))
# What FunASR, its configuration, pip and docker call it.
FOREIGN = {"init_param", "file_path_metas", "lsm_weight", "freeze_layer_num", "effective_save_name_excludes",
           "batch_size_token_max", "--index-url", "--shm-size", "--ipc"}  # fmt: skip


def code(path: Path) -> list[str]:
    """What a document sets in code: inline and in blocks."""
    text = path.read_text("utf-8")
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    return blocks + re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def names(path: Path) -> dict[str, set[str]]:
    """Paths of the repository, options, make targets, flags and other names that a document has in code."""
    text = "\n".join(code(path))
    option = r"(?<![\w\"$-])([A-Z][A-Z0-9]*_[A-Z0-9_]+|ALPHAS|MODEL|SEED|KEYWORDS|CONFIG)(?=[=\s`,;]|$)"
    paths = r"(?<![\w./-])((?:local|demo|conf|tests|bench|docs|data)/[\w./-]*\w|(?:run_experiment|test_data_prep)\.sh)"
    return {
        "paths": set(re.findall(paths, text)),
        "options": set(re.findall(option, text)),
        "targets": set(re.findall(r"(?:^|[^\w-])make ([a-z][a-z0-9-]*)", text)),
        "flags": set(re.findall(r"(?<![\w-])(--[a-z][a-z_-]+)", text)),
        "words": set(re.findall(r"(?<![\w/.-])([a-z][a-z0-9]*(?:_[a-z0-9]+)+)(?![\w/-]|\.\w)", text)),
    }


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_everything_a_document_names_exists(path):
    named = names(path)
    missing = {name for name in named["paths"] if not (ROOT / name).exists() and "*" not in name}
    assert not {name for name in missing if not list(ROOT.glob(name + "*"))}
    assert named["options"] <= VARIABLES, named["options"] - VARIABLES
    assert named["targets"] <= TARGETS, named["targets"] - TARGETS
    assert named["flags"] <= FLAGS | FOREIGN, named["flags"] - FLAGS
    assert not {word for word in named["words"] - FOREIGN if not re.search(rf"\b{word}\b", SOURCE)}
    # A key of a training YAML, told by its section, is one that something reads.
    keys = set(re.findall(r"\b((?:dataset|optim|train|scheduler|specaug|llm)_conf\.\w+)", "\n".join(code(path))))
    assert keys <= ACCEPTED | {f"train_conf.{word}" for word in FOREIGN} | {"optim_conf.lrr"}, keys - ACCEPTED


def test_every_make_target_is_in_the_readme():
    from_to = {f"stage{number}" for number in range(1, 5)}  # `make stage0` to `make stage5`
    assert TARGETS - names(ROOT / "README.md")["targets"] - from_to == {"help", "clean"}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text("utf-8")):
        assert (path.parent / target).exists(), target


def commands(text: str) -> str:
    return re.sub(r"[ \t]*#[^!\n].*", "", text)


def shape(path: Path) -> list[str]:
    """Headings, rows of tables and blocks of a document in their order, blocks with their commands."""
    found = re.findall(r"^(?:(##?) |(\|)|(<!-- runnable -->)|```(\w+\n.*?)```)", path.read_text("utf-8"), re.M | re.S)
    return [commands("".join(part)) for part in found]


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0].name)
def test_both_languages_name_the_same_and_have_the_same_tables_and_commands(pair):
    english, chinese = map(names, pair)
    assert english == chinese
    assert shape(pair[0]) == shape(pair[1])


def test_every_requirement_is_in_the_readmes_table_of_dependencies():
    required = {re.split(r"[^\w.-]", line)[0].lower() for path in ROOT.glob("requirements*.txt")
                for line in path.read_text("utf-8").splitlines() if re.match(r"\w", line)}  # fmt: skip
    for path in (ROOT / "README.md", ROOT / "README_zh.md"):
        assert required <= set(re.findall(r"[a-z][\w.-]*", path.read_text("utf-8").lower())), path


def column(text: str, heading: str) -> set[str]:
    """The code in the first column of the table whose heading row begins so."""
    rows = text.partition(f"| {heading} |")[2].partition("\n\n")[0].splitlines()[2:]
    return {name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])}


def test_the_data_page_has_every_reason_code_and_no_other():
    source = "\n".join(path.read_text("utf-8") for path in (ROOT / "local").glob("*.py"))
    found = re.findall(r'AudioError\("(\w+)"|Entry\(.*None, "(\w+)"|return "(duplicate_\w+|leakage)"', source)
    rules = yaml.safe_load((ROOT / "conf/data_filter.yaml").read_text("utf-8"))["rules"]
    given = {name for codes in found for name in codes if name} | {rule["reason"] for rule in rules}
    given |= {reason for reason, *_ in LIMITS.values()}
    assert column((ROOT / "data/README.md").read_text("utf-8"), "reason") - {"wav.scp"} == given


def test_the_specification_has_every_field_of_a_formatted_row(tmp_path):
    text = (ROOT / "docs/TRAINING_DATA_SPEC.md").read_text("utf-8").partition("## A formatted row")[2]
    audio.write(tmp_path / "a.wav", np.zeros(1600), 16000)
    row = dict.fromkeys(OPTIONAL, "x") | {"key": "k", "source": str(tmp_path / "a.wav"), "target": "好", "channel": {}}
    args = get_args(["convert", "--input", "in.jsonl", "--output", "out.jsonl"])
    assert column(text, "field") == format_row(row, tmp_path, 0.0, args).keys()


def test_the_specification_has_every_field_of_a_simulated_rows_channel():
    text = (ROOT / "docs/TRAINING_DATA_SPEC.md").read_text("utf-8").partition("## `channel`")[2]
    config, found = load_config(ROOT / "conf/telephone_channel.yaml", no_babble=True), set()
    noise = np.random.default_rng(0).normal(0, 0.05, 4000).astype(np.float32)
    for number in range(600):
        plan = draw(config, 0, f"u{number}")
        if number < 60:
            apply(plan, noise, 16000, 16000)
        found |= {f"{name}.{inner}" if inner else name for name, value in plan.items()
                  for inner in (value if isinstance(value, dict) else [""])}  # fmt: skip
    # Of babble, for which the corpus is too small here, and of calls on which nobody speaks.
    assert column(text, "field") == found | {"noise.sources", "probe"}


def test_the_specification_has_every_field_of_the_summary():
    text = (ROOT / "docs/TRAINING_DATA_SPEC.md").read_text("utf-8").partition("## Transcripts and scores")[2]
    row = {"key": "k", "hyp": "", "ref": "好", "seconds": 1.0, "model": "base", "test_set": "real_test"}
    assert column(text, "field") == Scored([row], {}, False).summary(None, 9).keys()


def test_messages_that_the_diagnosis_quotes_are_said():
    text = (ROOT / "docs/DIAGNOSIS.md").read_text("utf-8")
    quoted = {part.strip() for row in re.findall(r"^\| (?!symptom)([^|]+) \|", text, re.M)
              for message in re.findall(r"`([^`]+)`", row) for part in message.split("…")}  # fmt: skip
    foreign = {"init_param does not exist", "import torchaudio"}  # what FunASR and Python say
    assert not {part for part in quoted - foreign if part.removeprefix("exp_output/") not in SOURCE}


def test_helpers_that_messages_name_exist():
    for path in (ROOT / "local").rglob("*.py"):
        for name in re.findall(r"\blocal/[\w/]+\.py\b", path.read_text("utf-8")):
            assert (ROOT / name).is_file(), f"{path.name}: {name}"


# --- the commands


@pytest.mark.parametrize("script", ["run_experiment.sh", "test_data_prep.sh", "setup.sh", "bench/gpu.sh"])
def test_a_script_that_is_asked_for_help_gives_it_and_does_nothing_else(tmp_path, script):
    for path in (script, "local/parse_options.sh", "conf/experiment.conf"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    before = sorted(tmp_path.rglob("*"))
    done = subprocess.run(["bash", script, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and f"bash {script}" in done.stdout and not done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def speak(folder: Path, name: str, rate: int, count: int) -> list[dict]:
    rows = []
    for number in range(count):
        audio.write(folder / f"{name}{number}.wav", murmur(1 + number % 5 / 5, rate, [rate, number, len(name)]), rate)
        text = ALPHABET[number % 9 : number % 9 + 4]
        rows.append({"key": f"{name}{number}", "source": f"{name}{number}.wav", "target": text, "speaker": name})
    return rows


@pytest.mark.full
def test_the_commands_of_readme_and_quickstart_run_one_after_the_other(tmp_path):
    """In a copy of the repository, with a corpus of noise and a model of a few thousand parameters."""
    copy, corpora = tmp_path / "clone", tmp_path / "corpora"
    unwanted = shutil.ignore_patterns(".venv", ".git", "exp_output", "__pycache__", ".*_cache", "wheels")
    shutil.copytree(ROOT, copy, ignore=unwanted)
    (copy / ".venv").symlink_to(sys.prefix)
    for name, rate in (("wenetspeech", 16000), ("calls", 8000)):
        for split, count in (("train", 16), ("dev", 8)):
            rows = speak(corpora / name, split, rate, count)
            people = [row | {"speaker": f"{split}{number % 4}"} for number, row in enumerate(rows)]
            write_jsonl(corpora / name / f"{split}.jsonl", people)
    (corpora / "calls/keywords.txt").write_text("订单\n")
    shutil.copy(corpora / "calls/dev1.wav", copy / "call.wav")
    for stage in STAGES:
        (corpora / f"{stage}.yaml").write_text(yaml.safe_dump(QUICK))
    clean = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment = clean | {"MODEL": str(make_model(tmp_path / "base")), "STAGE_OVERLAY_DIR": str(corpora)}
    # What a reader would put in, and a tail that ends.
    replaced = {"=/corpora/": f"={corpora}/", "=/calls/": f"={corpora}/calls/", "tail -f": "tail -n 1"}
    blocks, marked = 0, re.compile(r"<!-- runnable -->\n```bash\n(.*?)```", re.DOTALL)
    for document in ("README.md", "docs/QUICKSTART.md"):
        for block in marked.findall((copy / document).read_text("utf-8")):
            for given, here in replaced.items():
                block = block.replace(given, here)
            done = subprocess.run(["bash", "-euc", block], cwd=copy, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, f"{document}:\n{block}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
            blocks += 1
    assert blocks >= 6
    assert (copy / "exp_output/report/index.html").is_file() and list((copy / "exp_output/transcribed").iterdir())
