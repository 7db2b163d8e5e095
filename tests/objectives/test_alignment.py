"""Stage 1a's error and the variance that makes it a share."""

from __future__ import annotations

import torch

from megabyte_distill.objectives.alignment import alignment_squared_error, table_variance


def test_error_is_a_mean_over_features_with_the_gradient_of_one() -> None:
    r = torch.tensor([[1.0, 2.0, 3.0, 4.0], [0.0, 0.0, 0.0, 0.0]], requires_grad=True)
    target = torch.tensor([[1.0, 0.0, 3.0, 8.0], [0.0, 0.0, 0.0, 0.0]])
    error = alignment_squared_error(r, target)
    assert error.tolist() == [5.0, 0.0]
    error.sum().backward()
    torch.testing.assert_close(r.grad, (r.detach() - target) * 2 / 4)


def test_bf16_states_are_compared_in_fp32() -> None:
    r, target = torch.randn(3, 8).bfloat16(), torch.randn(3, 8).bfloat16()
    error = alignment_squared_error(r, target)
    assert error.dtype is torch.float32
    torch.testing.assert_close(error, (r.float() - target.float()).pow(2).mean(-1))


def test_a_constant_guess_has_exactly_the_tables_variance() -> None:
    table = torch.randn(50, 12) * torch.linspace(0.1, 3, 12) + 5
    guess = table.mean(0).expand(50, -1)
    torch.testing.assert_close(alignment_squared_error(guess, table).mean(), table_variance(table))
    assert alignment_squared_error(guess + 0.1, table).mean() > table_variance(table)
