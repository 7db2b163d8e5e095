"""Where NaN or infinity comes from: an update that had some is run again, micro-batch by micro-batch, and looked at.

The first thing that is not finite is named: a weight, a module's input or output, a loss, or in the backward pass the
gradient that arrives at a module's output or at a parameter. Nothing of this costs anything in an update without any.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megabyte_distill.curriculum.on_stage import bare
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.objectives.objective import Objective
from megabyte_distill.parallel.pipeline import pipeline_place, pipeline_size, virtual_size, virtual_stages
from megabyte_distill.parallel.process_groups import World
from megabyte_distill.training.optimizer import TrainerModel
from megabyte_distill.training.step import global_counts, make_gradients

Locate = Callable[[int, int], str]
"""(micro-batch, byte of it) → its row, document and place there, in words."""
_NOTHING = (
    "a second pass over the same rows is finite: a transient fault of a machine, or an operation that is not "
    "deterministic (--rerun-check 1 shows which)"
)


@dataclass(frozen=True, slots=True)
class _Finding:
    """One value that is not finite; ordered by when it is computed."""

    order: tuple[int, int, int]
    """(0 forward or 1 backward, pipeline stages before it, number of the event on its rank)."""
    text: str


def find_nonfinite(
    trained: TrainerModel, objective: Objective, rows: list[PackedRow], world: World, locate: Locate
) -> str:
    """What is not finite first in an update over this rank's micro-batches, on which ranks and at which byte.

    Collective; the same text on every rank. Takes gradients away.
    """
    weights = _weights_not_finite(trained.module)
    everywhere = _gathered(world, weights)
    if any(everywhere):
        return "; ".join(f"on rank {rank}: {text}" for rank, text in enumerate(everywhere) if text)
    totals = global_counts([objective.counts(row) for row in rows], world)
    found: list[_Finding | None] = []
    # megatron's interleaved schedule takes no fewer micro-batches at once
    again = trained.parts[0].config.microbatch_group_size_per_vp_stage if virtual_size() > 1 else 1
    number = 0
    for number, row in enumerate(rows):
        probe = _Probe(row, lambda byte, number=number: locate(number, byte))  # type: ignore[misc]
        with probe.watching(trained.module):
            make_gradients(trained, _Watched(objective, probe), [row] * again, world, totals)  # type: ignore[arg-type]
        found = _gathered(world, probe.finding)
        if any(found):
            break
    trained.zero_grad_buffers()
    trained.optimizer.zero_grad()
    first = min((finding.order for finding in found if finding), default=None)
    if first is None:
        return _NOTHING
    parts = [
        f"on rank {rank}, micro-batch {number}: {finding.text}"
        for rank, finding in enumerate(found)
        if finding is not None and finding.order == first
    ]
    return "; ".join(parts[:4])


def _gathered(world: World, value: Any) -> list[Any]:
    everywhere: list[Any] = [None] * world.size
    dist.all_gather_object(everywhere, value)
    return everywhere


def _weights_not_finite(model: nn.Module) -> str | None:
    bad = {
        name: described
        for name, parameter in model.named_parameters()
        if (described := _described(parameter.detach())) is not None
    }
    if not bad:
        return None
    name, described = next(iter(bad.items()))
    others = f", and {len(bad) - 1} other weights" if len(bad) > 1 else ""
    return f"the weight {name} itself has {described}{others}"


class _Probe:
    """Remembers the first event of one pass that is not finite."""

    def __init__(self, row: PackedRow, locate: Callable[[int], str]) -> None:
        self.finding: _Finding | None = None
        self._row, self._locate = row, locate
        self._events = 0
        self._handles: list[Any] = []

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Inside, every module and trained parameter is looked at."""
        try:
            for number, part in enumerate(virtual_stages(model)):
                for name, module in part.named_modules():
                    if name:  # the whole part's outputs are those of its modules
                        self._watch_module(name, module, number)
                for name, parameter in part.named_parameters():
                    if parameter.requires_grad:
                        self._watch_gradient(parameter, f"the gradient of {name}", number)
            yield
        finally:
            for handle in self._handles:
                handle.remove()

    def see(self, what: str, tensor: Tensor, virtual_stage: int, *, backward: bool = False) -> None:
        """Look at a value of one of this rank's virtual stages, in the order in which values are made."""
        self._events += 1
        if self.finding is not None or not tensor.is_floating_point():
            return
        described = _described(tensor)
        if described is not None:
            place, stages = pipeline_place(virtual_stage), pipeline_size() * virtual_size()
            before = stages - 1 - place if backward else place
            # each stage numbers its own layers from 0
            of = f" of pipeline stage {place}" if stages > 1 else ""
            text = f"{what}{of} has {described}{self._place(tensor)}"
            self.finding = _Finding((int(backward), before, self._events), text)

    def _watch_module(self, name: str, module: nn.Module, virtual_stage: int) -> None:
        def before(_: nn.Module, inputs: Any) -> None:
            for tensor in _tensors(inputs):
                self.see(f"the input of {name}", tensor, virtual_stage)

        def after(_: nn.Module, inputs: Any, outputs: Any) -> None:
            for tensor in _tensors(outputs):
                self.see(f"the output of {name}", tensor, virtual_stage)
                if tensor.requires_grad:
                    what = f"the gradient that arrives at the output of {name}"
                    self._watch_gradient(tensor, what, virtual_stage)

        self._handles += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]

    def _watch_gradient(self, tensor: Tensor, what: str, virtual_stage: int) -> None:
        def arrived(gradient: Tensor) -> None:
            self.see(what, gradient, virtual_stage, backward=True)

        self._handles.append(tensor.register_hook(arrived))  # type: ignore[no-untyped-call]

    def _place(self, tensor: Tensor) -> str:
        """Where in the text the first bad entry is, as far as the shape tells."""
        if not tensor.dim():
            return ""
        index = int((~torch.isfinite(tensor.detach())).nonzero()[0, 0])
        size, row = tensor.shape[0], self._row
        if size == row.byte_ids.shape[0]:
            return f", first at byte {index} of it: {self._locate(index)}"
        ends = row.bits.nonzero().flatten()
        if size == -(-ends.shape[0] // row.chunk_bucket) * row.chunk_bucket and index < ends.shape[0]:
            byte = int(ends[index])
            return f", first at chunk {index}, which by gold boundaries ends at byte {byte} of it: {self._locate(byte)}"
        return f", first at index {index}"


class _Watched:
    """An objective whose losses are looked at."""

    def __init__(self, objective: Objective, probe: _Probe) -> None:
        self._objective, self._probe = objective, probe

    def __getattr__(self, name: str) -> Any:
        return getattr(self._objective, name)

    def losses(self, model: nn.Module, *args: Any, **kwargs: Any) -> Mapping[str, Tensor]:
        """The objective's."""
        losses = self._objective.losses(model, *args, **kwargs)
        for name, loss in losses.items():
            self._probe.see(f"the loss {name!r}", loss, getattr(bare(model), "vp_stage", 0))
        return losses


def _described(tensor: Tensor) -> str | None:
    """``3 NaN and 1 infinite of 64 values``; None where all are finite."""
    finite = torch.isfinite(tensor)
    if bool(finite.all()):
        return None
    nan, bad = int(torch.isnan(tensor).sum()), int((~finite).sum())
    counts = [f"{count} {kind}" for count, kind in ((nan, "NaN"), (bad - nan, "infinite")) if count]
    return f"{' and '.join(counts)} of {tensor.numel()} values"


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from _tensors(getattr(value, field.name, None))
