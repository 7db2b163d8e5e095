"""One micro-batch's way through the pipeline, seen from one stage; with one stage there is nothing to send.

Between stages go, in this order (parallel/payload.py packs them)::

    p        [P] fp32             where the decoder, the boundaries or a loss read the router's probabilities
    r        [P / C, E]           where the decoder runs: its residual
    teacher  [M_gold / C, 1, E]   where a teacher runs beside the student
    hidden   [M / C, 1, E]        the backbone's state

C is the number of tensor-parallel ranks under sequence parallelism, else 1: each rank sends its own part. Boundaries
do not travel: every stage makes them from the row or from p, which arrives with all its bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from megatron.core import tensor_parallel
from torch import Tensor

from megabyte_distill.data.packing import PackedRow
from megabyte_distill.model.student import Carried, StudentOutputs
from megabyte_distill.parallel.payload import Part, pack, touch, unpack


@dataclass(slots=True, kw_only=True)
class StageLink:
    """What arrived at this stage, and what it hands on."""

    is_first: bool = True
    is_last: bool = True
    received: Tensor | None = None
    """The payload of the stage before."""
    gradient_arrives: bool = True
    """Whether anything trains on the stages before; where nothing does, no gradient is computed for them."""
    dtype: torch.dtype = torch.float32
    """Of payloads and of the states in them."""
    cut: int = 1
    """C above."""
    sent: Tensor | None = None
    """The payload for the stage behind."""

    @property
    def is_whole(self) -> bool:
        """True without pipeline stages."""
        return self.is_first and self.is_last

    def receive(self, row: PackedRow, width: int, carried: Carried) -> tuple[StudentOutputs | None, Tensor | None]:
        """(what the student computed so far, the teacher's state); (None, None) on the first stage.

        ValueError where what arrived is not of this row.
        """
        if self.is_first:
            return None, None
        size = row.byte_ids.shape[0]
        parts: dict[str, Part] = {}
        if carried.p:
            parts["p"] = Part((size,), torch.float32)
        if carried.r:
            parts["r"] = Part((size // self.cut, width), self.dtype)
        if carried.teacher:
            parts["teacher"] = Part((row.tokens.shape[0] // self.cut, 1, width), self.dtype)
        payload = self._payload()
        rest = payload.numel() - sum(part.elements(payload.dtype) for part in parts.values())
        parts["hidden"] = Part((max(rest, 0) // width, 1, width), self.dtype)
        pieces = dict(zip(parts, unpack(payload, list(parts.values())), strict=True))
        teacher = pieces.pop("teacher", None)
        outputs = StudentOutputs(p=pieces.get("p"), r=pieces.get("r"), hidden=pieces["hidden"])
        if self.is_last and self.cut > 1 and outputs.r is not None:
            whole = tensor_parallel.gather_from_sequence_parallel_region(outputs.r, tensor_parallel_output_grad=False)
            outputs = replace(outputs, r=whole)
        return outputs, teacher

    def send(
        self, outputs: StudentOutputs, teacher: Tensor | None, carried: Carried, idle: Tensor | None = None
    ) -> None:
        """Hand this stage's results on. ``idle``: a parameter that trains but that nothing here reads."""
        parts: list[Tensor] = []
        if carried.p:
            assert outputs.p is not None
            parts.append(outputs.p)
        if carried.r:
            r = outputs.r
            assert r is not None
            if self.is_first and self.cut > 1:
                r = tensor_parallel.scatter_to_sequence_parallel_region(r)
            parts.append(r)
        if teacher is not None:
            parts.append(teacher)
        assert outputs.hidden is not None
        self.sent = pack([*parts, outputs.hidden], self.dtype, self._anchor(idle))

    def receive_total(self) -> Tensor:
        """A loss, fp32 scalar, that the first stage computed."""
        (total,) = unpack(self._payload(), [Part((), torch.float32)])
        return total.clone()  # no view: the schedule frees what a stage returns

    def pass_on(self, total: Tensor) -> Tensor:
        """The payload of a loss that is complete already."""
        return pack([total.float()], self.dtype, self._anchor(None))

    def closed(self, total: Tensor) -> Tensor:
        """The last stage's loss, whose backward reaches the stage before even where nothing trains there."""
        anchor = self._anchor(None)
        return total if anchor is None else total + anchor

    def _payload(self) -> Tensor:
        assert self.received is not None, "nothing arrived at this pipeline stage"
        return self.received if self.gradient_arrives else self.received.detach()

    def _anchor(self, idle: Tensor | None) -> Tensor | None:
        if self.received is None:
            return None if idle is None else touch(idle)
        is_awaited = self.received.requires_grad and not self.gradient_arrives
        return touch(self.received) if is_awaited else None
