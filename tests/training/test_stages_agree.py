"""Pipeline stages that saw other boundaries, other bytes, or hold other copies of a tied table say so, both of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from megabyte_distill.parallel.pipeline import VirtualStages
from megabyte_distill.parallel.process_groups import World
from megabyte_distill.training.stages_agree import StagesAgree
from tests.distributed.ranks import run_ranks


class Stage(nn.Module):
    """Stands where a student does: a forward that returns boundaries, and a copy of a table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.arange(6.0))

    def shared_embedding_or_output_weight(self) -> Tensor:
        return self.table

    def forward(self, row: SimpleNamespace) -> SimpleNamespace:
        return SimpleNamespace(bits=row.bits)


def _row(seed: int) -> SimpleNamespace:
    generator = torch.Generator().manual_seed(seed)
    return SimpleNamespace(
        byte_ids=torch.randint(256, (64,), generator=generator), bits=torch.rand(64, generator=generator) < 0.3
    )


def answer(change: Callable[[Stage, list[SimpleNamespace]], None], rank: int) -> list[str]:
    stage, rows = Stage(), [_row(seed) for seed in range(3)]
    if rank == 1:
        change(stage, rows)
    agree = StagesAgree(stage)
    for row in rows:
        stage(row)
    return agree()


def _nothing(stage: Stage, rows: list[SimpleNamespace]) -> None: ...


def _bit(stage: Stage, rows: list[SimpleNamespace]) -> None:
    rows[1].bits[63] = ~rows[1].bits[63]


def _byte(stage: Stage, rows: list[SimpleNamespace]) -> None:
    rows[2].byte_ids[5] += 1


def _order(stage: Stage, rows: list[SimpleNamespace]) -> None:
    rows[0], rows[1] = rows[1], rows[0]


def _table(stage: Stage, rows: list[SimpleNamespace]) -> None:
    with torch.no_grad():
        stage.table[0] = 1e-30


CASES = {"nothing": _nothing, "bit": _bit, "byte": _byte, "order": _order, "table": _table}


def virtual_answer(rank: int, *, is_odd: bool) -> list[str]:
    """Two virtual stages a rank, of which the second one of rank 1 may see another order."""
    parts: list[nn.Module] = [Stage(), Stage()]
    agree = StagesAgree(VirtualStages(parts))
    for number, part in enumerate(parts):
        rows = [_row(seed) for seed in range(3)]
        if is_odd and (rank, number) == (1, 1):
            _order(part, rows)  # type: ignore[arg-type]
        for row in rows:
            part(row)
    return agree()


def answers(world: World) -> dict[str, list[str]]:
    virtual = {"virtual, nothing": False, "virtual, order": True}
    return {
        **{name: answer(case, world.rank) for name, case in CASES.items()},
        **{name: virtual_answer(world.rank, is_odd=is_odd) for name, is_odd in virtual.items()},
    }


def test_every_difference_is_named_on_both_stages(tmp_path: Path) -> None:
    first, last = run_ranks(tmp_path, "tests.training.test_stages_agree", "answers", pipeline_parallel=2)
    assert first == last
    assert first.pop("nothing") == first.pop("virtual, nothing") == []
    (table,) = first.pop("table")
    assert table == "the copies of the tied token embedding differ between pipeline stages, ranks 0, 1"
    seen = "bytes and boundaries of a micro-batch differ between pipeline stages, ranks 0, 1"
    assert first == {name: [seen] for name in ("bit", "byte", "order", "virtual, order")}
