"""``python -m megabyte_distill.kernels``: what is built, for which GPUs, which path each operator takes and why.

``build [cuda|cpu|step]`` compiles: cuda (the default) fails on register spills and prints what every kernel uses;
cpu is the build of the same sources for tests; step is what the engine generates with on this machine's CPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from megabyte_distill import __version__
from megabyte_distill.kernels import build


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; 0, or 1 where something could not be built."""
    parser = argparse.ArgumentParser(prog="python -m megabyte_distill.kernels", description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"megabyte-distill {__version__}")
    commands = parser.add_subparsers(dest="command")
    building = commands.add_parser("build", help="compile the kernels", allow_abbrev=False)
    building.add_argument("target", nargs="?", choices=("cuda", "cpu", "step"), default="cuda")
    building.add_argument("--if-missing", action="store_true", help="not where the library of these sources is there")
    building.add_argument("--arch", nargs="+", default=(), metavar="sm_90a", help="only these (default: all known)")
    arguments = parser.parse_args(argv)
    if arguments.command is None:
        return _report()
    target = arguments.target
    wanted = build.step_library_path() if target == "step" else build.library_path(target)
    if arguments.if_missing and wanted.exists():
        return 0
    try:
        if target == "cuda":
            return _build_cuda(arguments.arch)
        print(build.build_step() if target == "step" else build.build_cpu())
        return 0
    except build.BuildError as error:
        print(error, file=sys.stderr)
        return 1


def usage_table(usages: Sequence[build.KernelUsage]) -> str:
    """A line a kernel: registers on each architecture, and the bytes it spills."""
    architectures = list(dict.fromkeys(usage.architecture for usage in usages))
    lines = [f"{'kernel':56}" + "".join(f"{arch:>9}" for arch in architectures) + "   spilled bytes"]
    for kernel in sorted({usage.kernel for usage in usages}):
        own = {usage.architecture: usage for usage in usages if usage.kernel == kernel}
        cells = "".join(f"{own[arch].registers if arch in own else '-':>9}" for arch in architectures)
        lines.append(f"{kernel:56}{cells}   {max(usage.spilled_bytes for usage in own.values())}")
    return "\n".join(lines)


def _build_cuda(architectures: Sequence[str]) -> int:
    usages = build.build_cuda(architectures=architectures)
    print(f"registers a thread\n{usage_table(usages)}\n{build.library_path('cuda')}")
    spilling = sorted({usage.kernel for usage in usages if usage.spilled_bytes})
    if spilling:
        print(f"these kernels spill registers to memory: {', '.join(spilling)}", file=sys.stderr)
    return 1 if spilling else 0


def _report() -> int:
    import torch

    from megabyte_distill.config.training import KernelMode
    from megabyte_distill.kernels.fused import FUSED_OPS
    from megabyte_distill.kernels.library import load
    from megabyte_distill.kernels.selection import choose

    for kind in ("cuda", "cpu"):
        try:
            print(f"{kind} library: {build.library_path(kind)}, for {' '.join(load(kind).targets)}")
        except ValueError as error:
            print(f"{kind} library: {error}")
    step = build.step_library_path()
    print(f"step library: {step if step.exists() else 'not built; python -m megabyte_distill.kernels build step'}")
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    for mode in KernelMode:
        try:
            choice = choose(mode, device)
        except ValueError as error:
            print(f"{mode.value} on {name}: error: {error}")
            continue
        for op, fused in FUSED_OPS.items():
            path = f"fused: {fused.limits}" if choice.fused else "torch"
            print(f"{mode.value} on {name}: {op}: {path} ({choice.reason})")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
