"""An imported Llama has transformers' logits, at packed segments too; a folder that is wrong anywhere is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megabyte_distill.conversion.compare import backbone_logits, compare_logits, roundtrip
from megabyte_distill.conversion.hf_import import HfModel, import_teacher
from megabyte_distill.conversion.safetensors_folder import write_tensors
from megabyte_distill.conversion.teacher_folder import load_teacher
from tests.conversion.in_memory import read_backbone

pytestmark = pytest.mark.usefixtures("world")

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "untied": {},
    "tied": {"tie_word_embeddings": True},
    "llama3-rope": {"rope_parameters": LLAMA3},
    "one-group": {"num_key_value_heads": 1, "head_dim": 8},
    "no-groups": {"num_key_value_heads": 6, "rms_norm_eps": 1e-6, "vocab_size": 256},
    "sharded": {"shard": "40KB"},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers_on_packed_segments(make_llama: Callable[..., Path], case: str) -> None:
    folder = make_llama(**CASES[case])
    assert (folder / "model.safetensors.index.json").exists() == (case == "sharded")
    backbone = read_backbone(HfModel.open(folder), dtype=torch.float32)
    reference = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    lengths = [1, 37, 5, 60]
    tokens = torch.randint(0, 200, (sum(lengths),))
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    with torch.no_grad():
        ours = backbone.logits(backbone(backbone.embed(tokens), cu_seqlens))
        theirs = torch.cat([reference(part[None]).logits[0] for part in tokens.split(lengths)])
    assert theirs.abs().max() > 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_loaded_from_disk_equals_the_folder(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = make_llama(dtype=torch.bfloat16)
    config = import_teacher(folder, tmp_path / "ckpt")
    direct = read_backbone(HfModel.open(folder))
    teacher = load_teacher(tmp_path / "ckpt")
    assert teacher.config == config and teacher.backbone.dtype is torch.bfloat16
    loaded = dict(teacher.backbone.named_parameters())
    for name, parameter in direct.named_parameters():
        assert torch.equal(parameter, loaded.pop(name)), name
    assert not loaded
    assert teacher.token_bytes.vocab_size == 200 and teacher.token_bytes.end_of_text_id == 0
    assert load_teacher(tmp_path / "ckpt", dtype=torch.float32).backbone.dtype is torch.float32


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        (torch.float32, None, torch.float32),
        (torch.float16, None, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32),
    ],
)
def test_dtype_of_the_checkpoint(
    make_llama: Callable[..., Path], tmp_path: Path, stored: torch.dtype, asked: torch.dtype, expected: torch.dtype
) -> None:
    import_teacher(make_llama(dtype=stored, num_hidden_layers=1), tmp_path / "ckpt", dtype=asked)
    assert load_teacher(tmp_path / "ckpt").backbone.dtype is expected


def test_compare_reports_the_difference(make_llama: Callable[..., Path], llama: Path, tmp_path: Path) -> None:
    import_teacher(llama, tmp_path / "ckpt")
    assert compare_logits(llama, tmp_path / "ckpt", "the old town").max_abs_logit_difference < 1e-5
    other = make_llama(rms_norm_eps=0.1)
    assert compare_logits(other, tmp_path / "ckpt").max_abs_logit_difference > 1e-3
    wider = make_llama(vocab_size=256)
    with pytest.raises(ValueError, match="different models"):
        compare_logits(wider, tmp_path / "ckpt")


def test_a_layout_of_one_sequence_has_one_row_a_token(llama: Path) -> None:
    backbone = read_backbone(HfModel.open(llama))
    assert backbone_logits(backbone, torch.tensor([1, 2, 3])).shape == (3, 200)


def _edit_weights(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file({name: t.clone() for name, t in tensors.items()}, folder / "model.safetensors")

    return edit


def _edit_config(**fields: Any) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))

    return edit


def _truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _shard(folder: Path) -> list[Path]:
    """The same weights in several files with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    write_tensors(folder, layout, tensors.items(), max_shard_bytes=60_000)
    return sorted(folder.glob("model-*.safetensors"))


def _truncate_a_shard(folder: Path) -> None:
    path = _shard(folder)[1]
    path.write_bytes(path.read_bytes()[:-100])


def _remove_a_shard(folder: Path) -> None:
    _shard(folder)[1].unlink()


