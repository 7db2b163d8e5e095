"""The benchmark on a real teacher: how it shares out its time, and what it refuses before it begins."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks import real_teacher, time_plan
from benchmarks.time_plan import LEAST_UPDATES, Plan
from megabyte_distill.config import CURRICULUM, parse_arguments

SCRIPT = Path(real_teacher.__file__)


def plan_of(stages: Sequence[str], *, seconds: float = 1000.0, measuring: float = 0.0) -> Plan:
    plan = Plan.of(stages, 0.0, seconds, measuring)
    plan.slack = 1.0
    return plan


def run_through(plan: Plan, beside: float, measuring: dict[str, float]) -> tuple[dict[str, int], float]:
    """(updates of each stage, when all is done) where an update takes a second, and a trial half of what is beside."""
    now, given = 0.0, {}
    parts = time_plan.measured_behind(list(plan.shares))
    for stage in list(plan.shares):
        given[stage] = plan.updates(stage, 1.0, now, now + beside / 2)
        plan.trained(stage, 1.0, given[stage], float(given[stage]), beside)
        now += given[stage] + beside
        if stage in parts:
            plan.measured(parts[stage], measuring[parts[stage]])
            now += measuring[parts[stage]]
    return given, now


@pytest.mark.parametrize(
    ("stages", "behind"),
    [
        (CURRICULUM, {"1c": "stage1", "2b": "student"}),
        (("1a", "1b", "2a"), {"1a": "stage1", "2a": "student"}),
        (("1b",), {}),
    ],
)
def test_figures_are_taken_behind_the_last_stage_that_they_are_of(
    stages: Sequence[str], behind: dict[str, str]
) -> None:
    assert time_plan.measured_behind(stages) == behind


def test_a_plan_spends_all_the_time_by_its_shares() -> None:
    plan = plan_of(CURRICULUM, measuring=0.15)
    given, end = run_through(plan, time_plan.FIRST_BESIDE, {"stage1": 50.0, "student": 100.0})
    left = 1000 - 150 - 5 * time_plan.FIRST_BESIDE
    assert given == {name: pytest.approx(left * share, abs=2) for name, share in time_plan.SHARES.items()}
    assert end == pytest.approx(1000, abs=5)


@pytest.mark.parametrize("beside", [1.0, 30.0])
@pytest.mark.parametrize("measuring", [2.0, 80.0])
def test_a_plan_ends_in_time_whatever_its_first_guesses_were(beside: float, measuring: float) -> None:
    """What the first stage and the first figures cost tells what the others will, be it less or more."""
    plan = plan_of(CURRICULUM, measuring=0.1)
    given, end = run_through(plan, beside, {"stage1": measuring, "student": 2 * measuring})
    assert end == pytest.approx(1000, abs=5)
    assert min(given.values()) > 10 * LEAST_UPDATES


def test_time_for_figures_is_kept_once() -> None:
    plan = plan_of(CURRICULUM, measuring=0.3)
    assert plan.kept == {"stage1": pytest.approx(100), "student": pytest.approx(200)}
    plan.measured("stage1", 50.0)
    assert plan.kept == {"student": pytest.approx(100)}
    plan.measured("student", 100.0)
    assert plan.kept == {}


def test_a_stages_own_cost_replaces_the_guess_and_then_only_grows() -> None:
    plan = plan_of(("1a", "1b", "1c"))
    for stage, beside, expected in (("1a", 2.0, 2.0), ("1b", 5.0, 5.0), ("1c", 3.0, 5.0)):
        plan.trained(stage, 1.0, 10, 10.0, beside)
        assert plan.beside == expected


def test_a_long_trial_tells_that_the_others_take_as_long() -> None:
    assert plan_of(("1a", "1c")).updates("1a", 1.0, 0.0, 100.0) == int((1000 - 200) * 0.30 / 0.38)


def test_a_plan_learns_that_updates_are_slower_than_tried_ones() -> None:
    plan = plan_of(("1a", "1c"))
    plan.trained("1a", 1.0, 100, 200.0, 30.0)
    assert plan.updates("1c", 1.0, 230.0, 231.0) == (1000 - 230 - 30) // 2
    assert plan_of(("1a",), seconds=10.0).updates("1a", 1.0, 20.0, 21.0) == LEAST_UPDATES


@pytest.mark.parametrize("form", [name for name in real_teacher.FORMS if name != "quick"])
def test_every_stage_of_a_form_parses(form: str, tmp_path: Path) -> None:
    bench = real_teacher.Bench(tmp_path, real_teacher.FORMS[form], ("--lr", "0.5"))
    for stage in CURRICULUM:
        settings = parse_arguments([*bench.stage_flags(stage), *real_teacher.micro_batch(stage, 1)])
        assert list(settings.stages) == [stage] and settings.run.bf16 == (form == "cuda")
        assert settings.stages[stage].lr == 0.5 and settings.stages[stage].micro_batch_size == 1


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--stages 1d", r"--stages 1d: got '1d', expected some of 1a,1b,1c,2a,2b, separated by commas"),
        ("--stages 1a,,2a", r"got '', expected"),
        ("--stages 2a,1a --2a.micro-batch-size 3", r"flags of stage 2a: .*micro-batch-size"),
        ("--no-such-flag", r"stage 1a: .*no-such-flag"),
        ("--updates 0", r"stage 1a: .*train-iters"),
        ("--minutes 0", r"got --minutes 0, expected more than none"),
        ("--train a.jsonl", r"got --train without --held-out, expected both"),
        ("--held-out a.jsonl", r"got --held-out without --train"),
        ("--hf-model .", r"got --hf-model without --train and --held-out, expected all three"),
        ("--train none.jsonl --held-out none.jsonl", r"none\.jsonl: no such file"),
        ("--hf-model none --train none.jsonl --held-out none.jsonl", r"got none, expected a folder with files"),
    ],
)
def test_a_command_line_is_refused_before_anything_is_made(
    words: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "work"
    with pytest.raises(SystemExit, match=r"^2$"):
        real_teacher.read_command_line(["--quick", "--work-dir", str(folder), *words.split()])
    assert re.search(says, capsys.readouterr().err, re.DOTALL)
    assert not folder.exists()


def test_stages_may_stand_in_any_order_and_with_spaces() -> None:
    assert real_teacher.stages_of("2a, 1a") == ["1a", "2a"]


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """A command line whose inputs are there."""
    for name in ("one.jsonl", "two.jsonl"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "teacher").mkdir()
    (tmp_path / "teacher" / "config.json").write_text("{}")
    words = "--quick --work-dir WORK/work --hf-model WORK/teacher --train WORK/one.jsonl --held-out WORK/two.jsonl"
    return [word.replace("WORK", str(tmp_path)) for word in words.split()]


def test_a_work_folder_takes_the_inputs_that_it_is_of(command: list[str]) -> None:
    for more in ([], ["--stages", "1a"]):
        assert real_teacher.read_command_line([*command, *more])[2] == (["1a"] if more else list(CURRICULUM))


@pytest.mark.parametrize(
    ("flag", "change"),
    [("--hf-model", "teacher/config.json"), ("--train", "one.jsonl"), ("--held-out", "two.jsonl")],
)
@pytest.mark.parametrize("way", ["another", "changed", "embedded"])
def test_a_work_folder_of_other_inputs_is_refused(
    flag: str, change: str, way: str, command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    real_teacher.read_command_line(command)
    old, at = tmp_path / change, command.index(flag) + 1
    if way == "another":
        other = tmp_path / "other" / old.name
        other.parent.mkdir()
        other.write_bytes(old.read_bytes())
        command[at] = str(other.parent if flag == "--hf-model" else other)
        says = f"got {flag} {other}, expected {old}"
    elif way == "changed":
        old.write_text("[1]")
        says = f"got {flag} {old}, expected it as it was: it has changed since"
    else:
        command = command[:3]
        says = f"got {flag} the embedded one, expected {old}"
    with pytest.raises(SystemExit, match=r"^2$"):
        real_teacher.read_command_line(command)
    found = capsys.readouterr().err
    assert says in found and "Give another --work-dir" in found


def test_a_work_folder_that_does_not_say_what_it_is_of_is_refused(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "work" / "data").mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"^2$"):
        real_teacher.read_command_line(command)
    assert "expected to see what it was made of" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("time", [(), ("--minutes", "0.5", "--stages", "1a,1c")])
def test_a_curriculum_in_a_given_time_reaches_every_figure(time: tuple[str, ...], tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--quick", "--work-dir", str(tmp_path), *time]
    done = subprocess.run(command, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == json.loads((tmp_path / "results.json").read_text())
    assert 0 < found["stage1"]["reading_retention"] < 1 and 0 < found["stage1"]["boundary_f1"] <= 1
    assert list(found["stages"]) == (["1a", "1c"] if time else ["1a", "1b", "1c", "2a", "2b"])
    assert all(stage["beside"] > 0 and stage["updates"] >= 4 for stage in found["stages"].values())
    assert time or 0 < found["student"]["retention"] < 1
    assert found["preparing"] > 0 and list(found["measuring"]) == (["stage1"] if time else ["stage1", "student"])
