"""Decode with stock FunASR: load a model folder and a checkpoint, transcribe formatted rows in batches.

    recogniser = Recogniser("exp_output/model", dtype="bf16")
    recogniser.load("exp_output/eval/checkpoints/final.pt")
    texts = recogniser.transcribe(rows)
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch

import audio
from common import UserError
from nano import weights

SPEECH = re.compile(r"(.*)<\|startofspeech\|>!(.*)<\|endofspeech\|>", re.DOTALL)
# The branch that gives time stamps. With it FunASR decodes one utterance at a time, and needs torchaudio.
CTC_PREFIXES = ("ctc_decoder.", "ctc.")


class Recogniser:
    """A Fun-ASR-Nano model ready to decode; `load` exchanges its weights."""

    def __init__(
        self, model_dir: str | os.PathLike, device: str = "auto", dtype: str = "auto", frontend_fs: int = 16000
    ):
        from funasr import AutoModel  # seconds to import

        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = ("bf16" if device.startswith("cuda") else "fp32") if dtype == "auto" else dtype
        self.frontend_fs = frontend_fs
        self.auto_model = AutoModel(
            model=str(model_dir), device=device, disable_update=True, ctc_decoder=None, ncpu=torch.get_num_threads(),
            frontend_conf={"fs": frontend_fs, "dither": 0.0},  # FunASR's default dither makes transcripts random
            llm_conf={"llm_dtype": self.dtype},
        )
        self.device = self.auto_model.kwargs["device"]

    def load(self, checkpoint: str | os.PathLike) -> None:
        """Exchange the weights, LoRA folded; refuse a checkpoint that would leave a tensor as it was."""
        state = weights.load_folded(checkpoint)
        state = {name: tensor for name, tensor in state.items() if not name.startswith(CTC_PREFIXES)}
        wanted = self.auto_model.model.state_dict()
        wrong = [name for name in wanted if name not in state or wanted[name].shape != state[name].shape]
        if wrong:
            raise UserError(f"{checkpoint} does not fit the model folder: {len(wrong)} tensors, first {wrong[0]}")
        self.auto_model.model.load_state_dict({name: state[name] for name in wanted})

    @torch.inference_mode()
    def transcribe(
        self, rows: Sequence[dict[str, Any]], max_new_tokens: int = 512, max_tokens_per_second: float = 15.0
    ) -> list[str]:
        """Transcribe formatted rows as one batch, greedily, each with the prompt of its own row.

        A hypothesis is cut at `max_tokens_per_second` of the longest utterance: nobody speaks faster, and one
        repetition loop would otherwise hold up its whole batch until `max_new_tokens`.
        """
        loaded = [self._messages(row) for row in rows]
        limit = min(max_new_tokens, 16 + math.ceil(max_tokens_per_second * max(seconds for _, seconds in loaded)))
        options = {
            **self.auto_model.kwargs, "llm_dtype": self.dtype, "max_length": limit,
            "llm_kwargs": {"do_sample": False, "num_beams": 1},
        }
        results, _ = self.auto_model.model.inference_llm(
            [messages for messages, _ in loaded], key=[row["key"] for row in rows], **options
        )
        return [result["text"] for result in results]

    def _messages(self, row: dict[str, Any]) -> tuple[list[dict[str, Any]], float]:
        system, prompt, path = parse_row(row)
        try:
            samples, rate = audio.read(path)
        except audio.AudioError as error:
            raise UserError(f"{row['key']}: {error}; run stage 0 again") from error
        if rate != self.frontend_fs:
            # FunASR would resample without a word, with another filter than training data had.
            raise UserError(f"{row['key']}: {path} is at {rate} Hz, the frontend at {self.frontend_fs} Hz; see stage 0")
        user = f"{prompt}<|startofspeech|>!!<|endofspeech|>"
        messages = [
            {"role": "system", "content": system},
            {"role": "user", "content": user, "audio": torch.from_numpy(samples)},
            {"role": "assistant", "content": "null"},
        ]
        return messages, len(samples) / rate


def parse_row(row: dict[str, Any]) -> tuple[str, str, str]:
    """The system message, the prompt and the audio path of a formatted row."""
    contents = {message["role"]: message["content"] for message in row.get("messages", [])}
    match = SPEECH.fullmatch(contents.get("user", ""))
    if match is None:
        raise UserError(f"{row.get('key')}: no user message with <|startofspeech|>!PATH<|endofspeech|>; see stage 0")
    return contents.get("system", "You are a helpful assistant."), match[1], match[2]


def batches(rows: Sequence[dict[str, Any]], size: int, seconds: float) -> Iterator[list[dict[str, Any]]]:
    """Sort rows by length, longest first so that memory runs out at once or never, and cut them into batches.

    A batch has at most `size` rows and `seconds` of padded audio. It depends on nothing but the rows: padding
    changes the last bits of a score, so an interrupted run must meet the same batches again.
    """
    batch: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: (-row["speech_length"], row["key"])):
        longest = (batch[0] if batch else row)["speech_length"] / 100  # 10 ms frames
        if batch and (len(batch) == size or longest * (len(batch) + 1) > seconds):
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
