"""After the last stage: summary.json, the closing table, a sample of generated text, the plots, the report."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megabyte_distill.config import STAGE_ORDER, Settings
from megabyte_distill.config.stage import TRAINS_DECODER
from megabyte_distill.curriculum.stages import STAGES
from megabyte_distill.data.chunk_merging import merge_row
from megabyte_distill.data.progress import shown, silent
from megabyte_distill.evaluation.anchors import token_counts, unigram_nll
from megabyte_distill.evaluation.bits_per_byte import Evaluation, evaluate_run
from megabyte_distill.evaluation.boundary_picture import plot_boundaries
from megabyte_distill.evaluation.held_out import held_out_rows
from megabyte_distill.evaluation.marked_text import mark_page, mark_sentence
from megabyte_distill.evaluation.metrics_log import VALIDATION, Curves, read_metrics
from megabyte_distill.evaluation.report import MERGED_NOTE, columns
from megabyte_distill.evaluation.run_report import REPORT_FILE, HeldOutPage, write_report
from megabyte_distill.files import write_whole
from megabyte_distill.inference.generation import GenerationSettings, generate
from megabyte_distill.inference.sampling import Sampling
from megabyte_distill.model.backbone import Backbone
from megabyte_distill.model.student import Student
from megabyte_distill.parallel.process_groups import World, regroup
from megabyte_distill.pretrain.held_out_page import page_source
from megabyte_distill.pretrain.prepare import Prepared
from megabyte_distill.pretrain.run_data import RunData
from megabyte_distill.pretrain.run_records import BOUNDARIES_FILE, SUMMARY_FILE, run_record
from megabyte_distill.run_folder import run_names
from megabyte_distill.runs import RunStudents, chunk_limit, load_run_teacher, load_students, stage_progress
from megabyte_distill.training.checkpoint import read_loop_state
from megabyte_distill.training.logging import METRICS_FILE, duration, say

SAMPLE_BYTES = 300
SAMPLE_PROMPTS = ("The ", "It was ", "She said ")
PAGE_BYTES = 2000
"""Held-out text shown in the report."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageRow:
    """One line of the closing table."""

    stage: str
    title: str
    bytes_seen: int
    seconds: float
    measure: str
    value: float | None
    bits_per_byte: float | None

    def cells(self) -> tuple[str, ...]:
        """As printed."""
        measured = "–" if self.value is None else f"{self.measure} {self.value:.4f}"
        bits = "–" if self.bits_per_byte is None else f"{self.bits_per_byte:.4f}"
        return (self.stage, self.title, f"{self.bytes_seen:,}", duration(self.seconds), measured, bits)


def closing_report(settings: Settings, prepared: Prepared, data: RunData, world: World) -> None:
    """Measure, write and print the summary where all stages are complete and ``summary_bytes`` asks for one.

    Measuring knows no pipeline stages: the ranks are cut anew, by tensor parallelism alone. All of them load
    (checkpoints are read collectively); then the ranks that share the first copy of the model measure, the main one
    writes, and the others leave.
    """
    if not settings.run.summary_bytes or settings.data.mock_data or not _finished(prepared.root):
        return
    parallel = settings.parallel
    world = regroup(
        tensor_parallel=parallel.tensor_model_parallel_size,
        pipeline_parallel=1,
        timeout_minutes=parallel.distributed_timeout_minutes,
    )
    students = load_students(prepared.root)
    teacher = load_run_teacher(prepared.root, prepared.teacher).backbone
    if world.data_parallel_rank != 0:
        return
    _take_the_others_cores(world)
    summary, page = _measure(settings, prepared, data, students, teacher, world)
    if world.is_main:
        path = prepared.root / SUMMARY_FILE
        write_whole(path, (json.dumps(summary, indent=1) + "\n").encode())
        print_summary(summary, path)
        _say_report(write_run_report(prepared.root, page))


def write_run_report(root: Path, page: HeldOutPage) -> Path | None:
    """Where the report was written; None, and why, where that failed: a finished run does not fail for a picture."""
    try:
        return write_report([run_record(root, run_names([root])[0], page)], root)[0]
    except Exception as error:
        say(f" the report was not written ({type(error).__name__}: {error}); python tools/plot_run.py {root} does it")
        return None


