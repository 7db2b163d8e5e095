"""What a stage's losses are made of: how many terms, which ones, and what they are for an encoder that is perfect."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from megabyte_distill.config.model import DechunkMode
from megabyte_distill.config.stage import STAGE_ORDER, TRAINS_DECODER, AlignLossScale, BoundarySource, StageConfig
from megabyte_distill.curriculum import boundary_learning, byte_sft, embedding_alignment, joint_distillation
from megabyte_distill.curriculum.stages import STAGES
from megabyte_distill.data.micro_batch import concatenate_rows
from megabyte_distill.data.packing import PackedRow, without_document_mask
from megabyte_distill.data.text_mask import text_positions
from megabyte_distill.model.backbone import Backbone
from megabyte_distill.model.student import Given, Student, set_trainable
from megabyte_distill.objectives.objective import Objective
from tests.tiny_student import (
    assert_same,
    gradients,
    padded_row,
    random_rows,
    segments_alone,
    tiny_backbone,
    tiny_student,
    with_other_padding,
)

pytestmark = pytest.mark.usefixtures("world")

CONFIG = StageConfig()
SOURCES = [(name, BoundarySource.GOLD) for name in STAGES] + [(name, BoundarySource.ROUTER) for name in TRAINS_DECODER]
"""(stage, boundary source): the setting exists where the decoder trains."""


def objective_of(name: str, config: StageConfig = CONFIG, teacher: Backbone | None = None) -> Objective:
    return STAGES[name].objective(config, teacher or tiny_backbone().requires_grad_(False).double(), None)


def total(objective: Objective, student: Student, rows: list[PackedRow]) -> Tensor:
    terms = [objective.weights[name] * v for row in rows for name, v in objective.losses(student, row).items()]
    return torch.stack(terms).sum()


def test_stages_run_in_the_order_that_chains() -> None:
    assert tuple(STAGES) == STAGE_ORDER
    assert [stage.name for stage in STAGES.values()] == list(STAGES)


@pytest.mark.parametrize("name", STAGES)
def test_counts_are_the_number_of_summed_terms(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every elementwise loss becomes one, so that a sum is the number of its terms."""

    def ones(first: Tensor, *_: object, **__: object) -> Tensor:
        return torch.ones(first.shape[0])

    monkeypatch.setattr(embedding_alignment, "alignment_squared_error", ones)
    monkeypatch.setattr(joint_distillation, "reverse_kl", ones)
    monkeypatch.setattr(boundary_learning, "boundary_bce", ones)
    monkeypatch.setattr(byte_sft, "boundary_bce", ones)
    monkeypatch.setattr(byte_sft, "joint_nll", ones)
    config = replace(CONFIG, align_loss_scale=AlignLossScale.MEAN, align_layers=1)
    objective = objective_of(name, config, tiny_backbone())
    for row in [*random_rows(5), concatenate_rows(random_rows(3, seed=1))]:
        losses, counts = objective.losses(tiny_student(), row), objective.counts(row)
        assert losses.keys() == counts.keys() == objective.weights.keys()
        for loss in losses:
            assert float(losses[loss]) == counts[loss] > 0, loss


def test_counts_by_hand() -> None:
    row = padded_row()
    used, documents = int(row.is_real.sum()), len(row.documents)
    ends = int((row.bits & row.is_real).sum())
    expected = {
        "1a": {"alignment mse": ends, "layers mse": ends},
        "1b": {"reverse kl": ends},
        "1c": {"router bce": used - documents},
        "2a": {"byte ce": used},
        "2b": {"byte ce": used, "router bce": used - documents},
        "3a": {"byte ce": used, "router bce": used - documents},
    }
    assert {name: objective_of(name, replace(CONFIG, align_layers=2)).counts(row) for name in STAGES} == expected
    assert objective_of("1a").counts(row) == {"alignment mse": ends}


