#!/usr/bin/env python3
"""Bytes that each fused operator moves, forward and backward, against torch's operators, torch.compile and the floor.

    python benchmarks/kernel_traffic.py [--only F2,F5] [--rows 2048] [--no-compile] [--quick]

Counted on a CPU, at bf16 and a few thousand bytes of text; no GPU is needed and nothing is estimated:

- floor: every input read once, every result and gradient written once (kernel_cases.py).
- eager: what each operator that torch runs reads and writes, whole tensors once each, views for nothing.
- compile: what inductor counts of the kernels that it generates.
- fused: the kernels' own accesses. The CUDA sources are built for the CPU with every access to memory calling a counter
  (traffic_counter.cpp); what a launch touches counts once, in sectors of 32 bytes, as with a cache that holds what one
  launch reads twice. "asked" is the same without any cache, the warp's lanes that ask for one number together included.
- peak: memory allocated at most above what was there before, from torch's allocator, results and gradients included.

The last line is JSON: the ratios to the floor of every case, and the worst of F1, F2, … among their cases.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from kernel_cases import CASES, Case, Sizes  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

from megabyte_distill.kernels import build, dispatch, library  # noqa: E402
from megabyte_distill.kernels.fused import FUSED_OPS  # noqa: E402

NOT_TRAFFIC = {"F2 bits and index"}
"""Cases about small integers: their time is that of launches."""
GATHERS = ("index_select", "embedding", "gather", "index.Tensor")
"""Read as much as they give, not the whole table."""
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-fno-strict-aliasing", "-fsanitize=thread", '-DMBK_TARGETS="cpu"', "-x", "c++")


def build_counting(folder: Path) -> Path:
    """The kernels for the CPU, every access to memory counted."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        raise SystemExit("g++ was not found; install it, or set CXX to another C++20 compiler")
    objects = []
    for sheet in sorted(build.SOURCES.glob("*.cu")):
        objects.append(str(folder / f"{sheet.stem}.o"))
        subprocess.run([compiler, *FLAGS, "-c", str(sheet), "-o", objects[-1]], check=True)
    counter, target = ROOT / "benchmarks" / "traffic_counter.cpp", folder / "counting.so"
    subprocess.run(
        [compiler, "-std=c++20", "-O2", "-fPIC", "-shared", *objects, str(counter), "-o", str(target)], check=True
    )
    return target


class CountingLibrary(library.Library):
    """Counts what each call reads and writes of the arrays it is given."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.sectors = self.asked = 0

    def call(self, name: str, *arguments: library.Argument) -> None:
        arrays = {value.data_ptr(): value for value in arguments if isinstance(value, Tensor) and value.numel()}
        self._library.traffic_clear()
        for pointer, value in arrays.items():
            size = value.numel() * value.element_size()
            self._library.traffic_watch(ctypes.c_void_p(pointer), ctypes.c_int64(size))
        super().call(name, *arguments)
        for index in range(len(arrays)):
            found = (ctypes.c_int64 * 4)()
            self._library.traffic_of(ctypes.c_int64(index), found)
            self.asked += found[0] + found[2]
            self.sectors += found[1] + found[3]


class CountedOperators(TorchDispatchMode):
    """Bytes that torch's own operators read and write; the insides of a fused operator are looked into."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name
        if name.startswith("megabyte::"):
            with self:
                return torch._library.custom_ops.OPDEFS[name]._init_fn(*args, **(kwargs or {}))
        result = func(*args, **(kwargs or {}))
        inputs = list(_tensors((args, kwargs or {})))
        outputs = list(_tensors(result))
        if not _is_view(func) and "empty" not in name and "detach" not in name:
            written = sum(_size(output) for output in outputs)
            read = sum(_size(value) for value in inputs if not any(value is output for output in outputs))
            if any(word in str(func) for word in GATHERS):
                read = sum(min(_size(value), written) for value in inputs)
            updates = func._schema.is_mutable and "copy_" not in name and "fill_" not in name and "zero_" not in name
            self.bytes += read + written * (2 if updates else 1)
        return result


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _tensors(tree: Any) -> Iterator[Tensor]:
    for leaf in torch.utils._pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor):
            yield leaf


def _size(value: Tensor) -> int:
    return min(value.numel() * value.element_size(), value.untyped_storage().nbytes())


def step(case: Case, run: Callable[..., Tensor] | None = None) -> None:
    """Forward and backward."""
    result = (run or case.run)(*case.leaves)
    torch.autograd.grad(result, case.leaves, case.upstream.to(result.dtype), allow_unused=True)


@contextmanager
def in_place(fused: bool) -> Iterator[None]:
    dispatch.install(FUSED_OPS if fused else {}, device="cpu", strict=True)
    try:
        yield
    finally:
        dispatch.install({})


