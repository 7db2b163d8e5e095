"""Generates bytes from a trained run or an exported student.

    python tools/generate.py --load RUN --prompt "It was a" --prompt "She"
    python tools/generate.py --load OUT --prompt-file FILE --temperature 0.8 --top-p 0.95 --show-boundaries
    python tools/generate.py --load RUN --interactive --utf8 constrain
    python tools/generate.py --load RUN --teacher --prompt "It was a"

Prints each prompt and its continuation, a single prompt's characters as soon as their bytes are there, a line end.
A file or a pipe gets the bytes of both as they are; a terminal, and --show-boundaries, U+FFFD for what is no UTF-8.
On stderr: how many bytes are new and how fast they came, bytes per chunk, or per token with --teacher, and how many of
the new bytes belong to no character.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from megabyte_distill.config import ranges
from megabyte_distill.config.stage import TRAINS_DECODER
from megabyte_distill.inference.prompts import PATH_WINDOW, prompt_bytes, prompt_name
from megabyte_distill.student_folders import require_stage_of, require_student, stored_threshold, teacher_of
from megabyte_distill.tool import ToolParser, choice, file_to_read, in_range, judged, problems_of, run_tool, typed

if TYPE_CHECKING:
    from megabyte_distill.inference.engine_session import Session
    from megabyte_distill.inference.generation import Continuations, Generated, GenerationSettings
    from megabyte_distill.model.student import Student

    Begin = Callable[[Sequence[bytes], GenerationSettings, Sequence[str]], Continuations | Session]
    """Of prompts, settings and what messages call the prompts."""

NewT = TypeVar("NewT")

_TERMINAL_LINE = 4095
"""Bytes of a line that a terminal hands on at most, without the newline; it drops what is behind them."""
_HELP = f"""Type a prompt and Enter: its continuation follows. An empty line starts a document.
Ctrl-C stops a continuation, Ctrl-D ends, /help shows this; every other line is a prompt, byte for byte,
of at most {_TERMINAL_LINE - 1} bytes where a terminal hands it on (--prompt-file takes more).
Each turn draws with the next seed."""

_OF_STUDENTS = (
    *("--stage", "--scoring", "--path-window", "--generation", "--boundary-threshold", "--utf8"),
    *("--speculate", "--kernels"),
)


def build_parser() -> ToolParser:
    """The command line."""
    parser = ToolParser(description=__doc__)
    _add_input(parser)
    _add_draws(parser.add_argument_group("what is drawn").add_argument)
    _add_ends(parser.add_argument_group("where a text ends").add_argument)
    add = parser.add_argument_group("what is shown").add_argument
    add(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="show characters as they come, prompt after prompt (default: where there is one prompt)",
    )
    add(
        "--show-boundaries",
        action="store_true",
        help="mark where chunks end, or tokens beside --teacher: the colour changes, or | where there is none",
    )
    _add_speed(parser.add_argument_group("how fast").add_argument)
    return parser


def _add_input(parser: ToolParser) -> None:
    source = parser.add_argument_group("model and prompts")
    source.add_argument(
        "--load", type=Path, required=True, metavar="DIR", help="folder of a training run, or of an exported student"
    )
    source.add_argument(
        "--stage",
        **choice(*TRAINS_DECODER, hint="earlier stages leave the decoder untrained"),
        help="of a run: stage whose weights are taken (default: the last complete one)",
    )
    source.add_argument(
        "--teacher",
        action="store_true",
        help="the token teacher writes, byte by byte: of the run --load, or the converted teacher that --load is",
    )
    prompt = source.add_mutually_exclusive_group(required=True)
    prompt.add_argument(
        "--prompt", action="append", metavar="TEXT", help='text to continue; "" starts a document; may be repeated'
    )
    prompt.add_argument(
        "--prompt-file", type=judged(file_to_read), metavar="FILE", help="its bytes are the prompt, as they are"
    )
    prompt.add_argument("--interactive", action="store_true", help="read prompts from the terminal, one a line")
    source.add_argument(
        "--scoring",
        **choice("paths", "official"),
        default="paths",
        help="a prompt's chunks: found along --paths, or in the paper's way, its last byte forced to end one (paths)",
    )
    source.add_argument(
        "--paths", type=in_range(ranges.COUNT), default=4, metavar="K",
        help="bit histories of a prompt's end, and of --generation bytes (4)",
    )  # fmt: skip
    source.add_argument(
        "--path-window", type=in_range(ranges.COUNT), default=PATH_WINDOW, metavar="BYTES",
        help=f"length of that end; the router cuts what is in front of it ({PATH_WINDOW})",
    )  # fmt: skip


def _add_draws(add: Any) -> None:
    add(
        "--generation",
        **choice("joint", "bytes"),
        default="joint",
        help="draw pairs of byte and bit, or bytes alone, their bits summed out along --paths (joint)",
    )
    add("--temperature", type=in_range(ranges.TEMPERATURE), default=1.0, metavar="T",
        help="0 takes the likeliest pair of byte and bit, whatever the next three flags say (1)")  # fmt: skip
    add("--top-p", type=in_range(ranges.TOP_P), default=1.0, metavar="P",
        help="keep the fewest pairs that reach this probability (1: all)")  # fmt: skip
    add("--top-k", type=in_range(ranges.TOP_K), default=0, metavar="K",
        help="keep so many of the likeliest pairs (0: all)")  # fmt: skip
    add("--min-p", type=in_range(ranges.MIN_P), default=0.0, metavar="P",
        help="keep pairs of at least this share of the likeliest's probability (0: all)")  # fmt: skip
    add(
        "--boundary-threshold",
        type=in_range(ranges.BOUNDARY_THRESHOLD, none=False),
        metavar="T",
        help="a byte ends a chunk where the model gives that more, under --scoring official also where the router's p "
        "for a prompt's byte is above it; none: bits are drawn, the router's above 0.5 (an export's own, or none)",
    )
    add(
        "--seed",
        type=in_range(ranges.SEED),
        default=0,
        metavar="N",
        help="of the draws; prompt i, from 0, draws with seed + i (0)",
    )
    add("--utf8", **choice("raw", "constrain"), default="raw", help="constrain: never a byte that is no UTF-8 (raw)")


def _add_ends(add: Any) -> None:
    add("--max-new-bytes", type=in_range(ranges.SIZE), default=256, metavar="N",
        help="bytes at most; the end of the document stops earlier. 0 only reads the prompts (256)")  # fmt: skip
    add("--stop", type=judged(_stop_text), action="append", metavar="TEXT",
        help="end in front of this text, which is not shown; may be repeated (none)")  # fmt: skip


def _add_speed(add: Any) -> None:
    add("--batch-size", type=in_range(ranges.COUNT), default=8, metavar="N",
        help="prompts that run side by side where nothing is streamed (8)")  # fmt: skip
    add(
        "--speculate",
        type=in_range(ranges.SIZE, auto="auto"),
        default=0,
        metavar="K",
        help="bytes drafted behind a chunk's end, or auto for what is measured to be fastest; the text is the same (0)",
    )
    add(
        "--kernels",
        **choice("auto", "fused", "reference"),
        default="auto",
        help="on a CPU, the compiled step where it is built (python -m megabyte_distill.kernels build step), or "
        "torch's (auto)",
    )


def _stop_text(text: str) -> bytes:
    if not text:
        raise ValueError("got '', expected a text of at least one byte; leave the flag out to stop at none")
    return _raw(text)


def check(arguments: argparse.Namespace) -> Iterable[str]:
    """What is wrong with the flags together, with the folder and with the prompts."""
    if arguments.teacher:
        yield from typed(arguments, _OF_STUDENTS, "{flag}: is for students; beside --teacher leave {flag} out")
    if arguments.load is not None and arguments.teacher:
        yield from problems_of("--load", lambda: teacher_of(arguments.load))
    elif arguments.load is not None:
        folder = problems_of("--load", lambda: require_student(arguments.load))
        yield from folder or problems_of("--stage", lambda: require_stage_of(arguments.load, arguments.stage))
    if arguments.prompt:
        yield from problems_of("--prompt", lambda: prompts_of(arguments))
    is_official, sums_bits = arguments.scoring == "official", arguments.generation == "bytes"
    if is_official and sums_bits:
        yield "--scoring official: reads a prompt along one path and draws pairs; leave --generation bytes out"
    if sums_bits and arguments.boundary_threshold:
        yield "--boundary-threshold: decides bits, and --generation bytes sums over them; leave one of the two out"
    if is_official:
        yield from typed(
            arguments, ["--paths", "--path-window"], "{flag}: --scoring official reads along one path; leave {flag} out"
        )
    if is_official or sums_bits:
        why = "is for --generation joint --scoring paths; leave it out"
        yield from [f"--speculate: got {arguments.speculate}, which {why}"] if arguments.speculate else []
        yield from [f"--kernels: got fused, which {why}"] if arguments.kernels == "fused" else []
    if arguments.stream or arguments.interactive:
        yield from typed(
            arguments, ["--batch-size"], "{flag}: --stream and --interactive run one prompt at a time; leave {flag} out"
        )
    if arguments.stream and arguments.show_boundaries and sums_bits:
        yield "--stream: with --generation bytes --show-boundaries knows the bits at the end; leave --stream out"


def threshold_of(arguments: argparse.Namespace) -> float | None:
    """The flag's, or what the folder says where bits are drawn at all."""
    if arguments.boundary_threshold is None and arguments.generation == "joint":
        return stored_threshold(arguments.load)
    return arguments.boundary_threshold or None


