"""The estimate as a table, and where the backbone's shape comes from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megabyte_distill.config import Settings
from megabyte_distill.config.model import BackboneConfig
from megabyte_distill.config.published import PUBLISHED_BACKBONES
from megabyte_distill.conversion.families import family_of_config
from megabyte_distill.conversion.hf_config import HfConfig
from megabyte_distill.conversion.model_config import MODEL_CONFIG_FILE, read_model_config
from megabyte_distill.memory.estimate import RankMemory

GIB = 2**30
BYTES_PER_CHUNK = 4.4
"""Mean length of a token of a large vocabulary in English text."""
_COLUMNS = (
    ("stage", 5), ("pipeline", 8), ("parameters", 10), ("trained", 8), ("weights", 8), ("teacher", 8),
    ("gradients", 9), ("optimizer", 9), ("activations", 23), ("total GiB", 9),
)  # fmt: skip


def backbone_of(settings: Settings, hf_model: Path | None = None) -> BackboneConfig:
    """The shape of a Hugging Face folder, of what ``--load`` names if it is there, or of the published model.

    ValueError where none of them says it.
    """
    if hf_model is not None:
        fields = HfConfig.read(hf_model)
        return family_of_config(fields).read_config(fields)
    load, preset = settings.checkpoint.load, settings.model.preset
    if load is not None and (Path(load) / MODEL_CONFIG_FILE).is_file():
        return read_model_config(Path(load)).backbone
    if preset not in PUBLISHED_BACKBONES:
        raise ValueError(
            f"--preset {preset} is no published model whose shape is known; give --load CKPT (a converted teacher that "
            f"is there), or one of --preset {', '.join(PUBLISHED_BACKBONES)}"
        )
    return PUBLISHED_BACKBONES[preset]


def heading(settings: Settings, backbone: BackboneConfig, world_size: int, bytes_per_chunk: float) -> str:
    """What the table is of."""
    parallel = settings.parallel
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    virtual = parallel.virtual_stages(backbone.num_layers)
    interleaved = f" (of {virtual} virtual stages each)" if virtual > 1 else ""
    precision = "bf16 weights, fp32 masters" if settings.run.bf16 else "fp32"
    return (
        f"--preset {settings.model.preset}: {world_size} ranks = tensor {tensor} × pipeline {pipeline}{interleaved} "
        f"× data {parallel.data_parallel_size(world_size)}; {precision}; {bytes_per_chunk} bytes a chunk; "
        "sizes in GiB a rank"
    )


def table(memories: Iterable[RankMemory]) -> Iterable[str]:
    """The lines, each as soon as its rank is reckoned; the largest of each stage is marked behind the last."""
    yield "  ".join(name.rjust(width) for name, width in _COLUMNS)
    worst: dict[str, RankMemory] = {}
    for memory in memories:
        yield _line(memory)
        if memory.stage not in worst or memory.total > worst[memory.stage].total:
            worst[memory.stage] = memory
    largest = max(worst.values(), key=lambda memory: memory.total)
    yield (
        f"largest: {largest.total / GIB:.2f} GiB, stage {largest.stage} on pipeline rank {largest.pipeline_rank}; "
        "an allocator's waste, NCCL's buffers and CUDA's own gigabyte come on top"
    )


def as_json(memory: RankMemory) -> dict[str, Any]:
    """Bytes by name, sums included."""
    return {**asdict(memory), "total": memory.total}


def _line(memory: RankMemory) -> str:
    parts = memory.virtual_stages
    kept = " + ".join(f"{part.in_flight} × {part.kept / GIB:.2f}" for part in parts)
    activations = f"{memory.activations / GIB:.2f} ({kept}, {max(part.peak for part in parts) / GIB:.2f})"
    cells = (
        memory.stage,
        str(memory.pipeline_rank),
        f"{memory.parameters / 1e9:.4f} B",
        f"{memory.trained / 1e9:.4f} B",
        *(f"{size / GIB:.2f}" for size in (memory.weights, memory.teacher, memory.gradients, memory.optimizer)),
        activations,
        f"{memory.total / GIB:.2f}",
    )
    return "  ".join(cell.rjust(width) for cell, (_, width) in zip(cells, _COLUMNS, strict=True))
