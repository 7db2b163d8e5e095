"""A tiny byte side for the tests of this folder: configuration, packed rows and one call through all parts."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from megabyte_distill.alphabet import BOS_BYTE
from megabyte_distill.config.model import ByteMixer, ByteSideConfig, DechunkMode
from megabyte_distill.model.byte_decoder import ByteDecoder
from megabyte_distill.model.byte_encoder import ByteEncoder
from megabyte_distill.model.chunking import chunk_layout, pool_chunks
from megabyte_distill.model.router import Router

TINY = ByteSideConfig(
    backbone_width=12,
    byte_width=8,
    encoder_layers=2,
    decoder_layers=2,
    encoder_ffn_hidden_size=10,
    decoder_ffn_hidden_size=10,
    router_hidden_size=10,
    mamba_state_dim=4,
    mamba_head_dim=4,
    mamba_scan_chunk=16,
    conv_ffn_hidden_size=10,
    byte_attention_window=6,
    byte_attention_head_dim=4,
)


def tiny_config(mixer: ByteMixer, mode: DechunkMode = DechunkMode.HARD) -> ByteSideConfig:
    return replace(TINY, byte_mixer=mixer, dechunk_mode=mode)


@dataclass(frozen=True)
class Row:
    """Bytes and bits of documents packed one behind the other."""

    byte_ids: Tensor
    bits: Tensor
    cu_seqlens: Tensor

    def document(self, index: int) -> Row:
        first, last = self.cu_seqlens[index : index + 2].tolist()
        return Row(self.byte_ids[first:last], self.bits[first:last], torch.tensor([0, last - first], dtype=torch.int32))


def random_row(*lengths: int) -> Row:
    """Documents of these many bytes, BOS included; random bits with ends at BOS and at each last byte."""
    cu_seqlens = torch.tensor((0, *lengths)).cumsum(0).to(torch.int32)
    byte_ids = torch.randint(0, 250, (sum(lengths),))
    byte_ids[cu_seqlens[:-1].long()] = BOS_BYTE
    bits = (torch.rand(sum(lengths)) < 0.3) | (byte_ids == BOS_BYTE)
    bits[cu_seqlens[1:].long() - 1] = True
    return Row(byte_ids, bits, cu_seqlens)


class ByteSide(nn.Module):
    """Encoder, router and decoder around a backbone that is one causal running mean per segment."""

    def __init__(self, config: ByteSideConfig) -> None:
        super().__init__()
        self.encoder, self.router, self.decoder = ByteEncoder(config), Router(config), ByteDecoder(config)
        nn.init.normal_(self.decoder.residual.get_parameter("weight"), std=0.3)

    def forward(self, row: Row, bucket: int = 4) -> Tensor:
        r = self.encoder(row.byte_ids, row.cu_seqlens)
        p = self.router(r, row.cu_seqlens)
        layout = chunk_layout(row.bits, row.cu_seqlens, bucket)
        h = running_mean(pool_chunks(r, layout), layout.cu_chunks)
        logits: Tensor = self.decoder(h, r, p, row.byte_ids, layout, row.cu_seqlens, row.bits)
        return logits


def running_mean(chunks: Tensor, cu_chunks: Tensor) -> Tensor:
    """A stand-in backbone: chunk j of a segment becomes the mean of the segment's chunks 0 … j."""
    parts = []
    for first, last in zip(cu_chunks[:-1].tolist(), cu_chunks[1:].tolist(), strict=True):
        counts = torch.arange(1, last - first + 1, dtype=chunks.dtype)
        parts.append(chunks[first:last].cumsum(0) / counts[:, None])
    return torch.cat(parts)
