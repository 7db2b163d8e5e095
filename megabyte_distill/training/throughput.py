"""How many floating-point operations a piece of work takes, counted while it runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_PRODUCTS = {"": 2, "_backward": 5}
"""Products of queries, keys and width in a fused attention's forward and backward."""
_KINDS = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
_ATTENTION = {f"_scaled_dot_product_{kind}{way}": count for kind in _KINDS for way, count in _PRODUCTS.items()}
_PACKED = {f"_varlen_attn{way}": count for way, count in _PRODUCTS.items()}
"""torch's attention over packed segments, always causal here."""


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
        elif packet.__name__ in _PACKED:
            given = _named(func, args, kwargs or {})
            self.flops += _PACKED[packet.__name__] * packed_product_flops(given["query"], given["cu_seq_q"])
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        return result


def packed_product_flops(query: Tensor, cu_seqlens: Tensor) -> int:
    """Of one causal product of queries [N, heads, d] and keys in each of the segments cu_seqlens [S + 1]."""
    squares = (cu_seqlens[1:] - cu_seqlens[:-1]).double().square().sum()
    return int(query.shape[1] * query.shape[2] * squares.item())


def _named(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    given: dict[str, Any] = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)}
    given.update(kwargs)
    return given


def _attention_flops(func: Any, args: Any, kwargs: Any) -> int:
    given = _named(func, args, kwargs)
    batch, heads, queries, width = given["query"].shape
    whole: int = 2 * _ATTENTION[func._overloadpacket.__name__] * batch * heads * queries * given["key"].shape[2] * width
    return whole // 2 if given.get("is_causal", False) else whole
