"""A call becomes a dialogue: what is said, by whom and when, whatever the recording is, with the prompt asked for."""

import json
import os
import re
import subprocess

import numpy as np
import pytest
import soundfile
import torch

import audio
import transcribe
from common import UserError
from mini import ROOT, helper, helper_here
from miniature import build_folder
from nano.inference import Recogniser, Utterance, read_conf
from sounds import encode
from speak_corpus import open_espeak
from telephone.resample import resample

CONF = read_conf(ROOT / "conf/decode.yaml") | {"max_new_tokens": 20}
TEXTS = ["您好我的订单号是一二三四", "您的账户已经逾期了", "我要退款"]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    size = {"encoder_dim": 64, "encoder_blocks": 1, "llm_dim": 64, "llm_layers": 2, "llm_head_dim": 16, "llm_ffn": 96}
    return build_folder(tmp_path_factory.mktemp("model") / "mini", "".join(TEXTS), size)


@pytest.fixture(scope="module")
def recogniser(model_dir):
    return Recogniser(model_dir, "cpu")


@pytest.fixture(scope="module")
def vad():
    return transcribe.load_vad()


@pytest.fixture(scope="module")
def spoken():
    """Three sentences at 8 kHz."""
    with open_espeak() as speak:
        return [resample(speak(text, "m3", 150, 50), 22050, 8000) for text in TEXTS]


def join(pieces, pause=1.5):
    """Samples of the pieces with pauses of line noise around them, and where each begins and ends, in seconds."""
    gap, spans, length = int(8000 * pause), [], 0
    for piece in pieces:
        spans.append(((length + gap) / 8000, (length + gap + len(piece)) / 8000))
        length += gap + len(piece)
    call = np.concatenate([part for piece in pieces for part in (np.zeros(gap, np.float32), piece)] + [np.zeros(gap)])
    return (call + 1e-3 * np.random.default_rng(0).standard_normal(len(call))).astype(np.float32), spans


def test_speech_is_found_where_it_is_and_cut_at_pauses(vad, spoken):
    call, spans = join(spoken)
    found = transcribe.find_speech(call, 8000, vad)
    assert len(found) == len(spans)
    for (start, end), (first, last) in zip(found, spans, strict=True):
        assert abs(start - first) < 0.4 and abs(end - last) < 0.4
    at_16k = transcribe.find_speech(resample(call, 8000, 16000), 16000, vad)
    np.testing.assert_allclose(at_16k, found, atol=0.1)


def test_no_piece_is_longer_than_half_a_minute_and_none_of_the_speech_is_lost(vad, spoken):
    call = np.concatenate(spoken * 6)
    found = transcribe.find_speech(call, 8000, vad)
    assert len(call) > 40 * 8000 and max(end - start for start, end in found) <= 30.5
    assert sum(end - start for start, end in found) > 0.9 * len(call) / 8000


def test_where_nobody_speaks_nothing_is_transcribed(vad, recogniser, tmp_path):
    hum = 0.05 * np.sin(np.arange(8 * 8000) * 2 * np.pi * 50 / 8000)
    soundfile.write(tmp_path / "hum.wav", hum, 8000)
    dialogue = transcribe.transcribe(tmp_path / "hum.wav", recogniser, vad, "语音转写：", CONF)
    assert dialogue == {"seconds": 8.0, "channels": 1, "segments": []} and transcribe.as_text(dialogue) == ""


def test_the_text_is_that_of_the_upsampled_piece_alone(vad, recogniser, spoken, tmp_path):
    call, _ = join(spoken)
    soundfile.write(tmp_path / "call.wav", call, 8000, subtype="ALAW")
    prompt = recogniser.prompt()
    dialogue = transcribe.transcribe(tmp_path / "call.wav", recogniser, vad, prompt, CONF)
    samples = resample(soundfile.read(tmp_path / "call.wav", dtype="float32")[0], 8000, 16000)
    for segment in dialogue["segments"]:
        piece = samples[round(16000 * segment["start"]) : round(16000 * segment["end"])]
        assert [segment["text"]] == recogniser.transcribe([Utterance("alone", piece, prompt)], 20)
    assert len({segment["text"] for segment in dialogue["segments"]}) > 1  # or this test shows nothing


