"""Chunk states back to bytes, and the joint (byte, bit) logits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megabyte_distill.alphabet import BYTE_VOCAB, JOINT_CLASSES
from megabyte_distill.config.model import ByteSideConfig, DechunkMode
from megabyte_distill.kernels.ops import (
    P_CLAMP,
    accumulation_dtype,
    byte_embedding,
    dechunk_residual,
)
from megabyte_distill.kernels.segments import Segments
from megabyte_distill.model.byte_stack import ByteMixerStack, StackSpan, StackState
from megabyte_distill.model.chunking import ChunkLayout
from megabyte_distill.model.feed_forward import SwiGLU
from megabyte_distill.model.linears import LinearFactory, PlainLinears
from megabyte_distill.model.normalization import RMSNorm
from megabyte_distill.model.row_state import RowState, after_each


class ByteDecoder(nn.Module):
    """Dechunk, residual from the encoder, SwiGLU E → hidden → D, second byte table, mixer blocks, RMSNorm, head."""

    def __init__(self, config: ByteSideConfig, linears: LinearFactory | None = None) -> None:
        super().__init__()
        make = linears or PlainLinears()
        width, backbone = config.byte_width, config.backbone_width
        self.mode = DechunkMode(config.dechunk_mode)
        self.residual = make.replicated(backbone, backbone, bias=True)
        nn.init.zeros_(self.residual.get_parameter("weight"))
        if self.mode is DechunkMode.OFFICIAL:
            self.null_group: nn.Parameter | None = nn.Parameter(torch.randn(backbone))
        else:
            # BOS ends a chunk, so nothing reads it; a parameter without gradient would only decay.
            self.register_parameter("null_group", None)
        self.input = SwiGLU(backbone, config.decoder_ffn_hidden_size, width, make)
        self.embedding = nn.Embedding(BYTE_VOCAB, width)
        self.mixer = ByteMixerStack(config, config.decoder_layers, make)
        self.norm = RMSNorm(width, config.norm_eps)
        self.head = make.replicated(width, JOINT_CLASSES)

    def forward(
        self,
        h: Tensor,
        r: Tensor,
        p: Tensor,
        byte_ids: Tensor,
        layout: ChunkLayout,
        cu_seqlens: Tensor,
        bits: Tensor,
    ) -> Tensor:
        """Joint logits of every byte's successor.

        Args:
            h: [M, E] backbone states; rows of padding chunks are never read.
            r: [P, E] encoder states.
            p: [P] fp32 routing probabilities.
            byte_ids: [P] int64.
            layout: of ``bits``.
            cu_seqlens: [S+1] int32 segments of bytes.
            bits: [P] bool, the boundaries in force.

        Returns:
            [P, 512] in the parameters' dtype.
        """
        z = dechunk_residual(
            h,
            p,
            self._confidence(p, bits),
            self.residual(r),
            ends=layout.ends,
            chunk_of_byte=layout.chunk_of_byte,
            starts=layout.starts,
            mode=self.mode,
            null_group=self.null_group,
        )
        x = byte_embedding(byte_ids, self.embedding.weight, self.input(z))
        logits: Tensor = self.head(self.norm(self.mixer(x, Segments(cu_seqlens, byte_ids.shape[0]))))
        return logits

    def init_state(self, rows: int) -> StackState:
        """The state of ``rows`` sequences whose first byte (BOS) comes next."""
        return self.mixer.init_state(rows, self.embedding.weight.device)

    def step(self, s: Tensor, r: Tensor, byte_ids: Tensor, state: StackState) -> tuple[Tensor, StackState]:
        """One byte of each row: s [R, E] (:func:`dechunk_step`), r [R, E], byte_ids [R] -> (logits [R, 512], state)."""
        x = byte_embedding(byte_ids, self.embedding.weight, self.input(s + self.residual(r)))
        x, state = self.mixer.step(x, state)
        return self.head(self.norm(x)), state

    def steps(self, s: Tensor, r: Tensor, byte_ids: Tensor, state: StackState) -> tuple[Tensor, StackSpan]:
        """The next T bytes of each row at once: s, r [R, T, E], byte_ids [R, T] -> (logits [R, T, 512], how state goes
        on)."""
        added = self.input(s + self.residual(r)).flatten(0, 1)
        x = byte_embedding(byte_ids.flatten(), self.embedding.weight, added)
        x, span = self.mixer.steps(x.view(*byte_ids.shape, -1), state)
        return self.head(self.norm(x)), span

    def _confidence(self, p: Tensor, bits: Tensor) -> Tensor:
        """Probability of the decision taken, [P].

        With thresholded bits this is the paper's max(p, 1 − p). With bits that were given it must be the given side's:
        otherwise a router that is wrong against them would be pushed further into its mistake.
        """
        if self.mode is DechunkMode.OFFICIAL:
            return torch.maximum(p, 1.0 - p)
        return torch.where(bits, p, 1.0 - p)


@dataclass(frozen=True, slots=True)
class DechunkState(RowState):
    """What a row remembers of its chunks between bytes."""

    value: Tensor
    """[R, E] fp32, the state that bytes read until the next chunk ends."""
    pending: Tensor
    """[R, E] fp32, causal mode: h of a chunk that ended at the previous byte, whose weight p comes with this byte."""
    is_pending: Tensor
    """[R] bool."""
    begun: Tensor
    """[R] bool, some chunk of the row has ended before."""


def init_dechunk_state(rows: int, width: int, device: torch.device, dtype: torch.dtype) -> DechunkState:
    """The state of ``rows`` sequences in front of their BOS; dtype is that of the backbone states."""
    wide = accumulation_dtype(dtype)
    zeros = torch.zeros(rows, width, device=device, dtype=wide)
    no = torch.zeros(rows, device=device, dtype=torch.bool)
    return DechunkState(value=zeros, pending=zeros.clone(), is_pending=no, begun=no.clone())


def dechunk_step(
    state: DechunkState, ended: Tensor, h: Tensor, p_previous: Tensor, mode: DechunkMode
) -> tuple[Tensor, DechunkState]:
    """The state one byte of each row reads; equals :func:`dechunk` in hard and causal mode.

    Args:
        state: before this byte.
        ended: [R] bool, this byte ends a chunk.
        h: [R, E], backbone state of the chunk that ends here; other rows are not read.
        p_previous: [R] p of the previous byte, known since this byte is; read in causal mode where it ended a chunk.
        mode: hard or causal.

    Returns:
        (s [R, E] in h's dtype, the next state).

    Raises:
        ValueError: in official mode, which reads p of the byte itself and so cannot be stepped.
    """
    raw = h.to(state.value.dtype)
    if mode is DechunkMode.HARD:
        value = torch.where(ended[:, None], raw, state.value)
        return value.to(h.dtype), DechunkState(value, state.pending, state.is_pending, state.begun | ended)
    if mode is not DechunkMode.CAUSAL:
        raise ValueError(
            f"cannot step dechunk mode {mode.value}: its state at a byte needs the next byte; use hard or causal"
        )
    weight = p_previous.to(raw.dtype).clamp(P_CLAMP, 1.0 - P_CLAMP)
    weight = torch.where(state.begun, weight, 1.0)[:, None]
    settled = torch.where(state.is_pending[:, None], weight * state.pending + (1.0 - weight) * state.value, state.value)
    read = torch.where(ended[:, None], raw, settled)
    begun = state.begun | state.is_pending
    pending = torch.where(ended[:, None], raw, state.pending)
    # a copy: the caller's own bits must not change with the state
    return read.to(h.dtype), DechunkState(settled, pending, ended.clone(), begun)


def dechunk_steps(
    state: DechunkState, ended: Tensor, h: Tensor, p_previous: Tensor, mode: DechunkMode
) -> tuple[Tensor, Callable[[Tensor], DechunkState]]:
    """:func:`dechunk_step` over T bytes: ended and p_previous [R, T], h [R, T, E] -> (s [R, T, E], the state behind
    counts [R] bytes)."""
    read, states = [], [state]
    for t in range(h.shape[1]):
        own, state = dechunk_step(state, ended[:, t], h[:, t], p_previous[:, t], mode)
        read.append(own)
        states.append(state)
    return torch.stack(read, dim=1), lambda counts: after_each(states, counts)
