"""Exact targets from logits that two ranks share: the whole ones', and no row of logits passes between the ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megabyte_distill.data.mock import worded_table
from megabyte_distill.data.packing import Segment, pack_row
from megabyte_distill.objectives import exact_targets as module
from megabyte_distill.objectives.byte_tree import ByteTree
from megabyte_distill.objectives.exact_targets import ExactTargets, exact_targets
from megabyte_distill.parallel.process_groups import World
from megabyte_distill.parallel.vocabulary import VocabularyColumns
from tests.distributed.ranks import run_ranks

VOCAB_SIZE = 20_000
SHARES = {"halves": (0, 10_000, 20_000), "one rank has all": (0, 20_000, 20_000), "uneven": (0, 137, 20_000)}
"""By name: where each rank's ids begin and end."""


def compare(ranks: World) -> dict[str, Any]:
    table = worded_table(VOCAB_SIZE, specials=20)
    tokens = np.random.default_rng(0).integers(0, VOCAB_SIZE - 20, size=40)
    segment = Segment(
        document=0,
        byte_ids=table.concatenate(tokens),
        tokens=tokens,
        token_lengths=table.lengths[tokens],
        next_byte=None,
        next_token=None,
        next_token_length=None,
    )
    row = pack_row([segment], row_bytes=400, chunk_bucket=8, start_id=0, end_of_text_id=table.end_of_text_id)
    logits = 4.0 * torch.randn(row.tokens.shape[0], VOCAB_SIZE, generator=torch.Generator().manual_seed(1))

    def targets(columns: VocabularyColumns | None) -> ExactTargets:
        def head(states: Tensor) -> Tensor:
            return states if columns is None else states[:, columns.first : columns.first + columns.count]

        return exact_targets(
            ByteTree.of(table, columns), logits, head=head,
            byte_ids=row.byte_ids, bits=row.bits, labels=row.labels, wanted=row.is_real,
        )  # fmt: skip

    module._CPU_BLOCK_ENTRIES = 4 * VOCAB_SIZE  # several blocks: every rank must make the same number of them
    whole = targets(None)
    sent = 0
    reduce = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        nonlocal sent
        sent += tensor.nbytes
        return reduce(tensor, *args, **kwargs)

    def refused(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("something is gathered")

    dist.all_reduce = counted
    dist.all_gather = dist.all_gather_into_tensor = dist._all_gather_base = refused
    answer: dict[str, Any] = {"bytes": int(row.is_real.sum()), "chunks": int(whole.chunks)}
    for name, edges in SHARES.items():
        sent = 0
        first, last = edges[ranks.rank], edges[ranks.rank + 1]
        found = targets(VocabularyColumns(first, last - first, dist.group.WORLD))
        answer[name] = {
            "error": float((found.distribution - whole.distribution).abs().max()),
            "replaced": int(found.replaced) - int(whole.replaced),
            "excluded": float(found.excluded / whole.excluded),
            "sent": sent,
        }
    return answer


def test_ranks_that_share_a_vocabulary_make_the_targets_of_one(tmp_path: Path) -> None:
    for answer in run_ranks(tmp_path, __name__, "compare", tensor_parallel=2):
        assert answer["bytes"] > 150
        for name in SHARES:
            found = answer[name]
            assert found["error"] < 1e-5 and found["replaced"] == 0, (name, found)
            assert found["excluded"] == pytest.approx(1.0, abs=1e-5)
            # a pair of numbers for each continuation of a byte, while a row of logits is 80,000 bytes
            assert 0 < found["sent"] < 0.1 * 4 * VOCAB_SIZE * answer["chunks"], found["sent"]
