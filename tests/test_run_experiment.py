"""run_experiment.sh: what it refuses, where options come from, what it runs, in which order, and what it does not redo.

The real script runs in a copy of the repository. Where whole stages are run, --python names a stand-in for the
interpreter: it runs stage_status.py for real, and in place of any other helper notes the call and writes the files
that the helper would. The helpers have tests of their own, and the demo runs them all.
"""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys

import pytest

from mini import ROOT

STAND_IN = '''#!{python}
import json, os, sys
from pathlib import Path

args = sys.argv[1:]
name = "train.py" if args[0] == "local/launch.py" else os.path.basename(args[0])
if name == "-":  # the check of installed packages, which has a test of its own
    sys.exit()
if name in ("-c", "stage_status.py"):
    os.execv(sys.executable, [sys.executable, *args])
with open(os.environ["CALLS"], "a") as calls:
    calls.write(json.dumps([name, *args[1:]]) + "\\n")
print("output of", name, flush=True)
if os.environ.get("FAILING") in (name, args[1]):
    print("error: this helper fails", file=sys.stderr)
    sys.exit(7)


def option(flag):
    return Path(args[args.index(flag) + 1]) if flag in args else None


def write(path, text="written\\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


if name == "download_model.py":
    found = os.environ.get("CACHE") or option("--model").resolve()
    write(option("--output") / "model_dir.txt", f"{{found}}\\n")
    write(option("--output") / "check.json")
elif name == "train.py":
    for file in ("averaged.pt", "run.json", "model.pt.ep1"):
        write(option("--output_dir") / file, " ".join(args))
elif name == "final_model.py" and "export" in args:
    for file in ("model.pt", "config.yaml"):
        write(option("--output") / file)
elif name == "report.py":
    for file in ("index.html", "report.md"):
        write(option("--output") / file)
elif "--choose" in args:
    write(option("--output"))
    write(option("--choose"), json.dumps({{"alpha": 0.75}}))
elif "stats" in args:
    write(option("--data_dir") / "STAGE0_COMPLETION_REPORT.md")
elif name == "decode.py":
    option("--output_dir").mkdir(parents=True, exist_ok=True)
else:
    for flag in ("--output", "--dev", "--test", "--valid_output"):
        if option(flag):
            write(option(flag), " ".join(args) + "\\n")
            write(option(flag).with_name("rejected_" + option(flag).name))
'''


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """A copy of what the driver needs, under a path with a blank and quotes."""
    copy = tmp_path_factory.mktemp("repo") / "a copy's \"name\""
    for name in ("conf", "local"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("run_experiment.sh", "requirements.txt"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture
def recipe(repository, tmp_path):
    """run(stage, ..., option=value) -> finished process; everything is written under tmp_path."""
    stand_in = tmp_path / "stand-in"
    stand_in.write_text(STAND_IN.format(python=sys.executable))
    stand_in.chmod(0o755)
    for name in ("config.yaml", "model.pt"):
        (tmp_path / "base model").mkdir(exist_ok=True)
        (tmp_path / "base model" / name).write_text("x")
    for name in ("raw_train", "raw_dev", "real_train", "real_dev", "real_test"):
        (tmp_path / f"{name}.jsonl").write_text("{}\n")

    def run(*arguments, environment=None, **options):
        given = {
            "exp_output": tmp_path / "exp's [1] output", "model": tmp_path / "base model", "python": stand_in,
            "raw_16k_train": tmp_path / "raw_train.jsonl", "raw_16k_dev": tmp_path / "raw_dev.jsonl",
            "real_8k_train": tmp_path / "real_train.jsonl", "real_8k_dev": tmp_path / "real_dev.jsonl",
            "ngpu": 0,  # to count them is to import torch, which takes longer than all else
            **options,
        }
        flags = [part for name, value in given.items() if value is not None for part in (f"--{name}", str(value))]
        return driver(repository, *arguments, *flags, environment={"CALLS": tmp_path / "calls", **(environment or {})})

    run.exp = tmp_path / "exp's [1] output"
    run.calls = lambda: [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    run.forget_calls = lambda: (tmp_path / "calls").write_text("")
    run.forget_calls()
    return run


def driver(repository, *arguments, environment=None):
    clean = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LANG") if name in os.environ}
    command = ["bash", str(repository / "run_experiment.sh"), *map(str, arguments)]
    environment = {**clean, **{name: str(value) for name, value in (environment or {}).items()}}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=300)


def options_of(call):
    return dict(zip(call[1:], call[2:], strict=False))


# --- usage and mistakes


@pytest.mark.parametrize("arguments", [(), ("--help",), ("1", "--help")])
def test_usage_lists_every_option_with_its_comment(repository, arguments):
    done = driver(repository, *arguments)
    assert done.returncode == 0
    for line in (ROOT / "conf/experiment.conf").read_text().splitlines():
        if line[:1].isupper():
            assert f"--{line.partition('=')[0].lower()} " in done.stdout
    assert "Real calls added in stages 1 and 2" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["one"], "stage 'one' is not an integer"),
        (["1.5"], "stage '1.5' is not an integer"),
        (["6"], "stage '6' is not an integer from -1 to 5"),
        (["-2"], "stage '-2' is not an integer from -1 to 5"),
        (["3", "1"], "stop stage 1 is before stage 3"),
        (["1", "2", "3"], "stray argument '3'"),
        (["1", "--nope", "x"], "unknown option --nope"),
        (["1", "--seed"], "--seed needs a value"),
        (["--seed", "1"], "no stage given"),
        (["1", "--seed", "x"], "--seed 'x' is not a whole number"),
        (["1", "--seed", "4294967296"], "--seed 4294967296 is over 4294967295"),
        (["1", "--seed", "18446744073709551617"], "--seed 18446744073709551617 is over"),
        (["1", "--master_port", "65536"], "--master_port 65536 is over 65535"),
        (["1", "--real_share", "-1"], "--real_share '-1' is not a number"),
        (["0", "--max_reject_ratio", "1.5"], "--max_reject_ratio 1.5 is over 1"),
        (["0", "--num_workers", "0"], "--num_workers 0: at least 1"),
        (["1", "--force", "yes"], "--force 'yes': expected true false"),
        (["1", "--text_style", "sung"], "--text_style 'sung': expected written spoken"),
        (["1", "--text_style", "written spoken"], "--text_style 'written spoken': expected written spoken"),
        (["1", "--frontend_fs", "44100"], "--frontend_fs '44100': expected 16000 8000"),
        (["1", "--online_channel", "yes"], "--online_channel 'yes': expected 0 1"),
        (["0", "--online_channel", "1", "--frontend_fs", "8000"], "--online_channel 1 needs --frontend_fs 16000"),
        (["4", "--alphas", "0.5 2"], "--alphas '0.5 2'"),
        (["4", "--alphas", "0.25 1 0.2 0.25"], "0.25 is there twice"),
        (["1", "--exp_output", ""], "--exp_output is empty"),
        (["1", "--config", "nowhere.conf"], "--config nowhere.conf does not exist"),
        (["1", "--channel_conf", "nowhere.yaml"], "--channel_conf nowhere.yaml does not exist"),
        (["1", "--stage_overlay_dir", "nowhere"], "--stage_overlay_dir nowhere is not a folder"),
        (["1", "--python", "python0"], "--python python0 is not there"),
        (["0"], "stage 0 needs --raw_16k_train"),
        (["-1", "1"], "stage 0 needs --raw_16k_train"),
    ],
)
def test_what_is_not_understood_is_refused_in_one_line(repository, tmp_path, arguments, message):
    done = driver(repository, *arguments, environment={"EXP_OUTPUT": tmp_path / "out"})
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1 and done.stdout == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "transformers", "message"),
    [("-I -S", "", r"lacks \w+ and \d+ more; run make setup"),
     ("", "5.1.0", r"has transformers 5.1.0, not transformers>=\S+; run make setup")],
)  # fmt: skip
def test_a_python_without_the_packages_is_refused_in_one_line(recipe, tmp_path, flags, transformers, message):
    python, found = tmp_path / "other python", tmp_path / f"site/transformers-{transformers}.dist-info"
    python.write_text(f'#!/bin/sh\nexport PYTHONPATH="{tmp_path}/site"\nexec "{sys.executable}" {flags} "$@"\n')
    python.chmod(0o755)
    found.mkdir(parents=True)
    (found / "METADATA").write_text(f"Metadata-Version: 2.1\nName: transformers\nVersion: {transformers}\n")
    done = recipe("-1", python=python)
    assert done.returncode == 2 and re.search(message, done.stderr) and done.stderr.count("\n") == 1, done.stderr
    assert not recipe.exp.exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("REAL_SHRE=0.2", "unknown option REAL_SHRE"), ("real share 0.2", "is not NAME=value"),
        ("RAW_16K_TRAIN=/my corpus/train", "needs quotes"), ("TEXT_STYLE=spoken\r", "line ends of Windows"),
        ("SEED=0# false", "a space before #"), ("KEYWORDS=a;false", "needs quotes"), ("KEYWORDS=a>b", "needs quotes"),
        ("KEYWORDS=a&b", "needs quotes"), ("KEYWORDS=a|b", "needs quotes"), ("KEYWORDS=(a)", "needs quotes"),
    ],
)  # fmt: skip
def test_a_config_file_with_a_mistake_is_refused(repository, tmp_path, line, message):
    (tmp_path / "my.conf").write_text(f"# fine\n{line}\n")
    done = driver(repository, "1", "--config", tmp_path / "my.conf")
    assert done.returncode == 2
    assert message in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize("locale", ["C", "C.UTF-8"])
