"""What the words of --data-path name, and what is said of words that name nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from megabyte_distill.data.named_sets import set_names, set_problems


def test_sets_are_called_by_their_names_or_by_the_ends_of_their_stems(tmp_path: Path) -> None:
    odd = f"{tmp_path}/k=v_text_document"
    Path(f"{odd}.json").write_text("{}")
    words = ["0.3", "data/en_text_document", "0.7", "German=de_text_document"]
    assert set_names(words) == {"en_text": "data/en_text_document", "German": "de_text_document"}
    assert set_names(["a/x_document", "b/x_document"]) == {
        "a/x_document": "a/x_document",
        "b/x_document": "b/x_document",
    }
    assert set_names([odd, f"mine={odd}"]) == {odd: odd, "mine": odd}
    with pytest.raises(ValueError, match="two data sets are called 'a'"):
        set_names(["a=x_document", "a=y_document"])


@pytest.mark.parametrize(
    ("words", "named", "message"),
    [
        (
            ["{tmp}/none_text_document"],
            False,
            "--x: got {tmp}/none_text_document, expected the stem PREFIX_KEY_document",
        ),
        (["{tmp}/is_text_document.bin"], False, "without an ending such as .bin"),
        (
            ["{tmp}/is_text_document", "0.3"],
            False,
            "--x: got '{tmp}/is_text_document' where the weight of '0.3' stands",
        ),
        (["a={tmp}/is_text_document", "a={tmp}/is_text_document"], True, "--x: two data sets are called 'a'"),
        (["a={tmp}/is_text_document"], False, "{tmp}/is_text_document.json is not there"),
        (["0.5", "a={tmp}/is_text_document"], True, ""),
    ],
)
def test_words_that_name_no_data_set_are_told_with_their_flag(
    tmp_path: Path, words: list[str], named: bool, message: str
) -> None:
    (tmp_path / "is_text_document.json").write_text("{}")
    found = set_problems([word.format(tmp=tmp_path) for word in words], "--x", named=named)
    assert [message.format(tmp=tmp_path) in one for one in found] == [True] * bool(message)
