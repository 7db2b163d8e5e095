"""The byte-level student: encoder, router, the teacher's transformer, decoder. ``forward`` and ``step`` agree.

A backbone is anything with ``forward(x [M, E], cu_chunks)``, ``init_cache(rows)``, ``step(x [K, E], cache, rows)`` and
``extend(x [N, E], cache, rows, offsets)``:
megatron's layers in training, plain torch in an export. The model does not know which stage trains it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Flag, auto
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from megabyte_distill.config.model import ByteSideConfig, ChunkPooling, DechunkMode
from megabyte_distill.model.byte_decoder import (
    ByteDecoder,
    DechunkState,
    dechunk_step,
    dechunk_steps,
    init_dechunk_state,
)
from megabyte_distill.model.byte_encoder import ByteEncoder, EncoderSpan, EncoderState
from megabyte_distill.model.byte_stack import StackSpan, StackState
from megabyte_distill.model.chunking import (
    ChunkLayout,
    PoolState,
    chunk_layout,
    init_pool_state,
    pool_chunks,
    pool_step,
    pool_steps,
)
from megabyte_distill.model.linears import LinearFactory
from megabyte_distill.model.router import Router, decide


class ByteRow(Protocol):
    """What the model reads of a packed row (data/packing.PackedRow has more)."""

    byte_ids: Tensor
    bits: Tensor
    is_real: Tensor
    cu_seqlens: Tensor
    chunk_bucket: int


@dataclass(frozen=True, slots=True)
class Gold:
    """Boundaries of the teacher's tokenizer, as the row brings them."""


@dataclass(frozen=True, slots=True)
class RouterDecides:
    """Boundaries where the router's p exceeds the threshold."""

    threshold: float = 0.5


@dataclass(frozen=True, slots=True)
class Given:
    """Boundaries from elsewhere: bits [P] bool."""

    bits: Tensor


Boundaries = Gold | RouterDecides | Given


class Parts(Flag):
    """Which parts of the model run."""

    ENCODER = auto()
    ROUTER = auto()
    BACKBONE = auto()
    DECODER = auto()
    ALL = ENCODER | ROUTER | BACKBONE | DECODER


@dataclass(frozen=True, slots=True)
class Carried:
    """What goes from one pipeline stage to the next beside the backbone's state."""

    p: bool = False
    r: bool = False
    teacher: bool = False
    """The state of a teacher that runs beside the student."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentOutputs:
    """Everything a loss or a score may need; None for parts that did not run."""

    r: Tensor | None = None
    """[P, E] encoder states, in the teacher's embedding space; None where only those at chunk ends were needed."""
    chunks: Tensor | None = None
    """[M, E] states of the chunks, pooled from their bytes' states, zero on padding; None where the router ran and
    nothing behind it."""
    p: Tensor | None = None
    """[P] fp32 routing probabilities."""
    bits: Tensor | None = None
    """[P] bool, the boundaries in force."""
    layout: ChunkLayout | None = None
    hidden: Tensor | None = None
    """[M, E] backbone states after the final norm; on a pipeline stage that is not the last, its own [M, 1, E]."""
    logits: Tensor | None = None
    """[P, 512] joint logits of the next (byte, bit)."""


@dataclass
class StudentState:
    """What R rows remember between bytes. :meth:`Student.step` updates it in place."""

    encoder: EncoderState
    decoder: StackState
    pool: PoolState
    dechunk: DechunkState
    cache: Any
    r_previous: Tensor
    """[R, E]."""

    def select(self, rows: Tensor) -> StudentState:
        """A copy of some rows [K] int64; a row may be taken several times."""
        return replace(self.without_cache(rows), cache=self.cache.select(rows))

    def without_cache(self, rows: Tensor) -> StudentState:
        """A copy of some rows [K] int64 that leaves the backbone's cache behind."""
        return StudentState(
            encoder=self.encoder.select(rows),
            decoder=self.decoder.select(rows),
            pool=self.pool.select(rows),
            dechunk=self.dechunk.select(rows),
            cache=None,
            r_previous=self.r_previous[rows],
        )

    def put(self, rows: Tensor, sub: StudentState) -> None:
        """Overwrite the rows [K] int64 with those of ``sub`` in order, in place."""
        self.put_beside_cache(rows, sub)
        self.cache.put(rows, sub.cache)

    def put_beside_cache(self, rows: Tensor, sub: StudentState) -> None:
        """:meth:`put` of a state from :meth:`without_cache`."""
        self.encoder.put(rows, sub.encoder)
        self.decoder.put(rows, sub.decoder)
        self.pool.put(rows, sub.pool)
        self.dechunk.put(rows, sub.dechunk)
        self.r_previous[rows] = sub.r_previous