_Q = "model.layers.1.self_attn.q_proj.weight"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (_edit_weights(lambda t: t.pop(_Q)), rf"missing: {_Q} \[96, 48\]"),
    "extra": (_edit_weights(lambda t: t.update(stray=torch.ones(2))), r"not expected: stray \[2\]"),
    "mis-shaped": (
        _edit_weights(lambda t: t.update({_Q: t[_Q][:48]})),
        rf"{_Q} has shape \[48, 48\], expected \[96, 48\]",
    ),
    "not-a-number": (_edit_weights(lambda t: t[_Q][0].fill_(torch.nan)), f"{_Q} holds 48 NaN or infinite"),
    "infinite": (
        _edit_weights(lambda t: t["model.norm.weight"][3:5].fill_(-torch.inf)),
        "model.safetensors: model.norm.weight holds 2 NaN or infinite",
    ),
    "truncated-shard": (_truncate_a_shard, r"model-00002-of-\d+.safetensors: not a complete safetensors file"),
    "absent-shard": (_remove_a_shard, r"index.json names files that are not there: model-00002-of-"),
    "more-layers": (_edit_config(num_hidden_layers=5), r"missing: model\.layers\.4\.input_layernorm\.weight \[48\]"),
    "other-heads": (
        _edit_config(num_attention_heads=4),
        rf"{_Q} has shape \[96, 48\], expected \[64, 48\]",
    ),
    "other-groups": (
        _edit_config(num_key_value_heads=3),
        r"layers.0.self_attn.k_proj.weight has shape \[32, 48\], expected \[48, 48\]",
    ),
    "untied-without-head": (
        _edit_weights(lambda t: t.pop("lm_head.weight")),
        r"missing: lm_head.weight \[200, 48\]",
    ),
    "truncated": (_truncate, "model.safetensors: not a complete safetensors file"),
    "fewer-layers": (_edit_config(num_hidden_layers=3), r"not expected: model\.layers\.3\."),
    "other-vocabulary": (
        _edit_config(vocab_size=199),
        r"embed_tokens.weight has shape \[200, 48\], expected \[199, 48\]",
    ),
    "vocabulary-below-tokenizer": (_edit_config(vocab_size=100), "the tokenizer has 130 ids"),
    "tied-with-another-head": (
        _edit_config(tie_word_embeddings=True),
        r"model.safetensors: lm_head.weight differs from model.embed_tokens.weight, but \S+config.json says",
    ),
    "unknown-architecture": (_edit_config(architectures=["FooLM"]), "unknown architecture FooLM; known are Llama"),
    "no-config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "no-tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "no usable tokenizer"),
    "no-weights": (lambda folder: (folder / "model.safetensors").unlink(), "has no model.safetensors"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_wrong_folder_is_refused_and_nothing_is_written(llama: Path, tmp_path: Path, damage: str) -> None:
    break_it, message = DAMAGE[damage]
    folder = tmp_path / "hf"
    shutil.copytree(llama, folder)
    break_it(folder)
    with pytest.raises(ValueError, match=message):
        import_teacher(folder, tmp_path / "ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_a_tied_head_stored_again_and_old_frequencies_are_accepted(
    make_llama: Callable[..., Path], tmp_path: Path
) -> None:
    folder = make_llama(tie_word_embeddings=True)

    def add(tensors: dict[str, torch.Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)

    _edit_weights(add)(folder)
    import_teacher(folder, tmp_path / "ckpt")
    assert load_teacher(tmp_path / "ckpt").backbone.output_layer is None


def test_several_dtypes_in_one_folder_are_imported_exactly(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(llama, folder)
    kinds = (torch.bfloat16, torch.float16, torch.float32)

    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.to(kinds[i % 3]) for i, (name, tensor) in enumerate(tensors.items())})

    _edit_weights(narrow)(folder)
    assert roundtrip(folder) == 39
    import_teacher(folder, tmp_path / "ckpt")
    assert load_teacher(tmp_path / "ckpt").backbone.dtype is torch.float32


def test_a_value_beyond_the_asked_dtype_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    shutil.copytree(llama, folder)
    _edit_weights(lambda tensors: tensors[_Q][0, :2].fill_(3.4e38))(folder)
    with pytest.raises(ValueError, match=rf"{_Q}.*: 2 value\(s\) are beyond what bfloat16 can hold"):
        import_teacher(folder, tmp_path / "ckpt", dtype=torch.bfloat16)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_compare_tells_each_position(llama: Path, tmp_path: Path) -> None:
    import_teacher(llama, tmp_path / "ckpt")
    _edit_rows = load_file(llama / "model.safetensors")
    other = tmp_path / "hf"
    shutil.copytree(llama, other)
    tokenizer = load_teacher(tmp_path / "ckpt").token_bytes
    result = compare_logits(llama, tmp_path / "ckpt", "the old town")
    assert len(result.per_position) == result.tokens > 3
    assert result.per_position[0].text == "<start>" and result.per_position[0].token_id == tokenizer.start_id
    assert "".join(one.text for one in result.per_position[1:]) == "the old town"
    # another embedding for the second token: nothing before it may differ
    changed = result.per_position[2].token_id
    assert changed not in [one.token_id for one in result.per_position[:2]]
    _edit_rows["model.embed_tokens.weight"][changed] += 1.0
    save_file(_edit_rows, other / "model.safetensors")
    result = compare_logits(other, tmp_path / "ckpt", "the old town")
    differences = [one.max_abs_logit_difference for one in result.per_position]
    assert max(differences[:2]) < 1e-5 < 1e-2 < differences[2]
    assert differences[result.largest_at] == max(differences) == result.max_abs_logit_difference
