"""The plan says what the lists, the sampler and the model of the experiment say, and invents nothing."""

import subprocess
import sys

import pytest
import yaml
from funasr.register import tables

import audio
import full_size
import nano.dataset  # noqa: F401
import plan
from common import UserError, read_jsonl, write_json, write_jsonl
from mini import ROOT, STAGES, helper, make_model
from nano.config import effective, read_stage
from sounds import murmur

BATCH = 700  # frames and tokens


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """20 and 8 utterances of 1 s and more at 16 and 8 kHz, 6 of each for dev, a model, and a file of options."""
    home = tmp_path_factory.mktemp("plan")
    lines = [f"EXP_OUTPUT={home}/exp", f"MODEL={make_model(home / 'base')}", f"STAGE_OVERLAY_DIR={home}"]
    for name, rate, counts in (("raw_16k", 16000, (20, 6)), ("real_8k", 8000, (8, 6))):
        for split, count in zip(("train", "dev"), counts, strict=True):
            rows = []
            for number in range(count):
                key = f"{name}-{split}-{number}"
                audio.write(home / f"{key}.wav", murmur(1 + number / 10, rate, [rate, number, len(split)]), rate)
                rows.append({"key": key, "source": f"{key}.wav", "target": "一二三四", "speaker": key})
            write_jsonl(home / f"{name}_{split}.jsonl", rows)
            lines.append(f"{name}_{split}".upper() + f"={home}/{name}_{split}.jsonl")
    (home / f"{STAGES[0]}.yaml").write_text(yaml.safe_dump({"dataset_conf": {"batch_size": BATCH}}))
    (home / "my.conf").write_text("\n".join(lines) + "\n")
    return home


def make_plan(monkeypatch, capsys, *arguments) -> dict[str, list[str]]:
    """Cells of the plan's tables by the first of their row, and its text under ""."""
    monkeypatch.chdir(ROOT)  # main() leaves it there
    monkeypatch.setattr(sys, "argv", ["plan.py", *map(str, arguments)])
    plan.main()
    text = capsys.readouterr().out
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows} | {"": [text]}


def epoch_written(corpus, stage):
    """Rows of the list that make_train_list.py writes from stage 0's output."""
    data, lists = corpus / "exp/data", corpus / f"stage{stage}"
    done = helper("make_train_list.py", "--stage", stage, "--data_dir", data, "--real_share", 0.3, "--no_speech_share",
                  0.1, "--output", lists / "train.jsonl", "--valid_output", lists / "valid.jsonl")  # fmt: skip
    assert done.returncode == 0, done.stderr
    return list(read_jsonl(lists / "train.jsonl"))


def test_before_stage_0_a_plan_is_made_from_the_corpora_alone(corpus, monkeypatch, capsys):
    told = make_plan(monkeypatch, capsys, "--config", corpus / "my.conf")
    assert told["simulated_8k_telephone/train"] == ["20", f"{sum(range(10, 30)) / 10 / 3600:.2f}"]
    assert [told[f"real_8k_telephone/{split}"][0] for split in ("train", "dev", "test")] == ["8", "3", "3"]
    assert told["rows an epoch"][2] == "8 real + 2 simulated + 1 wideband"
    assert "run stage -1 first" in told[""][0] and "GPU memory, estimated" not in told
    assert told[""][0] == (corpus / "exp/EXPERIMENT_EXECUTION_PLAN.md").read_text() + "\n"
    assert f"\nbash run_experiment.sh 3 --config {corpus}/my.conf\n" in told[""][0]


def test_in_the_middle_of_stage_0_the_sets_that_are_guessed_are_named(corpus, monkeypatch, capsys, tmp_path):
    row = {"speech_length": 360_000, "text_length": 1}
    write_jsonl(tmp_path / "data" / plan.SIMULATED / "train_formatted.jsonl", [row])
    told = make_plan(monkeypatch, capsys, "--config", corpus / "my.conf", "--exp_output", tmp_path)
    assert told["simulated_8k_telephone/train"] == ["1", "1.00"] and told["real_8k_telephone/train"][0] == "8"
    assert "200 rows of a set, but those of stage 0 for simulated_8k_telephone/train.\nStage 0 writes" in told[""][0]
    with pytest.raises(UserError, match="stage 0 needs --raw_16k_train"):
        make_plan(monkeypatch, capsys, "--exp_output", tmp_path)


