"""What makes training fast changes no loss: each speed-up beside upstream's code, on the same weights and batch."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from funasr.frontends import wav_frontend
from funasr.models.fun_asr_nano import model as stock

import nano.dataset
import nano.layers
from common import UserError
from nano.batch_size import heaviest, largest
from nano.layers import compile_layers, inside
from nano.model import FunASRNano, normalised

MODULES = ("audio_encoder", "audio_adaptor", "ctc_decoder")
STAGE_TRAINS = {1: {"audio_encoder"}, 2: {"audio_adaptor", "ctc_decoder"}, 3: set()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    from miniature import build_folder

    size = {"encoder_dim": 32, "encoder_blocks": 2, "encoder_ffn": 48, "adaptor_ffn": 32, "ctc_ffn": 32, "llm_dim": 32,
            "llm_heads": 2, "llm_kv_heads": 1, "llm_head_dim": 16, "llm_ffn": 48}  # fmt: skip
    return build_folder(tmp_path_factory.mktemp("model"), "一二三四五六七八九零", size, seed=2)


def build(folder: Path, stage: int, **config) -> FunASRNano:
    """The stage's model in eval mode, so that dropout, which draws other numbers in other code, is out."""
    from funasr import AutoModel
    from funasr.register import tables

    tables.model_classes["FunASRNano"] = FunASRNano
    freeze = {f"{part}_conf": {"freeze": part not in STAGE_TRAINS[stage]} for part in MODULES}
    freeze["llm_conf"] = {"freeze": True, "use_lora": stage == 3}
    built = AutoModel(model=str(folder), disable_update=True, device="cpu", ncpu=1, **freeze, **config)
    return built.model.eval()


def batch(rows: int = 3) -> dict:
    """Utterances of different lengths as the collator makes them: padded features, prompts and labels."""
    rng = torch.Generator().manual_seed(0)
    lengths = torch.tensor([[40], [24], [16]])[:rows]  # of eight: the adaptor pads with what the batch has
    speech = torch.zeros(rows, 40, 560)
    tokens = torch.full((rows, 24), -1, dtype=torch.int64)
    labels, mask = tokens.clone(), torch.full((rows, 24), -1)
    for row, length in enumerate(lengths[:, 0]):
        speech[row, :length] = torch.randn(length, 560, generator=rng)
        text = 18 + 2 * row
        tokens[row, :text] = torch.randint(0, 15, (text,), generator=rng)
        labels[row, :text] = torch.where(torch.arange(text) < 12, -100, tokens[row, :text])
        mask[row, :text] = 1
    return {
        "speech": speech, "speech_lengths": lengths, "input_ids": tokens, "attention_mask": mask, "labels_ids": labels,
        "fbank_beg": torch.tensor([[3], [5], [2]])[:rows], "fake_token_len": (lengths - 1) // 8 + 1,
        "item": [{"assistant": ["一二三"]}] * rows,
    }  # fmt: skip