def test_a_byte_order_mark_is_named_with_the_command_that_takes_it_off(repository, tmp_path, locale):
    config = tmp_path / "my.conf"
    config.write_text("# my settings\nSEED=x\n", "utf-8-sig")
    done = driver(repository, "1", "--config", config, environment={"LC_ALL": locale})
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    said, _, mend = done.stderr.strip().partition("; ")
    assert said == f"error: {config} begins with a byte order mark"
    subprocess.run(["bash", "-c", mend], check=True, env={"PATH": os.environ["PATH"], "LC_ALL": locale})
    assert config.read_text("utf-8") == "# my settings\nSEED=x\n"


def test_keywords_in_another_encoding_are_refused_before_anything_is_done(recipe, tmp_path):
    (tmp_path / "words.txt").write_text("逾期\n", "gb18030")
    done = recipe(-1, 5, keywords=tmp_path / "words.txt")
    assert done.returncode == 2 and "is not UTF-8" in done.stderr and done.stderr.count("\n") == 1
    assert recipe.calls() == []


def test_a_machine_without_a_locale_reads_the_same_keywords(recipe):
    done = recipe(-1, environment={"LC_ALL": "C"})
    assert done.returncode == 0, done.stderr


def test_missing_and_empty_data_paths_are_refused_before_anything_is_done(recipe, tmp_path):
    for content, message in ((None, "does not exist"), ("", "is empty")):
        if content is not None:
            (tmp_path / "data.jsonl").write_text(content)
        done = recipe("-1", "5", real_8k_test=tmp_path / "data.jsonl")
        assert done.returncode == 2
        assert f"data.jsonl {message}" in done.stderr and done.stderr.count("\n") == 1
    assert recipe.calls() == [] and not recipe.exp.exists()


