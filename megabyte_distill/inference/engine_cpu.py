"""An engine's slots in the library built from kernels/cpu_step: fp32 on a CPU, three calls a byte or fewer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from megabyte_distill.alphabet import JOINT_CLASSES
from megabyte_distill.config.model import MAX_NGRAM, Activation, ChunkPooling, DechunkMode, QkNorm
from megabyte_distill.inference.engine_slots import remember_last
from megabyte_distill.inference.state_guess import StateGuess, following
from megabyte_distill.kernels.step_library import Description, StepModel
from megabyte_distill.model.byte_decoder import DechunkState, dechunk_step, dechunk_steps, init_dechunk_state
from megabyte_distill.model.byte_stack import ByteMixerStack
from megabyte_distill.model.chunking import PoolState, init_pool_state, pool_step, pool_steps
from megabyte_distill.model.conv_mixer import ConvMixerBlock
from megabyte_distill.model.feed_forward import SwiGLU
from megabyte_distill.model.local_attention import ROPE_THETA, LocalAttentionBlock
from megabyte_distill.model.mamba2 import Mamba2Block
from megabyte_distill.model.rotary import LayerReach, RotaryTable, inverse_frequencies
from megabyte_distill.model.row_state import RowState
from megabyte_distill.model.step_layers import StepBackbone, StepLayer
from megabyte_distill.model.student import Student

_QK_NORMS = {QkNorm.NONE: 0, QkNorm.HEAD: 1, QkNorm.FULL: 2}
_ACTIVATIONS = {Activation.SILU: 0, Activation.GELU_TANH: 1}


def refusal(student: Student) -> str | None:
    """Why the library cannot run a student, as "got …, expected …", or None."""
    parameter = next(student.parameters())
    if parameter.device.type != "cpu" or parameter.dtype is not torch.float32:
        return f"got {parameter.dtype} weights on {parameter.device.type}, expected fp32 ones on a CPU"
    step_weights = getattr(student.backbone, "step_weights", None)
    if step_weights is None or step_weights() is None:
        return "got a backbone cut over ranks or of another's layers, expected a whole one of our own"
    blocks = (*student.byte_encoder.mixer.blocks, *student.byte_decoder.mixer.blocks)
    if unknown := {type(block).__name__ for block in blocks if type(block) not in _BLOCKS}:
        return f"got byte mixers {', '.join(sorted(unknown))}, expected this package's own"
    if too_long := [n for n in student.byte_side_config.byte_ngram_tables if n > MAX_NGRAM]:
        return f"got n-grams of {too_long} bytes, expected at most {MAX_NGRAM}"
    weights = student.byte_encoder.head.out.get_parameter("weight")
    if weights.shape[1] != student.byte_side_config.encoder_ffn_hidden_size:
        return "got a byte side cut over ranks, expected a whole one"
    return None


class CpuSlots:
    """:class:`Slots`; between encoder, backbone and decoder stand the student's own functions, on small tensors."""

    at_once = 4096

    def __init__(self, student: Student, count: int, guess: StateGuess | None) -> None:
        """``guess`` as in ``TorchSlots``. ValueError where the library is missing."""
        self._student, self._pooling, self._guess = student, student.pooling, guess
        config = student.byte_side_config
        self._width, self._mode = config.backbone_width, DechunkMode(config.dechunk_mode)
        self._model = StepModel(describe(student, count))
        self._every = torch.arange(count)
        self._lengths = torch.zeros(count, dtype=torch.int64)
        self._hidden = torch.zeros(count, self._width)  # of each row's last chunk
        self._guessed = self._hidden.clone()  # of the last one, drafts included
        # where bytes read the last chunk that ended as it is, there is nothing else to remember
        self._is_plain = self._mode is DechunkMode.HARD and self._pooling is ChunkPooling.LAST
        self._between, self._saved = self._fresh(count), self._fresh(count)

    def _fresh(self, count: int) -> _Between:
        device, dtype = torch.device("cpu"), torch.float32
        return _Between(
            pool=init_pool_state(count, self._width, self._pooling, device, dtype),
            dechunk=init_dechunk_state(count, self._width, device, dtype),
            r_previous=torch.zeros(count, self._width),
        )

    def reset(self, rows: Tensor) -> None:
        self._model.reset(rows)
        self._lengths[rows] = 0
        self._hidden[rows] = self._guessed[rows] = 0.0
        self._between.put(rows, self._fresh(rows.shape[0]))

    def step(self, byte_ids: Tensor, bits: Tensor, rows: Tensor) -> Tensor:
        r = self._model.encode(byte_ids[:, None], rows, self._width)
        s = self._draft(r, bits, rows) if self._is_plain else self._draft_any(r, bits, rows)
        return self._model.decode(byte_ids[:, None], rows, s, r, JOINT_CLASSES)[:, 0]

    def _draft(self, r: Tensor, bits: Tensor, rows: Tensor) -> Tensor:
        """What bytes read of chunks, [K, E], those that end at bits guessed."""
        if bool(bits.any()):
            self._guess_states(r[bits, 0], rows[bits])
        return self._guessed[rows]

    def _guess_states(self, chunks: Tensor, rows: Tensor) -> Tensor:
        assert self._guess is not None
        self._guessed[rows] = found = self._guess(chunks, self._guessed[rows])
        return found

    def _draft_any(self, r: Tensor, bits: Tensor, rows: Tensor) -> Tensor:
        before, h = self._between.select(rows), torch.zeros_like(r[:, 0])
        chunks, pool = pool_step(before.pool, r[:, 0], bits, self._pooling)
        if bool(bits.any()):
            h[bits] = self._guess_states(chunks[bits], rows[bits])
        s, dechunk = dechunk_step(before.dechunk, bits, h, self._p_previous(r, rows)[:, 0], self._mode)
        self._between.put(rows, _Between(pool=pool, dechunk=dechunk, r_previous=r[:, 0]))
        return s

    def _p_previous(self, r: Tensor, rows: Tensor) -> Tensor:
        """[K, T] of the byte in front of each of r [K, T, E]; ones where nothing reads them."""
        if self._mode is not DechunkMode.CAUSAL:
            return torch.ones(r.shape[:2])
        before = torch.cat((self._between.r_previous[rows][:, None], r[:, :-1]), dim=1)
        return self._student.router.step(before.flatten(0, 1), r.flatten(0, 1)).view(r.shape[:2])

    def save(self, rows: Tensor) -> None:
        self._model.save(rows)
        if not self._is_plain:
            self._saved.put(rows, self._between.select(rows))

    def read(self, byte_ids: Tensor, bits: Tensor, rows: Tensor, *, saved: bool) -> Tensor:
        if saved:
            self._model.restore(rows)
            if not self._is_plain:
                self._between.put(rows, self._saved.select(rows))
        elif byte_ids.shape[1] > 1:
            self._model.save(rows)
        r = self._model.encode(byte_ids, rows, self._width)
        s = self._across(r, bits, rows) if self._is_plain else self._across_any(r, bits, rows)
        self._read = rows, bits, r
        return self._model.decode(byte_ids, rows, s, r, JOINT_CLASSES)

    def _across(self, r: Tensor, bits: Tensor, rows: Tensor) -> Tensor:
        """What bytes read of their chunks, [K, T, E]."""
        h, length = self._ended(r, bits, rows), bits.shape[1]
        if length == 1:
            return torch.where(bits[:, :, None], h, self._hidden[rows][:, None])
        places = torch.where(bits, torch.arange(length), -1).cummax(1).values
        found = h.gather(1, places.clamp_min(0)[..., None].expand_as(h))
        return torch.where((places >= 0)[..., None], found, self._hidden[rows][:, None])

    def _across_any(self, r: Tensor, bits: Tensor, rows: Tensor) -> Tensor:
        before = self._between.select(rows)
        chunks, self._pool_after = pool_steps(before.pool, r, bits, self._pooling)
        h, p_previous = self._ended(chunks, bits, rows), self._p_previous(r, rows)
        s, self._dechunk_after = dechunk_steps(before.dechunk, bits, h, p_previous, self._mode)
        return s

    def _ended(self, chunks: Tensor, bits: Tensor, rows: Tensor) -> Tensor:
        """The backbone's states [K, T, E] of the chunks that end at bits [K, T], zeros elsewhere."""
        h = torch.zeros_like(chunks)
        row, place = bits.nonzero(as_tuple=True)
        if row.shape[0]:
            slots = rows[row]
            places = self._lengths[slots] + bits.cumsum(1)[row, place] - 1
            h[row, place] = self._model.backbone(chunks[row, place], slots, places)
        self._chunks, self._h = chunks, h
        return h

    def keep(self, counts: Tensor) -> None:
        rows, bits, r = self._read
        if bits.shape[1] > 1:
            self._model.keep(rows, bits.shape[1], counts)
            bits = bits & (torch.arange(bits.shape[1]) < counts[:, None])
        self._lengths[rows] += bits.sum(1)
        row, place = bits.nonzero(as_tuple=True)
        hidden = self._h[row, place]
        if self._guess is not None:
            self._guess.learn(self._chunks[row, place], following(row, hidden, self._hidden[rows]), hidden)
        remember_last(self._hidden, rows, row, hidden)
        self._guessed[rows] = self._hidden[rows]
        if not self._is_plain:
            last = r[self._every[: rows.shape[0]], counts - 1]
            after = _Between(pool=self._pool_after(counts), dechunk=self._dechunk_after(counts), r_previous=last)
            self._between.put(rows, after)


