#!/usr/bin/env python3
"""What the exact byte targets cost once the teacher's logits are there, as a share of a training step.

    python benchmarks/exact_targets.py             # the published models, and updates on this CPU
    python benchmarks/exact_targets.py --quick     # one published model, shorter rows: under a minute

Published shapes: a micro-batch of 2a and of 2b is run forward and backward without memory (meta tensors); its text is
drawn from a made-up vocabulary of the model's size whose prefixes branch like a real one's. Every operation counts the
longer of its FLOPs at the card's matrix rate and its bytes at its copy rate (those measured in docs/gpu.md unless
given): targets, teacher and its head, and all of the step. The optimizer's update is left out, the byte side's
operators are taken as torch's where they are not fused; ``share_of_products`` is the stricter share, of a step
that does nothing but matrix products at the full rate.

Small shapes: updates really run on this CPU; the same parts by the clock. The last line is one JSON object;
``share_of_step`` is the largest among published shapes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
warnings.simplefilter("ignore")

from megabyte_distill.config import Settings, parse_arguments  # noqa: E402 - after the path is set
from megabyte_distill.config.model import BackboneConfig  # noqa: E402
from megabyte_distill.config.published import PUBLISHED_BACKBONES  # noqa: E402
from megabyte_distill.conversion.model_config import ModelConfig  # noqa: E402
from megabyte_distill.curriculum import byte_sft  # noqa: E402
from megabyte_distill.curriculum.stages import STAGES  # noqa: E402
from megabyte_distill.data.mock import worded_table  # noqa: E402
from megabyte_distill.data.packing import PackedRow, Segment, pack_row  # noqa: E402
from megabyte_distill.data.token_bytes import TokenBytes  # noqa: E402
from megabyte_distill.memory.estimate import measured  # noqa: E402
from megabyte_distill.memory.pretended import (  # noqa: E402
    WithoutValues,
    fused_attention,
    pretended_world,
    weightless,
)
from megabyte_distill.model.backbone import Backbone, transformer_config  # noqa: E402
from megabyte_distill.model.student import Student, set_trainable  # noqa: E402
from megabyte_distill.parallel.cpu_memory import keep_large_buffers  # noqa: E402
from megabyte_distill.parallel.process_groups import world  # noqa: E402
from megabyte_distill.runs import backbone_overrides, build_student, training_dtype  # noqa: E402
from megabyte_distill.training.throughput import FlopCount  # noqa: E402

PRESETS = ("llama3.2-3b", "qwen3-4b", "olmo2-1b")
STAGE_NAMES = ("2a", "2b")
MATMUL_RATE, COPY_RATE = 760e12, 4.27e12
"""FLOP/s of an 8192³ bf16 product and bytes/s read and written, measured on an H200 (the copy before docs/gpu.md's)."""
BYTES_PER_TOKEN = 4.4
TARGETS, HEAD, TEACHER, OTHER = "targets", "head", "teacher", "student"

_aten = torch.ops.aten
_READS_WHAT_IT_TAKES = {
    _aten.index.Tensor,
    _aten.index_select.default,
    _aten.gather.default,
    _aten.embedding.default,
    _aten.searchsorted.Tensor,
}
_FREE = {_aten.detach, _aten.alias, _aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty}


class Parts:
    """Which part of a step is running; a part may lie inside another."""

    def __init__(self) -> None:
        self.now = OTHER

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        before, self.now = self.now, name
        try:
            yield
        finally:
            self.now = before

    @contextmanager
    def watching(self, teacher: Backbone) -> Iterator[None]:
        """Tells the teacher's forward, its head and the targets apart while byte_sft runs."""
        real, forward, head = byte_sft.exact_targets, teacher.forward, teacher.own_logits

        def within(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                with self.inside(name):
                    return run(*args, **kwargs)

            return wrapped

        with (
            mock.patch.object(byte_sft, "exact_targets", within(TARGETS, real)),
            mock.patch.object(teacher, "forward", within(TEACHER, forward)),
            mock.patch.object(teacher, "own_logits", within(HEAD, head)),
        ):
            yield


class Roofline(TorchDispatchMode):
    """Adds up, by part: FLOPs of products, bytes touched, and the longer of their times for each operation."""

    def __init__(self, parts: Parts, matmul_rate: float, copy_rate: float) -> None:
        super().__init__()
        self._parts, self._matmul_rate, self._copy_rate = parts, matmul_rate, copy_rate
        self.seconds: dict[str, float] = defaultdict(float)
        self.bytes: dict[str, float] = defaultdict(float)
        self.flops: dict[str, float] = defaultdict(float)
        self._count = FlopCount()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self._count.flops
        result = self._count.__torch_dispatch__(func, types, args, kwargs)
        flops, touched = self._count.flops - before, _bytes_touched(func, args, kwargs or {}, result)
        part = self._parts.now
        self.flops[part] += flops
        self.bytes[part] += touched
        self.seconds[part] += max(flops / self._matmul_rate, touched / self._copy_rate)
        return result


def _bytes_touched(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    packet = func._overloadpacket
    made = [value for value in tree_iter(result) if isinstance(value, Tensor)]
    given = [value for value in tree_iter((args, kwargs)) if isinstance(value, Tensor)]
    if packet in _FREE or not made or func.is_view:
        return 0
    if func in _READS_WHAT_IT_TAKES:
        given = [*made, *given[1:]]  # so many elements of the first
    elif packet in (_aten.index_put_, _aten._index_put_impl_):
        given, made = given[1:], given[-1:]
    touched = sum(tensor.nbytes for tensor in (*given, *made))
    wanted = kwargs.get("dtype")
    if packet in (_aten.sum, _aten.cumsum) and wanted is not None and given[0].dtype != wanted:
        touched += 2 * given[0].numel() * wanted.itemsize  # torch copies to the other dtype first
    return touched


def drawn_row(table: TokenBytes, seq_length: int, bucket: int, seed: int = 0) -> PackedRow:
    """One document of tokens of about 4.4 bytes: the shorter a token, the likelier."""
    lengths = table.lengths.astype(np.int64)
    ids = np.flatnonzero(lengths)
    by_length = np.bincount(lengths[ids], minlength=40)[lengths[ids]]
    weight = np.exp(-lengths[ids] / (BYTES_PER_TOKEN - 1)) / by_length
    tokens = np.random.default_rng(seed).choice(ids, size=seq_length, p=weight / weight.sum())
    tokens = tokens[: int(np.searchsorted(np.cumsum(lengths[tokens]), seq_length - 1, side="right"))]
    segment = Segment(
        document=0,
        byte_ids=table.concatenate(tokens),
        tokens=tokens,
        token_lengths=lengths[tokens],
        next_byte=None,
        next_token=None,
        next_token_length=None,
    )
    return pack_row(
        [segment], row_bytes=seq_length, chunk_bucket=bucket, start_id=table.start_id,
        end_of_text_id=table.end_of_text_id,
    )  # fmt: skip


def build(settings: Settings, backbone: BackboneConfig, stage: str) -> tuple[Student, Backbone]:
    """Student and its frozen teacher as a stage has them; on the device where modules are made."""
    config = settings.stages[stage]
    overrides = {**backbone_overrides(settings, config), "perform_initialization": False}
    byte_side = settings.model.byte_side_for(backbone.hidden_size)
    dtype = training_dtype(settings)
    student = build_student(ModelConfig(backbone=backbone, byte_side=byte_side), overrides=overrides).to(dtype)
    set_trainable(student, STAGES[stage].trains(config, backbone))
    teacher = Backbone(backbone, transformer_config(backbone, **overrides)).to(dtype)
    return student.train(), teacher.requires_grad_(False).eval()


def at_published_shape(
    preset: str, stage: str, seq_length: int, table: TokenBytes, rates: tuple[float, float]
) -> dict[str, Any]:
    """Microseconds a byte of text by part, and the shares."""
    words = ["--mock-data", "--preset", preset, "--stages", stage, "--byte-targets", "exact"]
    words += ["--2a.exact-targets-from", "teacher"]
    words += ["--seq-length", str(seq_length), "--micro-batch-size", "1"]
    settings, backbone = parse_arguments(words), PUBLISHED_BACKBONES[preset]
    config = settings.stages[stage]
    row = drawn_row(table, seq_length, config.chunk_bucket)
    parts = Parts()
    with pretended_world():
        with weightless():
            student, teacher = build(settings, backbone, stage)
        with WithoutValues(), fused_attention():
            objective = STAGES[stage].objective(config, teacher, table)
            with parts.watching(teacher), Roofline(parts, *rates) as counted:
                measured(student, objective, row)
    size = int(row.is_real.sum())
    total, products = sum(counted.seconds.values()), sum(counted.flops.values()) / rates[0]
    own = counted.seconds[TARGETS]
    return {
        "preset": preset,
        "stage": stage,
        "bytes_per_token": size / int(row.token_mask.sum()),
        "microseconds_per_byte": {name: 1e6 * value / size for name, value in counted.seconds.items()},
        "gigaflops_per_byte": {name: value / size / 1e9 for name, value in counted.flops.items()},
        "kilobytes_per_byte": {name: value / size / 1e3 for name, value in counted.bytes.items()},
        "share_of_step": own / total,
        "share_of_products": own / (own + products),
    }


class Clock(Parts):
    """Parts by the clock; what runs inside another part counts for itself alone."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: dict[str, float] = defaultdict(float)
        self._since = time.perf_counter()

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        self.switch()
        with super().inside(name):
            yield
            self.switch()

    def switch(self) -> None:
        now = time.perf_counter()
        self.seconds[self.now] += now - self._since
        self._since = now


def on_this_cpu(vocab_size: int, seq_length: int, updates: int) -> dict[str, Any]:
    """2a at the tiny preset's widths around a small teacher with a vocabulary of that size."""
    backbone = BackboneConfig(
        family="llama", num_layers=4, hidden_size=192, ffn_hidden_size=512, num_attention_heads=6, num_query_groups=2,
        head_dim=32, vocab_size=vocab_size, norm_eps=1e-5, rope_theta=1e4,
    )  # fmt: skip
    words = ["--mock-data", "--stages", "2a", "--byte-targets", "exact", "--exact-targets-from", "teacher"]
    words += ["--seq-length", str(seq_length)]
    settings = parse_arguments(words)
    table = worded_table(vocab_size)
    rows = [drawn_row(table, seq_length, 64, seed) for seed in range(updates + 1)]
    found: dict[str, list[float]] = defaultdict(list)
    with world():
        student, teacher = build(settings, backbone, "2a")
        for parameter in (*student.parameters(), *teacher.parameters()):
            nn.init.normal_(parameter, std=0.05)
        objective = STAGES["2a"].objective(settings.stages["2a"], teacher, table)
        for row in rows:
            clock = Clock()
            with clock.watching(teacher):
                torch.stack([*objective.losses(student, row).values()]).sum().backward()
            clock.switch()
            for name, seconds in clock.seconds.items():
                found[name].append(1e6 * seconds / int(row.is_real.sum()))
    middle = {name: statistics.median(values[1:]) for name, values in found.items()}
    return {
        "vocab_size": vocab_size,
        "microseconds_per_byte": middle,
        "share_of_step": middle[TARGETS] / sum(middle.values()),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Print both tables and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="one published model, short rows, few updates")
    parser.add_argument("--matmul-rate", type=float, default=MATMUL_RATE, help="FLOP/s of the card (7.6e14)")
    parser.add_argument("--copy-rate", type=float, default=COPY_RATE, help="bytes/s of the card (4.27e12)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    keep_large_buffers()
    rates = (arguments.matmul_rate, arguments.copy_rate)
    seq_length, presets = (2048, PRESETS[-1:]) if arguments.quick else (8192, PRESETS)
    card = f"{rates[0] / 1e12:.0f} TFLOP/s and {rates[1] / 1e12:.2f} TB/s"
    print(f"microseconds a byte of text at {card}; rows of {seq_length} bytes")
    names = (TARGETS, HEAD, TEACHER, OTHER)
    print(f"{'':16}" + "".join(f"{name:>10}" for name in names) + "   share of the step   of its products alone")
    published = []
    for preset in presets:
        table = worded_table(PUBLISHED_BACKBONES[preset].vocab_size)
        for stage in STAGE_NAMES:
            entry = at_published_shape(preset, stage, seq_length, table, rates)
            published.append(entry)
            cells = "".join(f"{entry['microseconds_per_byte'][name]:10.4f}" for name in names)
            shares = f"   {entry['share_of_step']:17.2%}   {entry['share_of_products']:25.2%}"
            print(f"{preset:13} {stage}{cells}{shares}", flush=True)
    print("microseconds a byte of text on this CPU, one thread: 2a at the tiny preset's widths")
    small = []
    for vocab_size in (4096, 32_768) if arguments.quick else (4096, 32_768, 128_256):
        entry = on_this_cpu(vocab_size, 1024, 2 if arguments.quick else 8)
        small.append(entry)
        cells = "".join(f"{entry['microseconds_per_byte'][name]:10.2f}" for name in names)
        print(f"W = {vocab_size:<11,}{cells}   {entry['share_of_step']:17.2%}", flush=True)
    worst = max(entry["share_of_step"] for entry in published)
    stricter = max(entry["share_of_products"] for entry in published)
    print(json.dumps({"share_of_step": worst, "share_of_products": stricter, "published": published, "cpu": small}))


if __name__ == "__main__":
    main()
