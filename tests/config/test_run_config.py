"""run_config.yaml holds the whole of a run's settings and says what changed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megabyte_distill.config import PRESETS, Settings, diff, parse_arguments, read_run_config
from megabyte_distill.config.run_config import RUN_CONFIG_NAME, run_config_text

LINE = ["--data-path", "0.5", "a", "2", "b", "--conv-dilations", "1,3", "--2a.lr", "1e-4", "--1a.lr-warmup-iters", "3"]


def write(settings: Settings, folder: Path) -> None:
    (folder / RUN_CONFIG_NAME).write_text(run_config_text(settings), encoding="utf-8")


@pytest.mark.parametrize("preset", PRESETS)
def test_written_settings_are_read_back_equal(tmp_path: Path, preset: str) -> None:
    settings = parse_arguments([*LINE, "--preset", preset], world_size=1)
    write(settings, tmp_path)
    assert read_run_config(tmp_path) == settings
    assert read_run_config(tmp_path / "run_config.yaml") == settings


def test_the_file_is_yaml_and_shows_a_stages_setting(tmp_path: Path) -> None:
    write(parse_arguments(LINE), tmp_path)
    yaml = pytest.importorskip("yaml", reason="reading the file as YAML needs PyYAML, which we do not depend on")
    content = yaml.safe_load((tmp_path / "run_config.yaml").read_text())
    assert float(content["settings"]["stages"]["2a"]["lr"]) == 1e-4
    assert content["settings"]["model"]["byte_side"]["byte_mixer"] == "conv"


def test_the_blend_of_a_file_is_written_out_and_its_change_is_seen(tmp_path: Path) -> None:
    blend = tmp_path / "blend.txt"
    blend.write_text("0.3 a 0.7 b")
    before = parse_arguments(["--data-args-path", str(blend)])
    write(before, tmp_path)
    blend.write_text("0.7 a 0.3 b")
    assert read_run_config(tmp_path).data.data_path == ("0.3", "a", "0.7", "b")
    [line] = diff(read_run_config(tmp_path), parse_arguments(["--data-args-path", str(blend)]))
    assert line == 'data.data_path: ["0.3", "a", "0.7", "b"] before, ["0.7", "a", "0.3", "b"] now'


def test_equal_settings_do_not_differ() -> None:
    assert diff(parse_arguments(LINE), parse_arguments(LINE)) == []


def test_differences_are_named_as_the_flags_are() -> None:
    before = parse_arguments(LINE)
    now = parse_arguments([*LINE, "--2a.lr", "2e-4", "--byte-width", "96", "--stages", "1a,1b,1c,2a", "--bf16"])
    lines = diff(before, now)
    assert "2a.lr: 0.0001 before, 0.0002 now" in lines
    assert "model.byte_side.byte_width: 128 before, 96 now" in lines
    assert "run.bf16: false before, true now" in lines
    assert f"2b.lr: {before.stages['2b'].lr} before, (absent) now" in lines


def test_a_setting_that_a_former_version_had_is_left_out(tmp_path: Path) -> None:
    settings = parse_arguments(LINE)
    content = json.loads(run_config_text(settings))
    content["settings"]["parallel"]["context_parallel_size"] = 1
    (tmp_path / RUN_CONFIG_NAME).write_text(json.dumps(content))
    assert read_run_config(tmp_path) == settings
    content["settings"]["parallel"]["context_parallel_size"] = 2
    (tmp_path / RUN_CONFIG_NAME).write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"unknown settings parallel\.context_parallel_size"):
        read_run_config(tmp_path)


def test_absent_settings_take_their_default(tmp_path: Path) -> None:
    path = tmp_path / "run_config.yaml"
    path.write_text(json.dumps({"schema": 1, "settings": {"run": {"seed": 7}}}))
    settings = read_run_config(path)
    assert settings.run.seed == 7
    assert settings.model == Settings().model


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "expected the JSON text"),
        ("[]", "got schema 'list'"),
        ('{"schema": 2, "settings": {}}', "got schema 2, expected 1"),
        ('{"schema": 1}', "got schema 1"),
        ('{"schema": 1, "settings": {"run": {"sed": 7}}}', "unknown settings run.sed"),
        ('{"schema": 1, "settings": {"run": {"seed": "7"}}}', "run.seed: got '7', expected int"),
        ('{"schema": 1, "settings": {"run": {"seed": true}}}', "run.seed: got True, expected int"),
        ('{"schema": 1, "settings": {"run": 3}}', "run: got int, expected named settings"),
        ('{"schema": 1, "settings": {"stages": {"3x": {}}}}', "stages: got 3x"),
        ('{"schema": 1, "settings": {"stages": []}}', "stages: got list"),
        (
            '{"schema": 1, "settings": {"stages": {"2a": {"boundary_source": "x"}}}}',
            "stages.2a.boundary_source: got 'x'",
        ),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "run_config.yaml"
    path.write_text(content)
    with pytest.raises(ValueError) as caught:
        read_run_config(path)
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)
