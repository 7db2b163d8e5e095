"""Layers shaped as Transformer Engine's, cut over two ranks, are the local ones."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from megabyte_distill.conversion.teacher_folder import TeacherHolder
from megabyte_distill.model.backbone import Backbone, transformer_config
from megabyte_distill.parallel.process_groups import World
from megabyte_distill.training.checkpoint import sharded_state_dict
from tests.distributed.ranks import run_ranks
from tests.model.engine_twin import twin_parts
from tests.model.test_engine_layers import FAMILIES, OFFSETS, outside
from tests.tiny_student import assert_same, enlarged, gradients


def test_two_ranks_have_the_states_and_gradients_of_local_layers(tmp_path: Path) -> None:
    agree = run_ranks(tmp_path, __name__, "compare_families", tensor_parallel=2)
    assert agree == [[*FAMILIES, *FAMILIES]] * 2


def compare_families(ranks: World) -> list[str]:
    """Families that agree, without and with sequence parallelism; AssertionError where one does not."""
    return [compared(family, ranks, cuts=cuts) for cuts in (False, True) for family in FAMILIES]


def compared(family: str, ranks: World, *, cuts: bool) -> str:
    torch.manual_seed(1)  # ranks draw the same: what is replicated must be
    config = FAMILIES[family]
    fields = transformer_config(config, sequence_parallel=cuts)
    local = enlarged(Backbone(config, fields)).to(ranks.device)
    twin = Backbone(config, fields, twin_parts(config)).to(ranks.device)
    weights = dict(local.named_parameters())
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            parameter.copy_(weights[outside(name)])
    keys = [
        {part.key: tuple(part.data.shape) for part in sharded_state_dict(TeacherHolder(model)).values()}
        for model in (local, twin)
    ]
    assert keys[0] == keys[1]
    x, offsets = torch.randn(60, config.hidden_size, device=ranks.device), OFFSETS.to(ranks.device)

    def loss(model: Backbone) -> Tensor:
        total: Tensor = model(x, offsets).sin().sum()
        return total

    torch.testing.assert_close(twin(x, offsets), local(x, offsets), rtol=1e-5, atol=1e-5)
    # of norms a rank's part, which megatron adds up where their weights are marked
    found = {outside(name): gradient for name, gradient in gradients(twin, lambda: loss(twin)).items()}
    assert_same(found, gradients(local, lambda: loss(local)), rtol=1e-4, atol=1e-4)
    marks = [
        {outside(name) for name, p in model.named_parameters() if getattr(p, "sequence_parallel", False)}
        for model in (local, twin)
    ]
    assert marks[0] == marks[1] and bool(marks[0]) == cuts
    return family