def test_two_channels_are_two_speakers_of_one_dialogue_in_the_order_of_time(vad, recogniser, spoken, tmp_path):
    agent, _ = join([spoken[0], spoken[2]], pause=3.0)
    client = np.zeros_like(agent)
    answer = int(8000 * 3.5) + len(spoken[0])  # half a second after the agent's first sentence
    client[answer : answer + len(spoken[1])] = spoken[1]
    soundfile.write(tmp_path / "call.flac", np.stack([agent, client], axis=1), 8000)
    dialogue = transcribe.transcribe(tmp_path / "call.flac", recogniser, vad, recogniser.prompt(), CONF)
    assert [segment["channel"] for segment in dialogue["segments"]] == [0, 1, 0]
    starts = [segment["start"] for segment in dialogue["segments"]]
    assert starts == sorted(starts) and abs(starts[1] - answer / 8000) < 0.4
    for segment in dialogue["segments"]:
        segment["text"] = "好"
    lines = transcribe.as_text(dialogue).splitlines()
    assert [re.fullmatch(r"\[0:00:\d\d\.\d\d - 0:00:\d\d\.\d\d\] ([AB]): 好", line)[1] for line in lines] == list("ABA")


def test_a_mono_call_that_fills_both_channels_is_transcribed_once_and_two_speakers_are_two(spoken, tmp_path):
    agent, client = (join(piece, pause)[0] for piece, pause in ((spoken[:1] * 2, 3.0), (spoken[1:2] * 2, 2.0)))
    length = min(len(agent), len(client))
    agent, client, word = agent[:length], client[:length], np.zeros(length, np.float32)
    word[-4000:] = 0.3 * spoken[2][:4000]
    call, silent = 0.5 * (agent + client), np.zeros(length)
    for left, right, subtype, expected in (
        (call, call + 1e-4, "PCM_16", 1), (call, 0.977 * call, "PCM_16", 1), (0.1 * call, -0.5 * call, "ULAW", 1),
        (call, 0.9 * call, "ALAW", 1), (agent, client, "PCM_16", 2), (agent, silent, "PCM_16", 2),
        (silent, client, "ALAW", 2), (agent + 0.7 * client, client + 0.7 * agent, "ALAW", 2),
        (np.tile(call, 20), np.tile(call, 20) + np.concatenate([np.tile(silent, 19), word]), "PCM_16", 2),
    ):
        soundfile.write(tmp_path / "call.wav", np.stack([left, right], axis=1), 8000, subtype=subtype)
        channels = transcribe.read_channels(tmp_path / "call.wav")
        assert len(channels) == expected
        if expected == 1:
            kept = left if np.square(left).sum() >= np.square(right).sum() else right
            np.testing.assert_allclose(channels[0][0], kept, atol=0.03)


@pytest.mark.parametrize(("suffix", "options"), [
    (".wav", {"subtype": "ULAW"}), (".wav", {"subtype": "GSM610"}), (".mp3", {}), (".ogg", {"subtype": "OPUS"}),
    (".amr", {}),
])
def test_what_stage_0_reads_is_transcribed_as_well(vad, spoken, tmp_path, suffix, options):
    path, (call, spans) = tmp_path / f"call{suffix}", join(spoken[:1])
    if suffix == ".amr":
        encode(path, call, 8000, "libopencore_amrnb")
    else:
        soundfile.write(path, call, 8000, **options)
    (samples, rate), = transcribe.read_channels(path)
    (start, end), = transcribe.find_speech(samples, rate, vad)
    assert abs(start - spans[0][0]) < 0.4 and abs(end - spans[0][1]) < 0.4


def test_hot_words_and_way_of_writing_reach_the_model_as_funasr_itself_would_send_them(model_dir, recogniser, spoken):
    from funasr import AutoModel

    samples = resample(spoken[0], 8000, 16000)
    stock = AutoModel(model=str(model_dir), disable_update=True, device="cpu", ctc_decoder=None,
                      frontend_conf={"dither": 0.0})
    texts = {}
    for hotwords in ((), ("退款", "逾期")):
        for itn in (True, False):
            recogniser.auto_model.kwargs["itn"] = itn  # what the folder's config.yaml says
            texts[hotwords, itn], = recogniser.transcribe([Utterance("x", samples, recogniser.prompt(hotwords))], 30)
            expected = stock.generate(torch.from_numpy(samples), hotwords=list(hotwords), itn=itn, max_length=30)
            assert texts[hotwords, itn] == expected[0]["text"]
    del recogniser.auto_model.kwargs["itn"]
    assert len(set(texts.values())) > 2  # the prompt does make a difference to this model


