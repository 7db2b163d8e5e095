"""Each benchmark's arms are what it says; running them is not a test's business."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ablations, controls, curriculum_runs, curves, data_efficiency, mamba_scan, run_figures
from megabyte_distill.config import parse_arguments

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"


def trained_bytes(flags: list[str]) -> int:
    stages = parse_arguments(["--mock-data", *flags]).stages
    return sum(config.train_iters * config.bytes_per_update for config in stages.values())


def test_all_arms_spend_the_same_bytes() -> None:
    updates = controls.iterations(0.25)
    spent = {arm: trained_bytes(controls.arm_flags(arm, updates)) for arm in controls.ARMS}
    assert max(spent.values()) - min(spent.values()) <= 4096, spent


def test_an_arm_leaves_out_what_it_says() -> None:
    updates = controls.iterations(0.25)
    for arm in ("without 1a", "without 1b"):
        flags = controls.arm_flags(arm, updates)
        assert arm.removeprefix("without ") not in flags[flags.index("--stages") + 1].split(",")
    assert "2b" in controls.arm_flags("from scratch", updates)


def test_a_difference_counts_above_twice_the_pooled_spread() -> None:
    near = controls.verdict([1.0, 1.1, 1.2], [1.15, 1.25, 1.35])
    far = controls.verdict([1.0, 1.1, 1.2], [1.4, 1.5, 1.6])
    assert math.isclose(near["spread"], 0.1) and not near["above_twice_the_spread"]
    assert far["above_twice_the_spread"] and math.isclose(far["worse_by"], 0.4)


def test_bytes_needed_are_interpolated_on_the_logarithm_of_bytes() -> None:
    curve = {1024: 3.0, 4096: 2.0, 8192: 1.9}
    assert curves.bytes_needed(curve, 2.5) == pytest.approx(2048)
    assert curves.bytes_needed(curve, 3.0) == 1024 and curves.bytes_needed(curve, 1.9) == 8192
    assert curves.bytes_needed(curve, 3.1) is None and curves.bytes_needed(curve, 1.8) is None


def test_a_curve_that_rises_again_is_read_where_it_first_arrives() -> None:
    assert curves.bytes_needed({1: 3.0, 2: 2.0, 4: 2.2, 8: 1.0}, 2.1) == pytest.approx(2**0.9)


def test_the_factor_is_read_at_the_most_bytes_at_which_every_seed_has_one() -> None:
    hard = {1: 3.0, 2: 2.5, 4: 2.0, 8: 1.5}
    one, other = (
        curves.factors(hard, {1: 2.5, 2: 2.0, 4: 1.2}),
        curves.factors(hard, {1: 2.5, 2: 1.5, 4: 1.4}),
    )
    assert one == {1: pytest.approx(2), 2: pytest.approx(2), 4: None}
    found = curves.headline([one, other])
    assert found["at_bytes"] == 2 and found["mean"] == pytest.approx(3) and found["spread"] == pytest.approx(2**0.5)
    assert curves.headline([{4: None}])["mean"] is None


@pytest.mark.parametrize(
    ("arm", "says"),
    [([2.5, 2.4], "2.15 ± 0.21"), ([2.5, 1.9], "2.00 (1 of 2 seeds)"), ([1.9, 1.8], "> 4.0"), ([3.2, 3.1], "< 1.0")],
)
def test_a_table_tells_of_seeds_that_leave_the_reference(arm: list[float], says: str) -> None:
    hard = [{"1": 3.0, "2": 2.5, "4": 2.0}] * 2
    assert data_efficiency.factor_cell(hard, [{"1": bits} for bits in arm], "1") == says


def test_a_time_factor_weighs_both_stages_by_their_bytes() -> None:
    times = {"2a": {"hard": 1.0, "exact": 2.0}, "2b": {"hard": 8.0, "exact": 8.0}}
    assert data_efficiency.cost_ratios(times)["exact"] == pytest.approx((7 * 2 + 8) / (7 + 8))


def test_an_arm_that_is_a_doubling_ahead_has_the_factor_two(tmp_path: Path) -> None:
    form = data_efficiency.LONG
    answers: dict[str, dict[str, Any]] = {
        data_efficiency.point_name(arm, size, seed): {
            "bits_per_byte": 4.0 - 0.1 * math.log2(size if arm == "hard" else 2 * size) + 0.001 * seed,
            "seconds": 1.0,
            "processor_seconds": 1.0,
        }
        for arm in data_efficiency.ARMS
        for size in data_efficiency.sizes_of(arm, form)
        for seed in form.seeds
    }
    for rate in data_efficiency.TEACHER_RATES:
        answers |= {f"teacher-{rate}-{seed}": {"before": 1.5, "after": 1.4} for seed in form.seeds}
    cost = dict.fromkeys(data_efficiency.ARMS, 1.0) | {"exact": 1.6}
    answers |= {
        "times": {"2a": cost, "2b": cost},
        "cache": {"text_bytes": 1 << 20, "processor_seconds": 0.5 * (1 << 20)},
    }
    result = data_efficiency.result_of(form, answers)
    assert result["bytes_factor_exact"]["mean"] == pytest.approx(2) == result["bytes_factor_cached"]["mean"]
    assert result["time_factor_exact"]["mean"] == pytest.approx(2 / 1.6)
    # of 2 MiB that are half text read again, each byte cached costs half of an update's
    assert result["time_factor_cached"]["mean"] == pytest.approx(2)
    assert result[data_efficiency.WITH_CACHING]["mean"] == pytest.approx(2 / (1 + 0.5 / 2))
    assert list(result[curves.SPREAD].values()) == pytest.approx([0.001] * 3)
    assert list(result[curves.PAIRED_SPREAD].values()) == pytest.approx([0.0] * 2, abs=1e-9)
    lines = data_efficiency.tables(json.loads(json.dumps(result))).splitlines()
    table = lines[: lines.index("")]
    assert len(table) == 2 + len(form.sizes["hard"]) and len({line.count("|") for line in table}) == 1
    assert "2.00 ± 0.00" in table[2]
    assert "| time factor, making the cache counted |  |  | 1.60 ± 0.00 |  |" in lines
    data_efficiency.plot(result, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


@pytest.mark.parametrize("form", ["FULL", "LONG", "SHORT", "QUICK"])
def test_stage_2_reads_the_bytes_that_a_form_says(form: str) -> None:
    for size in data_efficiency.sizes_of(data_efficiency.REFERENCE, getattr(data_efficiency, form)):
        flags = curriculum_runs.iteration_flags(data_efficiency.stage2_updates(size))
        assert abs(trained_bytes(flags) - size) <= 2048


def test_ablations_spend_the_same_bytes_and_start_where_they_say() -> None:
    stage1 = {stage: ablations.UPDATES[stage] for stage in ablations.STAGE_1}
    for arm in ablations.ARMS:
        updates = ablations.updates_of(arm, ablations.UPDATES)
        assert set(updates).isdisjoint(ablations.STAGE_1) == arm.from_stage1
        spent = trained_bytes(curriculum_runs.iteration_flags({**(stage1 if arm.from_stage1 else {}), **updates}))
        assert abs(spent - trained_bytes(curriculum_runs.iteration_flags(ablations.UPDATES))) <= 2048, arm.name


OF_THE_BASE = ("--boundary-source", "gold", "--dechunk-mode", "hard")
FROZEN = "--2b.freeze-backbone"


def choices(arm: ablations.Arm) -> dict[str, str]:
    """Flag → value; and the stage that is left out."""
    found, flag = {"without": arm.without}, ""
    for word in (*OF_THE_BASE, *arm.flags):
        if word.startswith("--"):
            flag = word
            found.setdefault(flag, "")
        else:
            found[flag] = word
    if FROZEN in found:  # what is frozen has no rate of its own: one choice
        found.pop("--2b.backbone-lr")
    if found.get("--byte-targets") == "mixed":  # no other targets have a share
        found["--byte-targets"] += found.pop("--kd-loss-alpha")
    return found


def test_an_ablation_is_compared_with_what_differs_in_one_thing() -> None:
    assert parse_arguments(["--mock-data", *OF_THE_BASE]) == parse_arguments(["--mock-data"])
    arms = {arm.name: arm for arm in ablations.ARMS}
    for arm in arms.values():
        own, other = choices(arm), choices(arms[arm.against])
        # a flag that takes no value differs by being there
        differ = [name for name in own.keys() | other.keys() if own.get(name) != other.get(name)]
        assert len(differ) == (arm.name != ablations.BASE), (arm.name, differ)
    found = {name: {"step_path": 2.0, "router_bits": 2.1, "own_forward": 1.9, "boundary_f1": 0.9} for name in arms}
    found["without 1b"]["step_path"] = 2.25
    found["temperature 2"]["step_path"] = 1.97
    result = {
        curves.PAIRED_SPREAD: {"1048576": 0.01, "4194304": 1.0},
        curves.SPREAD: {"1048576": 0.1, "4194304": 1.0},
    }
    bounds = ablations.Bounds.of(result, 1_150_000)
    assert (bounds.of_one_stage1, bounds.of_two) == (pytest.approx(0.02), pytest.approx(0.2828, abs=1e-4))
    text = ablations.table(found, bounds)
    (without,) = (line for line in text.splitlines() if "without 1b" in line)
    assert "| 2.2500 | +0.2500 | targets of the teacher | 2.1000 |" in without  # its stage 1 is its own
    (temperature,) = (line for line in text.splitlines() if "temperature 2" in line)
    assert "| 1.9700 | **-0.0300** | base |" in temperature
    assert "0.0200 between arms of the common stage 1, 0.2828" in text


def test_answers_of_another_setting_are_not_taken(tmp_path: Path) -> None:
    job = curriculum_runs.Job(name="a", work=dict, identity={"updates": {"2a": 3}})
    assert job.stored(tmp_path) is None
    job.store(tmp_path, {"bits": 1.5})
    assert job.stored(tmp_path) == {"bits": 1.5}
    other = curriculum_runs.Job(name="a", work=dict, identity={"updates": {"2a": 4}})
    assert other.stored(tmp_path) is None


def test_a_run_of_another_command_is_kept_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder, flags = tmp_path / "run", ["--save", "run", "--seed", "1"]
    curriculum_runs.begin_folder(Path("run"), flags)
    (folder / "2b").mkdir()
    curriculum_runs.begin_folder(folder, ["--save", str(folder), "--seed", "1"])
    assert (folder / "2b").is_dir()
    curriculum_runs.begin_folder(folder, ["--save", str(folder), "--seed", "2"])
    assert not (folder / "2b").exists() and (tmp_path / "run.before-1" / "2b").is_dir()
    (folder / "command.json").unlink()
    (folder / "1a").mkdir()
    curriculum_runs.begin_folder(folder, flags)
    assert (tmp_path / "run.before-2" / "1a").is_dir() and not (folder / "1a").exists()


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    program = """
import sys
from functools import partial
from pathlib import Path
from benchmarks.curriculum_runs import Job, run_jobs
work = partial(exec, "import os, time; os.write(1, b'works'); time.sleep(120)", {})
run_jobs([Job(name="a", work=work, identity={})], Path(sys.argv[1]), workers=1)
"""
    command = [sys.executable, "-c", program, str(tmp_path)]
    with subprocess.Popen(command, cwd=BENCHMARKS.parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as parent:
        assert parent.stdout is not None and parent.stdout.read(5) == b"works"
        parent.kill()
        # the worker writes to the same pipe, which has an end when nobody is left
        parent.communicate(timeout=10)


def _note(folder: Path, name: str) -> dict[str, Any]:
    with (folder / "order").open("a", encoding="utf-8") as order:
        order.write(f"{name} ")
    return {"name": name}


def test_a_job_begins_behind_those_that_it_reads_the_dearest_first(tmp_path: Path) -> None:
    job = partial(curriculum_runs.Job, identity={})
    jobs = [
        job(name="cheap", work=partial(_note, tmp_path, "cheap"), cost=1),
        job(name="dear", work=partial(_note, tmp_path, "dear"), cost=9, after=("first",)),
        job(name="next", work=partial(_note, tmp_path, "next"), cost=2),
        job(name="first", work=partial(_note, tmp_path, "first"), cost=3),
    ]
    found = curriculum_runs.run_jobs(jobs, tmp_path / "answers", workers=1)
    assert (tmp_path / "order").read_text(encoding="utf-8").split() == ["first", "dear", "next", "cheap"]
    assert found == {name: {"name": name} for name in ("cheap", "dear", "next", "first")}
    with pytest.raises(ValueError, match=r"not there.*lone.*nobody"):
        curriculum_runs.run_jobs([job(name="lone", work=dict, after=("nobody",))], tmp_path / "answers", workers=1)


@pytest.mark.parametrize("form", ["FULL", "LONG", "SHORT", "QUICK"])
def test_a_comparison_waits_for_jobs_that_it_has(form: str, tmp_path: Path) -> None:
    shared = curriculum_runs.Shared(tmp_path)
    jobs = data_efficiency.Plan(getattr(data_efficiency, form), tmp_path, shared).jobs()
    names = {job.name for job in jobs}
    assert len(names) == len(jobs)
    assert all(set(job.after) <= names for job in jobs)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data_efficiency", "ablations"])
def test_a_comparison_of_runs_runs_and_takes_what_is_done(name: str, tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / f"{name}.py"), "--quick", "--work-dir", str(tmp_path)]
    for is_again in (False, True):
        done = subprocess.run(command, capture_output=True, text=True, timeout=290)
        assert done.returncode == 0, done.stderr[-2000:]
        assert ("were done by an earlier call" in done.stdout) == is_again
        assert json.loads(done.stdout.splitlines()[-1])


def test_a_scan_is_timed_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert mamba_scan.main(["--quick"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {name for name in found if name != "device"} >= {f"torch_{block}" for block in mamba_scan.BLOCKS}


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


def test_generation_says_which_floors_are_missed() -> None:
    from benchmarks.generation import missed

    kept = {"tiny_plain_b1": 0.4, "smollm2_plain_b32": 0.8, "tiny_speculative_b1": 0.1}
    assert missed({**kept, "demo_backbone_pass_ratio": None}) == []
    assert missed({**kept, "demo_backbone_pass_ratio": 0.7, "demo_auto_to_plain_sampled": 0.95}) == []
    short = {
        "tiny_plain_b1": 0.39,
        "smollm2_plain_b8": 0.79,
        "demo_auto_to_plain": 0.94,
        "demo_backbone_pass_ratio": 0.71,
    }
    assert len(missed(short)) == len(short)


def test_rows_that_are_timed_early_and_late_write_the_same_chunks() -> None:
    from benchmarks.generation import EARLY, RowAt, Text, make_student

    text, student = Text((1,)), make_student("tiny", window=8)
    _, bits = text.opening(EARLY + 30)
    for place in (EARLY, 2 * EARLY):
        row = RowAt(student, text, place)
        assert [row.next_byte()[1] for _ in range(30)] == bits[EARLY:]


@pytest.mark.slow
def test_the_fused_operators_move_what_they_must(tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("the counting build needs g++; run on a machine that has it")
    command = [sys.executable, str(BENCHMARKS / "kernel_traffic.py"), "--no-compile", "--rows", "8192"]
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


def test_figures_of_stage_1_are_ratios_of_sums() -> None:
    sums = {"bytes": 10, "own": 20, "nothing": 50, "read": 40, "error": 3, "tokens": 6, "hits": 2, "predicted": 3}
    found = run_figures.stage1_figures({**sums, "gold": 5}, variance=2.0)
    assert (found["teacher_bits_per_byte"], found["reading_bits_per_byte"], found["reading_retention"]) == (2, 4, 0.5)
    assert found["alignment_mse_relative"] == 0.25 and found["boundary_f1"] == 0.5
    assert found["boundary_precision"] == pytest.approx(2 / 3) and found["boundary_recall"] == 0.4
    assert "boundary_f1" not in run_figures.stage1_figures(sums, variance=2.0)


@pytest.mark.parametrize("path", [path for path in BENCHMARKS.glob("*.py") if "__main__" in path.read_text()], ids=str)
def test_each_has_a_quick_form(path: Path) -> None:
    assert '"--quick"' in path.read_text(encoding="utf-8")
