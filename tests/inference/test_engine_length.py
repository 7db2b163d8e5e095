"""What a byte takes of the engine does not grow with the text in front of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from megabyte_distill.config.training import KernelMode
from megabyte_distill.inference.engine import Engine
from megabyte_distill.inference.generation import GenerationSettings
from megabyte_distill.inference.sampling import Sampling
from megabyte_distill.model.student import Student
from tests.inference.conftest import HAS_COMPILER

CHUNK = 5
FUSED, REFERENCE = KernelMode.FUSED, KernelMode.REFERENCE

pytestmark = pytest.mark.usefixtures("groups", "step_library_if_any")


class Written(Engine):
    """Writes chunks of five bytes whatever the model says."""

    def pick(self, log_probabilities: Tensor, sampling: Sampling, uniform: Tensor, **where: Any) -> Tensor:
        places = where["places"]
        return torch.from_numpy(places % 100 + 256 * (places % CHUNK == CHUNK - 1))


class NumbersMade(TorchDispatchMode):
    """Counts the numbers in what torch's operators give back."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        self.count += sum(leaf.numel() for leaf in tree_leaves(found) if isinstance(leaf, Tensor))
        return found


@pytest.mark.parametrize("kernels", [FUSED, REFERENCE] if HAS_COMPILER else [REFERENCE])
def test_a_byte_makes_no_more_late_in_a_text_than_early(kernels: KernelMode, student: Student) -> None:
    length, span = 150, 5 * CHUNK
    engine = Written(student, kernels=kernels)
    session = iter(engine.begin(["It was"], GenerationSettings(max_new_bytes=length, sampling=Sampling(temperature=0))))
    made = []
    for _ in range(length):
        with NumbersMade() as numbers:
            next(session)
        made.append(numbers.count)
    assert engine.counts.backbone_passes == length // CHUNK - 1
    # the pair at place p comes of reading the one before, so every fifth is made with the backbone
    for kind in range(CHUNK):
        early, late = (made[begin + kind : begin + span : CHUNK] for begin in (span, length - span))
        if kind or kernels is FUSED:  # torch's attention copies what it looks back on
            assert set(late) == set(early), f"numbers that torch made {kind} bytes behind a chunk's end, late and early"
    assert made[span] != made[span + 1], "chunks do not end where this test says"
