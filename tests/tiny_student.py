"""A whole student around a two-layer megatron backbone, rows of random documents, and a world of one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from megabyte_distill.alphabet import PAD_BYTE
from megabyte_distill.config.model import (
    Activation,
    BackboneConfig,
    ByteMixer,
    ByteSideConfig,
    ChunkPooling,
    DechunkMode,
    QkNorm,
    RopeScaling,
    RouterKind,
)
from megabyte_distill.data.mock import MockDataset
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.data.sampler import RowStream
from megabyte_distill.model.backbone import Backbone, transformer_config
from megabyte_distill.model.student import Student
from megabyte_distill.parallel.process_groups import World
from megabyte_distill.parallel.process_groups import world as process_groups

ModuleT = TypeVar("ModuleT", bound=nn.Module)
VOCAB_SIZE = 90
BYTE_SIDE = ByteSideConfig(
    backbone_width=32,
    byte_width=12,
    encoder_layers=2,
    decoder_layers=2,
    encoder_ffn_hidden_size=14,
    decoder_ffn_hidden_size=14,
    router_hidden_size=10,
    mamba_state_dim=4,
    mamba_head_dim=6,
    mamba_scan_chunk=16,
    conv_ffn_hidden_size=10,
    byte_attention_window=7,
    byte_attention_head_dim=6,
)
BACKBONE = BackboneConfig(
    family="llama",
    num_layers=2,
    hidden_size=32,
    ffn_hidden_size=24,
    num_attention_heads=4,
    num_query_groups=2,
    head_dim=8,
    vocab_size=VOCAB_SIZE,
    norm_eps=1e-5,
    rope_theta=1e4,
)
YARN = {
    "factor": 4.0, "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.2,
    "original_max_position_embeddings": 16.0, "truncate": 1.0,
}  # fmt: skip
_GEMMA: dict[str, Any] = {
    "activation": Activation.GELU_TANH, "zero_centred_norms": True, "scaled_embeddings": True, "tied_embeddings": True,
}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"family": "qwen2", "qkv_bias": True, "tied_embeddings": True},
    "qwen3": {"family": "qwen3", "qk_norm": QkNorm.HEAD},
    "olmo2": {"family": "olmo2", "qk_norm": QkNorm.FULL, "post_norm": True},
    "olmo3": {
        "family": "olmo3", "qk_norm": QkNorm.FULL, "post_norm": True, "sliding_window": 5, "sliding_layers": (0,),
        "rope_scaling": YARN, "rope_scaling_kind": RopeScaling.YARN,
    },
    "gemma": {"family": "gemma", **_GEMMA},
    "gemma3": {
        "family": "gemma3", **_GEMMA, "qk_norm": QkNorm.HEAD, "query_pre_attn_scalar": 3, "sandwich_norm": True,
        "sliding_window": 5, "sliding_layers": (0,), "sliding_rope_theta": 50.0,
        "rope_scaling": {"factor": 8.0}, "rope_scaling_kind": RopeScaling.LINEAR,
    },
}  # fmt: skip
"""What each kind of layers has over :data:`BACKBONE`: wherever layers are computed, a test goes through all of them."""


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """Process groups of one process, taken down at the end of the module."""
    with process_groups() as current:
        yield current


def tiny_backbone(**fields: object) -> Backbone:
    """Weights of a size that makes every part of it matter."""
    config = replace(BACKBONE, **fields)  # type: ignore[arg-type]
    return enlarged(Backbone(config, transformer_config(config)))


def tiny_student(
    mixer: ByteMixer = ByteMixer.CONV,
    mode: DechunkMode = DechunkMode.HARD,
    *,
    tied: bool = False,
    pooling: ChunkPooling = ChunkPooling.LAST,
    ngrams: tuple[int, ...] = (),
    router: RouterKind = RouterKind.OFFICIAL,
    byte_window: int = BYTE_SIDE.byte_attention_window,
) -> Student:
    config = replace(
        BYTE_SIDE,
        byte_mixer=mixer,
        dechunk_mode=mode,
        chunk_pooling=pooling,
        byte_ngram_tables=ngrams,
        byte_ngram_rows=50,
        router=router,
        byte_attention_window=byte_window,
    )
    student = Student(config, tiny_backbone(tied_embeddings=tied))
    if student.byte_encoder.ngram_table is not None:
        nn.init.normal_(student.byte_encoder.ngram_table)
    nn.init.normal_(student.byte_decoder.residual.get_parameter("weight"), std=0.2)
    return student


def enlarged(module: ModuleT) -> ModuleT:
    """Matrices drawn wider and norms away from one: megatron's initialisation is small beside these widths."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
        else:
            nn.init.uniform_(parameter, 0.5, 1.5)
    for part in module.modules():
        if getattr(part, "zero_centred", False):
            part.get_parameter("weight").data.sub_(1)
    return module


