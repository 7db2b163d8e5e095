"""What a person reads of a comparison, and what has to be said beside its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megabyte_distill.evaluation.bits_per_byte import Comparison, Evaluation
from megabyte_distill.evaluation.bootstrap import Interval
from megabyte_distill.evaluation.document_counts import Bits
from megabyte_distill.evaluation.thresholds import ThresholdFigures

_WHOSE = {Bits.GOLD: "gold bits", Bits.ROUTER: "router's bits", Bits.MERGED: "merged bits"}

MERGED_NOTE = (
    "the student was taught chunks of several tokens: its headline figures are under {whose}, its boundaries are "
    "judged by the merged ones, and gold bits are those of tokens, which it was not taught to write; all are bounds, "
    "as the teacher's figure of its tokens"
)
"""Beside the figures of a student whose stage merged tokens."""


def notes(comparison: Comparison) -> list[str]:
    """What a reader of the figures must know, one sentence an entry."""
    total = comparison.total
    found = []
    for name, part in _parts(comparison):
        if part.retention > 1:
            found.append(
                f"retention above 1 on {name}: the student codes it better than the teacher, as on text that the "
                "teacher does not know; the ratio then says nothing of what was retained"
            )
    if total.bits is Bits.ROUTER:
        found.append(
            "under the router's bits the student's figure contains the cost of its own segmentation, the teacher's "
            "that of the tokenizer's"
        )
    if total.merged_bits_per_byte is not None:
        found.append(MERGED_NOTE.format(whose=_WHOSE[total.bits]))
    if total.official_bits_per_byte is not None:
        found.append(
            "the official score is no bound: boundaries are decided with the next byte in sight and tell about it, and "
            "the likelier of a byte's two bits is credited whichever is input; compare it with published figures alone"
        )
    if not total.is_bound:
        found.append("official dechunk reads p, which knows the next byte: the student's figures are no bounds")
    single = [name for name, part in _parts(comparison) if part.documents < 2]
    if single:
        found.append(f"no confidence intervals for {', '.join(single)}: they need two documents")
    return found


def _parts(comparison: Comparison) -> list[tuple[str, Evaluation]]:
    """(name, figures) of each set and, where there are several, of all together."""
    total = [("all text", comparison.total)] if len(comparison.sets) > 1 else []
    return [*comparison.sets.items(), *total]


def table(comparison: Comparison) -> str:
    """The figures of all text, a line for each data set, and the notes."""
    total = comparison.total
    documents = "document" if total.documents == 1 else "documents"
    judge = "gold" if total.merged_bits_per_byte is None else "merged"
    lines = [
        f"{total.text_bytes:,} bytes of {total.documents:,} {documents}; bits per byte, document ends left out",
        *_main_lines(total),
        *_path_lines(total),
        f"boundaries: precision {total.boundary_precision:.4f}, recall {total.boundary_recall:.4f}, "
        f"F1 {total.boundary_f1:.4f}{_interval(total.intervals.get('boundary_f1'))}; bytes per chunk "
        f"{total.bytes_per_chunk:.2f} {judge}, {total.router_bytes_per_chunk:.2f} router",
        f"next byte right: {_told(total)}",
        f"alignment: MSE over the table's variance {total.alignment_mse_relative:.4f}",
    ]
    ends = (total.teacher_bits_per_document_end, total.student_bits_per_document_end)
    if ends[0] is not None and ends[1] is not None:
        lines.append(f"document ends: {ends[0]:.2f} bits each for the teacher, {ends[1]:.2f} for the student")
    if len(comparison.sets) > 1:
        lines += ["", _set_table(comparison)]
    if comparison.thresholds:
        lines += ["", threshold_table(comparison.thresholds)]
    return "\n".join([*lines, *(f"note: {note}" for note in notes(comparison))])


def _main_lines(total: Evaluation) -> list[str]:
    student = f"  student, {_WHOSE[total.bits]}"
    others = {_WHOSE[bits]: getattr(total, f"{bits}_bits_per_byte") for bits in Bits if bits is not total.bits}
    at = total.intervals
    lines = [
        f"  teacher, its tokens               {total.teacher_bits_per_byte:7.4f}"
        f"{_interval(at.get('teacher_bits_per_byte'))}",
        f"{student:36}{total.student_bits_per_byte:7.4f}{_interval(at.get('student_bits_per_byte'))}   "
        f"retention {total.retention:.4f}{_interval(at.get('retention'))}, gap {total.gap_bits_per_byte:+.4f}",
        *(f"{f'  student, {whose}':36}{value:7.4f}" for whose, value in others.items() if value is not None),
        f"  student, stage 1's token head     {total.stage1_bits_per_byte:7.4f}   "
        f"retention {total.stage1_retention:.4f}",
        f"  anchor, teacher reading nothing   {total.constant_embedding_bits_per_byte:7.4f}",
    ]
    if total.teacher_exact_bits_per_byte is not None:
        lines.insert(1, f"  teacher, exact byte distribution  {total.teacher_exact_bits_per_byte:7.4f}")
    if total.official_bits_per_byte is not None:
        lines.append(
            f"  student, official score           {total.official_bits_per_byte:7.4f}   "
            f"retention {total.official_retention:.4f}"
        )
    if total.unigram_bits_per_byte is not None:
        lines.append(f"  anchor, token unigram             {total.unigram_bits_per_byte:7.4f}")
    return lines


def _path_lines(total: Evaluation) -> list[str]:
    paths = total.paths
    if paths is None:
        return []
    several = []
    if paths.teacher_tokenizations_bits_per_byte is not None:
        label = f"  teacher, {paths.tokenizations} tokenizations"
        several = [f"{label:36}{paths.teacher_tokenizations_bits_per_byte:7.4f}"]
    return [
        f"without a tokenizer, {paths.text_bytes:,} bytes",
        f"  student, {paths.paths:3d} paths                {paths.bits_per_byte:7.4f}",
        f"  student, causal byte filter       {paths.filter_bits_per_byte:7.4f}",
        f"  student, gold bits, same text     {paths.gold_bits_per_byte:7.4f}",
        f"  teacher, same text                {paths.teacher_bits_per_byte:7.4f}",
        *several,
    ]


def _told(part: Evaluation) -> str:
    student = f"student {part.next_byte_accuracy:.4f}{_interval(part.intervals.get('next_byte_accuracy'))}"
    if part.teacher_next_byte_accuracy is None:
        return student
    interval = _interval(part.intervals.get("teacher_next_byte_accuracy"))
    return f"teacher {part.teacher_next_byte_accuracy:.4f}{interval}, {student}"


def _interval(ends: Interval | None) -> str:
    return "" if ends is None else f" [{ends[0]:.4f}, {ends[1]:.4f}]"


def _set_table(comparison: Comparison) -> str:
    header = ("data set", "bytes", "docs", "teacher", "student", "retention", "router", "F1", "B/chunk", "next byte")
    rows = []
    for name, part in _parts(comparison):
        teacher = "–" if part.teacher_next_byte_accuracy is None else f"{part.teacher_next_byte_accuracy:.3f}"
        rows.append(
            (
                name,
                f"{part.text_bytes:,}",
                str(part.documents),
                f"{part.teacher_bits_per_byte:.4f}",
                f"{part.student_bits_per_byte:.4f}",
                f"{part.retention:.4f}{_interval(part.intervals.get('retention'))}",
                f"{part.router_bits_per_byte:.4f}",
                f"{part.boundary_f1:.4f}",
                f"{part.bytes_per_chunk:.2f}",
                f"{teacher} / {part.next_byte_accuracy:.3f}",
            )
        )
    return columns(header, rows)


def threshold_table(figures: Sequence[ThresholdFigures]) -> str:
    """Quality against backbone steps, a line for each choice of bits."""
    header = ("boundary bits", "bits/byte", "bytes/chunk", "steps/byte", "F1 tokens", "F1 merged")
    rows = [
        (
            one.bits if one.threshold is None else f"{one.bits}, p > {one.threshold:g}",
            f"{one.bits_per_byte:.4f}",
            f"{one.bytes_per_chunk:.2f}",
            f"{one.backbone_steps_per_byte:.4f}",
            f"{one.gold_f1:.4f}",
            "–" if one.merged_f1 is None else f"{one.merged_f1:.4f}",
        )
        for one in figures
    ]
    return columns(header, rows)


def run_table(comparisons: Mapping[str, Comparison]) -> str:
    """A line for each run, on the same text."""
    header = ("run", "teacher", "student", "retention", "router", "stage 1", "F1", "next byte")
    rows = []
    for name, comparison in comparisons.items():
        total = comparison.total
        rows.append(
            (
                name,
                f"{total.teacher_bits_per_byte:.4f}",
                f"{total.student_bits_per_byte:.4f}",
                f"{total.retention:.4f}{_interval(total.intervals.get('retention'))}",
                f"{total.router_bits_per_byte:.4f}",
                f"{total.stage1_retention:.4f}",
                f"{total.boundary_f1:.4f}",
                f"{total.next_byte_accuracy:.4f}",
            )
        )
    return columns(header, rows)


def columns(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1, ruled: bool = False) -> str:
    """Rows under their header, which may be ruled off; the first ``left`` columns to the left, the others right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if place < left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in (header, *rows)
    ]
    return "\n".join([lines[0], *(["  ".join("-" * width for width in widths)] if ruled else []), *lines[1:]])
