"""Flags become settings, layer over layer; everything wrong is reported together."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megabyte_distill import __version__
from megabyte_distill.config import (
    PRESETS,
    BoundarySource,
    ByteMixer,
    ConfigError,
    LrDecayStyle,
    Settings,
    help_text,
    parse_arguments,
)
from megabyte_distill.config.command_line import asked_text
from megabyte_distill.config.layers import all_options

MOCK = ["--mock-data"]


def problems(argv: list[str], **kwargs: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as caught:
        parse_arguments(argv, **kwargs)
    return caught.value.problems


def test_a_flag_sets_every_selected_stage_and_a_stage_flag_one() -> None:
    settings = parse_arguments([*MOCK, "--2a.lr", "0.5", "--lr", "0.25"])
    assert {stage: config.lr for stage, config in settings.stages.items()} == {
        "1a": 0.25,
        "1b": 0.25,
        "1c": 0.25,
        "2a": 0.5,
        "2b": 0.25,
    }


def test_only_selected_stages_are_there_in_order() -> None:
    assert list(parse_arguments([*MOCK, "--stages", "1a,1b"]).stages) == ["1a", "1b"]


def test_layers_go_from_caller_defaults_over_preset_and_smoke_to_flags() -> None:
    defaults = {"save": "runs/x", "train_iters": 7, "seed": 5}
    assert parse_arguments(MOCK, defaults).checkpoint.save == "runs/x"
    assert parse_arguments(MOCK, defaults).run.seed == 5
    assert parse_arguments(MOCK, defaults).stages["1a"].train_iters == PRESETS["tiny"].stages["1a"]["train_iters"]
    assert parse_arguments([*MOCK, "--smoke"], defaults).stages["1a"].train_iters == 6
    settings = parse_arguments([*MOCK, "--smoke", "--train-iters", "8", "--seed=9"], defaults)
    assert settings.stages["1a"].train_iters == 8
    assert settings.run.seed == 9


def test_every_kind_of_value_is_read() -> None:
    line = (
        "--data-path 0.5 a 1e-6 b --byte-mixer mamba2 --conv-dilations 1,3 9 --no-document-mask --bf16 --2b.backbone-lr"
        " none --lr-decay-style=linear --exit-duration-in-mins 1.5 --2a.boundary-source router --no-exit-signal-handler"
        " --train-iters 3 --train-iters 4"
    )
    settings = parse_arguments(line.split())
    assert [(entry.weight, entry.stem) for entry in settings.data.blend] == [(0.5, "a"), (1e-6, "b")]
    assert settings.model.byte_side.byte_mixer is ByteMixer.MAMBA2
    assert settings.model.byte_side.conv_dilations == (1, 3, 9)
    assert not settings.model.document_mask
    assert settings.run.bf16
    assert not settings.run.exit_signal_handler
    assert settings.run.exit_duration_in_mins == 1.5
    assert settings.stages["2b"].backbone_lr is None
    assert settings.stages["2a"].boundary_source is BoundarySource.ROUTER
    assert settings.stages["2b"].boundary_source is BoundarySource.GOLD
    assert settings.stages["1a"].lr_decay_style is LrDecayStyle.LINEAR
    assert settings.stages["1a"].train_iters == 4, "the later flag wins"


def test_a_flag_replaces_its_alternative_in_the_layers_below() -> None:
    settings = parse_arguments([*MOCK, "--lr-warmup-iters", "2", "--2a.lr-warmup-fraction", "0.5", "--min-lr", "1e-9"])
    assert (settings.stages["1a"].lr_warmup_iters, settings.stages["1a"].lr_warmup_fraction) == (2, None)
    assert (settings.stages["2a"].lr_warmup_iters, settings.stages["2a"].lr_warmup_fraction) == (None, 0.5)
    assert (settings.stages["1b"].min_lr, settings.stages["1b"].min_lr_ratio) == (1e-9, None)
    zero = parse_arguments([*MOCK, "--lr-warmup-iters", "0"]).stages["1a"]
    assert (zero.lr_warmup_iters, zero.lr_warmup_fraction, zero.warmup_iterations) == (0, None, 0)


def test_freezing_the_backbone_takes_back_the_presets_learning_rate_for_it() -> None:
    assert parse_arguments([*MOCK, "--freeze-backbone"]).stages["2b"].backbone_lr is None
    assert parse_arguments([*MOCK, "--no-freeze-backbone"]).stages["2b"].backbone_lr == 3e-4


def test_naming_data_takes_back_the_callers_default_data() -> None:
    defaults = {"train_data_path": ("demo",), "valid_data_path": ("held_out",)}
    own = parse_arguments(["--data-path", "mine"], defaults).data
    assert (own.data_path, own.train_data_path, own.valid_data_path) == (("mine",), (), ())
    assert parse_arguments(["--mock-data"], defaults).data.valid_data_path == ()
    assert parse_arguments(["--no-mock-data"], defaults).data.train_data_path == ("demo",)
    assert parse_arguments(["--valid-data-path", "other"], defaults).data.train_data_path == ("demo",)


def test_a_blend_from_a_file_is_the_blend_on_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "blend.txt"
    path.write_text("0.5 a\n1e-6 b\n")
    from_file = parse_arguments(["--data-args-path", str(path), "--split", "9,1,0"]).data
    assert from_file.data_path == ("0.5", "a", "1e-6", "b") and from_file.split == "9,1,0"
    assert from_file.blend == parse_arguments(["--data-path", "0.5", "a", "1e-6", "b"]).data.blend
    defaults = {"train_data_path": ("demo",), "valid_data_path": ("held_out",), "data_path": ("old",)}
    own = parse_arguments(["--data-args-path", str(path)], defaults).data
    assert (own.data_path, own.train_data_path, own.valid_data_path) == (from_file.data_path, (), ())
    over = parse_arguments(["--data-path", "mine"], {"data_args_path": "missing"}).data
    assert (over.data_path, over.data_args_path) == (("mine",), None)


def test_everything_wrong_with_a_file_and_beside_it_is_reported_together(tmp_path: Path) -> None:
    missing = str(tmp_path / "none.txt")
    found = problems(["--data-args-path", missing, "--data-path", "x", "--valid-data-path", "y", "--lr", "-1"])
    expected = (
        "name the same thing twice",
        f"{missing!r} cannot be read",
        "contradicts --valid-data-path",
        "--lr: got",
    )
    assert len(found) == len(expected) and all(any(part in problem for problem in found) for part in expected), found
    assert len(problems(["--data-args-path", missing])) == 1, "a file that cannot be read is not also 'no data'"
    wrong = tmp_path / "wrong.txt"
    wrong.write_text("0.5 a 0.5")
    assert problems(["--data-args-path", str(wrong)]) == (
        "--data-args-path: got 3 words, expected stems only, or pairs: weight stem weight stem …",
    )
    found = problems([*MOCK, "--data-args-path", str(wrong)])
    assert any("--mock-data and --data-args-path contradict each other" in problem for problem in found)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--trian-iters", "5"], "did you mean --train-iters?"),
        (["--train_iters", "5"], "did you mean --train-iters?"),
        (["--train", "5"], "unknown flag --train"),
        (["--2a.lrr", "5"], "did you mean --2a.lr?"),
        (["--4a.lr", "5"], "unknown stage '4a' in --4a.lr"),
        (["--2a.seed", "5"], "belongs to the whole run"),
        (["--1a.backbone-lr", "5"], "acts only in 1b, 2b"),
        (["--lr"], "--lr needs a value"),
        (["--lr", "--bf16"], "--lr needs a value"),
        (["--lr", "fast"], "--lr: got 'fast', expected a number"),
        (["--lr", "nan"], "expected a finite number"),
        (["--lr", "-1"], "--lr: got -1.0, expected at least 0"),
        (["--2a.lr", "-1"], "--2a.lr: got -1.0, expected at least 0"),
        (["--train-iters", "1.5"], "expected a whole number"),
        (["--exit-interval", "x"], "expected a whole number, or none"),
        (["--seq-length", "1"], "expected more than 1"),
        (["--byte-mixer", "rnn"], "expected one of mamba2, conv, local_attention"),
        (["--router", "mlp"], "expected one of official, linear"),
        (["--bf16=maybe"], "expected true or false"),
        (["--no-bf16=true"], "takes no value"),
        (["--no-no-load-rng"], "unknown flag --no-no-load-rng"),
        (["--no-lr"], "unknown flag --no-lr"),
        (["--bf16", "yes"], "unexpected word 'yes'"),
        (["word"], "unexpected word 'word'"),
        (["-x"], "unexpected word '-x'"),
        (["--"], "unexpected word '--'"),
        (["--preset", "tinny"], "did you mean tiny?"),
        (["--stages", ""], "names no stage"),
    ],
)
def test_a_wrong_word_is_named_with_what_was_expected(argv: list[str], expected: str) -> None:
    found = problems([*MOCK, *argv])
    assert len(found) == 1, found
    assert expected in found[0]


def test_all_problems_are_reported_together_and_numbered() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_arguments(["--lr", "-1", "--foo", "--data-path", "x", "--mock-data", "--ckpt-step", "3", "--1c.lr", "?"])
    lines = str(caught.value).splitlines()
    assert lines[0] == "the configuration has 5 problems:"
    assert [line.split(".")[0].strip() for line in lines[1:]] == ["1", "2", "3", "4", "5"]
    assert isinstance(caught.value, ValueError)


def test_flags_without_effect_are_told() -> None:
    told: list[str] = []
    parse_arguments([*MOCK, "--stages", "1a", "--2a.lr", "1", "--backbone-lr", "1"], warn=told.append)
    assert len(told) == 2
    assert "stage 2a is not among --stages 1a" in told[0]
    assert "acts in 1b, 2b, 3a only" in told[1]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--1a.recompute-granularity full", "--1a.recompute-granularity has no effect: no layer of the backbone"),
        ("--stages 1a --recompute-granularity full", "--recompute-granularity has no effect: no layer of the backbone"),
        ("--1a.align-layers 2 --1a.recompute-granularity full", None),
        ("--recompute-granularity full", None),
        ("--stages 1b --align-layers 2", "--align-layers has no effect: it acts in 1a only"),
        ("--stages 1a,1b --target-bytes-per-chunk 8", "--target-bytes-per-chunk has no effect: it acts in 1c, 2a, 2b"),
        (
            "--router linear --router-hidden-size 4096",
            "--router-hidden-size has no effect: it is about --router official",
        ),
        ("--router-hidden-size 4096", None),
        (
            "--byte-attention-window 64",
            "--byte-attention-window has no effect: it is about --byte-mixer local_attention",
        ),
        ("--byte-attention-window 64 --byte-mixer local_attention", None),
        ("--byte-mixer mamba2 --conv-kernel 3", "--conv-kernel has no effect: it is about --byte-mixer conv"),
        ("--mamba-expand 3", "--mamba-expand has no effect: it is about --byte-mixer mamba2"),
        ("--byte-ngram-rows 512", "--byte-ngram-rows has no effect: it is about --byte-ngram-tables"),
        ("--byte-ngram-rows 512 --byte-ngram-tables 3,4", None),
        ("--preset official", None),
        ("--preset tiny --router linear", None),
    ],
)
def test_a_flag_of_a_part_that_is_not_there_is_told(words: str, says: str | None) -> None:
    told: list[str] = []
    parse_arguments([*MOCK, *words.split()], warn=told.append)
    assert [says is not None and says in message for message in told] == ([True] if says else []), told


def test_the_command_line_can_say_every_setting() -> None:
    text = help_text()
    for item in all_options().values():
        assert f"--{item.flag}" in text
        assert item.metadata["help"], f"{item.name} has no help"


@pytest.mark.parametrize(
    "shown",
    [
        "--train-iters UPDATES",
        "--save-interval UPDATES",
        "--eval-interval UPDATES",
        "--distributed-timeout-minutes MINUTES",
        "--seed N",
        "--lr X",
        "--byte-width N",
        "--conv-dilations N [N ...]",
        "--load DIR",
        "--data-path STEM [STEM ...]",
        "--byte-mixer {mamba2,conv,local_attention}",
        "--recompute-modules {core_attn,mlp} [{core_attn,mlp} ...]",
    ],
)
def test_help_shows_what_a_value_is(shown: str) -> None:
    assert f"  {shown}\n" in help_text() or f"  {shown} " in help_text()


def test_every_value_has_a_kind() -> None:
    assert [item.name for item in all_options().values() if not item.is_bool and not item.metavar] == []


def test_help_shows_the_defaults_of_the_chosen_preset() -> None:
    flat = " ".join(help_text(["--preset", "official"]).split())
    assert "1a 0.001, 1b 2e-05, 1c 0.001, 2a 0.001, 2b 4e-05" in flat
    assert "Acts in 2a, 2b." in flat


@pytest.mark.parametrize(
    ("flag", "shown"), [("--help", "--train-iters"), ("-h", "Exit codes: 0"), ("--version", f"{__version__}\n")]
)
def test_what_is_asked_is_answered_whatever_else_is_typed(flag: str, shown: str) -> None:
    assert shown in (asked_text([flag, "--foo"]) or "")
    assert asked_text(["--foo"]) is None


def test_settings_cannot_be_changed() -> None:
    settings = parse_arguments(MOCK)
    assert isinstance(settings, Settings)
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.run.seed = 3  # type: ignore[misc]


def test_a_preset_fits_any_number_of_ranks_and_a_flag_is_taken_as_given() -> None:
    assert parse_arguments([*MOCK, "--global-batch-size", "4"]).stages["2a"].micro_batch_size == 2
    assert parse_arguments([*MOCK, "--global-batch-size", "4"], world_size=4).stages["2a"].micro_batch_size == 1
    told: list[str] = []
    assert parse_arguments(MOCK, world_size=3, warn=told.append).stages["2a"].global_batch_size == 3
    (warning,) = told
    assert "2a 2 to 3 rows (3,072 bytes)" in warning and "learning rates and numbers of updates stay" in warning
    for words, ranks in (([], 2), (["--global-batch-size", "6"], 3)):
        assert parse_arguments([*MOCK, *words], world_size=ranks, warn=told.append) and told == [warning]
    with pytest.raises(ConfigError, match="micro-batch-size 2"):
        parse_arguments([*MOCK, "--global-batch-size", "4", "--micro-batch-size", "2"], world_size=4)
