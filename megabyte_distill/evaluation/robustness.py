"""The robustness suite: what noise, cut prompts, tasks on characters and other scripts do to teacher and student."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from megabyte_distill.data.dataset import ByteTokenDataset
from megabyte_distill.data.progress import UNCOUNTED, Counter, Show, counted, silent
from megabyte_distill.evaluation.bootstrap import Bootstrap, Counts, Interval
from megabyte_distill.evaluation.characters import CHOICES, CharacterTask, find_words, make_questions
from megabyte_distill.evaluation.noise import LEVELS, Noise, add_noise
from megabyte_distill.evaluation.readers import PairBits, Reader, StudentReader, TeacherReader
from megabyte_distill.evaluation.report import columns
from megabyte_distill.evaluation.scripts import SCRIPT_PROMPTS, invalid_bytes, is_valid_utf8

CUTS = ("at a token's end", "1 byte inside", "2 bytes inside", "3 or more inside", "inside a character")
"""Where a prompt can end."""
_WORD_BYTES = 200_000
"""Text that words are taken from."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How much is measured."""

    texts: int = 12
    """Pieces of held-out text that are noised and cut."""
    context_bytes: int = 160
    """Of a piece, in front of what is predicted; about."""
    continuation_bytes: int = 40
    """Predicted behind it; about."""
    questions: int = 24
    """Of each task on characters."""
    shots: int = 4
    """Examples in front of a question."""
    samples: int = 4
    """Of each script."""
    sample_bytes: int = 48

    def __post_init__(self) -> None:
        small = [name for name, value in asdict(self).items() if value < 1 and name != "shots"]
        if small or self.shots < 0:
            raise ValueError(f"the suite's {', '.join(small) or 'shots'}: expected at least 1 (of shots 0)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Held-out text: a context that ends with a word or a character, and what follows it."""

    context: str
    continuation: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A figure of both models; None where one could not be asked."""

    label: str
    count: int
    """Pieces, cuts, questions or samples."""
    teacher: float | None
    student: float | None
    teacher_interval: Interval | None = None
    student_interval: Interval | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """Lines that measure one thing."""

    name: str
    measure: str
    lines: tuple[Line, ...]


def run_suite(
    teacher: TeacherReader, student: StudentReader, datasets: Sequence[ByteTokenDataset], budget: Budget, *,
    bootstrap: Bootstrap, show: Show = silent,
) -> list[Section]:  # fmt: skip
    """Everything, seeded by ``bootstrap.seed``. ValueError where the data sets hold no text long enough."""
    pieces = take_pieces(datasets, budget)
    words = find_words(_some_text(datasets))
    # noise, each task and scripts ask one model after the other, each cut piece both
    steps = 2 + len(pieces) + 2 * len(CharacterTask) + 2
    with closing(show("robustness", steps, " steps")) as done:
        return [
            *noise_sections(teacher, student, pieces, bootstrap, done),
            cut_section(teacher, student, pieces, budget, bootstrap, done),
            *character_sections(teacher, student, words, budget, bootstrap, done),
            *script_sections(teacher, student, budget, bootstrap.seed, done),
        ]


def take_pieces(datasets: Sequence[ByteTokenDataset], budget: Budget) -> list[Piece]:
    """Pieces out of the middles of evenly spread documents of all sets.

    ValueError where no document has two characters.
    """
    total = sum(len(dataset) for dataset in datasets)
    wanted = min(budget.texts, total)
    pieces: list[Piece] = []
    for number in range(wanted):
        dataset, document = _document(datasets, (2 * number + 1) * total // (2 * wanted))
        raw = bytes(dataset.byte_ids(document, 0, None))
        text = raw.decode("utf-8", "ignore")
        size = len(text) / max(1, len(raw))
        piece = cut_piece(text, round(budget.context_bytes * size), round(budget.continuation_bytes * size))
        pieces += [] if piece is None else [piece]
    if not pieces:
        raise ValueError("the data sets hold no document of two characters to test on; give more text")
    return pieces


def _document(datasets: Sequence[ByteTokenDataset], place: int) -> tuple[ByteTokenDataset, int]:
    """The data set and the index of the document at a place in all of them together."""
    for dataset in datasets:
        if place < len(dataset):
            return dataset, dataset.documents[place]
        place -= len(dataset)
    raise AssertionError("a place behind the last document")


def cut_piece(text: str, context: int, continuation: int) -> Piece | None:
    """``context`` and ``continuation`` characters, about, of the middle of a text, cut in front of white space.

    Less of both where the text is short, anywhere where it has no white space; None for one of under two characters.
    """
    both = min(context + continuation, len(text))
    first = (len(text) - both) // 2
    start = _word_end(text, first)
    piece = text[start : max(start + 2, _word_end(text, first + both))]
    if len(piece) < 2:
        return None
    middle = max(1, min(len(piece) - 1, round(len(piece) * context / (context + continuation))))
    blanks = [place for place in range(1, len(piece)) if piece[place].isspace()]
    middle = min(blanks, key=lambda place: abs(place - middle), default=middle)
    return Piece(context=piece[:middle], continuation=piece[middle:])


def _word_end(text: str, place: int) -> int:
    """Where the word at a place ends: the next white space within 20 characters, or the place itself."""
    near = text[place : place + 20]
    return place + next((offset for offset, character in enumerate(near) if character.isspace()), 0) if place else 0


def noise_sections(
    teacher: TeacherReader,
    student: StudentReader,
    pieces: Sequence[Piece],
    bootstrap: Bootstrap,
    done: Counter = UNCOUNTED,
) -> Iterator[Section]:
    """Bits per byte of the clean continuation behind a noised context, and of the noised context itself."""
    variants: list[tuple[str, list[str]]] = [("clean", [piece.context for piece in pieces])]
    for kind in Noise:
        for level in LEVELS:
            noised = [add_noise(piece.context, kind, level, seed=bootstrap.seed) for piece in pieces]
            variants.append((f"{kind.value} {level:g}", noised))
    pairs = [
        (context.encode(), piece.continuation.encode())
        for _, contexts in variants
        for context, piece in zip(contexts, pieces, strict=True)
    ]
    of_teacher = teacher.pair_bits(pairs)
    done.advance()
    of_student = student.pair_bits(pairs)
    done.advance()
    for place, name, measure in (
        (1, "noise: continuation", "bits per byte of the clean text behind a noised context"),
        (0, "noise: text", "bits per byte of the noised text itself"),
    ):
        lines = []
        for number, (label, _) in enumerate(variants):
            entries = [
                Entry(_part(of_teacher[index], place), of_student[index][place], len(pairs[index][place]))
                for index in range(number * len(pieces), (number + 1) * len(pieces))
            ]
            lines.append(make_line(label, entries, bootstrap))
        yield Section(name=name, measure=measure, lines=tuple(lines))


def cut_section(
    teacher: TeacherReader,
    student: StudentReader,
    pieces: Sequence[Piece],
    budget: Budget,
    bootstrap: Bootstrap,
    done: Counter = UNCOUNTED,
) -> Section:
    """Bits per byte of the true continuation where the prompt is cut at every byte, by where the cut falls.

    The cuts are those of the first three quarters of the continuation; what is predicted reaches over a quarter of it
    at least, to where a token ends.
    """
    entries: dict[str, list[Entry]] = {label: [] for label in CUTS}
    counts = dict.fromkeys(CUTS, 0)
    for piece in counted(pieces, done, lambda piece: 1):
        text = (piece.context + piece.continuation).encode()
        ends = teacher.token_ends(text)
        if ends is None:  # its normal form is another text
            continue
        spans = cut_spans(ends, len(piece.context.encode()), budget.continuation_bytes)
        of_teacher, of_student = teacher.span_bits(text, spans), student.span_bits(text, spans)
        for label in CUTS:
            mine = [index for index, (start, _) in enumerate(spans) if where_cut(text, ends, start) == label]
            told = [value for index in mine if (value := of_teacher[index]) is not None]
            if mine:
                sizes = sum(spans[index][1] - spans[index][0] for index in mine)
                # a vocabulary spells the half characters of a text, or does not
                whole = sum(told) if len(told) == len(mine) else None
                counts[label] += 0 if whole is None else len(mine)
                entries[label].append(Entry(whole, sum(of_student[index] for index in mine), sizes))
    lines = [make_line(label, entries[label], bootstrap, count=counts[label]) for label in CUTS if entries[label]]
    return Section(
        name="prompts cut at every byte", measure="bits per byte of the true continuation", lines=tuple(lines)
    )


def cut_spans(ends: Sequence[int], first: int, size: int) -> list[tuple[int, int]]:
    """(cut, end of what is predicted behind it); ``ends``: where the tokens of the text end, in bytes."""
    spans = []
    for start in range(first, first + size - size // 4):
        stop = next((end for end in ends if end >= start + max(1, size // 4)), None)
        if stop is not None:
            spans.append((start, stop))
    return spans


def where_cut(text: bytes, ends: Sequence[int], start: int) -> str:
    """One of :data:`CUTS`."""
    if start < len(text) and text[start] & 0xC0 == 0x80:
        return CUTS[-1]
    depth = start - max((end for end in ends if end <= start), default=0)
    return CUTS[min(depth, len(CUTS) - 2)]


def character_sections(
    teacher: Reader,
    student: Reader,
    words: Sequence[str],
    budget: Budget,
    bootstrap: Bootstrap,
    done: Counter = UNCOUNTED,
) -> Iterator[Section]:
    """Share of questions whose right answer got the highest probability, and whose greedy answer was right."""
    ranked, greedy = [], []
    for task in CharacterTask:
        questions = make_questions(task, words, count=budget.questions, shots=budget.shots, seed=bootstrap.seed)
        if not questions:
            done.advance(2)
            continue
        pairs = [(question.prompt.encode(), answer.encode()) for question in questions for answer in question.answers]
        prompts = [question.prompt.encode() for question in questions]
        room = max(len(question.answers[0].encode()) for question in questions)
        ranks, said = [], []
        for reader in (teacher, student):
            scores = [_total(pair) for pair in reader.pair_bits(pairs)]
            ranks.append([_is_first(scores[at : at + CHOICES]) for at in range(0, len(scores), CHOICES)])
            answers = reader.complete(prompts, max_bytes=room)
            said.append([a.startswith(q.answers[0].encode()) for a, q in zip(answers, questions, strict=True)])
            done.advance()
        ranked.append(_share(task.value, ranks[0], ranks[1], bootstrap))
        greedy.append(_share(task.value, said[0], said[1], bootstrap))
    yield Section(
        name="characters: ranking",
        measure=f"share of right answers preferred to {CHOICES - 1} wrong ones; chance is {1 / CHOICES:g}",
        lines=tuple(ranked),
    )
    yield Section(name="characters: greedy", measure="share of greedy answers that are right", lines=tuple(greedy))


def script_sections(
    teacher: Reader, student: Reader, budget: Budget, seed: int, done: Counter = UNCOUNTED
) -> Iterator[Section]:
    """Share of samples at temperature 1 that are valid UTF-8, and of their bytes, behind prompts in ten scripts."""
    prompts = [text.encode() for text in SCRIPT_PROMPTS.values() for _ in range(budget.samples)]
    said = [
        reader.complete(prompts, max_bytes=budget.sample_bytes, temperature=1.0, seed=seed)
        for reader in counted((teacher, student), done, lambda reader: 1)
    ]
    no_intervals = Bootstrap(resamples=0)
    samples, bytes_ = [], []
    for number, script in enumerate(SCRIPT_PROMPTS):
        mine = slice(number * budget.samples, (number + 1) * budget.samples)
        texts = list(zip(said[0][mine], said[1][mine], strict=True))
        are_valid = [[is_valid_utf8(text[who]) for text in texts] for who in (0, 1)]
        samples.append(_share(script, are_valid[0], are_valid[1], no_intervals))
        valid = [sum(len(text[who]) - invalid_bytes(text[who]) for text in texts) for who in (0, 1)]
        sizes = [max(1, sum(len(text[who]) for text in texts)) for who in (0, 1)]
        bytes_.append(Line(label=script, count=sum(sizes), teacher=valid[0] / sizes[0], student=valid[1] / sizes[1]))
    yield Section(name="UTF-8: samples", measure="share of samples that are valid UTF-8", lines=tuple(samples))
    yield Section(name="UTF-8: bytes", measure="share of sampled bytes that are in a character", lines=tuple(bytes_))


class Entry(NamedTuple):
    """What both models make of one piece, question or sample, and how much it is; None where one was not asked."""

    teacher: float | None
    student: float
    size: float


def make_line(label: str, entries: Sequence[Entry], bootstrap: Bootstrap, *, count: int | None = None) -> Line:
    """Sums over sums, with intervals over entries; over those alone that both models have, if there are any."""
    both = [entry for entry in entries if entry.teacher is not None]
    used = both or list(entries)
    table = {
        "teacher": np.array([np.nan if entry.teacher is None else entry.teacher for entry in used]),
        "student": np.array([entry.student for entry in used]),
        "size": np.array([entry.size for entry in used]),
    }

    def figures(sums: Counts) -> Mapping[str, NDArray[np.float64]]:
        # noise may have dropped a whole text, which then costs nothing
        return {who: sums[who] / np.maximum(sums["size"], 1.0) for who in ("teacher", "student")}

    values = figures({name: value.sum(keepdims=True) for name, value in table.items()})
    intervals = bootstrap.intervals(table, figures)
    return Line(
        label=label,
        count=len(used) if count is None else count,
        teacher=float(values["teacher"][0]) if both else None,
        student=float(values["student"][0]),
        teacher_interval=intervals.get("teacher"),
        student_interval=intervals.get("student"),
    )


def suite_table(sections: Sequence[Section]) -> str:
    """All lines, for a person."""
    parts = []
    for section in sections:
        rows = [
            (line.label, str(line.count), _shown(line.teacher, line.teacher_interval),
             _shown(line.student, line.student_interval))
            for line in section.lines
        ]  # fmt: skip
        parts.append(f"{section.measure}\n{columns((section.name, 'n', 'teacher', 'student'), rows)}")
    return "\n\n".join(parts)


def _shown(value: float | None, interval: Interval | None) -> str:
    number = "–" if value is None else f"{value:.3f}"
    return number if interval is None else f"{number} [{interval[0]:.3f}, {interval[1]:.3f}]"


def _share(label: str, teacher: Sequence[bool], student: Sequence[bool], bootstrap: Bootstrap) -> Line:
    return make_line(label, [Entry(t, s, 1.0) for t, s in zip(teacher, student, strict=True)], bootstrap)


def _part(pair: PairBits | None, place: int) -> float | None:
    return None if pair is None else pair[place]


def _total(pair: PairBits | None) -> float:
    """Of the continuation; an answer that cannot be read is the worst."""
    return np.inf if pair is None else pair.continuation


def _is_first(bits: Sequence[float]) -> bool:
    """Whether the first answer is better than each other."""
    return all(bits[0] < other for other in bits[1:])


def _some_text(datasets: Sequence[ByteTokenDataset]) -> str:
    """The beginnings of the sets' documents, together about as much as words are taken from."""
    texts, share = [], _WORD_BYTES // len(datasets)
    for dataset in datasets:
        size = 0
        for document in dataset.documents:
            texts.append(bytes(dataset.byte_ids(document, 0, None)[: share - size]).decode("utf-8", "ignore"))
            size += len(texts[-1].encode())
            if size >= share:
                break
    return "\n".join(texts)