@pytest.mark.parametrize(("name", "source"), SOURCES)
@pytest.mark.parametrize("mode", [DechunkMode.HARD, DechunkMode.OFFICIAL])
def test_rows_together_documents_apart_and_other_padding_have_one_loss_and_gradient(
    name: str, source: BoundarySource, mode: DechunkMode
) -> None:
    student = tiny_student(mode=mode).double()
    objective = objective_of(name, replace(CONFIG, boundary_source=source, align_layers=2))
    rows = [padded_row(), *random_rows(2, seed=4)]
    ways = {
        "rows": rows,
        "micro-batch": [concatenate_rows(rows)],
        "documents": [document for row in rows for document in segments_alone(row)],
        "other padding": [with_other_padding(rows[0]), *rows[1:]],
        "other bucket": [replace(row, chunk_bucket=1) if name in TRAINS_DECODER else row for row in rows],
    }
    expected = total(objective, student, rows)
    wanted = gradients(student, lambda: total(objective, student, rows))
    for way, packed in ways.items():
        got = total(objective, student, packed)
        # sums are kept in fp32
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5, msg=lambda text, way=way: f"{way}: {text}")
        found = gradients(student, lambda packed=packed: total(objective, student, packed))
        assert_same(found, wanted, rtol=1e-4, atol=1e-5)
        counts = [sum(objective.counts(row)[loss] for row in packed) for loss in objective.weights]
        assert counts == [sum(objective.counts(row)[loss] for row in rows) for loss in objective.weights]


