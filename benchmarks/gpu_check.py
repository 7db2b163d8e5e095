"""Everything that needs a GPU in one go of a few minutes: are the fused kernels right and fast, does training run.

    bash benchmarks/gpu_check.sh [--only ops,timing,step,curriculum,fp8] [--operators F1,F4] [--minutes 6] [--quick]

Prints as it goes; a section that fails or runs out of time does not stop the others. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # asked for by deterministic mode
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from kernel_cases import CASES, UNTIMED, Case, MakeCase, Sizes  # noqa: E402
from torch import Tensor  # noqa: E402

from megabyte_distill.config.training import KernelMode  # noqa: E402
from megabyte_distill.kernels.selection import choose  # noqa: E402

SIZES = (
    Sizes(rows=1000, byte_width=264, backbone_width=1024),
    Sizes(rows=5003, byte_width=1024, backbone_width=4104),
    Sizes(rows=20_000, byte_width=1536, backbone_width=2048),
)
FP32_TOLERANCE = 1e-5
BF16_VALUES, BF16_GRADIENTS, BF16_FLOOR = 2.0, 3.0, 2.0**-9
"""As in tests/kernels/comparison.py: against the error of torch's own operators in the same dtype."""
REPEATS = 20
SLEEP_CYCLES = 5_000_000
"""About 3 ms in which the host queues a whole forward and backward pass, so that its own time is not measured."""
_SPEED = re.compile(r"stage (\w+) iteration +\d+/ *\d+ .*?bytes/s: (\d+)")


def cases_named(operators: str) -> dict[str, MakeCase]:
    """Those whose names begin with one of the words, which commas separate; ValueError where a word begins none."""
    words = operators.split(",")
    cases = CASES | UNTIMED
    unknown = [word for word in words if not any(name.startswith(word) for name in cases)]
    if unknown:
        raise ValueError(f"--operators: got {', '.join(unknown)}, expected beginnings of {', '.join(cases)}")
    return {name: make for name, make in cases.items() if name.startswith(tuple(words))}


class Check:
    """What is to be looked at, and what is left of the time for all of it."""

    def __init__(self, minutes: float, cases: Mapping[str, MakeCase]) -> None:
        self._end = time.monotonic() + 60 * minutes
        self.cases = cases

    def left(self) -> float:
        """Seconds, at least 1."""
        return max(1.0, self._end - time.monotonic())


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh tensors are NaN inside, so that a number nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def values_and_gradients(case: Case, leaves: Sequence[Tensor] | None = None) -> list[Tensor]:
    """[result, a gradient for every leaf (zeros where there is none)]."""
    own = list(case.leaves if leaves is None else leaves)
    result = case.run(*own)
    grads = torch.autograd.grad(result, own, case.upstream.to(result.dtype), allow_unused=True)
    return [result.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(own, grads, strict=True))]


def norm(x: Tensor) -> float:
    return float(x.double().norm())


def wrong_in(case: Case, device: torch.device) -> list[str]:
    """What differs between the fused operator and fp64, beyond what torch's own operators in this dtype do."""
    low = case.leaves[0].dtype is torch.bfloat16
    choose(KernelMode.FUSED, device)
    with poisoned_memory():
        got = values_and_gradients(case)
        again = values_and_gradients(case)
    choose(KernelMode.REFERENCE, device)
    naive = values_and_gradients(case)
    truth = values_and_gradients(case, [leaf.detach().double().requires_grad_() for leaf in case.leaves])
    problems = []
    for place, (mine, second, other, exact) in enumerate(zip(got, again, naive, truth, strict=True)):
        what = f"gradient {place - 1}" if place else "result"
        error, size = norm(mine.double() - exact), norm(exact)
        factor = (BF16_GRADIENTS if place else BF16_VALUES) if low else 1.0
        allowed = factor * norm(other.double() - exact) + (BF16_FLOOR if low else FP32_TOLERANCE) * size
        if not error <= allowed:
            problems.append(f"{what}: error {error:.3g} of {size:.3g}, allowed {allowed:.3g}")
        if not torch.equal(mine, second):
            problems.append(f"{what}: two runs differ")
    return problems


def check_ops(device: torch.device, check: Check) -> dict[str, Any]:
    """Every operator, fp32 and bf16, ragged sizes and the full one, fresh random inputs."""
    seed = int(time.time())
    torch.manual_seed(seed)
    print(f"seed {seed}")
    results: dict[str, Any] = {}
    for name, make in check.cases.items():
        problems = []
        for dtype in (torch.float32, torch.bfloat16):
            for sizes in (*SIZES, Sizes()):
                try:
                    found = wrong_in(make(sizes, dtype, device), device)
                except Exception as error:  # the next operator must still be checked
                    traceback.print_exc()
                    found = [f"{type(error).__name__}: {error}"]
                problems += [f"{str(dtype).removeprefix('torch.')}, {sizes.rows} rows: {text}" for text in found]
        print(
            f"{name:20} {'right' if not problems else 'WRONG'}",
            *problems,
            sep="\n    " if problems else " ",
            flush=True,
        )
        results[name] = problems or "right"
    return results


