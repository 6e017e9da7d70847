"""FunASRNano as this recipe trains it: plus a CTC loss, SpecAugment and frozen modules that stay frozen.

Importing this module registers the class under FunASR's own name, so a model folder's `model: FunASRNano` builds it.
What differs from funasr/models/fun_asr_nano/model.py (1.4.16):
  * `forward` adds ctc_weight x CTC loss (encoder -> ctc_decoder -> ctc); upstream has none, so CTC weights never moved;
  * frozen modules stay in eval mode when the trainer calls train(): upstream turned their dropout on;
  * LoRA parameters are fp32 beside a bf16 LLM: in bf16 steps of 1e-5 are rounded away;
  * logits are computed where a label is, not at all positions x 151,936 symbols. Same loss, less memory;
  * the LLM is given no attention mask: its padding is on the right. Same loss;
  * `fused_attention` computes attention without its matrix of scores. Same loss, a fraction of the memory.
"""

from __future__ import annotations

from typing import Any

import torch
from funasr.models.fun_asr_nano import model as stock
from funasr.models.sense_voice.model import MultiHeadedAttentionSANM
from funasr.models.transformer.attention import MultiHeadedAttention
from funasr.register import tables
from funasr.train_utils.device_funcs import force_gatherable

IGNORE = -100


@tables.register("model_classes", "FunASRNano")
class FunASRNano(stock.FunASRNano):
    """Training-time FunASRNano; inference is inherited unchanged."""

    def __init__(
        self, specaug: str | None = None, specaug_conf: dict | None = None, fused_attention: bool = False, **kwargs: Any
    ):
        super().__init__(**kwargs)
        if fused_attention:
            fuse_attention(self)
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

    def train(self, mode: bool = True) -> FunASRNano:
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
        if self.specaug is not None and self.training:
            speech, _unchanged = self.specaug(speech, lengths)
        encoder_out, encoder_lens = self.encode(speech, lengths)
        speech_tokens, _lens = self.audio_adaptor(encoder_out, encoder_lens)
        embeddings = self.llm.model.get_input_embeddings()(input_ids.clamp(min=0))
        embeddings = place_speech(embeddings, speech_tokens, fbank_beg[:, 0], fake_token_len[:, 0])

        dtype = stock.dtype_map[self.llm_dtype]
        with torch.autocast(embeddings.device.type, enabled=dtype != torch.float32, dtype=dtype):
            # Padding is on the right: what is before it cannot see it. Without a mask, PyTorch has a faster attention.
            hidden = self.llm.model(inputs_embeds=embeddings.to(dtype), use_cache=False).last_hidden_state
            # Position t predicts token t + 1; -1 is the collator's padding.
            labels = labels_ids[:, 1:].masked_fill(labels_ids[:, 1:] == -1, IGNORE)
            labelled = labels != IGNORE
            logits = self.llm.lm_head(hidden[:, :-1][labelled])
        targets = labels[labelled]
        loss_llm = torch.nn.functional.cross_entropy(logits.float(), targets)
        loss = loss_llm
        stats = {"loss_llm": loss_llm.detach(), "acc": (logits.detach().argmax(-1) == targets).float().mean()}

        if self._ctc_learns(encoder_out):
            loss_ctc = self._ctc_loss(encoder_out, encoder_lens, [row["assistant"][0] for row in item])
            loss = loss + self.ctc_weight * loss_ctc
            stats["loss_ctc"] = loss_ctc.detach()
        stats["loss"] = loss.detach()
        stats["batch_size"] = len(input_ids)
        return force_gatherable((loss, stats, len(input_ids)), loss.device)

    def _ctc_learns(self, encoder_out: torch.Tensor) -> bool:
        """Whether the CTC loss has a weight and something to train; in validation, whether training has."""
        if self.ctc_decoder is None or not self.ctc_weight:
            return False
        reaches_encoder = not self.detach_ctc_decoder and any(p.requires_grad for p in self.audio_encoder.parameters())
        return reaches_encoder or any(p.requires_grad for p in self.ctc.parameters())

    def _ctc_loss(self, encoder_out: torch.Tensor, lengths: torch.Tensor, texts: list[str]) -> torch.Tensor:
        source = encoder_out.detach() if self.detach_ctc_decoder else encoder_out
        decoded, decoded_lens = self.ctc_decoder(source, lengths)
        log_probs = self.ctc.log_softmax(decoded).transpose(0, 1).float()
        encoded = [self.ctc_tokenizer.encode(text) for text in texts]
        targets = torch.tensor([token for text in encoded for token in text], device=source.device)
        target_lens = torch.tensor([len(text) for text in encoded], device=source.device)
        # An utterance with more symbols than frames has no alignment; it would turn the whole batch infinite.
        return torch.nn.functional.ctc_loss(
            log_probs, targets, decoded_lens, target_lens, blank=self.blank_id, zero_infinity=True
        )


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


def attend(layer: torch.nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask) -> torch.Tensor:
    """The layer's output for heads (batch, head, time, d_k) and a mask (batch, 1, time), nonzero where speech is.

    Upstream keeps the scores of every layer for the backward pass: an utterance of 120 s is 2,000 frames, times 2,000,
    times 4 heads, times 70 layers. PyTorch computes the same sums in blocks; on a CPU only without dropout.
    """
    keep = None if mask is None else mask.unsqueeze(1) != 0
    dropout = layer.dropout.p if layer.training else 0.0
    heads = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep, dropout_p=dropout)
    return layer.linear_out(heads.transpose(1, 2).flatten(2))


class FusedSANM(MultiHeadedAttentionSANM):
    """SenseVoice's self-attention with its convolutional memory."""

    def forward(self, x: torch.Tensor, mask: torch.Tensor, mask_shfit_chunk=None, mask_att_chunk_encoder=None):
        q, k, v, value = self.forward_qkv(x)
        if mask_att_chunk_encoder is not None:
            mask = mask * mask_att_chunk_encoder
        return attend(self, q, k, v, mask) + self.forward_fsmn(value, mask, mask_shfit_chunk)


class Fused(MultiHeadedAttention):
    """The adaptor's and the CTC branch's attention."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor):
        return attend(self, *self.forward_qkv(query, key, value), mask)


FUSED = {MultiHeadedAttentionSANM: FusedSANM, MultiHeadedAttention: Fused}


def fuse_attention(model: torch.nn.Module) -> None:
    """Exchange the attention of encoder, adaptor and CTC branch; their weights stay."""
    for layer in model.modules():
        layer.__class__ = FUSED.get(type(layer), type(layer))
