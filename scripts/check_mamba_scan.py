#!/usr/bin/env python3
"""The scan by mamba_ssm's kernels against our own, their Triton sources interpreted on a CPU: values and gradients.

    python scripts/check_mamba_scan.py FOLDER...

FOLDERs go on the module path and hold mamba_ssm's Python sources (compiled extensions are not needed: an empty
mamba_ssm/__init__.py and mamba_ssm/ops/__init__.py will do), triton and einops. Exits with 1 where they differ.
"""

from __future__ import annotations

import contextlib
import os
import sys
import types
from pathlib import Path

os.environ.update(TRITON_INTERPRET="1", MAMBA_DETERMINISTIC="1")  # the latter: no autotuning, which needs a GPU
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), *sys.argv[1:]]

import torch  # noqa: E402 - after the environment is set

from megabyte_distill.kernels.fused import mamba_scan  # noqa: E402
from megabyte_distill.kernels.segments import Segments  # noqa: E402
from megabyte_distill.kernels.ssm_scan import ssm_scan  # noqa: E402

LENGTHS = (63, 1, 40, 26)
HEADS, FEATURES, STATE = 2, 16, 16
ALLOWED = 2e-4
"""fp32 sums in another order; the decay rates' gradient is a difference of large sums."""


def main() -> int:
    # what the kernels' launchers ask of a device before they launch
    torch.cuda.device = lambda *_: contextlib.nullcontext()  # type: ignore[assignment,misc]
    torch.cuda.get_device_properties = lambda *_: types.SimpleNamespace(multi_processor_count=8)  # type: ignore[assignment]
    if not mamba_scan.is_usable():
        print(f"mamba_ssm cannot be imported from {sys.argv[1:]}", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    size = sum(LENGTHS)
    values = [
        torch.randn(size, HEADS, FEATURES),
        torch.rand(size, HEADS) * 0.1 + 1e-3,
        -torch.rand(HEADS) * 15 - 1,
        torch.randn(size, STATE) / 2,
        torch.randn(size, STATE) / 2,
    ]
    for value in values:
        value.requires_grad_()
    edges = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()], dtype=torch.int32)
    segments = Segments(edges, size)
    wanted, got = ssm_scan(*values, segments, 64), mamba_scan.mamba_scan(*values, segments, 64)
    upstream = torch.randn_like(wanted)
    pairs = {"y": (wanted, got)}
    theirs, ours = torch.autograd.grad(wanted, values, upstream), torch.autograd.grad(got, values, upstream)
    pairs |= {f"d{name}": pair for name, *pair in zip(("x", "dt", "a", "b", "c"), theirs, ours, strict=True)}  # type: ignore[misc]
    worst = 0.0
    for name, (one, other) in pairs.items():
        error = float((one - other).detach().norm() / one.detach().norm())
        worst = max(worst, error)
        print(f"{name:4} relative error {error:.1e}")
    return 0 if worst <= ALLOWED else 1


if __name__ == "__main__":
    raise SystemExit(main())