def test_rows_longer_than_training_takes_are_refused_before_anything_is_done(recipe, tmp_path):
    overlay = tmp_path / "overlay"
    overlay.mkdir()
    refused = recipe(-1, 0, max_speech_length=12001, stage_overlay_dir=overlay)
    assert refused.returncode == 2 and "--max_speech_length 12001 is over 12000" in refused.stderr
    assert recipe.calls() == [] and not recipe.exp.exists()
    (overlay / "stage3_lora_domain.yaml").write_text("dataset_conf: {max_source_length: 12500}")
    assert recipe(-1, 0, max_speech_length=12001, stage_overlay_dir=overlay).returncode == 0


@pytest.mark.parametrize("stage", [0, 1, 2, 3, 4, 5])
def test_a_stage_without_the_one_before_it_says_which_to_run(recipe, stage):
    done = recipe(stage)
    assert done.returncode == 2
    assert "run stage -1 first" in done.stderr and done.stderr.count("\n") == 1
    assert recipe.calls() == []


# --- where options come from


def model_of(done, recipe):
    assert done.returncode == 0, done.stderr
    return options_of(recipe.calls()[-1])["--model"]


def test_command_line_beats_environment_beats_config_beats_default(recipe, tmp_path):
    (tmp_path / "my.conf").write_text('MODEL="of/config"\n')
    assert model_of(recipe(-1, model=None), recipe) == "FunAudioLLM/Fun-ASR-Nano-2512"
    assert model_of(recipe(-1, model=None, config=tmp_path / "my.conf"), recipe) == "of/config"
    environment = {"MODEL": "of/environment"}
    done = recipe(-1, model=None, config=tmp_path / "my.conf", environment=environment)
    assert model_of(done, recipe) == "of/environment"
    done = recipe(-1, model="of/command line", config=tmp_path / "my.conf", environment=environment)
    assert model_of(done, recipe) == "of/command line"


def test_the_log_says_the_command_and_what_the_environment_set(recipe, tmp_path):
    (tmp_path / "my.conf").write_text("REAL_SHARE=0.2\n")
    assert recipe(-1, environment={"CONFIG": tmp_path / "my.conf", "ALPHAS": "0.5 1"}).returncode == 0
    first = (recipe.exp / "logs/stage-1.log").read_text().splitlines()[0]
    assert first.startswith(f"# ALPHAS='0.5 1' CONFIG='{tmp_path}/my.conf' bash run_experiment.sh '-1' '--exp_output'")


@pytest.mark.parametrize("form", [["--model", "a/b"], ["--Model", "a/b"], ["--model=a/b"]])
def test_forms_of_an_option(recipe, form):
    assert model_of(recipe(-1, *form, model=None), recipe) == "a/b"


def test_an_option_with_a_dash_is_that_with_an_underscore(recipe, tmp_path):
    done = recipe(-1, "--exp-output", tmp_path / "other", exp_output=None)
    assert done.returncode == 0
    assert (tmp_path / "other/model/model_dir.txt").exists()


def test_a_config_file_may_build_on_an_option_of_the_command_line(recipe, tmp_path):
    (tmp_path / "my.conf").write_text('MODEL="$EXP_OUTPUT/base"\n')
    assert model_of(recipe(-1, model=None, config=tmp_path / "my.conf"), recipe) == f"{recipe.exp}/base"


# --- what a stage does


def test_the_whole_recipe_runs_its_helpers_and_a_second_time_nothing(recipe):
    done = recipe(-1, 5, ngpu=None)
    assert done.returncode == 0, done.stderr
    names = [call[0] for call in recipe.calls()]
    assert names[0] == "download_model.py"
    assert names.count("train.py") == 3 and names[-2:] == ["final_model.py", "report.py"]
    for stage in range(-1, 6):
        title, log, *_, took = (line for line in done.stdout.splitlines() if line.startswith(f"stage {stage}: "))
        assert " -> " in title and ": log in " in log and ": took " in took
        assert json.loads((recipe.exp / f"status/stage{stage}.json").read_text())["state"] == "done"
    recipe.forget_calls()
    again = recipe(-1, 5)
    assert again.returncode == 0
    assert again.stdout.count("nothing to do") == len(again.stdout.splitlines()) == 7
    assert recipe.calls() == []


