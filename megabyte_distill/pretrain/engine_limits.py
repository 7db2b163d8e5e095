"""What FP8 asks of the backbone's sizes and of the device, checked before anything is built."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megabyte_distill.config import Settings
from megabyte_distill.config.engine import EngineConfig, Fp8Recipe
from megabyte_distill.config.model import BackboneConfig

FIRST_CAPABILITY = {
    Fp8Recipe.DELAYED: (8, 9),
    Fp8Recipe.TENSORWISE: (8, 9),
    Fp8Recipe.BLOCKWISE: (9, 0),
    Fp8Recipe.MXFP8: (10, 0),
}
"""Compute capability from which on Transformer Engine runs a recipe: Ada, Hopper, Blackwell."""
NO_MXFP8_FROM = (12, 0)
"""Transformer Engine has not all its products for consumer Blackwell."""


def check_engine_limits(settings: Settings, backbone: BackboneConfig, device: torch.device) -> None:
    """ValueError that names everything for which ``backbone`` or ``device`` cannot run FP8 as the settings ask."""
    if settings.engine.fp8_format is None:
        return
    parallel = settings.parallel
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    problems = [
        *_sizes(settings.engine, backbone, parallel.tensor_model_parallel_size),
        *_layers_in_bf16(settings.engine, backbone.num_layers // parallel.pipeline_model_parallel_size),
        *device_problems(settings.engine.fp8_recipe, capability),
    ]
    if problems:
        raise ValueError("; ".join(problems))


def _sizes(engine: EngineConfig, backbone: BackboneConfig, ranks: int) -> Iterator[str]:
    """Every dimension of a weight is one that a product runs along, forward or backward."""
    heads, groups = backbone.num_attention_heads // ranks, max(1, backbone.num_query_groups // ranks)
    found = {
        "the hidden size": backbone.hidden_size,
        "a rank's queries, keys and values": (heads + 2 * groups) * backbone.head_dim,
        "a rank's heads": heads * backbone.head_dim,
        "a rank's part of the MLP": backbone.ffn_hidden_size // ranks,
    }
    multiple = engine.chunk_multiple
    uneven = ", ".join(f"{name} ({size})" for name, size in found.items() if size % multiple)
    if uneven:
        yield (
            f"--fp8-recipe {engine.fp8_recipe.value} needs widths that are multiples of {multiple}, which {uneven} of "
            "this teacher are not; choose another --tensor-model-parallel-size, or leave --fp8-format out"
        )


def _layers_in_bf16(engine: EngineConfig, layers: int) -> Iterator[str]:
    for name in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        kept = getattr(engine, name)
        if engine.first_last_layers_bf16 and kept > layers:
            yield f"--{name.replace('_', '-')} {kept}: a pipeline stage has {layers} layers, give at most that"


def device_problems(recipe: Fp8Recipe, capability: tuple[int, int] | None) -> Iterator[str]:
    """What keeps a GPU of a compute capability (None: no GPU) from running a recipe."""
    first = FIRST_CAPABILITY[recipe]
    if capability is None:
        yield f"--fp8-recipe {recipe.value} runs on GPUs alone, and there is none"
    elif capability < first or (recipe is Fp8Recipe.MXFP8 and capability >= NO_MXFP8_FROM):
        below = f", below {NO_MXFP8_FROM[0]}.{NO_MXFP8_FROM[1]}" if recipe is Fp8Recipe.MXFP8 else ""
        runs = [other.value for other, need in FIRST_CAPABILITY.items() if need <= capability]
        instead = ", ".join(name for name in runs if name != recipe.value) or "none; leave --fp8-format out"
        yield (
            f"--fp8-recipe {recipe.value} needs compute capability {first[0]}.{first[1]} or more{below}, and this GPU "
            f"has {capability[0]}.{capability[1]}; recipes that it runs: {instead}"
        )
