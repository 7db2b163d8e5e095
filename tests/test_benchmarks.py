"""Each benchmark's arms are what it says; running them is not a test's business."""

from __future__ import annotations

import importlib.util
import json
import math
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from megabyte_distill.config import parse_arguments

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def controls() -> ModuleType:
    specification = importlib.util.spec_from_file_location("controls", BENCHMARKS / "controls.py")
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules["controls"] = module
    specification.loader.exec_module(module)
    return module


def trained_bytes(flags: list[str]) -> int:
    stages = parse_arguments(["--mock-data", *flags]).stages
    return sum(config.train_iters * config.bytes_per_update for config in stages.values())


def test_all_arms_spend_the_same_bytes(controls: ModuleType) -> None:
    updates = controls.iterations(0.25)
    spent = {arm: trained_bytes(controls.arm_flags(arm, updates)) for arm in controls.ARMS}
    assert max(spent.values()) - min(spent.values()) <= 4096, spent


def test_an_arm_leaves_out_what_it_says(controls: ModuleType) -> None:
    updates = controls.iterations(0.25)
    for arm in ("without 1a", "without 1b"):
        flags = controls.arm_flags(arm, updates)
        assert arm.removeprefix("without ") not in flags[flags.index("--stages") + 1].split(",")
    assert "2b" in controls.arm_flags("from scratch", updates)


def test_a_difference_counts_above_twice_the_pooled_spread(controls: ModuleType) -> None:
    near = controls.verdict([1.0, 1.1, 1.2], [1.15, 1.25, 1.35])
    far = controls.verdict([1.0, 1.1, 1.2], [1.4, 1.5, 1.6])
    assert math.isclose(near["spread"], 0.1) and not near["above_twice_the_spread"]
    assert far["above_twice_the_spread"] and math.isclose(far["worse_by"], 0.4)


@pytest.mark.slow
def test_exact_targets_are_a_small_part_of_a_step() -> None:
    command = [sys.executable, str(BENCHMARKS / "exact_targets.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0 < found["share_of_step"] <= 0.05


def test_the_generation_benchmark_writes_its_text_and_drafts_fare_as_it_says() -> None:
    from benchmarks.generation import PROMPT, SEEN_RUNS, Text, following, make_student
    from megabyte_distill.inference.generation import GenerationSettings

    text, student = Text(SEEN_RUNS), make_student("tiny")
    prompts, bits = text.prompts(3)
    raw = text.raw
    passes = []
    for speculate in (0, 8):
        engine = following(student, text, speculate=speculate)
        written = engine.generate(prompts, GenerationSettings(max_new_bytes=300), prompt_bits=bits)
        assert prompts[0] + written[0].byte_ids == raw[: PROMPT + 300]
        passes.append(engine.counts.backbone_passes)
    assert 4.2 < text.bytes_per_chunk < 5.0 and 900 / passes[0] == pytest.approx(text.bytes_per_chunk, rel=0.1)
    right = engine.counts.accepted / engine.counts.backbone_passes
    shares = [count / sum(SEEN_RUNS) for count in SEEN_RUNS]
    assert right == pytest.approx(sum(min(run, 8) * share for run, share in enumerate(shares)), abs=0.5)


@pytest.mark.slow
def test_the_fused_operators_move_what_they_must(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("the counting build needs g++; run on a machine that has it")
    command = [sys.executable, str(BENCHMARKS / "kernel_traffic.py"), "--no-compile", "--rows", "1024"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for operator in ("F1", "F2", "F4", "F5"):
        # less than the floor's share: a case that is not counted at all would show here
        assert 0.8 <= found[operator]["fused_to_floor"] <= 1.3, (operator, found[operator])
        assert found[operator]["eager_to_floor"] > 1.5


@pytest.mark.slow
def test_four_bit_histories_cost_little_more_than_one_each() -> None:
    command = [sys.executable, str(BENCHMARKS / "scoring.py"), "--quick"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0 < found["k4_cost_per_byte_over_one_path_times_k"] <= 1.5, found