def test_each_training_starts_from_the_one_before(recipe, tmp_path):
    assert recipe(-1, 3).returncode == 0
    trained = [options_of(call) for call in recipe.calls() if call[0] == "train.py"]
    exp = recipe.exp / "exp/8k_telephone"
    assert [options["--init_checkpoint"] for options in trained] == [
        str(tmp_path / "base model/model.pt"),
        str(exp / "stage1_encoder_adapt/averaged.pt"),
        str(exp / "stage2_adapter_align/averaged.pt"),
    ]
    assert "output of train.py" in (exp / "stage3_lora_domain/train.log").read_text()
    names = [call[1] if call[0] == "prepare_training_data.py" else call[0] for call in recipe.calls()]
    steps = [name for name in names if name in ("validate", "train.py")]
    assert steps == ["validate"] + ["validate", "train.py"] * 3, "after stage 0, and before every training"


def test_what_is_asked_of_a_training_reaches_it_and_is_remembered_and_checks_are_on_both_sides(recipe, tmp_path):
    asked = {"real_share": "0.21", "wideband_replay": "0.22", "no_speech_share": "0.23", "simulated_share": "0.24",
             "max_speech_length": "9000", "seed": "7"}  # fmt: skip
    overlay = tmp_path / "overlay/stage2_adapter_align.yaml"
    overlay.parent.mkdir()
    overlay.write_text("a: 1\n")
    given = {**asked, "max_wideband_loss": "0.03", "stage_overlay_dir": overlay.parent}
    assert recipe(-1, 4, **given).returncode == 0
    calls = [call for call in recipe.calls() if call[0] != "prepare_training_data.py"]
    lists = [options_of(call) for call in calls if call[0] == "make_train_list.py"]
    assert len(lists) == 3 and all({f"--{name}": value for name, value in asked.items()}.items() <= options.items()
                                   for options in lists)  # fmt: skip
    steps = [call[1] if call[0] == "check_training.py" else call[0] for call in calls]
    began = steps.index("make_train_list.py")
    assert steps[began : began + 12] == 3 * ["make_train_list.py", "before", "train.py", "after"]
    assert {options_of(call)["--seed"] for call in calls if call[0] == "train.py"} == {"7"}
    assert options_of(next(call for call in calls if "--choose" in call))["--max_wideband_loss"] == "0.03"
    for stage, other in ((1, "simulated_share"), (2, "simulated_share"), (3, "real_share")):
        marker = json.loads((recipe.exp / f"status/stage{stage}.json").read_text())
        remembered = {name.upper(): value for name, value in asked.items() if name != other}
        assert marker["config"] == remembered | {"FRONTEND_FS": "16000"}
        assert (str(overlay) in marker["inputs"]) is (stage == 2)
        assert str(tmp_path / "base model/config.yaml") in marker["inputs"]
        assert any(f"/conf/stage{stage}_" in path for path in marker["inputs"])


def test_a_checkpoint_of_the_users_replaces_the_first_parent_only(recipe, tmp_path):
    assert recipe(-1, 0).returncode == 0
    (tmp_path / "mine.pt").write_text("x")
    assert recipe(1, 2, init_checkpoint=tmp_path / "mine.pt").returncode == 0
    trained = [options_of(call)["--init_checkpoint"] for call in recipe.calls() if call[0] == "train.py"]
    assert trained[0] == str(tmp_path / "mine.pt")
    assert trained[1].endswith("stage1_encoder_adapt/averaged.pt")


@pytest.mark.parametrize("first", [-1, 0])
def test_a_checkpoint_of_the_users_is_not_forgotten_when_the_run_begins_before_training(recipe, tmp_path, first):
    assert recipe(-1).returncode == 0
    (tmp_path / "mine.pt").write_text("x")
    assert recipe(first, 1, init_checkpoint=tmp_path / "mine.pt").returncode == 0
    trained = [options_of(call)["--init_checkpoint"] for call in recipe.calls() if call[0] == "train.py"]
    assert trained == [str(tmp_path / "mine.pt")]


@pytest.mark.parametrize(("nodes", "rank"), [(1, 1), (2, 2), (0, 0)])
def test_a_machine_that_is_none_of_them_trains_nothing(recipe, nodes, rank):
    done = recipe(1, nnodes=nodes, node_rank=rank)
    assert done.returncode == 2 and f"--node_rank {rank}" in done.stderr and done.stderr.count("\n") == 1
    assert recipe.calls() == []


def test_several_gpus_are_started_by_torchrun(recipe):
    assert recipe(-1, 1, ngpu=2).returncode == 0
    launch = next(call for call in recipe.calls() if "--nproc_per_node" in call)
    assert options_of(launch)["--nproc_per_node"] == "2" and "local/train.py" in launch


