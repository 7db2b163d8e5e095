"""scripts/check_greedy.py on a small export: every way is tried, and one that differs is told."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from megabyte_distill.inference.engine import Engine
from scripts.check_greedy import DRAFTS, cut_prompts, main
from tests.hf.exported import Exported

TEXT = "It was a bright cold day; 時計が十三時を打った。🙂 Ünïcödé".encode()


def checked(exported: Exported, folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, dict[str, Any]]:
    (folder / "text").write_bytes(TEXT)
    where = [str(exported.folder), "--export", str(exported.folder), "--text", str(folder / "text")]
    code = main([*where, "--prompts", "3", "--longest", "6", "--max-new-bytes", "4"])
    return code, json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("is_broken", [False, True])
def test_every_way_is_tried_and_one_that_differs_is_told(
    exported: Exported,
    is_broken: bool,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pick = Engine.pick

    def wrong(engine: Engine, *given: Any, **where: Any) -> Tensor:
        joint = pick(engine, *given, **where)
        return joint ^ 1 if engine.draft_length.longest == 7 else joint

    if is_broken:
        monkeypatch.setattr(Engine, "pick", wrong)
    code, found = checked(exported, tmp_path, capsys)
    other = [name for name, way in found["ways"].items() if way["same"] < 3]
    assert other == (["engine, 1 side by side, drafts of 7"] if is_broken else [])
    assert (code, found["is_same"]) == (int(is_broken), not is_broken)
    assert len(found["ways"]) == 1 + 3 + 3 + len(DRAFTS) + 3 and len(DRAFTS) == 17
    assert found["prompts"] == 3 and min(found["margins"].values()) > 1e-4


def test_prompts_are_ragged_distinct_and_cut_anywhere() -> None:
    prompts = cut_prompts(TEXT, 32, 40, seed=0)
    assert len(set(prompts)) == 32 and prompts[0] == b"" and {len(prompt) for prompt in prompts} > {1, 40}
    assert all(prompt in TEXT for prompt in prompts)
    broken = [prompt for prompt in prompts if prompt.decode("utf-8", "ignore").encode() != prompt]
    assert len(broken) > 3
    with pytest.raises(ValueError, match="got a text of 40 bytes, expected 72"):
        cut_prompts(TEXT[:40], 32, 40, seed=0)


def test_a_prompt_without_a_second_reading_has_no_margin(
    exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text").write_bytes(TEXT)
    small = ["--prompts", "1", "--longest", "6", "--max-new-bytes", "1"]
    assert main([str(exported.folder), "--text", str(tmp_path / "text"), *small]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1], parse_constant=pytest.fail)
    assert found["margins"]["segmentations"] is None and found["margins"]["pairs"] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "RUN or --smollm2-shape: give one of the two"),
        (["{export}", "--smollm2-shape"], "RUN or --smollm2-shape: give one of the two"),
        (["{tmp}"], "RUN: {tmp} is not a run and not an exported student"),
        (["--smollm2-shape", "--export", "{export}"], "--export: is RUN's, and the weights of --smollm2-shape are"),
        (["{export}", "--export", "{tmp}/some/model"], "--export: got '{tmp}/some/model', expected a folder; there is"),
        (["{export}", "--export", "{tmp}"], "--export: {tmp}"),
        (["{export}", "--export", "{tmp}/other"], "--export: {tmp}/other has other weights than RUN (byte_decoder."),
    ],
)
def test_mistakes_are_told_before_anything_is_compared(
    words: list[str], message: str, exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(exported.folder, tmp_path / "other")
    weights = load_file(tmp_path / "other" / "model.safetensors")
    weights["byte_decoder.head.weight"] += 1e-3
    save_file(weights, tmp_path / "other" / "model.safetensors", metadata={"format": "pt"})
    places = {"tmp": tmp_path, "export": exported.folder}
    assert main([word.format(**places) for word in words]) == 2
    output = capsys.readouterr()
    [line] = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {message.format(**places)}") and not output.out
