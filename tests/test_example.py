"""The embedded teacher and text are what examples/tiny/README.md says."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest

from megabyte_distill.conversion.hf_import import HfModel
from megabyte_distill.conversion.tokenizer_files import token_table
from megabyte_distill.data.dataset import ByteTokenDataset
from megabyte_distill.evaluation.held_out import held_out_rows
from megabyte_distill.inference.scoring import score_tokens
from megabyte_distill.parallel.process_groups import world
from tests.conversion.in_memory import read_backbone
from tests.data.preprocessing import preprocess

TINY = Path(__file__).resolve().parent.parent / "examples" / "tiny"


def documents(name: str) -> list[dict[str, str]]:
    with lzma.open(TINY / f"{name}.jsonl.xz", "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def test_example_is_small_and_its_text_is_large() -> None:
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) < 12 * 2**20
    assert sum(len(d["text"].encode()) for name in ("train", "heldout") for d in documents(name)) > 6 * 10**6


def test_held_out_works_are_whole_and_never_trained_on() -> None:
    train, held_out = documents("train"), documents("heldout")
    assert {d["work"] for d in held_out} == {"Persuasion", "Acts"}
    assert not {d["work"] for d in held_out} & {d["work"] for d in train}
    assert not {d["text"] for d in held_out} & {d["text"] for d in train}


@pytest.mark.timeout(600)
def test_teacher_beats_xz_by_a_wide_margin_on_the_held_out_works(tmp_path: Path) -> None:
    whole = "\n\n".join(d["text"] for d in documents("heldout")).encode()
    xz_bits_per_byte = 8 * len(lzma.compress(whole, preset=9)) / len(whole)
    stems = preprocess(
        [TINY / "heldout.jsonl.xz"], output_prefix=tmp_path / "x", tokenizer_model=TINY / "teacher"
    ).stems
    with world():
        teacher = read_backbone(HfModel.open(TINY / "teacher")).float().eval()
        table = token_table(TINY / "teacher", teacher.backbone_config.vocab_size)
        rows = held_out_rows(
            [ByteTokenDataset(stems["text"], tokenizer_hash=table.hash)], row_bytes=2048, max_bytes=60_000
        )
        scores = [score_tokens(teacher, row) for row in rows]
    bits = sum(float(score.bits.sum()) for score in scores) / sum(int(score.bytes.sum()) for score in scores)
    assert 2.2 < xz_bits_per_byte < 2.5
    assert bits < 0.75 * xz_bits_per_byte
