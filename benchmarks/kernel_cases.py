"""The fused operators as they stand in a training step: inputs of text-like shape, and the bytes they cannot avoid.

A case is run through ``kernels.ops``, so whatever path is in place there is what is checked and timed. A new operator
is one function here and one line in ``CASES``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megabyte_distill.alphabet import JOINT_CLASSES
from megabyte_distill.config.model import ChunkPooling, DechunkMode
from megabyte_distill.kernels import ops
from megabyte_distill.model.chunking import ChunkLayout, chunk_layout

BYTES_PER_CHUNK = 4
SEGMENT_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """P bytes in all, in segments; D the byte side's width, E the backbone's."""

    rows: int = 65_536
    byte_width: int = 1024
    backbone_width: int = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One operator with inputs."""

    leaves: list[Tensor]
    """Differentiable inputs, as ``run`` takes them."""
    run: Callable[..., Tensor]
    upstream: Tensor
    """The gradient of the result."""
    forward_floor: int
    """Bytes: every input read once, every result written once."""
    backward_floor: int
    """Bytes: the result's gradient and the inputs that it needs read once, every input's gradient written once."""


MakeCase = Callable[[Sizes, torch.dtype, torch.device], Case]


def segment_offsets(rows: int, device: torch.device) -> Tensor:
    """cu_seqlens [S+1] int32 of ragged segments, SEGMENT_BYTES on average, less than twice that at most."""
    edges = [0]
    while edges[-1] < rows:
        edges.append(min(rows, edges[-1] + int(torch.randint(1, 2 * SEGMENT_BYTES, ()))))
    return torch.tensor(edges, dtype=torch.int32, device=device)


def text_like_ids(rows: int, device: torch.device) -> Tensor:
    """[P] int64 bytes: a few make up most, as in text."""
    weights = 1.0 / torch.arange(1, 257, device=device, dtype=torch.float32)
    return torch.multinomial(weights, rows, replacement=True)


def text_like_layout(rows: int, mode: DechunkMode, device: torch.device) -> ChunkLayout:
    """Chunks of BYTES_PER_CHUNK bytes on average."""
    cu_seqlens = segment_offsets(rows, device)
    bits = torch.rand(rows, device=device) < 1.0 / BYTES_PER_CHUNK
    if mode is not DechunkMode.OFFICIAL:
        bits[cu_seqlens[:-1].long()] = True
    bits[cu_seqlens[1:].long() - 1] = True
    return chunk_layout(bits, cu_seqlens, 256)


