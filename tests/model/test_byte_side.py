"""Encoder, router and decoder together: packing, leaks, steps, gradients, low precision."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megabyte_distill.config.model import ByteMixer, DechunkMode
from megabyte_distill.kernels import ops
from megabyte_distill.model.byte_decoder import DechunkState, dechunk_step, init_dechunk_state
from tests.model.byte_side import ByteSide, Row, random_row, running_mean, tiny_config

MIXERS = list(ByteMixer)
STEPPED_MODES = [DechunkMode.HARD, DechunkMode.CAUSAL]


def loss_gradients(model: ByteSide, rows: list[Row]) -> dict[str, Tensor]:
    """Gradients of a fixed function of all logits, summed over rows."""
    model.zero_grad()
    for row in rows:
        logits = model(row)
        (logits * torch.linspace(-1, 1, 512, dtype=logits.dtype)).tanh().sum().backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("mode", list(DechunkMode))
def test_a_packed_row_equals_its_documents_alone(mixer: ByteMixer, mode: DechunkMode) -> None:
    model = ByteSide(tiny_config(mixer, mode)).double()
    row = random_row(1, 40, 17, 1, 2, 33)
    if mode is DechunkMode.OFFICIAL:
        row.bits[1] = row.bits[41] = False
    documents = [row.document(index) for index in range(6)]
    torch.testing.assert_close(model(row), torch.cat([model(document) for document in documents]))
    packed, alone = loss_gradients(model, [row]), loss_gradients(model, documents)
    assert packed.keys() == alone.keys()
    for name in packed:
        torch.testing.assert_close(packed[name], alone[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("mode", list(DechunkMode))
def test_every_parameter_of_the_byte_side_gets_a_gradient(mixer: ByteMixer, mode: DechunkMode) -> None:
    model = ByteSide(tiny_config(mixer, mode))
    row = random_row(40, 30)
    if mode is DechunkMode.OFFICIAL:
        row.bits[:3] = False
    gradients = loss_gradients(model, [row])
    missing = [name for name, _ in model.named_parameters() if name not in gradients or not gradients[name].any()]
    assert missing == []


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("mode", STEPPED_MODES)
def test_no_logit_up_to_t_moves_with_the_next_byte_when_bits_are_fixed(mixer: ByteMixer, mode: DechunkMode) -> None:
    model = ByteSide(tiny_config(mixer, mode))
    row = random_row(48)
    logits = model(row)
    for t in range(47):
        changed = replace_byte(row, t + 1)
        moved = model(changed)
        assert torch.equal(moved[: t + 1], logits[: t + 1]), f"logits up to {t} saw byte {t + 1}"
        assert not torch.equal(moved[t + 1], logits[t + 1])


@pytest.mark.parametrize("mixer", MIXERS)
def test_official_mode_does_look_at_the_next_byte(mixer: ByteMixer) -> None:
    model = ByteSide(tiny_config(mixer, DechunkMode.OFFICIAL))
    row = random_row(48)
    end = int(row.bits[1:47].nonzero()[0]) + 1
    assert not torch.equal(model(replace_byte(row, end + 1))[end], model(row)[end])


def replace_byte(row: Row, index: int) -> Row:
    byte_ids = row.byte_ids.clone()
    byte_ids[index] = (byte_ids[index] + 1) % 250
    return Row(byte_ids, row.bits, row.cu_seqlens)


class Stepper:
    """Steps a batch of documents of different lengths together, rows leaving as they end."""

    def __init__(self, model: ByteSide, documents: list[Row], mode: DechunkMode) -> None:
        self.model, self.documents, self.mode = model, documents, mode
        rows = len(documents)
        self.encoder, self.decoder = model.encoder.init_state(rows), model.decoder.init_state(rows)
        dtype = model.encoder.embedding.weight.dtype
        self.dechunk: DechunkState = init_dechunk_state(rows, 12, torch.device("cpu"), dtype)
        self.r_previous = torch.zeros(rows, 12, dtype=dtype)
        self.chunks: list[list[Tensor]] = [[] for _ in documents]

    def backbone(self, rows: Tensor, r: Tensor, ended: Tensor) -> Tensor:
        """The running mean, row by row; rows whose chunk goes on get NaN, which nothing may read."""
        h = torch.full_like(r, torch.nan)
        for place, row in enumerate(rows.tolist()):
            if bool(ended[place]):
                self.chunks[row].append(r[place])
                h[place] = running_mean(torch.stack(self.chunks[row]), torch.tensor([0, len(self.chunks[row])]))[-1]
        return h

    def logits(self) -> list[Tensor]:
        out: list[list[Tensor]] = [[] for _ in self.documents]
        for t in range(max(document.byte_ids.shape[0] for document in self.documents)):
            rows = torch.tensor([i for i, d in enumerate(self.documents) if d.byte_ids.shape[0] > t])
            byte_ids = torch.stack([self.documents[i].byte_ids[t] for i in rows.tolist()])
            ended = torch.stack([self.documents[i].bits[t] for i in rows.tolist()])
            r, encoder = self.model.encoder.step(byte_ids, self.encoder.select(rows))
            p_previous = self.model.router.step(self.r_previous[rows], r)
            h = self.backbone(rows, r, ended)
            s, dechunk = dechunk_step(self.dechunk.select(rows), ended, h, p_previous, self.mode)
            logits, decoder = self.model.decoder.step(s, r, byte_ids, self.decoder.select(rows))
            self.encoder.put(rows, encoder)
            self.decoder.put(rows, decoder)
            self.dechunk.put(rows, dechunk)
            self.r_previous[rows] = r
            for place, row in enumerate(rows.tolist()):
                out[row].append(logits[place])
        return [torch.stack(row) for row in out]


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("mode", STEPPED_MODES)
def test_steps_of_a_ragged_batch_equal_forward(mixer: ByteMixer, mode: DechunkMode) -> None:
    model = ByteSide(tiny_config(mixer, mode))
    row = random_row(1, 40, 17, 63)
    documents = [row.document(index) for index in range(4)]
    with torch.no_grad():
        stepped = Stepper(model, documents, mode).logits()
        for got, document in zip(stepped, documents, strict=True):
            torch.testing.assert_close(got, model(document), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_row_put_back_to_the_initial_state_starts_anew(mixer: ByteMixer) -> None:
    encoder = ByteSide(tiny_config(mixer)).encoder
    byte_ids = torch.tensor([254, 7])
    with torch.no_grad():
        state = encoder.init_state(2)
        fresh, _ = encoder.step(byte_ids, state)
        for _ in range(3):
            _, state = encoder.step(torch.tensor([5, 6]), state)
        state.put(torch.tensor([1]), encoder.init_state(1))
        again, _ = encoder.step(byte_ids, state)
    torch.testing.assert_close(again[1], fresh[1])
    assert not torch.allclose(again[0], fresh[0])


def test_official_mode_cannot_be_stepped() -> None:
    state = init_dechunk_state(1, 2, torch.device("cpu"), torch.float32)
    with pytest.raises(ValueError, match="official"):
        dechunk_step(state, torch.tensor([True]), torch.zeros(1, 2), torch.ones(1), DechunkMode.OFFICIAL)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("mode", list(DechunkMode))
def test_gradients_equal_finite_differences(mixer: ByteMixer, mode: DechunkMode) -> None:
    config = replace(tiny_config(mixer, mode), encoder_layers=1, decoder_layers=1)
    model = ByteSide(config).double()
    row = random_row(1, 7, 5)
    # The straight-through factor's gradient is not that of its forward value, so p must not depend on what is moved.
    leaf = (
        model.decoder.mixer.blocks[0].norm.weight if mode is not DechunkMode.HARD else model.decoder.input.value.weight
    )

    def loss() -> Tensor:
        result: Tensor = ops.joint_cross_entropy(model(row), torch.arange(13)).sum()
        return result

    (grad,) = torch.autograd.grad(loss(), leaf)
    direction = torch.randn_like(leaf)
    step = 1e-6
    with torch.no_grad():
        leaf.add_(step * direction)
        above = loss()
        leaf.sub_(2 * step * direction)
        below = loss()
    torch.testing.assert_close((above - below) / (2 * step), (grad * direction).sum(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("mode", list(DechunkMode))
def test_bf16_parameters_keep_an_fp32_residual_stream(mixer: ByteMixer, mode: DechunkMode) -> None:
    model = ByteSide(tiny_config(mixer, mode)).bfloat16()
    row = random_row(40, 23)
    logits = model(row)
    assert logits.dtype is torch.bfloat16
    logits.float().square().mean().backward()
    assert all(bool(value.grad.isfinite().all()) for value in model.parameters() if value.grad is not None)
    streams: list[torch.dtype] = []
    for block in (*model.encoder.mixer.blocks, *model.decoder.mixer.blocks):
        block.register_forward_hook(lambda module, args, output: streams.append(output.dtype))
    model(row)
    assert streams == [torch.float32] * 4


@pytest.mark.parametrize("mixer", MIXERS)
def test_bf16_logits_stay_near_those_of_the_same_weights_in_fp32(mixer: ByteMixer) -> None:
    low = ByteSide(tiny_config(mixer)).bfloat16()
    high = ByteSide(tiny_config(mixer))
    high.load_state_dict(low.state_dict())
    row = random_row(60, 30)
    with torch.no_grad():
        expected, got = high(row), low(row).float()
    # About 25 roundings of 2^-9 lie on the longest path and partly cancel: 2 % of the logits' spread is their order.
    assert float((got - expected).square().mean().sqrt()) < 0.02 * float(expected.std())


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_encoder_takes_rows_of_one_byte_and_of_none(mixer: ByteMixer) -> None:
    encoder = ByteSide(tiny_config(mixer)).encoder
    assert encoder(torch.tensor([254]), torch.tensor([0, 1], dtype=torch.int32)).shape == (1, 12)
    assert encoder(torch.zeros(0, dtype=torch.int64), torch.tensor([0], dtype=torch.int32)).shape == (0, 12)


def test_null_group_exists_only_where_it_is_read() -> None:
    names = {name for name, _ in ByteSide(tiny_config(ByteMixer.CONV)).named_parameters()}
    official = {name for name, _ in ByteSide(tiny_config(ByteMixer.CONV, DechunkMode.OFFICIAL)).named_parameters()}
    assert official - names == {"decoder.null_group"}
