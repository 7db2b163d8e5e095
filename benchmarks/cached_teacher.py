#!/usr/bin/env python3
"""Updates with the teacher beside the student against updates from a target cache, and what the cache costs.

    python benchmarks/cached_teacher.py             # the embedded teacher and text, 2a and 2b: minutes on one core
    python benchmarks/cached_teacher.py --quick     # few updates: under a minute

The embedded teacher's targets for a part of its text are stored with 512, 32 and 8 pairs a byte. Then the same updates
are made from the same weights with the teacher running and from each cache, in turns, and their CPU seconds taken.
Reported for each stage: the ratio of the times; for each cache its size, and by how much the stored targets miss the
exact ones: Kullback–Leibler divergence of the restored distribution from the exact one, nats a byte, mean over training
rows. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
warnings.simplefilter("ignore")

from benchmarks.update_times import Arm, in_turns  # noqa: E402 - after the path is set
from megabyte_distill.conversion.teacher_folder import find_teacher, load_teacher  # noqa: E402
from megabyte_distill.data.dataset import ByteTokenDataset  # noqa: E402
from megabyte_distill.data.packing import PackedRow  # noqa: E402
from megabyte_distill.data.sampler import RowStream  # noqa: E402
from megabyte_distill.objectives.byte_tree import ByteTree  # noqa: E402
from megabyte_distill.objectives.exact_targets import exact_targets  # noqa: E402
from megabyte_distill.objectives.truncated_targets import restored  # noqa: E402
from megabyte_distill.parallel.cpu_memory import keep_large_buffers  # noqa: E402
from megabyte_distill.parallel.process_groups import World, world  # noqa: E402
from megabyte_distill.pretrain.cache_teacher import CacheReport, CacheSettings, make_cache  # noqa: E402
from megabyte_distill.pretrain.example import Example  # noqa: E402
from megabyte_distill.training.target_cache import TargetCache, teacher_hash  # noqa: E402

ONLINE = "online"


def make(root: Path, dataset: ByteTokenDataset, top_k: int, here: World) -> tuple[Path, CacheReport]:
    """A cache of the data set and what it is."""
    folder = root / f"cache_{top_k}"
    teacher = load_teacher(root / "teacher", dtype=torch.float32)
    report = make_cache(
        folder,
        teacher.backbone.requires_grad_(False).eval(),
        teacher.token_bytes,
        [dataset],
        CacheSettings(top_k=top_k),
        teacher_hash=teacher_hash(find_teacher(root / "teacher").checkpoint),
        world=here,
        say=lambda text: None,
    )
    return folder, report


def divergence(root: Path, dataset: ByteTokenDataset, cache: Path, rows: int) -> float:
    """KL(exact ‖ restored) in nats a byte, on rows that begin with a document: there the teacher's context is one."""
    teacher = load_teacher(root / "teacher", dtype=torch.float32)
    tree, opened = ByteTree.of(teacher.token_bytes), TargetCache(cache)
    stream = RowStream([dataset], row_bytes=1024, chunk_bucket=64, seed=7)
    total, size = 0.0, 0
    for plan in stream.next_rows(200):
        if any(part.token_start for part in plan.segments) or size >= 1024 * rows:
            continue
        row: PackedRow = stream.materialize(plan)
        row = replace(row, stored=opened.of_row(plan, stream.datasets, 1024))
        with torch.no_grad():
            exact = exact_targets(
                tree,
                teacher.backbone(teacher.backbone.embed(row.tokens), row.cu_chunks),
                head=teacher.backbone.own_logits,
                byte_ids=row.byte_ids,
                bits=row.bits,
                labels=row.labels,
                wanted=row.is_real,
            ).distribution.double()
        found = restored(tree, row).double()
        # a pair that vanishes in fp16 has less than 3e-8
        total += float(torch.special.xlogy(exact, exact / found.clamp(min=1e-9)).sum())
        size += int(row.is_real.sum())
    return total / size


def main(argv: Sequence[str] | None = None) -> None:
    """Print a line a stage and cache, and the JSON line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--quick", action="store_true", help="few documents and updates")
    arguments = parser.parse_args(argv)
    documents, updates, sizes = (2, 3, (32,)) if arguments.quick else (40, 30, (512, 32, 8))
    torch.set_num_threads(1)
    keep_large_buffers()
    results: dict[str, Any] = {"caches": {}, "updates": {}}
    with tempfile.TemporaryDirectory() as name, world() as here:
        root = Path(name)
        with contextlib.redirect_stdout(io.StringIO()):
            Example(ROOT / "examples" / "tiny").prepare(root)
        whole = ByteTokenDataset(str(root / "data" / "train_text_document"))
        dataset = whole.subset(range(documents))
        caches: dict[str, Path] = {}
        for top_k in sizes:
            caches[str(top_k)], report = make(root, dataset, top_k, here)
            missed = divergence(root, dataset, caches[str(top_k)], 2 if arguments.quick else 40)
            results["caches"][top_k] = {**report.as_dict(), "kl_nats_per_byte": missed}
            print(
                f"{top_k:4} pairs a byte: {report.cache_bytes_per_text_byte:7.2f} bytes on the disk a byte of text, KL "
                f"{missed:.2e} nats a byte, made at {report.text_bytes_per_second:,.0f} bytes/s",
                flush=True,
            )
        for stage in ("2a", "2b"):
            flags = {
                ONLINE: ["--2a.exact-targets-from", "teacher"],
                **{name: ["--logits-load-dir", str(cache)] for name, cache in caches.items()},
            }
            beside = ["--byte-targets", "exact"]
            arms = {name: Arm(stage, root, dataset, [*beside, *more], here) for name, more in flags.items()}
            middle = in_turns(arms, updates)
            ratios = {name: middle[name] / middle[ONLINE] for name in caches}
            results["updates"][stage] = {"seconds": middle, "cached_to_online": ratios}
            shown = ", ".join(f"{name} pairs {ratio:.3f}" for name, ratio in ratios.items())
            print(
                f"{stage}: {1e3 * middle[ONLINE]:.0f} ms an update online; times that from the cache: {shown}",
                flush=True,
            )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
