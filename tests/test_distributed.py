"""Training with more than one process, by the command lines of the README, on CPU: gloo in place of NCCL."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml

from common import write_jsonl
from mini import QUICK, ROOT, SMALL, arguments, curves, formatted, make_model, make_rows
from miniature import build_folder
from nano.train_log import read_log

ALPHABET = "一二三四五六七八九零"
STAGES = {
    "stage1_encoder_adapt": {"audio_encoder"}, "stage2_adapter_align": {"audio_adaptor", "ctc_decoder", "ctc"},
    "stage3_lora_domain": {"lora"},
}  # fmt: skip

HASHING = """
import hashlib, os, sys
sys.path.insert(0, "local")
import train
from common import run
from nano.trainer import Trainer

save = Trainer.save_checkpoint

def hashing(self, *args, **kwargs):
    state = kwargs["model"].module.state_dict()
    digest = hashlib.sha256(b"".join(state[name].numpy().tobytes() for name in sorted(state))).hexdigest()
    with open(os.path.join(self.output_dir, "hashes." + os.environ["RANK"]), "a") as file:
        file.write(digest + "\\n")
    save(self, *args, **kwargs)

Trainer.save_checkpoint = hashing
run(train.main)
"""

# local/train.py, which ends its own process before it gives the file or folder KILL its name; bf16 where BF16 is set.
KILLED = """
import os, signal, sys
sys.path.insert(0, "local")
import train
from common import run

replace, build_config = os.replace, train.build_config

def killing(source, target):
    if os.path.basename(target) == os.environ["KILL"]:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

def in_bf16(args):
    config = build_config(args)
    config["train_conf"]["use_bf16"] = "BF16" in os.environ
    return config

os.replace, train.build_config = killing, in_bf16
run(train.main)
"""

pytestmark = pytest.mark.full


def prepare(tmp_path: Path) -> Path:
    """What stages -1 and 0 leave behind, for 13 utterances of noise in each corpus, and tiny overlays."""
    model = build_folder(tmp_path / "model folder", ALPHABET, SMALL, seed=1)
    write = tmp_path / "exp" / "model" / "model_dir.txt"
    write.parent.mkdir(parents=True)
    write.write_text(f"{model}\n")
    rng = np.random.default_rng(0)
    for corpus in ("simulated_8k_telephone", "real_8k_telephone", "wideband_16k", "no_speech"):
        for split in ("train", "dev", "test"):
            rows = []
            for number in range(13):
                name, samples = f"{corpus}-{split}-{number}", 0.1 * rng.standard_normal(16000 + 800 * number)
                rows.append(formatted(name, tmp_path / f"{name}.wav", samples, "三五七"))
            write_jsonl(tmp_path / "exp/data" / corpus / f"{split}_formatted.jsonl", rows)
    overlay = {
        "optim_conf": {"lr": 0.003}, "scheduler_conf": {"warmup_steps": 2},
        "train_conf": {"max_epoch": 3, "keep_nbest_models": 2, "avg_nbest_model": 2, "log_interval": 1},
        "dataset_conf": {"batch_size": 700, "num_workers": 0},
    }  # fmt: skip
    for stage in STAGES:
        (tmp_path / "overlays").mkdir(exist_ok=True)
        (tmp_path / "overlays" / f"{stage}.yaml").write_text(yaml.safe_dump(overlay))
    return tmp_path


def start(experiment: Path, stages: str, **options) -> tuple[subprocess.Popen, Path]:
    """run_experiment.sh in a process of its own, and the file of what it says; option names as on its command line."""
    options = {
        "exp_output": experiment / "exp", "model": experiment / "model folder", "python": sys.executable,
        "stage_overlay_dir": experiment / "overlays", **options,
    }  # fmt: skip
    flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    clean = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LANG") if name in os.environ}
    said = experiment / f"said_{time.time_ns()}.txt"
    with open(said, "w") as file:
        return subprocess.Popen(
            ["bash", "run_experiment.sh", *stages.split(), *flags], cwd=ROOT, start_new_session=True,
            env=clean | {"PYTHONFAULTHANDLER": "1"}, stdout=file, stderr=subprocess.STDOUT,
        ), said  # fmt: skip


def finish(*machines: tuple[subprocess.Popen, Path], seconds: float = 600) -> list[str]:
    """What each said; once one has failed or time is up, the others say where they are and are ended.

    It is said to files: read one after the other, the pipe of the last is full one day and what writes to it waits,
    and all machines with it.
    """
    until = time.monotonic() + seconds
    while None in (codes := [process.poll() for process, _ in machines]):
        if any(codes) or time.monotonic() > until:
            break
        time.sleep(0.5)
    for (process, _), code in zip(machines, codes, strict=True):
        if code is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                if child.name().startswith("python"):
                    child.send_signal(signal.SIGABRT)
            time.sleep(2)
            os.killpg(process.pid, signal.SIGKILL)
    texts = [said.read_text() for _, said in machines]
    ends = [f"exit code {code}:\n{text[-6000:]}" for code, text in zip(codes, texts, strict=True)]
    assert not any(codes) and None not in codes, "\n\n".join(ends)
    return texts


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def check_stage(folder: Path, modules: set[str]) -> str:
    """Two processes trained it, what should have moved did, and the model is whole; return train.log."""
    described = json.loads((folder / "run.json").read_text())
    assert described["processes"] == 2
    assert set(described["checked"]["moved_tensors"]) == modules
    averaged = torch.load(folder / "averaged.pt")["state_dict"]
    assert all(torch.isfinite(tensor).all() for tensor in averaged.values())
    return (folder / "train.log").read_text()


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Stages 1 to 3, two processes each."""
    experiment = prepare(tmp_path_factory.mktemp("two processes"))
    finish(start(experiment, "1 3", ngpu=2, master_port=free_port()))
    return experiment / "exp/exp/8k_telephone"


