"""Every command of the pages does what it says: it is run at smoke size, or listed with the reason why not here."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.doc_commands import ROOT, Call, blocks, calls_of
from tests.doc_runs import ELSEWHERE, Place, is_long, make_place, reason_not_run
from tests.pretrain.conftest import finished, job
from tests.pretrain.job import Job
from tests.test_docs import PAGES

__all__ = ["finished", "job"]
RUN_HERE = [page for page in PAGES if page != "README.md"]
"""tests/test_readme.py runs the README's."""
_LONG = ("chunk-size", "cluster", "containers", "convert", "exact-targets", "export", "faults", "generation", "gpu")
WITH_LONG_ONES = [
    "examples/tiny/README.md",
    *(f"docs/{name}.md" for name in (*_LONG, "install", "results", "resume", "training")),
]


@pytest.fixture(scope="module")
def place(job: Job, finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Place:
    return make_place(tmp_path_factory.mktemp("place"), job, finished)


def calls_here(page: str, folder: Path) -> list[Call]:
    """A page's calls without those that are listed."""
    return [call for call in calls_of(page, blocks(ROOT / page), folder) if reason_not_run(call) is None]


def run_all(calls: list[Call], place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place.folder)
    place.begin_page()
    for call in calls:
        try:
            place.run(call)
        except Exception as problem:
            raise AssertionError(f"{call.shown}\n{problem}") from problem


@pytest.mark.parametrize("page", RUN_HERE)
def test_every_command_of_a_page_runs(page: str, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_all([call for call in calls_here(page, tmp_path) if not is_long(call)], place, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", WITH_LONG_ONES)
def test_long_commands_of_a_page_run(page: str, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_all([call for call in calls_here(page, tmp_path) if is_long(call)], place, monkeypatch)


def test_what_is_not_run_is_in_the_pages_and_nothing_long_is_left_out(tmp_path: Path) -> None:
    calls = []
    for number, page in enumerate(PAGES):
        (tmp_path / str(number)).mkdir()
        calls += calls_of(page, blocks(ROOT / page), tmp_path / str(number))
    shown = [" ".join(call.words) for call in calls]
    assert not [pattern for pattern in ELSEWHERE if not any(re.match(pattern, one) for one in shown)]
    long = {call.place.split(":")[0] for call in calls if is_long(call) and reason_not_run(call) is None}
    assert long - {"README.md"} == set(WITH_LONG_ONES)


def test_a_failure_that_shows_stray_bytes_is_told(pytestconfig: pytest.Config) -> None:
    stray = b"text \xff".decode("utf-8", "surrogateescape")
    report = pytest.TestReport(
        *("a.py::b", ("a.py", 1, "b"), {stray: 1}, "failed", f"E {stray}", "call"),
        sections=[("Captured stdout call", stray)],
    )
    sent: dict[str, Any] = pytestconfig.hook.pytest_report_to_serializable(config=pytestconfig, report=report)
    assert sent["sections"] == [("Captured stdout call", r"text \udcff")]
    assert sent["longrepr"] == r"E text \udcff" and repr(sent).isascii()


@pytest.mark.parametrize(
    "command",
    [
        "python tools/generate.py --load NOTHING --prompt x",
        "python tools/preprocess_bytes.py verify data/nothing",
        "python tools/convert_checkpoint.py compare --hf-model OUT --megatron-path CKPT",
        "torchrun examples/pretrain_byte_kd.sh … --logits-load-dir NOTHING --byte-targets exact",
    ],
)
def test_a_command_that_fails_is_noticed(command: str, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError):
        run_all([Call("docs/some.md:1", 1, tuple(command.split()))], place, monkeypatch)
