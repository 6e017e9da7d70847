"""Decoding gives what stock FunASR gives, whatever is batched, folded or interrupted; scores follow from it."""

import copy
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import decode
import score
from common import UserError, read_jsonl, write_jsonl
from decode import named, parse_row, transcript, utterance
from mini import ROOT, formatted, helper, helper_here
from miniature import build_folder
from nano.inference import Recogniser, batches, read_conf

TEXT = "您好我的退款订单号一二三四五六七八九逾期了吗"


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    size = {"encoder_dim": 64, "encoder_blocks": 1, "llm_dim": 64, "llm_layers": 2, "llm_head_dim": 16, "llm_ffn": 96}
    return build_folder(tmp_path_factory.mktemp("model") / "mini", TEXT, size)


@pytest.fixture(scope="module")
def test_set(tmp_path_factory):
    folder, rows = tmp_path_factory.mktemp("data"), []
    rng = np.random.default_rng(0)
    for number in range(24):
        samples = rng.standard_normal(int(16000 * rng.uniform(0.4, 4.0))) * rng.uniform(0.01, 0.3)
        prompt = "语音转写：" if number % 2 else "语音转写，不进行文本规整："
        text = TEXT[number % 10 : number % 10 + 6]
        row = formatted(f"utt{number:02d}", folder / f"{number}.wav", samples, text, prompt=prompt)
        rows.append(row | {"speaker": f"s{number % 5}", "channel": {"hop1": {"codec": "amr_nb"}, "g711": "alaw"}})
    write_jsonl(folder / "test.jsonl", rows)
    return folder / "test.jsonl", rows


def write_conf(path, **changes):
    conf = {"device": "cpu", "dtype": "auto", "batch_size": 4, "batch_seconds": 600, "max_new_tokens": 60,
            "max_tokens_per_second": 30, "chinese_numerals": False, "bootstrap_resamples": 200, **changes}
    path.write_text(json.dumps(conf), "utf-8")  # JSON is YAML
    return path


def asked(model_dir, test_set, output_dir, conf, *checkpoints):
    return ["--model_dir", model_dir, "--test_set", f"real_test={test_set}",
            "--output_dir", output_dir, "--conf", conf, *(f"--checkpoint={item}" for item in checkpoints or ["base="])]


def transcribe(recogniser, rows, *limits, **options):
    return recogniser.transcribe([utterance(row, recogniser.fs) for row in rows], *limits, **options)


def test_batched_transcripts_equal_stock_funasr_one_by_one(model_dir, test_set):
    from funasr import AutoModel

    rows = [row for row in test_set[1] if "不进行" not in row["messages"][1]["content"]]
    paths = [row["messages"][1]["content"].split("!")[1].split("<")[0] for row in rows]
    stock = AutoModel(model=str(model_dir), disable_update=True, device="cpu", ctc_decoder=None)
    expected = [stock.generate(path, max_length=40)[0]["text"] for path in paths]
    assert len(set(expected)) > len(rows) // 2  # the random model tells utterances apart, or this test shows nothing
    assert transcribe(Recogniser(model_dir, "cpu"), rows, 40, max_tokens_per_second=1e9) == expected


def test_a_hypothesis_is_cut_by_its_own_length_whatever_is_beside_it(model_dir, test_set):
    rows = [row for row in test_set[1] if "不进行" not in row["messages"][1]["content"]]
    recogniser = Recogniser(model_dir, "cpu")
    alone = [transcribe(recogniser, [row], 60, max_tokens_per_second=5)[0] for row in rows]
    assert transcribe(recogniser, rows, 60, max_tokens_per_second=5) == alone
    assert transcribe(recogniser, rows, 60, max_tokens_per_second=15) != alone, "or none was cut"


def test_the_prompt_is_that_of_the_row(model_dir, test_set):
    row = test_set[1][1]
    other = json.loads(json.dumps(row, ensure_ascii=False).replace("语音转写：", "语音转写，不进行文本规整："))
    recogniser = Recogniser(model_dir, "cpu")
    assert transcribe(recogniser, [row]) != transcribe(recogniser, [other])