class Oracle(nn.Module):
    """An encoder that has learnt its lesson: at gold ends it writes the teacher's embedding, elsewhere noise."""

    def __init__(self, teacher: Backbone, row: PackedRow) -> None:
        super().__init__()
        self.teacher, self.row = teacher, row

    def mix(self, byte_ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        r = torch.randn(byte_ids.shape[0], self.teacher.backbone_config.hidden_size)
        ends = (self.row.bits & self.row.is_real).nonzero()[:, 0]
        return r.index_copy(0, ends, self.teacher.embed(self.row.tokens[self.row.token_mask]))

    def project(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("document_mask", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_a_perfect_encoder_has_no_loss_in_1a_and_1b(document_mask: bool, tied: bool) -> None:
    student = tiny_student(tied=tied).eval()
    teacher: Backbone = student.backbone  # type: ignore[assignment]
    row = padded_row() if document_mask else without_document_mask(padded_row())
    student.byte_encoder = Oracle(teacher, row)  # type: ignore[assignment]
    with torch.no_grad():
        aligned = objective_of("1a", replace(CONFIG, align_layers=2), teacher)
        assert {name: float(loss) for name, loss in aligned.losses(student, row).items()} == {
            "alignment mse": 0.0,
            "layers mse": pytest.approx(0.0, abs=1e-8),
        }
        distilled = objective_of("1b", teacher=teacher)
        loss = float(distilled.losses(student, row)["reverse kl"])
    assert abs(loss) < 1e-4 * distilled.counts(row)["reverse kl"]
    measures = distilled.measures()
    ours, theirs = measures["bits per byte"], measures["teacher bits per byte"]
    torch.testing.assert_close(ours[0], theirs[0])
    assert ours[1] == theirs[1] == int(text_positions(row).sum())


def test_teacher_bits_are_the_negative_log_likelihood_of_the_rows_tokens() -> None:
    student, teacher, row = tiny_student().eval(), tiny_backbone(), padded_row()
    objective = objective_of("1b", teacher=teacher)
    with torch.no_grad():
        objective.losses(student, row)
        bits = 0.0
        for document in segments_alone(row):
            states = teacher(teacher.embed(document.tokens), document.cu_chunks)
            nll = -teacher.logits(states).log_softmax(-1)[:-1]
            bits += float(nll.gather(1, document.token_labels[:-1, None]).sum()) / math.log(2)
    assert float(objective.measures()["teacher bits per byte"][0]) == pytest.approx(bits, rel=1e-5)
    student.train()
    objective.losses(student, row)
    assert objective.measures() == {}, "in training the second log softmax over W would cost time"


def test_1b_gives_the_teacher_no_gradient_and_uses_gold_bits() -> None:
    student, teacher, row = tiny_student(), tiny_backbone(), padded_row()
    total(objective_of("1b", teacher=teacher), student, [row]).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is None for parameter in student.router.parameters())


def test_alignment_scale_and_measure() -> None:
    student, teacher, row = tiny_student(), tiny_backbone(), padded_row()
    with torch.no_grad():
        r = student.byte_encoder(row.byte_ids, row.cu_seqlens)[row.bits & row.is_real]
        target = teacher.embed(row.tokens[row.token_mask])
        mse = float((r - target).square().mean(-1).sum())
        variance = float(teacher.embedding.weight[:90].var(0, unbiased=False).mean())
        for scale, expected in ((AlignLossScale.MEAN, mse), (AlignLossScale.TABLE_VARIANCE, mse / variance)):
            objective = objective_of("1a", replace(CONFIG, align_loss_scale=scale), teacher)
            assert float(objective.losses(student, row)["alignment mse"]) == pytest.approx(expected, rel=1e-5)
            relative, count = objective.measures()["alignment mse relative"]
            assert float(relative) == pytest.approx(mse / variance, rel=1e-5) and count == r.shape[0]


@pytest.mark.parametrize("layers", [1, 2])
def test_behind_layers_the_encoders_states_are_compared_with_the_teachers(layers: int) -> None:
    """Against what the teacher's own forward has at that place, each document by itself, and autograd through it."""
    student, teacher, row = tiny_student().double(), tiny_backbone().double().requires_grad_(False), padded_row()
    seen: list[Tensor] = []
    teacher.decoder.layers[layers - 1].register_forward_hook(lambda module, arguments, out: seen.append(out[0][:, 0]))

    def states(x: Tensor) -> Tensor:
        teacher(x, torch.tensor([0, x.shape[0]], dtype=torch.int32))
        return seen.pop()

    def brute_force() -> tuple[Tensor, Tensor]:
        mse, relative = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for document in segments_alone(row):
            r = student.byte_encoder(document.byte_ids, document.cu_seqlens)[document.bits]
            got, wanted = states(r), states(teacher.embed(document.tokens))
            errors = (got - wanted).square().mean(-1)
            mse, relative = mse + errors.sum(), relative + (errors / wanted.square().mean(-1)).sum()
        return mse, relative

    set_trainable(student, ("byte_encoder.",))
    mse, relative = (value.detach() for value in brute_force())
    for scale, place in ((AlignLossScale.MEAN, 0), (AlignLossScale.TABLE_VARIANCE, 1)):
        config = replace(CONFIG, align_loss_scale=scale, align_layers=layers, align_layers_loss_weight=0.25)
        objective = objective_of("1a", config, teacher)
        assert objective.weights == {"alignment mse": 1.0, "layers mse": 0.25}
        found = gradients(student, lambda o=objective: o.losses(student, row)["layers mse"])
        assert_same(found, gradients(student, lambda p=place: brute_force()[p]), rtol=1e-4, atol=1e-5)
        assert any(value.abs().max() > 1e-2 for value in found.values())
        loss = objective.losses(student, row)["layers mse"]
        assert float(loss) == pytest.approx(float((mse, relative)[place]), rel=1e-5)
        measured, count = objective.measures()["layers mse relative"]
        assert float(measured) == pytest.approx(float(relative), rel=1e-5) and count == int(row.token_mask.sum())
        plain = objective_of("1a", replace(config, align_layers=0, align_layers_loss_weight=1.0), teacher)
        assert torch.equal(objective.losses(student, row)["alignment mse"], plain.losses(student, row)["alignment mse"])
    assert all(parameter.grad is None for parameter in teacher.parameters())


@pytest.mark.parametrize("name", ["2a", "2b"])
def test_the_boundary_source_feeds_bits_and_labels_stay_gold(name: str) -> None:
    student, row = tiny_student(), padded_row()
    with torch.no_grad():
        p = student(row).p
        decided = (p > 0.5) | (row.byte_ids == 254)
        decided = torch.where(row.is_real, decided, row.bits)
        for source, bits in ((BoundarySource.GOLD, row.bits), (BoundarySource.ROUTER, decided)):
            objective = objective_of(name, replace(CONFIG, boundary_source=source))
            logits = student(row, Given(bits)).logits
            expected = -logits.log_softmax(-1).gather(1, row.labels[:, None])[row.is_real].sum()
            torch.testing.assert_close(objective.losses(student, row)["byte ce"], expected)
    assert not torch.equal(decided, row.bits)


def test_the_routers_weight_is_a_setting_of_2b() -> None:
    config = replace(CONFIG, router_loss_weight=0.25)
    assert objective_of("2b", config).weights == {"byte ce": 1.0, "router bce": 0.25}
    assert objective_of("2a", config).weights == {"byte ce": 1.0}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_reports_the_measure_that_stands_for_it(name: str) -> None:
    student = tiny_student().eval()
    objective = objective_of(name, teacher=tiny_backbone())
    with torch.no_grad():
        objective.losses(student, padded_row())
    total_, count = objective.measures()[STAGES[name].measure]
    assert math.isfinite(float(total_)) and int(count) > 0


def test_objectives_see_through_a_wrapper() -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: object, **kwargs: object) -> object:
            return self.module(*args, **kwargs)

    student, row = tiny_student(), padded_row()
    for name in STAGES:
        objective = objective_of(name, teacher=tiny_backbone())
        with torch.no_grad():
            bare, wrapped = objective.losses(student, row), objective.losses(Wrapper(student), row)
        assert {k: float(v) for k, v in bare.items()} == {k: float(v) for k, v in wrapped.items()}
