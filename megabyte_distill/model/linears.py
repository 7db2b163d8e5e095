"""Who makes the byte side's parameters: a factory argument, so that tensor parallelism can put its own in.

"column" splits outputs over ranks, "row" splits inputs and sums, "replicated" is whole on every rank. All draw the same
numbers whatever the number of ranks.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, nn


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

    def gathered(self, whole: Tensor) -> nn.Module:
        """Layer [.., inputs] -> [.., outputs] that begins as the matrix ``whole`` [outputs, inputs], of which each rank
        has its part of the rows; every rank gets all outputs."""

    def cut(self, whole: Tensor) -> nn.Parameter:
        """A parameter of which each rank has its part along axis 0."""

    def enter(self, x: Tensor) -> Tensor:
        """x, the same on every rank, on its way into work that ranks share: its gradients are summed over them."""

    def total(self, x: Tensor) -> Tensor:
        """The sum of every rank's x, in forward and in backward: what all ranks' results depend on."""


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

    def gathered(self, whole: Tensor) -> nn.Module:
        """An ``nn.Linear`` without bias."""
        layer = nn.Linear(whole.shape[1], whole.shape[0], bias=False)
        layer.weight = nn.Parameter(whole)
        return layer

    def cut(self, whole: Tensor) -> nn.Parameter:
        """All of it."""
        return nn.Parameter(whole)

    def enter(self, x: Tensor) -> Tensor:
        """x."""
        return x

    def total(self, x: Tensor) -> Tensor:
        """x."""
        return x