def test_folded_and_unfolded_lora_decode_the_same_text(model_dir, test_set, tmp_path):
    from funasr import AutoModel

    lora = {"use_lora": True, "lora_conf": {"r": 4, "lora_alpha": 8, "lora_dropout": 0.05,
                                            "target_modules": ["q_proj", "v_proj"]}}
    unfolded = AutoModel(model=str(model_dir), disable_update=True, device="cpu", ctc_decoder=None, llm_conf=lora)
    torch.manual_seed(0)
    for name, parameter in unfolded.model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.3)
    torch.save({"state_dict": unfolded.model.state_dict(), "lora": {"r": 4, "lora_alpha": 8}}, tmp_path / "averaged.pt")
    recogniser = Recogniser(model_dir, "cpu")
    rows = test_set[1]
    plain = transcribe(recogniser, rows, 40)
    recogniser.load(tmp_path / "averaged.pt")
    folded = transcribe(recogniser, rows, 40)
    recogniser.auto_model = unfolded
    assert folded == transcribe(recogniser, rows, 40)
    assert folded != plain


def test_a_checkpoint_that_lacks_a_tensor_is_refused(model_dir, tmp_path):
    state = torch.load(model_dir / "model.pt")
    removed = next(name for name in state if name.startswith("audio_adaptor."))
    torch.save({name: tensor for name, tensor in state.items() if name != removed}, tmp_path / "x.pt")
    with pytest.raises(UserError, match=removed):
        Recogniser(model_dir, "cpu").load(tmp_path / "x.pt")


def test_audio_of_another_rate_is_refused_not_resampled(model_dir, test_set):
    with pytest.raises(UserError, match="16000 Hz, the frontend at 8000 Hz"):
        transcribe(Recogniser(model_dir, "cpu", frontend_fs=8000), test_set[1][:1])


def test_batches_hold_every_row_once_within_their_limits():
    rows = [{"key": str(n), "speech_length": 100 * (n % 7 + 1)} for n in range(50)]
    made = list(batches(rows, size=6, seconds=20))
    assert sorted(row["key"] for batch in made for row in batch) == sorted(row["key"] for row in rows)
    assert all(len(b) <= 6 and len(b) * max(r["speech_length"] for r in b) <= 2000 for b in made)
    assert made == list(batches(rows[::-1], size=6, seconds=20))