def random_rows(
    count: int,
    *,
    row_bytes: int = 64,
    bucket: int = 8,
    max_tokens: int = 20,
    seed: int = 0,
    vocab_size: int = VOCAB_SIZE,
    marked: bool = False,
) -> list[PackedRow]:
    """Rows of several documents each, some cut, some empty, most with an unused end; with a loss mask if ``marked``."""
    source = MockDataset(vocab_size, seed=seed, max_tokens=max_tokens)
    stream = RowStream([source], row_bytes=row_bytes, chunk_bucket=bucket, seed=seed, reads_loss_mask=marked)
    return [stream.materialize(plan) for plan in stream.next_rows(count)]


def padded_row(seed: int = 0) -> PackedRow:
    """A row with at least three documents, unused bytes and padding chunks."""
    for row in random_rows(100, seed=seed):
        if len(row.documents) > 2 and int((~row.is_real).sum()) > 2 and int((~row.token_mask).sum()) > 1:
            return row
    raise AssertionError("no such row among a hundred")


def segment_alone(row: PackedRow, index: int) -> PackedRow:
    """One real segment as a row of its own, nothing padded."""
    start, stop = row.cu_seqlens[index : index + 2].tolist()
    first, last = row.cu_chunks[index : index + 2].tolist()
    of_bytes = {name: getattr(row, name)[start:stop] for name in ("byte_ids", "bits", "labels", "is_real")}
    names = ("tokens", "token_labels", "token_mask", "token_ends_document")
    return PackedRow(
        **of_bytes,
        **{name: getattr(row, name)[first:last] for name in names},
        cu_seqlens=torch.tensor([0, stop - start], dtype=torch.int32),
        cu_chunks=torch.tensor([0, last - first], dtype=torch.int32),
        chunk_bucket=1,
        documents=row.documents[index : index + 1],
    )


def segments_alone(row: PackedRow) -> list[PackedRow]:
    return [segment_alone(row, index) for index in range(len(row.documents))]


def with_other_padding(row: PackedRow) -> PackedRow:
    """The same text; what stands on unused bytes, in their labels and on padding chunks is something else."""
    tokens = torch.where(row.token_mask, row.tokens, VOCAB_SIZE - 1)
    token_labels = torch.where(row.token_mask, row.token_labels, VOCAB_SIZE - 2)
    byte_ids = torch.where(row.is_real, row.byte_ids, torch.arange(row.byte_ids.shape[0]) % 97)
    labels = torch.where(row.is_real, row.labels, 511)
    assert (row.byte_ids == PAD_BYTE).any() and not (byte_ids == PAD_BYTE).any()
    return replace(row, byte_ids=byte_ids, labels=labels, tokens=tokens, token_labels=token_labels)


def gradients(module: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Gradient of a scalar for every parameter that gets one, by name."""
    module.zero_grad()
    loss().backward()
    return {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: float) -> None:
    """Equal names, equal tensors."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)
