"""Fixtures of several test files."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from mini import make_model, make_rows

# In the background of a script Ctrl-C is ignored, and by what is started there, too: what is tested would not hear it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[dict]:
    return make_rows(tmp_path_factory.mktemp("audio"))


@pytest.fixture
def disk(tmp_path) -> Iterator:
    """disk("size=64k") -> a folder that is a disk of its own, mounted with these options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "none", folder]
        if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("may not mount a disk here")
        return folder

    yield mount
    while folder.is_mount():
        subprocess.run(["umount", folder], check=True)


@pytest.fixture
def read_only(tmp_path, disk) -> Path:
    """A folder that cannot be written."""
    if os.geteuid() == 0:  # who may write anywhere else
        return disk("ro")
    folder = tmp_path / "read only"
    folder.mkdir(mode=0o555)
    return folder
