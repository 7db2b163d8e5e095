"""How processes end: their exit codes, and the words of ``--help`` about them."""

from __future__ import annotations

FAILURE = 1
"""Of training, a build or a check: nothing is wrong with the command."""
MISTAKES = 2
INTERRUPTED = 130
TERMINATED = 143

OF_TRAINING = (
    f"Exit codes: 0 done, or stopped as asked; {FAILURE} training failed; {MISTAKES} mistakes, all told together; "
    f"{INTERRUPTED} after Ctrl-C. Under torchrun {FAILURE} for all but 0."
)


def of_tool(failure: str = "") -> str:
    """Those of a tool. ``failure``: what it may find wanting in what it was given, where it judges anything."""
    failed = f"{FAILURE} {failure}; " if failure else ""
    return (
        f'exit codes: 0 done; {failed}{MISTAKES} mistakes, a line "error: …" on stderr for each; '
        f"{INTERRUPTED} after Ctrl-C; {TERMINATED} after SIGTERM"
    )