def _say_report(path: Path | None) -> None:
    if path is not None:
        say(f"report: {path}")


def _take_the_others_cores(world: World) -> None:
    """Ranks on one CPU have a thread each; where all but one leave now, that one takes theirs."""
    if world.size > 1 and world.data_parallel_size == world.size and world.device.type == "cpu":
        torch.set_num_threads(max(torch.get_num_threads(), os.cpu_count() or 1))


def print_saved_summary(settings: Settings, prepared: Prepared, world: World) -> bool:
    """Print the summary of a finished run and return True; False where there is work left."""
    path = prepared.root / SUMMARY_FILE
    done = path.exists() and all(_is_done(prepared.root, name, c.train_iters) for name, c in settings.stages.items())
    if done and world.is_main:
        print_summary(json.loads(path.read_text(encoding="utf-8")), path)
        say(f" {prepared.root} is complete; --fresh starts over (of the demo: make demo FRESH=1)")
        report = prepared.root / REPORT_FILE
        _say_report(report if report.exists() else None)
    return done


def _is_done(root: Path, stage: str, train_iters: int) -> bool:
    progress = stage_progress(root, stage)
    return progress is not None and progress.iteration >= train_iters


def _finished(root: Path) -> bool:
    """True where the decoder is trained and nothing was left half done."""
    progress = [p for stage in STAGE_ORDER if (p := stage_progress(root, stage)) is not None]
    return all(p.is_complete for p in progress) and any(p.stage in TRAINS_DECODER for p in progress)


def _measure(
    settings: Settings, prepared: Prepared, data: RunData, students: RunStudents, teacher: Backbone, world: World
) -> tuple[dict[str, Any], HeldOutPage]:
    """(what summary.json holds, a page of held-out text)."""
    root, loaded = prepared.root, students.last
    training, held_out = (blend.datasets for blend in data.shared)
    if world.is_main:
        say(f" measuring on held-out text (up to {settings.run.summary_bytes:,} bytes) …")
    config = settings.stages.get(loaded.stage) or next(iter(settings.stages.values()))
    rows = held_out_rows(
        held_out,
        row_bytes=config.seq_length,
        chunk_bucket=config.chunk_bucket,
        max_bytes=settings.run.summary_bytes,
    )
    limit = chunk_limit(loaded.checkpoint)
    evaluation = evaluate_run(
        loaded.student,
        teacher,
        rows,
        stage1_student=students.distilled,
        aligned_student=students.aligned,
        unigram=unigram_nll(token_counts(training), prepared.token_bytes),
        paths=settings.run.summary_paths,
        merge_limit=limit,
        show=shown if world.is_main else silent,
    )
    stages = _stage_rows(root, speaks=world.is_main)
    marked, samples = mark_sentence(loaded.student, merge_row(rows[0], limit)), _samples(loaded.student)
    texts = mark_page(loaded.student, (merge_row(row, limit) for row in rows), at_most=PAGE_BYTES)
    if world.is_main:
        plot_boundaries(marked, root / BOUNDARIES_FILE)
    iteration = read_loop_state(loaded.checkpoint)["progress"]["iteration"]
    page = HeldOutPage(texts=texts, source=page_source(loaded.stage, iteration, held_out[0].name))
    return _summary(evaluation, stages, samples, [root / BOUNDARIES_FILE]), page


def _samples(student: Student) -> list[str]:
    """Texts the student generates, prompts included; none in official mode, which cannot step."""
    if student.is_official:
        return []
    settings = GenerationSettings(max_new_bytes=SAMPLE_BYTES, sampling=Sampling(temperature=0.7, top_p=0.95))
    found = generate(student, SAMPLE_PROMPTS, settings)
    return [
        prompt + text.byte_ids.decode("utf-8", errors="replace")
        for prompt, text in zip(SAMPLE_PROMPTS, found, strict=True)
    ]


def _curves(root: Path, *, speaks: bool) -> Curves:
    try:
        return read_metrics(root / METRICS_FILE)
    except ValueError as error:  # a finished run does not fail for its log
        if speaks:
            say(f" the closing table has no measures of the stages: {error}")
        return {}