def test_an_overlay_is_laid_over_the_stages_it_has_a_file_for(recipe, tmp_path):
    (tmp_path / "overlay").mkdir()
    (tmp_path / "overlay/stage2_adapter_align.yaml").write_text("a: 1\n")
    assert recipe(-1, 2, stage_overlay_dir=tmp_path / "overlay").returncode == 0
    overlays = [options_of(call).get("--overlay") for call in recipe.calls() if call[0] == "train.py"]
    assert overlays == [None, str(tmp_path / "overlay/stage2_adapter_align.yaml")]
    (tmp_path / "overlay/stage2_adaptor_align.yaml").write_text("a: 1\n")
    done = recipe(2, stage_overlay_dir=tmp_path / "overlay")
    assert done.returncode == 2 and "there is no conf/stage2_adaptor_align.yaml" in done.stderr
    assert done.stderr.count("\n") == 1


def test_every_step_of_stage_0_may_lose_what_was_asked_for(recipe):
    assert recipe(-1, 0, max_reject_ratio=".49").returncode == 0
    limits = {name: options_of(call).get("--max_reject_ratio") for call in recipe.calls() for name in call[:2]}
    assert limits["filter"] == limits["convert"] == limits["data_simulation.py"] == ".49"


def test_dev_is_split_only_where_no_test_set_is_given(recipe, tmp_path):
    assert recipe(-1, 0, real_8k_test=tmp_path / "real_test.jsonl").returncode == 0
    split = [options_of(call)["--test"] for call in recipe.calls() if "split" in call[:2]]
    assert split == [str(recipe.exp / "data/work/raw_test.jsonl")]
    filtered = [options_of(call) for call in recipe.calls() if "filter" in call[:2]]
    assert str(tmp_path / "real_test.jsonl") in [options["--input"] for options in filtered]


def test_the_chosen_weight_makes_the_final_model_and_test_is_decoded_once(recipe):
    assert recipe(-1, 4).returncode == 0
    mixed = {options_of(call)["--output"]: options_of(call)["--alpha"] for call in recipe.calls() if "mix" in call}
    assert mixed[str(recipe.exp / "eval/checkpoints/final.pt")] == str(recipe.exp / "eval/interpolation.json")
    dev, test = (call for call in recipe.calls() if call[0] == "decode.py")
    assert not any("test_formatted" in argument for argument in dev)
    models = [argument.split("=")[1] for argument in test if argument.startswith("--checkpoint=")]
    sets = [argument.split("=")[1] for argument in test if argument.startswith("--test_set=")]
    assert models == ["base", "stage1", "stage2", "stage3", "final"]
    assert sets == ["simulated_test", "real_test", "wideband_test", "no_speech"]


def test_the_sampling_rate_goes_from_stage_0_to_export_and_no_later_stage_may_have_another(recipe):
    assert recipe(-1, 5, frontend_fs=8000).returncode == 0
    given = {}
    for call in recipe.calls():
        for flag in {"--output_fs", "--fs", "--frontend_fs"} & set(call):
            name = call[1] if call[0] == "prepare_training_data.py" else call[0]
            given.setdefault(name, set()).add(options_of(call)[flag])
    hearing = {"data_simulation.py", "convert", "validate", "check_training.py", "train.py", "decode.py"}
    assert hearing < given.keys() and set().union(*given.values()) == {"8000"}
    recipe.forget_calls()
    for stage in (1, 2, 3, 4, 5):
        refused = recipe(stage, force="true")
        assert refused.returncode == 2
        assert "FRONTEND_FS is 16000, but stage 0 had 8000; add --frontend_fs 8000" in refused.stderr
        assert refused.stderr.count("\n") == 1
    assert recipe.calls() == []


def test_the_prompt_that_is_exported_is_the_one_that_was_trained(recipe):
    assert recipe(-1, 4, text_style="spoken").returncode == 0
    recipe.forget_calls()
    refused = recipe(5)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "TEXT_STYLE is written, but stage 0 had spoken; add --text_style spoken" in refused.stderr
    assert recipe.calls() == []
    assert recipe(5, text_style="spoken").returncode == 0
    exported = next(call for call in recipe.calls() if "export" in call)
    assert options_of(exported)["--text_style"] == "spoken"


# --- failure, change, force


def test_a_failure_names_stage_and_log_and_passes_the_exit_code_on(recipe):
    done = recipe(-1, 5, environment={"FAILING": "make_train_list.py"})
    assert done.returncode == 7
    log = recipe.exp / "exp/8k_telephone/stage1_encoder_adapt/train.log"
    assert done.stderr.splitlines()[-1].startswith("error: stage 1 failed with exit code 7") and str(log) in done.stderr
    assert "this helper fails" in log.read_text()
    marker = json.loads((recipe.exp / "status/stage1.json").read_text())
    assert (marker["state"], marker["log"]) == ("failed", str(log))
    assert "train.py" not in [call[0] for call in recipe.calls()]
    assert recipe(1).returncode == 0


