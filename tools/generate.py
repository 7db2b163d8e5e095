"""Generates bytes from a trained run or an exported student.

    python tools/generate.py --load RUN --prompt "It was a" --prompt "She"
    python tools/generate.py --load OUT --prompt-file FILE --temperature 0.8 --top-p 0.95 --show-boundaries
    python tools/generate.py --load RUN --interactive --utf8 constrain

Prints each prompt and its continuation, a single prompt's characters as soon as their bytes are there, and figures on
stderr. Exit code 0, or 2 with one line that begins with "error:".
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from megabyte_distill.tool import run_tool

if TYPE_CHECKING:
    from megabyte_distill.inference.engine_session import Session
    from megabyte_distill.inference.generation import Generated, Generation, GenerationSettings
    from megabyte_distill.model.student import Student

    Begin = Callable[[Sequence[bytes], GenerationSettings], Generation | Session]

_HELP = """Type a prompt and Enter: its continuation follows. An empty line starts a document.
Ctrl-C stops a continuation, Ctrl-D ends, /help shows this. Each turn draws with the next seed."""


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--load", type=Path, required=True, metavar="DIR", help="folder of a training run, or of an exported student")
    add("--stage", help="of a run: stage whose weights are taken (default: the last complete one)")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", action="append", help='text to continue; "" starts a document; may be repeated')
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="its bytes are the prompt, as they are")
    prompt.add_argument("--interactive", action="store_true", help="read prompts from the terminal, one a line")
    add("--temperature", type=float, default=1.0, help="0 takes the likeliest pair of byte and bit (1)")
    add("--top-p", type=float, default=1.0, help="keep the fewest pairs that reach this probability (1: all)")
    add("--top-k", type=int, default=0, help="keep so many of the likeliest pairs (0: all)")
    add("--min-p", type=float, default=0.0, help="keep pairs of at least this share of the likeliest's (0: all)")
    add(
        "--boundary-threshold",
        type=_threshold,
        metavar="T",
        help="a byte ends a chunk where the model gives that more, under --scoring official also where the router's p "
        "for a prompt's byte is above it; none: bits are drawn, the router's above 0.5 (an export's own, or none)",
    )
    add("--seed", type=int, default=0, help="of the random draws; prompt i draws with the seed + i (0)")
    add("--max-new-bytes", type=int, default=256, help="bytes at most; the end of the document stops earlier (256)")
    add("--stop", action="append", metavar="TEXT", help="end in front of this text, which is not shown; repeatable")
    add(
        "--generation",
        choices=("joint", "bytes"),
        default="joint",
        help="draw pairs of byte and bit, or bytes alone, their bits summed out along --paths (joint)",
    )
    add("--paths", type=int, default=4, help="bit histories of a prompt's end, and of --generation bytes (4)")
    add("--path-window", type=int, default=256, help="length of that end; the router cuts what is in front of it (256)")
    add(
        "--scoring",
        choices=("paths", "official"),
        default="paths",
        help="a prompt's chunks: found along --paths, or in the paper's way, its last byte forced to end one (paths)",
    )
    add("--utf8", choices=("raw", "constrain"), default="raw", help="constrain: never a byte that is no UTF-8 (raw)")
    add(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="show characters as they come, prompt after prompt (default: where there is one prompt)",
    )
    add("--batch-size", type=int, default=8, help="prompts that run side by side where nothing is streamed (8)")
    add(
        "--speculate",
        type=_drafts,
        default=0,
        metavar="K",
        help="bytes drafted behind a chunk's end, or auto for what is measured to be fastest; the text is the same (0)",
    )
    add(
        "--kernels",
        choices=("auto", "fused", "reference"),
        default="auto",
        help="on a CPU, the compiled step where it is built (python -m megabyte_distill.kernels build step), or "
        "torch's (auto)",
    )
    add("--show-boundaries", action="store_true", help="mark where chunks end: by colour, or by | where there is none")
    return parser


def _drafts(text: str) -> int | Literal["auto"]:
    return "auto" if text == "auto" else int(text)


def _threshold(text: str) -> float | Literal[False]:
    return False if text == "none" else float(text)


def threshold_of(arguments: argparse.Namespace) -> float | None:
    """The flag's, or what the folder says where bits are drawn at all."""
    from megabyte_distill.student_folders import stored_threshold

    if arguments.boundary_threshold is None and arguments.generation == "joint":
        return stored_threshold(arguments.load)
    given: float | Literal[False] | None = arguments.boundary_threshold
    return None if given is False else given


def settings_of(arguments: argparse.Namespace) -> GenerationSettings:
    """What the flags say; ValueError for values out of range."""
    from megabyte_distill.inference.generation import GenerationMode, GenerationSettings, PromptReading
    from megabyte_distill.inference.sampling import Sampling
    from megabyte_distill.inference.utf8 import Utf8Mode

    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size is {arguments.batch_size}; expected at least 1")
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
        stop=tuple(_raw(text) for text in arguments.stop or ()),
        utf8=Utf8Mode(arguments.utf8),
    )


def prompts_of(arguments: argparse.Namespace) -> list[bytes]:
    """The prompts that the command line names; ValueError for bytes that no text has."""
    from megabyte_distill.inference.prompts import checked_prompts

    if arguments.interactive:
        return []
    if arguments.prompt_file is not None:
        return checked_prompts([arguments.prompt_file.read_bytes()])
    return checked_prompts([_raw(text) for text in arguments.prompt])


def _raw(text: str) -> bytes:
    """Bytes that are no UTF-8 arrive as escapes on the command line."""
    return text.encode("utf-8", "surrogateescape")


