"""One update of each stage: what moves, what stays as it is bit for bit, and by which learning rate and decay."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.pretrain.job import Job, weights

TRAINS = {
    "1a": ("byte_encoder.",),
    "1b": ("byte_encoder.", "backbone.decoder.", "backbone.output_layer."),
    "1c": ("router.",),
    "2a": ("byte_decoder.",),
    "2b": ("byte_encoder.", "router.", "byte_decoder.", "backbone.decoder."),
    "3a": ("byte_encoder.", "router.", "byte_decoder.", "backbone.decoder."),
}
ONE_UPDATE = ("--train-iters", "1", "--lr-warmup-fraction", "0", "--eval-iters", "0", "--clip-grad", "0")


def one_update(job: Job, start: Path, run: Path, stage: str, *flags: str) -> dict[str, torch.Tensor]:
    """The weights after one update of a stage from the end of another run."""
    flags += ("--dialogue-data-path", job.dialogues) if stage == "3a" else ()
    assert job.run(run, "--load", str(start), "--stages", stage, *ONE_UPDATE, *flags) == 0
    return weights(run, stage)


@pytest.mark.parametrize("stage", TRAINS)
def test_what_a_stage_does_not_train_keeps_every_bit(job: Job, finished: Path, tmp_path: Path, stage: str) -> None:
    before = weights(finished, "2b")
    after = one_update(job, finished, tmp_path / "run", stage, "--weight-decay", "0.1")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    allowed = {name for name in before if name.startswith(TRAINS[stage])}
    assert changed <= allowed, changed - allowed
    assert changed, "nothing moved"
    for prefix in TRAINS[stage]:
        assert any(name.startswith(prefix) for name in changed), prefix


@pytest.mark.parametrize("stage", ["1b", "2b"])
def test_a_frozen_backbone_keeps_every_bit(job: Job, finished: Path, tmp_path: Path, stage: str) -> None:
    before = weights(finished, "2b")
    after = one_update(job, finished, tmp_path / "run", stage, "--freeze-backbone")
    frozen = [name for name in before if name.startswith("backbone.")]
    assert all(torch.equal(before[name], after[name]) for name in frozen)


@pytest.mark.parametrize("stage", TRAINS)
def test_weight_decay_acts_on_every_trained_parameter(job: Job, finished: Path, tmp_path: Path, stage: str) -> None:
    rate, decay = 1e-2, 0.5
    start = weights(finished, "2b")
    flags = ("--lr", str(rate), "--backbone-lr", str(rate))
    without = one_update(job, finished, tmp_path / "without", stage, *flags, "--weight-decay", "0")
    decayed = one_update(job, finished, tmp_path / "with", stage, *flags, "--weight-decay", str(decay))
    for name, weight in start.items():
        expected = rate * decay * weight if name.startswith(TRAINS[stage]) else torch.zeros_like(weight)
        torch.testing.assert_close(without[name] - decayed[name], expected, atol=2e-6, rtol=1e-3, msg=name)


@pytest.mark.parametrize("stage", ["1b", "2b"])
def test_the_backbone_has_its_own_learning_rate(job: Job, finished: Path, tmp_path: Path, stage: str) -> None:
    start = weights(finished, "2b")
    flags = ("--lr", "1e-3", "--backbone-lr", "1e-5", "--weight-decay", "0")
    after = one_update(job, finished, tmp_path / "run", stage, *flags)
    for prefix, rate in (("backbone.decoder.", 1e-5), ("byte_encoder.", 1e-3)):
        moved = max(float((after[n] - start[n]).abs().max()) for n in start if n.startswith(prefix))
        # Adam's first update is the learning rate, whatever the gradient
        assert moved == pytest.approx(rate, rel=0.05), prefix


def test_a_resumed_stage_keeps_the_backbones_learning_rate(job: Job, finished: Path, tmp_path: Path) -> None:
    run, flags = tmp_path / "run", ("--stages", "2b", "--train-iters", "2", "--eval-iters", "0", "--weight-decay", "0")
    rates = ("--lr", "1e-3", "--backbone-lr", "0", "--lr-decay-style", "constant")
    assert job.run(run, "--load", str(finished), *flags, *rates, "--exit-interval", "1") == 0
    assert job.run(run, "--load", str(finished), *flags, *rates) == 0
    before, after = weights(finished, "2b"), weights(run, "2b")
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("backbone."))


def test_the_learning_rate_of_a_resumed_run_is_that_of_its_flags(job: Job, finished: Path, tmp_path: Path) -> None:
    run, flags = tmp_path / "run", ("--stages", "1c", "--train-iters", "2", "--eval-iters", "0", "--weight-decay", "0")
    constant = ("--lr-decay-style", "constant")
    assert job.run(run, "--load", str(finished), *flags, *constant, "--lr", "1e-3", "--exit-interval", "1") == 0
    first = weights(run, "1c")
    assert job.run(run, "--load", str(finished), *flags, *constant, "--lr", "0") == 0
    second = weights(run, "1c")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_clipping_bounds_the_update_of_a_large_gradient(job: Job, finished: Path, tmp_path: Path) -> None:
    # with epsilon far above the gradient, Adam's update is proportional to it
    flags = ("--weight-decay", "0", "--adam-eps", "1e6", "--lr", "1e6", "--min-lr-ratio", "0")
    start = weights(finished, "2b")
    moved = {}
    for clip in ("0.5", "0.25"):
        after = one_update(job, finished, tmp_path / clip, "1a", *flags, "--clip-grad", clip)
        moved[clip] = sum(float((after[n] - start[n]).double().square().sum()) for n in start) ** 0.5
    assert moved["0.5"] == pytest.approx(0.5, rel=1e-2)
    assert moved["0.25"] == pytest.approx(0.25, rel=1e-2)


def test_bf16_keeps_fp32_masters(job: Job, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert job.run(run, "--bf16") == 0
    # updates far below bf16's resolution add up in the masters
    flags = ("--stages", "1c", "--lr", "1e-5", "--lr-decay-style", "constant", "--lr-warmup-fraction", "0")
    rarely = ("--train-iters", "100", "--eval-iters", "0", "--save-interval", "0", "--log-interval", "100")
    small = tmp_path / "small"
    assert job.run(small, "--load", str(run), "--bf16", *flags, *rarely) == 0
    before, after = weights(run, "2b"), weights(small, "1c")
    moved = [float((before[n] - after[n]).abs().mean()) for n in before if n.startswith("router.")]
    assert max(moved) > 10e-5


def test_without_the_saved_optimizer_a_bf16_run_goes_on_from_the_saved_weights(job: Job, tmp_path: Path) -> None:
    run, flags = tmp_path / "run", ("--bf16", "--stages", "1a", "--eval-iters", "0")
    assert job.run(run, *flags, "--exit-interval", "2") == 0
    before = weights(run, "1a", 2)
    assert job.run(run, *flags, "--no-load-optim", "--lr", "0", "--weight-decay", "0") == 0
    after = weights(run, "1a", 4)
    assert all(torch.equal(before[name], after[name]) for name in before)
