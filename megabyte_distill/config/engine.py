"""What the backbone's layers are made of, and whether its matrix products run in FP8."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from megabyte_distill.config.options import option


class TransformerImpl(str, Enum):
    """Whose layers the backbone and the teacher are built from."""

    LOCAL = "local"
    """megatron-core's own."""
    TRANSFORMER_ENGINE = "transformer_engine"
    """Transformer Engine's, for GPUs."""


class Fp8Format(str, Enum):
    """Which 8-bit numbers matrix products take."""

    E4M3 = "e4m3"
    """e4m3 throughout."""
    HYBRID = "hybrid"
    """e4m3 for activations and weights, e5m2 for their gradients."""


class Fp8Recipe(str, Enum):
    """How tensors are scaled to 8 bits."""

    DELAYED = "delayed"
    """One factor a tensor, from the largest value of passes before."""
    TENSORWISE = "tensorwise"
    """One factor a tensor, from its own largest value."""
    MXFP8 = "mxfp8"
    """One factor for each 32 numbers; Blackwell."""
    BLOCKWISE = "blockwise"
    """One factor for each 128 numbers, weights 128 × 128."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """Transformer Engine for the backbone and the teacher; the byte side stays as --bf16 says."""

    transformer_impl: TransformerImpl = option(
        TransformerImpl.LOCAL, "layers of backbone and teacher: megatron-core's or Transformer Engine's"
    )
    fp8_format: Fp8Format | None = option(
        None, "run the matrix products of backbone and teacher in FP8, through Transformer Engine"
    )
    fp8_recipe: Fp8Recipe = option(Fp8Recipe.DELAYED, "how --fp8-format scales tensors")
    first_last_layers_bf16: bool = option(False, "keep the first and the last layers out of --fp8-format")
    num_layers_at_start_in_bf16: int = option(
        1, "first layers that --first-last-layers-bf16 keeps out", unit="layers", low=0
    )
    num_layers_at_end_in_bf16: int = option(
        1, "last layers that --first-last-layers-bf16 keeps out", unit="layers", low=0
    )

    @property
    def chunk_multiple(self) -> int:
        """Rows of a matrix product on a rank must be a multiple of this; 1 where FP8 is off."""
        if self.fp8_format is None:
            return 1
        return 32 if self.fp8_recipe is Fp8Recipe.MXFP8 else 16

    @property
    def serves_twice(self) -> bool:
        """Whether one backbone can be student and teacher: FP8's delayed factors come from all passes before."""
        return self.fp8_format is None

    @property
    def transformer_fields(self) -> dict[str, object]:
        """Fields of megatron's TransformerConfig."""
        if self.fp8_format is None:
            return {"transformer_impl": self.transformer_impl.value}
        return {
            "transformer_impl": self.transformer_impl.value,
            "fp8": self.fp8_format.value,
            "fp8_recipe": self.fp8_recipe.value,
            "first_last_layers_bf16": self.first_last_layers_bf16,
            "num_layers_at_start_in_bf16": self.num_layers_at_start_in_bf16,
            "num_layers_at_end_in_bf16": self.num_layers_at_end_in_bf16,
        }
