"""Any text in the report is text: nothing of it is markup, turns the page around, or is lost."""

from __future__ import annotations

import pytest

from megabyte_distill.evaluation.marked_text import MarkedText
from megabyte_distill.evaluation.report_text import counts, escaped, page_html


def marked(text: bytes, learned: set[int], gold: set[int]) -> MarkedText:
    places = range(len(text))
    return MarkedText(
        text=text, p=[0.5] * len(text), learned=[i in learned for i in places], gold=[i in gold for i in places]
    )


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("<script>\"&'", "&lt;script&gt;&quot;&amp;&#x27;"),
        ("a\0b", 'a<span class="code">U+0000</span>b'),
        ("\u202eabc", '<span class="code">U+202E</span>abc'),
        ("\ud800", '<span class="code">U+D800</span>'),
        ("日本 سلام e\u0301 👩\u200d🚀\n", "日本 سلام e\u0301 👩\u200d🚀\n"),
    ],
)
def test_text_is_escaped_and_what_cannot_be_seen_is_named(text: str, shown: str) -> None:
    assert escaped(text) == shown


@pytest.mark.parametrize(
    ("text", "learned", "gold", "shown"),
    [
        (b"abcd", {0, 1}, {1, 2}, 'a<i class="learned"></i>b<i class="both"></i>c<i class="gold"></i>d'),
        (b"ab", {1}, {1}, "ab"),  # the last byte ends with its text
        (b"<&>", {0}, set(), '&lt;<i class="learned"></i>&amp;&gt;'),
        (b"\xff\x00", {0}, set(), '<span class="code">FF</span><i class="learned"></i>'
         '<span class="code">U+0000</span>'),
        ("éx".encode(), {0}, {1}, 'é<i class="learned" title="inside the character, bytes left: 1"></i>'
         '<i class="gold"></i>x'),
        ("e\u0301x".encode(), {0}, set(), 'e<i class="learned"></i>◌\u0301x'),
        ("e\u0301x".encode(), set(), {2}, 'e\u0301<i class="gold"></i>x'),
        (b"a\nb", {1}, set(), 'a<span class="code">↵</span><i class="learned"></i>\nb'),
    ],
)  # fmt: skip
def test_boundaries_stand_behind_their_bytes(text: bytes, learned: set[int], gold: set[int], shown: str) -> None:
    assert page_html([marked(text, learned, gold)]) == f'<div class="text" dir="auto">{shown}</div>'


def test_boundaries_are_counted_as_they_are_shown() -> None:
    page = [marked(b"abcd", {0, 1, 3}, {1, 2, 3}), marked(b"x", {0}, set())]
    found = counts(page)
    assert found == {"both": 1, "learned": 1, "gold": 1}
    assert all(page_html(page).count(f'<i class="{kind}"') == count for kind, count in found.items())
