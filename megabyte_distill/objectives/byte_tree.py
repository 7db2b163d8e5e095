"""The teacher's vocabulary as a tree of byte prefixes over tokens sorted bytewise: a prefix is a contiguous range."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megabyte_distill.alphabet import BOS_BYTE
from megabyte_distill.data.token_bytes import TokenBytes


@dataclass(frozen=True, kw_only=True, slots=True)
class ByteTree:
    """Nodes are the prefixes that some allowed token strictly extends, 0 the empty one; an edge is one more byte.

    A tokens, N nodes, K edges. Ranges are of places in the sorted order; a token's exact duplicates stand side by side.
    """

    order: Tensor
    """[A] int64 ids of the allowed tokens, sorted by their bytes. Not allowed: special ids, and tokens with a byte that
    no UTF-8 has (254 would read as the end of the document)."""
    end_of_text_id: int
    node_first: Tensor
    """[N + 1] int64, a node's first edge; its edges ascend by byte."""
    node_low: Tensor
    """[N] int64, where the tokens that strictly extend the prefix begin."""
    node_high: Tensor
    """[N] int64, where they end."""
    edge_key: Tensor
    """[K] int64, 256 · node + byte; ascending."""
    edge_low: Tensor
    """[K] int64, where the tokens that begin with prefix and byte begin; those that are just that come first."""
    edge_middle: Tensor
    """[K] int64, where the tokens that go on behind the byte begin."""
    edge_high: Tensor
    """[K] int64, where they end."""
    edge_node: Tensor
    """[K] int64, the node behind the edge; −1 where no token goes on."""
    longest: int
    """Bytes of the longest allowed token."""

    @classmethod
    def of(cls, table: TokenBytes) -> ByteTree:
        """The tree of a vocabulary. ValueError for one without any token of text."""
        lengths = table.lengths.astype(np.int64)
        ends = np.repeat(np.arange(table.vocab_size), lengths)
        forbidden = np.zeros(table.vocab_size, dtype=np.bool_)
        forbidden[ends[table.blob >= BOS_BYTE]] = True
        allowed = np.flatnonzero((lengths > 0) & ~forbidden)
        if not allowed.size:
            raise ValueError("the token table has no token of text; convert the teacher again")
        order = np.array(sorted(allowed.tolist(), key=table.__getitem__), dtype=np.int64)
        return _build(table, order)

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
            nodes[here] = self._child(before, byte_ids[here])
        return torch.where(offset > self.longest, -1, nodes)

    def _child(self, node: Tensor, byte: Tensor) -> Tensor:
        key = node * 256 + byte
        edge = torch.searchsorted(self.edge_key, key).clamp(max=self.edge_key.shape[0] - 1)
        return torch.where((self.edge_key[edge] == key) & (node >= 0), self.edge_node[edge], -1)


def _build(table: TokenBytes, order: NDArray[np.int64]) -> ByteTree:
    """Level by level: the tokens of a node, cut where the next byte changes."""
    lengths = table.lengths.astype(np.int64)[order]
    longest = int(lengths.max())
    start = table.offsets[order]
    nodes: list[tuple[int, int]] = [(0, order.size)]  # (tokens that strictly extend the prefix: from, to)
    first, edges, depth_of = [0], [], [0]
    for node, (low, high) in enumerate(nodes):  # the list grows behind the loop
        depth = depth_of[node]
        byte = table.blob[start[low:high] + depth]
        cuts = np.flatnonzero(np.diff(byte)) + 1
        for begin, end in zip([0, *cuts.tolist()], [*cuts.tolist(), high - low], strict=True):
            edge_low, edge_high = low + begin, low + end
            middle = edge_low + int(np.searchsorted(lengths[edge_low:edge_high] > depth + 1, True))
            behind = -1
            if middle < edge_high:
                behind = len(nodes)
                nodes.append((middle, edge_high))
                depth_of.append(depth + 1)
            edges.append((256 * node + int(byte[begin]), edge_low, middle, edge_high, behind))
        first.append(len(edges))
    columns = torch.tensor(edges, dtype=torch.int64).T.contiguous()
    ranges = torch.tensor(nodes, dtype=torch.int64).T.contiguous()
    return ByteTree(
        order=torch.from_numpy(order),
        end_of_text_id=table.end_of_text_id,
        node_first=torch.tensor(first, dtype=torch.int64),
        node_low=ranges[0],
        node_high=ranges[1],
        edge_key=columns[0],
        edge_low=columns[1],
        edge_middle=columns[2],
        edge_high=columns[3],
        edge_node=columns[4],
        longest=longest,
    )
