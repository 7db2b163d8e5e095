"""Which bytes of a document are trained on, as spans: a few numbers a document, however long its text.

A document's item in PREFIX_KEY_loss_mask.{bin,idx} is start0, end0, start1, end1, … (int32): byte numbers without BOS,
ends exclusive, rising strictly. Number L, behind the last byte, stands for the event "the document ends".
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from megabyte_distill.data.chat_template import MarkedText


def marked_between(spans: NDArray[np.int32], start: int, stop: int) -> NDArray[np.bool_]:
    """[stop − start] True on what the spans mark among the numbers ``start`` … ``stop`` of a document."""
    # an edge at or before a number has been passed; between the first and the second of a pair they are odd
    passed = np.searchsorted(spans, np.arange(start, stop), side="right")
    return np.asarray(passed % 2 == 1)


def marked_count(spans: NDArray[np.int32]) -> int:
    """How many numbers the spans mark."""
    return int(spans[1::2].sum(dtype=np.int64) - spans[::2].sum(dtype=np.int64))


def checked_spans(spans: NDArray[np.int32], num_bytes: int, name: str, document: int) -> NDArray[np.int32]:
    """The spans as they are; ValueError where they do not fit a document of so many bytes of the data set ``name``."""
    if (problem := _problem(spans, num_bytes)) is not None:
        raise ValueError(f"{name}: the loss mask of document {document} is damaged ({problem}); preprocess again")
    return spans


def _problem(spans: NDArray[np.int32], num_bytes: int) -> str | None:
    if spans.size % 2:
        return f"{spans.size} numbers, expected a start and an end for each span"
    if spans.size and (int(spans[0]) < 0 or int(spans[-1]) > num_bytes + 1 or not (np.diff(spans) > 0).all()):
        shown = ", ".join(map(str, spans[:6].tolist())) + (", …" if spans.size > 6 else "")
        return f"spans {shown} do not rise strictly from 0 to {num_bytes + 1}"
    return None


def spans_of(marked: MarkedText, document: str, normalize: Callable[[str], str]) -> NDArray[np.int32] | None:
    """The spans of a dialogue's answers in ``document``, which is its normalised text.

    None where normalisation joins what stands at both sides of an edge, so that no byte lies there.
    """
    edges = [edge for answer in marked.answers for edge in answer]
    heads = [marked.text[:edge] for edge in edges]
    if document != marked.text:
        tails = [normalize(marked.text[edge:]) for edge in edges]
        heads = [normalize(head) for head in heads]
        if any(head + tail != document for head, tail in zip(heads, tails, strict=True)):
            return None
    starts = [0, *(len(head) for head in heads)]
    sizes = [len(document[start:stop].encode()) for start, stop in pairwise(starts)]
    places = np.cumsum(sizes).tolist()
    if marked.ends_with_answer:
        places[-1] += 1
    spans: list[int] = []
    for place in places:  # a template may write an answer of no bytes, or two without a mark between them
        if spans[-1:] == [place]:
            spans.pop()
        else:
            spans.append(place)
    return np.array(spans, dtype=np.int32)