def test_hot_words_come_from_the_line_or_from_a_keyword_list(tmp_path):
    (tmp_path / "words.txt").write_text("# comment\n逾期｜预期\n退款  # often\n\n", "utf-8")
    assert transcribe.read_hotwords(str(tmp_path / "words.txt")) == ["逾期", "退款"]
    assert transcribe.read_hotwords("逾期, 退款，账单、利息；,") == ["逾期", "退款", "账单", "利息"]
    assert transcribe.read_hotwords("") == [] and transcribe.read_hotwords("TCP/IP") == ["TCP/IP"]
    with pytest.raises(UserError, match="is no file"):
        transcribe.read_hotwords(str(tmp_path / "word.txt"))


def test_recordings_are_found_in_folders_and_lists(tmp_path, caplog):
    caplog.set_level("INFO")
    for name in ("a/1.wav", "a/2.MP3", "3.flac", "4.al", "notes.txt", "a/data.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert sorted(transcribe.find_recordings(tmp_path)) == ["3.flac", "4.al", "a/1.wav", "a/2.MP3"]
    assert f"2 files of other suffixes left alone, such as {tmp_path}/a/data.json" in caplog.text
    assert list(transcribe.find_recordings(tmp_path / "3.flac")) == ["3.flac"]
    (tmp_path / "a/gone.wav").symlink_to("/nowhere.wav")
    (tmp_path / "a/calls").symlink_to(tmp_path)
    assert "a/gone.wav" in transcribe.find_recordings(tmp_path)
    assert f"3 files of other suffixes left alone, such as {tmp_path}/a/calls" in caplog.text
    (tmp_path / "wav.scp").write_text(f"call-1 {tmp_path}/a/1.wav\n\ncall-2 a b.wav\n", "utf-8")
    assert {key: str(path) for key, path in transcribe.find_recordings(tmp_path / "wav.scp").items()} == {
        "call-1": f"{tmp_path}/a/1.wav", "call-2": "a b.wav"}
    assert list(transcribe.find_recordings(tmp_path)) == ["call-1", "call-2"]  # a Kaldi folder
    (tmp_path / "wav.scp").write_text("call-1\n", "utf-8")
    with pytest.raises(UserError, match="call-1: want a key and a path"):
        transcribe.find_recordings(tmp_path / "wav.scp")
    (tmp_path / "wav.scp").write_text(f"call-1 sox a/b.wav -t wav - |\ncall-2 {tmp_path}/a/1.wav\n", "utf-8")
    pipe, file = transcribe.find_recordings(tmp_path / "wav.scp").values()  # one that cannot be read stops no other
    with pytest.raises(audio.AudioError, match="a command"):
        transcribe.identify(pipe)
    assert transcribe.identify(file)
    (tmp_path / "wav.scp").write_text("call-1 a.wav\ncall-1 b.wav\n", "utf-8")
    with pytest.raises(UserError, match="a key twice"):
        transcribe.find_recordings(tmp_path / "wav.scp")


def test_lists_in_another_encoding_are_refused(tmp_path):
    path = tmp_path / "list.scp"
    path.write_text("逾期 a.wav\n", "gb18030")
    for read in (lambda: transcribe.read_hotwords(str(path)), lambda: transcribe.find_recordings(path)):
        with pytest.raises(UserError, match="is not UTF-8") as caught:
            read()
        assert caught.value.code == 2
    path.write_text("逾期\n", "utf-8-sig")
    assert transcribe.read_hotwords(str(path)) == ["逾期"]


def test_the_vad_leaves_the_recognisers_threads_alone():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    transcribe.find_speech(np.zeros(8000, np.float32), 8000, transcribe.load_vad())
    assert torch.get_num_threads() == 2
    torch.set_num_threads(before)


def test_a_folder_is_transcribed_broken_files_are_named_and_a_second_run_keeps_what_is_there(
    model_dir, spoken, tmp_path
):
    calls, out = tmp_path / "calls", tmp_path / "out"
    calls.mkdir()
    soundfile.write(calls / "good.wav", join(spoken[:2])[0], 8000)
    (calls / "broken.wav").write_bytes(b"RIFF nothing")
    arguments = ["--audio", calls, "--model_dir", model_dir, "--output_dir", out]
    done = helper("transcribe.py", *arguments)
    assert done.returncode == 1 and "1 of 2 recordings not transcribed, first broken.wav" in done.stderr
    assert "Traceback" not in done.stderr and "good.wav" in done.stdout
    assert sorted(path.name for path in out.iterdir()) == ["good.wav.json", "good.wav.txt"]
    dialogue = json.loads((out / "good.wav.json").read_text("utf-8"))
    assert [segment.keys() for segment in dialogue["segments"]] == [{"channel", "start", "end", "text"}] * 2
    assert (out / "good.wav.txt").read_text("utf-8") == transcribe.as_text(dialogue)
    (calls / "broken.wav").unlink()
    written = (out / "good.wav.json").stat().st_mtime_ns
    assert helper_here(transcribe.main, *arguments).returncode == 0
    assert (out / "good.wav.json").stat().st_mtime_ns == written
    for damaged in (b"", b'{"made_of": "\xff', b"[]", b"{}"):
        (out / "good.wav.json").write_bytes(damaged)
        assert transcribe.read_kept(out / "good.wav.json") == {}
    relative = ["--audio", os.path.relpath(calls, ROOT), *arguments[2:], "--hotwords", "退款"]
    # Another prompt: transcribed again, wherever the path begins.
    assert helper_here(transcribe.main, *relative).returncode == 0
    again = json.loads((out / "good.wav.json").read_text("utf-8"))
    assert again["hotwords"] == ["退款"] and (out / "good.wav.json").stat().st_mtime_ns != written
    (tmp_path / "others").mkdir()
    soundfile.write(tmp_path / "others/good.wav", join(spoken[1:])[0], 8000)
    other = helper_here(transcribe.main, "--audio", tmp_path / "others", *arguments[2:])
    assert other.returncode == 1 and f"good.wav.json is the transcript of {relative[1]}/good.wav" in other.stderr
    assert "(TRANSCRIBED= of make)" in other.stderr
    made = subprocess.check_output(["make", "-n", "transcribe", "AUDIO=x", "TRANSCRIBED=/else"], cwd=ROOT, text=True)
    assert '--output_dir "/else"' in made


@pytest.mark.parametrize(("segments", "said"), [
    ([], "(no speech)"),
    ([{"channel": 0, "start": 1.0, "end": 2.0, "text": " "}], "(speech found, but no words recognised)"),
])
def test_a_transcript_without_words_says_whether_there_was_speech(model_dir, monkeypatch, tmp_path, segments, said):
    (tmp_path / "call.wav").touch()
    monkeypatch.setattr(transcribe, "transcribe", lambda *_: {"seconds": 3.0, "channels": 1, "segments": segments})
    done = helper_here(transcribe.main, "--audio", tmp_path / "call.wav", "--model_dir", model_dir,
                       "--output_dir", tmp_path)  # fmt: skip
    assert done.stdout.splitlines()[-1] == said


def test_a_recording_that_may_not_be_read_or_named_is_an_error_of_its_own(tmp_path):
    named = tmp_path / os.fsdecode("通话.wav".encode("gb18030"))
    named.touch()
    for path, reason in ((named, "not UTF-8"), (tmp_path / "none.wav", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(audio.AudioError, match=reason) as caught:
            transcribe.identify(path)
        str(caught.value).encode()
    assert audio.file_name("客户/张三.wav", "", letters=r"\w").startswith("客户_张三_wav~")


@pytest.mark.parametrize(("arguments", "message"), [
    (["--audio", "/nowhere.wav", "--model_dir", "conf"], "--audio /nowhere.wav does not exist"),
    (["--audio", "conf", "--model_dir", "conf"], "holds no recordings"),
    (["--audio", "README.md", "--model_dir", "conf"], "run stage 5 first"),
])
def test_a_wrong_command_is_one_line(tmp_path, arguments, message):
    done = helper("transcribe.py", *arguments, "--output_dir", tmp_path / "out")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr
    assert not (tmp_path / "out").exists()
