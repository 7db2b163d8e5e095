"""What pipeline stages must agree on, for ``--check-invariants``: rows, boundaries, both copies of a tied table."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from megabyte_distill.model.student import Student
from megabyte_distill.parallel.pipeline import pipeline_size, virtual_stages
from megabyte_distill.training.fingerprints import fingerprints

_PRIME = 1_000_003


class StagesAgree:
    """Remembers what this stage has seen since it was last called; called, compares it along the pipeline.

    Each forward adds to a checksum of bytes and boundaries in the order of micro-batches, without a host sync.
    """

    def __init__(self, model: nn.Module) -> None:
        """``model``: a student, or its virtual stages."""
        self._parts: list[Student] = virtual_stages(model)
        self._seen: dict[nn.Module, Tensor] = {}
        for part in self._parts:
            part.register_forward_hook(self._remember, with_kwargs=True)

    def _remember(self, part: nn.Module, arguments: Any, options: Any, outputs: Any) -> None:
        row, bits = arguments[0], outputs.bits
        if bits is None:
            return
        places = torch.arange(1, bits.shape[0] + 1, device=bits.device)
        now = torch.stack([(places * bits % _PRIME).sum(), (places * row.byte_ids % _PRIME).sum()])
        before = self._seen.get(part)
        self._seen[part] = now if before is None else (before * 31 + now) % (_PRIME * _PRIME)

    def __call__(self) -> list[str]:
        """What differs, each in a line; collective over the pipeline."""
        if pipeline_size() == 1:
            return []
        seen = [self._seen[part].tolist() if part in self._seen else None for part in self._parts]
        self._seen.clear()
        tied = [w for part in self._parts if (w := part.shared_embedding_or_output_weight()) is not None]
        table = fingerprints(tied, tied[0].device).tolist() if tied else []
        group = parallel_state.get_pipeline_model_parallel_group()
        ranks = dist.get_process_group_ranks(group)
        found: list[Any] = [None] * len(ranks)
        dist.all_gather_object(found, (seen, table), group=group)
        checksums = {rank: one[0] for rank, one in zip(ranks, found, strict=True)}
        tables = {rank: one[1] for rank, one in zip(ranks, found, strict=True) if one[1]}
        return [
            *_differing(checksums, "bytes and boundaries of a micro-batch differ"),
            *_differing(tables, "the copies of the tied token embedding differ"),
        ]


def _differing(of_ranks: dict[int, list[Any]], what: str) -> list[str]:
    values = [value for of_rank in of_ranks.values() for value in of_rank]
    if all(value == values[0] for value in values[1:]):
        return []
    return [f"{what} between pipeline stages, ranks {', '.join(map(str, of_ranks))}"]
