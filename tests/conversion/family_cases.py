"""Small random models of every family, of shapes that real ones rarely have all at once, and transformers' answers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHAPE: dict[str, Any] = {
    "vocab_size": 131, "hidden_size": 72, "intermediate_size": 92, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "rms_norm_eps": 3e-5, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": None,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 12345.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 12345.0, "factor": 4.0, "beta_fast": 16.0,
    "original_max_position_embeddings": 16,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 12345.0, "factor": 8.0}
THETA = {"rope_type": "default", "rope_theta": 12345.0}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, scaled": ("Llama", {"rope_parameters": LLAMA3, "head_dim": 20}),
    "llama, tied": ("Llama", {"rope_parameters": THETA, "tie_word_embeddings": True}),
    "llama, one group": ("Llama", {"num_key_value_heads": 1}),
    "llama, a head a group": ("Llama", {"num_key_value_heads": 6}),
    "mistral, window": ("Mistral", {"sliding_window": 7, "rope_parameters": THETA}),
    "qwen2, tied": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": THETA}),
    "qwen2, yarn": ("Qwen2", {"rope_parameters": YARN}),
    "qwen2, window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2}),
    "qwen3, tied": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 20, "rope_parameters": THETA}),
    "olmo2": ("Olmo2", {"rope_parameters": THETA}),
    "olmo3, scaled": (
        "Olmo3",
        {"sliding_window": 5, "rope_parameters": {"full_attention": YARN, "sliding_attention": THETA}},
    ),
    "gemma": ("Gemma", {"rope_parameters": THETA, "head_dim": 20, "num_key_value_heads": 1}),
    "gemma, untied": ("Gemma", {"tie_word_embeddings": False}),
    "gemma3, scaled": (
        "Gemma3",
        {
            "sliding_window": 5, "head_dim": 20, "query_pre_attn_scalar": 33, "sliding_window_pattern": 3,
            "rope_parameters": {"full_attention": LINEAR, "sliding_attention": {**THETA, "rope_theta": 321.0}},
        },
    ),
    "gemma3": ("Gemma3", {"sliding_window": 7, "head_dim": 32, "num_key_value_heads": 1, "tie_word_embeddings": False}),
}  # fmt: skip
"""Name → prefix of the model's class in transformers, fields over :data:`SHAPE`."""
LENGTHS = (23, 17)


def tokens() -> Tensor:
    """The packed ids [40] of two sequences."""
    return torch.randint(0, SHAPE["vocab_size"], (sum(LENGTHS),), generator=torch.Generator().manual_seed(5))


def theirs(name: str) -> Any:
    """transformers' model in fp32, its weights far from those it is born with."""
    import transformers

    prefix, fields = CASES[name]
    kind = getattr(transformers, f"{prefix}ForCausalLM")
    config = kind.config_class(**copy.deepcopy({**SHAPE, **fields}), attn_implementation="eager")
    model = kind(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            around = float(parameter.mean()) if "norm" in parameter_name else 0.0  # Gemma's are born as zeros
            parameter.copy_(around + 0.12 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def loss_of(logits: Tensor) -> Tensor:
    """Next-token loss of packed logits [40, W], each sequence by itself."""
    parts = zip(logits.split(LENGTHS), tokens().split(LENGTHS), strict=True)
    losses = [torch.nn.functional.cross_entropy(part[:-1], ids[1:], reduction="sum") for part, ids in parts]
    return torch.stack(losses).sum() / sum(LENGTHS)


def their_answers(name: str, folder: Path) -> None:
    """Writes folder/hf, and folder/answers.pt: logits [40, W] and all gradients under transformers' names."""
    model = theirs(name)
    model.save_pretrained(folder / "hf")
    logits = torch.cat([model(ids[None]).logits[0] for ids in tokens().split(LENGTHS)])
    loss_of(logits).backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    torch.save({"logits": logits.detach(), "gradients": gradients}, folder / "answers.pt")
