"""Chooses once, where a run begins, which path every operator takes, and tells which and why."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megabyte_distill.config.training import KernelMode
from megabyte_distill.kernels import dispatch
from megabyte_distill.kernels.library import load


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """What was put in place."""

    fused: bool
    reason: str
    """Why, as the end of a sentence."""
    scans_fused: bool = False
    """Whether Mamba-2's scan runs in the kernels of mamba_ssm."""

    def __str__(self) -> str:
        scan = ", Mamba-2's scan by mamba_ssm" if self.scans_fused else ""
        return f"{'fused' if self.fused else 'torch reference'} ({self.reason}){scan}"


def choose(mode: KernelMode, device: torch.device) -> Choice:
    """Put the fused operators in place for tensors on ``device``, or none of them.

    ``auto`` takes them on a GPU whose library is built and loads, and torch's everywhere else; ``fused`` on a CPU runs
    the same sources built for tests.

    Raises:
        ValueError: for ``fused`` where the library is missing or does not fit; it says what to do.
    """
    dispatch.install({})
    if mode is KernelMode.REFERENCE:
        return Choice(fused=False, reason="--kernels reference")
    if mode is KernelMode.AUTO and device.type != "cuda":
        return Choice(fused=False, reason=f"--kernels auto takes torch's operators on {device.type}")
    scan = scan_kernels(device)
    try:
        library = load(device.type)
        if device.type == "cuda" and (
            problem := gpu_refusal(library.targets, torch.cuda.get_device_capability(device))
        ):
            raise ValueError(problem)
    except ValueError as error:
        if mode is KernelMode.FUSED:
            raise ValueError(f"--kernels fused: {error}; or use --kernels auto or reference") from error
        dispatch.install(scan, device=device.type)
        return Choice(fused=False, reason=str(error), scans_fused=bool(scan))
    from megabyte_distill.kernels.fused import FUSED_OPS  # registers torch ops, which a run without them need not have

    dispatch.install({**FUSED_OPS, **scan}, device=device.type, strict=mode is KernelMode.FUSED)
    reason = f"--kernels {mode.value}, {device.type}, built for {' '.join(library.targets)}"
    return Choice(fused=True, reason=reason, scans_fused=bool(scan))


def scan_kernels(device: torch.device) -> dict[str, dispatch.FusedOp]:
    """Mamba-2's scan from the package mamba_ssm, on a GPU where that is usable; it needs no library of ours."""
    from megabyte_distill.kernels.fused import mamba_scan

    return {"ssm_scan": mamba_scan.FUSED} if device.type == "cuda" and mamba_scan.is_usable() else {}


def gpu_refusal(targets: tuple[str, ...], capability: tuple[int, int]) -> str | None:
    """Why a library for these architectures does not run on a GPU of this compute capability, or None."""
    major, minor = capability
    built = [target.removeprefix("sm_") for target in targets]
    same = [code for code in built if (code.endswith("a") and code[:-1] == f"{major}{minor}")]
    older = [code for code in built if code.isdigit() and int(code) <= 10 * major + minor]
    if same or (older and ("80" in built or any(int(code) // 10 == major for code in older))):
        return None
    return f"got a GPU of compute capability {major}.{minor}, expected one of {', '.join(targets)}"