def _size(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _random(dtype: torch.dtype, device: torch.device, *shape: int) -> Tensor:
    return torch.randn(shape, device=device).to(dtype).requires_grad_()


def encoder_embedding(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Case:
    """F1 in front of the encoder: table rows as an fp32 residual stream."""
    byte_ids = text_like_ids(sizes.rows, device)
    table = _random(dtype, device, 256, sizes.byte_width)
    upstream = torch.randn(sizes.rows, sizes.byte_width, device=device)
    return Case(
        leaves=[table],
        run=lambda table: ops.byte_embedding(byte_ids, table),
        upstream=upstream,
        forward_floor=_size(byte_ids, table, upstream),
        backward_floor=_size(byte_ids, table, upstream),
    )


def decoder_embedding(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Case:
    """F1's second entry point, in the decoder: a table on top of the projected state."""
    byte_ids = text_like_ids(sizes.rows, device)
    table, added = _random(dtype, device, 256, sizes.byte_width), _random(dtype, device, sizes.rows, sizes.byte_width)
    upstream = torch.randn(sizes.rows, sizes.byte_width, device=device)
    return Case(
        leaves=[table, added],
        run=lambda table, added: ops.byte_embedding(byte_ids, table, added),
        upstream=upstream,
        forward_floor=_size(byte_ids, table, added, upstream),
        backward_floor=_size(byte_ids, table, added, upstream),
    )


def normed_embedding(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Case:
    """F1 with RMSNorm, the normed rows alone."""
    byte_ids = text_like_ids(sizes.rows, device)
    table, weight = _random(dtype, device, 256, sizes.byte_width), _random(dtype, device, sizes.byte_width)
    upstream = torch.randn(sizes.rows, sizes.byte_width, device=device).to(dtype)
    return Case(
        leaves=[table, weight],
        run=lambda table, weight: ops.byte_embedding(byte_ids, table, None, weight),
        upstream=upstream,
        forward_floor=_size(byte_ids, table, weight, upstream),
        backward_floor=_size(byte_ids, table, table, weight, weight, upstream),
    )


def dechunking(mode: DechunkMode, *, rows_alone: bool = False) -> MakeCase:
    """F4 in one of its modes, with the gradients that stage 2b takes, or those of h and the residual alone."""

    def make(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Case:
        layout, width = text_like_layout(sizes.rows, mode, device), sizes.backbone_width
        h = _random(dtype, device, layout.ends.shape[0], width)
        residual = _random(dtype, device, sizes.rows, width)
        p = torch.rand(sizes.rows, device=device).requires_grad_()
        confidence = torch.rand(sizes.rows, device=device).requires_grad_()
        null_group = _random(dtype, device, width)
        upstream = torch.randn(sizes.rows, width, device=device).to(dtype)
        indices = _size(layout.ends, layout.chunk_of_byte, layout.starts)

        def run(h: Tensor, p: Tensor, confidence: Tensor, residual: Tensor, null_group: Tensor) -> Tensor:
            return ops.dechunk_residual(
                h,
                p,
                confidence,
                residual,
                ends=layout.ends,
                chunk_of_byte=layout.chunk_of_byte,
                starts=layout.starts,
                mode=mode,
                null_group=null_group if mode is DechunkMode.OFFICIAL else None,
            )

        def of_rows(h: Tensor, residual: Tensor) -> Tensor:
            return run(h, p.detach(), confidence.detach(), residual, null_group.detach().to(h.dtype))

        return Case(
            leaves=[h, residual] if rows_alone else [h, p, confidence, residual, null_group],
            run=of_rows if rows_alone else run,
            upstream=upstream,
            forward_floor=_size(h, residual, upstream, p) + indices,
            # the residual's gradient is the result's own
            backward_floor=_size(h, h, upstream, p, p, confidence) + indices,
        )

    return make


def routing(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Case:
    """F2: probabilities of boundaries from the router's projections."""
    cu_seqlens = segment_offsets(sizes.rows, device)
    shape = (sizes.rows, sizes.backbone_width)
    q, k = _random(dtype, device, *shape), _random(dtype, device, *shape)
    upstream = torch.randn(sizes.rows, device=device)
    return Case(
        leaves=[q, k],
        run=lambda q, k: ops.routing_probabilities(q, k, cu_seqlens),
        upstream=upstream,
        forward_floor=_size(q, k, upstream),
        backward_floor=_size(q, k, q, k, upstream),
    )


def chunk_indices(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Case:
    """F2's second half: bits from probabilities, and every index of the chunks they make, as numbers times a scale.

    Its time is that of launches and of one number that comes to the host.
    """
    cu_seqlens, byte_ids = segment_offsets(sizes.rows, device), text_like_ids(sizes.rows, device)
    p = torch.rand(sizes.rows, device=device)
    is_text = torch.arange(sizes.rows, device=device) < sizes.rows - 7

    def run(scale: Tensor) -> Tensor:
        bits = ops.boundary_bits(p, byte_ids, is_text, 0.75, 254)
        index = ops.chunk_index(bits, cu_seqlens, 256)
        parts = (bits, index.ends, index.begins, index.chunk_of_byte, index.cu_chunks, index.starts)
        return torch.cat([part.double() for part in parts]) * scale

    scale = torch.ones(1, device=device, dtype=dtype).requires_grad_()
    with torch.no_grad():
        upstream = torch.rand_like(run(scale))
    numbers = 8 * (sizes.rows + 2 * sizes.rows // BYTES_PER_CHUNK) + sizes.rows
    floor = _size(p, byte_ids, is_text) + numbers
    return Case(leaves=[scale], run=run, upstream=upstream, forward_floor=floor, backward_floor=0)


def pooling(kind: ChunkPooling) -> MakeCase:
    """F3 in one of its kinds."""

    def make(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Case:
        layout = text_like_layout(sizes.rows, DechunkMode.HARD, device)
        r = _random(dtype, device, sizes.rows, sizes.backbone_width)
        upstream = torch.randn(layout.ends.shape[0], sizes.backbone_width, device=device).to(dtype)
        ranges = _size(layout.begins, layout.ends)
        return Case(
            leaves=[r],
            run=lambda r: ops.chunk_pool(r, layout.begins, layout.ends, layout.num_chunks, kind),
            upstream=upstream,
            forward_floor=(_size(upstream) if kind is ChunkPooling.LAST else _size(r)) + _size(upstream) + ranges,
            backward_floor=_size(upstream, r) + ranges,
        )

    return make


def cross_entropy(soft: bool) -> MakeCase:
    """F5 with overwritten logits; hard, or hard as a measure beside soft targets. The logits are made anew: a copy."""

    def make(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Case:
        source = _random(dtype, device, sizes.rows, JOINT_CLASSES)
        labels = torch.randint(0, JOINT_CLASSES, (sizes.rows,), device=device)
        distribution = torch.randn(sizes.rows, JOINT_CLASSES, device=device).softmax(-1)
        upstream = torch.randn(sizes.rows, device=device)

        def run(source: Tensor) -> Tensor:
            logits = source + 0.0  # stands for the product that makes them: the kernel may overwrite its result
            if not soft:
                return ops.joint_cross_entropy(logits, labels, overwrite_logits=True)
            pair = ops.joint_cross_entropies(
                logits, labels, distribution, hard_has_gradient=False, overwrite_logits=True
            )
            return pair[0].detach() + pair[1]

        once = _size(source, labels, upstream) + (_size(distribution) if soft else 0)
        # the copy reads and writes the logits once
        return Case(
            leaves=[source],
            run=run,
            upstream=upstream,
            forward_floor=once + _size(source, source),
            backward_floor=once + _size(source),
        )

    return make


def ngram_tables(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> Case:
    """F1 with six tables of hashed n-grams."""
    byte_ids = text_like_ids(sizes.rows, device)
    rows, tables = 8192, 6
    # a few n-grams make up much of a text, most are rare
    rank = torch.rand(sizes.rows, tables, device=device).pow(4) * rows
    indices = rank.to(torch.int64) + torch.arange(tables, device=device) * rows
    table = _random(dtype, device, 256, sizes.byte_width)
    ngram_table = _random(dtype, device, tables * rows, sizes.byte_width)
    upstream = torch.randn(sizes.rows, sizes.byte_width, device=device)
    read = tables * sizes.rows * sizes.byte_width * table.element_size()
    return Case(
        leaves=[table, ngram_table],
        run=lambda table, ngram_table: ops.ngram_embedding(byte_ids, indices, table, ngram_table),
        upstream=upstream,
        # tables of a real size are no guests of a cache: every row that is read counts
        forward_floor=_size(byte_ids, indices, table, upstream) + read,
        backward_floor=_size(byte_ids, indices, table, ngram_table, upstream),
    )


CASES: dict[str, MakeCase] = {
    "F1 table": encoder_embedding,
    "F1 table + state": decoder_embedding,
    "F1 table, normed": normed_embedding,
    "F1 n-grams": ngram_tables,
    "F2 routing": routing,
    "F2 bits and index": chunk_indices,
    "F3 last": pooling(ChunkPooling.LAST),
    "F3 mean_last": pooling(ChunkPooling.MEAN_LAST),
    "F3 max": pooling(ChunkPooling.MAX),
    "F4 hard": dechunking(DechunkMode.HARD),
    "F4 causal": dechunking(DechunkMode.CAUSAL),
    "F4 official": dechunking(DechunkMode.OFFICIAL),
    "F5 hard": cross_entropy(soft=False),
    "F5 soft": cross_entropy(soft=True),
}
"""Name, as printed → what makes it."""
UNTIMED: dict[str, MakeCase] = {
    f"F4 {mode.value}, rows alone": dechunking(mode, rows_alone=True) for mode in DechunkMode
}
"""Other kernels of the same operators: what is to be right too."""
