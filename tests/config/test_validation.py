"""Contradictions between readable settings are found, each with what to do."""

from __future__ import annotations

import pytest

from megabyte_distill.config import ConfigError, parse_arguments

MOCK = "--mock-data "


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", "no data: give --data-path"),
        (
            "--stages 3a --3a.dialogue-data-path d",
            "where 3a runs alone, its dialogues are the run's data: --data-path d",
        ),
        (MOCK + "--data-path x", "--mock-data and --data-path contradict"),
        (MOCK + "--split 1,1,1", "--mock-data and --split contradict"),
        ("--data-path x --train-data-path y --valid-data-path z", "--train-data-path"),
        ("--train-data-path y", "--train-data-path needs --valid-data-path"),
        ("--valid-data-path y", "--valid-data-path needs --train-data-path"),
        ("--train-data-path y --valid-data-path z --split 9,1,0", "--split cuts what --data-path names"),
        ("--data-path 1 x 2", "got 3 words, expected stems only, or pairs"),
        ("--data-path a x 2 y", "got 'a' where the weight of 'x' stands"),
        ("--data-path 0 x 2 y", "expected a number above 0"),
        ("--data-path x --split 1,2,3,4", "expected up to three numbers"),
        ("--data-path x --split 1,-2", "expected up to three numbers"),
        ("--data-path x --split 0,0,0", "expected up to three numbers"),
        (MOCK + "--ckpt-step 3", "--ckpt-step needs --load"),
        (MOCK + "--fresh", "--fresh needs --save"),
        (MOCK + "--fresh --load r --save r", "--fresh removes r, from which --load wants to read"),
        (MOCK + "--tensor-model-parallel-size 2", "1 ranks cannot be cut into groups"),
        (MOCK + "--save-retain-interval 5", "is about --keep-last-checkpoints"),
        (MOCK + "--sequence-parallel", "cuts over tensor-parallel ranks"),
        (MOCK + "--overlap-param-gather", "give --use-distributed-optimizer and --overlap-grad-reduce as well"),
        (MOCK + "--num-virtual-stages-per-pipeline-rank 2", "give --pipeline-model-parallel-size above 1"),
        (MOCK + "--num-layers-per-virtual-pipeline-stage 2", "--num-layers-per-virtual-pipeline-stage interleaves"),
        (
            MOCK + "--num-virtual-stages-per-pipeline-rank 2 --num-layers-per-virtual-pipeline-stage 2",
            "--num-layers-per-virtual-pipeline-stage say the same thing twice; leave one out",
        ),
        (
            MOCK + "--microbatch-group-size-per-virtual-pipeline-stage 4",
            "--microbatch-group-size-per-virtual-pipeline-stage is about virtual pipeline stages: give",
        ),
        (MOCK + "--virtual-pipeline-model-parallel-size 2", "give --num-virtual-stages-per-pipeline-rank"),
        (
            MOCK + "--2a.target-bytes-per-chunk-iters 5",
            "stage 2a: --target-bytes-per-chunk-iters is about --target-bytes-per-chunk; give that",
        ),
        (
            MOCK + "--target-bytes-per-chunk 8 --target-bytes-per-chunk-start 4",
            "stage 1c: --target-bytes-per-chunk-start is where a change of length begins",
        ),
        (
            MOCK + "--target-bytes-per-chunk 8 --train-iters 4 --2b.target-bytes-per-chunk-iters 5",
            "stage 2b: --target-bytes-per-chunk-iters 5 is more than --train-iters 4",
        ),
        (MOCK + "--target-bytes-per-chunk 1", "--target-bytes-per-chunk: got 1.0, expected more than 1"),
        (MOCK + "--1b.target-bytes-per-chunk 8", "--target-bytes-per-chunk acts only in 1c, 2a, 2b"),
        (
            MOCK + "--byte-targets exact --no-document-mask --logits-load-dir c",
            "--logits-load-dir: the cached targets are of each document alone",
        ),
        (
            MOCK + "--byte-targets exact --no-document-mask --2b.logits-load-dir c",
            "--2b.logits-load-dir: the cached targets are of each document alone",
        ),
        (MOCK + "--kd-temperature 0 --byte-targets exact", "--kd-temperature: got 0.0, expected more than 0"),
        (MOCK + "--2b.kd-temperature -1", "--2b.kd-temperature: got -1.0, expected more than 0"),
        (MOCK + "--kd-temperature inf", "--kd-temperature: got 'inf', expected a finite number"),
        (
            MOCK + "--kd-temperature 2 --target-bytes-per-chunk 6",
            "stage 2b: --kd-temperature compares pairs of byte and bit, of which --target-bytes-per-chunk leaves",
        ),
        (
            MOCK + "--exact-targets-from student --2a.boundary-source router",
            "stage 2a: --exact-targets-from student needs chunks that are the teacher's tokens; give --boundary-source",
        ),
        (
            MOCK + "--exact-targets-from student --2a.logits-load-dir DIR",
            "stage 2a: --exact-targets-from student and --logits-load-dir name two sources",
        ),
        (
            MOCK + "--exact-targets-from teacher --byte-targets exact --logits-load-dir DIR",
            "stage 2a: --exact-targets-from teacher and --logits-load-dir name two sources",
        ),
        (
            MOCK + "--exact-targets-from student --target-bytes-per-chunk 6",
            "stage 2a: --exact-targets-from student needs chunks that are the teacher's tokens; leave it or",
        ),
        (
            MOCK + "--exact-targets-from student --byte-targets hard",
            "stage 2a: --exact-targets-from student is about --byte-targets exact or mixed, which is hard here",
        ),
        (
            MOCK + "--2a.kd-temperature 2 --2a.byte-targets hard",
            "stage 2a: --kd-temperature is about --byte-targets exact or mixed, which is hard here",
        ),
        (MOCK + "--2a.kd-loss-alpha 0.3", "stage 2a: --kd-loss-alpha weighs --byte-targets mixed, which is exact here"),
        (MOCK + "--align-layers -1", "--1a.align-layers: got -1, expected at least 0"),
        (MOCK + "--2a.align-layers 1", "--align-layers acts only in 1a"),
        (MOCK + "--align-layers-loss-weight -1", "--1a.align-layers-loss-weight: got -1.0, expected at least 0"),
        (MOCK + "--align-layers-loss-weight 2", "stage 1a: --align-layers-loss-weight weighs the error behind"),
        (MOCK + "--recompute-method block", "is about --recompute-granularity full; give that"),
        (MOCK + "--recompute-granularity selective --recompute-num-layers 2", "full, got selective; give that"),
        (MOCK + "--2b.recompute-modules mlp", "stage 2b: --recompute-modules is about --recompute-granularity"),
        (MOCK + "--recompute-granularity selective --recompute-modules layernorm", "expected one of core_attn, mlp"),
        (MOCK + "--fp8-format hybrid --bf16", "give --transformer-impl transformer_engine as well"),
        (MOCK + "--fp8-format e4m3", "--fp8-format needs --bf16"),
        (MOCK + "--fp8-recipe tensorwise", "--fp8-recipe is about --fp8-format, which is not given"),
        (MOCK + "--first-last-layers-bf16", "--first-last-layers-bf16 is about --fp8-format"),
        (MOCK + "--num-layers-at-start-in-bf16 2", "is about --first-last-layers-bf16; give that"),
        (MOCK + "--num-layers-at-end-in-bf16 -1", "--num-layers-at-end-in-bf16: got -1, expected at least 0"),
        (MOCK + "--fp8-format hybrid --first-last-layers-bf16", "megatron-core refuses it"),
        (MOCK + "--fp8-format hybrid --rerun-check 5", "--rerun-check and --fp8-recipe delayed"),
        (MOCK + "--fp8-format hybrid --2a.chunk-bucket 24", "--2a.chunk-bucket: got 24, expected a multiple of 16"),
        (
            MOCK + "--fp8-format hybrid --fp8-recipe mxfp8 --1b.chunk-bucket 48",
            "--1b.chunk-bucket: got 48, expected a multiple of 32",
        ),
        (
            MOCK + "--fp8-format hybrid --align-layers 2 --1a.chunk-bucket 24",
            "--1a.chunk-bucket: got 24, expected a multiple of 16",
        ),
        (MOCK + "--fp8-format fp9", "expected one of e4m3, hybrid"),
        (MOCK + "--fp8-recipe custom", "expected one of delayed, tensorwise, mxfp8, blockwise"),
        (MOCK + "--transformer-impl inference_optimized", "expected one of local, transformer_engine"),
        (MOCK + "--stages 1a,9z", "unknown stage '9z'"),
        (MOCK + "--stages 1a,1a", "1a occurs twice"),
        (MOCK + "--stages 1c,1b", "the order is 1b,1c"),
        (MOCK + "--2a.min-lr 1 --2a.min-lr-ratio 0.1", "stage 2a: --min-lr and --min-lr-ratio"),
        (MOCK + "--1b.lr 1e-3 --1b.min-lr 1", "stage 1b: --min-lr 1.0 is above --lr 0.001"),
        (MOCK + "--1a.lr-warmup-iters 2 --1a.lr-warmup-fraction 0.1", "say the same thing twice"),
        (MOCK + "--train-iters 100 --1a.lr-warmup-iters 200", "is more than --train-iters 100"),
        (MOCK + "--2b.freeze-backbone --2b.backbone-lr 1", "--freeze-backbone and --backbone-lr contradict"),
        (
            MOCK + "--global-batch-size 4 --micro-batch-size 3",
            "--global-batch-size 4 is not a multiple of --micro-batch-size 3",
        ),
        (
            MOCK + "--global-batch-size 4 --micro-batch-size 1 --1c.micro-batch-size 3",
            "stage 1c: --global-batch-size 4 is not a multiple",
        ),
        (MOCK + "--byte-width 0", "--byte-width: got 0, expected more than 0"),
        (MOCK + "--backbone-width -1", "--backbone-width: got -1"),
        (MOCK + "--conv-dilations 0 1", "--conv-dilations: got (0, 1)"),
        (MOCK + "--byte-mixer mamba2 --byte-width 100", "is not a multiple of --mamba-head-dim 32"),
        (
            MOCK + "--byte-mixer local_attention --byte-width 80",
            "--byte-width 80 is not a multiple of --byte-attention-head-dim 32",
        ),
        (
            MOCK + "--byte-mixer local_attention --byte-width 75 --byte-attention-head-dim 25",
            "--byte-attention-head-dim: got 25, expected an even number",
        ),
        (MOCK + "--byte-attention-window 0", "--byte-attention-window: got 0, expected more than 0"),
        (MOCK + "--seed -1", "--seed: got -1, expected at least 0"),
        (MOCK + "--adam-beta2 1", "--adam-beta2: got 1.0, expected less than 1"),
        (MOCK + "--min-lr-ratio 2", "--min-lr-ratio: got 2.0, expected at most 1"),
        (MOCK + "--max-nan-iterations 0", "--max-nan-iterations: got 0, expected at least 1"),
    ],
)
def test_a_contradiction_is_named(line: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arguments(line.split())
    assert any(expected in problem for problem in caught.value.problems), caught.value.problems


@pytest.mark.parametrize("line", [MOCK + "--seq-length 0", MOCK + "--micro-batch-size 0", MOCK + "--train-iters 0"])
def test_a_mistake_shared_by_all_stages_is_told_once(line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arguments(line.split())
    assert len(caught.value.problems) == 1, caught.value.problems


@pytest.mark.parametrize(
    "line",
    [
        "--kd-temperature 2",  # of the tiny preset's 2a and 2b, not of 1a
        "--2a.byte-targets mixed --2a.kd-loss-alpha 0.3",
        "--align-layers-loss-weight 2 --1a.align-layers 2",
        "--2b.logits-load-dir c",
    ],
)
def test_settings_of_a_loss_are_judged_where_they_act(line: str) -> None:
    assert parse_arguments([*MOCK.split(), *line.split()])


def test_the_global_batch_is_divided_over_the_ranks() -> None:
    small = ["--mock-data", "--micro-batch-size", "1", "--global-batch-size"]
    with pytest.raises(ConfigError, match=r"1 × 8 data-parallel ranks = 8; 8 would be"):
        parse_arguments([*small, "4"], world_size=8)
    assert parse_arguments([*small, "24"], world_size=8).stages["2a"].micro_batches(8) == 3


@pytest.mark.parametrize(
    ("ranks", "group", "micro_batches", "expected"),
    [
        (2, None, 2, None),
        (2, None, 6, None),
        (2, None, 1, "1 micro-batches an update; virtual pipeline stages need a multiple of 2"),
        (2, None, 5, "5 micro-batches an update; virtual pipeline stages need a multiple of 2"),
        (2, 3, 5, None),
        (2, 3, 4, "need a multiple of 3, or 2 to 2 more than one"),
        (4, 2, 4, "got 2, expected at least --pipeline-model-parallel-size 4"),
    ],
)
def test_virtual_stages_need_whole_groups_of_micro_batches(
    ranks: int, group: int | None, micro_batches: int, expected: str | None
) -> None:
    line = f"{MOCK} --pipeline-model-parallel-size {ranks} --num-virtual-stages-per-pipeline-rank 2"
    line += f" --micro-batch-size 1 --global-batch-size {micro_batches}"
    line += f" --microbatch-group-size-per-virtual-pipeline-stage {group}" if group else ""
    if expected is None:
        parallel = parse_arguments(line.split(), world_size=ranks).parallel
        assert parallel.virtual_stages(num_layers=8) == 2 and parallel.micro_batch_group == (group or ranks)
        return
    with pytest.raises(ConfigError) as caught:
        parse_arguments(line.split(), world_size=ranks)
    (problem,) = caught.value.problems
    assert expected in problem


@pytest.mark.parametrize(
    "line", ["--data-path x", "--data-path x --split 9,1,0", "--train-data-path x --valid-data-path y"]
)
def test_each_source_of_data_is_accepted(line: str) -> None:
    parse_arguments(line.split())
