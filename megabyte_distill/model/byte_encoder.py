"""Bytes to states in the teacher's embedding space."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from megabyte_distill.alphabet import BYTE_VOCAB
from megabyte_distill.config.model import ByteSideConfig
from megabyte_distill.kernels.ops import byte_embedding
from megabyte_distill.kernels.segments import Segments
from megabyte_distill.model.byte_stack import ByteMixerStack, StackState
from megabyte_distill.model.feed_forward import SwiGLU
from megabyte_distill.model.linears import LinearFactory, PlainLinears
from megabyte_distill.model.normalization import RMSNorm


class ByteEncoder(nn.Module):
    """Byte embedding, mixer blocks on an fp32 residual stream, RMSNorm, SwiGLU head D → hidden → E."""

    def __init__(self, config: ByteSideConfig, linears: LinearFactory | None = None) -> None:
        super().__init__()
        make = linears or PlainLinears()
        self.embedding = nn.Embedding(BYTE_VOCAB, config.byte_width)
        self.mixer = ByteMixerStack(config, config.encoder_layers, make)
        self.norm = RMSNorm(config.byte_width, config.norm_eps)
        self.head = SwiGLU(config.byte_width, config.encoder_ffn_hidden_size, config.backbone_width, make)

    def forward(self, byte_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """r [P, E] in the parameters' dtype for byte_ids [P] int64, segments given by cu_seqlens [S+1]."""
        return self.project(self.mix(byte_ids, cu_seqlens))

    def mix(self, byte_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The normalised stream [P, D] behind the mixers."""
        segments = Segments(cu_seqlens, byte_ids.shape[0])
        x = byte_embedding(byte_ids, self.embedding.weight)
        result: Tensor = self.norm(self.mixer(x, segments))
        return result

    def project(self, x: Tensor) -> Tensor:
        """r [.., E] of the stream at any bytes [.., D]: the head looks at one byte alone, and zero stays zero."""
        result: Tensor = self.head(x)
        return result

    def init_state(self, rows: int) -> StackState:
        """The state of ``rows`` sequences whose first byte (BOS) comes next."""
        return self.mixer.init_state(rows, self._device())

    def step(self, byte_ids: Tensor, state: StackState) -> tuple[Tensor, StackState]:
        """One byte of each row: byte_ids [R] -> (r [R, E], the next state)."""
        x, state = self.mixer.step(byte_embedding(byte_ids, self.embedding.weight), state)
        return self.head(self.norm(x)), state

    def _device(self) -> torch.device:
        return self.embedding.weight.device
