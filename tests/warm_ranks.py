"""Ranks forked from a process that has imported everything: ``torchrun`` without its start.

A rank spends five seconds of a processor on imports and torchrun one more, which is most of what a small run takes.
Tests of the launch itself call torchrun (``tests.pretrain.job.torchrun``). Ranks of one process share the seed of its
hashes, so that an order of a set is the same on all of them: that ranks agree without it is the golden test's, under
torchrun.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
GRACE_SECONDS = 30.0
"""Between the signal to the ranks that are left and their end, as torchrun's."""
TIMED_OUT = 124


def run_ranks_of(
    *words: str, processes: int = 2, timeout: float = 240, environment: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    """What ``torchrun --nproc-per-node processes words`` does and prints; 124 where it took longer than ``timeout``."""
    with tempfile.TemporaryDirectory() as folder:
        stdout, stderr = Path(folder) / "stdout", Path(folder) / "stderr"
        answer = _server().ask(
            words=words, processes=processes, timeout=timeout, environment=environment,
            stdout=str(stdout), stderr=str(stderr),
        )  # fmt: skip
        return subprocess.CompletedProcess(
            words, answer["code"], stdout.read_text(errors="replace"), stderr.read_text(errors="replace")
        )


class _Server:
    """The process that forks, seen from the one that asks."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "tests.warm_ranks"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True, cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        )  # fmt: skip
        atexit.register(self._process.communicate)

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(f"the process that forks ranks ended with {code}:\n{self._errors.read()[-4000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer


@cache
def _server() -> _Server:
    return _Server()


def _import_everything() -> None:
    from megabyte_distill.parallel import cpu_megatron

    cpu_megatron.apply()
    import megabyte_distill.pretrain.cache_teacher
    import megabyte_distill.pretrain.closing
    import megabyte_distill.pretrain.prepare
    import megabyte_distill.pretrain.run_data
    import megabyte_distill.pretrain.stage_runner  # noqa: F401


def _serve() -> None:
    _import_everything()
    answers = os.fdopen(os.dup(1), "w")  # what a library prints is no answer
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        ranks = []
        for rank in range(request["processes"]):
            if (process := os.fork()) == 0:
                _be_rank(rank, port, request)  # ends this process as a script ends
            ranks.append(process)
        print(json.dumps({"code": _wait(ranks, request["timeout"])}), file=answers, flush=True)


def _be_rank(rank: int, port: int, request: dict[str, Any]) -> None:
    for descriptor, name in ((1, request["stdout"]), (2, request["stderr"])):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    size = str(request["processes"])
    os.environ.clear()
    os.environ.update(request["environment"])
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    # else all ranks go on from the one state of the process that forks
    random.seed(os.urandom(16))
    np.random.seed(int.from_bytes(os.urandom(4), "little"))
    words = list(request["words"])
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = words
            runpy.run_path(words[0], run_name="__main__")
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    sys.exit(0)


def _wait(ranks: list[int], timeout: float) -> int:
    """The first code that is not 0; the ranks left then get SIGTERM and, later, SIGKILL."""
    code, deadline, last_signal = 0, time.monotonic() + timeout, 0
    left = set(ranks)
    while left:
        for rank in tuple(left):
            ended, status = os.waitpid(rank, os.WNOHANG)
            if ended:
                left.discard(rank)
                code = code or os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        if left and (now > deadline or (code and not last_signal)):
            last_signal = signal.SIGKILL if last_signal else signal.SIGTERM
            code = code or TIMED_OUT
            deadline = now + GRACE_SECONDS
            for rank in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(rank, last_signal)
        time.sleep(0.01)
    return code


if __name__ == "__main__":
    _serve()
