"""Chunk counts are padded once, where chunks are made: every rank's rows divide, and padding reaches no loss."""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megabyte_distill.config.engine import EngineConfig, Fp8Format, Fp8Recipe
from megabyte_distill.config.stage import StageConfig
from megabyte_distill.curriculum.stages import STAGES
from megabyte_distill.data.micro_batch import concatenate_rows
from megabyte_distill.data.packing import PackedRow, Segment, pack_row
from megabyte_distill.model.backbone import Backbone
from megabyte_distill.model.chunking import chunk_layout
from megabyte_distill.model.student import Student
from tests.tiny_student import VOCAB_SIZE, tiny_backbone, tiny_student

pytestmark = pytest.mark.usefixtures("world")

RECIPES = st.sampled_from(Fp8Recipe)
TENSOR_SIZES = st.sampled_from([1, 2, 4, 8])
DOCUMENTS = st.lists(st.lists(st.integers(1, 4), max_size=6), min_size=1, max_size=5)
"""Documents of tokens, by the tokens' lengths in bytes."""


def bucket_of(recipe: Fp8Recipe, tensor: int, times: int) -> int:
    """A bucket that validation takes under sequence parallelism over ``tensor`` ranks."""
    return EngineConfig(fp8_format=Fp8Format.HYBRID, fp8_recipe=recipe).chunk_multiple * tensor * times


def packed(documents: list[list[int]], *, spare: int, bucket: int) -> PackedRow:
    segments = [
        Segment(
            document=number,
            byte_ids=np.full(sum(lengths), 65 + number, dtype=np.uint8),
            tokens=np.arange(3, 3 + len(lengths)),
            token_lengths=np.array(lengths, dtype=np.int32),
            next_byte=None,
            next_token=None,
            next_token_length=None,
        )
        for number, lengths in enumerate(documents)
    ]
    size = sum(1 + sum(lengths) for lengths in documents) + spare
    return pack_row(segments, row_bytes=size, chunk_bucket=bucket, start_id=1, end_of_text_id=2)


def assert_padded(cu_chunks: Tensor, chunks: int, real: int, *, tensor: int, multiple: int) -> None:
    """``chunks`` rows of products, ``real`` of them chunks: divided over ranks each has a multiple of ``multiple``."""
    offsets = cu_chunks.tolist()
    assert chunks % tensor == 0 and (chunks // tensor) % multiple == 0
    assert offsets[0] == 0 and offsets[-1] == chunks and all(a <= b for a, b in pairwise(offsets))
    # no segment holds chunks and padding, and what pads is one segment at the end
    assert real in offsets
    assert [a for a in offsets if a > real] == ([chunks] if chunks > real else [])


@given(
    bits=st.lists(st.booleans(), min_size=1, max_size=200),
    cuts=st.sets(st.integers(1, 199)),
    recipe=RECIPES,
    tensor=TENSOR_SIZES,
    times=st.integers(1, 3),
)
def test_any_bits_give_rows_that_every_rank_can_multiply(
    bits: list[bool], cuts: set[int], recipe: Fp8Recipe, tensor: int, times: int
) -> None:
    cu_seqlens = torch.tensor([0, *sorted(cut for cut in cuts if cut < len(bits)), len(bits)], dtype=torch.int32)
    given_bits = torch.tensor(bits)
    layout = chunk_layout(given_bits, cu_seqlens, bucket_of(recipe, tensor, times))
    multiple = bucket_of(recipe, 1, 1)
    assert_padded(layout.cu_chunks, layout.ends.shape[0], sum(bits), tensor=tensor, multiple=multiple)
    # no byte reads a padding chunk
    assert int(layout.chunk_of_byte.max()) < max(1, sum(bits))


@given(documents=DOCUMENTS, spare=st.integers(0, 3), recipe=RECIPES, tensor=TENSOR_SIZES, rows=st.integers(1, 3))
def test_gold_rows_and_joined_rows_divide_and_count_no_padding(
    documents: list[list[int]], spare: int, recipe: Fp8Recipe, tensor: int, rows: int
) -> None:
    bucket, plain = bucket_of(recipe, tensor, 1), packed(documents, spare=spare, bucket=1)
    row = concatenate_rows([packed(documents, spare=spare, bucket=bucket)] * rows)
    real = int(row.bits.sum())
    multiple = bucket_of(recipe, 1, 1)
    assert_padded(row.cu_chunks, row.tokens.shape[0], real, tensor=tensor, multiple=multiple)
    layout = chunk_layout(row.bits, row.cu_seqlens, bucket)
    assert torch.equal(layout.cu_chunks.unique(), row.cu_chunks.unique())
    assert not bool(row.token_mask[real:].any()) and not bool(row.token_ends_document[real:].any())
    for stage in STAGES.values():
        objective = stage.objective(StageConfig(), cast("Backbone", shared_student().backbone), None)
        alone = objective.counts(plain)
        assert objective.counts(row) == {name: rows * count for name, count in alone.items()}, stage.name


@functools.cache
def shared_student() -> Student:
    """Of every example; made when the process groups are up."""
    return tiny_student().double()


@settings(max_examples=10, deadline=None)
@given(documents=DOCUMENTS, spare=st.integers(0, 3), recipe=RECIPES, tensor=st.sampled_from([1, 2]))
def test_padding_reaches_no_loss_and_no_gradient(
    documents: list[list[int]], spare: int, recipe: Fp8Recipe, tensor: int
) -> None:
    student, teacher = shared_student(), tiny_backbone().requires_grad_(False).double()
    plain = packed(documents, spare=spare, bucket=1)
    row = packed(documents, spare=spare, bucket=bucket_of(recipe, tensor, 1))
    padding = ~row.token_mask
    # were a padding chunk read anywhere, this would show
    row.tokens[padding], row.token_labels[padding] = VOCAB_SIZE - 1, VOCAB_SIZE - 2
    for stage in STAGES.values():
        objective = stage.objective(StageConfig(), teacher, None)
        values, slopes = [], []
        for each in (plain, row):
            student.zero_grad()
            found = objective.losses(student, each)
            sum(found.values()).backward()  # type: ignore[union-attr]
            values.append({name: loss.detach() for name, loss in found.items()})
            slopes.append({n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None})
        for name, loss in values[0].items():
            torch.testing.assert_close(values[1][name], loss, rtol=1e-5, atol=1e-5, msg=f"{stage.name}: {name}")
        assert slopes[0].keys() == slopes[1].keys()
        for name, slope in slopes[0].items():
            torch.testing.assert_close(slopes[1][name], slope, rtol=1e-4, atol=1e-5, msg=f"{stage.name}: {name}")
