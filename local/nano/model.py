"""FunASRNano as this recipe trains it: plus a CTC loss, SpecAugment and frozen modules that stay frozen.

Importing this module registers the class under FunASR's own name, so a model folder's `model: FunASRNano` builds it.
What differs from funasr/models/fun_asr_nano/model.py (1.4.16):
  * `forward` adds ctc_weight x CTC loss (encoder -> ctc_decoder -> ctc); upstream has none, so CTC weights never moved.
    Its text has no case and no punctuation where the folder says `ctc_target_normalize`, as the released one does;
  * SpecAugment takes no frame of a row of which it would take over a quarter: upstream's masks know nothing of lengths;
  * frozen modules stay in eval mode when the trainer calls train(): upstream turned their dropout on;
  * LoRA parameters are fp32 beside a bf16 LLM: in bf16 steps of 1e-5 are rounded away;
  * logits are computed where a label is, not at all positions x 151,936 symbols. Same loss, less memory;
  * the LLM is given no attention mask: its padding is on the right. Same loss;
  * what must be read back from the GPU is read before the encoder's layers, but for the CTC loss; upstream waits for
    it several times a step;
  * `fused_attention` computes attention without its matrix of scores, and on a GPU of a batch's utterances in a row,
    without a mask. Same loss, a fraction of the memory;
  * the CTC loss is computed from an utterance's own symbols and the sum of all others, not from all 60,515. Same loss;
  * `compiled_layers` lets torch.compile fuse the small operations of each layer, on a GPU. Same loss within bf16 noise.
"""

import re
import unicodedata
from typing import Any

import torch
from funasr.models.fun_asr_nano import model as stock
from funasr.register import tables
from funasr.train_utils.device_funcs import force_gatherable

from common import NO_SPEECH
from nano.layers import compile_layers, fuse_attention, inside, own_and_others

IGNORE = -100
SPARED = 0.25  # of a row's frames
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3})")
# But for per cent, the point in a number and the apostrophe in a word.
PUNCTUATION = re.compile(r"(?!%|(?<=\d)\.(?=\d)|(?<=[a-z])'(?=[a-z]))[^\w\s]")
SPACE_IN_HAN = re.compile(r"(?<=[\u2e80-\U0003ffff])\s+(?=[\u2e80-\U0003ffff])")