def loss_and_gradients(model: torch.nn.Module, part: dict | None = None) -> tuple[float, dict[str, torch.Tensor]]:
    model.zero_grad()
    loss, stats, _ = model(**copy.deepcopy(part or batch()))
    loss.backward()
    return stats["loss"].item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(gradients: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Up to rounding, which is some 1e-7 and differs from CPU to CPU. Some are nothing but that (bias of keys)."""
    assert gradients and gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


def upstream(model: FunASRNano) -> torch.nn.Module:
    """The same weights in upstream's class, with its forward and its attention."""
    theirs = copy.deepcopy(model)
    theirs.__class__ = type("Stock", (FunASRNano,), {"forward": stock.FunASRNano.forward})
    classes = {ours: theirs for theirs, ours in nano.layers.FUSED.items()}
    for layer in theirs.modules():
        layer.__class__ = classes.get(type(layer), type(layer))
    return theirs


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_loss_and_gradients_of_all_speed_ups_together_are_upstreams(folder, stage):
    ours = build(folder, stage, ctc_weight=0, fused_attention=True)
    if stage == 3:
        for name, parameter in ours.named_parameters():  # B starts at zero, and A's gradient with it
            if name.endswith("lora_B"):
                torch.nn.init.normal_(parameter, std=0.1)
    assert any(isinstance(layer, nano.layers.FusedSANM) for layer in ours.modules())
    loss, gradients = loss_and_gradients(ours)
    expected, expected_gradients = loss_and_gradients(upstream(ours))
    assert loss == pytest.approx(expected, rel=1e-5)
    assert_same(gradients, expected_gradients)
    assert ours(**batch())[1]["acc"] == upstream(ours)(**batch())[1]["acc"]


def test_bf16_noise_of_the_fused_path_is_that_of_upstreams(folder):
    """Autocast as train_conf.use_bf16 does: both differ from fp32 by rounding, ours not by more than twice theirs."""
    ours = build(folder, 1, ctc_weight=0, fused_attention=True)
    exact = loss_and_gradients(ours)[0]
    losses = []
    for model in (ours, upstream(ours)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            losses.append(loss_and_gradients(model)[0])
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)
    assert abs(losses[0] - exact) <= 2 * abs(losses[1] - exact) + 5e-3 * exact


def test_fused_attention_leaves_the_ctc_loss_alone(folder):
    plain, fused = (build(folder, 2, ctc_weight=0.3, fused_attention=fused) for fused in (False, True))
    loss, gradients = loss_and_gradients(fused)
    expected, expected_gradients = loss_and_gradients(plain)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert any(name.startswith("ctc_decoder.blocks") for name in gradients)
    assert_same(gradients, expected_gradients)


@pytest.mark.parametrize("stage", [1, 2])
def test_utterances_in_a_row_give_the_loss_of_a_padded_batch(folder, monkeypatch, stage):
    """What a GPU does, with its attention within segments replaced by PyTorch's, segment by segment."""
    model = build(folder, stage, ctc_weight=0.3, detach_ctc_decoder=False, fused_attention=True)
    loss, gradients = loss_and_gradients(model)
    seen = {}

    def attend_each(layer, q, k, v, bounds, longest):
        seen[type(layer)] = bounds.tolist()
        lengths = bounds.diff().tolist()
        assert bounds[0] == 0 and bounds[-1] == q.shape[2] and min(lengths) > 0 and max(lengths) <= longest
        parts = zip(*(heads.split(lengths, 2) for heads in (q, k, v)), strict=True)
        attended = [torch.nn.functional.scaled_dot_product_attention(*part) for part in parts]
        return layer.linear_out(torch.cat(attended, 2).transpose(1, 2).flatten(2))

    monkeypatch.setattr(nano.layers, "attend_each", attend_each)
    monkeypatch.setattr(nano.layers, "takes_rows", lambda x, layer: True)
    in_a_row, their_gradients = loss_and_gradients(model)
    # 40, 24 and 16 frames, at least half the encoder's kernel of 11 between two; an eighth of that in the adaptor.
    assert seen[nano.layers.FusedSANM] == [0, 40, 45, 69, 90, 106, 256]
    assert seen[nano.layers.Fused] == [0, 5, 6, 9, 12, 14, 256]
    assert in_a_row == pytest.approx(loss, rel=1e-6)
    assert_same(their_gradients, gradients)
    model.encode(torch.randn(2, 3, 560), torch.tensor([3, 2]))  # shorter than a gap
    assert seen[nano.layers.FusedSANM] == [0, 3, 8, 10, 256]


def test_the_ctc_loss_of_an_utterances_own_symbols_is_that_of_all_symbols(folder):
    """Loss and gradients; repeated symbols, padding, silence, and an utterance too short for its text among them."""
    model = build(folder, 2, ctc_weight=0.3)
    assert model.ctc.ctc_lo.out_features % 8, "so that the symbols that fill up the matrix would be seen"
    encoded, lengths = torch.randn(5, 20, 32), torch.tensor([20, 13, 7, 2, 9])
    rows = [{"assistant": [text]} for text in ("一二三一一", "五", "二二二", "一二三四五六七八九零", "/sil")]

    def plain(decoded):
        texts = [model.ctc_tokenizer.encode(row["assistant"][0]) for row in rows[:-1]] + [[]]
        return torch.nn.functional.ctc_loss(
            model.ctc.log_softmax(decoded).transpose(0, 1), torch.tensor(sum(texts, [])), lengths,
            torch.tensor(list(map(len, texts))), blank=model.blank_id, zero_infinity=True, reduction="none",
        ).div(torch.tensor([5, 1, 3, 10, 9])).mean()  # by symbol; of silence, by frame

    results = []
    targets = model._ctc_targets(rows, lengths)
    for ours in (False, True):
        model.zero_grad()
        loss = model._ctc_loss(encoded, lengths, *targets) if ours else plain(model.ctc_decoder(encoded, lengths)[0])
        loss.backward()
        trained = [*model.ctc_decoder.named_parameters(), *model.ctc.named_parameters()]
        results.append((loss.item(), {name: parameter.grad.clone() for name, parameter in trained}))
    (expected, expected_gradients), (loss, gradients) = results
    assert loss == pytest.approx(expected, rel=1e-6)
    assert_same(gradients, expected_gradients)


@pytest.mark.parametrize(("text", "written"), [
    ("您好，请问是王先生吗？", "您好请问是王先生吗"), ("What can you do?", "what can you do"), ("ＡＢＣ１２", "abc12"),
    ("利率3.5%。", "利率3.5%"), ("我用 App 打电话, OK", "我用 app 打电话 ok"), ("don't…", "don't"), ("。", ""),
    ("DON’T", "don't"), ("共1,000元", "共1000元"),
])  # fmt: skip
def test_the_ctc_branch_is_asked_for_what_the_released_one_writes(text, written):
    assert normalised(text) == written


@pytest.mark.parametrize("asked", [True, False])
def test_the_folder_says_whether_the_ctc_text_is_normalised(folder, asked):
    model = build(folder, 2, ctc_weight=0.3, dataset_conf={"ctc_target_normalize": asked})
    _different, _places, counts, _frames = model._ctc_targets([{"assistant": ["一，二。"]}], torch.tensor([20]))
    assert (counts == [2]) == asked


def test_masks_take_no_more_than_a_quarter_of_a_row_and_no_frame_of_one_they_would_take_more_of(folder):
    config = {"apply_time_warp": False, "time_mask_width_range": [0, 20], "num_time_mask": 2, "lfr_rate": 6}
    model = build(folder, 1, specaug="SpecAugLFR", specaug_conf=config, ctc_weight=0).train()

    class Heard(Exception):
        pass

    def encode(speech, lengths):
        raise Heard(speech)

    model.encode = encode
    lengths = torch.tensor([3, 9, 17, 40] * 50)
    speech = inside(lengths, 40)[:, :, None] * torch.ones(560)
    with pytest.raises(Heard) as heard:
        model(**batch() | {"speech": speech, "speech_lengths": lengths[:, None]})
    masked = heard.value.args[0] == 0
    gone = 1 - (~masked).any(2).sum(1) / lengths
    assert gone.max() <= 0.25 and (gone[3::4] > 0.1).any() and not gone[0::4].any()
    bands = masked[0::4, :3].flatten(1).any(1).float().mean()
    assert bands > 0.8, "of the shortest rows, too, frequencies are masked"
    with pytest.raises(Heard) as heard:
        model.eval()(**batch() | {"speech": speech, "speech_lengths": lengths[:, None]})
    assert heard.value.args[0].equal(speech), "dev is heard whole"


@pytest.mark.full
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_compiled_layers_give_the_same_loss_and_gradients_for_batches_of_any_shape(folder, stage):
    """As on a GPU, with PyTorch's compiler for the CPU; how often it compiles does not grow with the shapes."""
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    counters.clear()
    model = build(folder, stage, ctc_weight=0.3 if stage < 3 else 0, detach_ctc_decoder=False, fused_attention=True)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter, std=0.1)
    shapes = [(3, 40), (2, 31), (3, 33)]
    parts = [{name: value[:rows] for name, value in batch().items()} for rows, _frames in shapes]
    for part, (_rows, frames) in zip(parts, shapes, strict=True):
        part["speech"] = part["speech"][:, :frames]
        part["speech_lengths"] = part["speech_lengths"].clamp(max=frames)
    plain = [loss_and_gradients(model, part) for part in parts]
    compile_layers(model)
    for part, (expected, expected_gradients) in zip(parts, plain, strict=True):
        loss, gradients = loss_and_gradients(model, part)
        assert loss == pytest.approx(expected, rel=1e-5)
        assert_same(gradients, expected_gradients)
    # The encoder's first layer, which has another width, its others, the LLM's, one for adaptor and CTC branch, and
    # what is computed of the CTC branch's output.
    assert counters["stats"]["unique_graphs"] == 4 + (stage < 3)


