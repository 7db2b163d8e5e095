"""The backbone's layers from Transformer Engine: its linear layers and norms, and its attention over packed segments.

Only megatron-core's wrappers of them are named here, and only where Transformer Engine can be used: without it
megatron-core puts stand-ins in their place.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer import ModuleSpec
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn

from megabyte_distill import optional
from megabyte_distill.config.model import Activation, BackboneConfig
from megabyte_distill.model.attention import CachedRows, PackedSegments, SegmentAttention
from megabyte_distill.model.backbone_layers import LayerParts


class EngineAttention(SegmentAttention):
    """Rotates at the same exact angles as the local layers, in ``turn``, and leaves the attention itself to ``core``.

    ``core`` is built as megatron's TEDotProductAttention is, and called with rotated queries [N, heads, d], keys and
    values [N, groups, d] in the format "thd". ``turn`` is called as megatron's fused_apply_rotary_pos_emb is, each
    position with its own angles. Steps with a cache stay ours.
    """

    def __init__(
        self,
        config: Any,
        *arguments: Any,
        backbone: BackboneConfig,
        core: Any,
        turn: Callable[[Tensor, Tensor], Tensor],
        **options: Any,
    ) -> None:
        super().__init__(config, *arguments, backbone=backbone, **options)
        self.turn = turn
        window = self.reach.window
        if window is not None:
            # megatron's wrapper reads the window from its configuration; positions before one's own, and behind it
            config = copy.copy(config)
            config.window_size, config.window_attn_skip_freq = (window - 1, 0), None
        self.core = core(config, *arguments, **options)

    def rotated(self, x: Tensor, carrier: PackedSegments | CachedRows) -> Tensor:
        """Heads [N, 1, heads, d] at their positions → [N, heads, d]."""
        if not isinstance(carrier, PackedSegments) or carrier.angles is None:
            return super().rotated(x, carrier)
        return self.turn(x, self.reach.choose(carrier.angles)[:, None, None]).squeeze(1)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, segments: PackedSegments) -> Tensor:
        """Rotated queries [N, heads, d], keys and values [N, groups, d] of packed segments → [N, heads · d]."""
        attended: Tensor = self.core(
            query, key, value, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=thd(segments)
        )
        return attended.reshape(query.shape[0], -1)


def thd(segments: PackedSegments) -> PackedSeqParams:
    """The same segments in the words of Transformer Engine; no segment has padding inside."""
    longest = max(segments.lengths, default=0)
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=segments.cu_seqlens,
        cu_seqlens_kv=segments.cu_seqlens,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def engine_parts(backbone: BackboneConfig) -> LayerParts:
    """Transformer Engine's layers. ValueError where it cannot be used here."""
    why = optional.engine_problem()
    if why is not None:
        raise ValueError(f"layers of Transformer Engine were asked for, but the package transformer_engine {why}")
    from megatron.core.extensions import transformer_engine as engine

    return LayerParts(
        column=engine.TEColumnParallelLinear,
        norm_column=engine.TELayerNormColumnParallelLinear,
        row=engine.TERowParallelLinear,
        norm=engine.TENorm,
        head_norm=engine.TENorm,
        core_attention=ModuleSpec(
            module=EngineAttention,
            params={
                "backbone": backbone,
                "core": engine.TEDotProductAttention,
                "turn": engine.fused_apply_rotary_pos_emb,
            },
        ),
        turns_by_angles=True,
        gate=_swiglu() if backbone.activation is Activation.SILU else None,
    )


def _swiglu() -> Callable[[Tensor], Tensor]:
    """silu(first half) · second half, as a function: it has no state."""
    swiglu = importlib.import_module("transformer_engine.pytorch.ops").SwiGLU()
    return lambda x: swiglu(x)


def requantize_weights(model: nn.Module) -> None:
    """Have Transformer Engine's layers take their weights anew in the next forward, which may have changed since.

    They keep the FP8 copies of a micro-batch for the next ones. megatron's schedules do this for a module that is
    megatron's at its top, and a student is not.
    """
    name = "is_first_microbatch"
    for module in model.modules():
        if hasattr(module, name):
            setattr(module, name, True)
