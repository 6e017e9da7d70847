"""Stage -1 finds the model wherever a hub's client has put it, and refuses a folder that lacks anything."""

import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml

import download_model
from common import UserError
from mini import ROOT, helper, helper_here
from miniature import build_folder

MODEL = "Some.Owner/Fun-ASR-Nano-2.5"
# What FunASR's registry knows is registered by importing it; one process does it once for all tests.
SIZE = {"encoder_dim": 32, "encoder_blocks": 1, "encoder_ffn": 32, "llm_dim": 32, "llm_layers": 1, "llm_ffn": 32}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return build_folder(tmp_path_factory.mktemp("model") / "whole", "你好0123456789", SIZE, seed=0)


@pytest.fixture
def folder(whole, tmp_path):
    return Path(shutil.copytree(whole, tmp_path / "model"))


@pytest.fixture
def no_hub(monkeypatch, tmp_path):
    """A machine without caches whose every connection is refused."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.delenv("MODELSCOPE_CACHE", raising=False)
    monkeypatch.delenv("HF_HOME", raising=False)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    return tmp_path


@pytest.fixture
def unchecked(monkeypatch):
    """Any folder passes as a model."""
    monkeypatch.setattr(download_model, "check_model", lambda folder: {"model_dir": str(folder)})


def test_a_whole_folder_is_accepted_and_written_down(folder, tmp_path):
    done = helper_here(download_model.main, "--model", folder, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/model_dir.txt").read_text() == f"{folder}\n"
    found = json.loads((tmp_path / "out/check.json").read_text())
    assert found["ctc"] is True
    assert found["parameters"].keys() == {"audio_encoder", "audio_adaptor", "ctc_decoder", "ctc", "llm"}


def test_counted_parameters_are_those_of_the_built_model(folder):
    from funasr import AutoModel

    model, _ = AutoModel.build_model(model=str(folder), device="cpu", disable_update=True)
    counted = download_model.check_model(folder)["parameters"]
    assert sum(counted.values()) == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("cache", "layout"),
    [
        ("MODELSCOPE_CACHE", "hub/{owner}/{name}"),
        ("MODELSCOPE_CACHE", "hub/{owner}/{dotless}"),
        ("MODELSCOPE_CACHE", "hub/models/{owner}/{dotless}"),
        ("MODELSCOPE_CACHE", "models/{owner}/{dotless}"),
        ("MODELSCOPE_CACHE", "models/{owner}/{name}"),
        ("MODELSCOPE_CACHE", "{owner}/{name}"),
        ("MODELSCOPE_CACHE", "models/{owner}--{name}/snapshots/master"),
        ("HF_HUB_CACHE", "models--{owner}--{name}/snapshots/0123abcd"),
        ("HF_HOME", "hub/models--{owner}--{name}/snapshots/0123abcd"),
        ("HOME", ".cache/modelscope/hub/models/{owner}/{dotless}"),
        ("HOME", ".cache/huggingface/hub/models--{owner}--{name}/snapshots/0123abcd"),
    ],
)
def test_every_cache_layout_is_found(no_hub, unchecked, monkeypatch, cache, layout):
    owner, name = MODEL.split("/")
    monkeypatch.setenv(cache, str(no_hub / "cache"))
    there = no_hub / "cache" / layout.format(owner=owner, name=name, dotless=name.replace(".", "___"))
    there.mkdir(parents=True)
    for file in ("config.yaml", "model.pt"):
        (there / file).touch()
    assert download_model.find_model(MODEL) == {"model_dir": str(there)}


def test_a_damaged_folder_in_a_cache_is_passed_over_for_a_whole_one(no_hub, monkeypatch, folder):
    damaged, whole = no_hub / "modelscope/models" / MODEL, no_hub / f"hf/models--{MODEL.replace('/', '--')}/snapshots/a"
    shutil.copytree(folder, damaged)
    os.truncate(damaged / "model.pt", 100)
    shutil.copytree(folder, whole)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(no_hub / "modelscope"))
    monkeypatch.setenv("HF_HUB_CACHE", str(no_hub / "hf"))
    assert download_model.find_model(MODEL)["model_dir"] == str(whole)


def test_of_the_snapshots_of_hugging_face_the_one_that_main_names_is_taken(no_hub, unchecked, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(no_hub))
    cache = no_hub / f"models--{MODEL.replace('/', '--')}"
    for name in ("snapshots/0/config.yaml", "snapshots/0/model.pt", "snapshots/1/config.yaml", "snapshots/1/model.pt"):
        (cache / name).parent.mkdir(parents=True, exist_ok=True)
        (cache / name).touch()
    (cache / "refs").mkdir()
    (cache / "refs/main").write_text("1")
    assert download_model.find_model(MODEL)["model_dir"] == str(cache / "snapshots/1")


def test_a_half_downloaded_folder_is_not_taken_for_the_model(no_hub, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_CACHE", str(no_hub))
    (no_hub / "models" / MODEL).mkdir(parents=True)
    (no_hub / "models" / MODEL / "config.yaml").touch()
    with pytest.raises(UserError, match="cannot be downloaded"):
        download_model.find_model(MODEL)


def test_a_damaged_folder_in_a_cache_is_named_with_what_to_do(no_hub, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_CACHE", str(no_hub))
    damaged = no_hub / "models" / MODEL
    damaged.mkdir(parents=True)
    for file in ("config.yaml", "model.pt"):
        (damaged / file).touch()
    done = helper_here(download_model.main, "--model", MODEL, "--output", no_hub / "out")
    assert done.returncode == 1 and f"Remove {damaged} before, or it is found again" in done.stderr


def test_without_a_network_one_line_says_what_to_do_elsewhere(no_hub):
    start = time.monotonic()
    done = helper("download_model.py", "--model", MODEL, "--output", no_hub / "out")
    assert time.monotonic() - start < 30
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert f"modelscope download --model {MODEL}" in done.stderr
    assert str(no_hub / "home/.cache/modelscope/models" / MODEL) in done.stderr
    assert not (no_hub / "out").exists()


@pytest.mark.parametrize("status", [404, 500])
def test_a_hub_that_refuses_is_one_line_and_the_other_is_asked(no_hub, monkeypatch, status):
    class Hub(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(status)
            self.send_header("Content-Length", "0")
            self.end_headers()

        do_HEAD = do_GET

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        for name in ("MODELSCOPE_ENDPOINT", "HF_ENDPOINT"):
            monkeypatch.setenv(name, url)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        code = (f"import sys; sys.argv[1:] = ['--model', '{MODEL}', '--output', '{no_hub / 'out'}']; "
                f"import download_model, common; download_model.HUBS = dict.fromkeys(download_model.HUBS, '{url}'); "
                "common.run(download_model.main)")
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT / "local", capture_output=True, text=True, check=False)
        server.shutdown()
    error = done.stderr.splitlines()[-1]
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert error.startswith(f"error: {MODEL}") and error.count(str(status)) >= 2, done.stderr


def test_an_error_of_a_hubs_client_without_words_is_called_by_its_name(no_hub, monkeypatch):
    def fail(_model):
        raise AssertionError

    monkeypatch.setattr(download_model, "reachable", lambda _address: True)
    for client in ("modelscope", "huggingface_hub"):
        monkeypatch.setattr(f"{client}.snapshot_download", fail)
    with pytest.raises(UserError, match="ModelScope: AssertionError; Hugging Face: AssertionError"):
        download_model.find_model(MODEL)


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere/at/all", "nowhere", "a/b/c"])
def test_what_is_neither_a_folder_nor_an_id_is_refused(no_hub, model):
    with pytest.raises(UserError, match="neither") as refused:
        download_model.find_model(model)
    assert refused.value.code == 2


def without_tensor(folder, prefix):
    state = torch.load(folder / "model.pt")
    torch.save({name: tensor for name, tensor in state.items() if not name.startswith(prefix)}, folder / "model.pt")


def reshaped(folder):
    state = torch.load(folder / "model.pt")
    state["audio_encoder.after_norm.weight"] = torch.zeros(5)
    torch.save(state, folder / "model.pt")


def no_ctc_vocabulary_named(folder):
    configuration = json.loads((folder / "configuration.json").read_text())
    del configuration["file_path_metas"]["dataset_conf"]
    (folder / "configuration.json").write_text(json.dumps(configuration))


def no_tokenizer(folder):
    for path in (folder / "Qwen3-0.6B").glob("tokenizer*"):
        path.unlink()


def vocabulary_alone(folder):
    llm = folder / "Qwen3-0.6B"
    (llm / "tokenizer.json").unlink()
    (llm / "tokenizer_config.json").write_text('{"tokenizer_class": "Qwen2Tokenizer"}')
    (llm / "vocab.json").write_text('{"1": 0}')
    (llm / "merges.txt").write_text("#version: 0.2\n")


def other_model(folder):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "model": "Paraformer9"}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "model.pt").unlink(), "no model.pt"),
        (lambda folder: (folder / "config.yaml").unlink(), "no config.yaml"),
        (lambda folder: (folder / "model.pt").write_bytes(b"git-lfs pointer"), "not a whole PyTorch checkpoint"),
        (lambda folder: os.truncate(folder / "model.pt", 200_000), "not a whole PyTorch checkpoint"),
        (lambda folder: shutil.rmtree(folder / "Qwen3-0.6B"), "LLM folder"),
        (lambda folder: (folder / "Qwen3-0.6B/tokenizer.json").unlink(), "tokenizer does not load"),
        (lambda folder: (folder / "Qwen3-0.6B/tokenizer.json").write_text("{"), "tokenizer does not load"),
        (no_tokenizer, "tokenizer does not load .*knows no text"),
        (vocabulary_alone, "tokenizer does not load .*No such file.*tokenizer.json"),
        (lambda folder: (folder / "multilingual.tiktoken").unlink(), "CTC vocabulary"),
        (lambda folder: (folder / "configuration.json").unlink(), "no configuration.json"),
        (lambda folder: (folder / "configuration.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "config.yaml").write_text("a: [b"), "cannot be read"),
        (lambda folder: (folder / "config.yaml").write_text("model: FunASRNano\n"), "not a Fun-ASR-Nano folder"),
        (lambda folder: without_tensor(folder, "audio_adaptor.linear1"), "2 tensors, first audio_adaptor.linear1"),
        (reshaped, "another shape.*audio_encoder.after_norm.weight"),
        (no_ctc_vocabulary_named, "CTC vocabulary"),
        (other_model, "no model Paraformer9"),
    ],
)
def test_a_damaged_folder_is_refused_with_its_reason(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message) as refused:
        download_model.check_model(folder)
    assert refused.value.code in (1, 2)


def test_a_damaged_folder_leaves_nothing_behind(folder, tmp_path):
    (folder / "model.pt").unlink()
    done = helper("download_model.py", "--model", folder, "--output", tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "model.pt" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("prefix", ["ctc.", ("ctc.", "ctc_decoder.")])
def test_missing_ctc_weights_are_said_not_refused(folder, tmp_path, prefix):
    without_tensor(folder, prefix)
    done = helper_here(download_model.main, "--model", folder, "--output", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert "no CTC weights" in done.stderr
    assert json.loads((tmp_path / "out/check.json").read_text())["ctc"] is False


def test_a_tied_output_layer_may_be_left_out_of_the_checkpoint(folder):
    without_tensor(folder, "llm.lm_head")
    assert download_model.check_model(folder)["parameters"]["llm"] > 0
