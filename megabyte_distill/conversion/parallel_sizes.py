"""Whether a backbone can be cut over given tensor- and pipeline-parallel sizes."""

from __future__ import annotations

from megabyte_distill.config.model import BackboneConfig, QkNorm


def check_parallel_sizes(
    config: BackboneConfig,
    *,
    tensor_parallel: int,
    pipeline_parallel: int,
    flags: tuple[str, str] = ("--tp", "--pp"),
    virtual_stages: int | None = None,
    layers_per_virtual_stage: int | None = None,
    align_layers: int = 0,
) -> None:
    """ValueError that names everything that T = ``tensor_parallel`` ranks cannot share, or P stages not divide.

    A checkpoint itself knows no sizes: this is about the model that will load it. ``flags``: their names in messages.
    ``virtual_stages`` or ``layers_per_virtual_stage``: how a stage's layers are cut further; ``align_layers``: how many
    the first of all stages must have.
    """
    tp, pp = flags
    for name, size in ((tp, tensor_parallel), (pp, pipeline_parallel)):
        if size < 1:
            raise ValueError(f"{name} is {size}; expected 1 or more")
    divided = {
        "attention heads": config.num_attention_heads,
        "MLP's width": config.ffn_hidden_size,
        "padded vocabulary": config.padded_vocab_size,
    }
    problems = [
        f"{name} {size} is not divisible by {tp} {tensor_parallel}"
        for name, size in divided.items()
        if size % tensor_parallel
    ]
    problems += _group_problems(config, tensor_parallel, tp)
    if config.num_layers % pipeline_parallel:
        problems.append(f"layers {config.num_layers} is not divisible by {pp} {pipeline_parallel}")
    else:
        layers = config.num_layers // pipeline_parallel
        for flag, number in (
            ("--num-virtual-stages-per-pipeline-rank", virtual_stages),
            ("--num-layers-per-virtual-pipeline-stage", layers_per_virtual_stage),
        ):
            if number and layers % number:
                problems.append(f"layers {layers} of a pipeline rank is not divisible by {flag} {number}")
        first = layers_per_virtual_stage or layers // (virtual_stages or 1)
        if align_layers > first:
            where = "" if first == config.num_layers else " of the first pipeline stage, on which alone 1a works"
            problems.append(f"--align-layers {align_layers} is more than the {first} layers{where}")
    if problems:
        raise ValueError(f"this {config.family} cannot be cut so: {'; '.join(problems)}; choose other sizes")


def _group_problems(config: BackboneConfig, tensor_parallel: int, flag: str) -> list[str]:
    """megatron repeats query groups where there are fewer than ranks, but cannot cut a norm over all of them then."""
    groups = config.num_query_groups
    if groups % tensor_parallel == 0:
        return []
    if tensor_parallel % groups:
        return [f"query groups {groups} neither divides {flag} {tensor_parallel} nor is divisible by it"]
    if config.qk_norm is QkNorm.FULL:
        return [
            f"query groups {groups} is not divisible by {flag} {tensor_parallel}, which its norm over all keys needs"
        ]
    return []
