"""A token model summed over tokenizations: against all of them enumerated, and against the canonical one."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megabyte_distill.data.token_bytes import TokenBytes
from megabyte_distill.inference.tokenizations import score_tokenizations
from megabyte_distill.model.backbone import Backbone
from tests.inference.conftest import tiny_backbone

END = 0
SPELLED = [None, b"a", b"b", b"ab", b"ba", b"aab", b"ab"]
"""The last stands for the same bytes as another."""
VOCABULARY = TokenBytes.from_list(SPELLED, end_of_text_id=END, bos_id=None)
TEXTS = [b"abaab", b"", b"b", b"bbaababab", b"aabab"]


@pytest.fixture(scope="module")
def model(groups: None) -> Backbone:
    torch.manual_seed(11)
    backbone = Backbone(replace(tiny_backbone().backbone_config, vocab_size=len(SPELLED)))
    torch.nn.init.normal_(backbone.embedding.weight, std=0.4)
    return backbone.eval()


def tensors(texts: list[bytes]) -> list[Tensor]:
    return [torch.tensor(list(text), dtype=torch.int64) for text in texts]


def tokenizations(text: bytes) -> Iterator[tuple[int, ...]]:
    if not text:
        yield ()
    for token, spelled in enumerate(SPELLED):
        if spelled and text.startswith(spelled):
            for rest in tokenizations(text[len(spelled) :]):
                yield (token, *rest)


@torch.no_grad()
def log_probabilities(model: Backbone, tokens: tuple[int, ...]) -> tuple[float, Tensor]:
    """(log P of the tokens, log-probabilities [W] of what follows), in one pass."""
    ids = torch.tensor([END, *tokens])
    logs = (
        model.logits(model(model.embed(ids), torch.tensor([0, len(ids)], dtype=torch.int32))).double().log_softmax(-1)
    )
    return float(sum(logs[place, token] for place, token in enumerate(tokens))), logs[-1]


def enumerated(model: Backbone, text: bytes) -> tuple[float, float, float]:
    """P of the text's tokenizations, of all that begin with the text, and of the former followed by the end."""
    exact = prefix = with_end = 0.0
    for size in range(len(text) + 1):
        rest = text[size:]
        past = [
            t for t, spelled in enumerate(SPELLED) if rest and spelled and spelled.startswith(rest) and spelled != rest
        ]
        for tokens in tokenizations(text[:size]):
            log, following = log_probabilities(model, tokens)
            prefix += math.exp(log) * float(following[past].exp().sum())
            if not rest:
                exact += math.exp(log)
                with_end += math.exp(log + float(following[END]))
    return exact, exact + prefix, with_end


def test_enough_tokenizations_are_all_of_them(model: Backbone) -> None:
    score = score_tokenizations(model, VOCABULARY, tensors(TEXTS), paths=64, batch=3)
    for index, text in enumerate(TEXTS):
        exact, prefix, with_end = enumerated(model, text)
        assert float(2 ** -score.bits[index]) == pytest.approx(exact, rel=1e-4)
        assert float(2 ** -score.prefix_bits[index]) == pytest.approx(prefix, rel=1e-4)
        assert float(2 ** -(score.bits + score.end_bits)[index]) == pytest.approx(with_end, rel=1e-4)


def test_the_probabilities_of_all_texts_sum_to_one(model: Backbone) -> None:
    """Every document either ends within three bytes or begins with one of the texts of three bytes."""
    longer = [bytes(text) for text in itertools.product(b"ab", repeat=3)]
    ended = [bytes(text) for size in range(3) for text in itertools.product(b"ab", repeat=size)]
    score = score_tokenizations(model, VOCABULARY, tensors(longer + ended), paths=16, batch=4)
    begins = (2.0**-score.prefix_bits)[: len(longer)].sum()
    ends = (2.0 ** -(score.bits + score.end_bits))[len(longer) :].sum()
    assert float(begins + ends) == pytest.approx(1.0, abs=1e-5)


