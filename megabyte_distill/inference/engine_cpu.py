"""An engine's slots in the library built from kernels/cpu_step: fp32 on a CPU, three calls a byte or fewer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megabyte_distill.alphabet import JOINT_CLASSES
from megabyte_distill.config.model import ChunkPooling, DechunkMode, QkNorm
from megabyte_distill.kernels.step_library import Description, StepModel
from megabyte_distill.model.byte_decoder import dechunk_step, dechunk_steps, init_dechunk_state
from megabyte_distill.model.byte_stack import ByteMixerStack
from megabyte_distill.model.chunking import init_pool_state, pool_step, pool_steps
from megabyte_distill.model.conv_mixer import ConvMixerBlock
from megabyte_distill.model.feed_forward import SwiGLU
from megabyte_distill.model.mamba2 import Mamba2Block
from megabyte_distill.model.packed_attention import LayerReach, RotaryTable
from megabyte_distill.model.step_layers import StepBackbone, StepLayer
from megabyte_distill.model.student import Student

_QK_NORMS = {QkNorm.NONE: 0, QkNorm.HEAD: 1, QkNorm.FULL: 2}


def refusal(student: Student) -> str | None:
    """Why the library cannot run a student, as "got …, expected …", or None."""
    parameter = next(student.parameters())
    if parameter.device.type != "cpu" or parameter.dtype is not torch.float32:
        return f"got {parameter.dtype} weights on {parameter.device.type}, expected fp32 ones on a CPU"
    step_weights = getattr(student.backbone, "step_weights", None)
    if step_weights is None or step_weights() is None:
        return "got a backbone cut over ranks or of another's layers, expected a whole one of our own"
    weights = student.byte_encoder.head.out.get_parameter("weight")
    if weights.shape[1] != student.byte_side_config.encoder_ffn_hidden_size:
        return "got a byte side cut over ranks, expected a whole one"
    return None


class CpuSlots:
    """:class:`Slots`; between encoder, backbone and decoder stand the student's own functions, on small tensors."""

    def __init__(self, student: Student, count: int) -> None:
        """ValueError where the library is missing."""
        self._student, self._pooling = student, student.pooling
        config = student.byte_side_config
        self._width, self._mode = config.backbone_width, DechunkMode(config.dechunk_mode)
        self._model = StepModel(describe(student, count))
        self._every = torch.arange(count)
        self._zero, self._no = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.bool)
        self._lengths = self._zero.clone()
        device, dtype = torch.device("cpu"), torch.float32
        self._pool = init_pool_state(count, self._width, self._pooling, device, dtype)
        self._dechunk = init_dechunk_state(count, self._width, device, dtype)
        self._r_previous = torch.zeros(count, self._width)
        # what stays as it is while drafts are read need not be saved
        self._is_plain = self._mode is DechunkMode.HARD and self._pooling is ChunkPooling.LAST
        self._saved = (self._pool, self._dechunk, self._r_previous)

    def reset(self, rows: Tensor) -> None:
        self._model.reset(rows)
        self._lengths[rows] = 0
        device, dtype = torch.device("cpu"), torch.float32
        self._pool.put(rows, init_pool_state(rows.shape[0], self._width, self._pooling, device, dtype))
        self._dechunk.put(rows, init_dechunk_state(rows.shape[0], self._width, device, dtype))
        self._r_previous[rows] = 0.0

    def step(self, byte_ids: Tensor, rows: Tensor) -> Tensor:
        r = self._model.encode(byte_ids[:, None], rows, self._width)
        s = self._dechunk.value[rows] if self._is_plain else self._inside(r[:, 0], rows)
        return self._model.decode(byte_ids[:, None], rows, s, r, JOINT_CLASSES)[:, 0]

    def _inside(self, r: Tensor, rows: Tensor) -> Tensor:
        """What bytes that end no chunk read of the chunks before, [K, E]."""
        ended = self._no[: rows.shape[0]]
        _, pool = pool_step(self._pool.select(rows), r, ended, self._pooling)
        s, dechunk = dechunk_step(
            self._dechunk.select(rows), ended, r, self._p_previous(r[:, None], rows)[:, 0], self._mode
        )
        self._pool.put(rows, pool)
        self._dechunk.put(rows, dechunk)
        self._r_previous[rows] = r
        return s

    def _p_previous(self, r: Tensor, rows: Tensor) -> Tensor:
        """[K, T] of the byte in front of each of r [K, T, E]; ones where nothing reads them."""
        if self._mode is not DechunkMode.CAUSAL:
            return torch.ones(r.shape[:2])
        before = torch.cat((self._r_previous[rows][:, None], r[:, :-1]), dim=1)
        return self._student.router.step(before.flatten(0, 1), r.flatten(0, 1)).view(r.shape[:2])

    def save(self, rows: Tensor) -> None:
        self._model.save(rows)
        if not self._is_plain:
            pool, dechunk, r_previous = self._saved
            if r_previous is self._r_previous:
                everything = self._every
                self._saved = (self._pool.select(everything), self._dechunk.select(everything), r_previous.clone())
                return
            pool.put(rows, self._pool.select(rows))
            dechunk.put(rows, self._dechunk.select(rows))
            r_previous[rows] = self._r_previous[rows]

    def _restore(self, rows: Tensor) -> None:
        self._model.restore(rows)
        if not self._is_plain:
            pool, dechunk, r_previous = self._saved
            self._pool.put(rows, pool.select(rows))
            self._dechunk.put(rows, dechunk.select(rows))
            self._r_previous[rows] = r_previous[rows]

    def read(self, byte_ids: Tensor, bits: Tensor, rows: Tensor, *, saved: bool) -> Tensor:
        if saved:
            self._restore(rows)
        elif byte_ids.shape[1] > 1:
            self._model.save(rows)
        r = self._model.encode(byte_ids, rows, self._width)
        s = self._across_chunks(r, bits, rows) if self._is_plain else self._across_any_chunks(r, bits, rows)
        self._read = rows, bits, r, s
        return self._model.decode(byte_ids, rows, s, r, JOINT_CLASSES)

    def _across_chunks(self, r: Tensor, bits: Tensor, rows: Tensor) -> Tensor:
        """What bytes read of their chunks, [K, T, E], where each reads the last that ended as it is."""
        h, last = self._ended_chunks(r, bits, rows), bits.shape[1] - 1
        if not last:
            return torch.where(bits[:, :, None], h, self._dechunk.value[rows][:, None])
        places = torch.where(bits, torch.arange(last + 1), -1).cummax(1).values
        found = h.gather(1, places.clamp_min(0)[..., None].expand_as(h))
        return torch.where((places >= 0)[..., None], found, self._dechunk.value[rows][:, None])

    def _across_any_chunks(self, r: Tensor, bits: Tensor, rows: Tensor) -> Tensor:
        chunks, self._pool_after = pool_steps(self._pool.select(rows), r, bits, self._pooling)
        h, p_previous = self._ended_chunks(chunks, bits, rows), self._p_previous(r, rows)
        s, self._dechunk_after = dechunk_steps(self._dechunk.select(rows), bits, h, p_previous, self._mode)
        return s

    def _ended_chunks(self, chunks: Tensor, bits: Tensor, rows: Tensor) -> Tensor:
        """The backbone's states [K, T, E] of the chunks that end at bits [K, T], zeros elsewhere."""
        h = torch.zeros_like(chunks)
        row, place = bits.nonzero(as_tuple=True)
        if row.shape[0]:
            slots = rows[row]
            places = self._lengths[slots] + bits.cumsum(1)[row, place] - 1
            h[row, place] = self._model.backbone(chunks[row, place], slots, places)
        return h

    def keep(self, counts: Tensor) -> None:
        rows, bits, r, s = self._read
        if bits.shape[1] > 1:
            self._model.keep(rows, bits.shape[1], counts)
            bits = bits & (torch.arange(bits.shape[1]) < counts[:, None])
        self._lengths[rows] += bits.sum(1)
        last = self._every[: rows.shape[0]], counts - 1
        if self._is_plain:
            self._dechunk.value[rows] = s[last]
            return
        self._pool.put(rows, self._pool_after(counts))
        self._dechunk.put(rows, self._dechunk_after(counts))
        self._r_previous[rows] = r[last]


