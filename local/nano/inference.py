"""Recognise utterances with a Fun-ASR-Nano model folder: greedily, in batches, with any checkpoint of the model.

    recogniser = Recogniser("exp_output/final_model", device="cuda", dtype="bf16")
    recogniser.transcribe([Utterance("call-1", samples, recogniser.prompt())])
"""

import logging
import math
import os
import re
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from common import NO_SPEECH, UserError, read_yaml
from nano import weights

# What `auto` means on a CPU and on a GPU, which reads its weights once for all rows of a step (not measured). A CPU
# works on every row until the longest ends: two test sets of the demo took 6 s more of it in batches of 128 than of 32.
AUTO = {"dtype": ("fp32", "bf16"), "batch_size": (32, 256), "batch_seconds": (600, 9600)}
NUMBERS = {"batch_size": (int, 1), "batch_seconds": ((int, float), 0), "max_new_tokens": (int, 1),
           "max_tokens_per_second": ((int, float), 0)}  # what each is, and the least of it

SCORING = ("chinese_numerals", "bootstrap_resamples")  # in the same file; score.py reads them


class Utterance(NamedTuple):
    """What the model is given: float32 samples in [-1, 1] at its frontend's rate, and the text around them."""

    key: str
    samples: np.ndarray
    prompt: str
    system: str = "You are a helpful assistant."