def test_more_tokenizations_never_lose_what_fewer_found_here(model: Backbone) -> None:
    text = tensors([b"abaabbaabaabbabaabab"])
    values = [float(score_tokenizations(model, VOCABULARY, text, paths=paths).bits) for paths in (1, 2, 4, 16, 256)]
    assert values == sorted(values, reverse=True) and values[0] > values[-1] + 0.5
    exact, _, _ = enumerated(model, b"abaabbaab")
    short = tensors([b"abaabbaab"])
    assert all(
        float(score_tokenizations(model, VOCABULARY, short, paths=paths).bits) >= -math.log2(exact) - 1e-4
        for paths in range(1, 8)
    )


def test_one_tokenization_is_one(model: Backbone) -> None:
    """Its probability is that of a tokenization, and of the likeliest where the text is short."""
    [bits] = score_tokenizations(model, VOCABULARY, tensors([b"ab"]), paths=1).bits.tolist()
    assert bits == pytest.approx(
        min(-log_probabilities(model, t)[0] for t in tokenizations(b"ab")) / math.log(2), rel=1e-4
    )
    [bits] = score_tokenizations(model, VOCABULARY, tensors([b"aababba"]), paths=1).bits.tolist()
    every = [-log_probabilities(model, tokens)[0] / math.log(2) for tokens in tokenizations(b"aababba")]
    assert min(abs(bits - one) for one in every) < 1e-3


def test_the_canonical_tokens_are_kept_whatever_they_weigh(model: Backbone) -> None:
    text = b"abaabbaab"
    unlikely = max(tokenizations(text), key=lambda tokens: -log_probabilities(model, tokens)[0])
    code_length = -log_probabilities(model, unlikely)[0] / math.log(2)
    alone = score_tokenizations(model, VOCABULARY, tensors([text]), paths=1, canonical=[unlikely])
    assert float(alone.bits) == pytest.approx(code_length, rel=1e-4)
    assert float(score_tokenizations(model, VOCABULARY, tensors([text]), paths=1).bits) < code_length - 0.5
    for paths in (2, 4):
        score = score_tokenizations(model, VOCABULARY, tensors([text, b"a"]), paths=paths, canonical=[unlikely, (1,)])
        assert float(score.bits[0]) < code_length - 0.1


@pytest.mark.parametrize("batch", [1, 2])
def test_texts_of_any_lengths_score_as_alone(model: Backbone, batch: int) -> None:
    together = score_tokenizations(model, VOCABULARY, tensors(TEXTS), paths=3, batch=batch)
    whole = score_tokenizations(model, VOCABULARY, tensors(TEXTS), paths=3, batch=5)
    for name in ("bits", "prefix_bits", "end_bits"):
        torch.testing.assert_close(getattr(together, name), getattr(whole, name), atol=1e-4, rtol=0)


def test_later_bytes_change_nothing_before_them(model: Backbone) -> None:
    """The text's beginning costs the same whatever follows: all tokens that reach over its end are counted."""
    ends = [b"aabba" + bytes(more) for more in itertools.product(b"ab", repeat=3)]
    score = score_tokenizations(model, VOCABULARY, tensors([b"aabba", *ends]), paths=200)
    shorter = [b"aabba" + bytes(more) for size in range(3) for more in itertools.product(b"ab", repeat=size)]
    stopped = score_tokenizations(model, VOCABULARY, tensors(shorter), paths=200)
    total = (2.0 ** -score.prefix_bits[1:]).sum() + (2.0 ** -(stopped.bits + stopped.end_bits)).sum()
    assert float(total) == pytest.approx(float(2.0 ** -score.prefix_bits[0]), rel=1e-4)


def test_what_no_tokens_spell_has_no_finite_length(model: Backbone) -> None:
    score = score_tokenizations(model, VOCABULARY, tensors([b"axb", b"a"]))
    assert math.isinf(score.bits[0]) and math.isinf(score.prefix_bits[0]) and math.isfinite(score.bits[1])


def test_mistakes_are_refused(model: Backbone) -> None:
    with pytest.raises(ValueError, match="expected at least one"):
        score_tokenizations(model, VOCABULARY, tensors([b"a"]), paths=0)
    with pytest.raises(ValueError, match="do not spell their text of 2 bytes"):
        score_tokenizations(model, VOCABULARY, tensors([b"ab"]), canonical=[[1, 1]])
