"""The definitions, one loop each: slow on purpose, read by people, compared with by the tests of ``ops``.

Differentiable by torch's autograd; every function takes what its namesake in ``ops`` takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megabyte_distill.config.model import ChunkPooling, DechunkMode


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight over the last axis."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def swiglu(value: Tensor, gate: Tensor) -> Tensor:
    """value · gate · sigmoid(gate)."""
    return value * gate * torch.sigmoid(gate)


def byte_embedding(byte_ids: Tensor, table: Tensor, added: Tensor | None = None) -> Tensor:
    """table[byte] + added, row by row."""
    rows = torch.stack([table[int(byte)] for byte in byte_ids])
    return rows if added is None else rows + added


def ngram_embedding(byte_ids: Tensor, indices: Tensor, table: Tensor, ngram_table: Tensor) -> Tensor:
    """table[byte] + the sum of ngram_table[indices], row by row."""
    rows = [table[int(byte)] + ngram_table[own].sum(0) for byte, own in zip(byte_ids, indices, strict=True)]
    return torch.stack(rows) if rows else table[:0]


def routing_probabilities(q: Tensor, k: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(1 − cos(q_t, k_{t+1})) / 2 inside a segment, 1 at its last byte; [P]. A zero row has cosine 0 with all."""
    lasts = {int(edge) - 1 for edge in cu_seqlens[1:]}
    p = []
    for t in range(q.shape[0]):
        if t in lasts:
            p.append(q.new_ones(()))
        else:
            lengths = q[t].norm().clamp(min=1e-8) * k[t + 1].norm().clamp(min=1e-8)
            p.append((1 - q[t] @ k[t + 1] / lengths) / 2)
    return torch.stack(p) if p else q.new_zeros(0)


def chunk_pool(r: Tensor, bits: Tensor, cu_seqlens: Tensor, pooling: ChunkPooling) -> Tensor:
    """Walks the bytes of each segment from the bits alone; r [P, E], bits [P] -> [chunks, E], without padding."""
    out = []
    for first, last in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        chunk: list[Tensor] = []
        for t in range(first, last):
            chunk.append(r[t])
            if not bool(bits[t]):
                continue
            rows = torch.stack(chunk)
            if pooling is ChunkPooling.LAST:
                out.append(rows[-1])
            elif pooling is ChunkPooling.MEAN_LAST:
                out.append((rows.mean(0) + rows[-1]) / 2)
            else:
                first_largest = (rows == rows.max(0).values).to(torch.int8).argmax(0)
                out.append(rows.gather(0, first_largest[None])[0])
            chunk = []
    return torch.stack(out) if out else r[:0]


def dechunk(
    h: Tensor, p: Tensor, bits: Tensor, cu_seqlens: Tensor, mode: DechunkMode, null_group: Tensor | None = None
) -> Tensor:
    """Walks the bytes of each segment as a reader would, from the bits alone; h [M, E], p [P], bits [P] -> [P, E]."""
    out, chunk = [], -1
    for first, last in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        state: Tensor | None = None
        for t in range(first, last):
            raw = None
            if bool(bits[t]):
                chunk += 1
                raw = h[chunk]
                weight = p[t].clamp(1e-4, 1 - 1e-4)
                if mode is DechunkMode.HARD or (mode is DechunkMode.CAUSAL and state is None):
                    state = raw
                else:
                    state = weight * raw + (1 - weight) * (torch.zeros_like(raw) if state is None else state)
            read = raw if mode is DechunkMode.CAUSAL and raw is not None else state
            if read is None:
                if null_group is None:
                    raise ValueError(f"byte {t} stands before its segment's first end and no null_group was given")
                read = null_group
            out.append(read)
    return torch.stack(out)


def dechunk_residual(
    h: Tensor,
    p: Tensor,
    confidence: Tensor,
    residual: Tensor,
    bits: Tensor,
    cu_seqlens: Tensor,
    mode: DechunkMode,
    null_group: Tensor | None = None,
) -> Tensor:
    """What each byte reads, times a factor that is one and whose gradient is confidence's, plus residual."""
    s = dechunk(h, p, bits, cu_seqlens, mode, null_group)
    one = 1 + confidence - confidence.detach()
    return s * one.to(s.dtype)[:, None] + residual


def segment_conv(x: Tensor, weight: Tensor, bias: Tensor | None, cu_seqlens: Tensor, dilation: int = 1) -> Tensor:
    """Causal depthwise convolution, each segment by itself; x [P, C], weight [C, K] with the byte's own tap last."""
    taps = weight.shape[1]
    out = []
    for first, last in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        for t in range(first, last):
            row = torch.zeros_like(x[t]) if bias is None else bias
            for k in range(taps):
                if t - k * dilation >= first:
                    row = row + weight[:, taps - 1 - k] * x[t - k * dilation]
            out.append(row)
    return torch.stack(out)


def ssm_scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The recurrence S_t = exp(dt_t a) S_{t−1} + dt_t x_t b_tᵀ, y_t = S_t c_t; shapes as in ``ops.ssm_scan``."""
    starts = set(cu_seqlens[:-1].tolist())
    state = x.new_zeros(*x.shape[1:], b.shape[-1])
    out = []
    for t in range(x.shape[0]):
        if t in starts:
            state = torch.zeros_like(state)
        written = (dt[t, :, None] * x[t])[..., None] * b[t]
        state = torch.exp(dt[t] * a)[:, None, None] * state + written
        out.append(state @ c[t])
    return torch.stack(out)


def joint_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """−log softmax(logits) at the target, or its mean under a target distribution; [P]."""
    logs = logits - logits.exp().sum(-1, keepdim=True).log()
    if targets.is_floating_point():
        return -(targets * logs).sum(-1)
    if not targets.numel():
        return logs.sum(-1)
    return -torch.stack([row[int(target)] for row, target in zip(logs, targets, strict=True)])


def softened_cross_entropy(logits: Tensor, distribution: Tensor, temperature: float) -> Tensor:
    """T² times the cross-entropy of softmax(logits / T) against distribution^(1/T), row by row normalised; [P]."""
    rows = []
    for p in distribution:
        powers = torch.where(p > 0, p, 1.0).pow(1 / temperature) * (p > 0)
        rows.append(powers / powers.sum() if bool(p.any()) else powers)
    targets = torch.stack(rows) if rows else distribution
    return temperature**2 * joint_cross_entropy(logits / temperature, targets)
