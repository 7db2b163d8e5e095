"""What pipeline stages must agree on, for ``--check-invariants``: rows, boundaries, both copies of a tied table."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megabyte_distill.model.student import Student
from megabyte_distill.parallel.pipeline import pipeline_size
from megabyte_distill.training.fingerprints import fingerprints

_PRIME = 1_000_003


class StagesAgree:
    """Remembers what this stage has seen since it was last called; called, compares it along the pipeline.

    Each forward adds to a checksum of bytes and boundaries in the order of micro-batches, without a host sync.
    """

    def __init__(self, student: Student) -> None:
        self._student = student
        self._seen: Tensor | None = None
        student.register_forward_hook(self._remember, with_kwargs=True)

    def _remember(self, module: Any, arguments: Any, options: Any, outputs: Any) -> None:
        row, bits = arguments[0], outputs.bits
        if bits is None:
            return
        places = torch.arange(1, bits.shape[0] + 1, device=bits.device)
        now = torch.stack([(places * bits % _PRIME).sum(), (places * row.byte_ids % _PRIME).sum()])
        self._seen = now if self._seen is None else (self._seen * 31 + now) % (_PRIME * _PRIME)

    def __call__(self) -> list[str]:
        """What differs, each in a line; collective over the pipeline."""
        if pipeline_size() == 1:
            return []
        seen = None if self._seen is None else self._seen.tolist()
        self._seen = None
        tied = self._student.shared_embedding_or_output_weight()
        table = None if tied is None else fingerprints([tied], tied.device).tolist()
        group = parallel_state.get_pipeline_model_parallel_group()
        ranks = dist.get_process_group_ranks(group)
        found: list[Any] = [None] * len(ranks)
        dist.all_gather_object(found, (seen, table), group=group)
        checksums = {rank: one[0] for rank, one in zip(ranks, found, strict=True)}
        tables = {rank: one[1] for rank, one in zip(ranks, found, strict=True) if one[1] is not None}
        return [
            *_differing(checksums, "bytes and boundaries of a micro-batch differ"),
            *_differing(tables, "the copies of the tied token embedding differ"),
        ]


def _differing(of_ranks: dict[int, Any], what: str) -> list[str]:
    values = list(of_ranks.values())
    if all(value == values[0] for value in values[1:]):
        return []
    return [f"{what} between pipeline stages, ranks {', '.join(map(str, of_ranks))}"]
