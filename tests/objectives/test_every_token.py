"""Every prefix and every token of large vocabularies against brute force, and that brute force would see a fault."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from megabyte_distill.alphabet import BOS_BYTE, END_OF_DOCUMENT_CLASS, JOINT_CLASSES, joint_class
from megabyte_distill.data import tokenizers
from megabyte_distill.data.mock import worded_table
from megabyte_distill.data.token_bytes import TokenBytes
from megabyte_distill.objectives import exact_targets as module
from megabyte_distill.objectives.byte_tree import ByteTree
from megabyte_distill.objectives.exact_targets import VANISHING, exact_targets
from megabyte_distill.objectives.target_check import BruteForce, EveryToken, TargetErrors
from tests.objectives.test_exact_targets import TABLE, TEXT, row_of, some_logits

ROOT = Path(__file__).resolve().parent.parent.parent
LARGE = (128_256, 151_936)


@cache
def large(vocab_size: int) -> EveryToken:
    return EveryToken(worded_table(vocab_size))


def drawn_logits(kind: str, vocab_size: int, rows: int = 1) -> Tensor:
    logits = torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(vocab_size))
    if kind == "one token":
        logits[:, 1234] = 18.0  # 0.998 of the mass, beside neighbours of 1e-8
        return logits
    return logits * {"flat": 2.0, "peaked": 8.0}[kind]


@pytest.mark.parametrize("name", ["sums", "targets", "masses", "products", "likely_products"])
@pytest.mark.parametrize("error", [1e-4, math.nan])
def test_no_error_may_be_large_or_nan(name: str, error: float) -> None:
    none = TargetErrors(misplaced=0, sums=0.0, targets=0.0, masses=0.0, products=0.0, likely_products=0.0, tokens=5)
    assert none.is_exact and not replace(none, **{name: error}).is_exact
    assert not replace(none, misplaced=1).is_exact


@pytest.mark.parametrize("kind", ["flat", "peaked", "one token"])
@pytest.mark.parametrize("vocab_size", LARGE)
def test_every_prefix_and_every_token_of_a_large_vocabulary(vocab_size: int, kind: str) -> None:
    """Where half of the mass is on a few tokens the other half of the prefixes is below 1e-12: their tokens' targets
    are the text's pairs from there on, and no product of theirs is the teacher's. The bytes up to there are judged."""
    case = large(vocab_size)
    logits = drawn_logits(kind, vocab_size)[0]
    errors = case.errors(logits)
    assert errors.is_exact, errors
    z = case.brute.prefix_masses(logits.double().softmax(-1))
    least = torch.ones(case.brute.ids.shape[0], dtype=torch.float64)
    least.scatter_reduce_(0, case.brute.token, z[case.brute.prefix], "amin")
    assert errors.tokens == int((least >= VANISHING).sum())
    assert errors.tokens > 40_000 if kind == "peaked" else errors.tokens == vocab_size - 256


def test_every_token_of_a_small_one_with_duplicates_and_split_characters() -> None:
    every = EveryToken(TABLE)
    for seed in range(5):
        for row in some_logits(row_of(TEXT), 3.0, seed):
            assert every.errors(row).is_exact


@pytest.mark.parametrize("singles", [0, 1 << 20])
def test_the_size_of_spans_changes_nothing(monkeypatch: pytest.MonkeyPatch, singles: int) -> None:
    monkeypatch.setattr(module, "_SINGLES_UP_TO", singles)
    errors = EveryToken(worded_table(5000)).errors(drawn_logits("flat", 5000)[0])
    assert errors.is_exact and errors.tokens == 5000 - 256


@pytest.mark.parametrize("vocab_size", LARGE)
def test_brute_force_is_what_startswith_says(vocab_size: int) -> None:
    brute, table = large(vocab_size).brute, large(vocab_size).table
    p = drawn_logits("flat", vocab_size)[0].double().softmax(-1)
    z, pairs = brute.prefix_masses(p), brute.pair_masses(p)
    spelled = [(table[token], float(p[token])) for token in brute.ids.tolist()]
    assert len(spelled) == vocab_size - 256
    chosen = [0, *np.random.default_rng(0).integers(1, len(brute.prefixes), size=12).tolist()]
    for number in chosen:
        prefix = brute.prefixes[number]
        longer = [(text, mass) for text, mass in spelled if text.startswith(prefix) and text != prefix]
        ends = float(p[table.end_of_text_id]) if not prefix else 0.0
        assert float(z[number]) == pytest.approx(math.fsum(mass for _, mass in longer) + ends, rel=1e-10)
        for joint, mass in zip(
            brute.pairs[brute.pairs[:, 0] == number, 1].tolist(),
            pairs[brute.pairs[:, 0] == number].tolist(),
            strict=True,
        ):
            byte, bit = joint % 256, joint // 256
            of_pair = [m for text, m in longer if text[len(prefix)] == byte and (len(text) == len(prefix) + 1) == bit]
            assert mass == pytest.approx(ends if byte == BOS_BYTE else math.fsum(of_pair), rel=1e-10)


def _merged(tree: ByteTree) -> ByteTree:
    behind = tree.edge_node.clone()
    inner = (behind > 0).nonzero()[:, 0]
    behind[inner[40]] = behind[inner[41]]
    return replace(tree, edge_node=behind)


def _dropped(tree: ByteTree) -> ByteTree:
    behind = tree.edge_node.clone()
    behind[(behind > 0).nonzero()[40, 0]] = -1
    return replace(tree, edge_node=behind)


def _swapped(tree: ByteTree) -> ByteTree:
    order = tree.order.clone()
    order[[1000, 2000]] = order[[2000, 1000]]
    return replace(tree, order=order)


def _cut_elsewhere(tree: ByteTree) -> ByteTree:
    place = tree.entry_place.clone()
    at = int((place[1:] - place[:-1] > 1).nonzero()[50, 0])
    place[at + 1] -= 1
    return replace(tree, entry_place=place)


def _other_byte(tree: ByteTree) -> ByteTree:
    classes = tree.entry_class.clone()
    classes[[2, 4]] = classes[[4, 2]]
    return replace(tree, entry_class=classes)


def _lost_token(tree: ByteTree) -> ByteTree:
    """Its mass would be missing in every sum it belongs to, and targets that divide by such a sum add up to 1."""
    place = tree.entry_place.clone()
    place[place == tree.allowed] -= 1
    return replace(tree, entry_place=place)


@pytest.mark.parametrize("damage", [_merged, _dropped, _swapped, _cut_elsewhere, _other_byte, _lost_token])
def test_a_tree_with_a_fault_is_not_called_exact(damage: Callable[[ByteTree], ByteTree]) -> None:
    table = worded_table(5000)
    logits = drawn_logits("flat", 5000)[0]
    assert EveryToken(table, ByteTree.of(table)).errors(logits).is_exact
    assert not EveryToken(table, damage(ByteTree.of(table))).errors(logits).is_exact


def test_fp32_sums_would_not_do() -> None:
    """What is promised above is far from what plain fp32 sums give."""
    tree = large(128_256).tree
    p = drawn_logits("one token", 128_256)[0].softmax(-1)[tree.order]
    before = torch.nn.functional.pad(p.cumsum(0), (1, 0))
    single = (before[1:] - before[:-1])[: tree.allowed]
    assert float((single / p[: tree.allowed] - 1).abs().max()) > 1e-2


class Spelled:
    """A vocabulary as a matrix of bytes, in which what goes on with a text is looked for byte by byte."""

    def __init__(self, brute: BruteForce, table: TokenBytes) -> None:
        self.ids = brute.ids
        pieces = [table[token] for token in self.ids.tolist()]
        self._lengths = torch.tensor([len(piece) for piece in pieces])
        longest = int(self._lengths.max())
        text = bytearray(b"".join(piece.ljust(longest, b"\xff") for piece in pieces))
        self._bytes = torch.frombuffer(text, dtype=torch.uint8).view(-1, longest).to(torch.int64)
        self._end_of_text = table.end_of_text_id

    def pairs_behind(self, p: Tensor, prefix: bytes) -> tuple[Tensor, float]:
        """([512] fp64 masses, Z)."""
        found = torch.arange(self.ids.shape[0])
        for place, byte in enumerate(prefix):
            found = found[self._bytes[found, place] == byte]
        found = found[self._lengths[found] > len(prefix)]
        joint = joint_class(self._bytes[found, len(prefix)], (self._lengths[found] == len(prefix) + 1).to(torch.int64))
        masses = torch.zeros(JOINT_CLASSES, dtype=torch.float64).index_add_(0, joint, p[self.ids[found]])
        if not prefix:
            masses[END_OF_DOCUMENT_CLASS] = p[self._end_of_text]
        return masses, float(masses.sum())


def assert_quotients(case: EveryToken, ids: list[int], logits: Tensor) -> tuple[int, int]:
    """A row of tokens through ``exact_targets``, logits [tokens + 1, W]: each byte's 512 targets are the brute
    quotient, and their product over each token is p(token) / allowed. (bytes, those with the hard label)"""
    spelled, table = Spelled(case.brute, case.table), case.table
    pieces = [table[token] for token in ids]
    byte_ids = torch.tensor([BOS_BYTE, *b"".join(pieces)])
    bits = torch.zeros(byte_ids.shape[0], dtype=torch.bool)
    bits[torch.tensor([0, *np.cumsum([len(piece) for piece in pieces])])] = True
    labels = torch.cat((joint_class(byte_ids, bits.to(torch.int64))[1:], torch.tensor([END_OF_DOCUMENT_CLASS])))
    found = exact_targets(case.tree, logits, byte_ids=byte_ids, bits=bits, labels=labels, wanted=bits | True)
    all_allowed = torch.cat((case.brute.ids, torch.tensor([table.end_of_text_id])))
    place, replaced = 0, 0
    for number, piece in enumerate([*pieces, b"?"]):  # behind the last the first byte alone is asked for
        rounded, log_p = logits[number].softmax(-1).double(), logits[number].double().log_softmax(-1)
        product, is_judged = 0.0, True
        for begun in range(len(piece)):
            masses, z = spelled.pairs_behind(rounded, piece[:begun])
            target, label = found.distribution[place].double(), int(labels[place])
            if z < VANISHING:
                replaced, is_judged = replaced + 1, False
                assert float(target[label]) == 1.0 and float(target.sum()) == 1.0
            else:
                torch.testing.assert_close(target, masses / z, atol=1e-6 + 1e-15 / z, rtol=0)
                product += float(target[label].log())
            place += 1
        if is_judged and number < len(pieces):
            allowed = log_p[all_allowed].logsumexp(-1)
            alike = [ids[number], *_alike(table, ids[number])]
            expected = float(log_p[alike].logsumexp(-1) - allowed)
            assert product == pytest.approx(expected, abs=1e-5 + 1e-15 * math.exp(-expected))
    assert place == byte_ids.shape[0] and int(found.replaced) == replaced
    return place, replaced


def _alike(table: TokenBytes, token: int) -> list[int]:
    return [other for group in table.duplicates if token in group for other in group if other != token]


@pytest.mark.parametrize("kind", ["flat", "peaked"])
def test_rows_under_a_large_vocabulary_get_the_brute_quotient_on_every_byte(kind: str) -> None:
    """Half of the tokens are drawn by the teacher, half by nobody, so that prefixes vanish as well."""
    case, size = large(128_256), 80
    generator = torch.Generator().manual_seed(5)
    logits = drawn_logits(kind, 128_256, size + 1)
    ids = case.brute.ids[torch.randint(case.brute.ids.shape[0], (size,), generator=generator)]
    own = logits[:size, case.brute.ids].softmax(-1).multinomial(1, generator=generator)[:, 0]
    ids[::2] = case.brute.ids[own][::2]
    size, replaced = assert_quotients(case, ids.tolist(), logits)
    assert 20 < replaced < size / 2 if kind == "peaked" else replaced == 0


REAL = "MEGABYTE_DISTILL_TOKENIZERS"
"""Folders or files of real tokenizers, separated as in PATH."""
INSTALLED = {"llama_models": "llama3/tokenizer.model", "qwen_agent": "utils/qwen.tiktoken"}
"""Packages that hold a real vocabulary, where one is installed, and its place in them."""
PROSE = (
    "It is a truth universally acknowledged, that 1,000 naïve façades cost $3.50.\n\n    def f(x): return x**2  # ok\n"
    "吾輩は猫である。名前はまだ無い。 كان يا ما كان 🚀👩🏽‍🚀 e\u0301\u0327 Ελλάδα हिन्दी \0\t"
)


def real_tokenizers() -> list[Path]:
    found = [Path(text) for text in os.environ.get(REAL, "").split(os.pathsep) if text]
    for package, place in INSTALLED.items():
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            found += [Path(folder) / place] if (Path(folder) / place).is_file() else []
    return found


@pytest.mark.parametrize("path", [ROOT / "examples" / "tiny" / "teacher", *(real_tokenizers() or [None])], ids=str)
def test_every_token_of_real_vocabularies_on_random_and_on_real_prefixes(path: Path | None) -> None:
    """Real prefixes: those of a text's own tokens, each of which its distribution favours."""
    if path is None:
        pytest.skip(f"no large vocabulary here: install {' or '.join(INSTALLED)}, or name tokenizers in {REAL}")
    tokenizer = tokenizers.load(path)
    case = EveryToken(tokenizer.token_bytes)
    for kind in ("flat", "peaked"):
        errors = case.errors(drawn_logits(kind, case.table.vocab_size)[0])
        assert errors.is_exact, errors
    tokens = tokenizer.encode_batch([PROSE])[0]
    assert case.table.concatenate(tokens).tobytes() == PROSE.encode()
    logits = drawn_logits("flat", case.table.vocab_size, len(tokens) + 1)
    logits[torch.arange(len(tokens)), torch.from_numpy(tokens).long()] += 12.0
    size, replaced = assert_quotients(case, tokens.tolist(), logits)
    assert size == len(PROSE.encode()) + 1 and replaced == 0
