"""scripts/check_greedy.py on a small export: every way is tried, and one that differs is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
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


@pytest.mark.parametrize("words", [[], ["RUN", "--smollm2-shape"]])
def test_one_student_is_asked_for(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert "give a RUN or --smollm2-shape, one of the two" in capsys.readouterr().err
