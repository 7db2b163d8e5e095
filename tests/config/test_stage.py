"""What follows from a stage's settings: floors, warm-up, accumulation."""

from __future__ import annotations

import pytest

from megabyte_distill.config import ParallelConfig, StageConfig


def test_the_floor_is_given_absolutely_or_as_a_share() -> None:
    assert StageConfig(lr=2e-3, min_lr=1e-3).floor_ratio == 0.5
    assert StageConfig(lr=2e-3, min_lr_ratio=0.1).floor_ratio == 0.1
    assert StageConfig(lr=2e-3).floor_ratio == 0.0
    assert StageConfig(lr=0.0, min_lr=0.0).floor_ratio == 0.0


def test_warm_up_is_given_in_updates_or_as_a_share() -> None:
    assert StageConfig(train_iters=50, lr_warmup_fraction=0.1).warmup_iterations == 5
    assert StageConfig(train_iters=50, lr_warmup_iters=7).warmup_iterations == 7
    assert StageConfig(train_iters=50).warmup_iterations == 0


def test_the_backbone_follows_lr_unless_told() -> None:
    assert StageConfig(lr=0.5).backbone_peak_lr == 0.5
    assert StageConfig(lr=0.5, backbone_lr=0.0).backbone_peak_lr == 0.0


def test_micro_batches_make_up_the_global_batch() -> None:
    assert StageConfig(global_batch_size=256, micro_batch_size=2).micro_batches(8) == 16
    with pytest.raises(ValueError, match="not a multiple"):
        StageConfig(global_batch_size=4, micro_batch_size=4).micro_batches(2)


def test_model_parallel_groups_divide_the_world() -> None:
    assert ParallelConfig().data_parallel_size(6) == 6
    assert ParallelConfig(tensor_model_parallel_size=2, pipeline_model_parallel_size=2).data_parallel_size(8) == 2
    with pytest.raises(ValueError, match="start a multiple of 4 ranks"):
        ParallelConfig(tensor_model_parallel_size=4).data_parallel_size(6)
