"""Drawing a class: exact at the defaults, and what each setting leaves out."""

from __future__ import annotations

import math

import pytest
import torch

from megabyte_distill.inference.sampling import (
    Sampling,
    choose,
    decide_bits,
    mask_bytes,
    mask_padding,
    uniform_numbers,
)

LOGITS = torch.tensor([0.5, 0.25, 0.15, 0.1]).log()


def frequencies(sampling: Sampling, logits: torch.Tensor = LOGITS) -> list[float]:
    """Of a fine grid of uniform numbers: what random ones converge to."""
    count = 10_000
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    drawn = choose(logits.expand(count, -1), sampling, uniform)
    return (torch.bincount(drawn, minlength=logits.shape[0]) / count).tolist()


def test_the_default_draws_from_the_distribution_itself() -> None:
    assert frequencies(Sampling()) == pytest.approx([0.5, 0.25, 0.15, 0.1], abs=1e-3)


def test_log_weights_need_not_be_normalised() -> None:
    assert frequencies(Sampling(), LOGITS - 700.0) == pytest.approx([0.5, 0.25, 0.15, 0.1], abs=1e-3)


def test_temperature_sharpens_and_zero_takes_the_likeliest() -> None:
    powers = [0.5**2, 0.25**2, 0.15**2, 0.1**2]
    assert frequencies(Sampling(temperature=0.5)) == pytest.approx([p / sum(powers) for p in powers], abs=1e-3)
    assert frequencies(Sampling(temperature=0)) == [1.0, 0.0, 0.0, 0.0]


def test_top_p_keeps_the_fewest_classes_that_reach_it() -> None:
    assert frequencies(Sampling(top_p=0.7)) == pytest.approx([2 / 3, 1 / 3, 0.0, 0.0], abs=1e-3)
    assert frequencies(Sampling(top_p=0.01)) == [1.0, 0.0, 0.0, 0.0]


def test_top_k_keeps_the_likeliest() -> None:
    assert frequencies(Sampling(top_k=2)) == pytest.approx([2 / 3, 1 / 3, 0.0, 0.0], abs=1e-3)
    assert frequencies(Sampling(top_k=99)) == pytest.approx([0.5, 0.25, 0.15, 0.1], abs=1e-3)


def test_min_p_keeps_what_comes_near_the_likeliest() -> None:
    assert frequencies(Sampling(min_p=0.25)) == pytest.approx([0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0.0], abs=1e-3)
    assert frequencies(Sampling(min_p=1.0)) == [1.0, 0.0, 0.0, 0.0]
    # of the tempered distribution: 0.04 of the likeliest's 1
    assert frequencies(Sampling(temperature=0.5, min_p=0.05))[3] == 0.0


def test_a_temperature_however_small_takes_the_likeliest() -> None:
    assert frequencies(Sampling(temperature=1e-320)) == [1.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("uniform", [0.0, 1.0 - 2.0**-53])
def test_impossible_classes_are_never_drawn(uniform: float) -> None:
    logits = torch.tensor([[-math.inf, 0.0, -math.inf, -0.3, -math.inf]])
    assert int(choose(logits, Sampling(), torch.tensor([uniform], dtype=torch.float64))) in (1, 3)


def test_only_padding_is_masked() -> None:
    masked = mask_padding(torch.zeros(2, 512))
    assert masked.isinf().nonzero()[:, 1].tolist() == [255, 511] * 2


@pytest.mark.parametrize("classes", [256, 512])
def test_bytes_are_masked_with_either_bit(classes: int) -> None:
    allowed = torch.zeros(2, 256, dtype=torch.bool)
    allowed[0, 65] = allowed[1, :200] = True
    possible = ~mask_bytes(torch.zeros(2, classes), allowed).isinf()
    assert torch.equal(possible, torch.cat([allowed] * (classes // 256), dim=1))


@pytest.mark.parametrize("threshold", [0.2, 0.5, 0.8])
def test_a_threshold_decides_bits_and_leaves_bytes_as_likely_as_they_are(threshold: float) -> None:
    torch.manual_seed(0)
    pairs = mask_padding((3 * torch.randn(5, 512)).log_softmax(-1))
    decided = decide_bits(pairs, threshold).exp().view(5, 2, 256)
    given = pairs.double().exp().view(5, 2, 256)
    torch.testing.assert_close(decided.sum(1), given.sum(1))
    ends = given[:, 1] > threshold * given.sum(1)
    ends[:, 254] = True
    assert not decided[:, 1][~ends].any() and not decided[:, 0][ends].any()
    uniform = torch.rand(5, dtype=torch.float64)
    drawn = choose(pairs, Sampling(boundary_threshold=threshold), uniform)
    assert torch.equal(drawn, choose(decide_bits(pairs, threshold), Sampling(), uniform))
    assert (ends.gather(1, drawn[:, None] % 256)[:, 0] == (drawn >= 256)).all()


def test_a_rows_numbers_depend_on_its_seed_alone() -> None:
    assert torch.equal(uniform_numbers(4, 10, 7)[2], uniform_numbers(1, 10, 9)[0])


@pytest.mark.parametrize(
    "fields",
    [
        *({"temperature": -0.1}, {"temperature": math.nan}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}),
        *({"min_p": 1.1}, {"boundary_threshold": 0.0}, {"boundary_threshold": 1.0}),
    ],
)
def test_settings_out_of_range_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        Sampling(**fields)  # type: ignore[arg-type]
