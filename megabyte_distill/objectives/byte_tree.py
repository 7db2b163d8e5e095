"""The teacher's vocabulary as a tree of byte prefixes over tokens sorted bytewise: a prefix is a contiguous range."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megabyte_distill.alphabet import BOS_BYTE, PAD_BYTE, joint_class
from megabyte_distill.data.token_bytes import TokenBytes
from megabyte_distill.parallel.vocabulary import VocabularyColumns

_UNUSED_CLASS = PAD_BYTE


@dataclass(frozen=True, kw_only=True, slots=True)
class ByteTree:
    """Nodes are the prefixes that some allowed token strictly extends, 0 the empty one; an edge is one more byte.

    N nodes, K edges, C token ids of this tensor-parallel rank: nodes and edges are those of the whole vocabulary on
    every rank. Places count the rank's own allowed tokens in the sorted order; exact duplicates stand side by side.
    """

    columns: VocabularyColumns
    """Which token ids the places are of."""
    vocab_size: int
    """W, the same on every rank."""
    order: Tensor
    """[C] int64 columns (ids − ``columns.first``): allowed tokens sorted by their bytes, the end of text, the others.
    Not allowed: special ids, and tokens with byte 254 or 255, which stand for the document's ends and for padding."""
    allowed: int
    """How many of them are allowed."""
    has_end_of_text: bool
    """Whether the end of text is among them; its place is ``allowed`` then."""
    entry_first: Tensor
    """[N + 1] int64, where a node's entries begin; a node of k edges, ascending by byte, has 2 · k + 1."""
    entry_place: Tensor
    """[2 K + N] int64. For each edge: where the tokens begin that are just prefix and byte, and where those that go on
    behind it do; then where the node's tokens end. An entry's tokens end where the next entry's begin."""
    entry_class: Tensor
    """[2 K + N] int64 joint class of each entry's tokens; unused at a node's end."""
    edge_key: Tensor
    """[K] int64, 256 · node + byte; ascending."""
    edge_node: Tensor
    """[K] int64, the node behind the edge; −1 where no token goes on."""
    longest: int
    """Bytes of the longest allowed token."""
    alike: tuple[tuple[int, ...], ...]
    """Ids of allowed tokens that are spelled alike, each group ascending."""

    @classmethod
    def of(cls, table: TokenBytes, columns: VocabularyColumns | None = None) -> ByteTree:
        """The tree of a vocabulary, with the places of some of its ids (default: of all).

        ValueError for a vocabulary without any token of text.
        """
        columns = columns or VocabularyColumns(0, table.vocab_size)
        lengths = table.lengths.astype(np.int64)
        ids = np.repeat(np.arange(table.vocab_size), lengths)
        forbidden = np.zeros(table.vocab_size, dtype=np.bool_)
        forbidden[ids[table.blob >= BOS_BYTE]] = True
        allowed = np.flatnonzero((lengths > 0) & ~forbidden)
        if not allowed.size:
            raise ValueError("the token table has no token of text; convert the teacher again")
        order = np.array(sorted(allowed.tolist(), key=table.__getitem__), dtype=np.int64)
        edges = _edges(table, order)
        is_own = (order >= columns.first) & (order < columns.first + columns.count)
        own_before = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(is_own)))
        entry_first, entry_place, entry_class = _entries(edges)
        own = order[is_own] - columns.first
        end_of_text = table.end_of_text_id - columns.first
        has_end_of_text = 0 <= end_of_text < columns.count
        last = np.array([end_of_text] if has_end_of_text else [], dtype=np.int64)
        others = np.setdiff1d(np.arange(columns.count), np.concatenate((own, last)))
        return cls(
            columns=columns,
            vocab_size=table.vocab_size,
            order=torch.from_numpy(np.concatenate((own, last, others))),
            allowed=own.size,
            has_end_of_text=has_end_of_text,
            entry_first=torch.from_numpy(entry_first),
            entry_place=torch.from_numpy(own_before[entry_place]),
            entry_class=torch.from_numpy(entry_class),
            edge_key=torch.from_numpy(256 * edges.node + edges.byte),
            edge_node=torch.from_numpy(edges.behind),
            longest=int(lengths[order].max()),
            alike=tuple(group for group in table.duplicates if not forbidden[group[0]]),
        )

    def to(self, device: torch.device | str) -> ByteTree:
        """The same tree with every tensor on ``device``."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: value.to(device) for name, value in tensors.items()})

    def nodes_along(self, byte_ids: Tensor, bits: Tensor) -> Tensor:
        """[P] int64: the node of the bytes since the last end, up to and with each byte; the root on ends.

        byte_ids, bits: [P]. −1 where those bytes are no prefix of any allowed token.
        """
        nodes = torch.zeros_like(byte_ids)
        place = torch.arange(byte_ids.shape[0], device=byte_ids.device)
        last_end = torch.where(bits, place, -1).cummax(0).values
        offset = place - last_end
        for depth in range(1, min(self.longest, int(offset.max()) if offset.numel() else 0) + 1):
            here = (offset == depth).nonzero()[:, 0]
            before = torch.where(here > 0, nodes[(here - 1).clamp(min=0)], 0)
            nodes[here] = self.child(before, byte_ids[here])
        return torch.where(offset > self.longest, -1, nodes)

    def child(self, node: Tensor, byte: Tensor) -> Tensor:
        """[n] int64: the node behind one more byte; −1 where no token goes on there, and where ``node`` is −1."""
        edge = self.edges_of(node, byte)
        return torch.where(edge >= 0, self.edge_node[edge.clamp(min=0)], -1)

    def edges_of(self, node: Tensor, byte: Tensor) -> Tensor:
        """[n] int64: the edge of a byte at a node, −1 where there is none and where ``node`` is −1.

        Edge e of node n has the entries 2 · e + n, for tokens that end with it, and the next, for those that go on.
        """
        key = node * 256 + byte
        edge = torch.searchsorted(self.edge_key, key).clamp(max=self.edge_key.shape[0] - 1)
        return torch.where((self.edge_key[edge] == key) & (node >= 0), edge, -1)


class _Edges(NamedTuple):
    """[K] each, by node and byte; ranges are of places among all allowed tokens."""

    node: NDArray[np.int64]
    byte: NDArray[np.int64]
    low: NDArray[np.int64]
    middle: NDArray[np.int64]
    """Where the tokens that go on begin."""
    high: NDArray[np.int64]
    behind: NDArray[np.int64]
    """The node behind the edge, −1 where no token goes on."""


def _edges(table: TokenBytes, order: NDArray[np.int64]) -> _Edges:
    """Byte by byte: the tokens of a node are cut where the next byte changes."""
    lengths, start = table.lengths.astype(np.int64)[order], table.offsets[order]
    node_of = np.zeros(order.size, dtype=np.int64)
    nodes = 1
    levels: list[_Edges] = []
    for depth in range(int(lengths.max())):
        place = np.flatnonzero(lengths > depth)
        byte, node = table.blob[start[place] + depth].astype(np.int64), node_of[place]
        first = np.flatnonzero(np.concatenate(([True], (np.diff(node) != 0) | (np.diff(byte) != 0))))
        counts = np.diff(np.append(first, place.size))
        ends_here = np.add.reduceat((lengths[place] == depth + 1).astype(np.int64), first)
        low = place[first]
        goes_on = ends_here < counts
        behind = np.full(first.size, -1, dtype=np.int64)
        behind[goes_on] = nodes + np.arange(np.count_nonzero(goes_on))
        nodes += int(np.count_nonzero(goes_on))
        node_of[place] = np.repeat(behind, counts)
        levels.append(_Edges(node[first], byte[first], low, low + ends_here, low + counts, behind))
    return _Edges(*(np.concatenate(column) for column in zip(*levels, strict=True)))


def _entries(edges: _Edges) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """(entry_first, entry_place, entry_class) over all allowed tokens."""
    degree = np.bincount(edges.node)
    first = np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(2 * degree + 1)))
    ending = 2 * np.arange(edges.node.size) + edges.node  # a node's end stands behind its edges
    place = np.empty(int(first[-1]), dtype=np.int64)
    classes = np.full(place.size, _UNUSED_CLASS, dtype=np.int64)
    place[ending], place[ending + 1] = edges.low, edges.middle
    classes[ending] = [joint_class(byte, 1) for byte in edges.byte.tolist()]
    classes[ending + 1] = edges.byte
    last_edge = np.cumsum(degree) - 1
    place[first[1:] - 1] = edges.high[last_edge]
    return first, place, classes