@dataclass(frozen=True, slots=True)
class _Between(RowState):
    """What rows remember between encoder and decoder."""

    pool: PoolState
    dechunk: DechunkState
    r_previous: Tensor


def describe(student: Student, count: int) -> Description:
    """A student with ``count`` slots, in the order in which ``Model`` in step.cpp reads it."""
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
        number, write = _BLOCKS[type(block)]
        out.number(number)
        write(out, block)


def _conv(out: Description, block: ConvMixerBlock) -> None:
    out.norm(block.norm.weight, block.norm.eps)
    for part in (block.value, block.gate, block.out):
        _dense(out, part)
    out.pointer(block.conv_weight.detach().t())
    out.number(block.conv_weight.shape[1], block.dilation)
    out.norm(block.ffn_norm.weight, block.ffn_norm.eps)
    _gated(out, block.ffn)


def _mamba(out: Description, block: Mamba2Block) -> None:
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


def _attention(out: Description, block: LocalAttentionBlock) -> None:
    out.norm(block.norm.weight, block.norm.eps)
    for part in (block.q, block.k, block.v, block.out):
        _dense(out, part)
    out.number(block.head_dim, block.window)
    out.pointer(inverse_frequencies(block.head_dim, ROPE_THETA))


_BLOCKS: dict[type[nn.Module], tuple[int, Callable[[Description, Any], None]]] = {
    ConvMixerBlock: (0, _conv),
    Mamba2Block: (1, _mamba),
    LocalAttentionBlock: (2, _attention),
}
"""Number of a block's kind in byte_stack.h, and what describes one."""


def _backbone(out: Description, weights: StepBackbone) -> None:
    config = weights.config
    first = weights.layers[0]
    out.number(config.hidden_size, config.head_dim, config.ffn_hidden_size)
    out.number(sum(weight.shape[0] for weight, _ in first.projections))
    out.number(_QK_NORMS[config.qk_norm], _ACTIVATIONS[config.activation])
    full, sliding, magnitude = RotaryTable(config).frequencies
    out.fraction(config.norm_eps)
    out.fraction(magnitude)
    out.fraction(config.attention_scale or config.head_dim**-0.5)
    out.pointer(full)
    out.pointer(sliding)
    out.number(len(weights.layers))
    for number, layer in enumerate(weights.layers):
        _layer(out, layer, LayerReach.of(config, number).window)
    out.norm(weights.final_norm, config.norm_eps)


def _layer(out: Description, layer: StepLayer, window: int | None) -> None:
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
    for norm in (
        layer.norm_before_attention, layer.norm_behind_attention, layer.norm_before_mlp, layer.norm_behind_mlp,
        layer.query_norm, layer.key_norm,
    ):  # fmt: skip
        out.pointer(norm)
    out.number(window or 0)
