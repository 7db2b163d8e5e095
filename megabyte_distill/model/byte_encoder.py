"""Bytes to states in the teacher's embedding space."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megabyte_distill.alphabet import BYTE_VOCAB
from megabyte_distill.config.model import ByteSideConfig
from megabyte_distill.kernels.ngrams import ngram_indices, no_recent_bytes, step_indices, window_indices
from megabyte_distill.kernels.ops import byte_embedding, ngram_embedding
from megabyte_distill.kernels.segments import Segments
from megabyte_distill.model.byte_stack import ByteMixerStack, StackSpan, StackState
from megabyte_distill.model.feed_forward import SwiGLU
from megabyte_distill.model.linears import LinearFactory, PlainLinears
from megabyte_distill.model.normalization import RMSNorm
from megabyte_distill.model.row_state import RowState, window_after


@dataclass(frozen=True, slots=True)
class EncoderState(RowState):
    """What the encoder remembers of R rows."""

    mixer: StackState
    recent: Tensor
    """[R, n − 1] int64, the last bytes, as far as the longest n-gram reaches back."""


@dataclass(frozen=True, slots=True)
class EncoderSpan:
    """A :class:`Span` of the encoder."""

    mixer: StackSpan
    recent: Tensor
    """[R, n − 1 + T] int64, the last bytes before and the new ones."""
    reach: int
    """n − 1."""

    def after(self, counts: Tensor) -> EncoderState:
        """The state behind the first ``counts`` [R] bytes."""
        recent = window_after(self.recent[..., None], self.reach, counts)[..., 0]
        return EncoderState(self.mixer.after(counts), recent)


class ByteEncoder(nn.Module):
    """Byte embedding (and hashed n-grams where there are tables), mixer blocks on an fp32 residual stream, RMSNorm,
    SwiGLU head D → hidden → E."""

    def __init__(self, config: ByteSideConfig, linears: LinearFactory | None = None) -> None:
        super().__init__()
        make = linears or PlainLinears()
        self.embedding = nn.Embedding(BYTE_VOCAB, config.byte_width)
        self.ngrams, self.ngram_rows = tuple(config.byte_ngram_tables), config.byte_ngram_rows
        if self.ngrams:
            # zeros: at first the embedding is that of the bytes alone
            shape = (len(self.ngrams) * self.ngram_rows, config.byte_width)
            self.ngram_table: nn.Parameter | None = nn.Parameter(torch.zeros(shape))
        else:
            self.register_parameter("ngram_table", None)
        self.mixer = ByteMixerStack(config, config.encoder_layers, make)
        self.norm = RMSNorm(config.byte_width, config.norm_eps)
        self.head = SwiGLU(config.byte_width, config.encoder_ffn_hidden_size, config.backbone_width, make)

    def forward(self, byte_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """r [P, E] in the parameters' dtype for byte_ids [P] int64, segments given by cu_seqlens [S+1]."""
        return self.project(self.mix(byte_ids, cu_seqlens))

    def mix(self, byte_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The normalised stream [P, D] behind the mixers."""
        segments = Segments(cu_seqlens, byte_ids.shape[0])
        if self.ngram_table is None:
            x = byte_embedding(byte_ids, self.embedding.weight)
        else:
            indices = ngram_indices(byte_ids, segments.position, self.ngrams, self.ngram_rows)
            x = ngram_embedding(byte_ids, indices, self.embedding.weight, self.ngram_table)
        result: Tensor = self.norm(self.mixer(x, segments))
        return result

    def project(self, x: Tensor) -> Tensor:
        """r [.., E] of the stream at any bytes [.., D]: the head looks at one byte alone, and zero stays zero."""
        result: Tensor = self.head(x)
        return result

    def init_state(self, rows: int) -> EncoderState:
        """The state of ``rows`` sequences whose first byte (BOS) comes next."""
        device = self.embedding.weight.device
        return EncoderState(self.mixer.init_state(rows, device), no_recent_bytes(rows, self.ngrams, device))

    def steps(self, byte_ids: Tensor, state: EncoderState) -> tuple[Tensor, EncoderSpan]:
        """The next T bytes of each row at once: byte_ids [R, T] -> (r [R, T, E], how the state goes on)."""
        flat, recent = byte_ids.flatten(), torch.cat((state.recent, byte_ids), dim=1)
        if self.ngram_table is None:
            x = byte_embedding(flat, self.embedding.weight)
        else:
            indices = window_indices(recent, byte_ids.shape[1], self.ngrams, self.ngram_rows)
            x = ngram_embedding(flat, indices.flatten(0, 1), self.embedding.weight, self.ngram_table)
        x, mixer = self.mixer.steps(x.view(*byte_ids.shape, -1), state.mixer)
        return self.head(self.norm(x)), EncoderSpan(mixer, recent, state.recent.shape[1])

    def step(self, byte_ids: Tensor, state: EncoderState) -> tuple[Tensor, EncoderState]:
        """One byte of each row: byte_ids [R] -> (r [R, E], the next state)."""
        recent = state.recent
        if self.ngram_table is None:
            x = byte_embedding(byte_ids, self.embedding.weight)
        else:
            indices, recent = step_indices(byte_ids, recent, self.ngrams, self.ngram_rows)
            x = ngram_embedding(byte_ids, indices, self.embedding.weight, self.ngram_table)
        x, mixer = self.mixer.step(x, state.mixer)
        return self.head(self.norm(x)), EncoderState(mixer, recent)