@tables.register("model_classes", "FunASRNano")
class FunASRNano(stock.FunASRNano):
    """Training-time FunASRNano; inference is inherited unchanged."""

    own_and_others = staticmethod(own_and_others)

    def __init__(
        self, specaug: str | None = None, specaug_conf: dict | None = None, fused_attention: bool = False,
        compiled_layers: bool = False, **kwargs: Any,
    ):  # fmt: skip
        super().__init__(**kwargs)
        if fused_attention:
            fuse_attention(self)
        if compiled_layers and torch.cuda.is_available():
            compile_layers(self)
        self.ctc_text = normalised if kwargs.get("dataset_conf", {}).get("ctc_target_normalize") else str
        self.specaug = tables.specaug_classes.get(specaug)(**(specaug_conf or {})) if specaug else None
        # Upstream freezes ctc_decoder by its conf but has no switch for the output layer behind it.
        if self.ctc_decoder is not None and kwargs.get("ctc_decoder_conf", {}).get("freeze", False):
            self.ctc.requires_grad_(False)

    def _apply_lora_to_llm(self, llm_conf: dict) -> None:
        super()._apply_lora_to_llm(llm_conf)
        for name, parameter in self.llm.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()

    def on_pretrained_model_loaded(self, loaded_keys) -> None:
        """Keep a CTC branch that is trained although the checkpoint has no weights of it (the preflight says so)."""
        if self.ctc_decoder is not None and not any(p.requires_grad for p in self.ctc.parameters()):
            super().on_pretrained_model_loaded(loaded_keys)

    def train(self, mode: bool = True) -> "FunASRNano":
        """Set train mode for what is trained only.

        Goes by train(False), never eval(): FunASR's LoRA layer folds itself into the frozen weight on its own eval().
        """
        super().train(mode)
        if mode:
            for module in self.modules():
                own = list(module.parameters())
                if own and not any(p.requires_grad for p in own):
                    module.train(False)
        return self

    def forward(
        self,
        speech: torch.Tensor,
        speech_lengths: torch.Tensor,
        input_ids: torch.Tensor,
        labels_ids: torch.Tensor,
        fbank_beg: torch.Tensor,
        fake_token_len: torch.Tensor,
        item: list[dict] | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], torch.Tensor]:
        """Loss of one batch of single-turn dialogues.

        speech (batch, LFR frames, 560); speech_lengths (batch, 1) LFR frames; input_ids, labels_ids (batch, tokens),
        padded with -1 on the right; fbank_beg, fake_token_len (batch, 1): where the speech tokens go and how many.
        `item` are the rows, whose assistant text is the CTC target. Returns loss, statistics and the batch size.
        """
        if fbank_beg.shape[1] != 1:
            raise ValueError(f"{fbank_beg.shape[1]} turns of speech in one row; this recipe trains on one")
        lengths = speech_lengths[:, 0]
        # Position t predicts token t + 1; labels below 0 are the prompt's and the collator's padding.
        labels = torch.nn.functional.pad(labels_ids[:, 1:], (0, 1), value=IGNORE).flatten()
        positions = (labels >= 0).nonzero()[:, 0]
        targets = labels[positions]
        symbols = self._ctc_targets(item, lengths) if self._ctc_learns() else None

        if self.specaug is not None and self.training:
            speech = spare_short(speech, self.specaug(speech.clone(), lengths)[0], lengths)
        encoder_out, encoder_lens = self.encode(speech, lengths)
        loss_ctc = self._ctc_loss(encoder_out, encoder_lens, *symbols) if symbols else None
        speech_tokens, _lens = self.audio_adaptor(encoder_out, encoder_lens)
        embeddings = self.llm.model.get_input_embeddings()(input_ids.clamp(min=0))
        embeddings = place_speech(embeddings, speech_tokens, fbank_beg[:, 0], fake_token_len[:, 0])
        # Or, in training LoRA, the LLM's first layer would be compiled apart from the others.
        if torch.is_grad_enabled() and not embeddings.requires_grad:
            embeddings.requires_grad_()

        dtype = stock.dtype_map[self.llm_dtype]
        with torch.autocast(embeddings.device.type, enabled=dtype != torch.float32, dtype=dtype):
            # Padding is on the right: what is before it cannot see it. Without a mask, PyTorch has a faster attention.
            hidden = self.llm.model(
                inputs_embeds=embeddings.to(dtype), attention_mask={"full_attention": None}, use_cache=False
            ).last_hidden_state
            logits = self.llm.lm_head(hidden.flatten(0, 1).index_select(0, positions))
        loss_llm = torch.nn.functional.cross_entropy(logits.float(), targets)
        loss = loss_llm
        stats = {"loss_llm": loss_llm.detach(), "acc": (logits.detach().argmax(-1) == targets).float().mean()}
        if loss_ctc is not None:
            loss = loss + self.ctc_weight * loss_ctc
            stats["loss_ctc"] = loss_ctc.detach()
        stats["loss"] = loss.detach()
        stats["batch_size"] = torch.full((1,), len(input_ids), device=loss.device)
        return force_gatherable((loss, stats, stats["batch_size"]), loss.device)

    def _ctc_learns(self) -> bool:
        """Whether the CTC loss has a weight and something to train; in validation, whether training has."""
        if self.ctc_decoder is None or not self.ctc_weight:
            return False
        reaches_encoder = not self.detach_ctc_decoder and any(p.requires_grad for p in self.audio_encoder.parameters())
        return reaches_encoder or any(p.requires_grad for p in self.ctc.parameters())

    def _ctc_targets(
        self, rows: list[dict], lengths: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[int], list[int]]:
        """What the CTC loss needs besides the encoder's output of `lengths` (batch,) frames; tensors on their device.

        Each row's different symbols (batch, n), the blank first, filled up with -1; for all symbols of all rows in a
        row, their places among these; how many symbols each row has, and how many decoded frames.
        """
        texts = [self.ctc_tokenizer.encode(self.ctc_text(row["assistant"][0].replace(NO_SPEECH, ""))) for row in rows]
        symbols = (dict.fromkeys([self.blank_id, *text]) for text in texts)
        owned = [{symbol: place for place, symbol in enumerate(own)} for own in symbols]
        places = [own[symbol] for own, text in zip(owned, texts, strict=True) for symbol in text]
        different = torch.nn.utils.rnn.pad_sequence([torch.tensor(list(own)) for own in owned], True, -1)
        places = torch.tensor(places, dtype=torch.long, device=lengths.device)
        frames = (lengths - 1) // self.ctc_decoder.k + 1
        return different.to(lengths.device), places, list(map(len, texts)), frames.tolist()

    def _ctc_loss(
        self, encoder_out: torch.Tensor, lengths: torch.Tensor, different: torch.Tensor, places: torch.Tensor,
        counts: list[int], frames: list[int],
    ) -> torch.Tensor:  # fmt: skip
        source = encoder_out.detach() if self.detach_ctc_decoder else encoder_out
        decoded, _lens = self.ctc_decoder(source, lengths)
        output = self.ctc.ctc_lo
        log_probs = self.own_and_others(decoded, output.weight, output.bias, different).transpose(0, 1)
        # An utterance with more symbols than frames has no alignment; it would turn the whole batch infinite.
        losses = torch.nn.functional.ctc_loss(
            log_probs, places, frames, counts, blank=0, reduction="none", zero_infinity=True
        )
        # By symbol, as PyTorch's mean has it, but of a row without text by frame: it would outweigh all others.
        units = [symbols or blanks for symbols, blanks in zip(counts, frames, strict=True)]
        return (losses / torch.tensor(units).to(losses.device, non_blocking=True)).mean()


