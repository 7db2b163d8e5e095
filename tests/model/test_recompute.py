"""Recomputation changes what is kept for the backward pass, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from megabyte_distill.config import parse_arguments
from megabyte_distill.config.model import BackboneConfig, ByteMixer, QkNorm
from megabyte_distill.model.backbone import Backbone, transformer_config
from megabyte_distill.model.byte_stack import recompute_byte_mixers
from megabyte_distill.model.student import Student
from megabyte_distill.objectives.joint_ce import joint_nll
from megabyte_distill.parallel.process_groups import World
from tests.tiny_student import (
    BACKBONE,
    BYTE_SIDE,
    assert_same,
    enlarged,
    gradients,
    random_rows,
    tiny_student,
    world,
)

__all__ = ["world"]
FOUR_LAYERS = replace(BACKBONE, num_layers=4)
OLMO = replace(FOUR_LAYERS, family="olmo2", qk_norm=QkNorm.FULL, post_norm=True)
FULL = "--recompute-granularity full"
SELECTIVE = "--recompute-granularity selective --recompute-modules"


@contextmanager
def bytes_kept(module: nn.Module) -> Iterator[list[int]]:
    """One number at the end: bytes of the tensors that autograd saves, weights aside."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}
    total: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield total
    total.append(sum(storage.nbytes() for storage in kept.values()))


def student_with(flags: str, backbone: BackboneConfig) -> Student:
    fields = parse_arguments(["--mock-data", *flags.split()]).stages["2b"].recompute_fields
    torch.manual_seed(1)
    student = Student(BYTE_SIDE, Backbone(backbone, transformer_config(backbone, **fields)))
    return enlarged(student)


def loss_and_kept(student: Student) -> tuple[dict[str, Tensor], Tensor, int]:
    """Gradients, the loss, and what its backward kept."""
    (row,) = random_rows(1, row_bytes=256, seed=5)
    losses: list[Tensor] = []
    kept: list[int] = []

    def loss() -> Tensor:
        with bytes_kept(student) as total:
            logits = student(row).logits
            losses.append(joint_nll(logits, row)[row.is_real].sum())
        kept.extend(total)
        return losses[0]

    return gradients(student, loss), losses[0].detach(), kept[0]


@pytest.mark.parametrize("backbone", [FOUR_LAYERS, OLMO], ids=["llama", "olmo2"])
@pytest.mark.parametrize(
    "flags",
    [
        FULL,
        f"{FULL} --recompute-num-layers 2",
        f"{FULL} --recompute-method block --recompute-num-layers 3",
        f"{SELECTIVE} mlp",
        f"{SELECTIVE} core_attn",
        f"{SELECTIVE} core_attn,mlp",
    ],
)
def test_losses_and_gradients_are_equal_and_less_is_kept(world: World, flags: str, backbone: BackboneConfig) -> None:
    wanted, loss, kept = loss_and_kept(student_with("", backbone))
    got, recomputed, fewer = loss_and_kept(student_with(flags, backbone))
    torch.testing.assert_close(recomputed, loss, rtol=0, atol=0)
    assert_same(got, wanted, rtol=0, atol=0)
    assert fewer < kept


@pytest.mark.parametrize("mixer", ByteMixer)
def test_byte_mixers_recompute_alike_and_keep_less(world: World, mixer: ByteMixer) -> None:
    torch.manual_seed(2)
    student = tiny_student(mixer)
    wanted, loss, kept = loss_and_kept(student)
    recompute_byte_mixers(student)
    got, recomputed, fewer = loss_and_kept(student)
    torch.testing.assert_close(recomputed, loss, rtol=0, atol=0)
    assert_same(got, wanted, rtol=0, atol=0)
    assert fewer < kept


def test_groups_that_do_not_divide_the_layers_are_refused(world: World) -> None:
    with pytest.raises(ValueError, match="--recompute-num-layers 3 does not divide the 4 layers"):
        student_with(f"{FULL} --recompute-num-layers 3", FOUR_LAYERS)
