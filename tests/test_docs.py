"""What the documents name exists, and both languages name the same."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(path for pattern in ("*.md", "docs/*.md", "data/*.md") for path in ROOT.glob(pattern))
PAIRS = [(path.with_name(path.name.replace("_zh", "")), path) for path in DOCUMENTS if path.stem.endswith("_zh")]
OPTIONS = set(re.findall(r"^([A-Z][A-Z0-9_]*)=", (ROOT / "conf/experiment.conf").read_text("utf-8"), re.MULTILINE))
# Variables of make, of setup.sh and of other programs.
VARIABLES = OPTIONS | {"WHEELS", "TORCH", "PLATFORM", "AUDIO", "HOTWORDS", "MODEL_DIR", "MODELSCOPE_CACHE"}
TARGETS = set(re.findall(r"^([a-z0-9 -]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
TARGETS = {target for line in TARGETS for target in line.split()}


def code(path: Path) -> list[str]:
    """What a document sets in code: inline and in blocks."""
    text = path.read_text("utf-8")
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL)
    return blocks + re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def names(path: Path) -> dict[str, set[str]]:
    """Paths of the repository, options, and make targets that a document names in code."""
    text = "\n".join(code(path))
    option = r"(?<![\w\"$-])([A-Z][A-Z0-9]*_[A-Z0-9_]+|ALPHAS|MODEL|SEED|KEYWORDS)(?=[=\s`,;]|$)"
    return {
        "paths": set(re.findall(r"(?<![\w./-])((?:local|demo|conf|tests|bench|docs|data)/[\w./-]*\w)", text)),
        "options": set(re.findall(option, text)),
        "targets": set(re.findall(r"(?:^|[^\w-])make ([a-z][a-z0-9-]*)", text)),
        "flags": set(re.findall(r"(?<!\w)(--[a-z][a-z_]+)", text)),
    }


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_path_option_and_target_a_document_names_exists(path):
    named = names(path)
    missing = {name for name in named["paths"] if not (ROOT / name).exists() and "*" not in name}
    assert not {name for name in missing if not list(ROOT.glob(name + "*"))}
    assert named["options"] <= VARIABLES, named["options"] - VARIABLES
    assert named["targets"] <= TARGETS, named["targets"] - TARGETS


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_between_documents_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#:]+)\)", path.read_text("utf-8")):
        assert (path.parent / target).exists(), target


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0].name)
def test_both_languages_name_the_same(pair):
    english, chinese = map(names, pair)
    assert english == chinese


def test_the_reasons_in_the_data_page_are_those_the_code_gives():
    text = (ROOT / "data/README.md").read_text("utf-8")
    told = set(re.findall(r"`([a-z_]+)`", re.search(r"\| reason.*?\n\n", text, re.DOTALL).group(0))) - {"wav"}
    source = "\n".join(path.read_text("utf-8") for path in (ROOT / "local").glob("*.py"))
    source += (ROOT / "conf/data_filter.yaml").read_text("utf-8")
    unknown = {reason for reason in told if not re.search(rf"\b{reason}\b", source)}
    assert not unknown


def test_keys_of_stages_named_in_documents_are_keys_that_something_reads():
    keys = set()
    for path in (ROOT / "conf").rglob("*.yaml"):
        for section, inner in yaml.safe_load(path.read_text("utf-8")).items():
            keys |= {f"{section}.{name}" for name in inner} if isinstance(inner, dict) else {section}
    for path in DOCUMENTS:
        for key in re.findall(r"\b((?:dataset|optim|train|scheduler|specaug|llm)_conf\.\w+)", "\n".join(code(path))):
            assert key in keys, f"{path.name}: {key}"


def test_helpers_that_messages_name_exist():
    for path in (ROOT / "local").rglob("*.py"):
        for name in re.findall(r"\blocal/[\w/]+\.py\b", path.read_text("utf-8")):
            assert (ROOT / name).is_file(), f"{path.name}: {name}"