def test_what_a_failed_check_left_feeds_no_later_stage(recipe, tmp_path):
    assert recipe(-1, 0).returncode == 0
    assert recipe(1, environment={"FAILING": "after"}).returncode == 7
    assert (recipe.exp / "exp/8k_telephone/stage1_encoder_adapt/averaged.pt").is_file()
    recipe.forget_calls()
    refused = recipe(2)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert "stage 2 reads the work of stage 1, which is not done (failed" in refused.stderr
    assert recipe.calls() == []
    (tmp_path / "mine.pt").write_text("x")
    assert recipe(2, init_checkpoint=tmp_path / "mine.pt").returncode == 0
    assert recipe(3).returncode == 0
    assert "which is not done (failed" in recipe(4).stderr
    assert recipe(1, 4).returncode == 1, "stage 2 was trained from another checkpoint"
    (recipe.exp / "status/stage1.json").unlink()
    assert recipe(4).returncode == 0, "nothing is known against work without a marker"


def test_a_model_that_is_gone_from_a_hubs_cache_is_found_again(recipe, tmp_path):
    found = shutil.copytree(tmp_path / "base model", tmp_path / "cache")
    environment = {"CACHE": found}
    assert recipe(-1, model="of/hub", environment=environment).returncode == 0
    assert "nothing to do" in recipe(-1, model="of/hub", environment=environment).stdout
    found.rename(tmp_path / "moved")
    assert "run stage -1 first: bash run_experiment.sh -1" in recipe(0, model="of/hub").stderr
    environment = {"CACHE": tmp_path / "moved"}
    assert f"{found}/model.pt is gone" in recipe(-1, model="of/hub", environment=environment).stdout
    assert recipe(0, model="of/hub").returncode == 0


def test_stages_of_different_runs_are_not_mixed(recipe, tmp_path):
    assert recipe(-1, 4).returncode == 0
    assert recipe(1, seed=1, force="true").returncode == 0
    for stage, was, now, again in ((3, 2, 1, "2 3 --force true"), (4, 2, 1, "2 3 --force true"), (5, 4, 1, "4")):
        refused = recipe(stage, force="true")
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1
        assert f"stage {was} was made from another stage {now} than the one that is there now" in refused.stderr
        assert refused.stderr.strip().endswith(f"bash run_experiment.sh {again}")
    (tmp_path / "mine.pt").write_text("x")
    assert recipe(2, 3, force="true", init_checkpoint=tmp_path / "mine.pt").returncode == 0
    (tmp_path / "mine.pt").write_text("y")
    assert recipe(1, seed=2, force="true").returncode == 0
    assert recipe(4, 5).returncode == 0, "stage 2 was made from the user's own"
    (recipe.exp / "exp/8k_telephone/stage2_adapter_align/averaged.pt").unlink()
    assert recipe(5, force="true").returncode == 0, "a checkpoint that was read may be deleted to save disk"


def test_a_model_is_not_compared_with_another_base_than_its_own(recipe, tmp_path):
    assert recipe(-1, 3).returncode == 0
    other = shutil.copytree(tmp_path / "base model", tmp_path / "other")
    assert recipe(-1, model=other).returncode == 0
    assert recipe(4, model=other).returncode == 0, "the same model in another place"
    (other / "model.pt").write_text("other weights")
    assert recipe(-1, model=other).returncode == 0
    refused = recipe(4, model=other, force="true")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    assert f"stage 1 began from {tmp_path}/base model/model.pt" in refused.stderr
    assert f"run_experiment.sh -1 --model '{tmp_path}/base model'" in refused.stderr
    assert recipe(1, 4, model=other, force="true").returncode == 0


def test_stages_of_different_runs_are_not_mixed_in_a_copy(recipe, tmp_path):
    assert recipe(-1, 2).returncode == 0
    shutil.copytree(recipe.exp, tmp_path / "copy")
    assert recipe(1, seed=1, force="true", exp_output=tmp_path / "copy").returncode == 0
    refused = recipe(3, exp_output=tmp_path / "copy")
    assert refused.returncode == 2 and "stage 2 was made from another stage 1" in refused.stderr
    assert recipe(3).returncode == 0


def test_the_other_machines_leave_the_books_to_machine_0(recipe):
    assert recipe(-1, 1).returncode == 0
    marker = recipe.exp / "status/stage1.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()) | {"state": "started"}))
    assert recipe(2, nnodes=2, node_rank=1).returncode == 0, "machine 0 may still be at the last check of stage 1"


def test_work_is_not_replaced_without_force_and_then_moved_aside(recipe):
    assert recipe(-1, 1).returncode == 0
    recipe.forget_calls()
    refused = recipe(1, real_share=0.2)
    assert refused.returncode == 1
    assert "REAL_SHARE 0.1 -> 0.2" in refused.stderr and refused.stderr.count("\n") == 1
    assert recipe.calls() == []
    assert recipe(1, real_share=0.2, force="true").returncode == 0
    folders = sorted(path.name for path in (recipe.exp / "exp/8k_telephone").iterdir())
    assert folders[0] == "stage1_encoder_adapt"
    assert len(folders) == 2 and folders[1].startswith("stage1_encoder_adapt.old.")


