"""How many floating-point operations a piece of work takes, counted while it runs."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_PRODUCTS = {"": 2, "_backward": 5}
"""Products of queries, keys and width in a fused attention's forward and backward."""
_KINDS = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
_ATTENTION = {f"_scaled_dot_product_{kind}{way}": count for kind in _KINDS for way, count in _PRODUCTS.items()}


class FlopCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While active, adds up the multiplications and additions of matrix products and attention.

    A product of [m, k] by [k, n] counts 2·m·k·n; fused attention counts half of its square where it is causal. What
    is computed again in the backward pass counts again; elementwise work does not count.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.flops = 0
        """Counted so far, on this rank."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet.__name__ in _ATTENTION:
            self.flops += _attention_flops(func, args, kwargs or {})
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        return result


def _attention_flops(func: Any, args: Any, kwargs: Any) -> int:
    given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    batch, heads, queries, width = given["query"].shape
    whole: int = 2 * _ATTENTION[func._overloadpacket.__name__] * batch * heads * queries * given["key"].shape[2] * width
    return whole // 2 if given.get("is_causal", False) else whole