class Time(NamedTuple):
    """Of one call, medians in milliseconds."""

    device: float
    """Between events on the device, everything queued beforehand."""
    host: float
    """Until the call had been queued."""


def median_time(run: Callable[[int], object]) -> Time:
    """Of run(i), i counting up so that inputs can rotate."""
    device, host = [], []
    for i in range(3):
        run(i)
    for i in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(SLEEP_CYCLES)
        start.record()
        before = time.perf_counter()
        run(i)
        host.append(1e3 * (time.perf_counter() - before))
        end.record()
        torch.cuda.synchronize()
        device.append(start.elapsed_time(end))
    return Time(sorted(device)[REPEATS // 2], sorted(host)[REPEATS // 2])


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """The median of the device's time; without a GPU that of three calls."""
    if device.type == "cuda":
        return median_time(lambda _: run()).device
    times = []
    for _ in range(3):
        started = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - started))
    return sorted(times)[1]


def copy_rate(device: torch.device) -> float:
    """Bytes a second of a large copy, read and written ones."""
    source = torch.randn(2**28, device=device)
    target = torch.empty_like(source)
    time_of_copy = median_time(lambda _: target.copy_(source))
    return 2 * source.numel() * source.element_size() / time_of_copy.device * 1e3


def timed(cases: Sequence[Case], compiled: bool) -> tuple[Time, Time]:
    """(forward, forward and backward) of whatever path is in place; inputs rotate over ``cases``."""
    runs = [torch.compile(case.run, fullgraph=False, dynamic=False) if compiled else case.run for case in cases]

    def forward(i: int) -> Tensor:
        place = i % len(cases)
        return runs[place](*cases[place].leaves)  # type: ignore[no-any-return]

    def both(i: int) -> object:
        case = cases[i % len(cases)]
        return torch.autograd.grad(forward(i), case.leaves, case.upstream, allow_unused=True)

    with torch.no_grad():
        forward_time = median_time(forward)
    return forward_time, median_time(both)


def time_ops(device: torch.device, check: Check) -> dict[str, Any]:
    """Every operator in bf16 at full size: eager, torch.compile, fused, and the least time its bytes need."""
    rate = copy_rate(device)
    print(f"copy rate {rate / 1e12:.2f} TB/s (bytes read and written); host: what it takes to queue the fused operator")
    header = "".join(f"{name:>9}" for name in ("floor ms", "eager", "compile", "fused"))
    print(f"{'operator, bf16':28}{header}{'of copy rate':>14}{'vs compile':>12}{'host':>9}")
    results: dict[str, Any] = {"copy_rate": rate}
    for name, make in check.cases.items():
        if name in UNTIMED:
            continue
        try:
            cases = [make(Sizes(), torch.bfloat16, device) for _ in range(2)]
            results[name] = time_one(name, cases, rate, device, check)
        except Exception as error:
            traceback.print_exc()
            results[name] = f"{type(error).__name__}: {error}"
    return results


def time_one(name: str, cases: Sequence[Case], rate: float, device: torch.device, check: Check) -> dict[str, Any]:
    times: dict[str, tuple[Time, Time]] = {}
    choose(KernelMode.FUSED, device)
    times["fused"] = timed(cases, compiled=False)
    choose(KernelMode.REFERENCE, device)
    times["eager"] = timed(cases, compiled=False)
    if check.left() > 60:
        torch._dynamo.reset()
        try:
            times["compile"] = timed(cases[:1], compiled=True)
        except Exception as error:
            print(f"    torch.compile: {type(error).__name__}: {str(error)[:300]}")
    case = cases[0]
    floors = (case.forward_floor / rate * 1e3, (case.forward_floor + case.backward_floor) / rate * 1e3)
    for place, what in enumerate(("forward", "fwd+bwd")):
        cells = "".join(
            f"{times[k][place].device:9.3f}" if k in times else f"{'-':>9}" for k in ("eager", "compile", "fused")
        )
        fused, host = times["fused"][place]
        gain = f"{times['compile'][place].device / fused:11.2f}x" if "compile" in times else f"{'-':>12}"
        print(
            f"{name:20}{what:8}{floors[place]:9.3f}{cells}{floors[place] / fused:13.0%} {gain}{host:9.3f}", flush=True
        )
    return {"floor_ms": floors, **times}


