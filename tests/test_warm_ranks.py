"""Forked ranks: what a test is told where the process that forks them is gone."""

from __future__ import annotations

import shutil
import sys

import pytest

from tests.warm_ranks import _Server


def test_a_server_that_ended_is_named_with_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    program = shutil.which("cat")  # which knows no -W and says so
    assert program is not None
    monkeypatch.setattr(sys, "executable", program)
    with pytest.raises(RuntimeError, match=r"(?s)forks ranks ended with 1.*cat.*W"):
        _Server().ask(words=(), processes=1)