def describe(student: Student, count: int) -> Description:
    """A student with ``count`` slots, in the order in which step.cpp reads it."""
    out, config = Description(), student.byte_side_config
    encoder, decoder = student.byte_encoder, student.byte_decoder
    out.number(count, config.byte_width, config.backbone_width)
    out.pointer(encoder.embedding.weight)
    out.pointer(encoder.ngram_table)
    out.number(encoder.ngram_rows)
    out.list(encoder.ngrams)
    _stack(out, encoder.mixer)
    out.norm(encoder.norm.weight, encoder.norm.eps)
    _gated(out, encoder.head)
    _dense(out, decoder.residual)
    _gated(out, decoder.input)
    out.pointer(decoder.embedding.weight)
    _stack(out, decoder.mixer)
    out.norm(decoder.norm.weight, decoder.norm.eps)
    _dense(out, decoder.head)
    _backbone(out, student.backbone.step_weights())  # type: ignore[operator]
    return out


def _dense(out: Description, layer: nn.Module) -> None:
    out.dense(layer.get_parameter("weight"), getattr(layer, "bias", None))


def _gated(out: Description, layer: SwiGLU) -> None:
    for part in (layer.value, layer.gate, layer.out):
        _dense(out, part)


def _stack(out: Description, stack: ByteMixerStack) -> None:
    out.number(len(stack.blocks))
    for block in stack.blocks:
        if isinstance(block, ConvMixerBlock):
            _conv(out, block)
        else:
            assert isinstance(block, Mamba2Block)
            _mamba(out, block)