def test_killed_and_started_again_it_writes_the_same_bytes(model_dir, test_set, tmp_path):
    conf = write_conf(tmp_path / "conf.yaml", batch_size=2, max_new_tokens=75, max_tokens_per_second=1e6)
    whole = helper_here(decode.main, *asked(model_dir, test_set[0], tmp_path / "whole", conf))
    assert whole.returncode == 0, whole.stderr
    arguments = asked(model_dir, test_set[0], tmp_path / "killed", conf)
    part = tmp_path / "killed" / "base.real_test.part"
    command = [sys.executable, "local/decode.py", *map(str, arguments)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (part.is_file() and part.read_bytes().count(b"\n") > 5):
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it was done before it could be killed"
    assert not part.with_suffix(".jsonl").exists()
    with open(part, "r+b") as file:
        file.truncate(part.stat().st_size - 7)  # a torn last line
    again = helper_here(decode.main, *arguments)
    assert again.returncode == 0, again.stderr
    name = "base.real_test.jsonl"
    assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not part.exists()


def test_part_file_of_other_weights_is_not_continued(model_dir, test_set, tmp_path):
    conf = write_conf(tmp_path / "conf.yaml", max_new_tokens=5)
    output, arguments = tmp_path / "base.real_test.jsonl", asked(model_dir, test_set[0], tmp_path, conf)
    assert helper_here(decode.main, *arguments).returncode == 0
    whole = output.read_bytes()
    record = json.loads(output.with_suffix(".run.json").read_text("utf-8"))
    old = [row | {"hyp": "旧"} for row in read_jsonl(output)]
    for fingerprint, heard in ((record["fingerprint"], {"旧"}), ("of other weights", set())):
        output.unlink()
        write_jsonl(output.with_suffix(".part"), old)
        output.with_suffix(".run.json").write_text(json.dumps(record | {"fingerprint": fingerprint}), "utf-8")
        assert helper_here(decode.main, *arguments).returncode == 0
        assert {row["hyp"] for row in read_jsonl(output)} & {"旧"} == heard
    assert output.read_bytes() == whole


class SmallMemory:
    """The LLM's `generate` on a GPU whose memory ends at so many rows."""

    def __init__(self, recogniser, rows):
        self.generate, self.rows, self.asked = recogniser.auto_model.model.llm.generate, rows, []
        recogniser.auto_model.model.llm.generate = self

    def __call__(self, inputs_embeds, **options):
        self.asked.append(len(inputs_embeds))
        if len(inputs_embeds) > self.rows:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return self.generate(inputs_embeds=inputs_embeds, **options)


def test_a_batch_that_does_not_fit_the_gpu_is_decoded_in_halves_and_the_log_says_so(model_dir, test_set, caplog):
    recogniser = Recogniser(model_dir, "cpu")
    expected = transcribe(recogniser, test_set[1][:7], 20)
    memory = SmallMemory(recogniser, 3)
    assert transcribe(recogniser, test_set[1][:7], 20) == expected
    assert memory.asked == [7, 3, 3, 1]
    seconds = 3 * max(len(utterance(row, 16000).samples) for row in test_set[1][:7]) / 16000
    assert f"7 utterances at once do not fit the GPU's memory: from here on {seconds:.0f} s of padded" in caplog.text
    transcribe(recogniser, test_set[1][:7], 20)
    assert memory.asked[4:] == [3, 3, 1], "what did not fit once is not tried again"


def test_one_utterance_that_does_not_fit_the_gpu_is_named(model_dir, test_set):
    recogniser = Recogniser(model_dir, "cpu")
    SmallMemory(recogniser, 0)
    with pytest.raises(UserError, match="utt00 alone does not fit"):
        transcribe(recogniser, test_set[1][:4], 20)


def test_unchanged_transcripts_are_kept_and_changed_weights_decoded_again(model_dir, test_set, tmp_path):
    conf, checkpoint = write_conf(tmp_path / "conf.yaml", max_new_tokens=5), tmp_path / "own.pt"
    state = torch.load(model_dir / "model.pt")
    torch.save({"state_dict": state, "lora": None}, checkpoint)
    arguments = asked(model_dir, test_set[0], tmp_path, conf, "base=", f"own={checkpoint}")
    assert helper_here(decode.main, *arguments).returncode == 0
    rows = list(read_jsonl(tmp_path / "own.real_test.jsonl"))
    assert [row["key"] for row in rows] == [row["key"] for row in test_set[1]]
    assert {"key", "hyp", "ref", "seconds", "model", "test_set", "condition", "speaker", "call"} <= rows[0].keys()
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.jsonl")}
    state["llm.lm_head.weight"] += 1.0
    torch.save({"state_dict": state, "lora": None}, checkpoint)
    again = helper_here(decode.main, *arguments)
    assert "base.real_test.jsonl: up to date" in again.stderr
    after = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.jsonl")}
    assert [name for name in before if before[name] != after[name]] == ["own.real_test.jsonl"]
    os.utime(parse_row(test_set[1][0])["audio"])  # as when stage 0 took another channel of the call
    assert "up to date" not in helper_here(decode.main, *arguments).stderr
    heard = Path(parse_row(test_set[1][0])["audio"])
    heard.rename(heard.with_suffix(".gone"))
    gone = helper_here(decode.main, *arguments)
    heard.with_suffix(".gone").rename(heard)
    assert gone.returncode == 1 and f"{heard} does not exist; run stage 0" in gone.stderr
    assert (tmp_path / "own.real_test.jsonl").is_file(), "what cannot be made anew is kept"


def test_the_mark_of_silence_is_no_text_in_a_reference(test_set):
    row = copy.deepcopy(test_set[1][0])
    row["messages"][2]["content"] = "/sil"
    assert transcript(row, "", "base", "no_speech")["ref"] == ""


@pytest.mark.parametrize("pairs", [["x"], ["a=1", "a=2"], ["../x=1"], ["=1"]])
def test_names_that_could_not_be_file_names_are_refused(pairs):
    with pytest.raises(UserError):
        named(pairs, "--checkpoint")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "x=/nowhere.pt"], "/nowhere.pt does not exist"),
        (["--conf", "/nowhere.yaml"], "/nowhere.yaml"),
        (["--model_dir", "/nowhere"], "no config.yaml"),
        (["--test_set", "t=/nowhere.jsonl"], "/nowhere.jsonl"),
        (["--test_set", "t=/dev/null"], "/dev/null"),
    ],
)
def test_a_wrong_command_is_one_line(model_dir, test_set, tmp_path, arguments, message):
    done = helper("decode.py", *asked(model_dir, test_set[0], tmp_path / "out", "conf/decode.yaml"), *arguments)
    assert done.returncode in (1, 2) and done.stderr.count("\n") == 1 and message in done.stderr
    assert not (tmp_path / "out").exists()