def settings_of(arguments: argparse.Namespace) -> GenerationSettings:
    """What the flags say."""
    from megabyte_distill.inference.generation import GenerationMode, GenerationSettings, PromptReading
    from megabyte_distill.inference.sampling import Sampling
    from megabyte_distill.inference.utf8 import Utf8Mode

    sampling = Sampling(
        temperature=arguments.temperature,
        top_p=arguments.top_p,
        top_k=arguments.top_k,
        min_p=arguments.min_p,
        boundary_threshold=threshold_of(arguments),
    )
    return GenerationSettings(
        max_new_bytes=arguments.max_new_bytes,
        sampling=sampling,
        paths=arguments.paths,
        path_window=arguments.path_window,
        seed=arguments.seed,
        mode=GenerationMode(arguments.generation),
        reading=PromptReading(arguments.scoring),
        stop=tuple(arguments.stop or ()),
        utf8=Utf8Mode(arguments.utf8),
    )


def prompts_of(arguments: argparse.Namespace) -> list[bytes]:
    """The prompts that the command line names; ValueError for bytes that no text has."""
    if arguments.prompt_file is not None:
        return [prompt_bytes(arguments.prompt_file.read_bytes(), f"--prompt-file {arguments.prompt_file}")]
    texts = arguments.prompt or []
    return [prompt_bytes(_raw(text), prompt_name(number, len(texts))) for number, text in enumerate(texts)]