def time_step(device: torch.device, check: Check) -> dict[str, Any]:
    """Updates at a published model's shape, fused and reference (benchmarks/gpu_training.py)."""
    return benchmark_of_its_own("gpu_training.py", check)


def benchmark_of_its_own(name: str, check: Check) -> dict[str, Any]:
    """What another benchmark printed, and found."""
    output, code = run_limited([sys.executable, f"benchmarks/{name}"], check.left())
    lines = output.strip().splitlines() or [""]
    if code:
        print(f"exit code {code}", *lines[-40:], sep="\n  ", flush=True)
        return {name: {"exit_code": code}}
    print(*lines[:-1], sep="\n", flush=True)
    return {name: json.loads(lines[-1])}


def check_curriculum(device: torch.device, check: Check) -> dict[str, Any]:
    """The whole curriculum on the embedded example in bf16, a few updates a stage, with the fused kernels."""
    results: dict[str, Any] = {}
    for kernels in ("fused", "reference"):
        with tempfile.TemporaryDirectory() as folder:
            command = [
                *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "1"),
                *("examples/pretrain_byte_kd.sh", "--smoke", "--bf16", "--kernels", kernels, "--save", f"{folder}/run"),
            ]
            started = time.monotonic()
            output, code = run_limited(command, min(150.0, check.left()))
            seconds = time.monotonic() - started
            lines = output.splitlines()
            shown = lines if code else [line for line in lines if "iteration" in line or "kernels:" in line][-12:]
            print(f"--kernels {kernels}: exit code {code} in {seconds:.0f} s", *shown[-60:], sep="\n  ", flush=True)
            results[kernels] = {"exit_code": code, "seconds": seconds, "bytes_per_second": speeds(output)}
    return results


def run_limited(command: Sequence[str], seconds: float) -> tuple[str, int]:
    """(what a command printed, its exit code) after at most so many seconds; 124 where it was stopped."""
    # the example's process group needs no network beyond this machine
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ) as job:
        try:
            return job.communicate(timeout=seconds)[0], job.returncode
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)  # torchrun's ranks too, which would keep the GPU
            return job.communicate()[0], 124


def speeds(output: str) -> dict[str, float]:
    """Last bytes/s of each stage in a log."""
    return {stage: float(value) for stage, value in _SPEED.findall(output)}


def time_backbone(device: torch.device, check: Check) -> dict[str, Any]:
    """Layers of a backbone by megatron-core, Transformer Engine and FP8 (benchmarks/backbone_speed.py)."""
    return benchmark_of_its_own("backbone_speed.py", check)


SECTIONS: dict[str, Callable[[torch.device, Check], dict[str, Any]]] = {
    "ops": check_ops,
    "timing": time_ops,
    "step": time_step,
    "curriculum": check_curriculum,
    "fp8": time_backbone,
}
"""In this order: what must be right before what is nice to know."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections asked for; 0 where all of them ran and nothing was wrong."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas (all)")
    parser.add_argument("--minutes", type=float, default=6.0, help="time for everything together (6)")
    parser.add_argument("--operators", default="", help="F1,F4: only those whose names begin so (all)")
    parser.add_argument("--quick", action="store_true", help="whether every operator is right, under a minute")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.only = "ops"
    try:
        cases = cases_named(arguments.operators)
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        print("no GPU is visible here: nothing to check", file=sys.stderr)
        return 2
    check, device = Check(arguments.minutes, cases), torch.device("cuda", torch.cuda.current_device())
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(device), "torch": torch.__version__}
    print(f"{results['gpu']}, torch {torch.__version__}, kernels: {choose(KernelMode.AUTO, device)}", flush=True)
    failed = []
    for name in arguments.only.split(","):
        print(f"\n== {name} ({check.left():.0f} s left)", flush=True)
        try:
            results[name] = SECTIONS[name](device, check)
        except Exception as error:  # the other sections must still run
            traceback.print_exc()
            results[name] = f"{type(error).__name__}: {error}"
            failed.append(name)
    failed += [f"{section}: {name}" for section in SECTIONS for name in broken_in(results.get(section))]
    if failed:
        print(f"failed: {', '.join(failed)}")
    print(json.dumps(results))
    return 1 if failed else 0


def broken_in(found: object) -> list[str]:
    """What did not go well in a section's results: an error's text, a list of problems, an exit code that is not 0."""
    parts = found.items() if isinstance(found, dict) else ()
    return [
        name
        for name, value in parts
        if (isinstance(value, str | list) and value != "right") or (isinstance(value, dict) and value.get("exit_code"))
    ]


if __name__ == "__main__":
    raise SystemExit(main())
