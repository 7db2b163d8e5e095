"""Every operator the byte side calls; the model knows these signatures and nothing behind them.

All are plain torch and run on any device. Where a fused implementation was put in place (``dispatch``), it runs instead
of a body here; ``reference.py`` is the definition that both agree with. Accumulation is in fp32 (fp64 for fp64 inputs).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megabyte_distill.config.model import ChunkPooling, DechunkMode
from megabyte_distill.kernels.chunk_index import ChunkIndex, index_chunks, threshold_bits
from megabyte_distill.kernels.chunk_pooling import pool_rows
from megabyte_distill.kernels.dispatch import fused
from megabyte_distill.kernels.recurrence import linear_recurrence
from megabyte_distill.kernels.segment_conv import segment_conv
from megabyte_distill.kernels.ssm_scan import ssm_scan

__all__ = [
    "ChunkIndex",
    "accumulation_dtype",
    "boundary_bits",
    "byte_embedding",
    "chunk_index",
    "chunk_pool",
    "dechunk",
    "dechunk_residual",
    "joint_cross_entropies",
    "joint_cross_entropy",
    "ngram_embedding",
    "rms_norm",
    "routing_probabilities",
    "segment_conv",
    "soften",
    "ssm_scan",
    "straight_through_confidence",
    "swiglu",
]

P_CLAMP = 1e-4
"""The EMA's weights stay this far from 0 and 1, as the paper's."""
_NO_NULL_GROUP = "dechunk got mode official without null_group; pass the [E] state read before the first end"


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 where the input is fp64."""
    return torch.promote_types(dtype, torch.float32)