def normalised(text: str) -> str:
    """A text as the released CTC branch writes it (`ctc_text` beside the LLM's `text`): no case, no punctuation.

    Stage 1 pulls the encoder through that branch, which is frozen: it would learn to say the comma. The code that
    made the branch's targets is not published; digits are left as they are.
    """
    letters = THOUSANDS.sub("", unicodedata.normalize("NFKC", text).lower().replace("’", "'"))
    letters = PUNCTUATION.sub(" ", letters)
    return SPACE_IN_HAN.sub("", " ".join(letters.split()))


def spare_short(speech: torch.Tensor, masked: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """`masked`, (batch, frames, dim), with the frames of `speech` again in rows of which over a quarter was taken.

    SpecAugment's paper bounds a mask by a share of the utterance, for the same reason: in a batch of short turns a mask
    of half a second takes whole words, whose text is still asked for.
    """
    gone = (masked == 0).all(2) & inside(lengths, speech.shape[1])
    too_many = gone.sum(1, keepdim=True) > SPARED * lengths[:, None]
    return torch.where((gone & too_many)[:, :, None], speech, masked)


def place_speech(
    embeddings: torch.Tensor, speech: torch.Tensor, begin: torch.Tensor, count: torch.Tensor
) -> torch.Tensor:
    """Put row b's first count[b] speech vectors at positions begin[b], ... of its token embeddings.

    embeddings (batch, tokens, dim), speech (batch, frames, dim), begin and count (batch,). Without a Python loop
    over the batch, which upstream has, and without waiting for the GPU.
    """
    offset = torch.arange(embeddings.shape[1], device=embeddings.device)[None, :] - begin[:, None]
    inside = (offset >= 0) & (offset < count[:, None])
    index = offset.clamp(0, speech.shape[1] - 1)[:, :, None].expand(-1, -1, speech.shape[2])
    return torch.where(inside[:, :, None], speech.to(embeddings.dtype).gather(1, index), embeddings)