def _raw(text: str) -> bytes:
    """Bytes that are no UTF-8 arrive as escapes on the command line."""
    return text.encode("utf-8", "surrogateescape")


def run(arguments: argparse.Namespace) -> None:
    """Generates and prints; ValueError for what the user can mend."""
    prompts, settings = prompts_of(arguments), settings_of(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="surrogateescape")
    with _opened(settings, arguments) as begin:
        unit = "token" if arguments.teacher else "chunk"
        screen = Screen(begin, settings, with_boundaries=arguments.show_boundaries, unit=unit)
        if arguments.interactive:
            interact(screen, streams=arguments.stream is not False)
        elif arguments.stream or (arguments.stream is None and len(prompts) == 1):
            for number, prompt in enumerate(prompts):
                screen.stream(prompt, number, len(prompts))
            screen.report()
        else:
            # the engine itself runs so many side by side
            is_engine = _has_engine(settings) and not arguments.teacher
            side_by_side = len(prompts) if is_engine else arguments.batch_size
            for first in range(0, len(prompts), side_by_side):
                screen.show(prompts[first : first + side_by_side], first, len(prompts))
            screen.report()


@contextlib.contextmanager
def _opened(settings: GenerationSettings, arguments: argparse.Namespace) -> Iterator[Begin]:
    """What begins continuations while the model is there; ValueError for a demand that cannot be met."""
    # torch takes seconds to import, which --help and a mistyped flag should not
    from megabyte_distill.student_folders import open_student, open_teacher

    if not arguments.teacher:
        with open_student(arguments.load, arguments.stage) as student:
            yield _writer(student, settings, arguments)
        return
    from megabyte_distill.inference.teacher_generation import TeacherGeneration

    with open_teacher(arguments.load) as (backbone, _, token_bytes):
        yield lambda prompts, seeded, names: TeacherGeneration(backbone, token_bytes, prompts, seeded, names)