@dataclass(frozen=True, slots=True)
class StudentSpan:
    """T bytes that K rows have read at once (:meth:`Student.steps`) and may still take back."""

    state: StudentState
    before: StudentState
    """Of the K rows, without their caches."""
    rows: Tensor
    bits: Tensor
    """[K, T]."""
    r: Tensor
    """[K, T, E]."""
    chunks: Tensor
    """[K, T, E], states of the chunks that would end at each byte."""
    h: Tensor
    """[K, T, E], the backbone's states of those that end, zeros elsewhere."""
    encoder: EncoderSpan
    decoder: StackSpan
    pool: Callable[[Tensor], PoolState]
    dechunk: Callable[[Tensor], DechunkState]

    def keep(self, counts: Tensor) -> None:
        """Move the state on by the first ``counts`` [K] int64 bytes of each row, 0 to T; once."""
        row = torch.arange(counts.shape[0], device=counts.device)
        states = torch.cat((self.before.r_previous[:, None], self.r), dim=1)
        after = StudentState(
            encoder=self.encoder.after(counts),
            decoder=self.decoder.after(counts),
            pool=self.pool(counts),
            dechunk=self.dechunk(counts),
            cache=None,
            r_previous=states[row, counts],
        )
        self.state.put_beside_cache(self.rows, after)
        is_kept = torch.arange(self.bits.shape[1], device=counts.device) < counts[:, None]
        self.state.cache.lengths[self.rows] += (self.bits & is_kept).sum(1)


