"""How a job ends that cannot go on: one message, also where torchrun repeats what went wrong."""

from __future__ import annotations

import json
import os
import sys
import time
import warnings
from pathlib import Path

_NOISE = (
    r"(Transformer Engine and )?Apex (is|are) not installed",
    r"full scope is deprecated",
    r"`load_state_dict` is deprecated",
    r"`save_state_dict` is deprecated",
    r"Please use DTensor instead",
    r"torch\.distributed\.reduce_op is deprecated",
    r"TypedStorage is deprecated",
)
"""Starts of warnings of torch and megatron about themselves, which a user of this job can do nothing about."""


def quiet_known_warnings() -> None:
    """Switch off torch's and megatron's warnings about their own code; everything else is still shown."""
    for start in _NOISE:
        warnings.filterwarnings("ignore", message=start)


def report_failure(message: str, *, rank: int, everywhere: bool = False) -> None:
    """Print an error once: on rank 0, and on another rank only what it alone may know (not ``everywhere``).

    torchrun prints a long report after any failed rank and ends it with what it finds in the rank's error file;
    without one it says that there is no message. So the message goes there as well.
    """
    text = f"error{'' if rank == 0 else f' on rank {rank}'}: {message}"
    if rank == 0 or not everywhere:
        print(text, file=sys.stderr, flush=True)
    error_file = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if error_file:
        path = Path(error_file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"message": text, "timestamp": str(int(time.time()))}), encoding="utf-8")