def test_what_would_not_start_moves_nothing_aside(recipe, tmp_path):
    assert recipe(-1, 2).returncode == 0
    marker, folder = recipe.exp / "status/stage1.json", recipe.exp / "exp/8k_telephone/stage1_encoder_adapt"
    before = marker.read_text(), sorted(path.name for path in folder.iterdir())
    recipe.forget_calls()
    refused = recipe(1, force="true", real_share=0.2, environment={"FAILING": "before"})
    assert refused.returncode == 7 and "nothing was moved" in refused.stderr
    assert before == (marker.read_text(), sorted(path.name for path in folder.iterdir()))
    assert not list(folder.parent.glob("*.old.*")) and "train.py" not in [call[0] for call in recipe.calls()]
    assert "nothing to do" in recipe(1).stdout


def test_what_was_moved_aside_can_be_moved_back(recipe):
    assert recipe(-1, 2).returncode == 0
    assert recipe(1, force="true", real_share=0.2).returncode == 0
    (folder,), (marker,) = recipe.exp.glob("exp/8k_telephone/*.old.*"), recipe.exp.glob("status/*.old.*")
    shutil.rmtree(recipe.exp / "exp/8k_telephone/stage1_encoder_adapt")
    folder.rename(recipe.exp / "exp/8k_telephone/stage1_encoder_adapt")
    marker.rename(recipe.exp / "status/stage1.json")
    assert recipe(1, 2).stdout.count("nothing to do") == 2


def test_a_stage_does_not_begin_from_the_folder_that_it_moves_aside(recipe):
    assert recipe(-1, 1).returncode == 0
    recipe.forget_calls()
    own = recipe.exp / "exp/8k_telephone/stage1_encoder_adapt/averaged.pt"
    refused = recipe(1, force="true", init_checkpoint=own)
    assert refused.returncode == 2 and "copy it elsewhere" in refused.stderr and recipe.calls() == []
    assert own.is_file() and "nothing to do" in recipe(1).stdout


def test_the_title_names_a_checkpoint_of_the_users_and_stage_4_leaves_out_what_was_not_trained(recipe, tmp_path):
    assert recipe(-1, 1).returncode == 0
    assert "run stage 2 first" in recipe(4).stderr
    first = shutil.copy(recipe.exp / "exp/8k_telephone/stage1_encoder_adapt/averaged.pt", tmp_path / "first.pt")
    assert f"LoRA on the LLM, from {first}" in recipe(3, init_checkpoint=first).stdout
    recipe.forget_calls()
    assert recipe(4).returncode == 0
    scores = [call for call in recipe.calls() if call[0] == "score.py"][-1]
    assert scores[scores.index("--models") + 1 :] == ["base", "stage1", "stage3", "final"]


def test_stage_4_does_not_leave_out_a_stage_that_is_being_trained_anew(recipe):
    assert recipe(-1, 4).returncode == 0
    assert recipe(1, 3, force="true", environment={"FAILING": "train.py"}).returncode == 7
    refused = recipe(4, 5)
    assert refused.returncode == 2 and "run stage 1 first" in refused.stderr


def test_another_machine_leaves_the_lists_of_machine_0_alone(recipe):
    assert recipe(-1, 1).returncode == 0
    kept = recipe.exp / "exp/8k_telephone/stage1_encoder_adapt/trainlist.jsonl"
    before = kept.read_text()
    recipe.forget_calls()
    assert recipe(1, nnodes=2, node_rank=1, real_share=0.2, force="true").returncode == 0
    (trained,) = (options_of(call) for call in recipe.calls() if "train.py" in call[0])
    assert trained["--output_dir"] == str(kept.parent) and trained["--train_list"] != str(kept)
    assert kept.read_text() == before


def test_scores_stay_where_the_audio_for_new_ones_is_not_there(recipe):
    assert recipe(-1, 4).returncode == 0
    failed = recipe(4, alphas="0.5", environment={"FAILING": "validate"})
    assert failed.returncode == 7 and (recipe.exp / "eval/summary.json").is_file()
    assert (recipe.exp / "eval/checkpoints/final.pt").is_file()


def test_an_experiment_that_was_moved_is_not_begun_again(recipe, tmp_path):
    assert recipe(-1, 4).returncode == 0
    moved = recipe.exp.rename(tmp_path / "moved here")
    recipe.forget_calls()
    for stage in (0, 1, 4):
        refused = recipe(stage, exp_output=moved)
        assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and recipe.calls() == []
        assert f"{moved} was made as {recipe.exp}" in refused.stderr
    subprocess.run(["bash", "-c", refused.stderr[refused.stderr.index("ln -s") :]], check=True)
    assert recipe(0, 4).stdout.count("nothing to do") == 5
    assert "give --exp_output" in recipe(1, exp_output=moved).stderr


def test_the_same_configuration_in_another_clone_is_no_change(recipe, repository, tmp_path):
    assert recipe(-1, 1).returncode == 0
    other = shutil.copytree(repository, tmp_path / "another clone")
    given = {"exp_output": recipe.exp, "model": tmp_path / "base model", "python": tmp_path / "stand-in", "ngpu": 0}
    flags = [part for name, value in given.items() for part in (f"--{name}", str(value))]
    assert "nothing to do" in driver(other, 1, *flags, environment={"CALLS": tmp_path / "calls"}).stdout
    with open(other / "conf/stage1_encoder_adapt.yaml", "a") as file:
        file.write("# another\n")
    changed = driver(other, 1, *flags, environment={"CALLS": tmp_path / "calls"})
    assert changed.returncode == 1 and ": conf/stage1_encoder_adapt.yaml changed;" in changed.stderr