def _conv(out: Description, block: ConvMixerBlock) -> None:
    out.number(0)
    out.norm(block.norm.weight, block.norm.eps)
    for part in (block.value, block.gate, block.out):
        _dense(out, part)
    out.pointer(block.conv_weight.detach().t())
    out.number(block.conv_weight.shape[1], block.dilation)
    out.norm(block.ffn_norm.weight, block.ffn_norm.eps)
    _gated(out, block.ffn)


def _mamba(out: Description, block: Mamba2Block) -> None:
    out.number(1)
    out.norm(block.norm.weight, block.norm.eps)
    for part in (block.z, block.x, block.b, block.c, block.dt, block.out):
        _dense(out, part)
    out.pointer(torch.cat((block.conv_x_weight, block.conv_b_weight, block.conv_c_weight)).detach().t())
    out.pointer(torch.cat((block.conv_x_bias, block.conv_b_bias, block.conv_c_bias)).detach())
    out.number(block.conv_x_weight.shape[1])
    out.pointer(block.dt_bias)
    out.pointer(-block.a_log.detach().exp())
    out.pointer(block.d_skip)
    out.norm(block.gated_norm.weight, block.gated_norm.eps)


def _backbone(out: Description, weights: StepBackbone) -> None:
    config = weights.config
    first = weights.layers[0]
    out.number(config.hidden_size, config.head_dim, config.ffn_hidden_size)
    out.number(sum(weight.shape[0] for weight, _ in first.projections))
    out.number(int(config.post_norm), _QK_NORMS[config.qk_norm])
    full, sliding, magnitude = RotaryTable(config).frequencies
    out.fraction(config.norm_eps)
    out.fraction(magnitude)
    out.pointer(full)
    out.pointer(sliding)
    out.number(len(weights.layers))
    for number, layer in enumerate(weights.layers):
        _layer(out, layer, config.norm_eps, LayerReach.of(config, number).window)
    out.norm(weights.final_norm, config.norm_eps)


def _layer(out: Description, layer: StepLayer, eps: float, window: int | None) -> None:
    out.number(len(layer.projections))
    for weight, bias in layer.projections:
        out.dense(weight, bias)
    for places in (layer.query_at, layer.key_at, layer.value_at):
        out.list(places)
    out.dense(layer.out)
    out.number(len(layer.up))
    for weight in layer.up:
        out.dense(weight)
    out.dense(layer.down)
    out.norm(layer.attention_norm, eps)
    out.norm(layer.mlp_norm, eps)
    out.pointer(layer.query_norm)
    out.pointer(layer.key_norm)
    out.number(window or 0)