def test_each_stage_trains_on_two_processes_of_one_machine(trained):
    for stage, modules in STAGES.items():
        log = check_stage(trained / stage, modules)
        assert "train, rank: 0" in log and "train, rank: 1" in log


def torchrun(args: Namespace, script: str, processes: int = 2, **environment: str) -> subprocess.CompletedProcess:
    """The script on processes of this machine, with the command line of local/train.py."""
    args.output_dir.mkdir(exist_ok=True)
    (args.output_dir / "script.py").write_text(script)
    command = [sys.executable, "local/launch.py", "--nproc_per_node", processes, "--master_port", free_port(),
               args.output_dir / "script.py"]  # fmt: skip
    for name, value in vars(args).items():
        command += [f"--{name}", *(value if name == "overlay" else [value])]
    return subprocess.run(list(map(str, command)), cwd=ROOT, env=os.environ | environment, capture_output=True,
                          text=True, check=False, timeout=300)  # fmt: skip


def start_two(folder: Path, body: str, port: int) -> subprocess.Popen:
    """Two processes with `main` of this body, which may use what is imported here."""
    path = folder / "script.py"
    path.write_text(f"import os, signal, sys, time\nsys.path.insert(0, {str(ROOT / 'local')!r})\n"
                    f"from common import UserError, run\ndef main():\n    {body}\nrun(main)\n")  # fmt: skip
    command = [sys.executable, "local/launch.py", "--nproc_per_node", "2", "--master_port", str(port), path]
    return subprocess.Popen(command, cwd=ROOT, stdout=-1, stderr=-1, text=True, start_new_session=True)


@pytest.mark.parametrize(("body", "code", "line"), [
    ("raise UserError('mine; do this', 2)", 2, "error: mine; do this"),
    ("os.environ['RANK'] == '1' and os.kill(os.getpid(), 9); time.sleep(30)", 1,
     "error: process 1 was ended by SIGKILL, as the system does when memory is short; the same command goes on"),
])
def test_a_process_that_fails_says_why_and_torchrun_adds_no_traceback(tmp_path, body, code, line):
    process = start_two(tmp_path, body, free_port())
    said = process.communicate(timeout=60)[1]
    assert process.returncode == code and line in said.splitlines() and "Traceback" not in said, said


def test_ctrl_c_ends_all_processes_as_one_that_was_interrupted(tmp_path):
    process = start_two(tmp_path, "os.write(1, b'begun\\n'); time.sleep(60)", free_port())
    assert [process.stdout.readline() for _ in range(2)] == ["begun\n"] * 2
    os.killpg(process.pid, signal.SIGINT)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "error: interrupted" in said and "Traceback" not in said, said


def test_a_port_that_another_training_has_is_one_line(tmp_path):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        process = start_two(tmp_path, "pass", other.getsockname()[1])
        said = process.communicate(timeout=60)[1]
    last = said.splitlines()[-1]
    assert process.returncode == 1 and "Traceback" not in said
    assert last.startswith("error: the processes do not meet: ") and "EADDRINUSE" in last and "MASTER_PORT" in last


def test_processes_keep_equal_weights_where_an_epoch_ends_inside_an_accumulation_of_gradients(tmp_path):
    overlay = {**QUICK, "train_conf": {**QUICK["train_conf"], "accum_grad": 2}}  # of three batches of two rows each
    overlay["dataset_conf"] = {**QUICK["dataset_conf"], "batch_size": 2}
    args = arguments(tmp_path, make_model(tmp_path / "model"), make_rows(tmp_path), overlay=overlay)
    done = torchrun(args, HASHING)
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = ((args.output_dir / f"hashes.{rank}").read_text().split() for rank in (0, 1))
    assert one == other and len(set(one)) == 3


