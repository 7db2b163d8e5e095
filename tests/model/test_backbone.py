"""The teacher's transformer: packing, stepping with a cache, its vocabulary, transformers' gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megabyte_distill.conversion.llama import LLAMA
from megabyte_distill.model.backbone import Backbone
from megabyte_distill.model.key_value_cache import KeyValueCache, NewPositions
from megabyte_distill.model.normalization import TeacherRMSNorm
from tests.tiny_student import BACKBONE, FAMILIES, VOCAB_SIZE, assert_same, gradients, tiny_backbone

pytestmark = pytest.mark.usefixtures("world")

LENGTHS = [1, 19, 6, 1, 40]
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16}


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("scaling", [None, LLAMA3])
def test_packed_segments_equal_single_ones(groups: int, scaling: dict[str, float] | None) -> None:
    backbone = tiny_backbone(num_query_groups=groups, rope_scaling=scaling).double()
    x = torch.randn(sum(LENGTHS), 32, dtype=torch.float64)
    pieces = list(x.split(LENGTHS))

    def states(packed: bool) -> Tensor:
        if packed:
            result: Tensor = backbone(x, offsets(LENGTHS))
            return result
        return torch.cat([backbone(piece, offsets([piece.shape[0]])) for piece in pieces])

    torch.testing.assert_close(states(True), states(False), rtol=1e-10, atol=1e-10)
    packed, single = (gradients(backbone, lambda p=p: states(p).sin().sum()) for p in (True, False))
    assert_same(packed, single, rtol=1e-9, atol=1e-10)
    assert not any(name.startswith(("embedding", "output_layer")) for name in packed)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_first_layers_are_what_forward_passes_on_its_way(count: int) -> None:
    backbone, x = tiny_backbone(), torch.randn(sum(LENGTHS), 32)
    passed = [x]
    for layer in backbone.decoder.layers:
        layer.register_forward_hook(lambda module, arguments, out: passed.append(out[0][:, 0].detach()))
    backbone(x, offsets(LENGTHS))
    assert len(passed) == 3
    assert torch.equal(backbone.first_layers(x, offsets(LENGTHS), count), passed[count])
    names = {name for name, _ in backbone.named_parameters()}
    backbone.drop_behind(count)
    assert torch.equal(backbone.first_layers(x, offsets(LENGTHS), count), passed[count])
    left = {name for name, _ in backbone.named_parameters()}
    layers = tuple(f"decoder.layers.{number}." for number in range(count))
    assert left == {name for name in names if name.startswith(("embedding.", *layers))}
    with pytest.raises(
        ValueError, match=f"the first {count + 1} layers were asked for, this pipeline stage has {count}"
    ):
        backbone.first_layers(x, offsets(LENGTHS), count + 1)


def test_a_later_vector_moves_no_earlier_state() -> None:
    backbone = tiny_backbone()
    x = torch.randn(12, 32)
    changed = x.clone()
    changed[7] += 1
    with torch.no_grad():
        before, after = backbone(x, offsets([12])), backbone(changed, offsets([12]))
    assert torch.equal(before[:7], after[:7]) and (before[7:] != after[7:]).any(-1).all()


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_steps_of_a_ragged_batch_equal_forward(groups: int) -> None:
    backbone = tiny_backbone(num_query_groups=groups)
    pieces = list(torch.randn(sum(LENGTHS), 32).split(LENGTHS))
    cache = backbone.init_cache(len(pieces))
    stepped: list[list[Tensor]] = [[] for _ in pieces]
    for t in range(max(LENGTHS)):
        # falling order: rows of a batch need not be sorted
        rows = torch.tensor([i for i in reversed(range(len(pieces))) if LENGTHS[i] > t])
        states = backbone.step(torch.stack([pieces[i][t] for i in rows.tolist()]), cache, rows)
        for place, row in enumerate(rows.tolist()):
            stepped[row].append(states[place])
    assert cache.lengths.tolist() == LENGTHS
    with torch.no_grad():
        for got, piece in zip(stepped, pieces, strict=True):
            expected = backbone(piece, offsets([piece.shape[0]]))
            torch.testing.assert_close(torch.stack(got), expected, rtol=1e-4, atol=1e-4)


def test_selected_rows_of_a_cache_go_their_own_way() -> None:
    backbone = tiny_backbone()
    x, more = torch.randn(2, 32), torch.randn(3, 32)
    cache = backbone.init_cache(2)
    backbone.step(x, cache, torch.tensor([0, 1]))
    fork = cache.select(torch.tensor([1, 0, 1]))
    forked = backbone.step(more, fork, torch.tensor([0, 1, 2]))
    for place, row in enumerate([1, 0, 1]):
        with torch.no_grad():
            expected = backbone(torch.stack([x[row], more[place]]), offsets([2]))[1]
        torch.testing.assert_close(forked[place], expected, rtol=1e-4, atol=1e-4)
    assert cache.lengths.tolist() == [1, 1] and fork.lengths.tolist() == [2, 2, 2]


def test_a_cache_keeps_its_content_when_it_grows() -> None:
    cache = KeyValueCache.empty(2, torch.device("cpu"))
    rows = torch.tensor([1])
    written = torch.randn(70, 1, 2, 4)
    for position in range(70):
        new = NewPositions.of(cache, rows)
        keys, values = cache.append(1, new, written[position], -written[position])
        cache.lengths[rows] += 1
    assert torch.equal(keys[0], written[:, 0]) and torch.equal(values[0], -written[:, 0])
    assert cache.lengths.tolist() == [0, 70] and cache.keys[1].shape[1] == 128


@pytest.mark.parametrize("tied", [True, False])
def test_logits_have_the_rows_that_mean_something(tied: bool) -> None:
    backbone = tiny_backbone(tied_embeddings=tied)
    assert backbone.padded_vocab_size == 128 and backbone.embedding.weight.shape == (128, 32)
    assert (backbone.output_layer is None) == tied
    hidden = torch.randn(5, 32)
    weight = backbone.embedding.weight if tied else backbone.output_layer.weight
    torch.testing.assert_close(backbone.logits(hidden), hidden @ weight[:VOCAB_SIZE].t())
    names = {name.partition(".")[0] for name, _ in backbone.named_parameters()}
    assert names == {"embedding", "decoder"} | (set() if tied else {"output_layer"})


def test_a_cast_to_bf16_leaves_the_angles_alone() -> None:
    backbone = tiny_backbone().bfloat16()
    # position 301 is not a bf16 number: a rounded frequency table would turn by whole radians there
    cosines, sines = backbone._rotary(torch.tensor([301]))[0]
    assert cosines.dtype is torch.float32
    torch.testing.assert_close((cosines[0, 0], sines[0, 0]), (torch.tensor(301.0).cos(), torch.tensor(301.0).sin()))
    assert backbone(torch.randn(3, 32), offsets([3])).dtype is torch.bfloat16


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_equal_those_of_transformers(tied: bool) -> None:
    transformers = pytest.importorskip("transformers", reason="the reference for Llama; pip install .[hf]")
    backbone = tiny_backbone(tied_embeddings=tied, rope_scaling=LLAMA3)
    fields = LLAMA.write_config(backbone.backbone_config)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**fields, attn_implementation="eager"))
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.2)
    theirs_by_name = dict(theirs.named_parameters())
    # conversion only moves numbers about, so it carries gradients as well as weights
    mapping = LLAMA.table(backbone.backbone_config, backbone.padded_vocab_size)
    ours_by_name = dict(backbone.named_parameters())
    with torch.no_grad():
        for name, value in mapping.to_ours(lambda name: theirs_by_name[name].detach()):
            ours_by_name[name].copy_(value)
    tokens = torch.randint(0, VOCAB_SIZE, (2, 23))
    theirs(tokens, labels=tokens).loss.backward()

    def loss(backbone: Backbone) -> Tensor:
        logits = backbone.logits(backbone(backbone.embed(tokens.flatten()), offsets([23, 23]))).view(2, 23, -1)
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    got = gradients(backbone, lambda: loss(backbone))
    expected = dict(mapping.to_ours(lambda name: theirs_by_name[name].grad.clone()))
    assert_same(got, expected, rtol=1e-3, atol=2e-6)
    assert BACKBONE.num_layers == 2 and float(got["embedding.weight"].abs().max()) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scaled_embeddings_are_what_the_first_layer_reads_and_not_what_a_tied_head_has(dtype: torch.dtype) -> None:
    backbone = tiny_backbone(**FAMILIES["gemma"]).to(dtype)
    weight = backbone.embedding.weight[:VOCAB_SIZE]
    wanted = weight * torch.tensor(32**0.5).to(dtype)
    assert torch.equal(backbone.embed(torch.arange(VOCAB_SIZE)), wanted)
    assert torch.equal(backbone.embedding_table, wanted), "1a compares with it, and in units of its variance"
    states = torch.randn(5, 32, dtype=dtype)
    torch.testing.assert_close(backbone.logits(states), states @ weight.T)


def test_small_weights_of_centred_norms_survive_bf16() -> None:
    """1 + 0.003 is 1 in bf16; transformers multiplies in fp32 and rounds once."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

    ours, theirs = TeacherRMSNorm(32, eps=1e-6, zero_centred=True).bfloat16(), Gemma3RMSNorm(32).bfloat16()
    assert not ours.weight.any(), "born as zeros, that is as one"
    for norm in (ours, theirs):
        torch.nn.init.constant_(norm.weight, 0.003)
    x = torch.randn(100, 32, dtype=torch.bfloat16)
    torch.testing.assert_close(ours(x), theirs(x), rtol=2**-8, atol=0)
    assert (ours(x) == theirs(x)).float().mean() > 0.99 > (ours(x) == torch.nn.RMSNorm(32).bfloat16()(x)).float().mean()
