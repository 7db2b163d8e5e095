"""A backbone whose norms stand inside its linear layers is the local one: same checkpoint, states, gradients, steps."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from megabyte_distill import optional
from megabyte_distill.config.model import BackboneConfig
from megabyte_distill.conversion.teacher_folder import TeacherHolder
from megabyte_distill.model.backbone import Backbone, transformer_config
from megabyte_distill.model.engine_layers import requantize_weights
from megabyte_distill.training.checkpoint import load_checkpoint, save_checkpoint, sharded_state_dict
from tests.model.engine_twin import NormColumn, twin_parts
from tests.tiny_student import BACKBONE, enlarged, gradients
from tests.tiny_student import FAMILIES as FIELDS

pytestmark = pytest.mark.usefixtures("world")

FAMILIES = {name: replace(BACKBONE, **fields) for name, fields in FIELDS.items()}
INSIDE = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
"""Names of a layer's parameters with the norms inside, and as layers of their own."""
OFFSETS = torch.tensor([0, 1, 20, 26, 60], dtype=torch.int32)


def pair(config: BackboneConfig) -> tuple[Backbone, Backbone]:
    """(local, twin), with weights of their own."""
    local = enlarged(Backbone(config, transformer_config(config)))
    return local, Backbone(config, transformer_config(config), twin_parts(config))


def outside(name: str) -> str:
    for inside, alone in INSIDE.items():
        name = name.replace(inside, alone)
    return name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("direction", ["local to twin", "twin to local"])
def test_a_checkpoint_of_either_is_read_by_the_other(family: str, direction: str, tmp_path: Path) -> None:
    local, twin = pair(FAMILIES[family])
    enlarged(twin)
    source, target = (local, twin) if direction == "local to twin" else (twin, local)
    described = [
        {part.key: tuple(part.data.shape) for part in sharded_state_dict(TeacherHolder(model)).values()}
        for model in (source, target)
    ]
    assert described[0] == described[1]
    path = save_checkpoint(tmp_path, 1, TeacherHolder(source), optimizer=None, loop={}, texts={})
    load_checkpoint(path, TeacherHolder(target))
    ours, theirs = (
        {outside(name): parameter for name, parameter in model.named_parameters()} for model in (source, target)
    )
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(parameter, theirs[name]) for name, parameter in ours.items())
    has_inner_norms = any(isinstance(module, NormColumn) for module in twin.modules())
    assert has_inner_norms != FAMILIES[family].post_norm


@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_gradients_are_those_of_the_local_layers(family: str, tmp_path: Path) -> None:
    local, twin = pair(FAMILIES[family])
    load_checkpoint(
        save_checkpoint(tmp_path, 1, TeacherHolder(local), optimizer=None, loop={}, texts={}), TeacherHolder(twin)
    )
    x = torch.randn(60, 32)

    def loss(model: Backbone) -> Tensor:
        total: Tensor = model(x, OFFSETS).sin().sum()
        return total

    with torch.no_grad():
        torch.testing.assert_close(twin(x, OFFSETS), local(x, OFFSETS), rtol=1e-5, atol=1e-5)
    expected = gradients(local, lambda: loss(local))
    got = {outside(name): gradient for name, gradient in gradients(twin, lambda: loss(twin)).items()}
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("family", ["llama", "olmo3", "gemma3"])
def test_steps_equal_forward(family: str) -> None:
    twin = enlarged(pair(FAMILIES[family])[1])
    x, cache, row = torch.randn(12, 32), twin.init_cache(1), torch.tensor([0])
    stepped = torch.cat([twin.step(vector[None], cache, row) for vector in x])
    with torch.no_grad():
        whole = twin(x, torch.tensor([0, 12], dtype=torch.int32))
    torch.testing.assert_close(stepped, whole, rtol=1e-4, atol=1e-4)


def test_an_engines_own_state_is_not_in_a_checkpoint() -> None:
    local, twin = pair(BACKBONE)
    assert any(name.endswith("_extra_state") for name in twin.state_dict())
    for model in (local, twin):
        assert not [name for name in sharded_state_dict(TeacherHolder(model)) if "_extra_state" in name]


def test_weights_that_changed_are_taken_anew() -> None:
    twin = enlarged(pair(BACKBONE)[1])
    student = nn.ModuleDict({"backbone": twin})  # nothing of megatron's at its top
    x = torch.randn(8, 32)
    offsets = torch.tensor([0, 8], dtype=torch.int32)
    with torch.no_grad():
        before = twin(x, offsets)
        for layer in twin.decoder.layers:
            layer.self_attention.linear_qkv.weight.mul_(2)
        assert torch.equal(twin(x, offsets), before)  # the copy of the first micro-batch
        requantize_weights(student)
        after = twin(x, offsets)
    assert not torch.allclose(after, before)


def test_engine_layers_are_refused_with_the_reason_where_there_is_no_engine() -> None:
    why = optional.engine_problem()
    if why is None:
        pytest.skip("Transformer Engine is usable here")
    with pytest.raises(ValueError, match="layers of Transformer Engine were asked for, but the package") as caught:
        Backbone(BACKBONE, transformer_config(BACKBONE, transformer_impl="transformer_engine"))
    assert why in str(caught.value)
