"""Layers of Fun-ASR-Nano that train and decode faster than FunASR's, with the same weights and the same result.

    fuse_attention(model)      # encoder, adaptor, CTC branch: attention without its matrix of scores
    compile_layers(model)      # on a GPU: many small kernels become few

From funasr/models/sense_voice/model.py, models/llm_asr/adaptor.py and models/transformer/attention.py (1.4.16).
"""

import logging
import shutil
import sysconfig
from pathlib import Path

import torch
from funasr.models.llm_asr.adaptor import Transformer
from funasr.models.sense_voice.model import MultiHeadedAttentionSANM, SenseVoiceEncoderSmall
from funasr.models.transformer.attention import MultiHeadedAttention

# cuDNN's attention plans anew for every shape, 0.1 s and more at a time (H100, torch 2.11), and each batch has another.
torch.backends.cuda.enable_cudnn_sdp(False)


def inside(lengths: torch.Tensor, time: int) -> torch.Tensor:
    """(batch, time), true where an utterance of its length is."""
    return torch.arange(time, device=lengths.device) < lengths[:, None]


def attend(layer: torch.nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask) -> torch.Tensor:
    """The layer's output for heads (batch, head, time, d_k) and a mask (batch, 1, time), nonzero where speech is.

    In the mask's place may be a list, bounds and longest, of the segments of utterances in a row.

    Upstream keeps the scores of every layer for the backward pass: an utterance of 120 s is 2,000 frames, times 2,000,
    times 4 heads, times 70 layers. PyTorch computes the same sums in blocks; on a CPU only without dropout.
    """
    if isinstance(mask, list):
        return attend_each(layer, q, k, v, *mask)
    keep = mask.unsqueeze(1) != 0
    dropout = layer.dropout.p if layer.training else 0.0
    heads = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=keep, dropout_p=dropout)
    return layer.linear_out(heads.transpose(1, 2).flatten(2))


def attend_each(
    layer: torch.nn.Module, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: torch.Tensor, longest: int
) -> torch.Tensor:
    """`attend` within each of the segments bounds[i]:bounds[i + 1] of heads (1, head, time, d_k), on a GPU.

    PyTorch's own flash attention, which knows no mask but segments; its public `varlen_attn` has no dropout.
    """
    heads = [head[0].transpose(0, 1) for head in (q, k, v)]
    dropout = layer.dropout.p if layer.training else 0.0
    flash = torch.ops.aten._flash_attention_forward
    attended = flash(*heads, bounds, bounds, longest, longest, dropout, False, False)[0]
    return layer.linear_out(attended.flatten(1))[None]


def takes_rows(x: torch.Tensor, layer: torch.nn.Module) -> bool:
    """Whether flash attention can be used: half precision, a GPU since Ampere, heads of a multiple of 8."""
    if not x.is_cuda or not torch.is_autocast_enabled("cuda") or layer.d_k % 8:
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 0)


