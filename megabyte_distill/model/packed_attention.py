"""Causal attention inside packed segments, in plain torch: of the backbone's layers and of local attention.

megatron's layers in training and the transformer of a Hugging Face export both call this file.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Sequence[int],
    window: int | None = None,
    scale: float | None = None,
    cu_seqlens: Tensor | None = None,
) -> Tensor:
    """Causal attention inside each of several segments, grouped queries included.

    Args:
        query: [N, heads, d], rotated.
        key, value: [N, groups, d].
        lengths: of the segments, N in all.
        window: positions each attends to, its own included; None for all.
        scale: of the products; default 1 / √d.
        cu_seqlens: [S + 1] int32, the lengths cumulated, where they are at hand on the device: on a GPU all segments go
            through torch's flash attention in one call then, in bf16 and fp16.

    Returns:
        [N, heads · d].
    """
    if cu_seqlens is not None and _flash_takes(query):
        return _flash(query, key, value, cu_seqlens, max(lengths, default=0), window, scale)
    if query.shape[0] == 0:
        return query.flatten(1)
    key, value = (_one_per_head(x, query) for x in (key, value))
    # [1, heads, N, d]
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
    parts = [torch.split(x, list(lengths), dim=2) for x in (query, key, value)]
    out = [_segment(q, k, v, window, scale) for q, k, v in zip(*parts, strict=True)]
    joined = out[0] if len(out) == 1 else torch.cat(out, dim=2)
    return joined[0].transpose(0, 1).reshape(joined.shape[2], -1)


def _one_per_head(x: Tensor, query: Tensor) -> Tensor:
    """Keys or values [N, groups, d], repeated so that each head of the query has its own."""
    repeat = query.shape[1] // x.shape[1]
    return x.repeat_interleave(repeat, dim=1) if repeat > 1 else x


@functools.cache
def _flash_options() -> frozenset[str] | None:
    """Names of the arguments of torch's attention over packed segments; None where this torch has none with windows."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    names = frozenset(inspect.signature(varlen_attn).parameters)
    return names if "window_size" in names else None


def _flash_takes(query: Tensor) -> bool:
    """Whether the fused attention can run: torch 2.11 or newer, a GPU, 16 bits, heads of up to 256."""
    fits = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16) and query.shape[0] > 0
    return fits and query.shape[2] % 8 == 0 and query.shape[2] <= 256 and _flash_options() is not None


def _flash(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, window: int | None, scale: float | None
) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    options: dict[str, Any] = {"window_size": (-1 if window is None else window - 1, 0), "scale": scale}
    if "enable_gqa" in (_flash_options() or ()):
        options["enable_gqa"] = key.shape[1] != query.shape[1]
    else:
        key, value = (_one_per_head(x, query) for x in (key, value))
    out = varlen_attn(query, key, value, cu_seqlens, cu_seqlens, longest, longest, **options)
    assert isinstance(out, Tensor)  # no auxiliary results were asked for
    return out.reshape(out.shape[0], -1)


def _segment(query: Tensor, key: Tensor, value: Tensor, window: int | None, scale: float | None) -> Tensor:
    """Causal attention within one segment, [1, heads, L, d] each."""
    if window is not None and query.shape[2] > window:
        return windowed_attention(query, key, value, window, scale)
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)


def windowed_attention(query: Tensor, key: Tensor, value: Tensor, window: int, scale: float | None = None) -> Tensor:
    """Causal attention to the last ``window`` positions, one's own included; [1, heads, L, d] each, memory L × window.

    Queries go in blocks of ``window``, each against its own block of keys and the one before.
    """
    heads, length, width = query.shape[1:]
    count = -(-length // window)
    padding = count * window - length
    query = F.pad(query, (0, 0, 0, padding)).view(heads, count, window, width).transpose(0, 1)
    key, value = (
        F.pad(x, (0, 0, window, padding)).unfold(2, 2 * window, window)[0].permute(1, 0, 3, 2) for x in (key, value)
    )
    own, other = torch.arange(window, device=query.device)[:, None], torch.arange(2 * window, device=query.device)
    visible = ((other > own) & (other <= own + window)).repeat(count, 1, 1, 1)
    visible[0, ..., :window] = False  # in front of the segment
    out = F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale)
    return out.transpose(0, 1).reshape(1, heads, count * window, width)[:, :, :length]
