"""The engine at the size of SmolLM2-135M: what it writes is what plain generation and one pass over the text say."""

from __future__ import annotations

import pytest
import torch

from benchmarks.generation import make_student, smallest_margin
from megabyte_distill.config.training import KernelMode
from megabyte_distill.inference.engine import Engine
from megabyte_distill.inference.generation import GenerationSettings, generate
from megabyte_distill.inference.sampling import Sampling

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("step_library")]


def test_greedy_bytes_agree_with_margins_that_say_so() -> None:
    torch.manual_seed(0)
    student = make_student("smollm2").requires_grad_(False)
    # logits that say something, and hear the backbone
    torch.nn.init.normal_(student.byte_decoder.head.get_parameter("weight"), std=0.5)
    torch.nn.init.normal_(student.byte_decoder.residual.get_parameter("weight"), std=0.1)
    prompts = [b"It was", b"", "日本".encode()]
    settings = GenerationSettings(max_new_bytes=48, sampling=Sampling(temperature=0))
    expected = generate(student, prompts, settings)
    assert smallest_margin(student, prompts, expected) > 1e-4
    written = [row.byte_ids for row in expected]
    for kernels in (KernelMode.FUSED, KernelMode.REFERENCE):
        for size, speculate in ((3, 0), (1, 4), (2, 16)):
            engine = Engine(student, max_batch_size=size, speculate=speculate, kernels=kernels)
            assert [row.byte_ids for row in engine.generate(prompts, settings)] == written, (kernels, size, speculate)
