"""How many floating-point operations a piece of work takes, counted while it runs."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from torch.utils.hooks import RemovableHandle

ENGINE = "megatron.core.extensions.transformer_engine"
"""Where megatron-core defines its wrappers of Transformer Engine's layers."""
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
        self._hook: RemovableHandle | None = None

    def __enter__(self) -> FlopCount:
        self._hook = register_module_forward_hook(self._count_engine, with_kwargs=True)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        assert self._hook is not None
        self._hook.remove()
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def _count_engine(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """Transformer Engine's products are none of torch's operations: counted by layer, its backward with it."""
        if type(module).__module__ != ENGINE:
            return
        if "packed_seq_params" in kwargs:
            self.flops += engine_attention_flops(args[0], kwargs["packed_seq_params"].cu_seqlens_q, output)
        elif hasattr(module, "in_features"):
            self.flops += engine_linear_flops(module.weight, args[0], output[0])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        packet = func._overloadpacket
        if packet.__name__ in _ATTENTION:
            self.flops += _attention_flops(func, args, kwargs or {})
        elif packet.__name__ in _PACKED:
            given = _named(func, args, kwargs or {})
            before = (given.get("window_size") or (-1, 0))[0]
            window = None if before < 0 else before + 1
            self.flops += _PACKED[packet.__name__] * packed_product_flops(given["query"], given["cu_seq_q"], window)
        elif packet in flop_registry:
            self.flops += flop_registry[packet](*args, **(kwargs or {}), out_val=result)
        return result


def packed_product_flops(query: Tensor, cu_seqlens: Tensor, window: int | None = None) -> int:
    """Of one causal product of queries [N, heads, d] and keys in each of the segments cu_seqlens [S + 1].

    ``window``: positions that each query attends to, its own included; None for all.
    """
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).double()
    hidden = 0.0 if window is None else float((lengths - window).clamp_min(0).square().sum())
    return int(query.shape[1] * query.shape[2] * (float(lengths.square().sum()) - hidden))


def engine_linear_flops(weight: Any, x: Tensor, output: Tensor) -> int:
    """Forward of one linear layer, and backward where there will be one; weight [n, k] of this rank.

    Under sequence parallelism one of input and output is a part of the rows alone.
    """
    rows = max(x.numel() // weight.shape[1], output.numel() // weight.shape[0])
    product: int = 2 * rows * weight.numel()
    return product * (1 + (output.requires_grad and x.requires_grad) + (output.requires_grad and weight.requires_grad))


def engine_attention_flops(query: Tensor, cu_seqlens: Tensor, output: Tensor) -> int:
    """Forward of attention over packed segments, and backward where there will be one; always causal here."""
    products = sum(_PRODUCTS.values()) if output.requires_grad else _PRODUCTS[""]
    return products * packed_product_flops(query, cu_seqlens)


def _named(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    given: dict[str, Any] = {a.name: value for a, value in zip(func._schema.arguments, args, strict=False)}
    given.update(kwargs)
    return given


def _attention_flops(func: Any, args: Any, kwargs: Any) -> int:
    given = _named(func, args, kwargs)
    batch, heads, queries, width = given["query"].shape
    whole: int = 2 * _ATTENTION[func._overloadpacket.__name__] * batch * heads * queries * given["key"].shape[2] * width
    return whole // 2 if given.get("is_causal", False) else whole
