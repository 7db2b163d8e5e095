"""A backbone's weights in the order in which a step reads them, whoever's layers they belong to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from megabyte_distill.config.model import BackboneConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLayer:
    """One layer. Matrices are [out, in]."""

    projections: list[tuple[Tensor, Tensor | None]]
    """Matrices and biases that make queries, keys and values, which lie one behind the other as they stand here."""
    query_at: list[int]
    """Where each head begins in them."""
    key_at: list[int]
    """Where each group begins."""
    value_at: list[int]
    out: Tensor
    up: list[Tensor]
    """The gate's and the value's matrix, or one with the gate first."""
    down: Tensor
    norm_before_attention: Tensor | None
    """What it multiplies by, as all norms here; None where there is none."""
    norm_behind_attention: Tensor | None
    """On what it adds."""
    norm_before_mlp: Tensor | None
    norm_behind_mlp: Tensor | None
    query_norm: Tensor | None
    key_norm: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBackbone:
    """All layers, and the norm behind them."""

    config: BackboneConfig
    layers: list[StepLayer]
    final_norm: Tensor
