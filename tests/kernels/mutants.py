"""Seeded bugs in the kernel sources, and a check that must notice each; a new operator adds its own to ``MUTANTS``."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from megabyte_distill.config.model import DechunkMode
from megabyte_distill.kernels import build, dispatch, ops
from megabyte_distill.kernels.fused import FUSED_OPS
from megabyte_distill.kernels.library import Library
from tests.kernels import test_fused_byte_embedding as embedding
from tests.kernels import test_fused_dechunk as dechunk
from tests.kernels.comparison import assert_agrees, assert_same_in_any_order, values_and_gradients

Check = Callable[[Library], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mutant:
    """One change of one source file."""

    source: str
    """The .cu that is built; a change in the header is seen through it."""
    file: str
    """The file that is changed."""
    old: str
    new: str
    check: Check


def mutated_sources(mutant: Mutant, folder: Path) -> Path:
    """A copy of what one .cu needs, with the bug in it. AssertionError where the text to change is not there once."""
    folder.mkdir()
    for name in {*(path.name for path in build.SOURCES.glob("*.h")), "library.cu", mutant.source}:
        shutil.copy(build.SOURCES / name, folder / name)
    path = folder / mutant.file
    text = path.read_text(encoding="utf-8")
    assert text.count(mutant.old) == 1, f"{mutant.file} holds {mutant.old!r} {text.count(mutant.old)} times, not once"
    path.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
    return folder


def embedding_agrees(library: Library) -> None:
    """F1 with everything on: values, gradients, and the same in any order."""
    byte_ids, upstream = embedding.few_hot_ids(150), torch.randn(150, 520)
    leaves = embedding.leaves(150, 520, "all", torch.float32)

    def run(*own: torch.Tensor) -> torch.Tensor:
        return ops.byte_embedding(byte_ids, *own, eps=embedding.EPS)

    assert_agrees(run, lambda *own: embedding.definition(byte_ids, *own), leaves, upstream)
    assert_same_in_any_order(library, lambda: values_and_gradients(run, leaves, upstream))


def dechunk_agrees(mode: DechunkMode) -> Check:
    """F4 in a mode: values, gradients, and the same in any order."""

    def check(library: Library) -> None:
        dispatch.install({})  # the case is no business of the library, which holds this one operator
        run, definition, leaves, upstream = dechunk.case("ragged", 520, mode, torch.float32)
        dispatch.install({"dechunk_residual": FUSED_OPS["dechunk_residual"]}, device="cpu", strict=True)
        assert_agrees(run, definition, leaves, upstream)
        assert_same_in_any_order(library, lambda: values_and_gradients(run, leaves, upstream))

    return check


EMBEDDING, DECHUNK = "byte_embedding.cu", "dechunk.cu"
MUTANTS: dict[str, Mutant] = {
    "sums over a block without their barrier": Mutant(
        source=EMBEDDING,
        file="kernel.h",
        old="    __syncthreads();\n    const int warps = int(blockDim.x + 31) >> 5;",
        new="    const int warps = int(blockDim.x + 31) >> 5;",
        check=embedding_agrees,
    ),
    "sums over groups without their barrier": Mutant(
        source=EMBEDDING,
        file="kernel.h",
        old="  __syncthreads();\n  if (threadIdx.y) return;",
        new="  if (threadIdx.y) return;",
        check=embedding_agrees,
    ),
    "a run that begins with a piece in the wrong slot": Mutant(
        source=EMBEDDING,
        file="byte_embedding_sums.h",
        old="parts + (int64_t(blockIdx.x) * 2 + (begins >= first))",
        new="parts + (int64_t(blockIdx.x) * 2 + (begins > first))",
        check=embedding_agrees,
    ),
    "the numbers behind": Mutant(
        source=EMBEDDING,
        file="kernel.h",
        old="    low = __ldg(reinterpret_cast<const float4*>(from)),",
        new="    low = __ldg(reinterpret_cast<const float4*>(from) + 1),",
        check=embedding_agrees,
    ),
    "counts read before all are counted": Mutant(
        source=EMBEDDING,
        file="byte_embedding_order.h",
        old="    if (in_table(id, ids_in_table)) atomicAdd(own + id, 1);\n  }\n  __syncthreads();\n  counts",
        new="    if (in_table(id, ids_in_table)) atomicAdd(own + id, 1);\n  }\n  counts",
        check=embedding_agrees,
    ),
    "scalars of a run read before they are written": Mutant(
        source=DECHUNK,
        file="dechunk_layout.h",
        old="decay[i] = decay_of(at, m, mode);\n    }\n    __syncthreads();",
        new="decay[i] = decay_of(at, m, mode);\n    }",
        check=dechunk_agrees(DechunkMode.CAUSAL),
    ),
    "sums flushed before all warps have added": Mutant(
        source=DECHUNK,
        file="dechunk_backward.h",
        old="    __syncthreads();\n    const int warps = int(blockDim.x) >> 5;",
        new="    const int warps = int(blockDim.x) >> 5;",
        check=dechunk_agrees(DechunkMode.HARD),
    ),
    "sums overwritten while they are flushed": Mutant(
        source=DECHUNK,
        file="dechunk_backward.h",
        old="      to[top - byte] = sum;\n    }\n    __syncthreads();",
        new="      to[top - byte] = sum;\n    }",
        check=dechunk_agrees(DechunkMode.HARD),
    ),
    "a state that is forgotten too soon": Mutant(
        source=DECHUNK,
        file="dechunk_rows.h",
        old="1e-5f : 1e-8f",
        new="1e-5f : 1e-1f",
        check=dechunk_agrees(DechunkMode.CAUSAL),
    ),
    "a block that also takes the chunk in front of its own": Mutant(
        source=DECHUNK,
        file="dechunk_layout.h",
        old="  if (last >= 0) return last + 1;",
        new="  if (last >= 0) return last;",
        check=dechunk_agrees(DechunkMode.HARD),
    ),
    "a warm-up that forgets the decay of the nearest chunk": Mutant(
        source=DECHUNK,
        file="dechunk_forward.h",
        old="((threadIdx.x & 31) ? before : 1.f)",
        new="((threadIdx.x & 31) > 1 ? before : 1.f)",
        check=dechunk_agrees(DechunkMode.CAUSAL),
    ),
    "a byte of a segment without a chunk that reads the one before": Mutant(
        source=DECHUNK,
        file="dechunk_layout.h",
        old="at.chunk_of_byte + end - 1) == m) return end;",
        new="at.chunk_of_byte + end - 1) <= m) return end;",
        check=dechunk_agrees(DechunkMode.OFFICIAL),
    ),
    "a chunk's last byte left out": Mutant(
        source=DECHUNK,
        file="dechunk_forward.h",
        old="      if (t + r >= end) break;",
        new="      if (t + r >= end - 1) break;",
        check=dechunk_agrees(DechunkMode.CAUSAL),
    ),
    "the text's last byte left out": Mutant(
        source=DECHUNK,
        file="dechunk_forward.h",
        old="    if (first + r >= bytes) break;",
        new="    if (first + r >= bytes - 1) break;",
        check=dechunk_agrees(DechunkMode.HARD),
    ),
}
"""What is wrong → the change."""
