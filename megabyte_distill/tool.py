"""How every tool in tools/ ends: exit code 0, or 2 with one line that begins with "error:" and no traceback."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Sequence

EXIT_ERROR = 2


def run_tool(
    parser: argparse.ArgumentParser, run: Callable[[argparse.Namespace], None], argv: Sequence[str] | None = None
) -> int:
    """Parse the command line, run, and return the exit code; ValueError and OSError are the user's to mend."""
    for category in (UserWarning, FutureWarning, DeprecationWarning):  # of megatron and torch among themselves
        warnings.filterwarnings("ignore", category=category)
    arguments = parser.parse_args(argv)
    try:
        run(arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_ERROR
    return 0
