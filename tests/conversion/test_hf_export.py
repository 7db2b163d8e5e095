"""What goes in comes out bit for bit; a backbone without a source becomes a folder that transformers loads."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from megabyte_distill.config.model import BackboneConfig
from megabyte_distill.conversion.compare import backbone_logits, compare_logits, roundtrip
from megabyte_distill.conversion.hf_export import export_backbone, export_teacher
from megabyte_distill.conversion.hf_import import HfModel, import_teacher
from megabyte_distill.model.backbone import Backbone
from tests.conversion.in_memory import read_backbone

pytestmark = pytest.mark.usefixtures("world")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [False, True])
def test_roundtrip_is_bit_identical(make_llama: Callable[..., Path], dtype: torch.dtype, tied: bool) -> None:
    folder = make_llama(dtype=dtype, tie_word_embeddings=tied, num_hidden_layers=2)
    assert roundtrip(folder) == 2 * 9 + (2 if tied else 3)


def test_export_of_an_import_is_the_same_folder(llama: Path, tmp_path: Path) -> None:
    import_teacher(llama, tmp_path / "ckpt")
    export_teacher(tmp_path / "ckpt", tmp_path / "hf")
    before, after = load_file(llama / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == json.loads((llama / "config.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "hf" / name).read_bytes() == (llama / name).read_bytes()
    assert not (tmp_path / "hf" / "token_bytes.npz").exists()


@pytest.mark.parametrize("tied", [False, True])
def test_a_fresh_backbone_is_loaded_by_transformers(llama: Path, tmp_path: Path, tied: bool) -> None:
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config = BackboneConfig(
        family="llama", num_layers=2, hidden_size=48, ffn_hidden_size=56, num_attention_heads=6, num_query_groups=2,
        head_dim=8, vocab_size=131, norm_eps=1e-4, rope_theta=2e3, rope_scaling=scaling, tied_embeddings=tied,
    )  # fmt: skip
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tokenizer / name).write_bytes((llama / name).read_bytes())
    backbone = Backbone(config)
    export_backbone(backbone, tmp_path / "hf", tokenizer)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    assert model.config.eos_token_id == 0 and model.config.bos_token_id is None
    tokens = torch.randint(0, 131, (70,))
    with torch.no_grad():
        torch.testing.assert_close(backbone_logits(backbone, tokens), model(tokens[None]).logits[0], rtol=0, atol=1e-5)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")("the dog")["input_ids"]
    assert read_backbone(HfModel.open(tmp_path / "hf")).backbone_config == config


def test_another_dtype_is_written_into_weights_and_config(llama: Path, tmp_path: Path) -> None:
    backbone = read_backbone(HfModel.open(llama))
    export_backbone(backbone, tmp_path / "hf", llama, dtype=torch.bfloat16)
    assert {t.dtype for t in load_file(tmp_path / "hf" / "model.safetensors").values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("change", [{"num_hidden_layers": 9}, {"architectures": ["FooLM"]}])
def test_a_config_of_another_model_is_not_kept(llama: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    model = HfModel.open(llama)
    (tmp_path / "tokenizer").mkdir()
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "tokenizer" / file).write_bytes((llama / file).read_bytes())
    other = {**json.loads((llama / "config.json").read_text()), **change}
    (tmp_path / "tokenizer" / "config.json").write_text(json.dumps(other))
    export_backbone(read_backbone(model), tmp_path / "hf", tmp_path / "tokenizer")
    written = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert written["num_hidden_layers"] == 4 and written["architectures"] == ["LlamaForCausalLM"]


def test_a_mistral_without_windows_stays_a_mistral(llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "mistral"
    shutil.copytree(llama, source)
    fields = json.loads((source / "config.json").read_text())
    fields |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
    (source / "config.json").write_text(json.dumps(fields))
    import_teacher(source, tmp_path / "ckpt")
    export_teacher(tmp_path / "ckpt", tmp_path / "hf")
    assert json.loads((tmp_path / "hf" / "config.json").read_text()) == fields
    assert compare_logits(tmp_path / "hf", tmp_path / "ckpt").max_abs_logit_difference < 1e-5


def test_an_existing_folder_is_kept_without_overwrite(llama: Path, tmp_path: Path) -> None:
    backbone = read_backbone(HfModel.open(llama))
    export_backbone(backbone, tmp_path / "hf", llama)
    with pytest.raises(ValueError, match="give --overwrite"):
        export_backbone(backbone, tmp_path / "hf", llama)
    export_backbone(backbone, tmp_path / "hf", llama, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