def test_a_model_folder_that_is_gone_is_no_model(corpus, monkeypatch, capsys, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model_dir.txt").write_text(f"{tmp_path}/moved away\n")
    told = make_plan(monkeypatch, capsys, "--config", corpus / "my.conf", "--exp_output", tmp_path)
    assert "run stage -1 first" in told[""][0]


def test_the_commands_of_a_plan_are_those_of_its_environment(corpus, monkeypatch, capsys):
    monkeypatch.setenv("REAL_SHARE", "0.2")
    told = make_plan(monkeypatch, capsys, "--config", corpus / "my.conf", "--seed", 3)[""][0]
    assert f"\nbash run_experiment.sh 3 --real_share 0.2 --config {corpus}/my.conf --seed 3\n" in told
    assert f"\nmake status EXP_OUTPUT={corpus}/exp\n" in told


def test_make_takes_the_folder_of_the_results_from_the_config(tmp_path, monkeypatch):
    config = tmp_path / "somebody's own" / "my.conf"
    config.parent.mkdir()
    config.write_text('EXP_OUTPUT="/some where/exp"\n')
    command = ["make", "-n", "status", f"CONFIG={config}"]
    assert '--output_root "/some where/exp"' in subprocess.check_output(command, cwd=ROOT, text=True)
    monkeypatch.setenv("EXP_OUTPUT", "")
    assert '--output_root "/some where/exp"' in subprocess.check_output(command, cwd=ROOT, text=True)
    assert '--output_root "/other"' in subprocess.check_output([*command, "EXP_OUTPUT=/other"], cwd=ROOT, text=True)


@pytest.mark.parametrize("given", ["EXP_OUTPUT=", "CONFIG=my.conf"])
def test_make_clean_of_an_empty_folder_is_that_of_the_default(tmp_path, monkeypatch, given):
    (tmp_path / "my.conf").write_text("EXP_OUTPUT=$NOT_SET\n")
    monkeypatch.delenv("EXP_OUTPUT", raising=False)
    name, _, value = given.partition("=")
    monkeypatch.setenv(name, value and str(tmp_path / value))
    cleaned = subprocess.check_output(["make", "-n", "clean"], cwd=ROOT, text=True)
    assert 'rm -rf "exp_output/demo" ' in cleaned


def test_make_stops_at_a_config_that_it_cannot_read(tmp_path):
    command = ["make", "--no-print-directory", "-n", "clean", f"CONFIG={tmp_path}/my.cnf"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert f"*** CONFIG={tmp_path}/my.cnf cannot be read" in done.stderr.splitlines()[-1]


def test_online_the_simulated_training_audio_is_not_written(corpus, monkeypatch, capsys):
    written = [
        float(make_plan(monkeypatch, capsys, "--config", corpus / "my.conf", "--online_channel", online)[""][0]
              .partition("half), ")[2].partition(" GB")[0])
        for online in (0, 1)
    ]  # fmt: skip
    simulated = sum(range(10, 30)) / 10 * 32000 / 1e9
    assert written[0] - written[1] == pytest.approx(simulated, abs=0.001)


def test_a_plan_has_the_real_models_parameters_and_the_speed_that_was_measured(corpus, monkeypatch, capsys, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/model_dir.txt").write_text(str(full_size.build_folder(tmp_path / "base")))
    speeds = [{"stage": stage, "model": model, "corpus": "turns", "machine": "GPU", "ours": ours}
              for stage in STAGES[:2] for model, ours in (("full", 0.5), ("mini", 7.0))]  # fmt: skip
    write_json(tmp_path / "bench/training.json", speeds)
    write_json(tmp_path / "bench/stage0.json", {"x_realtime_per_core": 0.01, "machine": "this machine"})
    write_json(tmp_path / "bench/simulation.json", {"x_realtime_per_core": {"default_60s": 150, "default_5s": 120}})
    told = make_plan(monkeypatch, capsys, "--config", corpus / "my.conf", "--exp_output", tmp_path, "--real_share", 0,
                     "--wideband_replay", 0, "--no_speech_share", 0, "--online_channel", 1)  # fmt: skip
    assert told["trained parameters"] == [
        "audio_encoder 221.14 M", "audio_adaptor 12.60 M, ctc_decoder 8.02 M, ctc 31.04 M", "LoRA 2.29 M",
    ]
    epochs = yaml.safe_load((ROOT / f"conf/{STAGES[0]}.yaml").read_text())["train_conf"]["max_epoch"]
    hours = epochs * sum(range(10, 30)) / 10 / 3600 / 0.5
    assert told["time of all epochs"][0] == f"{hours:.2g} h on one GPU"
    decoded = 5 * (3 * sum(range(10, 16)) / 10 + 60 * 5.17) / 3600  # the last: nobody speaks
    assert f"Stage 4 decodes {decoded:.2f} hours" in told[""][0] and "no_speech test 60" in plan.ROOT.joinpath(
        "run_experiment.sh").read_text("utf-8")
    assert told["time of all epochs"][2] == "not measured: `make bench`"
    heard = sum(sum(range(10, 10 + count)) / 10 for count in (20, 6, 8, 6)) / 3600
    assert f"It takes {heard / 0.01:.2g} core-hours on this machine" in told[""][0]
    assert "a core does so at 120 audio-seconds a second" in told[""][0]


@pytest.mark.parametrize(("arguments", "message"), [
    ([], "stage 0 needs --raw_16k_train"), (["--real_shar", "1"], "unknown option --real_shar"),
    (["--config", "nowhere.conf"], "--config nowhere.conf does not exist"),
])  # fmt: skip
def test_what_cannot_be_planned_is_refused_in_one_line(tmp_path, arguments, message):
    done = helper("plan.py", "--exp_output", tmp_path / "exp", *arguments)
    assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "exp").exists()


@pytest.mark.full
def test_after_stage_0_the_plan_holds_what_training_will_read(corpus, monkeypatch, capsys):
    subprocess.run(["bash", ROOT / "run_experiment.sh", "-1", "0", "--config", corpus / "my.conf", "--python",
                    sys.executable, "--max_reject_ratio", "0.5"], check=True, capture_output=True)  # fmt: skip
    monkeypatch.setenv("CONFIG", str(corpus / "my.conf"))
    told = make_plan(monkeypatch, capsys, "--real_share", "0.3", "--no_speech_share", "0.1")
    data = corpus / "exp/data"
    for corpus_and_split in [name for name in told if name.endswith(("/train", "/dev", "/test"))]:
        rows = list(read_jsonl(data / f"{corpus_and_split}_formatted.jsonl"))
        assert told[corpus_and_split][0] == str(len(rows))
    for stage in (1, 3):
        counts = [int(part.split()[0]) for part in told["rows an epoch"][stage - 1].split(" + ")]
        rows = epoch_written(corpus, stage)
        assert sum(counts) == len(rows) and told["rows an epoch"][stage - 1].endswith(" no_speech")
    audio_size = sum(path.stat().st_size for path in data.glob("*/audio*/**/*.flac"))
    assert f"wrote {audio_size / 1e9:.3f} GB" in told[""][0]

    told = make_plan(monkeypatch, capsys, "--real_share", 0, "--wideband_replay", 0, "--no_speech_share", 0)
    layers = [ROOT / f"conf/{STAGES[0]}.yaml", corpus / f"{STAGES[0]}.yaml"]
    conf = effective(read_stage(layers), corpus / "base", 16000)["dataset_conf"]
    train = str(data / plan.SIMULATED / "train_formatted.jsonl")
    frontend = type("Frontend", (), {"fs": 16000})
    dataset = tables.dataset_classes["FunASR"](train, is_training=True, frontend=frontend, tokenizer=None, **conf)
    sampler = tables.batch_sampler_classes["BatchSampler"](dataset, **conf)["batch_sampler"]
    assert told["batches an epoch"][0] == f"{len(list(sampler))} of {BATCH} frames and tokens"
    assert len(list(sampler)) > 3