def transcript_rows(model, test_set, hypotheses, references):
    return [{"key": str(n), "hyp": hyp, "ref": ref, "seconds": 3.0, "model": model, "test_set": test_set,
             "condition": {"hop1": {"codec": "g711_alaw"}, "noise": {"kind": "white", "snr_db": 12.0}, "g711": "alaw"},
             "speaker": f"s{n}", "call": None}
            for n, (hyp, ref) in enumerate(zip(hypotheses, references, strict=True))]


def test_summary_holds_the_rows_of_the_contract(tmp_path):
    references = ["我要退款", "逾期了吗", "好的", "可以", "再见"]
    for model, test_set, hypotheses, truth in (
        ("base", "real_test", ["我要腿款", "", "好的好的好的好的好的好的", "可以", "再见"], references),
        ("final", "real_test", ["我要退款", "预期了吗", "好的", "可以", "再见"], references),
        ("base", "no_speech", ["嗯嗯", "", "", "", ""], [""] * 5),
    ):
        write_jsonl(tmp_path / "t" / f"{model}.{test_set}.jsonl", transcript_rows(model, test_set, hypotheses, truth))
    conf = write_conf(tmp_path / "conf.yaml")
    done = helper("score.py", "--transcripts", tmp_path / "t", "--conf", conf,
                  "--output", tmp_path / "summary.json")
    assert done.returncode == 0, done.stderr
    rows = {(row["model"], row["test_set"]): row for row in json.loads((tmp_path / "summary.json").read_text("utf-8"))}
    base, final, silence = rows["base", "real_test"], rows["final", "real_test"], rows["base", "no_speech"]
    assert {"model", "test_set", "utterances", "cer", "cer_low", "cer_high", "wer", "kwer"} <= base.keys()
    assert base["cer"] == pytest.approx((1 + 4 + 10) / 14) and (base["loops"], base["empties"]) == (1, 1)
    assert final["cer"] == pytest.approx(1 / 14) and base["cer_low"] <= base["cer"] <= base["cer_high"]
    assert base["kwer"] == 1.0 and final["kwer"] == 0.0  # 逾期|预期 is one keyword
    assert [final[f"keyword_{name}"] for name in ("recall", "precision", "f1")] == [1.0, 1.0, 1.0]
    assert [base[f"keyword_{name}"] for name in ("recall", "precision", "f1")] == [0.0, None, 0.0]
    assert base["groups"] == 5 and base["p_value"] is None and 0 < final["p_value"] <= 1
    assert silence["cer"] is None and silence["chars_per_minute"] == pytest.approx(2 / 0.25)
    assert base["chars_per_minute"] is None and base["chars_per_minute_low"] is None
    assert silence["chars_per_minute_low"] == 0 and silence["chars_per_minute_high"] > silence["chars_per_minute"]
    details = json.loads((tmp_path / "details.json").read_text("utf-8"))
    values = {(row["condition"], row["value"]) for row in details["conditions"]}
    assert {("codec", "g711_alaw"), ("snr", "10 to 15 dB"), ("loss", "under 0.1 %"), ("recorder", "none"),
            ("duration", "2 to 5 seconds"), ("speaker", "s1")} <= values
    assert ("退", "腿") in [(row["reference"], row["hypothesis"]) for row in details["confusions"]]
    assert {(row["model"], row["keyword"], row["keyword_f1"]) for row in details["keywords"]} == {
        (model, keyword, f1) for model, f1 in (("base", 0.0), ("final", 1.0)) for keyword in ("退款", "逾期")}
    assert "real_test" in done.stdout and "CER %" in done.stdout
    done = helper("score.py", "--transcripts", tmp_path / "t", "--output", tmp_path / "none.json",
                  "--conf", conf, "--keywords", "")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {row["kwer"] for row in json.loads((tmp_path / "none.json").read_text("utf-8"))} == {None}
    done = helper("score.py", "--transcripts", tmp_path / "t", "--output", tmp_path / "none.json",
                  "--conf", write_conf(tmp_path / "conf.yaml", bootstrap_resamples=0))  # fmt: skip
    assert done.returncode == 2 and "a whole number from 1" in done.stderr and done.stderr.count("\n") == 1


