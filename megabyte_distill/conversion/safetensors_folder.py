"""Weights of a Hugging Face folder: read lazily by name from one file or shards, written one tensor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megabyte_distill.conversion.mapping import Shape
from megabyte_distill.conversion.tensor_checks import check_finite, converted

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a file's header says about a tensor."""

    file: Path
    shape: Shape
    dtype: torch.dtype


class SafetensorsFolder:
    """The tensors of a folder by name; only headers are read before a tensor is asked for."""

    def __init__(self, folder: Path, prefix: str = "") -> None:
        """Only tensors whose names start with ``prefix``, which is cut off.

        ValueError where weights are missing, truncated, in the wrong shard or of a dtype that is no float.
        """
        self.folder, self._prefix = folder, prefix
        self.tensors: dict[str, TensorInfo] = {}
        for file, names in _files(folder).items():
            infos = _read_header(file)
            if names is not None:
                _check_index(folder, file, names, set(infos))
            self.tensors.update({n.removeprefix(prefix): info for n, info in infos.items() if n.startswith(prefix)})

    def shapes(self) -> dict[str, Shape]:
        """Shape of every tensor."""
        return {name: info.shape for name, info in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        """One tensor as stored; ValueError where its file cannot be read."""
        file = self.tensors[name].file
        try:
            with safe_open(file, framework="pt", device="cpu") as opened:
                return opened.get_tensor(self._prefix + name)  # type: ignore[no-any-return]
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file}: tensor {name} cannot be read ({error}); copy the file again") from error


def _files(folder: Path) -> dict[Path, set[str] | None]:
    """Files that hold weights, each with the names an index promises in it (None without an index)."""
    index = folder / INDEX_FILE
    if not index.is_file():
        single = folder / SINGLE_FILE
        if not single.is_file():
            others = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
            found = f" (found {', '.join(others[:4])}: pickled weights are not read)" if others else ""
            raise ValueError(f"{folder} has no {SINGLE_FILE} and no {INDEX_FILE}{found}; expected safetensors weights")
        return {single: None}
    try:
        placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        by_file: dict[Path, set[str] | None] = {}
        for name, file in placed.items():
            by_file.setdefault(folder / Path(file).name, set()).add(name)  # type: ignore[union-attr]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: not a safetensors index ({type(error).__name__}: {error})") from error
    absent = sorted(file.name for file in by_file if not file.is_file())
    if absent:
        raise ValueError(f"{index} names files that are not there: {', '.join(absent)}; copy the folder again")
    return by_file


def _read_header(file: Path) -> dict[str, TensorInfo]:
    infos = {}
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            for name in opened.keys():  # noqa: SIM118  not a mapping
                view = opened.get_slice(name)
                infos[name] = (tuple(view.get_shape()), view.get_dtype())
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file}: not a complete safetensors file ({error}); copy it again") from error
    strange = {name: code for name, (_, code) in infos.items() if code not in _DTYPES}
    if strange:
        name, code = next(iter(strange.items()))
        raise ValueError(f"{file}: tensor {name} has dtype {code}; expected one of {', '.join(_DTYPES)}")
    return {name: TensorInfo(file, shape, _DTYPES[code]) for name, (shape, code) in infos.items()}


def _check_index(folder: Path, file: Path, promised: set[str], found: set[str]) -> None:
    if promised == found:
        return
    missing, extra = sorted(promised - found), sorted(found - promised)
    parts = [f"lacks {', '.join(missing[:4])}"] if missing else []
    parts += [f"also holds {', '.join(extra[:4])}"] if extra else []
    raise ValueError(f"{folder / INDEX_FILE}: {file.name} {' and '.join(parts)}; index and shards must belong together")


def write_tensors(
    folder: Path,
    layout: Mapping[str, tuple[Shape, torch.dtype]],
    tensors: Iterable[tuple[str, Tensor]],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Writes weights into a folder: model.safetensors, or shards with an index above ``max_shard_bytes``.

    ``layout`` names shapes and dtypes beforehand; ``tensors`` yields the tensors in the same order and is consumed one
    at a time, each cast to its dtype, so memory stays near the largest. ValueError names one with a value that is not
    finite, or not in its dtype.
    """
    shards = _shards(layout, max_shard_bytes)
    stream = iter(tensors)
    names = [SINGLE_FILE]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        try:
            with open(folder / name, "wb") as file:
                _write_shard(file, shard, stream)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:  # of a file that is open, it does not say which
            raise OSError(error.errno, error.strerror, str(folder / name)) from error
    leftover = next(stream, None)
    assert leftover is None, f"{leftover and leftover[0]} is not in the layout"
    if len(shards) > 1:
        placed = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(_size(*entry) for entry in layout.values())
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _size(shape: Shape, dtype: torch.dtype) -> int:
    return torch.Size(shape).numel() * dtype.itemsize


_Layout = dict[str, tuple[Shape, torch.dtype]]


def _shards(layout: Mapping[str, tuple[Shape, torch.dtype]], limit: int) -> list[_Layout]:
    shards: list[_Layout] = [{}]
    filled = 0
    for name, entry in layout.items():
        if shards[-1] and filled + _size(*entry) > limit:
            shards.append({})
            filled = 0
        shards[-1][name] = entry
        filled += _size(*entry)
    return shards


def _write_shard(file: BinaryIO, shard: _Layout, tensors: Iterator[tuple[str, Tensor]]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (shape, dtype) in shard.items():
        end = offset + _size(shape, dtype)
        header[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # readers map the data, which must start aligned
    file.write(len(text).to_bytes(8, "little"))
    file.write(text)
    for expected, (shape, dtype) in shard.items():
        name, tensor = next(tensors)
        assert name == expected and tuple(tensor.shape) == shape, (name, tuple(tensor.shape), expected, shape)
        check_finite(tensor.detach(), name)
        plain = converted(tensor.detach().cpu(), dtype, name).contiguous()
        file.write(plain.flatten().view(torch.uint8).numpy().data)
