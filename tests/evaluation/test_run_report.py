"""The report is one file that fetches nothing, whatever a run has in it, and is written whole or not at all."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megabyte_distill.evaluation import run_report
from megabyte_distill.evaluation.marked_text import MarkedText
from megabyte_distill.evaluation.metrics_log import Series
from megabyte_distill.evaluation.run_report import HeldOutPage, RunRecord, StageRecord, write_report

HOSTILE = '<script src="http://evil.example/x.js"></script><img src=x onerror=alert(1)>\0&"\' 日本'
_VOID = {"meta", "img"}


class Reader(HTMLParser):
    """What a browser would see: the tags, their attributes, and the text between them."""

    def __init__(self, document: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(document)
        self.close()
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in _VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def assert_self_contained(path: Path) -> Reader:
    """Fails where the file would make a browser fetch or run anything; returns what it shows."""
    reader = Reader(path.read_text(encoding="utf-8"))
    names = {tag for tag, _ in reader.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "a", "form", "svg"}, names
    for tag, attributes in reader.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("href", "style", "srcset")], tag
        assert (attributes.get("src", "data:image/png;base64,") or "").startswith("data:image/png;base64,"), attributes
    [style] = re.findall(r"<style>(.*?)</style>", path.read_text(encoding="utf-8"), re.DOTALL)
    assert "url(" not in style and "@import" not in style
    return reader


def record(name: str, **fields: object) -> RunRecord:
    marked = MarkedText(text=HOSTILE.encode(), p=[0.5] * 99, learned=[True] * 99, gold=[False] * 99)
    defaults: dict[str, object] = {
        "name": name,
        "folder": f"runs/{name}",
        "curves": {"1a": {"alignment mse": Series({1: 2.0, 2: 1.0}), "bytes/s": Series({1: 9.0})}},
        "summary": {"retention": 0.75, "text_bytes": 1234, "samples": [HOSTILE, "two"], "student_bits_per_byte": None},
        "stages": [
            StageRecord(stage="1a", iteration=2, train_iters=4, consumed_bytes=10, seconds=3.0, settings={"lr": 0.5})
        ],
        "settings": {"run.seed": 1, "checkpoint.save": HOSTILE},
        "versions": {"torch": "2"},
        "page": HeldOutPage(texts=[marked], source=HOSTILE),
        "notes": [HOSTILE],
    }
    return RunRecord(**{**defaults, **fields})  # type: ignore[arg-type]


def test_the_report_fetches_nothing_and_shows_hostile_text_as_text(tmp_path: Path) -> None:
    name = HOSTILE.replace("\0", "")
    files = write_report([record(name)], tmp_path / "out")
    reader = assert_self_contained(files[0])
    shown = HOSTILE.replace("\0", "U+0000")
    assert reader.text.count(shown) >= 4, "notes, sample, settings, source"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["losses.png", "report.html", "throughput.png"]
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in files[1:])
    for expected in ("0.7500", "1,234", "2 of 4", "recorded where the router is trained"):
        assert expected in reader.text


def test_runs_stand_side_by_side_and_their_differences_stand_out(tmp_path: Path) -> None:
    other = record("other", settings={"run.seed": 2, "checkpoint.save": HOSTILE}, curves={}, summary=None, stages=[])
    reader = assert_self_contained(write_report([record("one"), other], tmp_path)[0])
    assert "none: the summary of a finished run has some" in reader.text and "nothing is recorded yet" in reader.text
    document = (tmp_path / "report.html").read_text()
    assert '<tr class="different"><th>run.seed</th><td>1</td><td>2</td></tr>' in document
    assert "<tr><th>checkpoint.save</th>" in document


def test_a_run_of_which_nothing_is_known_yet_has_a_report(tmp_path: Path) -> None:
    nothing = {"curves": {}, "summary": None, "stages": [], "settings": {}, "versions": {}}
    files = write_report([record("new", page=HeldOutPage(missing="no checkpoint"), **nothing)], tmp_path)
    assert [path.name for path in files] == ["report.html"]
    assert "no checkpoint" in assert_self_contained(files[0]).text


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.html").write_text("before")
    written = run_report.write_and_sync

    def full_disk(path: Path, content: bytes) -> None:
        if "losses" in path.name:
            written(path, content[:10])
            raise OSError("no space left")
        written(path, content)

    monkeypatch.setattr(run_report, "write_and_sync", full_disk)
    with pytest.raises(OSError, match="no space"):
        write_report([record("one")], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text() == "before"
