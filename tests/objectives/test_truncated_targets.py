"""Targets that were stored and made whole again, against the exact ones."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megabyte_distill.alphabet import JOINT_CLASSES
from megabyte_distill.data.micro_batch import concatenate_rows
from megabyte_distill.data.stored_targets import StoredTargets
from megabyte_distill.objectives.byte_tree import ByteTree
from megabyte_distill.objectives.truncated_targets import restored, truncated
from tests.objectives.test_exact_targets import TABLE, TEXT, brute_force, row_of, some_logits, targets_of

TREE = ByteTree.of(TABLE)


@pytest.mark.parametrize("scale", [1.0, 6.0])
def test_all_pairs_are_kept_to_fp16(scale: float) -> None:
    row = row_of(TEXT)
    exact = targets_of(row, some_logits(row, scale)).distribution
    stored = truncated(exact, JOINT_CLASSES)
    assert int(stored.counts[~row.is_real].sum()) == 0
    assert float(stored.tail.max()) < 1e-6  # pairs below fp16's smallest number, 6e-8
    found = restored(TREE, replace(row, stored=stored))
    torch.testing.assert_close(found, exact, rtol=1e-3, atol=1e-7)
    assert float((found[row.is_real].sum(-1) - 1).abs().max()) < 1e-6


def test_what_is_left_out_goes_to_the_pairs_that_tokens_allow() -> None:
    row = row_of(TEXT)
    logits = some_logits(row, 1.0)
    exact = targets_of(row, logits).distribution
    stored = truncated(exact, 2)
    assert int(stored.counts.max()) == 2 and float(stored.tail[0]) > 0.1
    found = restored(TREE, replace(row, stored=stored))
    assert float((found[row.is_real].sum(-1) - 1).abs().max()) < 1e-6
    assert torch.equal(found > 0, exact > 0)  # no impossible pair, and no possible one without mass
    first, possible = brute_force(logits[0], b"").float(), found[0] > 0
    largest = first.topk(2).indices
    torch.testing.assert_close(found[0, largest], first[largest], rtol=1e-3, atol=0)
    rest = possible.clone()
    rest[largest] = False
    equal = (1 - first[largest].sum()) / rest.sum()
    torch.testing.assert_close(found[0, rest], equal.expand(int(rest.sum())), rtol=2e-3, atol=0)


def test_rows_side_by_side_keep_their_targets() -> None:
    rows = []
    for text in (TEXT, [16, 3, 1]):
        row = row_of(text)
        rows.append(replace(row, stored=truncated(targets_of(row, some_logits(row, 2.0)).distribution, 3)))
    joined = concatenate_rows(rows)
    torch.testing.assert_close(restored(TREE, joined), torch.cat([restored(TREE, row) for row in rows]))
    assert concatenate_rows([rows[0], replace(rows[1], stored=None)]).stored is None


def test_a_row_without_targets_says_so() -> None:
    row = row_of(TEXT)
    with pytest.raises(ValueError, match="no stored targets"):
        restored(TREE, row)
    size = row.byte_ids.shape[0]
    assert not restored(TREE, replace(row, stored=StoredTargets.nothing(size))).any()
