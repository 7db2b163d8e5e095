"""A folder is complete or absent, and nobody's other folder is ever removed."""

from __future__ import annotations

from pathlib import Path

import pytest

from megabyte_distill.conversion.new_folder import new_folder
from megabyte_distill.run_folder import TEACHER_FILE


def fill(final: Path, text: str, *, overwrite: bool = False) -> None:
    with new_folder(final, overwrite=overwrite, marker="mark") as folder:
        assert not final.exists() or overwrite
        (folder / "mark").write_text(text)


def test_the_final_name_appears_when_the_block_ends(tmp_path: Path) -> None:
    fill(tmp_path / "deep" / "out", "one")
    assert (tmp_path / "deep" / "out" / "mark").read_text() == "one"
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_a_failure_leaves_nothing_or_the_earlier_output(tmp_path: Path) -> None:
    final = tmp_path / "out"
    for earlier in (False, True):
        with (
            pytest.raises(RuntimeError, match="disk full"),
            new_folder(final, overwrite=True, marker="mark") as folder,
        ):
            (folder / "mark").write_text("half")
            raise RuntimeError("disk full")
        assert [path.name for path in tmp_path.iterdir()] == (["out"] if earlier else [])
        if not earlier:
            fill(final, "whole")
    assert (final / "mark").read_text() == "whole"


def test_only_an_earlier_output_is_overwritten(tmp_path: Path) -> None:
    final = tmp_path / "out"
    fill(final, "one")
    with pytest.raises(ValueError, match="give --overwrite"):
        fill(final, "two")
    fill(final, "two", overwrite=True)
    assert (final / "mark").read_text() == "two"
    (final / "mark").rename(final / "thesis.txt")
    with pytest.raises(ValueError, match="not an earlier output"):
        fill(final, "three", overwrite=True)
    assert (final / "thesis.txt").exists()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="not a directory"):
        fill(tmp_path / "file", "four", overwrite=True)


def test_an_empty_folder_may_be_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out", overwrite=False, marker="mark") as folder:
        (folder / "mark").touch()
    assert (tmp_path / "out" / "mark").exists()


def test_a_run_is_never_overwritten(tmp_path: Path) -> None:
    """It has a converted teacher's files, and the work of weeks beside them."""
    run = tmp_path / "run"
    fill(run, "one")
    (run / TEACHER_FILE).write_text("{}")
    with pytest.raises(ValueError, match="is the folder of a run"):
        fill(run, "two", overwrite=True)
    assert (run / "mark").read_text() == "one"


def test_what_a_crash_between_two_renames_left_comes_back(tmp_path: Path) -> None:
    final, replaced = tmp_path / "out", tmp_path / "out.replaced"
    fill(final, "one")
    final.rename(replaced)
    (tmp_path / "out.incomplete").mkdir()
    with pytest.raises(ValueError, match="give --overwrite"):
        fill(final, "two")
    assert (final / "mark").read_text() == "one" and not replaced.exists()


@pytest.mark.parametrize("ending", [".replaced", ".incomplete"])
def test_somebody_elses_folder_beside_it_stays(tmp_path: Path, ending: str) -> None:
    other = tmp_path / f"out{ending}"
    other.mkdir()
    (other / "thesis.txt").touch()
    if ending == ".replaced":
        fill(tmp_path / "elsewhere", "x")
        (tmp_path / "elsewhere").rename(tmp_path / "out")
    with pytest.raises(ValueError, match="move it"):
        fill(tmp_path / "out", "one", overwrite=True)
    assert (other / "thesis.txt").exists()


def test_a_link_keeps_pointing_to_the_output(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    fill(tmp_path / "disk" / "out", "one")
    link = tmp_path / "out"
    link.symlink_to(tmp_path / "disk" / "out")
    for text in ("two", "three"):
        with new_folder(link, overwrite=True, marker="mark") as folder:
            (folder / "mark").write_text(text)
        assert link.is_symlink() and (link / "mark").read_text() == text
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["out"]
