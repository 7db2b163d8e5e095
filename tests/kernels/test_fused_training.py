"""Training with the fused kernels is training: every stage's losses and gradients, and a small curriculum's losses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from megabyte_distill.config.model import ChunkPooling, DechunkMode
from megabyte_distill.config.stage import CHOOSES_TARGETS, BoundarySource, ByteTargets, StageConfig
from megabyte_distill.curriculum.stages import STAGES
from megabyte_distill.data.mock import MockDataset
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.kernels import dispatch
from megabyte_distill.kernels.fused import FUSED_OPS
from megabyte_distill.kernels.library import Library, calls
from megabyte_distill.model.student import Student
from tests.pretrain.conftest import job
from tests.pretrain.job import Job, metrics
from tests.tiny_student import BYTE_SIDE, VOCAB_SIZE, gradients, random_rows, tiny_backbone, world

__all__ = ["job", "world"]

TABLE = MockDataset(VOCAB_SIZE, seed=0).table
VARIANTS: dict[str, dict[str, object]] = {
    "plain": {},
    "official": {"dechunk_mode": DechunkMode.OFFICIAL},
    "all": {
        "dechunk_mode": DechunkMode.CAUSAL,
        "chunk_pooling": ChunkPooling.MEAN_LAST,
        "byte_ngram_tables": (2, 3, 5),
        "byte_ngram_rows": 40,
    },
    "max": {"chunk_pooling": ChunkPooling.MAX},
}
OF_STAGE = {
    "1a": {"chunk_index", "chunk_pool_forward"},
    "1b": {"chunk_index", "chunk_pool_forward"},
    "1c": {"routing_forward", "boundary_bits"},
    "2a": {"chunk_index", "chunk_pool_forward", "dechunk_forward", "joint_cross_entropy_forward"},
    "2b": {"routing_forward", "chunk_index", "dechunk_forward", "joint_cross_entropy_forward"},
    "3a": {"routing_forward", "chunk_index", "dechunk_forward", "joint_cross_entropy_forward"},
}
"""Kernels that must have run, beside the embedding's."""


@pytest.fixture
def switch(cpu_library: Library) -> Iterator[Callable[[bool], None]]:
    """Puts the fused operators in place, or takes them away."""

    def put(fused: bool) -> None:
        dispatch.install(FUSED_OPS if fused else {}, device="cpu", strict=True)

    yield put
    dispatch.install({})


def student_of(variant: str) -> Student:
    """Widths that the kernels take; every part of it matters."""
    config = replace(BYTE_SIDE, byte_width=16, mamba_head_dim=8, **VARIANTS[variant])  # type: ignore[arg-type]
    student = Student(config, tiny_backbone())
    nn.init.normal_(student.byte_decoder.residual.get_parameter("weight"), std=0.2)
    if student.byte_encoder.ngram_table is not None:
        nn.init.normal_(student.byte_encoder.ngram_table)
    return student


def losses_and_gradients(name: str, variant: str, row: PackedRow) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    torch.manual_seed(5)
    student = student_of(variant).train()
    targets = ByteTargets.MIXED if name in CHOOSES_TARGETS else ByteTargets.HARD
    config = replace(StageConfig(), boundary_source=BoundarySource.ROUTER, byte_targets=targets)
    objective = STAGES[name].objective(config, tiny_backbone().requires_grad_(False), TABLE)
    losses = objective.losses(student, row)
    found = {loss: float(value) for loss, value in losses.items()}
    total = torch.stack([objective.weights[loss] * value for loss, value in losses.items()]).sum()
    return found, gradients(student, lambda: total)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", STAGES)
def test_a_stage_has_one_loss_and_gradient_with_either(
    world: object, switch: Callable[[bool], None], name: str, variant: str
) -> None:
    row = random_rows(1, row_bytes=120)[0]
    switch(False)
    expected, wanted = losses_and_gradients(name, variant, row)
    switch(True)
    calls.clear()
    found, got = losses_and_gradients(name, variant, row)
    embedding = "ngram_embedding_forward" if VARIANTS[variant].get("byte_ngram_tables") else "byte_embedding_stream"
    assert {embedding, *OF_STAGE[name]} <= calls.keys()
    assert found == pytest.approx(expected, rel=1e-5)
    assert got.keys() == wanted.keys()
    largest = max(float(grad.abs().max()) for grad in wanted.values())
    for parameter, grad in wanted.items():
        torch.testing.assert_close(
            got[parameter], grad, rtol=1e-3, atol=1e-5 * largest, msg=lambda text, at=parameter: f"{at}: {text}"
        )


def test_the_losses_of_a_curriculum_are_the_same(job: Job, cpu_library: Library, tmp_path: Path) -> None:
    reference, fused = tmp_path / "reference", tmp_path / "fused"
    assert job.run(reference, "--kernels", "reference") == 0
    calls.clear()
    assert job.run(fused, "--kernels", "fused") == 0
    dispatch.install({})
    assert {"routing_backward", "dechunk_backward", "joint_cross_entropy_backward"} <= calls.keys()
    expected, found = metrics(reference), metrics(fused)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key
