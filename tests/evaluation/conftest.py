"""A world of one process, shared with the other tests of whole students."""

from __future__ import annotations

from tests.tiny_student import world

__all__ = ["world"]