def _has_engine(settings: GenerationSettings) -> bool:
    """Whether the engine writes this; plain generation does everything."""
    from megabyte_distill.inference.generation import GenerationMode, PromptReading

    return settings.mode is GenerationMode.JOINT and settings.reading is PromptReading.PATHS


def _writer(student: Student, settings: GenerationSettings, arguments: argparse.Namespace) -> Begin:
    """What begins continuations; ValueError for a demand that cannot be met."""
    from megabyte_distill.config.training import KernelMode
    from megabyte_distill.inference.engine import Engine
    from megabyte_distill.inference.generation import Generation

    kernels, speculate = KernelMode(arguments.kernels), arguments.speculate
    if student.is_official or not _has_engine(settings):
        if speculate or kernels is KernelMode.FUSED:
            raise ValueError(
                "--speculate and --kernels fused: not of a student in official dechunk mode; leave them out"
            )
        return lambda prompts, seeded, names: Generation(student, prompts, seeded, names)
    engine = Engine(student, max_batch_size=arguments.batch_size, speculate=speculate, kernels=kernels)
    return lambda prompts, seeded, names: engine.begin(prompts, seeded, names=names)


def interact(screen: Screen, *, streams: bool) -> None:
    """Prompts from the terminal until it has no more; help and the sign for a prompt are on stderr."""
    is_terminal = sys.stdin.isatty()
    marker = "> " if is_terminal else ""
    print(_HELP, file=sys.stderr)
    turn = 0
    while True:
        print(marker, end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline()  # not input(): its line editor drops bytes that are no character
        if not line:
            return
        if line.strip() == b"/help":
            print(_HELP, file=sys.stderr)
            continue
        prompt = line.removesuffix(b"\n")
        try:
            if is_terminal and len(prompt) >= _TERMINAL_LINE:
                raise ValueError(
                    f"the line has {len(prompt)} bytes, and a terminal drops what is behind {_TERMINAL_LINE}; give a "
                    "longer prompt with --prompt-file"
                )
            if streams:
                screen.stream(prompt, turn)
            else:
                screen.show([prompt], turn, 1)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        except KeyboardInterrupt:
            print(file=sys.stderr)  # behind the terminal's ^C
        screen.report()
        turn += 1


@dataclass
class Screen:
    """Prints continuations and keeps the figures of the last report."""

    begin: Begin
    settings: GenerationSettings
    with_boundaries: bool
    unit: str = "chunk"
    """What a bit of 1 ends."""

    def __post_init__(self) -> None:
        self._done: list[tuple[bytes, Generated]] = []
        self._seconds = 0.0
        self._started: float | None = None

    def stream(self, prompt: bytes, number: int, count: int = 1) -> None:
        """One prompt of ``count``, as its characters come; whole at the end where bits are unknown until then (bytes).

        Whatever ends it, Ctrl-C too: all that was written by then is shown, held back or not.
        """
        from megabyte_distill.inference.chunk_marks import marked_characters
        from megabyte_distill.inference.generation import GenerationMode, complete_characters, new_pairs

        if self.with_boundaries and self.settings.mode is GenerationMode.BYTES:
            self.show([prompt], number, count)
            return
        running = self._begin([prompt], number, count)

        def characters(new: Iterable[tuple[int, bool]]) -> Iterator[str]:
            if not self.with_boundaries:
                return complete_characters(itertools.chain(prompt, (byte for byte, _ in new)), errors=_errors())
            known = zip(prompt, running.prompt_bits[0], strict=True)
            return marked_characters(itertools.chain(known, new), colour=sys.stdout.isatty())

        _label(number, count)
        shown = 0
        try:
            for text in characters(self._clocked(new_pairs(running, self.settings.stop))):
                print(text, end="", flush=self._started is not None)
                shown += 1
        finally:
            self._note(running)
            row = self._done[-1][1]
            rest = itertools.islice(characters(zip(row.byte_ids, row.bits, strict=True)), shown, None)
            print("".join(rest), flush=True)

    def show(self, prompts: list[bytes], first: int, count: int) -> None:
        """Prompts side by side, each whole; the first is number ``first`` of ``count``.

        Ctrl-C shows what there is of an only one; of several it could not be told which are whole.
        """
        running = self._begin(prompts, first, count)
        try:
            for _ in self._clocked(running):
                pass
        except KeyboardInterrupt:
            if count == 1:
                self._show_written(running, first, count)
            raise
        self._show_written(running, first, count)

    def _show_written(self, running: Continuations | Session, first: int, count: int) -> None:
        from megabyte_distill.inference.chunk_marks import mark_chunks

        self._note(running)
        for number, (prompt, row) in enumerate(self._done[-len(running.prompts) :], start=first):
            _label(number, count)
            text = prompt + row.byte_ids
            if self.with_boundaries:
                print(mark_chunks(text, [*row.prompt_bits, *row.bits], colour=sys.stdout.isatty()), flush=True)
            else:
                print(text.decode("utf-8", _errors()), flush=True)

    def _begin(self, prompts: list[bytes], first: int, count: int) -> Continuations | Session:
        names = [prompt_name(number, count) for number in range(first, first + len(prompts))]
        return self.begin(prompts, replace(self.settings, seed=self.settings.seed + first), names)

    def _clocked(self, new: Iterable[NewT]) -> Iterator[NewT]:
        """``new``, the clock running from the first that is asked for; what was printed before is out by then."""
        sys.stdout.flush()
        self._started = time.perf_counter()
        yield from new

    def _note(self, running: Continuations | Session) -> None:
        """Stops the clock, if it runs, and keeps what was written."""
        if self._started is not None:
            self._seconds += time.perf_counter() - self._started
        self._started = None
        self._done += zip(running.prompts, running.results(), strict=True)

    def report(self) -> None:
        """Figures of all that was generated since the last one, on stderr; nothing where nothing was."""
        from megabyte_distill.inference.utf8 import count_invalid

        if not self._done:
            return
        rows = [row for _, row in self._done]
        size = sum(len(row.byte_ids) for row in rows)
        speed = f"{size / max(self._seconds, 1e-9):.0f} bytes/s"
        parts = [f"{size} byte{'' if size == 1 else 's'} in {self._seconds:.1f} s ({speed})"]
        bits = [bit for row in rows for bit in (*row.prompt_bits, *row.bits)]
        if any(bits):
            parts.append(f"{len(bits) / sum(bits):.2f} bytes per {self.unit}, prompts included")
        invalid = sum(count_invalid(row.byte_ids, begun=prompt, ended=row.ended) for prompt, row in self._done)
        part = f"{invalid} of {size} ({100 * invalid / max(size, 1):.1f} %) belong to no character"
        parts.append(f"new bytes: {part if invalid else 'valid UTF-8'}")
        parts.append(f"{sum(row.ended for row in rows)} of {len(rows)} ended by the model")
        reasons = {
            "ended by --stop": sum(row.stopped_by is not None for row in rows),
            "out of the backbone's positions": sum(row.is_full for row in rows),
        }
        parts += [f"{count} {reason}" for reason, count in reasons.items() if count]
        print(", ".join(parts), file=sys.stderr)
        self._done, self._seconds = [], 0.0


def _label(number: int, count: int) -> None:
    if count > 1:
        print(f"--- {prompt_name(number, count)} ---", flush=True)


def _errors() -> str:
    """What becomes of bytes that are no UTF-8: a terminal shows U+FFFD, a file or a pipe gets the bytes."""
    return "replace" if sys.stdout.isatty() else "surrogateescape"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_tool(build_parser(), run, argv, check=check)


if __name__ == "__main__":
    sys.exit(main())
