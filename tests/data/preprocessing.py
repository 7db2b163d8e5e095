"""Preprocessing with all its settings as keywords, for tests that vary one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from megabyte_distill.data import preprocess as module
from megabyte_distill.data.encoding import EncodeJob
from megabyte_distill.data.preprocess import PreprocessOptions
from megabyte_distill.data.preprocess_summary import PreprocessSummary

_OF_JOB = {field.name for field in fields(EncodeJob)}


def preprocess(inputs: Sequence[str | Path], *, output_prefix: str | Path, **settings: Any) -> PreprocessSummary:
    """Fields of EncodeJob and of PreprocessOptions by name."""
    job = {name: value for name, value in settings.items() if name in _OF_JOB}
    if "tokenizer_model" in job:
        job["tokenizer_model"] = str(job["tokenizer_model"])
    if "json_keys" in job:
        job["json_keys"] = tuple(job["json_keys"])
    options = {name: value for name, value in settings.items() if name not in _OF_JOB}
    return module.preprocess(
        inputs, output_prefix=output_prefix, job=EncodeJob(**job), options=PreprocessOptions(**options)
    )
