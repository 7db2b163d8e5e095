"""Process groups for the modules that ask for them."""

from __future__ import annotations

from tests.tiny_student import world

__all__ = ["world"]