def run(arguments: argparse.Namespace) -> None:
    """Generates and prints; ValueError for what the user can mend."""
    from megabyte_distill.student_folders import open_student

    settings, prompts = settings_of(arguments), prompts_of(arguments)
    for stream in (sys.stdin, sys.stdout):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="surrogateescape" if stream is sys.stdin else "replace")
    with open_student(arguments.load, arguments.stage) as student:
        begin = _writer(student, settings, arguments)
        screen = Screen(begin, settings, with_boundaries=arguments.show_boundaries)
        if arguments.interactive:
            interact(screen, streams=arguments.stream is not False)
        elif arguments.stream or (arguments.stream is None and len(prompts) == 1):
            for number, prompt in enumerate(prompts):
                _label(number, len(prompts))
                screen.stream(prompt, number)
            screen.report()
        else:
            # the engine itself runs so many side by side
            side_by_side = len(prompts) if _has_engine(settings) else arguments.batch_size
            for first in range(0, len(prompts), side_by_side):
                screen.show(prompts[first : first + side_by_side], first, len(prompts))
            screen.report()


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
                "--speculate and --kernels fused are for --generation joint --scoring paths; leave them out"
            )
        return lambda prompts, seeded: Generation(student, prompts, seeded)
    engine = Engine(student, max_batch_size=arguments.batch_size, speculate=speculate, kernels=kernels)
    return engine.begin


def interact(screen: Screen, *, streams: bool) -> None:
    """Prompts from the terminal until it has no more."""
    marker = "> " if sys.stdin.isatty() else ""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() edits lines with it
    print(_HELP, file=sys.stderr)
    turn = 0
    while True:
        try:
            line = input(marker)
        except EOFError:
            return
        if line.strip() == "/help":
            print(_HELP, file=sys.stderr)
            continue
        try:
            if streams:
                screen.stream(_raw(line), turn)
            else:
                screen.show([_raw(line)], turn, 1)
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            continue
        except KeyboardInterrupt:
            print(flush=True)
        screen.report()
        turn += 1


@dataclass
class Screen:
    """Prints continuations and keeps the figures of the last report."""

    begin: Begin
    settings: GenerationSettings
    with_boundaries: bool

    def __post_init__(self) -> None:
        self._done: list[tuple[bytes, Generated]] = []
        self._seconds = 0.0

    def stream(self, prompt: bytes, number: int) -> None:
        """One prompt, as its characters come. With the bits unknown until the end (bytes), whole at the end."""
        from megabyte_distill.inference.chunk_marks import marked_characters
        from megabyte_distill.inference.generation import GenerationMode, complete_characters, new_bytes, new_pairs

        if self.with_boundaries and self.settings.mode is GenerationMode.BYTES:
            self.show([prompt], number, 1)
            return
        running = self._begin([prompt], number)
        if self.with_boundaries:
            known = zip(prompt, running.prompt_bits[0], strict=True)
            pieces = marked_characters(
                itertools.chain(known, new_pairs(running, self.settings.stop)), colour=sys.stdout.isatty()
            )
        else:
            # a character that the prompt leaves open is shown with its end
            print(prompt.decode("utf-8", errors="ignore"), end="", flush=True)
            pieces = complete_characters(new_bytes(running, self.settings.stop), prompt)
        with self._timed(running):
            for piece in pieces:
                print(piece, end="", flush=True)
            print(flush=True)

    def show(self, prompts: list[bytes], first: int, count: int) -> None:
        """Prompts side by side, each whole; the first is number ``first`` of ``count``."""
        from megabyte_distill.inference.chunk_marks import mark_chunks

        running = self._begin(prompts, first)
        with self._timed(running):
            for _ in running:
                pass
        for number, (prompt, row) in enumerate(self._done[-len(prompts) :], start=first):
            _label(number, count)
            text = prompt + row.byte_ids
            if self.with_boundaries:
                print(mark_chunks(text, [*row.prompt_bits, *row.bits], colour=sys.stdout.isatty()), flush=True)
            else:
                print(text.decode("utf-8", errors="replace"), flush=True)

    def _begin(self, prompts: list[bytes], first: int) -> Generation | Session:
        return self.begin(prompts, replace(self.settings, seed=self.settings.seed + first))

    @contextlib.contextmanager
    def _timed(self, running: Generation | Session) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds += time.perf_counter() - started
            self._done += zip(running.prompts, running.results(), strict=True)

    def report(self) -> None:
        """Figures of all that was generated since the last one, on stderr."""
        from megabyte_distill.inference.utf8 import count_invalid

        rows = [row for _, row in self._done]
        size = sum(len(row.byte_ids) for row in rows)
        parts = [f"{size} bytes in {self._seconds:.1f} s ({size / max(self._seconds, 1e-9):.0f} bytes/s)"]
        bits = [bit for row in rows for bit in (*row.prompt_bits, *row.bits)]
        if any(bits):
            parts.append(f"{len(bits) / sum(bits):.2f} bytes per chunk")
        invalid = sum(count_invalid(row.byte_ids, begun=prompt, ended=row.ended) for prompt, row in self._done)
        parts.append(f"{invalid} of {size} bytes no UTF-8" if invalid else "valid UTF-8")
        reasons = {
            "ended by the model": sum(row.ended for row in rows),
            "ended by --stop": sum(row.stopped_by is not None for row in rows),
            "out of the backbone's positions": sum(row.is_full for row in rows),
        }
        parts += [f"{count} {reason}" for reason, count in reasons.items() if count]
        print(", ".join(parts), file=sys.stderr)
        self._done, self._seconds = [], 0.0


def _label(number: int, count: int) -> None:
    if count > 1:
        print(f"--- prompt {number + 1} of {count} ---", flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_tool(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
