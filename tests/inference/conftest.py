"""Process groups and a tiny random student whose distributions are far from uniform."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from megabyte_distill.config.model import BackboneConfig, ByteMixer, ByteSideConfig, ChunkPooling, DechunkMode
from megabyte_distill.data.mock import MockDataset
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.data.sampler import evaluation_rows
from megabyte_distill.kernels import build
from megabyte_distill.model.backbone import Backbone
from megabyte_distill.model.student import Student
from megabyte_distill.parallel.process_groups import world

VOCABULARY = 60


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    with world():
        yield


def tiny_backbone() -> Backbone:
    config = BackboneConfig(
        family="llama",
        num_layers=2,
        hidden_size=32,
        ffn_hidden_size=48,
        num_attention_heads=2,
        num_query_groups=1,
        head_dim=16,
        vocab_size=VOCABULARY,
        norm_eps=1e-5,
        rope_theta=1e4,
        tied_embeddings=True,
    )
    backbone = Backbone(config)
    torch.nn.init.normal_(backbone.embedding.weight, std=0.5)
    return backbone


def tiny_student(
    mode: DechunkMode = DechunkMode.HARD,
    mixer: ByteMixer = ByteMixer.CONV,
    pooling: ChunkPooling = ChunkPooling.LAST,
    **others: Any,
) -> Student:
    config = ByteSideConfig(
        backbone_width=32,
        byte_width=16,
        encoder_layers=2,
        decoder_layers=2,
        byte_mixer=mixer,
        encoder_ffn_hidden_size=24,
        decoder_ffn_hidden_size=24,
        router_hidden_size=24,
        conv_ffn_hidden_size=24,
        mamba_state_dim=8,
        mamba_head_dim=8,
        mamba_scan_chunk=16,
        byte_attention_window=9,
        byte_attention_head_dim=8,
        dechunk_mode=mode,
        chunk_pooling=pooling,
        **others,
    )
    student = Student(config, tiny_backbone()).eval()
    # logits that say something: a margin between classes, and a bit that depends on the past
    torch.nn.init.normal_(student.byte_decoder.head.get_parameter("weight"), std=1.0)
    torch.nn.init.normal_(student.byte_decoder.residual.get_parameter("weight"), std=0.3)
    return student


@pytest.fixture
def student(groups: None) -> Student:
    return tiny_student()


@pytest.fixture
def make_student(groups: None) -> Callable[..., Student]:
    return tiny_student


@pytest.fixture
def teacher(groups: None) -> Backbone:
    return tiny_backbone()


@pytest.fixture(scope="session")
def rows() -> list[PackedRow]:
    """Rows of several documents each, cut ones and padding among them."""
    source = MockDataset(VOCABULARY, seed=3, num_documents=9, max_tokens=60)
    return list(evaluation_rows(source, row_bytes=96, chunk_bucket=8))


HAS_COMPILER = shutil.which("g++") is not None


@pytest.fixture(scope="session")
def step_library_if_any(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The engine's CPU step of these sources, built here and the one that is found; without g++ there is none."""
    path = tmp_path_factory.mktemp("step")
    path = build.build_step(path) if HAS_COMPILER else path / "none.so"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "step_library_path", lambda: path)
        yield


@pytest.fixture
def step_library(step_library_if_any: None) -> None:
    """The same, or a skip."""
    if not HAS_COMPILER:
        pytest.skip("needs g++; run on a machine that has it")