def test_without_a_c_compiler_layers_stay_as_they_are_and_the_log_says_so(folder, monkeypatch, tmp_path, caplog):
    model = build(folder, 1)
    monkeypatch.setenv("PATH", str(tmp_path))
    compile_layers(model)
    assert "a C compiler (gcc) missing; layers are not compiled" in caplog.text
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_an_utterances_loss_does_not_depend_on_the_batch_it_is_in(folder):
    """Length-bucketed batches of any size: padding and neighbours change nothing."""
    model = build(folder, 1, ctc_weight=0, fused_attention=True)
    whole, losses, counts = batch(), [], []
    with torch.no_grad():
        for row, length in enumerate(whole["speech_lengths"][:, 0].tolist()):
            alone = {name: copy.deepcopy(value[row : row + 1]) for name, value in whole.items()}
            alone["speech"] = alone["speech"][:, :length]
            counts.append((alone["labels_ids"] >= 0).sum().item())
            losses.append(model(**alone)[0].item())
        together = model(**copy.deepcopy(whole))[0].item()
    assert together == pytest.approx(np.average(losses, weights=counts), rel=1e-5)
    assert max(losses) > min(losses)


def test_what_is_heard_is_what_the_stock_class_hears(tmp_path, monkeypatch):
    from funasr import AutoModel
    from funasr.register import tables

    from miniature import build_folder

    folder = build_folder(tmp_path / "model", "一二三四五六七八九零", seed=6)
    noise = np.random.default_rng(0).standard_normal((4, 32000)).astype(np.float32) / 10
    heard = []
    for model_class, more in ((stock.FunASRNano, {}), (FunASRNano, {"fused_attention": True})):
        monkeypatch.setitem(tables.model_classes, "FunASRNano", model_class)
        model = AutoModel(model=str(folder), disable_update=True, device="cpu", ncpu=1, ctc_decoder=None, **more)
        assert type(model.model) is model_class
        heard.append([model.generate(torch.from_numpy(row), max_length=20)[0]["text"] for row in noise])
    assert heard[0] == heard[1]
    assert len(set(heard[0])) > 1, "the random model tells nothing apart, and this test shows nothing"


