"""Every flag of Megatron's that the table knows is taken, done anyway or refused as the table and the docs say."""

from __future__ import annotations

from pathlib import Path

import pytest

from megabyte_distill.config import ConfigError, parse_arguments
from megabyte_distill.config.layers import all_options
from megabyte_distill.config.megatron_flags import TABLE, Fate, MegatronFlag, markdown

ROWS = [row for rows in TABLE.values() for row in rows]
PAGE = Path(__file__).resolve().parents[2] / "docs" / "megatron-flags.md"


def flags_of(fate: Fate) -> list[tuple[str, MegatronFlag]]:
    return [(name, row) for row in ROWS if row.fate is fate for name in row.names]


def ours() -> set[str]:
    return {item.flag for item in all_options().values()}


def test_the_page_shows_the_table() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert text[text.index("## ") :].strip() == markdown().strip(), "write the table anew: megatron_flags.markdown()"


def test_no_flag_has_two_fates() -> None:
    names = [name for row in ROWS for name in row.names]
    assert len(names) == len(set(names))


def test_what_is_called_the_same_exists_and_what_is_not_does_not() -> None:
    same = {name for name, _ in flags_of(Fate.SAME)}
    assert same <= ours(), same - ours()
    others = {name for row in ROWS if row.fate is not Fate.SAME for name in row.names}
    assert not others & ours(), others & ours()


@pytest.mark.parametrize("fate", [Fate.OTHER, Fate.ABSENT])
@pytest.mark.parametrize("value", [[], ["1"], ["a", "b"]])
def test_what_is_not_taken_is_refused_with_what_to_do(fate: Fate, value: list[str]) -> None:
    for name, row in flags_of(fate):
        with pytest.raises(ConfigError) as caught:
            parse_arguments(["--mock-data", f"--{name}", *value])
        (problem,) = caught.value.problems
        assert problem.startswith(f"--{name} ") and row.words in problem


def test_what_is_done_anyway_is_taken_and_warned_about() -> None:
    plain = parse_arguments(["--mock-data"])
    for name, row in flags_of(Fate.ALWAYS):
        told: list[str] = []
        words = [] if row.value is None else [row.value]
        assert parse_arguments([f"--{name}", *words, "--mock-data"], warn=told.append) == plain
        assert len(told) == 1 and told[0].startswith(f"--{name} changes nothing") and row.words in told[0]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--ckpt-format", "zarr"], "--ckpt-format: got zarr, expected torch_dist"),
        (["--ckpt-format=zarr"], "--ckpt-format: got zarr, expected torch_dist"),
        (["--hidden-dropout"], "--hidden-dropout: got no value, expected 0.0"),
        (["--use-mcore-models", "no"], "--use-mcore-models: got no, expected no value"),
        (["--2a.finetune"], "unknown flag --2a.finetune"),
    ],
)
def test_a_value_that_asks_for_something_else_is_refused(words: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arguments(["--mock-data", *words])
    (problem,) = caught.value.problems
    assert problem.startswith(expected)


def test_the_words_name_only_flags_that_exist() -> None:
    elsewhere = {"--tokenizer-model"}  # of tools/preprocess_bytes.py
    for row in ROWS:
        named = {word.strip("`,.;:()").split("=")[0] for word in row.words.split() if word.strip("`(").startswith("--")}
        known = {f"--{flag}" for flag in ours()} | {f"--no-{flag}" for flag in ours()} | elsewhere
        missing = {flag for flag in named if flag not in known and "." not in flag}
        assert not missing, (row.names, missing)
