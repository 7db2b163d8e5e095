"""Tables for a person."""

from __future__ import annotations

from megabyte_distill.evaluation.report import columns


def test_columns_stand_left_or_right_and_may_be_ruled_off() -> None:
    header, rows = ("a", "bc"), [["long", "1"], ["é", "日本語"]]
    assert columns(header, rows).split("\n") == ["a      bc", "long    1", "é     日本語"]
    assert columns(header, rows, left=2, ruled=True).split("\n") == [
        "a     bc ",
        "----  ---",
        "long  1  ",
        "é     日本語",
    ]
    assert columns(header, []) == "a  bc"