@pytest.mark.parametrize(("stage", "graph"), [(1, True), (2, False), (3, False)])
def test_a_frozen_encoder_keeps_nothing_for_a_backward_pass(folder, stage, graph):
    model = build(folder, stage, fused_attention=True).train()
    part = batch()
    encoded, _ = model.encode(part["speech"], part["speech_lengths"][:, 0])
    assert encoded.requires_grad is graph


@pytest.mark.parametrize(("fs", "seconds"), [(16000, 3.0), (16000, 0.03), (16000, 0.02), (8000, 1.01)])
def test_features_are_upstreams(fs, seconds):
    """Up to rounding: 0.01 of a natural logarithm, where speech spans 20 of them. Silence as well as noise."""
    conf = {"fs": fs, "n_mels": 80, "lfr_m": 7, "lfr_n": 6, "dither": 0.0}
    rng = np.random.default_rng(0)
    waveform = torch.from_numpy((0.1 * rng.standard_normal(int(fs * seconds))).astype(np.float32))
    waveform[len(waveform) // 2 :] = 0
    theirs, their_lengths = wav_frontend.WavFrontend(**conf)(waveform[None], [len(waveform)])
    ours, lengths = nano.dataset.WavFrontend(**conf)(waveform[None], [len(waveform)])
    assert lengths.tolist() == their_lengths.tolist()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01)


def test_dither_is_as_loud_as_upstreams():
    """On digital silence the features are those of the dither alone."""
    conf = {"fs": 16000, "n_mels": 80, "lfr_m": 7, "lfr_n": 6, "dither": 1.0}
    silence = torch.zeros(1, 160000)
    theirs = wav_frontend.WavFrontend(**conf)(silence, [160000])[0]
    ours = nano.dataset.WavFrontend(**conf)(silence, [160000])[0]
    assert ours.mean().item() == pytest.approx(theirs.mean().item(), abs=0.05)
    assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.05)


@pytest.mark.parametrize(("memory", "tokens"), [(99999, 40000), (40000, 40000), (39999, 32000), (13110, 13107),
                                               (12300, 12300)])  # fmt: skip
def test_a_batch_is_the_largest_tried_that_fits_down_to_one_row(memory, tokens):
    assert largest(40000, 12300, lambda size: size <= memory) == tokens


def test_a_row_that_no_gpu_memory_holds_is_refused_and_not_tried_twice():
    tried = []
    with pytest.raises(UserError, match="one row of 12300 .* lower MAX_SPEECH_LENGTH"):
        largest(40000, 12300, lambda size: tried.append(size))
    assert len(tried) == len(set(tried)) and tried[-1] == 12300


def test_batches_are_tried_that_the_sampler_makes_not_copies_of_its_shortest_row():
    """A corpus of long segments with some calls of a word each, whose prompts are most of what the LLM is given."""
    from funasr.register import tables

    class Rows(list):
        index_ds = property(lambda self: [{"assistant": ["字" * (frames // 33)]} for frames in self])
        get_source_len = list.__getitem__

    rng = np.random.default_rng(0)
    rows = Rows(map(int, [*rng.uniform(4000, 8000, 180), *rng.uniform(35, 60, 20)]))
    conf = {"batch_type": "token", "batch_size": 40000, "sort_size": 64, "max_token_length": 14000}
    made = tables.batch_sampler_classes["BatchSampler"](rows, **conf, batch_size_sample_max=10**6)
    sampler = made["batch_sampler"].stock
    largest_of = {max(batch, key=rows.__getitem__): len(batch) for batch in sampler if batch}
    heard, said = heaviest(sampler, rows)
    assert heard in largest_of.items() and 0.8 * 40000 < rows[heard[0]] * heard[1] <= 40000
    assert said in largest_of.items()
    assert said[1] <= 20 < 40000 // min(rows)
