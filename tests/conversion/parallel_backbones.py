"""Under torchrun: every case of family_cases.py at one tensor and pipeline parallel size, against transformers.

    torchrun --nproc-per-node N tests/conversion/parallel_backbones.py FOLDER T P OUTPUT

Writes to OUTPUT what is furthest from them, by case: logits, and gradients where there are no pipeline stages, of
several ranks without and with sequence parallelism.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

from megabyte_distill.conversion.families import family_named  # noqa: E402 - after the path is set
from megabyte_distill.conversion.teacher_folder import load_teacher  # noqa: E402
from megabyte_distill.model.backbone import Backbone  # noqa: E402
from megabyte_distill.parallel.process_groups import world  # noqa: E402
from tests.conversion.family_cases import LENGTHS, loss_of, tokens  # noqa: E402


def cu_seqlens() -> Tensor:
    return torch.tensor([0, LENGTHS[0], sum(LENGTHS)], dtype=torch.int32)


def pipelined_logits(backbone: Backbone) -> Tensor | None:
    """On the last stage; None on the others."""
    from megatron.core import parallel_state

    if backbone.pre_process:
        hidden = backbone(backbone.embed(tokens()), cu_seqlens())
    else:
        received = torch.empty(sum(LENGTHS), 1, backbone.backbone_config.hidden_size)
        dist.recv(received, parallel_state.get_pipeline_model_parallel_prev_rank())
        hidden = backbone(received, cu_seqlens())
    if not backbone.post_process:
        dist.send(hidden.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
        return None
    return backbone.logits(hidden)


def whole(name: str, parameter: Tensor, value: Tensor) -> Tensor:
    """A gradient put together from all tensor-parallel ranks."""
    if not getattr(parameter, "tensor_model_parallel", False):
        return value
    parts = [torch.empty_like(value) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, value.contiguous())
    if "linear_fc1" in name:  # each rank has its part of gate, then of up
        halves = [part.chunk(2) for part in parts]
        return torch.cat([torch.cat(half) for half in zip(*halves, strict=True)])
    return torch.cat(parts, dim=parameter.partition_dim)


def gradient_distance(backbone: Backbone, expected: dict[str, Tensor]) -> float:
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads

    ddp = DistributedDataParallel(backbone.config, DistributedDataParallelConfig(), backbone)
    ddp.zero_grad_buffer()
    loss_of(backbone.logits(ddp(backbone.embed(tokens()), cu_seqlens()))).backward()
    finalize_model_grads([ddp])
    config = backbone.backbone_config
    table = family_named(config.family).table(config, backbone.padded_vocab_size)
    wanted = dict(table.to_ours(lambda name: expected[name]))
    found = {name: whole(name, p, p.main_grad) for name, p in backbone.named_parameters()}
    assert found.keys() == wanted.keys()
    return max(float((found[name] - wanted[name]).abs().max()) for name in wanted)


def measure(folder: Path) -> dict[str, float]:
    answers = torch.load(folder / "answers.pt")
    backbone = load_teacher(folder / "megatron").backbone
    result = {}
    if backbone.pre_process and backbone.post_process:
        result["gradients"] = gradient_distance(backbone, answers["gradients"])
        if backbone.config.tensor_model_parallel_size > 1:
            cut = load_teacher(folder / "megatron", overrides={"sequence_parallel": True}).backbone
            result["gradients"] = max(result["gradients"], gradient_distance(cut, answers["gradients"]))
    with torch.no_grad():
        logits = pipelined_logits(backbone)
    if logits is not None:
        result["logits"] = float((logits - answers["logits"]).abs().max())
    return result


def main() -> None:
    folder, tensor, pipeline, output = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    with world(tensor_parallel=tensor, pipeline_parallel=pipeline):
        results = {case.name: measure(case) for case in sorted(folder.iterdir())}
        everyone: list[dict[str, dict[str, float]]] = [{}] * dist.get_world_size()
        dist.all_gather_object(everyone, results)
        if dist.get_rank() == 0:
            worst: dict[str, dict[str, float]] = {case: {} for case in results}
            for one in everyone:
                for case, found in one.items():
                    for name, value in found.items():
                        worst[case][name] = max(value, worst[case].get(name, 0.0))
            output.write_text(json.dumps(worst))


if __name__ == "__main__":
    main()