@pytest.fixture(scope="module")
def with_deepspeed(tmp_path_factory) -> Callable:
    """with_deepspeed("name", KILL="") -> averaged.pt's tensors and the folder of a training.

    An epoch is three batches for each process, two of them and then one a step.
    """
    pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("deepspeed")
    model, rows = make_model(folder / "model"), make_rows(folder)

    def train(name: str, deepspeed: bool = True, ends: int = 0, processes: int = 2,
              **environment: str) -> tuple[dict, Path]:  # fmt: skip
        conf = {
            **QUICK["train_conf"], "accum_grad": 2, "grad_clip": 0.5, "log_interval": 1, "use_deepspeed": deepspeed,
            "deepspeed_config": str(ROOT / "conf/deepspeed.json"), "avg_keep_nbest_models_type": "loss",
        }  # fmt: skip
        overlay = {**QUICK, "train_conf": conf, "dataset_conf": {**QUICK["dataset_conf"], "batch_size": 2}}
        args = arguments(folder / name, model, rows, overlay=overlay)
        done = torchrun(args, KILLED, processes, **{"KILL": ""} | environment)
        assert done.returncode == ends, done.stderr[-3000:]
        (args.output_dir / "train.log").write_text(done.stderr)
        averaged = args.output_dir / "averaged.pt"
        return torch.load(averaged)["state_dict"] if averaged.exists() else {}, args.output_dir

    return train


def test_deepspeed_takes_the_steps_of_ddp(with_deepspeed):
    (expected, _), (averaged, folder) = with_deepspeed("ddp", deepspeed=False), with_deepspeed("whole")
    start = torch.load(folder.parents[1] / "model/model.pt")
    for name, tensor in averaged.items():  # not number by number: AdamW makes a gradient's rounding a whole step
        assert (tensor - expected[name]).norm() <= 0.05 * (expected[name] - start[name]).norm(), name
    settings = json.loads((folder / "deepspeed.json").read_text())
    assert settings == json.loads((ROOT / "conf/deepspeed.json").read_text()) | {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2, "gradient_clipping": 0.5,
        "torch_autocast": {"enabled": False, "dtype": "bfloat16"},
    }  # fmt: skip
    assert sorted(path.name for path in folder.glob("*model.pt*")) == ["model.pt", "model.pt.ep2", "model.pt.ep3"]


def test_deepspeed_killed_in_a_save_goes_on_from_the_checkpoint_before(with_deepspeed):
    expected, _ = with_deepspeed("uninterrupted")
    _, folder = with_deepspeed("killed", KILL="model.pt.ep2", ends=1)
    assert (folder / ".model.pt.ep2.tmp").is_dir() and (folder / "model.pt").readlink() == Path("model.pt.ep1")
    with_deepspeed("killed", processes=1, ends=1)
    assert "is of 2 processes, here are 1" in (folder / "train.log").read_text()
    averaged, _ = with_deepspeed("killed")
    assert [row["epoch"] for row in read_log(folder / "train.log") if row["tag"] == "train"] == [1, 1, 1, 2, 2, 2]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in averaged.items())
    assert not list(folder.glob(".*.tmp"))


def test_deepspeed_trains_in_bf16_where_the_yaml_says_so(with_deepspeed):
    folders = with_deepspeed("in fp32")[1], with_deepspeed("in bf16", BF16="")[1]
    fp32, bf16 = ([row["loss"] for row in read_log(folder / "train.log")] for folder in folders)
    assert fp32 != bf16 and fp32 == pytest.approx(bf16, rel=0.02)


def test_a_stage_trains_with_deepspeed_and_passes_the_same_checks(tmp_path):
    pytest.importorskip("deepspeed")
    experiment = prepare(tmp_path)
    overlay = tmp_path / "overlays/stage3_lora_domain.yaml"
    conf = yaml.safe_load(overlay.read_text())
    conf["train_conf"] |= {"use_deepspeed": True, "deepspeed_config": "conf/deepspeed.json"}
    overlay.write_text(yaml.safe_dump(conf))
    start_from = {"init_checkpoint": tmp_path / "model folder/model.pt"}
    finish(start(experiment, "3", ngpu=2, master_port=free_port(), **start_from))
    check_stage(experiment / "exp/exp/8k_telephone/stage3_lora_domain", {"lora"})


def test_tensorboard_shows_the_losses_of_every_stage(trained):
    for stage in STAGES:
        drawn = curves(trained / stage)
        for name in ("rank0_loss/train", "rank0_lr/train", "stats_rank0_acc/val", "stats_rank0_loss_llm/train"):
            assert drawn[name], f"{stage}: {name} is empty"
        assert not any("rank1" in name for name in drawn)
        assert len(list((trained / stage / "tensorboard").iterdir())) == 1


def test_two_machines_train_together_and_one_of_them_keeps_the_books(tmp_path):
    experiment = prepare(tmp_path)
    both = {"nnodes": 2, "ngpu": 1, "master_addr": "127.0.0.1", "master_port": free_port()}
    machines = [start(experiment, "1 2", node_rank=rank, **both) for rank in (0, 1)]
    for rank, said in enumerate(finish(*machines)):
        assert f"machine {rank} waits for all 2 at 127.0.0.1:{both['master_port']}" in said
    for stage in list(STAGES)[:2]:
        log = check_stage(experiment / "exp/exp/8k_telephone" / stage, STAGES[stage])
        assert "train, rank: 0" in log
    assert "train, rank: 1" in (experiment / "exp/logs/stage1.machine1.log").read_text()
    again = finish(start(experiment, "1 2", node_rank=1, **both))
    assert "nothing to do" in again[0]
