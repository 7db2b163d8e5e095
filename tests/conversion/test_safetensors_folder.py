"""Files written here are read by safetensors and the other way round; damage is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megabyte_distill.conversion.safetensors_folder import INDEX_FILE, SINGLE_FILE, SafetensorsFolder, write_tensors


def tensors() -> dict[str, torch.Tensor]:
    return {
        "a": torch.randn(3, 5),
        "b.weight": torch.randn(7).to(torch.bfloat16),
        "c": torch.randn(2, 2, 3).to(torch.float16),
        "empty": torch.zeros(0, 4),
    }


def write(folder: Path, content: dict[str, torch.Tensor], limit: int = 10**9) -> None:
    layout = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in content.items()}
    write_tensors(folder, layout, content.items(), max_shard_bytes=limit)


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    content = tensors()
    write(tmp_path, content)
    back = load_file(tmp_path / SINGLE_FILE)
    assert back.keys() == content.keys()
    assert all(torch.equal(back[name], content[name]) and back[name].dtype is content[name].dtype for name in content)


def test_what_the_library_writes_is_read(tmp_path: Path) -> None:
    content = tensors()
    save_file(content, tmp_path / SINGLE_FILE)
    folder = SafetensorsFolder(tmp_path)
    assert folder.shapes() == {name: tuple(tensor.shape) for name, tensor in content.items()}
    assert all(torch.equal(folder.read(name), content[name]) for name in content)


def test_shards_and_their_index_come_back_whole(tmp_path: Path) -> None:
    content = tensors()
    write(tmp_path, content, limit=70)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert len(set(index["weight_map"].values())) == 2 and not (tmp_path / SINGLE_FILE).exists()
    assert index["metadata"]["total_size"] == 3 * 5 * 4 + 7 * 2 + 12 * 2
    folder = SafetensorsFolder(tmp_path)
    assert folder.shapes().keys() == content.keys()
    assert all(torch.equal(folder.read(name), content[name]) for name in content)


def test_views_are_written_by_value_and_cast(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    write_tensors(tmp_path, {"t": ((6, 4), torch.bfloat16)}, [("t", base.T)])
    assert torch.equal(load_file(tmp_path / SINGLE_FILE)["t"], base.T.to(torch.bfloat16))


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    write(tmp_path, tensors())
    path = tmp_path / SINGLE_FILE
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ValueError, match=r"model\.safetensors: not a complete safetensors file"):
        SafetensorsFolder(tmp_path)


def test_missing_weights_are_an_error_that_mentions_pickles(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected safetensors weights"):
        SafetensorsFolder(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: pickled weights are not read"):
        SafetensorsFolder(tmp_path)


def test_an_index_that_does_not_match_its_shards_is_an_error(tmp_path: Path) -> None:
    write(tmp_path, tensors(), limit=70)
    path = tmp_path / INDEX_FILE
    index = json.loads(path.read_text())
    last = index["weight_map"].pop("c")
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="also holds c"):
        SafetensorsFolder(tmp_path)
    index["weight_map"] |= {"c": last, "d": last}
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match="lacks d"):
        SafetensorsFolder(tmp_path)
    (tmp_path / last).unlink()
    with pytest.raises(ValueError, match=f"not there: {last}"):
        SafetensorsFolder(tmp_path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="not a safetensors index"):
        SafetensorsFolder(tmp_path)


def test_integer_tensors_are_refused(tmp_path: Path) -> None:
    save_file({"ids": torch.arange(3)}, tmp_path / SINGLE_FILE)
    with pytest.raises(ValueError, match="ids has dtype I64"):
        SafetensorsFolder(tmp_path)
