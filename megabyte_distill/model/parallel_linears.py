"""The byte side's parameters cut over tensor-parallel ranks, in megatron's layers."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn

from megabyte_distill.model.linears import LinearFactory, PlainLinears


def total_over_ranks(x: Tensor) -> Tensor:
    """An all-reduce in both directions (megatron's own has an identity backward).

    Each rank's results depend on the whole sum, and each rank's part goes into it.
    """
    total: Tensor = tensor_parallel.reduce_from_tensor_model_parallel_region(x)
    total = tensor_parallel.copy_to_tensor_model_parallel_region(total)
    return total


class _Column(tensor_parallel.ColumnParallelLinear):  # type: ignore[misc]
    """Without the bias that megatron's returns beside the result."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = super().forward(x)[0]
        return result


class _Row(tensor_parallel.RowParallelLinear):  # type: ignore[misc]
    """Without the bias that megatron's returns beside the result."""

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = super().forward(x)[0]
        return result


class TensorParallelLinears:
    """A :class:`LinearFactory` over the tensor-parallel ranks of the process groups."""

    def __init__(self) -> None:
        self.shards = parallel_state.get_tensor_model_parallel_world_size()
        self._rank = parallel_state.get_tensor_model_parallel_rank()
        # bytes are the same on every rank, whatever sequence parallelism does to the backbone's chunks
        self._config = TransformerConfig(
            num_layers=1,
            hidden_size=self.shards,
            num_attention_heads=self.shards,
            tensor_model_parallel_size=self.shards,
            use_cpu_initialization=True,
            perform_initialization=False,
            gradient_accumulation_fusion=False,
        )

    def column(self, inputs: int, outputs: int, bias: bool = False) -> nn.Module:
        """megatron's ColumnParallelLinear. ValueError where the outputs cannot be split."""
        self._check(outputs)
        layer = _Column(inputs, outputs, init_method=None, bias=bias, gather_output=False, **self._options)
        return self._filled(layer, outputs, inputs, along=0)

    def row(self, inputs: int, outputs: int, bias: bool = False) -> nn.Module:
        """megatron's RowParallelLinear. ValueError where the inputs cannot be split."""
        self._check(inputs)
        layer = _Row(inputs, outputs, init_method=None, bias=bias, input_is_parallel=True, **self._options)
        return self._filled(layer, outputs, inputs, along=1)

    def replicated(self, inputs: int, outputs: int, bias: bool = False) -> nn.Module:
        """An ``nn.Linear``."""
        return PlainLinears().replicated(inputs, outputs, bias)

    def gathered(self, whole: Tensor) -> nn.Module:
        """megatron's ColumnParallelLinear that gathers its outputs. ValueError where they cannot be split."""
        outputs, inputs = whole.shape
        self._check(outputs)
        layer = _Column(inputs, outputs, init_method=None, bias=False, gather_output=True, **self._options)
        with torch.no_grad():
            layer.get_parameter("weight").copy_(whole.chunk(self.shards)[self._rank])
        tensor_parallel.set_tensor_model_parallel_attributes(layer.get_parameter("weight"), True, 0, 1)
        return layer

    def cut(self, whole: Tensor) -> nn.Parameter:
        """ValueError where axis 0 cannot be split."""
        self._check(whole.shape[0])
        parameter = nn.Parameter(whole.chunk(self.shards)[self._rank].clone())
        tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, 0, 1)
        return parameter

    def enter(self, x: Tensor) -> Tensor:
        """Identity; the backward sums over ranks."""
        entered: Tensor = tensor_parallel.copy_to_tensor_model_parallel_region(x)
        return entered

    def total(self, x: Tensor) -> Tensor:
        """:func:`total_over_ranks`."""
        return total_over_ranks(x)

    @property
    def _options(self) -> dict[str, Any]:
        return {"config": self._config, "skip_bias_add": False}

    def _check(self, size: int) -> None:
        if size % self.shards:
            raise ValueError(
                f"a width of {size} in the byte side cannot be split over --tensor-model-parallel-size {self.shards}; "
                "choose widths that it divides"
            )

    def _filled(self, layer: nn.Module, outputs: int, inputs: int, *, along: int) -> nn.Module:
        """The layer with this rank's part of the numbers that an ``nn.Linear`` draws."""
        whole = nn.Linear(inputs, outputs, bias=layer.bias is not None)
        with torch.no_grad():
            layer.get_parameter("weight").copy_(whole.weight.chunk(self.shards, along)[self._rank])
            if whole.bias is not None:
                bias = whole.bias.chunk(self.shards)[self._rank] if along == 0 else whole.bias
                layer.get_parameter("bias").copy_(bias)
        for name, parameter in layer.named_parameters():
            if name == "weight" or along == 0:
                tensor_parallel.set_tensor_model_parallel_attributes(parameter, True, along, 1)
        return layer


def byte_side_linears() -> LinearFactory:
    """Plain layers on one tensor-parallel rank, megatron's on several."""
    return PlainLinears() if parallel_state.get_tensor_model_parallel_world_size() == 1 else TensorParallelLinears()
