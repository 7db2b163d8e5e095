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

from megabyte_distill.conversion.compare import backbone_logits, compare_logits
from megabyte_distill.conversion.hf_import import HfModel, import_teacher, read_backbone
from megabyte_distill.conversion.teacher_folder import load_teacher

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


_Q = "model.layers.1.self_attn.q_proj.weight"
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing": (_edit_weights(lambda t: t.pop(_Q)), rf"missing: {_Q} \[96, 48\]"),
    "extra": (_edit_weights(lambda t: t.update(stray=torch.ones(2))), r"not expected: stray \[2\]"),
    "mis-shaped": (
        _edit_weights(lambda t: t.update({_Q: t[_Q][:48]})),
        rf"{_Q} has shape \[48, 48\], expected \[96, 48\]",
    ),
    "not-a-number": (_edit_weights(lambda t: t[_Q][0].fill_(torch.nan)), f"{_Q} holds 48 NaN or infinite"),
    "truncated": (_truncate, "model.safetensors: not a complete safetensors file"),
    "fewer-layers": (_edit_config(num_hidden_layers=3), r"not expected: model\.layers\.3\."),
    "other-vocabulary": (
        _edit_config(vocab_size=199),
        r"embed_tokens.weight has shape \[200, 48\], expected \[199, 48\]",
    ),
    "vocabulary-below-tokenizer": (_edit_config(vocab_size=100), "the tokenizer has 130 ids"),
    "tied-with-another-head": (
        _edit_config(tie_word_embeddings=True),
        "lm_head.weight differs from model.embed_tokens",
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