def test_other_keywords_or_alphas_keep_the_transcripts_and_score_those_that_are_asked_for(recipe, tmp_path):
    assert recipe(-1, 4).returncode == 0
    kept = recipe.exp / "eval/dev/alpha_0.25.real_dev.jsonl"
    kept.write_text("decoded in hours\n")
    (tmp_path / "keywords.txt").write_text("退款\n")
    recipe.forget_calls()
    changed = {"keywords": tmp_path / "keywords.txt", "alphas": "0.5 1.0"}
    failed = recipe(4, **changed, environment={"FAILING": "decode.py"})
    assert failed.returncode == 7 and "redone, changed: ALPHAS" in failed.stdout
    assert not (recipe.exp / "eval/summary.json").exists(), "scores of the old keywords"
    assert recipe(4, **changed).returncode == 0 and kept.is_file()
    choice, scores = [call for call in recipe.calls() if call[0] == "score.py"]
    models = choice.index("--models") + 1
    assert choice[models : models + 3] == ["base", "alpha_0.5", "alpha_1.0"]
    models = scores.index("--models") + 1
    assert scores[models:] == ["base", "stage1", "stage2", "stage3", "final"]
    assert recipe(5, **changed).returncode == 0
    (recipe.exp / "eval/summary.json").write_text("other scores\n")
    assert "redone, changed" in recipe(5, **changed).stdout
    assert not list(recipe.exp.glob("*.old.*")), "scored and exported in place, without a copy of the final model"
    assert recipe(4, **changed, force="true").returncode == 0 and not kept.exists()
    assert len(list(recipe.exp.glob("eval.old.*"))) == 1
    assert recipe(4, **changed | {"keywords": ""}).returncode == 0
    assert options_of(recipe.calls()[-1])["--keywords"] == "", "none, not those of score.py's default"


def test_a_stage_redone_makes_the_next_one_out_of_date(recipe):
    assert recipe(-1, 2).returncode == 0
    assert recipe(1, seed=1, force="true").returncode == 0
    refused = recipe(2, seed=1)
    assert refused.returncode == 1
    assert "stage1_encoder_adapt/averaged.pt changed" in refused.stderr


def test_two_corpora_that_change_places_are_a_change(recipe, tmp_path):
    dev, test = tmp_path / "real_dev.jsonl", tmp_path / "real_test.jsonl"
    assert recipe(-1, 0, real_8k_dev=test, real_8k_test=dev).returncode == 0
    refused = recipe(0, real_8k_dev=dev, real_8k_test=test)
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    assert f"{dev}, {test} changed places" in refused.stderr


def test_options_that_do_not_change_the_result_do_not_redo_it(recipe):
    assert recipe(-1, 0).returncode == 0
    assert "nothing to do" in recipe(0, num_workers=7, max_reject_ratio=0.5).stdout


def test_a_second_run_in_the_same_folder_is_refused(recipe):
    recipe.exp.mkdir()
    with open(recipe.exp / ".lock0", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = recipe(-1)
    assert done.returncode == 1
    assert "another run" in done.stderr and done.stderr.count("\n") == 1
    assert done.stderr.endswith(f"end it: kill {os.getpid()}\n")
    assert recipe.calls() == []
    assert recipe(-1).returncode == 0, "when the other run has ended"


# --- the real helpers


def test_a_model_folder_without_weights_or_tokenizer_stops_stage_minus_one(recipe, tmp_path):
    done = recipe(-1, python=sys.executable, model=tmp_path / "base model")
    assert done.returncode == 1
    assert "configuration.json" in done.stderr + done.stdout and "Traceback" not in done.stderr + done.stdout
    assert not (recipe.exp / "model").exists()


def test_no_space_left_is_one_line_and_leaves_nothing_half_written(recipe, disk):
    folder = disk("size=64k")
    (folder / "filler").write_bytes(b"x" * 64 * 1024)
    done = recipe(-1, exp_output=folder / "exp")
    assert done.returncode == 1
    assert "No space left" in done.stderr and done.stderr.count("\n") == 1
    assert [path.name for path in folder.rglob("*") if path.is_file() and path.stat().st_size] == ["filler"]


def test_a_folder_of_results_that_cannot_be_written_is_one_line(recipe, tmp_path, read_only):
    (tmp_path / "file").touch()
    for path in (read_only, tmp_path / "file"):
        done = recipe(-1, exp_output=path)
        assert done.stderr == f"error: --exp_output {path} is no folder that may be written\n"
        assert done.returncode == 2


def test_with_online_channel_no_simulated_training_audio_is_written(recipe):
    for value, wanted in ((0, [False] * 5), (1, [True] + [False] * 4)):
        recipe.forget_calls()
        done = recipe("-1", "0", online_channel=value, exp_output=recipe.exp / str(value))
        assert done.returncode == 0, done.stderr
        simulated = [call for call in recipe.calls() if call[0] == "data_simulation.py"]
        assert ["--online" in call for call in simulated] == wanted
        assert "simulated_train.jsonl" in options_of(simulated[0])["--output"]
