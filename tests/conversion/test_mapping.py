"""Every mapping is its own inverse, and a table names whatever does not fit."""

from __future__ import annotations

import re

import pytest
import torch

from megabyte_distill.conversion.mapping import (
    Direct,
    GateUp,
    PaddedVocabulary,
    ParameterMapping,
    ParameterTable,
    QueryKeyValue,
)

QKV = QueryKeyValue(ours="qkv", query="q", key="k", value="v", groups=2, heads_per_group=3, head_dim=4, tail=(5,))
MAPPINGS: list[ParameterMapping] = [
    Direct("a", "x", (3, 4)),
    QKV,
    QueryKeyValue(ours="b", query="q", key="k", value="v", groups=3, heads_per_group=1, head_dim=2, tail=()),
    GateUp(ours="fc1", gate="gate", up="up", each=(3, 4)),
    PaddedVocabulary(ours="embedding", name="embed", rows=5, padded_rows=8, width=3),
]


@pytest.mark.parametrize("mapping", MAPPINGS, ids=lambda m: f"{type(m).__name__}-{m.ours}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_back_and_forth_is_bit_identical(mapping: ParameterMapping, dtype: torch.dtype) -> None:
    parts = [torch.randn(shape).to(dtype) for shape in mapping.theirs.values()]
    ours = mapping.to_ours(parts)
    assert tuple(ours.shape) == mapping.shape and ours.dtype is dtype
    for part, back in zip(parts, mapping.to_theirs(ours), strict=True):
        assert torch.equal(part, back)


def test_query_key_value_is_grouped() -> None:
    query = torch.arange(6).repeat_interleave(4)[:, None].expand(24, 5)  # head number
    key = 10 + torch.arange(2).repeat_interleave(4)[:, None].expand(8, 5)
    ours = QKV.to_ours([query, key, key + 10])
    assert ours[::4, 0].tolist() == [0, 1, 2, 10, 20, 3, 4, 5, 11, 21]


def test_padding_rows_are_zero() -> None:
    padded = MAPPINGS[4].to_ours([torch.ones(5, 3)])
    assert padded[:5].all() and not padded[5:].any()


def table() -> ParameterTable:
    return ParameterTable(
        mappings=(Direct("a", "x", (2, 3)), GateUp(ours="f", gate="g", up="u", each=(4, 3))),
        repeats={"copy": "x"},
        derived=re.compile(r"layer\.\d+\.cache"),
    )


def test_a_complete_folder_passes_with_what_it_may_hold_besides() -> None:
    shapes = {"x": (2, 3), "g": (4, 3), "u": (4, 3)}
    table().check_theirs(shapes, "here")
    table().check_theirs({**shapes, "copy": (2, 3), "layer.3.cache": (9,)}, "here")


def test_everything_that_does_not_fit_is_named_at_once() -> None:
    found = {"x": (3, 2), "g": (4, 3), "stray": (1,), "copy": (7, 7), "layer.x.cache": (1,)}
    with pytest.raises(ValueError) as caught:
        table().check_theirs(found, "DIR")
    message = str(caught.value)
    assert message.startswith("DIR: 5 tensor(s)")
    for part in ("missing: u [4, 3]", "not expected: stray [1]", "not expected: layer.x.cache",
                 "x has shape [3, 2], expected [2, 3]", "copy has shape [7, 7]"):  # fmt: skip
        assert part in message


def test_each_name_is_read_exactly_once() -> None:
    reads: list[str] = []

    def read(name: str) -> torch.Tensor:
        reads.append(name)
        return torch.zeros({**table().theirs(), **table().ours()}[name])

    assert [name for name, _ in table().to_ours(read)] == ["a", "f"]
    assert reads == ["x", "g", "u"]
    reads.clear()
    assert [name for name, _ in table().to_theirs(read)] == ["x", "g", "u"]
    assert reads == ["a", "f"]


def test_a_table_with_a_name_twice_cannot_be_made() -> None:
    with pytest.raises(AssertionError, match="twice"):
        ParameterTable(mappings=(Direct("a", "x", (1,)), Direct("b", "x", (1,))))
