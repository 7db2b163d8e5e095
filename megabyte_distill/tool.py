"""How every tool in tools/ ends: exit code 0, or 2 with one line that begins with "error:" and no traceback.

Ctrl-C and SIGTERM let it clean up what is half written and end it with 130 and 143.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from types import FrameType

EXIT_ERROR, EXIT_INTERRUPTED, EXIT_TERMINATED = 2, 130, 143


def run_tool(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None], argv: Sequence[str] | None = None
) -> int:
    """Parse the command line, run, and return the exit code; ValueError and OSError are the user's to mend."""
    for category in (UserWarning, FutureWarning, DeprecationWarning):  # of megatron and torch among themselves
        warnings.filterwarnings("ignore", category=category)
    arguments = parser.parse_args(argv)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminate)
    try:
        run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


def _terminate(number: int, frame: FrameType | None) -> None:
    raise SystemExit(EXIT_TERMINATED)