def _stage_rows(root: Path, *, speaks: bool) -> list[StageRow]:
    """A line for each stage that is there; ``speaks``: this rank says why figures are missing."""
    curves = _curves(root, speaks=speaks)
    rows = []
    for name, stage in STAGES.items():
        progress = stage_progress(root, name)
        if progress is None:
            continue
        counters = read_loop_state(progress.checkpoint)["progress"]
        series = curves.get(name, {}).get(f"{VALIDATION}{stage.measure}")
        value = None if series is None or math.isnan(series.last) else series.last
        # of answers alone it stands beside no figure of whole texts
        is_of_text = stage.measure.endswith("bits per byte") and not stage.reads_loss_mask
        rows.append(
            StageRow(
                stage=name,
                title=stage.title,
                bytes_seen=int(counters["consumed_bytes"]),
                seconds=float(counters["seconds"]),
                measure=stage.measure,
                value=value,
                bits_per_byte=value if is_of_text else None,
            )
        )
    return rows


def _summary(evaluation: Evaluation, stages: list[StageRow], samples: list[str], plots: list[Path]) -> dict[str, Any]:
    return {
        **evaluation.as_dict(),
        "seconds": sum(row.seconds for row in stages),
        "bytes_per_stage": {row.stage: row.bytes_seen for row in stages},
        "stages": [list(row.cells()) for row in stages],
        "sample": samples[0] if samples else None,
        "samples": samples,
        "plots": [str(plot) for plot in plots],
    }


def print_summary(summary: Mapping[str, Any], path: Path) -> None:
    """The closing table, the figures and the sample, for a person."""
    header = ("stage", "what", "bytes seen", "time", "its own last validation", "bits per byte")
    say("\n" + columns(header, summary["stages"], left=len(header), ruled=True) + "\n")
    if not summary["is_bound"]:
        say("official dechunk reads p, which knows the next byte: the student's figures below are no bounds\n")
    paths = summary.get("paths") or {}
    merged = summary.get("merged_bits_per_byte")
    if merged is not None:
        say(f"{MERGED_NOTE.format(whose='merged bits')}\n")
    figures = [
        ("teacher, canonical tokens", summary["teacher_bits_per_byte"]),
        ("student reading bytes through 1b's token head", summary["stage1_bits_per_byte"]),
        ("student, joint, gold bits", summary["gold_bits_per_byte"]),
        *([] if merged is None else [("student, joint, merged bits", merged)]),
        ("student, joint, the router's bits", summary["router_bits_per_byte"]),
        ("anchor: token unigram", summary["unigram_bits_per_byte"]),
        ("anchor: teacher on a constant embedding", summary["constant_embedding_bits_per_byte"]),
    ]
    say(f"bits per byte on {summary['text_bytes']:,} bytes of held-out works:")
    for name, value in figures:
        say(f"  {name:<48} {'–' if value is None else f'{value:.4f}'}")
    if paths:
        say(f"and on a sample of {paths['text_bytes']:,} of them, without a tokenizer:")
        say(f"  {'student, K = ' + str(paths['paths']) + ' paths':<48} {paths['bits_per_byte']:.4f}")
        say(f"  {'student, causal byte filter':<48} {paths['filter_bits_per_byte']:.4f}")
        say(f"  {'student, joint, gold bits':<48} {paths['gold_bits_per_byte']:.4f}")
        say(f"  {'teacher, canonical tokens':<48} {paths['teacher_bits_per_byte']:.4f}")
    say(
        f"\nretention {summary['retention']:.4f} (gap {summary['gap_bits_per_byte']:.4f} bits per byte) | stage 1 "
        f"retention {summary['stage1_retention']:.4f} | boundary F1 {summary['boundary_f1']:.4f} | relative alignment "
        f"error {summary['alignment_mse_relative']:.4f} | time in updates {duration(summary['seconds'])}"
    )
    if summary["sample"] is not None:
        say(f"\nthe student, temperature 0.7:\n{summary['sample']}\n")
    say(f"written: {path}, {', '.join(summary['plots'])}")
