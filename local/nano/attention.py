"""Attention of FunASR's encoder, adaptor and CTC branch without the matrix of scores in memory.

    fuse(model.audio_encoder)

Upstream (1.4.16) keeps the scores of every layer for the backward pass: an utterance of 120 s is 2,000 frames, times
2,000, times 4 heads, times 70 layers. PyTorch's scaled_dot_product_attention computes the same sums in blocks; on a
CPU only without dropout.
"""

from __future__ import annotations

import torch
from funasr.models.sense_voice.model import MultiHeadedAttentionSANM
from funasr.models.transformer.attention import MultiHeadedAttention


def attend(layer: torch.nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask) -> torch.Tensor:
    """The layer's output for heads (batch, head, time, d_k) and a mask (batch, 1, time), nonzero where speech is."""
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


def fuse(module: torch.nn.Module | None) -> None:
    """Exchange upstream's attention layers in `module`, weights kept."""
    fused = {MultiHeadedAttentionSANM: FusedSANM, MultiHeadedAttention: Fused}
    for layer in module.modules() if module is not None else ():
        layer.__class__ = fused.get(type(layer), type(layer))
