"""A text under a token model, summed over K tokenizations: what K bit histories are for a byte model.

At each byte of a text up to K tokenizations of what came before end; the heaviest are kept, each goes on with every
token that the text goes on with. The mass of the others is lost, so that no figure exceeds the model's own probability.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from megabyte_distill.data.progress import UNCOUNTED, Counter
from megabyte_distill.data.token_bytes import TokenBytes
from megabyte_distill.inference.branching_cache import BranchingCache
from megabyte_distill.model.backbone import Backbone


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizationScore:
    """What K tokenizations make of N texts, in bits; fp64 [N] each, ∞ where no tokens spell the text."""

    bits: Tensor
    """Tokens that spell the text and stop where it stops, as the canonical ones do."""
    prefix_bits: Tensor
    """The text as the beginning of a longer one: last tokens that run past its end count too. Bit paths count the like
    (the last byte's chunk may go on), so this is what ``PathScore.bits`` compares with."""
    end_bits: Tensor
    """Of the event "the document ends" behind the text, under the tokenizations of ``bits``."""


@torch.no_grad()
def score_tokenizations(
    backbone: Backbone,
    token_bytes: TokenBytes,
    texts: Sequence[Tensor],
    *,
    paths: int = 4,
    batch: int = 8,
    canonical: Sequence[Sequence[int]] | None = None,
    done: Counter = UNCOUNTED,
) -> TokenizationScore:
    """Scores texts, each the bytes [L] int64 behind the start token; ``batch`` texts run side by side.

    Args:
        backbone: a token model, whole in this process.
        token_bytes: of its vocabulary; ids that stand for the same bytes are different tokenizations.
        texts: any bytes.
        paths: K. With 1, the likeliest that ends at each byte is followed.
        batch: memory grows with it, K and the length.
        canonical: each text's own tokens, which are kept among the K whatever they weigh; so ``bits`` is at most their
            code length.
        done: is told of every byte.

    Raises:
        ValueError: for no paths, and for canonical tokens that do not spell their text.
    """
    if paths < 1:
        raise ValueError(f"{paths} tokenizations side by side; expected at least one")
    vocabulary = _Vocabulary(token_bytes)
    beams = [
        _Beam(bytes(text.tolist()), None if canonical is None else vocabulary.ends_of(canonical[index], text))
        for index, text in enumerate(texts)
    ]
    order = sorted(range(len(beams)), key=lambda index: -len(beams[index].text))
    for first in range(0, len(order), batch):
        members = [beams[index] for index in order[first : first + batch]]
        _Run(backbone, vocabulary, members, paths).go()
        done.advance(sum(len(beam.text) for beam in members))
    nats = torch.tensor([[-b.exact, -b.prefix, -b.ending] for b in beams], dtype=torch.float64).view(-1, 3)
    bits, prefix_bits, end_bits = nats.to(backbone.device).T / math.log(2)
    return TokenizationScore(bits=bits, prefix_bits=prefix_bits, end_bits=end_bits)


class _Vocabulary:
    """Which tokens a text goes on with."""

    def __init__(self, token_bytes: TokenBytes) -> None:
        self.start_id, self.end_id = token_bytes.start_id, token_bytes.end_of_text_id
        self._ids: dict[bytes, list[int]] = {}
        for token in np.flatnonzero(token_bytes.lengths).tolist():
            self._ids.setdefault(token_bytes[token], []).append(token)
        self._lengths = sorted({len(spelled) for spelled in self._ids})
        self._sorted = sorted(self._ids)
        self._token_bytes = token_bytes

    def next_tokens(self, text: bytes, position: int) -> Iterator[tuple[int, int]]:
        """(token, where it ends) of each token that the text has at ``position``."""
        for length in self._lengths:
            end = position + length
            if end > len(text):
                return
            for token in self._ids.get(text[position:end], ()):
                yield token, end

    def running_past(self, rest: bytes) -> list[int]:
        """Tokens that begin with ``rest``, not empty, and are longer."""
        found = []
        for place in range(bisect.bisect_right(self._sorted, rest), len(self._sorted)):
            if not self._sorted[place].startswith(rest):
                break
            found += self._ids[self._sorted[place]]
        return found

    def ends_of(self, tokens: Sequence[int], text: Tensor) -> dict[int, int]:
        """Where each of a text's own tokens ends → the token; ValueError where they do not spell it."""
        ids = np.asarray(tokens, dtype=np.int64)
        if self._token_bytes.concatenate(ids).tobytes() != bytes(text.tolist()):
            raise ValueError(f"the canonical tokens do not spell their text of {len(text)} bytes; tokenize it again")
        ends = np.cumsum(self._token_bytes.lengths[ids]).tolist()
        return {end: token for end, token in zip(ends, ids.tolist(), strict=True) if self._token_bytes.lengths[token]}


@dataclass(eq=False)
class _Path:
    """A tokenization of a text's beginning."""

    row: int
    """Of the cache."""
    weight: float
    is_canonical: bool


@dataclass(frozen=True, slots=True)
class _Step:
    """A path and one more token."""

    path: _Path
    token: int
    weight: float
    is_canonical: bool


@dataclass
class _Beam:
    """One text and what waits to be read."""

    text: bytes
    canonical: dict[int, int] | None
    steps: dict[int, list[_Step]] = field(default_factory=dict)
    """Where a token ends → what ends there."""
    past_end: list[float] = field(default_factory=list)
    """Weights of what runs past the text's end."""
    exact: float = -math.inf
    prefix: float = -math.inf
    ending: float = -math.inf

    def chosen(self, position: int, paths: int) -> list[_Step]:
        """The heaviest of what ends at ``position``, the canonical one first."""
        found = self.steps.pop(position, [])
        return sorted(found, key=lambda step: (not step.is_canonical, -step.weight))[:paths]

    def finish(self, paths: Sequence[_Path], end_chances: Sequence[float]) -> None:
        """All sums, from the paths that spell the whole text and their log-probabilities of ending there."""
        self.exact = _log_sum([path.weight for path in paths])
        self.prefix = _log_sum([self.exact, *self.past_end])
        with_end = _log_sum([path.weight + end for path, end in zip(paths, end_chances, strict=True)])
        self.ending = with_end - self.exact if paths else -math.inf


class _Run:
    """Texts read side by side, byte position by byte position."""

    def __init__(self, backbone: Backbone, vocabulary: _Vocabulary, beams: Sequence[_Beam], paths: int) -> None:
        self._backbone, self._vocabulary, self._beams, self._paths = backbone, vocabulary, beams, paths
        rows = torch.arange(len(beams), device=backbone.device)
        cache = backbone.init_cache(len(beams))
        start = torch.full_like(rows, vocabulary.start_id)
        hidden = backbone.step(backbone.embed(start), cache, rows)
        self._cache = BranchingCache.of(cache, rows)
        begun = [(beam, _Path(row, 0.0, True)) for row, beam in enumerate(beams)]
        self._go_on(0, begun, self._chances(hidden))

    def go(self) -> None:
        """Reads all texts to their ends."""
        for position in range(1, max(len(beam.text) for beam in self._beams) + 1):
            chosen = [(beam, step) for beam in self._beams for step in beam.chosen(position, self._paths)]
            if not chosen:
                continue
            begun = self._branch(chosen)
            device = self._backbone.device
            tokens = torch.tensor([step.token for _, step in chosen], device=device)
            rows = torch.tensor([path.row for _, path in begun], device=device)
            hidden = self._backbone.step(self._backbone.embed(tokens), self._cache, rows)
            self._go_on(position, begun, self._chances(hidden))
        for beam in self._beams:
            if beam.exact == -math.inf:  # nothing spells it
                beam.finish([], [])

    def _branch(self, chosen: Sequence[tuple[_Beam, _Step]]) -> list[tuple[_Beam, _Path]]:
        """A row for each chosen step behind the rows that are still waited for; all others are forgotten."""
        waiting = {id(s.path): s.path for beam in self._beams for steps in beam.steps.values() for s in steps}
        parents = [step.path.row for _, step in chosen]
        kept = [path.row for path in waiting.values()] + parents
        self._cache.keep(torch.tensor(kept, device=self._backbone.device))
        for row, path in enumerate(waiting.values()):
            path.row = row
        return [
            (beam, _Path(len(waiting) + number, step.weight, step.is_canonical))
            for number, (beam, step) in enumerate(chosen)
        ]

    def _chances(self, hidden: Tensor) -> Tensor:
        """Log-probabilities [N, W] of the next token, fp32."""
        return self._backbone.logits(hidden).float().log_softmax(-1)

    def _go_on(self, position: int, begun: Sequence[tuple[_Beam, _Path]], chances: Tensor) -> None:
        """Notes what each path goes on with, and finishes the texts that end here."""
        places: list[tuple[int, int]] = []
        steps: list[tuple[_Beam, _Path, int, int]] = []
        ended: dict[int, list[int]] = {}
        for number, (beam, path) in enumerate(begun):
            if position == len(beam.text):
                ended.setdefault(id(beam), []).append(number)
                continue
            for token, end in self._vocabulary.next_tokens(beam.text, position):
                places.append((number, token))
                steps.append((beam, path, token, end))
            past = self._vocabulary.running_past(beam.text[position:])
            if past:
                beam.past_end.append(path.weight + float(chances[number, past].double().logsumexp(0)))
        if places:
            index = torch.tensor(places, device=chances.device)
            for (beam, path, token, end), chance in zip(steps, chances[index[:, 0], index[:, 1]].tolist(), strict=True):
                is_canonical = path.is_canonical and beam.canonical is not None and beam.canonical.get(end) == token
                beam.steps.setdefault(end, []).append(_Step(path, token, path.weight + chance, is_canonical))
        for numbers in ended.values():
            ends = chances[numbers, self._vocabulary.end_id].tolist()
            begun[numbers[0]][0].finish([begun[number][1] for number in numbers], ends)


def _log_sum(weights: Sequence[float]) -> float:
    top = max(weights, default=-math.inf)
    return top if top == -math.inf else top + math.log(sum(math.exp(weight - top) for weight in weights))
