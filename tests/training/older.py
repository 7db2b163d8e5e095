"""A checkpoint as a version wrote it that listed no files."""

from __future__ import annotations

import json
from pathlib import Path

from megabyte_distill.training.checkpoint import STATE_FILE
from megabyte_distill.training.manifest import MANIFEST_FILE


def without_manifest(checkpoint: Path) -> Path:
    """The same folder, made one of an earlier version."""
    (checkpoint / MANIFEST_FILE).unlink()
    state = json.loads((checkpoint / STATE_FILE).read_text())
    del state["files are listed"]
    (checkpoint / STATE_FILE).write_text(json.dumps(state))
    return checkpoint
