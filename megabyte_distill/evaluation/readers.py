"""Teacher and student as readers of any bytes: what they give to continuations, and what they say themselves.

The student is the causal byte filter and joint generation. The teacher sees a prompt as its own tokens, as it is used
in practice: a prompt that stops inside a word is cut into tokens that the whole text does not have.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from megabyte_distill.data.token_bytes import TokenBytes
from megabyte_distill.data.tokenizers import DocumentTokenizer
from megabyte_distill.evaluation.continuations import byte_bits, score_continuations
from megabyte_distill.inference.engine import Engine
from megabyte_distill.inference.generation import GenerationSettings
from megabyte_distill.inference.sampling import Sampling, choose, uniform_numbers
from megabyte_distill.inference.scoring import token_nll
from megabyte_distill.model.backbone import Backbone
from megabyte_distill.model.student import Student

_ROW_TOKENS = 4096
"""Of the rows that the teacher reads at once."""
_ESCAPED = re.compile("([\udc80-\udcff]+)")
"""Bytes that are no UTF-8, as the surrogateescape error handler shows them."""


class PairBits(NamedTuple):
    """Code lengths of a prompt and of its continuation."""

    prompt: float
    continuation: float


class Reader(Protocol):
    """A model of text."""

    name: str

    def pair_bits(self, pairs: Sequence[tuple[bytes, bytes]]) -> Sequence[PairBits | None]:
        """Of (prompt, continuation) pairs; None for bytes that the model has no way to read."""
        ...

    def span_bits(self, text: bytes, spans: Sequence[tuple[int, int]]) -> Sequence[float | None]:
        """Code length of ``text[start:stop]`` of each span, ``text[:start]`` being the prompt."""
        ...

    def complete(
        self, prompts: Sequence[bytes], *, max_bytes: int, temperature: float = 0.0, seed: int = 0
    ) -> Sequence[bytes]:
        """Continuations of at most ``max_bytes``, cut where they are longer; temperature 0 is greedy."""
        ...


class StudentReader:
    """A byte-level student along K paths, ``batch`` texts side by side."""

    name = "student"

    def __init__(self, student: Student, *, paths: int = 4, batch: int = 32) -> None:
        self._student, self._paths, self._batch = student, paths, batch

    def pair_bits(self, pairs: Sequence[tuple[bytes, bytes]]) -> list[PairBits]:
        """As in :class:`Reader`; there are no bytes it cannot read but BOS and PAD, a ValueError."""
        found = score_continuations(self._student, pairs, paths=self._paths, batch=self._batch)
        return [PairBits(pair.prompt_nats / math.log(2), pair.nats / math.log(2)) for pair in found]

    def span_bits(self, text: bytes, spans: Sequence[tuple[int, int]]) -> list[float]:
        """As in :class:`Reader`: one pass, since a prompt is read as it would be in the middle of a text."""
        [bits] = byte_bits(self._student, [text], paths=self._paths)
        total = np.concatenate((np.zeros(1), bits.cumsum()))
        return [float(total[stop] - total[start]) for start, stop in spans]

    def complete(
        self, prompts: Sequence[bytes], *, max_bytes: int, temperature: float = 0.0, seed: int = 0
    ) -> list[bytes]:
        """As in :class:`Reader`, by joint generation."""
        settings = GenerationSettings(
            max_new_bytes=max_bytes, sampling=Sampling(temperature=temperature), paths=self._paths, seed=seed
        )
        found = Engine(self._student, max_batch_size=self._batch).generate(prompts, settings) if prompts else []
        return [generated.byte_ids for generated in found]


class TeacherReader:
    """A token model with its tokenizer."""

    name = "teacher"

    def __init__(self, backbone: Backbone, tokenizer: DocumentTokenizer, table: TokenBytes, *, batch: int = 32) -> None:
        """``table``: of the model's W ids. ValueError where the tokenizer is not the table's."""
        own = tokenizer.token_bytes
        if own.vocab_size > table.vocab_size or own.padded(table.vocab_size).hash != table.hash:
            raise ValueError(
                f"{tokenizer.path}: spells its tokens otherwise than the run's token table; expected the tokenizer "
                "that the run's data were made with"
            )
        self._backbone, self._tokenizer, self._table, self._batch = backbone, tokenizer, table, batch
        self._of_byte = {table[int(token)]: int(token) for token in np.flatnonzero(table.lengths == 1).tolist()[::-1]}

    def tokens(self, text: bytes) -> list[int] | None:
        """A text's tokens, bytes that are no UTF-8 as tokens of one byte; None where the vocabulary lacks those."""
        found: list[int] = []
        for index, part in enumerate(_ESCAPED.split(text.decode("utf-8", "surrogateescape"))):
            if index % 2:
                pieces = [self._of_byte.get(bytes([byte])) for byte in part.encode("utf-8", "surrogateescape")]
                if None in pieces:
                    return None
                found += [piece for piece in pieces if piece is not None]
            elif part:
                found += self._tokenizer.encode_batch([self._tokenizer.normalize(part)])[0].tolist()
        return found

    def _exact_tokens(self, text: bytes) -> list[int] | None:
        """:meth:`tokens`, None also where they spell another text: the tokenizer's normal form of it."""
        tokens = self.tokens(text)
        return None if tokens is None or self._spelled(tokens) != text else tokens

    def token_ends(self, text: bytes) -> list[int] | None:
        """Where the tokens of a text end, in bytes; None where its tokens are not its bytes."""
        tokens = self._exact_tokens(text)
        if tokens is None:
            return None
        ends: list[int] = np.cumsum(self._table.lengths[np.array(tokens, dtype=np.int64)]).tolist()
        return ends

    @torch.no_grad()
    def pair_bits(self, pairs: Sequence[tuple[bytes, bytes]]) -> list[PairBits | None]:
        """As in :class:`Reader`; prompt and continuation are cut apart, into tokens that spell just their bytes."""
        tokens = [(self._exact_tokens(prompt), self._exact_tokens(continuation)) for prompt, continuation in pairs]
        found: list[PairBits | None] = [None] * len(pairs)
        rows = [(i, p, c) for i, (p, c) in enumerate(tokens) if p is not None and c is not None]
        for group in _groups(rows):
            nats = self._nats([p + c for _, p, c in group])
            for (index, prompt, _), values in zip(group, nats, strict=True):
                bits = values / math.log(2)
                found[index] = PairBits(float(bits[: len(prompt)].sum()), float(bits[len(prompt) :].sum()))
        return found

    def span_bits(self, text: bytes, spans: Sequence[tuple[int, int]]) -> list[float | None]:
        """As in :class:`Reader`: every prompt is cut into tokens of its own."""
        pairs = self.pair_bits([(text[:start], text[start:stop]) for start, stop in spans])
        return [None if pair is None else pair.continuation for pair in pairs]

    @torch.no_grad()
    def complete(
        self, prompts: Sequence[bytes], *, max_bytes: int, temperature: float = 0.0, seed: int = 0
    ) -> list[bytes]:
        """As in :class:`Reader`. ValueError for a prompt that the vocabulary cannot spell."""
        tokens = []
        for prompt in prompts:
            ids = self.tokens(prompt)
            if ids is None:
                raise ValueError(f"the teacher's vocabulary has no token for each byte of {prompt!r}")
            tokens.append([self._table.start_id, *ids])
        found = []
        for first in range(0, len(tokens), self._batch):
            found += self._complete(tokens[first : first + self._batch], max_bytes, temperature, seed + first)
        return found

    def _nats(self, rows: Sequence[list[int]]) -> list[Tensor]:
        """−log P of each token of each row, fp64."""
        device = self._backbone.device
        inputs = [[self._table.start_id, *row[:-1]] for row in rows if row]
        if not inputs:
            return [torch.zeros(0, dtype=torch.float64) for _ in rows]
        edges = torch.tensor([0, *np.cumsum([len(row) for row in inputs])], dtype=torch.int32, device=device)
        flat = torch.tensor([token for row in inputs for token in row], device=device)
        labels = torch.tensor([token for row in rows for token in row], device=device)
        nll = token_nll(self._backbone, self._backbone(self._backbone.embed(flat), edges), labels)
        return list(torch.split(nll.double().cpu(), [len(row) for row in rows]))

    def _complete(self, rows: list[list[int]], max_bytes: int, temperature: float, seed: int) -> list[bytes]:
        device = self._backbone.device
        cache = self._backbone.init_cache(len(rows))
        hidden = torch.zeros(len(rows), self._backbone.backbone_config.hidden_size, device=device)

        def read(tokens: list[int], places: list[int]) -> None:
            index = torch.tensor(places, device=device)
            embedded = self._backbone.embed(torch.tensor(tokens, device=device))
            hidden[index] = self._backbone.step(embedded, cache, index).to(hidden.dtype)

        for position in range(max(len(row) for row in rows)):
            going = [place for place, row in enumerate(rows) if len(row) > position]
            read([rows[place][position] for place in going], going)
        # whatever a token is, it has at least one byte
        uniform = uniform_numbers(len(rows), max_bytes, seed).to(device)
        impossible = torch.from_numpy(self._table.special).to(device)
        impossible[self._table.end_of_text_id] = False
        found = [b""] * len(rows)
        going = [place for place in range(len(rows)) if max_bytes]
        for position in range(max_bytes):
            logits = self._backbone.logits(hidden[going]).float().masked_fill(impossible, -torch.inf)
            chosen = choose(logits.log_softmax(-1), Sampling(temperature=temperature), uniform[going, position])
            said = dict(zip(going, chosen.tolist(), strict=True))
            going = [place for place in going if said[place] != self._table.end_of_text_id]
            for place in going:
                found[place] += self._table[said[place]]
            going = [place for place in going if len(found[place]) < max_bytes]
            if not going:
                break
            read([said[place] for place in going], going)
        return [text[:max_bytes] for text in found]

    def _spelled(self, tokens: Sequence[int]) -> bytes:
        return b"".join(self._table[token] for token in tokens)


def _groups(rows: Sequence[tuple[int, list[int], list[int]]]) -> Iterator[list[tuple[int, list[int], list[int]]]]:
    """Runs of rows of together about as many tokens as are read at once."""
    group: list[tuple[int, list[int], list[int]]] = []
    size = 0
    for row in rows:
        if group and size + len(row[1]) + len(row[2]) > _ROW_TOKENS:
            yield group
            group, size = [], 0
        group.append(row)
        size += len(row[1]) + len(row[2])
    if group:
        yield group
