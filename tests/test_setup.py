"""setup.sh: what makes an environment anew, what leaves it alone, and which torch it is made with.

The real script runs in a folder of its own. A stand-in for Python makes environments of itself and notes what its pip
is asked for; builds of torch are CUDA's where their name or file says so.
"""

import os
import re
import shutil
import subprocess

import pytest

from mini import ROOT

PYTHON = """#!/bin/bash
case "$*" in
  -V) echo Python {version} ;;
  "-m venv "*) last=${{*: -1}}; [[ $* != *--clear* ]] || rm -rf "$last"; mkdir -p "$last/bin"
    cp "{path}" "$last/bin/python" ;;
  *" --report "*nowhere*) echo "ERROR: No matching distribution found for torch"; exit 1 ;;
  *" --report "*) if [[ $* == *gpu* || $* == *cuda* ]]; then echo '"name": "nvidia-cublas"'; fi \
    >"$(grep -o '[^ ]*/[a-z]*.json' <<<"$*")" ;;
  *" download "*) touch "$WHEELS/torch.whl" ;;
  *" install "*) echo "install $* from ${{PIP_NO_INDEX:+$PIP_FIND_LINKS alone}}" >>"$CALLS"
    [[ $* != *-dev.txt* || -z $BROKEN ]] ;;
  *_base_executable*) echo "{path}" ;;
  *urllib*) [[ -n $NETWORK ]] ;;
esac
"""


@pytest.fixture
def setup(tmp_path):
    """setup(gpu, "wheels" or nothing, NAME=value, ...) -> (exit code, output, what pip installed)."""
    for path in (ROOT / "setup.sh", *ROOT.glob("requirements*.txt")):
        shutil.copy(path, tmp_path)
    (tmp_path / "bin").mkdir()
    for name, version in (("python3", "3.11.4"), ("python3.12", "3.12.1")):
        path = tmp_path / "bin" / name
        path.write_text(PYTHON.format(path=path, version=version))
        path.chmod(0o755)
    smi = tmp_path / "bin/nvidia-smi"
    smi.write_text("#!/bin/bash\n[[ $GPU == True ]]\n")
    smi.chmod(0o755)

    def run(gpu: bool, *arguments: str, **given) -> tuple[int, str, str]:
        calls = tmp_path / "calls"
        calls.write_text("")
        environment = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "CALLS": str(calls), "GPU": str(gpu), **given}
        done = subprocess.run(["bash", "setup.sh", *arguments], cwd=tmp_path, env=environment, capture_output=True,
                              text=True, check=False)  # fmt: skip
        return done.returncode, done.stdout + done.stderr, calls.read_text()

    return run


def test_an_environment_for_a_gpu_serves_a_node_without_one_and_is_made_where_there_is_one(setup):
    assert "torch==2" in setup(False)[2] and setup(False)[2] == ""
    assert "requirements-gpu.txt" in setup(True)[2]
    for gpu in (False, True):
        assert setup(gpu) == (0, "", "")


def test_a_torch_of_the_users_serves_both_kinds_of_node_and_is_kept_by_a_setup_that_breaks_off(setup):
    code, said, _ = setup(True, TORCH="torch==2.9.1+cuda", BROKEN="1")
    assert code == 1 and "cannot install the requirements" in said
    assert "torch==2.9.1+cuda" in setup(True)[2]
    for gpu in (False, True):
        assert setup(gpu) == (0, "", "")


@pytest.mark.parametrize("given", [{}, {"PYTHON": "python3.12"}])
def test_a_setup_that_is_refused_leaves_the_environment_as_it_is(setup, given):
    assert setup(False)[0] == 0
    code, said, installed = setup(False, TORCH="torch==2.9.1+cuda", **given)
    assert code == 1 and "is a CUDA build and this machine has no GPU" in said and not installed
    assert setup(False) == (0, "", "")
    assert "torch==2" in setup(False, PYTHON="python3.12")[2]


@pytest.mark.parametrize(("gpu", "torch"), [
    (True, "-r requirements-gpu.txt"), (False, "torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu"),
])  # fmt: skip
def test_wheels_are_of_the_torch_that_setup_would_take_here(setup, tmp_path, gpu, torch):
    code, said, _ = setup(gpu, "wheels", WHEELS=str(tmp_path / "wheels"), NETWORK="1")
    assert code == 0 and torch in said
    assert (tmp_path / "wheels/torch.txt").read_text() == torch + "\n"
    code, said, installed = setup(gpu, WHEELS=str(tmp_path / "wheels"))
    assert code == 0 and torch in installed
    assert all(line.endswith(f" from {tmp_path}/wheels alone") for line in installed.splitlines())


def test_a_folder_of_wheels_that_is_damaged_or_none_is_refused_before_anything_is_installed(setup, tmp_path):
    assert setup(False, "wheels", WHEELS=str(tmp_path / "wheels"))[0] == 0
    (tmp_path / "wheels/torch.whl").write_text("cut off")
    for folder, message in (("wheels", "is damaged; copy it again"), ("empty", "has no SHA256SUMS")):
        code, said, installed = setup(False, WHEELS=str(tmp_path / folder))
        assert code == 1 and message in said and not installed


@pytest.mark.parametrize("torch", ["torch==9.9.9 --index-url https://nowhere.example", "torch==0+nowhere"])
def test_a_torch_that_cannot_be_reached_is_one_line_and_nothing_is_installed(setup, torch):
    assert setup(False)[0] == 0
    code, said, installed = setup(False, TORCH=torch)
    assert code == 1 and not installed and [line for line in said.splitlines() if "error" in line] == [
        f"error: pip cannot get '{torch}' (ERROR: No matching distribution found for torch); name another: "
        "TORCH='torch==… --index-url …' make setup"]
    assert setup(False) == (0, "", "")


def test_no_torchaudio_beside_the_cpu_build():
    """Its wheel links CUDA's libraries, and where it cannot be imported FunASR cannot either."""
    for path in ROOT.glob("requirements*.txt"):
        assert (re.search("^torchaudio", path.read_text(), re.M) is None) == (path.name != "requirements-gpu.txt")


CI_MAKE = """#!/bin/bash
echo "make $*" >>"$CALLS"
echo "output of $1"
[[ $1 != "$FAILING" ]]
"""


@pytest.mark.parametrize("failing", ["", "lint", "test-full", "demo", "test-deepspeed"])
def test_ci_runs_lint_all_tests_and_the_demo_and_fails_where_one_fails(tmp_path, failing):
    for name, text in (("make", CI_MAKE), ("id", "#!/bin/bash\necho 1000\n")):  # nobody who may install packages
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    calls = tmp_path / "calls"
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(calls), "FAILING": failing}
    done = subprocess.run([ROOT / ".ci/run"], env=environment, capture_output=True, text=True, check=False)
    assert calls.read_text() == "make lint\nmake test-full\nmake demo\nmake test-deepspeed\n"
    assert (done.returncode, done.stderr) == ((1, f"ci: failed: {failing}\n") if failing else (0, ""))
    assert done.stdout.count(f"output of {failing}\n") == (2 if failing else 0), "again at the end, where one looks"
