"""The segmentation hash tells apart what cuts text differently, and nothing else."""

from __future__ import annotations

import base64
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megabyte_distill.data import tokenizers
from megabyte_distill.data.tokenizer_pattern import GPT2_PATTERN
from megabyte_distill.data.tokenizer_rank_files import LLAMA3_PATTERN
from megabyte_distill.data.tokenizers import DocumentTokenizer

Change = Callable[[dict[str, Any]], None]


def _spec(folder: Path) -> dict[str, Any]:
    spec: dict[str, Any] = json.loads((folder / "tokenizer.json").read_text())
    return spec


def _hash(folder: Path, spec: dict[str, Any]) -> str:
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return tokenizers.load(folder, end_of_text="<|endoftext|>").segmentation_hash


def _split(spec: dict[str, Any], pattern: str = LLAMA3_PATTERN) -> None:
    steps = [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
    ]
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}


def _swap_merges(spec: dict[str, Any]) -> None:
    merges = spec["model"]["merges"]
    merges[-1], merges[-2] = merges[-2], merges[-1]


CHANGES: dict[str, Change] = {
    "split": _split,
    "another split": lambda spec: _split(spec, GPT2_PATTERN),
    "merge order": _swap_merges,
    "one merge less": lambda spec: spec["model"]["merges"].pop(),
    "no normaliser": lambda spec: spec.update(normalizer=None),
    "another normaliser": lambda spec: spec.update(normalizer={"type": "NFKC"}),
    "tokens taken whole": lambda spec: spec["model"].update(ignore_merges=True),
}


def test_each_change_of_the_segmentation_has_its_own_hash(byte_level_folder: Path, tmp_path: Path) -> None:
    """The vocabulary's bytes are the same for all of them."""
    hashes, tables = {_hash(tmp_path / "same", _spec(byte_level_folder))}, set()
    for name, change in CHANGES.items():
        spec = _spec(byte_level_folder)
        change(spec)
        hashes.add(_hash(tmp_path / name, spec))
        tables.add(tokenizers.load(tmp_path / name).token_bytes.hash)
    assert len(hashes) == 1 + len(CHANGES) and len(tables) == 1
    assert all(len(value) == 64 for value in hashes)


def _reversed_keys(part: Any) -> Any:
    if isinstance(part, list):
        return [_reversed_keys(item) for item in part]
    return {key: _reversed_keys(part[key]) for key in reversed(part)} if isinstance(part, dict) else part


def test_the_order_of_keys_and_the_notation_of_merges_do_not_count(byte_level_folder: Path, tmp_path: Path) -> None:
    spec = _reversed_keys(_spec(byte_level_folder))
    assert list(spec) != list(_spec(byte_level_folder))
    expected = tokenizers.load(byte_level_folder).segmentation_hash
    assert _hash(tmp_path / "reversed", spec) == expected
    spec["model"]["merges"] = [" ".join(merge) for merge in spec["model"]["merges"]]
    assert _hash(tmp_path / "strings", spec) == expected


def test_what_never_touches_document_text_does_not_count(byte_level_folder: Path, tmp_path: Path) -> None:
    spec = _spec(byte_level_folder)
    spec["added_tokens"].append({**spec["added_tokens"][0], "id": 900, "content": "<turn>"})
    spec["truncation"] = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    spec["pre_tokenizer"]["add_prefix_space"] = False
    assert _hash(tmp_path / "more", spec) == tokenizers.load(byte_level_folder).segmentation_hash


def test_a_copy_elsewhere_and_a_sent_tokenizer_are_the_same(tokenizer: DocumentTokenizer, tmp_path: Path) -> None:
    shutil.copytree(tokenizer.path.parent, tmp_path / "copy")
    copy = tokenizers.load(tmp_path / "copy")
    assert copy.path != tokenizer.path
    sent: DocumentTokenizer = pickle.loads(pickle.dumps(copy))
    assert copy.segmentation_hash == tokenizer.segmentation_hash == sent.segmentation_hash


def test_the_ids_that_start_and_end_a_document_count(tokenizer: DocumentTokenizer) -> None:
    ends = [tokenizers.load(tokenizer.path, end_of_text=index, bos=260) for index in (260, 261)]
    starts = [tokenizers.load(tokenizer.path, end_of_text=260, bos=index) for index in (260, 261)]
    assert len({loaded.segmentation_hash for loaded in (*ends, *starts)}) == 3


def test_a_sentencepiece_model_counts_as_a_whole(sentencepiece_folder: Path, tmp_path: Path) -> None:
    model = (sentencepiece_folder / "tokenizer.model").read_bytes()
    (tmp_path / "tokenizer.model").write_bytes(model + b"\x1a\x02\x20\x00")  # remove_extra_whitespaces: false
    changed, before = tokenizers.load(tmp_path), tokenizers.load(sentencepiece_folder)
    assert changed.token_bytes.hash == before.token_bytes.hash
    assert changed.segmentation_hash != before.segmentation_hash


@pytest.mark.parametrize("kind", ["byte_level", "metaspace", "sentencepiece"])
def test_kinds_differ(kind: str, tokenizer: DocumentTokenizer, request: pytest.FixtureRequest) -> None:
    other = tokenizers.load(request.getfixturevalue(f"{kind}_folder"))
    assert (other.segmentation_hash == tokenizer.segmentation_hash) == (other.path == tokenizer.path)


def _ranks(folder: Path, pieces: list[bytes], pattern: str, *, backwards: bool = False) -> DocumentTokenizer:
    folder.mkdir()
    lines = [base64.b64encode(piece) + b" %d" % rank for rank, piece in enumerate(pieces)]
    path = folder / f"{folder.name}.tiktoken"
    path.write_bytes(b"\r\n".join(lines[::-1]) if backwards else b"\n".join(lines))
    return tokenizers.load(path, pattern=pattern, end_of_text=300)


def test_ranks_and_pattern_count_and_lines_do_not(tmp_path: Path) -> None:
    pieces = [*(bytes([byte]) for byte in range(256)), b"th", b"the"]
    swapped = [*pieces[:256], b"the", b"th"]
    plain = _ranks(tmp_path / "plain", pieces, GPT2_PATTERN).segmentation_hash
    assert _ranks(tmp_path / "backwards", pieces, GPT2_PATTERN, backwards=True).segmentation_hash == plain
    others = [
        _ranks(tmp_path / "swapped", swapped, GPT2_PATTERN).segmentation_hash,
        _ranks(tmp_path / "pattern", pieces, LLAMA3_PATTERN).segmentation_hash,
    ]
    assert len({plain, *others}) == 3