def test_numbers_are_compared_in_chinese_on_both_sides_where_that_is_asked_for(tmp_path):
    for model, hypothesis, reference in (("base", "分12期", "分十二期"), ("final", "分十二期", "分12期")):
        write_jsonl(tmp_path / f"t/{model}.real_test.jsonl",
                    transcript_rows(model, "real_test", [hypothesis], [reference]))  # fmt: skip
    (tmp_path / "k.txt").write_text("12期\n", "utf-8")
    for chinese, errors, kwer in ((True, [0, 0], [0.0, 0.0]), (False, [2, 2], [None, 1.0])):
        conf = write_conf(tmp_path / "conf.yaml", chinese_numerals=chinese)
        done = helper_here(score.main, "--transcripts", tmp_path / "t", "--output", tmp_path / "s.json",
                           "--keywords", tmp_path / "k.txt", "--conf", conf)  # fmt: skip
        rows = json.loads((tmp_path / "s.json").read_text("utf-8"))
        assert ([row["substitutions"] for row in rows], [row["kwer"] for row in rows]) == (errors, kwer), done.stderr


def test_an_interval_is_of_people_not_of_their_calls():
    """Ten calls each of twenty speakers who differ: drawing calls says 95 % and holds the true rate in six of ten."""
    from score import Scored

    rng, runs, covered = np.random.default_rng(0), 150, 0
    for _ in range(runs):
        wrong = rng.binomial(10, np.repeat(rng.beta(3, 27, 20), 10))  # of ten characters a call, at 10 %
        rows = transcript_rows("final", "real_test", ["错" * n + "对" * (10 - n) for n in wrong], ["对" * 10] * 200)
        rows = [row | {"call": str(n), "speaker": f"agent{n // 10}"} for n, row in enumerate(rows)]
        summary = Scored(rows, {}, False).summary(None, 500)
        covered += summary["cer_low"] <= 0.1 <= summary["cer_high"]
    assert covered / runs >= 0.9


def test_that_one_agent_in_every_call_leaves_no_interval_is_said(tmp_path):
    rows = transcript_rows("final", "real_test", ["好", "的"] * 2, ["好"] * 4)
    rows = [row | {"call": f"c{n // 2}", "speaker": "agent" if n % 2 else f"s{n}"} for n, row in enumerate(rows)]
    write_jsonl(tmp_path / "t/final.real_test.jsonl", rows)
    done = helper("score.py", "--transcripts", tmp_path / "t", "--output", tmp_path / "s.json")
    assert done.stderr.count("real_test: no intervals and no p-values, for which it takes 5 groups") == 1
    assert [json.loads((tmp_path / "s.json").read_text())[0][name] for name in ("cer", "cer_low")] == [0.5, None]


def test_transcripts_of_other_rows_are_not_compared_in_silence(tmp_path):
    for model, rows in (("base", 6), ("final", 5)):
        write_jsonl(tmp_path / f"t/{model}.real_test.jsonl",
                    transcript_rows(model, "real_test", ["好"] * rows, ["好的"] * rows))  # fmt: skip
    done = helper("score.py", "--transcripts", tmp_path / "t", "--output", tmp_path / "s.json")
    assert done.stderr.count("WARNING") == 1 and "real_test: final has not the rows of base" in done.stderr
    write_jsonl(tmp_path / "t/list.jsonl", [{"key": "a", "speech_length": 100}])
    done = helper("score.py", "--transcripts", tmp_path / "t", "--output", tmp_path / "s.json")
    assert done.returncode == 2 and "list.jsonl is no transcript of decode.py" in done.stderr
    assert done.stderr.count("\n") == 1