class Student(nn.Module):
    """A distribution over (byte, boundary bit) sequences around a given backbone."""

    byte_encoder: ByteEncoder
    router: Router
    byte_decoder: ByteDecoder

    def __init__(self, config: ByteSideConfig, backbone: nn.Module, linears: LinearFactory | None = None) -> None:
        """``linears`` makes the byte side's parameters (default: whole ones).

        Of a backbone that is cut by pipeline stages (``pre_process``, ``post_process``), the first stage has encoder
        and router, the last the decoder; each draws the same weights as without stages.
        """
        super().__init__()
        self.byte_side_config = config
        self.pooling = ChunkPooling(config.chunk_pooling)
        self.pre_process: bool = getattr(backbone, "pre_process", True)
        self.post_process: bool = getattr(backbone, "post_process", True)
        self.vp_stage: int = getattr(backbone, "vp_stage", 0)  # megatron's name, whose schedules compare it
        # on the CPU also where transformers builds on the meta device
        seeds = torch.randint(2**31, (3,), device="cpu").tolist()
        # not "decoder": megatron's schedules take a module of that name for a transformer block
        for name, part, seed, is_here in (
            ("byte_encoder", ByteEncoder, seeds[0], self.pre_process),
            ("router", Router, seeds[1], self.pre_process),
            ("byte_decoder", ByteDecoder, seeds[2], self.post_process),
        ):
            with _drawn_from(seed):
                self.register_module(name, part(config, linears) if is_here else None)
        self.backbone = backbone
        self.config = getattr(backbone, "config", None)
        self._mode = DechunkMode(config.dechunk_mode)
        self._input: Any = None

    @property
    def is_official(self) -> bool:
        """True where the paper's dechunk, with its lookahead, is in force."""
        return self._mode is DechunkMode.OFFICIAL

    @property
    def share_embeddings_and_output_weights(self) -> bool:
        """Asked by megatron: whether first and last stage train a copy each of one embedding."""
        weight = self.shared_embedding_or_output_weight()
        return weight is not None and weight.requires_grad

    def shared_embedding_or_output_weight(self) -> Tensor | None:
        """This stage's copy of a tied token embedding, None where there is none."""
        weight: Tensor | None = getattr(self.backbone, "tied_weight", None)
        return weight

    def set_input_tensor(self, tensor: Any) -> None:
        """Megatron's schedules leave here what came from the pipeline stage before."""
        self._input = tensor[0] if isinstance(tensor, list) else tensor

    def take_input(self) -> Tensor | None:
        """What :meth:`set_input_tensor` left, once."""
        taken: Tensor | None = self._input
        self._input = None
        return taken

    def carried(self, boundaries: Boundaries, parts: Parts) -> Carried:
        """What stages behind the first need of it."""
        return Carried(p=self._needs_p(boundaries, parts), r=Parts.DECODER in parts)

    def _needs_p(self, boundaries: Boundaries, parts: Parts) -> bool:
        # in hard mode p carries no value, so a router that is not needed need not run
        reads = Parts.DECODER in parts and self._mode is not DechunkMode.HARD
        return reads or Parts.ROUTER in parts or isinstance(boundaries, RouterDecides)

    def forward(
        self,
        row: ByteRow,
        boundaries: Boundaries | None = None,
        parts: Parts = Parts.ALL,
        arrived: StudentOutputs | None = None,
    ) -> StudentOutputs:
        """Run ``parts`` over a packed row with the given boundaries (default: gold).

        ``arrived``: on a pipeline stage that is not the first, what the stage before returned.
        """
        boundaries = boundaries or Gold()
        entered = self._encode(row, boundaries, parts) if arrived is None else self._resumed(row, boundaries, arrived)
        if Parts.BACKBONE not in parts:
            return entered
        assert entered.layout is not None and entered.bits is not None
        hidden = self.backbone(entered.chunks if arrived is None else arrived.hidden, entered.layout.cu_chunks)
        logits = None
        if Parts.DECODER in parts and self.post_process:
            assert entered.r is not None
            confidence = entered.bits.float() if entered.p is None else entered.p
            logits = self.byte_decoder(
                hidden, entered.r, confidence, row.byte_ids, entered.layout, row.cu_seqlens, entered.bits
            )
        return replace(entered, hidden=hidden, logits=logits)

    def _resumed(self, row: ByteRow, boundaries: Boundaries, arrived: StudentOutputs) -> StudentOutputs:
        """What arrived, with boundaries and layout made anew: the same on every stage."""
        bits = self._bits(row, boundaries, arrived.p)
        return replace(arrived, bits=bits, layout=chunk_layout(bits, row.cu_seqlens, row.chunk_bucket))

    def _encode(self, row: ByteRow, boundaries: Boundaries, parts: Parts) -> StudentOutputs:
        """Everything before the backbone."""
        cu_seqlens = row.cu_seqlens
        x = self.byte_encoder.mix(row.byte_ids, cu_seqlens)
        needs_p = self._needs_p(boundaries, parts)
        # the encoder's head works byte by byte: where only chunk ends are read, it runs only there
        only_ends = self.pooling is ChunkPooling.LAST and not needs_p and Parts.DECODER not in parts
        r = None if only_ends else self.byte_encoder.project(x)
        p = self.router(r, cu_seqlens) if needs_p else None
        if parts == Parts.ENCODER | Parts.ROUTER:
            return StudentOutputs(r=r, p=p)
        bits = self._bits(row, boundaries, p)
        layout = chunk_layout(bits, cu_seqlens, row.chunk_bucket)
        if r is None:
            chunks = self.byte_encoder.project(pool_chunks(x, layout))
        else:
            chunks = pool_chunks(r, layout, self.pooling)
        return StudentOutputs(r=r, chunks=chunks, p=p, bits=bits, layout=layout)

    def _bits(self, row: ByteRow, boundaries: Boundaries, p: Tensor | None) -> Tensor:
        if isinstance(boundaries, Gold):
            return row.bits
        if isinstance(boundaries, Given):
            return self._checked(boundaries.bits, row)
        assert p is not None
        return decide(p.detach(), row.byte_ids, boundaries.threshold, official=self.is_official, is_text=row.is_real)

    def _checked(self, bits: Tensor, row: ByteRow) -> Tensor:
        """ValueError where a segment's first byte is no end: there is no chunk that its bytes could read."""
        is_start_end = bits[row.cu_seqlens[:-1].to(torch.int64)]
        if not self.is_official and not bool(is_start_end.all()):
            first = int(row.cu_seqlens[int((~is_start_end).nonzero()[0, 0])])
            raise ValueError(f"given bits: byte {first} begins a segment and must end a chunk (BOS is one of its own)")
        return bits

    def init_state(self, rows: int) -> StudentState:
        """The state of R rows whose first byte (BOS, bit 1) comes next."""
        device, dtype = self.byte_encoder.embedding.weight.device, self.byte_encoder.embedding.weight.dtype
        width = self.byte_side_config.backbone_width
        return StudentState(
            encoder=self.byte_encoder.init_state(rows),
            decoder=self.byte_decoder.init_state(rows),
            pool=init_pool_state(rows, width, self.pooling, device, dtype),
            dechunk=init_dechunk_state(rows, width, device, dtype),
            cache=self.backbone.init_cache(rows),  # type: ignore[operator]
            r_previous=torch.zeros(rows, width, device=device, dtype=dtype),
        )

    @torch.no_grad()
    def step(
        self,
        byte_ids: Tensor,
        bits: Tensor,
        state: StudentState,
        rows: Tensor | None = None,
        guess: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Read one byte and its bit in each of K rows; return joint logits [K, 512] of what comes next.

        byte_ids [K] int64, bits [K] bool, rows [K] int64 distinct rows of the state (default: all). The state is
        updated in place. Equal to :meth:`forward` with the same bits, except where ``guess`` (chunks [N, E] that end
        here, their rows [N]) → states [N, E] stands in for the backbone, whose cache stays as it is then. ValueError in
        official mode, which cannot step.
        """
        # all rows: the new state takes the old one's place; some: they are copied out and back
        own = state if rows is None else state.without_cache(rows)
        r, own.encoder = self.byte_encoder.step(byte_ids, own.encoder)
        p_previous = r.new_ones(r.shape[0], dtype=torch.float32)
        if self._mode is DechunkMode.CAUSAL:
            p_previous = self.router.step(own.r_previous, r)
        chunks, own.pool = pool_step(own.pool, r, bits, self.pooling)
        h = torch.zeros_like(r)
        ended = bits.nonzero()[:, 0]
        if ended.shape[0]:
            where = ended if rows is None else rows[ended]
            if guess is not None:
                h[ended] = guess(chunks[ended], where).to(h.dtype)
            else:
                h[ended] = self.backbone.step(chunks[ended], state.cache, where).to(h.dtype)  # type: ignore[operator]
        s, own.dechunk = dechunk_step(own.dechunk, bits, h, p_previous, self._mode)
        logits, own.decoder = self.byte_decoder.step(s, r, byte_ids, own.decoder)
        own.r_previous = r
        if rows is not None:
            state.put_beside_cache(rows, own)
        return logits

    @torch.no_grad()
    def steps(
        self, byte_ids: Tensor, bits: Tensor, state: StudentState, rows: Tensor | None = None
    ) -> tuple[Tensor, StudentSpan]:
        """The next T bytes of each of K rows at once; logits [K, T, 512] equal to those of as many :meth:`step`.

        byte_ids [K, T] int64, bits [K, T] bool, rows as in :meth:`step`. The state stays in front of them until
        :meth:`StudentSpan.keep` says how many count. A row with fewer is filled up with any bytes and bits False.
        """
        index = torch.arange(state.r_previous.shape[0], device=byte_ids.device) if rows is None else rows
        own = state.without_cache(index)
        r, encoder = self.byte_encoder.steps(byte_ids, own.encoder)
        p_previous = r.new_ones(byte_ids.shape, dtype=torch.float32)
        if self._mode is DechunkMode.CAUSAL:
            before = torch.cat((own.r_previous[:, None], r[:, :-1]), dim=1)
            p_previous = self.router.step(before.flatten(0, 1), r.flatten(0, 1)).view(byte_ids.shape)
        chunks, pool = pool_steps(own.pool, r, bits, self.pooling)
        h = torch.zeros_like(r)
        row, place = bits.nonzero(as_tuple=True)
        if row.shape[0]:
            offsets = bits.cumsum(1)[row, place] - 1
            found = self.backbone.extend(chunks[row, place], state.cache, index[row], offsets)  # type: ignore[operator]
            h[row, place] = found.to(h.dtype)
        s, dechunk = dechunk_steps(own.dechunk, bits, h, p_previous, self._mode)
        logits, decoder = self.byte_decoder.steps(s, r, byte_ids, own.decoder)
        return logits, StudentSpan(state, own, index, bits, r, chunks, h, encoder, decoder, pool, dechunk)


@contextmanager
def _drawn_from(seed: int) -> Iterator[None]:
    """Random numbers inside come from ``seed``; those outside go on as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def set_trainable(module: nn.Module, prefixes: Sequence[str]) -> None:
    """Give gradients to the parameters whose names start with one of the prefixes, and to no others."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name.startswith(tuple(prefixes)))
