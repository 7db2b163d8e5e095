"""Tiny random Hugging Face models on disk, with shapes chosen to be awkward, and a world of one process."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megabyte_distill.parallel.process_groups import World
from megabyte_distill.parallel.process_groups import world as process_groups

transformers = pytest.importorskip("transformers", reason="the reference for conversion; pip install .[hf]")

MakeLlama = Callable[..., Path]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with process_groups() as current:
        yield current


def write_tokenizer(folder: Path) -> None:
    """A byte-level BPE of 130 ids, fewer than any model here has rows."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    letters = [chr(c) for c in range(33, 127)] + ["Ġ"]
    text = ["the quick brown fox asks the lazy dog in the old town, and nobody knows why it does"] * 4
    trainer = trainers.BpeTrainer(
        vocab_size=130, initial_alphabet=letters, special_tokens=["<|endoftext|>"], show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))


@pytest.fixture(scope="session")
def make_llama(tmp_path_factory: pytest.TempPathFactory) -> MakeLlama:
    """Writes a random Llama (4 layers, GQA groups of 3, head_dim ≠ E / heads, W = 200) and a tokenizer."""

    def make(*, dtype: torch.dtype = torch.float32, shard: str = "5GB", **fields: Any) -> Path:
        folder = tmp_path_factory.mktemp("hf")
        base: dict[str, Any] = {
            "vocab_size": 200, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 4,
            "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16, "rms_norm_eps": 1e-4,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5e4}, "max_position_embeddings": 256,
            "tie_word_embeddings": False, "bos_token_id": None, "eos_token_id": 0,
        }  # fmt: skip
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**base, **fields}))
        for name, parameter in model.named_parameters():
            if "norm" in name:
                torch.nn.init.uniform_(parameter, 0.5, 1.5)
            else:
                torch.nn.init.normal_(parameter, std=0.15)
        model.to(dtype).save_pretrained(folder, max_shard_size=shard)
        write_tokenizer(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def llama(make_llama: MakeLlama) -> Path:
    """One model for tests that only read it or copy it."""
    return make_llama()