def peak_bytes(action: Callable[[], object]) -> int:
    """Allocated at most, above what was there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        action()
    assert profile.profiler is not None and profile.profiler.kineto_results is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def compiled_bytes(case: Case) -> tuple[int, int]:
    """(bytes that inductor's kernels move, peak)."""
    from torch._inductor import config, metrics

    torch._dynamo.reset()
    config.force_disable_caches = True  # what comes from a cache is not counted
    torch._logging.set_logs(inductor_metrics=True)  # without this log inductor does not count
    run = torch.compile(case.run, fullgraph=True, dynamic=False)
    metrics.reset()
    step(case, run)
    torch._logging.set_logs()
    if not metrics.num_bytes_accessed:
        raise RuntimeError("inductor counted nothing")
    return metrics.num_bytes_accessed, peak_bytes(lambda: step(case, run))


def measure(name: str, sizes: Sizes, counting: CountingLibrary, *, compiled: bool) -> dict[str, float]:
    """Bytes of one case, forward and backward together."""
    torch.manual_seed(0)
    with in_place(fused=False):
        case = CASES[name](sizes, torch.bfloat16, torch.device("cpu"))
        with CountedOperators() as eager:
            step(case)
        found: dict[str, float] = {"floor": case.forward_floor + case.backward_floor, "eager": eager.bytes}
        found["eager_peak"] = peak_bytes(lambda: step(case))
        if compiled:
            try:
                found["compile"], found["compile_peak"] = compiled_bytes(case)
            except Exception as error:  # what cannot be compiled is said, the others still count
                print(f"    {name}: torch.compile: {type(error).__name__}: {str(error).splitlines()[0][:160]}")
    with in_place(fused=True):
        counting.asked = counting.sectors = 0
        with CountedOperators() as around:
            step(case)
        found["fused"], found["asked"] = counting.sectors + around.bytes, counting.asked + around.bytes
        found["fused_peak"] = peak_bytes(lambda: step(case))
    return found


def ratios(found: dict[str, float]) -> dict[str, float]:
    """Everything over the floor, peaks in MiB."""
    over = {
        f"{k}_to_floor": round(found[k] / found["floor"], 3)
        for k in ("eager", "compile", "fused", "asked")
        if k in found
    }
    peaks = {f"{key}_mib": round(value / 2**20, 1) for key, value in found.items() if key.endswith("_peak")}
    return {"floor_mib": round(found["floor"] / 2**20, 2), **over, **peaks}


def line(name: str, found: dict[str, float]) -> str:
    cells = [found["floor_mib"], *(found.get(f"{k}_to_floor") for k in ("eager", "compile", "fused", "asked"))]
    cells += [found.get(f"{k}_peak_mib") for k in ("eager", "compile", "fused")]
    return f"{name:20}" + "".join(f"{'-' if cell is None else cell:>10}" for cell in cells)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 0."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only", default="", help="beginnings of names, separated by commas (all)")
    parser.add_argument("--rows", type=int, default=16_384, help="bytes of text (16384)")
    parser.add_argument("--byte-width", type=int, default=1024, help="D (1024)")
    parser.add_argument("--backbone-width", type=int, default=2048, help="E (2048)")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="torch.compile as well")
    parser.add_argument("--quick", action="store_true", help="256 bytes, narrow, no torch.compile: under a minute")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.rows, arguments.byte_width, arguments.backbone_width, arguments.compile = 256, 256, 512, False
    sizes = Sizes(rows=arguments.rows, byte_width=arguments.byte_width, backbone_width=arguments.backbone_width)
    wanted = tuple(arguments.only.split(","))
    results: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        counting = CountingLibrary(build_counting(Path(folder)))
        library._loaded["cpu"] = counting
        heads = ("floor MiB", "eager", "compile", "fused", "asked", "eager", "compile", "fused")
        print(f"{'bf16, fwd + bwd':20}{'bytes over the floor':>50}{'peak, MiB':>30}")
        print(" " * 20 + "".join(f"{head:>10}" for head in heads))
        for name in CASES:
            if name.startswith(wanted) and name not in NOT_TRAFFIC:
                results[name] = ratios(measure(name, sizes, counting, compiled=arguments.compile))
                print(line(name, results[name]), flush=True)
    summary: dict[str, Any] = dict(results)
    for operator in sorted({name.split()[0] for name in results}):
        own = [found for name, found in results.items() if name.split()[0] == operator]
        summary[operator] = {
            key: max(found[key] for found in own if key in found)
            for key in ("eager_to_floor", "compile_to_floor", "fused_to_floor")
            if any(key in found for found in own)
        }
    print(json.dumps(summary))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
