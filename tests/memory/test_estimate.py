"""What is reckoned without memory is what training really allocates."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from megabyte_distill.config import Settings, parse_arguments
from megabyte_distill.config.published import PUBLISHED_BACKBONES
from megabyte_distill.config.stage import STAGE_ORDER
from megabyte_distill.curriculum.stages import STAGES
from megabyte_distill.memory.estimate import RankMemory, estimate, measured
from megabyte_distill.memory.even_rows import even_row, even_tokens
from megabyte_distill.memory.pretended import pretended_world, weightless
from megabyte_distill.model.backbone import Backbone, transformer_config
from megabyte_distill.parallel.process_groups import world
from tests.memory.real_rank import BACKBONE, BYTES_PER_CHUNK, SMALL, VIRTUAL, real_models, real_sizes
from tests.model.test_recompute import bytes_kept
from tests.pretrain.job import run_as_ranks

BYTES_OF_BF16_ADAM = 12
"""Master and two moments of a parameter."""
EXACT = ("weights", "teacher", "gradients", "optimizer", "sent", "returned")
KINDS = ["", "--bf16", "--use-distributed-optimizer", "--bf16 --use-distributed-optimizer"]


def reckoned(flags: str, world_size: int = 1) -> tuple[Settings, list[RankMemory]]:
    settings = parse_arguments([*SMALL, *flags.split()], world_size=world_size)
    return settings, list(estimate(settings, BACKBONE, world_size=world_size, bytes_per_chunk=BYTES_PER_CHUNK))


def exact(memory: RankMemory) -> dict[str, int]:
    """What must be equal to the byte; of what is sent the largest payload."""
    of_largest = {name: max(getattr(part, name) for part in memory.virtual_stages) for name in ("sent", "returned")}
    return {name: of_largest[name] if name in of_largest else getattr(memory, name) for name in EXACT}


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("llama3.2-3b", 3_212_749_824),
        ("qwen3-4b", 4_022_468_096),
        ("olmo2-1b", 1_484_916_736),
        ("llama3.1-8b", 8_030_261_248),
        ("gemma3-1b", 999_885_952),
    ],
)
def test_published_shapes_have_the_published_number_of_parameters(preset: str, parameters: int) -> None:
    config = PUBLISHED_BACKBONES[preset]
    with pretended_world():
        with weightless():
            backbone = Backbone(config, transformer_config(config, perform_initialization=False))
        assert sum(parameter.numel() for parameter in backbone.parameters()) == parameters
        assert all(parameter.is_meta for parameter in backbone.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_weights_gradients_and_optimizer_are_exactly_those_of_training(kind: str) -> None:
    settings, memories = reckoned(f"{kind} --byte-targets exact")
    with world():
        for memory in memories:
            real = real_sizes(settings, memory.stage)
            assert exact(memory) == {name: getattr(real, name) for name in EXACT}


def test_a_frozen_backbone_is_its_own_teacher_and_costs_no_gradient() -> None:
    _, (frozen,) = reckoned("--stages 1b --freeze-backbone")
    _, (trained,) = reckoned("--stages 1b")
    assert frozen.teacher == 0 and trained.teacher == 4 * sum_of_backbone()
    assert frozen.trained < trained.trained and frozen.gradients == 4 * frozen.trained


def test_a_backbone_frozen_throughout_serves_2a_and_2b_as_their_teacher() -> None:
    flags = "--stages 1b,2a,2b --byte-targets exact --2a.exact-targets-from teacher"
    _, frozen = reckoned(f"{flags} --freeze-backbone")
    _, trained = reckoned(flags)
    assert [memory.teacher for memory in frozen] == [0, 0, 0]
    assert [memory.teacher for memory in trained] == [4 * sum_of_backbone()] * 3


def sum_of_backbone() -> int:
    with pretended_world(), weightless():
        backbone = Backbone(BACKBONE, transformer_config(BACKBONE, perform_initialization=False))
        return sum(parameter.numel() for parameter in backbone.parameters())


@pytest.mark.parametrize(
    ("layout", "virtual"), [("--tensor-model-parallel-size 2 --pipeline-model-parallel-size 2", VIRTUAL), ("", (1,))]
)
def test_four_ranks_hold_what_was_reckoned_for_them(layout: str, virtual: tuple[int, ...]) -> None:
    flags = f"{layout} --use-distributed-optimizer --bf16 --stages {','.join(STAGE_ORDER)}"
    wanted = {
        (number, memory.stage, memory.pipeline_rank): exact(memory)
        for number in virtual
        for memory in reckoned(f"{flags} --num-virtual-stages-per-pipeline-rank {number}", world_size=4)[1]
    }
    script = Path(__file__).with_name("real_rank.py")
    done = run_as_ranks(str(script), *flags.split(), processes=4)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = [json.loads(line) for line in re.findall(r"sizes (\{.*\})", done.stdout)]
    assert len(found) == 4 * len(STAGE_ORDER) * len(virtual)
    for real in found:
        memory = wanted[real["virtual"], real["stage"], real["pipeline_rank"]]
        for name in EXACT:
            if name == "optimizer" and real["data_parallel_rank"]:
                # the distributed optimizer cuts a padded buffer: other shards hold more or less of the padding
                assert real[name] <= BYTES_OF_BF16_ADAM * (memory["gradients"] // 4) // 4
            else:
                assert real[name] == memory[name], (real, name)


ATTENTION = "--byte-mixer local_attention --byte-attention-head-dim 12 --byte-attention-window 16 --router linear"
RECOMPUTED = "--recompute-granularity full --recompute-byte-mixers"


@pytest.mark.parametrize(
    ("stage", "flags"),
    [
        *((stage, flags) for stage in STAGE_ORDER for flags in ("", "--bf16", RECOMPUTED)),
        ("1a", f"{RECOMPUTED} {ATTENTION}"),
        ("2a", "--byte-targets exact --target-bytes-per-chunk 9"),
        ("1c", ATTENTION),
        ("2b", ATTENTION),
    ],
)
def test_activations_are_those_of_a_real_run(stage: str, flags: str) -> None:
    """Live bytes as counted on the CPU within 1 %, and what autograd says it saves within 5 %."""
    settings, (rank,) = reckoned(f"--stages {stage} {flags}")
    (memory,) = rank.virtual_stages
    config = settings.stages[stage]
    with world():
        student, teacher, _ = real_models(settings, STAGES[stage])
        table = even_tokens(BACKBONE.vocab_size) if stage.startswith("2") else None
        objective = STAGES[stage].objective(config, teacher, table)
        row = even_row(config, BYTES_PER_CHUNK)
        real = measured(student.train(), objective, row)
        with bytes_kept(student) as total:
            torch.stack([*objective.losses(student, row).values()]).sum()
    assert memory.kept == pytest.approx(real.kept, rel=0.01)
    assert memory.peak == pytest.approx(real.peak, rel=0.01)
    if "recompute" not in flags:  # a recomputed block's input is held by its function, not saved as a tensor
        assert memory.kept == pytest.approx(total[0], rel=0.05)


@pytest.mark.parametrize(
    ("stage", "flags", "has_teacher"),
    [
        ("2a", "--byte-targets exact", True),
        ("2a", "--byte-targets mixed --kd-temperature 2", True),
        ("2a", "--byte-targets exact --exact-targets-from student", False),
        ("2a", "--byte-targets exact --logits-load-dir somewhere", False),
        ("1a", "--align-layers 3", False),  # the student's own backbone serves
    ],
)
def test_what_a_loss_adds_is_counted(stage: str, flags: str, has_teacher: bool) -> None:
    settings, (rank,) = reckoned(f"--stages {stage} {flags}")
    _, (plain,) = reckoned(f"--stages {stage} --byte-targets hard")
    (memory,) = rank.virtual_stages
    assert (rank.teacher > 0) == has_teacher
    assert memory.peak > plain.virtual_stages[0].peak
    config = settings.stages[stage]
    with world():
        student, teacher, _ = real_models(settings, STAGES[stage])
        objective = STAGES[stage].objective(config, teacher, even_tokens(BACKBONE.vocab_size))
        real = measured(student.train(), objective, even_row(config, BYTES_PER_CHUNK))
    assert memory.kept == pytest.approx(real.kept, rel=0.01)
    assert memory.peak == pytest.approx(real.peak, rel=0.01)


def test_behind_a_run_what_is_read_of_the_teacher_is_counted(tmp_path: Path) -> None:
    """The embedding table and the alignment layers in 1a, all of it beside a frozen backbone in 1b."""
    (tmp_path / "teacher.json").write_text("{}")
    table, one, two, whole = (
        reckoned(f"--load {tmp_path} --stages {flags}")[1][0].teacher
        for flags in ("1a", "1a --align-layers 1", "1a --align-layers 2", "1b --freeze-backbone")
    )
    assert table == 4 * BACKBONE.padded_vocab_size * BACKBONE.hidden_size
    assert two - one == one - table > 0 and whole >= table + BACKBONE.num_layers * (one - table)
    assert reckoned("--stages 1b --freeze-backbone")[1][0].teacher == 0


def test_alignment_layers_are_recomputed_where_that_is_asked_for() -> None:
    kept = {
        flags: reckoned(f"--stages 1a {flags}")[1][0].virtual_stages[0].kept
        for flags in ("", "--align-layers 3", "--align-layers 3 --recompute-granularity full")
    }
    none, all_kept, inputs_kept = kept.values()
    assert none < inputs_kept < all_kept
    with pytest.raises(ValueError, match="--align-layers 5 is more than the 4 layers"):
        reckoned("--stages 1a --align-layers 5")


def test_in_a_pipeline_the_first_stage_has_the_most_micro_batches_in_flight() -> None:
    flags = "--pipeline-model-parallel-size 2 --stages 2b"
    _, (first, last) = reckoned(flags, world_size=2)
    (one,), (other,) = first.virtual_stages, last.virtual_stages
    assert (one.in_flight, other.in_flight) == (2, 1)
    assert first.activations == one.kept + max(one.kept, one.peak) and last.activations == other.peak
    assert one.sent > 0 and other.sent == 0
    _, (alone, _) = reckoned(f"{flags} --global-batch-size 4", world_size=2)
    assert alone.virtual_stages[0].in_flight == 1, "one micro-batch an update"


def test_virtual_stages_keep_the_micro_batches_of_megatrons_schedule() -> None:
    """Four micro-batches over PP2 x VPP2: a rank begins with 4 (the last with 2) forwards, then one more at a time."""
    flags = "--pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --stages 2b"
    _, (first, last) = reckoned(flags, world_size=2)
    in_flight = [[part.in_flight for part in rank.virtual_stages] for rank in (first, last)]
    assert [sum(parts) for parts in in_flight] == [5, 3]
    for rank, numbers in zip((first, last), in_flight, strict=True):
        parts = rank.virtual_stages
        kept = sum(number * part.kept for number, part in zip(numbers, parts, strict=True))
        assert kept <= rank.activations <= kept + max(part.peak for part in parts)
    assert all(part.sent > 0 for part in first.virtual_stages) and last.virtual_stages[-1].sent == 0
    assert first.virtual_stages[0].returned == 0 < min(last.virtual_stages[0].returned, last.virtual_stages[1].returned)


def test_recomputation_keeps_less() -> None:
    kept = {}
    for flags in ("", "--recompute-granularity full", "--recompute-byte-mixers"):
        _, (memory,) = reckoned(f"--stages 2b {flags}")
        kept[flags] = memory.virtual_stages[0].kept
    assert kept["--recompute-granularity full"] < kept[""] and kept["--recompute-byte-mixers"] < kept[""]
