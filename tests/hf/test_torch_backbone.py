"""The backbone of an export computes what megatron's does, whatever the teacher's family has."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from megabyte_distill.config.model import Activation, QkNorm, RopeScaling
from megabyte_distill.conversion.mapping import QueryKeyValue
from megabyte_distill.hf.torch_backbone import TorchBackbone
from megabyte_distill.model.backbone import Backbone
from tests.tiny_student import FAMILIES, YARN, tiny_backbone

pytestmark = pytest.mark.usefixtures("world")

LENGTHS = [1, 19, 6, 1, 40]
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16.0}
FEATURES: dict[str, dict[str, Any]] = {
    **FAMILIES,
    "tied": {"tied_embeddings": True},
    "one group": {"num_query_groups": 1},
    "no groups": {"num_query_groups": 4, "head_dim": 16},
    "biases": {"qkv_bias": True},
    "norm of heads": {"qk_norm": QkNorm.HEAD},
    "norm of all heads": {"qk_norm": QkNorm.FULL},
    "norms behind": {"post_norm": True},
    "one window": {"sliding_window": 5, "sliding_layers": (1,)},
    "windows": {"sliding_window": 1, "sliding_layers": (0, 1)},
    "llama3": {"rope_scaling": LLAMA3},
    "yarn": {"rope_scaling": YARN, "rope_scaling_kind": RopeScaling.YARN},
    "yarn not truncated": {"rope_scaling": {**YARN, "truncate": 0.0}, "rope_scaling_kind": RopeScaling.YARN},
    "qwen3": {"qk_norm": QkNorm.HEAD, "tied_embeddings": True, "rope_theta": 1e6, "norm_eps": 1e-6},
    "gelu": {"activation": Activation.GELU_TANH},
    "norms around": {"sandwich_norm": True},
    "centred norms": {"zero_centred_norms": True},
    "scale": {"query_pre_attn_scalar": 3},
    "linear": {"rope_scaling": {"factor": 8.0}, "rope_scaling_kind": RopeScaling.LINEAR},
    "base of windows": {"sliding_window": 5, "sliding_layers": (1,), "sliding_rope_theta": 50.0},
}  # fmt: skip


def copy_of(backbone: Backbone) -> TorchBackbone:
    """With megatron's weights, renamed here by hand: the families' tables have tests of their own."""
    config = backbone.backbone_config
    copy = TorchBackbone(config).to(backbone.dtype)
    ours = dict(backbone.named_parameters())
    theirs: dict[str, Tensor] = {
        "model.embed_tokens.weight": ours.pop("embedding.weight")[: config.vocab_size],
        "model.norm.weight": ours.pop("decoder.final_layernorm.weight"),
    }
    if not config.tied_embeddings:
        theirs["lm_head.weight"] = ours.pop("output_layer.weight")[: config.vocab_size]
    norms = {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}
    if config.sandwich_norm:
        norms = {
            "input_layernorm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
            "pre_mlp_layernorm": "pre_feedforward_layernorm", "post_mlp_norm": "post_feedforward_layernorm",
        }  # fmt: skip
    if config.post_norm:
        norms = {"post_attention_norm": "post_attention_layernorm", "post_mlp_norm": "post_feedforward_layernorm"}
    for layer in range(config.num_layers):
        mine, name = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for kind in ("weight", *(["bias"] if config.qkv_bias else [])):
            stacked = ours.pop(f"{mine}self_attention.linear_qkv.{kind}")
            split = QueryKeyValue(
                ours="", query="", key="k", value="v", groups=config.num_query_groups,
                heads_per_group=config.num_attention_heads // config.num_query_groups, head_dim=config.head_dim,
                tail=tuple(stacked.shape[1:]),
            )  # fmt: skip
            for letter, part in zip("qkv", split.to_theirs(stacked), strict=True):
                theirs[f"{name}self_attn.{letter}_proj.{kind}"] = part
        theirs[f"{name}self_attn.o_proj.weight"] = ours.pop(f"{mine}self_attention.linear_proj.weight")
        gate, up = ours.pop(f"{mine}mlp.linear_fc1.weight").chunk(2)
        theirs |= {f"{name}mlp.gate_proj.weight": gate, f"{name}mlp.up_proj.weight": up}
        theirs[f"{name}mlp.down_proj.weight"] = ours.pop(f"{mine}mlp.linear_fc2.weight")
        for own, other in norms.items():
            theirs[f"{name}{other}.weight"] = ours.pop(f"{mine}{own}.weight")
        if config.qk_norm is not QkNorm.NONE:
            for letter in "qk":
                weight = ours.pop(f"{mine}self_attention.{letter}_layernorm.weight")
                theirs[f"{name}self_attn.{letter}_norm.weight"] = weight.flatten()
    assert not ours, sorted(ours)
    copy.load_state_dict(theirs)
    return copy


@pytest.mark.parametrize("fields", FEATURES.values(), ids=FEATURES.keys())
def test_packed_and_stepped_states_equal_megatrons(fields: dict[str, Any]) -> None:
    backbone = tiny_backbone(**fields).eval()
    for name, parameter in backbone.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    copy = copy_of(backbone)
    x = torch.randn(sum(LENGTHS), 32)
    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
    with torch.no_grad():
        wanted = backbone(x, cu_seqlens)
        torch.testing.assert_close(copy(x, cu_seqlens), wanted, rtol=0, atol=1e-5)
    cache, rows = copy.init_cache(len(LENGTHS)), torch.arange(len(LENGTHS))
    lengths, starts = torch.tensor(LENGTHS), cu_seqlens[:-1].long()
    stepped = torch.empty_like(wanted)
    for t in range(max(LENGTHS)):
        # falling order: rows of a batch need not be sorted
        running = rows[lengths > t].flip(0)
        stepped[starts[running] + t] = copy.step(x[starts[running] + t], cache, running)
    torch.testing.assert_close(stepped, wanted, rtol=0, atol=1e-5)


def test_every_setting_above_matters() -> None:
    """Otherwise the comparison would prove nothing about it."""
    torch.manual_seed(0)
    x, cu_seqlens = torch.randn(40, 32), torch.tensor([0, 40], dtype=torch.int32)
    plain = tiny_backbone()
    reference = copy_of(plain)(x, cu_seqlens)
    for name in ("llama3", "yarn", "yarn not truncated", "linear", "gelu", "centred norms", "scale"):
        other = tiny_backbone(**FEATURES[name])
        other.load_state_dict(plain.state_dict())
        assert (copy_of(other)(x, cu_seqlens) - reference).abs().max() > 1e-3, name
    windows = [tiny_backbone(**FEATURES[name]) for name in ("one window", "base of windows")]
    for other in windows:
        other.load_state_dict(plain.state_dict())
    states = [reference, *(copy_of(other)(x, cu_seqlens) for other in windows)]
    assert all((one - next_one).abs().max() > 1e-3 for one, next_one in itertools.pairwise(states))


def test_rows_of_a_cache_are_replaced_by_shorter_and_longer_ones() -> None:
    copy = copy_of(tiny_backbone(num_query_groups=1))
    x = torch.randn(50, 3, 32)

    def read(cache: Any, places: range, rows: list[int]) -> Tensor:
        states = torch.empty(0)
        for place in places:
            states = copy.step(x[place, : len(rows)], cache, torch.tensor(rows))
        return states

    cache, other = copy.init_cache(3), copy.init_cache(1)
    read(cache, range(3), [0, 1, 2])
    read(other, range(40), [0])
    cache.put(torch.tensor([1]), other)
    assert cache.lengths.tolist() == [3, 40, 3]
    torch.testing.assert_close(read(cache, range(40, 41), [1]), read(other, range(40, 41), [0]))
    cache.put(torch.tensor([1]), copy.init_cache(1))
    assert cache.lengths.tolist() == [3, 0, 3]
    fresh = copy.init_cache(3)
    torch.testing.assert_close(read(cache, range(1), [1]), read(fresh, range(1), [1]))