def test_the_mix_is_chosen_on_dev_and_without_p_values(tmp_path):
    for model, test_set, hypothesis in (
        ("base", "real_dev", "预"), ("alpha_0.50", "real_dev", "预期了"), ("alpha_1.00", "real_dev", "逾期了吗"),
        ("base", "wideband_dev", "逾期了吗"), ("alpha_0.50", "wideband_dev", "逾期了吗"),
        ("alpha_1.00", "wideband_dev", "预期了吗"),
    ):
        rows = transcript_rows(model, test_set, [hypothesis] * 3, ["逾期了吗"] * 3)
        write_jsonl(tmp_path / "t" / f"{model}.{test_set}.jsonl", rows)
    for loss, alpha, models in (
        ("0.25", 0.5, ["--models", "base", "alpha_0.50"]),  # the other was decoded for another run
        ("0.1", 0.5, []), ("0.25", 1.0, []),
    ):
        done = helper(
            "score.py", "--transcripts", tmp_path / "t", *models, "--max_wideband_loss", loss,
            "--output", tmp_path / "dev_summary.json", "--choose", tmp_path / "choice.json",
        )
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / "choice.json").read_text("utf-8"))["alpha"] == alpha
    done = helper("score.py", "--transcripts", tmp_path / "t", "--models", "last",
                  "--output", tmp_path / "none.json")  # fmt: skip
    assert done.returncode == 2 and "has none of --models last" in done.stderr and done.stderr.count("\n") == 1
    summary = json.loads((tmp_path / "dev_summary.json").read_text("utf-8"))
    assert all(row["p_value"] is None for row in summary)


def test_a_large_simulated_dev_set_does_not_outvote_the_calls():
    from score import choose_alpha

    # Dev of the demo, seed 0, had these rates at equal sizes; here simulated dev is a corpus's.
    rates = {"alpha_0.75": (0.095, 0.492), "alpha_1.0": (0.104, 0.226), "base": (0.691, 0.972)}
    rows = [{"model": model, "test_set": test_set, "cer": cer, "characters": size, "substitutions": round(cer * size),
             "deletions": 0, "insertions": 0}
            for model, pair in rates.items()
            for test_set, cer, size in zip(("simulated_dev", "real_dev"), pair, (300_000, 5_000), strict=True)]
    rows += [row | {"test_set": "wideband_dev", "cer": 0.03, "substitutions": 150} for row in rows[1::2]]
    assert choose_alpha(rows, 0.01)["alpha"] == 1.0


def test_auto_is_what_it_means_on_this_machine(tmp_path, monkeypatch):
    names = ("device", "dtype", "batch_size", "batch_seconds")
    auto = write_conf(tmp_path / "conf.yaml", **dict.fromkeys(names, "auto"))
    machines = {(False, False): ["cpu", "fp32", 32, 600], (True, False): ["cuda", "fp32", 256, 9600],
                (True, True): ["cuda", "bf16", 256, 9600]}  # fmt: skip
    for (gpu, bf16), meant in machines.items():
        monkeypatch.setattr(torch.cuda, "is_available", lambda gpu=gpu: gpu)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, bf16=bf16: bf16)
        assert [read_conf(auto)[name] for name in names] == meant
    chosen = write_conf(tmp_path / "conf.yaml", device="cuda", batch_size=7)
    assert read_conf(chosen)["dtype"] == "bf16" and read_conf(chosen)["batch_size"] == 7


def test_settings_in_another_encoding_are_refused(tmp_path):
    (tmp_path / "conf.yaml").write_text("device: cpu  # 处理器\n", "gb18030")
    with pytest.raises(UserError, match="can't decode"):
        read_conf(tmp_path / "conf.yaml")


@pytest.mark.parametrize(("name", "value"), [
    ("device", "gpu"), ("device", None), ("dtype", "fp8"), ("batch_size", 0), ("batch_size", "many"),
    ("batch_seconds", "1e4"), ("max_new_tokens", 3.5), ("max_new_tokens", "auto"), ("max_tokens_per_second", -100),
])  # fmt: skip
def test_a_setting_that_cannot_be_is_refused_by_name(tmp_path, name, value):
    conf = write_conf(tmp_path / "conf.yaml", **{name: value})
    with pytest.raises(UserError, match=f"{name} cannot be {value!r}") as error:
        read_conf(conf)
    assert error.value.code == 2