class Recogniser:
    """A Fun-ASR-Nano model ready to decode; `load` exchanges its weights. `fs` is its frontend's rate in Hz.

    Batches are cut to `most_samples`, padding included, once a larger one did not fit the GPU's memory.
    """

    def __init__(self, model_dir: str | os.PathLike, device: str, dtype: str = "fp32", frontend_fs: int | None = None):
        from funasr import AutoModel  # seconds to import

        import nano.dataset  # noqa: F401 -- registers the features of training, in a third of the time
        from nano.layers import fuse_attention

        self.dtype, self.most_samples = dtype, sys.maxsize
        frontend = {"dither": 0.0}  # FunASR's default dither makes transcripts random
        self.auto_model = AutoModel(
            model=str(model_dir), device=device, disable_update=True, ncpu=torch.get_num_threads(),
            ctc_decoder=None,  # time stamps; with them FunASR decodes one utterance at a time, and needs torchaudio
            frontend_conf=frontend | ({"fs": frontend_fs} if frontend_fs else {}),
            llm_conf={"llm_dtype": dtype},
        )
        fuse_attention(self.auto_model.model)
        self.fs = self.auto_model.kwargs["frontend"].fs

    def load(self, checkpoint: str | os.PathLike) -> None:
        """Exchange the weights, LoRA folded; refuse a checkpoint that would leave a tensor as it was."""
        state, model = weights.load_folded(checkpoint), self.auto_model.model
        if wrong := sum(weights.misfits(model, state), []):
            raise UserError(f"{checkpoint} does not fit the model folder: {len(wrong)} tensors, first {wrong[0]}")
        model.load_state_dict(state, strict=False)

    def prompt(self, hotwords: Sequence[str] = ()) -> str:
        """FunASR's own prompt, with hot words, for the way of writing that the folder's `itn` says."""
        return self.auto_model.model.get_prompt(list(hotwords), itn=self.auto_model.kwargs.get("itn", True))

    @torch.inference_mode()
    def transcribe(
        self, utterances: Sequence[Utterance], max_new_tokens: int = 2048, max_tokens_per_second: float = 15.0
    ) -> list[str]:
        """Transcribe utterances as one batch, greedily, each with its own prompt.

        A hypothesis is cut at `max_tokens_per_second` of its utterance: nobody speaks faster, and one repetition loop
        would otherwise hold up its whole batch until `max_new_tokens`.
        """
        longest = max(len(utterance.samples) for utterance in utterances)
        options = {
            **self.auto_model.kwargs, "llm_dtype": self.dtype, "llm_kwargs": {"do_sample": False, "num_beams": 1},
            "audio_fs": self.fs,  # of the samples; FunASR would take them for 16 kHz
        }
        messages = [[
            {"role": "system", "content": utterance.system},
            {"role": "user", "content": f"{utterance.prompt}<|startofspeech|>!!<|endofspeech|>",
             "audio": torch.from_numpy(utterance.samples)},
            {"role": "assistant", "content": "null"},
        ] for utterance in utterances]
        keys = [utterance.key for utterance in utterances]
        limits = [min(max_new_tokens, 16 + math.ceil(max_tokens_per_second * len(utterance.samples) / self.fs))
                  for utterance in utterances]
        texts: list[str] = []
        while len(texts) < len(keys):
            size = max(1, min(len(keys) - len(texts), self.most_samples // longest))
            part = slice(len(texts), len(texts) + size)
            try:
                texts += self.decode(messages[part], limits[part], **options)
                continue
            except torch.cuda.OutOfMemoryError as error:
                if size == 1:
                    raise UserError(f"{keys[len(texts)]} alone does not fit the GPU's memory; see device") from error
            # Out here, where no traceback holds the tensors of the attempt any more.
            torch.cuda.empty_cache()
            self.most_samples = size // 2 * longest
            logging.warning("%d utterances at once do not fit the GPU's memory: from here on %.0f s of padded audio at "
                            "a time; a smaller batch_seconds saves such attempts", size, self.most_samples / self.fs)
        return texts

    def decode(
        self, messages: Sequence[list[dict]], limits: Sequence[int], device: str, tokenizer: Any, llm_kwargs: dict,
        **options: Any,
    ) -> list[str]:  # fmt: skip
        """What upstream's _inference_llm_batch does (funasr/models/fun_asr_nano/model.py), the encoder in batches too.

        Upstream gives it one row after the other, which leaves a GPU waiting for its next small kernel.
        """
        from nano.model import inside, place_speech, stock

        model, llm = self.auto_model.model, self.auto_model.model.llm.to(stock.dtype_map[self.dtype])
        rows = [model.data_load_speech(model.data_template(given), tokenizer, **options) for given in messages]
        speech = pad_sequence([row["speech"][0] for row in rows], batch_first=True).to(device)
        encoded, lengths = model.encode(speech, torch.cat([row["speech_lengths"][:, 0] for row in rows]).to(device))
        # A row's last frames are joined with the zeros that would follow it were it alone, not with its padding.
        tokens, _ = model.audio_adaptor(encoded * inside(lengths, encoded.shape[1])[:, :, None], lengths)
        # Padded on the left: every row goes on from its last position.
        ids = pad_sequence([row["source_ids"][0] for row in rows], True, padding_side="left").to(device)
        padding = ids.shape[1] - torch.tensor([row["source_ids"].shape[1] for row in rows], device=device)
        position = torch.arange(ids.shape[1], device=device) - padding[:, None]
        begin, count = (torch.stack([row[name][0, 0] for row in rows]).to(device)
                        for name in ("fbank_beg", "fake_token_len"))
        embeddings = place_speech(llm.model.get_input_embeddings()(ids), tokens, begin + padding, count)
        end = llm.config.eos_token_id if llm.config.pad_token_id is None else llm.config.pad_token_id
        with torch.autocast(torch.device(device).type, enabled=self.dtype != "fp32", dtype=llm.dtype):
            generated = llm.generate(
                inputs_embeds=embeddings.to(llm.dtype), attention_mask=(position >= 0).long(),
                position_ids=position.clamp(min=0), max_new_tokens=max(limits), pad_token_id=end, **llm_kwargs)
        # Each at its own: what a loop says must not depend on its neighbours.
        cut = [spelt[:limit] for spelt, limit in zip(generated, limits, strict=True)]
        texts = tokenizer.batch_decode(cut, skip_special_tokens=True)
        return [re.sub(r"\s+", " ", text.replace(NO_SPEECH, " ")) for text in texts]


def batches(rows: Sequence[dict[str, Any]], size: int, seconds: float) -> Iterator[list[dict[str, Any]]]:
    """Sort rows by length, longest first so that memory runs out at once or never, and cut them into batches.

    A batch has at most `size` rows and `seconds` of padded audio. It depends on nothing but the rows: padding
    changes the last bits of a score, so an interrupted run must meet the same batches again.
    """
    batch: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: (-row["speech_length"], row["key"])):
        # The first is the longest, in frames of 10 ms.
        if batch and (len(batch) == size or batch[0]["speech_length"] * (len(batch) + 1) > 100 * seconds):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def read_conf(path: str) -> dict[str, Any]:
    """The settings that decide what a transcript says; `auto` is what it means on this machine."""
    names, given = ("device", "dtype", *NUMBERS), read_yaml(path)
    if wrong := {*names, *SCORING} ^ given.keys():
        raise UserError(f"{path}: {', '.join(sorted(map(str, wrong)))}: missing, or nothing reads it; it holds "
                        f"{', '.join((*names, *SCORING))}", code=2)  # fmt: skip
    conf = {name: given[name] for name in names}
    if conf["device"] == "auto":
        conf["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    on_gpu = str(conf["device"]).startswith("cuda")
    auto = {name: values[on_gpu] for name, values in AUTO.items()}
    if on_gpu and not torch.cuda.is_bf16_supported(including_emulation=False):
        auto["dtype"] = "fp32"  # a GPU before Ampere computes bf16 in many more steps
    conf = {name: auto.get(name, value) if value == "auto" else value for name, value in conf.items()}
    right = {name: isinstance(conf[name], kind) and conf[name] >= least for name, (kind, least) in NUMBERS.items()}
    right |= {"device": re.fullmatch(r"(cpu|cuda|mps|npu|xpu)(:\d+)?", str(conf["device"])),
              "dtype": conf["dtype"] in ("bf16", "fp16", "fp32")}  # fmt: skip
    for name in names:
        if not right[name]:
            raise UserError(f"{path}: {name} cannot be {conf[name]!r}; conf/decode.yaml says what it may be", code=2)
    return conf