def in_a_row(x: torch.Tensor, lengths: torch.Tensor, gap: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """The utterances of a batch (batch, time, size) one after another, (1, total, size), at least `gap` frames apart.

    Attention then needs segments, not a mask, which PyTorch's fast kernels do not take. Also the mask (1, 1, total),
    the bounds of utterances and of what is between them, in turn, and how long the longest may be. The total is a
    multiple of 256: matrix products are planned anew for each number of frames they have not seen.
    """
    x = torch.nn.functional.pad(x, (0, 0, 0, gap))
    batch, time = x.shape[:2]
    total = batch * time + -batch * time % 256
    starts = torch.arange(0, batch * time, time, device=x.device)
    bounds = torch.nn.functional.pad(torch.stack([starts, starts + lengths], 1).flatten(), (0, 1), value=total).int()
    mask = torch.nn.functional.pad(inside(lengths, time).flatten(), (0, total - batch * time))[None, None].to(x.dtype)
    return torch.nn.functional.pad(x.flatten(0, 1), (0, 0, 0, total - batch * time))[None], mask, bounds, time + 256


def in_a_batch(x: torch.Tensor, batch: int, frames: int, gap: int) -> torch.Tensor:
    """The utterances of `in_a_row` as the batch (batch, frames, size) they were."""
    return x[0, : batch * (frames + gap)].unflatten(0, (batch, -1))[:, :frames]


class FusedSANM(MultiHeadedAttentionSANM):
    """SenseVoice's self-attention with its convolutional memory; of utterances in a row, with their segments."""

    def forward_fsmn(self, inputs: torch.Tensor, mask: torch.Tensor, mask_shfit_chunk=None):
        """The memory; compiled, as a sum of shifted products: one kernel, where cuDNN's convolution is slow."""
        if not torch.compiler.is_compiling():
            return super().forward_fsmn(inputs, mask, mask_shfit_chunk)
        mask = mask.transpose(1, 2)
        inputs = inputs * mask
        padded = torch.nn.functional.pad(inputs, (0, 0, *self.pad_fn.padding))
        weights = self.fsmn_block.weight[:, 0].unbind(1)
        memory = sum(weight * padded[:, at : at + inputs.shape[1]] for at, weight in enumerate(weights))
        return self.dropout(memory + inputs) * mask

    def forward(self, x: torch.Tensor, mask: torch.Tensor, mask_shfit_chunk=None, mask_att_chunk_encoder=None):
        q, k, v, value = self.forward_qkv(x)
        return attend(self, q, k, v, mask_att_chunk_encoder or mask) + self.forward_fsmn(value, mask, mask_shfit_chunk)


class FusedEncoder(SenseVoiceEncoderSmall):
    """SenseVoice's encoder; under autocast on a GPU of utterances in a row, as far apart as its convolution reaches."""

    def forward(self, xs_pad: torch.Tensor, ilens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.embed(xs_pad * self.output_size() ** 0.5)
        (batch, frames), lengths = x.shape[:2], ilens.int()
        if not takes_rows(x, self.encoders0[0].self_attn):
            return self.through(x, inside(lengths, frames)[:, None, :].to(x.dtype)), lengths
        gap = max(self.encoders0[0].self_attn.pad_fn.padding)
        x, mask, *segments = in_a_row(x, lengths, gap)
        return in_a_batch(self.through(x, mask, segments), batch, frames, gap), lengths

    def through(self, x: torch.Tensor, mask: torch.Tensor, segments: list | None = None) -> torch.Tensor:
        """All layers, on (batch, time, size) and a mask (batch, 1, time); segments of utterances in a row."""
        for layer in [*self.encoders0, *self.encoders]:
            x = layer(x, mask, mask_att_chunk_encoder=segments)[0]
        x = self.after_norm(x)
        for layer in self.tp_encoders:
            x = layer(x, mask, mask_att_chunk_encoder=segments)[0]
        return self.tp_norm(x)


class Fused(MultiHeadedAttention):
    """The adaptor's and the CTC branch's attention."""

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | list):
        return attend(self, *self.forward_qkv(query, key, value), mask)


class FusedTransformer(Transformer):
    """The adaptor, and the CTC branch before its output layer; upstream makes their mask on the CPU."""

    def forward(self, x: torch.Tensor, ilens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.nn.functional.pad(x, (0, 0, 0, -x.shape[1] % self.k)).unflatten(1, (-1, self.k)).flatten(2)
        lengths, (batch, frames) = (ilens - 1) // self.k + 1, x.shape[:2]
        rows = bool(self.blocks) and takes_rows(x, self.blocks[0].self_attn)
        if rows:
            x, _mask, *mask = in_a_row(x, lengths, 1)
        else:
            mask = inside(lengths, frames)[:, None, :]
        x = self.linear2(self.relu(self.linear1(x)))
        for block in self.blocks or []:
            x, _mask = block(x, mask)
        return in_a_batch(x, batch, frames, 1) if rows else x, lengths


def own_and_others(decoded: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """Log-probabilities (batch, frames, n + 1) of an utterance's own symbols, and last of all other symbols together.

    decoded (batch, frames, dim); weight and bias of the CTC output layer; own (batch, n), different symbols of each
    row, filled up with -1, which is never likely. A CTC loss over these has the value and the gradient of one over all
    60,515 symbols, which needs 20 GiB and most of the CTC branch's time for 20 minutes of audio.
    """
    more = -len(weight) % 8  # matrix products have slow kernels only for a width that is no multiple of 8
    weight = torch.nn.functional.pad(weight, (0, 0, 0, more))
    logits = torch.nn.functional.linear(decoded, weight, torch.nn.functional.pad(bias, (0, more), value=-1e4))
    each = logits.gather(2, own.clamp(min=0)[:, None].expand(-1, decoded.shape[1], -1)).float()
    each = each.masked_fill((own < 0)[:, None], -1e4)
    total = logits.float().logsumexp(-1, keepdim=True)
    # All minus the own: rounding must not make it less than nothing.
    others = total + (-torch.expm1((each - total).logsumexp(-1, keepdim=True))).clamp(min=1e-7).log()
    return torch.cat([each, others], -1).log_softmax(-1)


FUSED = {MultiHeadedAttentionSANM: FusedSANM, MultiHeadedAttention: Fused, SenseVoiceEncoderSmall: FusedEncoder,
         Transformer: FusedTransformer}  # fmt: skip


def fuse_attention(model: torch.nn.Module) -> None:
    """Exchange the attention of encoder, adaptor and CTC branch; their weights stay."""
    for layer in model.modules():
        layer.__class__ = FUSED.get(type(layer), type(layer))


def compile_layers(model: torch.nn.Module) -> None:
    """Compile the layers of encoder and LLM, one by one, for batches of any shape; all of a kind share their code.

    Says so and leaves them where the compiler's own needs are not met.
    """
    there = {"a C compiler (gcc)": any(map(shutil.which, ("cc", "gcc", "clang"))),
             "Python.h (python3-dev)": Path(sysconfig.get_paths()["include"], "Python.h").is_file()}  # fmt: skip
    if missing := [what for what, is_there in there.items() if not is_there]:
        logging.warning("compiled_layers: %s missing; layers are not compiled, and training takes up to twice as long",
                        " and ".join(missing))  # fmt: skip
        return
    # Training and validation, a batch of one row, layers of another size: each is a compilation of the same code.
    torch._dynamo.config.recompile_limit = 32
    # Or LoRA's scale is a variable, computed on the CPU, for which PyTorch tries C++ compilers for most of a minute.
    torch._dynamo.config.specialize_float = True
    encoder, parts = model.audio_encoder, [model.audio_adaptor, model.ctc_decoder]
    blocks = [block for part in parts if part is not None for block in part.blocks or []]
    for layer in [*encoder.encoders0, *encoder.encoders, *encoder.tp_encoders, *blocks, *model.llm.model.layers]:
        layer.compile(dynamic=True)
    model.own_and_others = torch.compile(own_and_others, dynamic=True)