def byte_embedding(
    byte_ids: Tensor,
    table: Tensor,
    added: Tensor | None = None,
    norm_weight: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Rows of ``table`` [256, D] for byte_ids [P], plus ``added`` [P, D], then RMSNorm if ``norm_weight`` [D] is given.

    Returns:
        [P, D] in fp32 (fp64 for an fp64 table): a residual stream; in norm_weight's dtype if normed.
    """
    run = fused("byte_embedding", byte_ids, table, added, norm_weight)
    if run is not None:
        result: Tensor = run(byte_ids, table, added, norm_weight, eps)
        return result
    rows = F.embedding(byte_ids, table).to(accumulation_dtype(table.dtype))
    if added is not None:
        rows = rows + added
    return rows if norm_weight is None else rms_norm(rows, norm_weight, eps)


def ngram_embedding(byte_ids: Tensor, indices: Tensor, table: Tensor, ngram_table: Tensor) -> Tensor:
    """Rows of ``table`` [256, D] for byte_ids [P], plus the rows ``indices`` [P, T] int64 of ``ngram_table`` [N, D].

    Returns:
        [P, D] in fp32 (fp64 for fp64 tables): a residual stream.
    """
    run = fused("ngram_embedding", byte_ids, indices, table, ngram_table)
    if run is not None:
        result: Tensor = run(byte_ids, indices, table, ngram_table)
        return result
    rows = F.embedding(byte_ids, table).to(accumulation_dtype(table.dtype))
    for index in indices.unbind(1):
        rows = rows + F.embedding(index, ngram_table)
    return rows


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last axis, computed in fp32, returned in weight's dtype."""
    dtype = accumulation_dtype(x.dtype)
    normed: Tensor = _RMSNorm.apply(x.to(dtype), weight.to(dtype), eps)  # type: ignore[no-untyped-call]
    return normed.to(weight.dtype)


class _RMSNorm(torch.autograd.Function):
    """Written out because torch's own backward on a CPU makes about twice the passes over x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scale: Tensor = (torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1] + eps).rsqrt()
        ctx.save_for_backward(x, weight, scale)
        return (x * scale).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        products = (grad * x).reshape(-1, x.shape[-1])
        flat_scale = scale.reshape(-1)
        grad_weight = flat_scale @ products
        along = (products @ weight) * flat_scale.pow(3) / -x.shape[-1]
        grad_x = (grad * weight).mul_(scale).addcmul_(x, along.view(scale.shape))
        return grad_x, grad_weight, None


def swiglu(value: Tensor, gate: Tensor) -> Tensor:
    """value · silu(gate), elementwise."""
    return value * F.silu(gate)


def routing_probabilities(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> Tensor:
    """p_t = (1 − cos(q_t, k_{t+1})) / 2, and 1 at every segment's last byte.

    Args:
        q, k: [P, E] projections of the encoder's output.
        cu_seqlens: [S+1], the segments of the P bytes.

    Returns:
        [P] fp32 (fp64 for fp64 inputs) in [0, 1]. No gradient flows at a segment's last byte.
    """
    run = fused("routing_probabilities", q, k, cu_seqlens)
    if run is not None:
        result: Tensor = run(q, k, cu_seqlens)
        return result
    dtype = accumulation_dtype(q.dtype)
    if q.shape[0] == 0:
        return q.new_zeros(0, dtype=dtype)
    cosine = pair_cosine(q[:-1], k[1:])
    p = F.pad((1.0 - cosine) / 2.0, (0, 1), value=1.0).clamp(0.0, 1.0)
    return p.index_fill(0, cu_seqlens[1:].to(torch.int64) - 1, 1.0)


def pair_cosine(q: Tensor, k: Tensor) -> Tensor:
    """Cosine of corresponding rows of q and k [..., E] in fp32; a zero row has cosine 0 with everything."""
    dtype = accumulation_dtype(q.dtype)
    q, k = q.to(dtype), k.to(dtype)
    return F.cosine_similarity(q, k, dim=-1, eps=1e-8)


def boundary_bits(
    p: Tensor, byte_ids: Tensor, is_text: Tensor | None = None, threshold: float = 0.5, start_byte: int | None = None
) -> Tensor:
    """Where the router ends a chunk: bits [P] bool, p above the threshold.

    Args:
        p: [P] routing probabilities.
        byte_ids: [P] int64.
        is_text: [P] bool; each run of what is not text is one chunk, whatever its p. None: all is text.
        threshold: in units of p.
        start_byte: this byte always ends a chunk; None for no such byte.
    """
    run = fused("boundary_bits", p, byte_ids, is_text) or threshold_bits
    bits: Tensor = run(p, byte_ids, is_text, threshold, start_byte)
    return bits


def chunk_index(bits: Tensor, cu_seqlens: Tensor, bucket: int) -> ChunkIndex:
    """The chunks that bits [P] bool cut segments cu_seqlens [S+1] into, padded to a multiple of ``bucket`` chunks.

    Their number depends on the data: it is read back to the host once.
    """
    run = fused("chunk_index", bits, cu_seqlens) or index_chunks
    index: ChunkIndex = run(bits, cu_seqlens, bucket)
    return index


def chunk_pool(
    r: Tensor, begins: Tensor, ends: Tensor, num_chunks: int, pooling: ChunkPooling = ChunkPooling.LAST
) -> Tensor:
    """One state a chunk from the states of its bytes.

    Args:
        r: [P, E] states of the bytes.
        begins, ends: [M] int64, a chunk's first and last byte; not read from ``num_chunks`` on.
        num_chunks: real chunks; the rest is padding.
        pooling: last: the end byte's state. mean_last: the mean of mean and last. max: elementwise; the gradient goes
            to the first byte that has the maximum.

    Returns:
        [M, E] in r's dtype, accumulated in fp32; zero rows on padding.
    """
    run = fused("chunk_pool", r, begins, ends) or pool_rows
    pooled: Tensor = run(r, begins, ends, num_chunks, pooling)
    return pooled


def dechunk(
    h: Tensor,
    p: Tensor,
    *,
    ends: Tensor,
    chunk_of_byte: Tensor,
    starts: Tensor,
    mode: DechunkMode,
    null_group: Tensor | None = None,
) -> Tensor:
    """The chunk state each byte reads.

    Args:
        h: [M, E] backbone states.
        p: [P] routing probabilities; hard mode does not look at them.
        ends: [M] int64, a chunk's last byte.
        chunk_of_byte: [P] int64, the last chunk of the byte's segment that ended at or before it; −1 before the first.
        starts: [M] bool, first chunk of a segment.
        mode: hard reads h; causal reads h at the end byte and the EMA after it; official reads the EMA.
        null_group: [E], read where chunk_of_byte is −1; needed in official mode only.

    Returns:
        [P, E] in h's dtype; the EMA is accumulated in fp32.
    """
    if mode is DechunkMode.HARD:
        return h.index_select(0, chunk_of_byte)
    dtype = accumulation_dtype(h.dtype)
    weight = p.to(dtype).index_select(0, ends).clamp(P_CLAMP, 1.0 - P_CLAMP)
    if mode is DechunkMode.CAUSAL:
        weight = weight.masked_fill(starts, 1.0)
    decay = (1.0 - weight).masked_fill(starts, 0.0)
    states = linear_recurrence(decay[:, None], (weight[:, None] * h.to(dtype))[:, None])[:, 0].to(h.dtype)
    index_P = torch.arange(p.shape[0], device=p.device)
    if mode is DechunkMode.CAUSAL:
        # One gather from both tables: rows M and up are the raw states that a chunk's own end byte reads.
        ending = ends.index_select(0, chunk_of_byte) == index_P
        return torch.cat((states, h)).index_select(0, chunk_of_byte + ending * h.shape[0])
    if null_group is None:
        raise ValueError(_NO_NULL_GROUP)
    table = torch.cat((null_group.to(h.dtype)[None], states))
    return table.index_select(0, chunk_of_byte + 1)


def dechunk_residual(
    h: Tensor,
    p: Tensor,
    confidence: Tensor,
    residual: Tensor,
    *,
    ends: Tensor,
    chunk_of_byte: Tensor,
    starts: Tensor,
    mode: DechunkMode,
    null_group: Tensor | None = None,
) -> Tensor:
    """:func:`dechunk`, :func:`straight_through_confidence` and the residual from the encoder in one.

    Args:
        h, p, ends, chunk_of_byte, starts, mode, null_group: as in :func:`dechunk`.
        confidence: [P] probability of the decision taken; only its gradient counts.
        residual: [P, E] added to what each byte reads.

    Returns:
        [P, E] in h's dtype.

    Raises:
        ValueError: in official mode without null_group.
    """
    if mode is DechunkMode.OFFICIAL and null_group is None:
        raise ValueError(_NO_NULL_GROUP)
    layout = {"ends": ends, "chunk_of_byte": chunk_of_byte, "starts": starts}
    run = fused("dechunk_residual", h, p, confidence, residual, null_group, *layout.values())
    if run is not None:
        result: Tensor = run(h, p, confidence, residual, **layout, mode=mode, null_group=null_group)
        return result
    s = dechunk(h, p, **layout, mode=mode, null_group=null_group)
    return straight_through_confidence(s, confidence) + residual


def straight_through_confidence(s: Tensor, p_selected: Tensor) -> Tensor:
    """s [P, E] unchanged; backward hands p_selected [P] the gradient Σ_E ds · s, as if s had been multiplied by it."""
    result: Tensor = _StraightThrough.apply(s, p_selected)  # type: ignore[no-untyped-call]
    return result


class _StraightThrough(torch.autograd.Function):
    """Multiplication by a factor whose forward value is one and whose gradient is the identity."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, p_selected: Tensor) -> Tensor:
        ctx.save_for_backward(s)
        ctx.p_dtype = p_selected.dtype
        return s.view_as(s)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        if not ctx.needs_input_grad[1]:
            return grad, None
        (s,) = ctx.saved_tensors
        dtype = accumulation_dtype(s.dtype)
        return grad, (grad.to(dtype) * s.to(dtype)).sum(-1).to(ctx.p_dtype)


def joint_cross_entropy(logits: Tensor, targets: Tensor, *, overwrite_logits: bool = False) -> Tensor:
    """Nats of each byte's target under softmax(logits), not reduced.

    Args:
        logits: [P, 512].
        targets: [P] int64 joint classes, or [P, 512] floating distributions over them.
        overwrite_logits: nobody else needs the logits, so that the backward may put their gradient in their place.

    Returns:
        [P] fp32 (fp64 for fp64 logits): the cross-entropy −Σ target · log softmax.
    """
    is_soft = targets.is_floating_point()
    labels, distribution = (None, targets) if is_soft else (targets, None)
    run = fused("joint_cross_entropies", logits, labels, distribution)
    if run is not None:
        result: Tensor = run(logits, labels, distribution, overwrite_logits)[int(is_soft)]
        return result
    dtype = accumulation_dtype(logits.dtype)
    return F.cross_entropy(logits.to(dtype), targets.to(dtype) if is_soft else targets, reduction="none")


def joint_cross_entropies(
    logits: Tensor,
    labels: Tensor,
    distribution: Tensor,
    *,
    temperature: float = 1.0,
    hard_has_gradient: bool = True,
    overwrite_logits: bool = False,
) -> tuple[Tensor, Tensor]:
    """:func:`joint_cross_entropy` against labels [P] and against a distribution [P, 512], each [P], in one pass.

    ``temperature`` T is of the second alone, which is Hinton's loss then (arXiv 1503.02531): T² times the cross-entropy
    of softmax(logits / T) against the distribution to the power of 1 / T, normalised again. Gradients keep their size.
    Without ``hard_has_gradient`` the first is a measure only.
    """
    if temperature != 1.0:
        with torch.set_grad_enabled(torch.is_grad_enabled() and hard_has_gradient):
            hard = joint_cross_entropy(logits, labels, overwrite_logits=overwrite_logits)
        # a copy in the precision in which losses accumulate: nobody else has it, and bf16 logits are not rounded again
        scaled = logits.to(accumulation_dtype(logits.dtype), copy=True).div_(temperature)
        softened = soften(distribution, temperature)
        return hard, temperature**2 * joint_cross_entropy(scaled, softened, overwrite_logits=True)
    run = fused("joint_cross_entropies", logits, labels, distribution)
    if run is not None:
        hard, soft = run(logits, labels, distribution, overwrite_logits)
        return (hard if hard_has_gradient else hard.detach()), soft
    with torch.set_grad_enabled(torch.is_grad_enabled() and hard_has_gradient):
        hard = joint_cross_entropy(logits, labels)
    return hard, joint_cross_entropy(logits, distribution)


def soften(distribution: Tensor, temperature: float) -> Tensor:
    """Rows of a distribution [P, C] to the power of 1 / temperature, normalised again; a row of zeros stays one."""
    largest = distribution.amax(-1, keepdim=True)
    # over the largest first, or a power of a small temperature would leave nothing
    powers = (distribution / largest.masked_fill(largest == 0, 1.0)).pow_(1.0 / temperature)
    total = powers.sum(-1, keepdim=True)
    return powers.div_(total.masked_fill_(total == 0, 1.0))
