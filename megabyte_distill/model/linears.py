"""Who makes the byte side's linear layers: a factory argument, so that tensor parallelism can put its own in.

"column" splits outputs over ranks, "row" splits inputs and sums, "replicated" is whole on every rank.
"""

from __future__ import annotations

from typing import Protocol

from torch import nn


class LinearFactory(Protocol):
    """Makes linear layers from *global* sizes; ``shards`` says into how many parts column and row layers are cut."""

    @property
    def shards(self) -> int:
        """Tensor-parallel ranks; a module divides the sizes of its own sharded parameters by it."""

    def column(self, inputs: int, outputs: int, bias: bool = False) -> nn.Module:
        """Layer [.., inputs] -> [.., outputs / shards]."""

    def row(self, inputs: int, outputs: int, bias: bool = False) -> nn.Module:
        """Layer [.., inputs / shards] -> [.., outputs], summed over ranks."""

    def replicated(self, inputs: int, outputs: int, bias: bool = False) -> nn.Module:
        """Layer [.., inputs] -> [.., outputs], the same on every rank."""


class PlainLinears:
    """Everything on one rank: ``nn.Linear`` with PyTorch's default initialisation."""

    shards = 1

    def column(self, inputs: int, outputs: int, bias: bool = False) -> nn.Module:
        """An ``nn.Linear``."""
        return nn.Linear(inputs, outputs, bias=bias)

    def row(self, inputs: int, outputs: int, bias: bool = False) -> nn.Module:
        """An ``nn.Linear``."""
        return nn.Linear(inputs, outputs, bias=bias)

    def replicated(self, inputs: int, outputs: int, bias: bool = False) -> nn.Module:
        """An ``nn.Linear``."""
        return nn.Linear(inputs, outputs, bias=bias)
