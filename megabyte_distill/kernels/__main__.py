"""``python -m megabyte_distill.kernels``: what is built, for which GPUs, which path each operator takes and why.

``build [cuda|cpu|step]`` compiles: cuda (the default) fails on register spills and prints what every kernel uses;
cpu is the build of the same sources for tests; step is what the engine generates with on this machine's CPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

from megabyte_distill.kernels import build
from megabyte_distill.tool import Failure, ToolParser, run_tool

_FAILURE = "something could not be built, or a kernel spills registers"


def build_parser() -> ToolParser:
    """The command line."""
    parser = ToolParser(prog="python -m megabyte_distill.kernels", description=__doc__, failure=_FAILURE)
    commands = parser.add_subparsers(dest="command", title="commands", metavar="{build}")
    text = "compile the kernels; without a command, what is there is reported"
    building = commands.add_parser("build", help=text, description="Compiles the kernels.", failure=_FAILURE)
    building.add_argument(
        "target", nargs="?", choices=("cuda", "cpu", "step"), default="cuda", help="which library (cuda)"
    )
    options = building.add_argument_group("build")
    options.add_argument("--if-missing", action="store_true", help="not where the library of these sources is there")
    options.add_argument(
        "--arch", nargs="+", default=[], metavar="SM", help="cuda for these GPUs alone, as sm_90a (all that nvcc knows)"
    )
    return parser


def check(arguments: argparse.Namespace) -> Iterator[str]:
    """What is wrong with the flags together."""
    if arguments.command == "build" and arguments.arch and arguments.target != "cuda":
        yield f"--arch: is about GPUs, and {arguments.target} is built for this machine's CPU; leave it out"


def run(arguments: argparse.Namespace) -> None:
    """Reports, or builds; Failure where something could not be built."""
    if arguments.command is None:
        _report()
        return
    target = arguments.target
    wanted = build.step_library_path() if target == "step" else build.library_path(target)
    if arguments.if_missing and wanted.exists():
        return
    try:
        if target == "cuda":
            _build_cuda(arguments.arch)
        else:
            print(build.build_step() if target == "step" else build.build_cpu())
    except build.BuildError as error:
        raise Failure(str(error)) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_tool(build_parser(), run, argv, check=check)


def usage_table(usages: Sequence[build.KernelUsage]) -> str:
    """A line a kernel: registers on each architecture, and the bytes it spills."""
    architectures = list(dict.fromkeys(usage.architecture for usage in usages))
    lines = [f"{'kernel':56}" + "".join(f"{arch:>9}" for arch in architectures) + "   spilled bytes"]
    for kernel in sorted({usage.kernel for usage in usages}):
        own = {usage.architecture: usage for usage in usages if usage.kernel == kernel}
        cells = "".join(f"{own[arch].registers if arch in own else '-':>9}" for arch in architectures)
        lines.append(f"{kernel:56}{cells}   {max(usage.spilled_bytes for usage in own.values())}")
    return "\n".join(lines)


def _build_cuda(architectures: Sequence[str]) -> None:
    usages = build.build_cuda(architectures=architectures)
    print(f"registers a thread\n{usage_table(usages)}\n{build.library_path('cuda')}")
    spilling = sorted({usage.kernel for usage in usages if usage.spilled_bytes})
    if spilling:
        raise Failure(f"these kernels spill registers to memory: {', '.join(spilling)}")


def _report() -> None:
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


if __name__ == "__main__":
    raise SystemExit(main())
