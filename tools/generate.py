"""Generates bytes from a trained run.

    python tools/generate.py --load RUN --prompt "It was a"
    python tools/generate.py --load RUN --prompt-file FILE --temperature 0.8 --top-p 0.95 --show-boundaries

Prints the prompt and its continuation, each character as soon as its bytes are there. Exit code 0, or 2 with one line
that begins with "error:".
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megabyte_distill.tool import run_tool

if TYPE_CHECKING:
    from megabyte_distill.inference.generation import GenerationSettings
    from megabyte_distill.model.student import Student

_SHADES = ("\x1b[48;5;236m", "\x1b[48;5;24m")
_PLAIN = "\x1b[0m"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--load", type=Path, required=True, metavar="RUN", help="folder of a training run")
    add("--stage", help="stage whose weights are taken (default: the last complete one)")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help='text to continue; "" starts a document')
    prompt.add_argument("--prompt-file", type=Path, metavar="FILE", help="its bytes are the prompt, as they are")
    add("--temperature", type=float, default=1.0, help="0 takes the likeliest pair of byte and bit (1)")
    add("--top-p", type=float, default=1.0, help="keep the fewest pairs that reach this probability (1: all)")
    add("--top-k", type=int, default=0, help="keep so many of the likeliest pairs (0: all)")
    add("--seed", type=int, default=0, help="of the random draws (0)")
    add("--max-new-bytes", type=int, default=256, help="bytes at most; the end of the document stops earlier (256)")
    add("--paths", type=int, default=4, help="bit histories along which the prompt is read (4)")
    add("--show-boundaries", action="store_true", help="mark where chunks end: by colour, or by | where there is none")
    return parser


def run(arguments: argparse.Namespace) -> None:
    """Generates and prints; ValueError for what the user can mend."""
    from megabyte_distill.inference.generation import GenerationSettings
    from megabyte_distill.inference.prompts import prompt_bytes
    from megabyte_distill.inference.sampling import Sampling

    if arguments.prompt_file is not None:
        raw = arguments.prompt_file.read_bytes()
    else:  # bytes that are no UTF-8 arrive as escapes on the command line
        raw = arguments.prompt.encode("utf-8", "surrogateescape")
    prompt = prompt_bytes(raw)
    sampling = Sampling(temperature=arguments.temperature, top_p=arguments.top_p, top_k=arguments.top_k)
    settings = GenerationSettings(
        max_new_bytes=arguments.max_new_bytes, sampling=sampling, paths=arguments.paths, seed=arguments.seed
    )
    # megatron takes seconds to import, which --help and a bad prompt should not
    from megabyte_distill.parallel.process_groups import world
    from megabyte_distill.runs import load_student, require_speaking

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding="utf-8", errors="replace")
    with world():
        loaded = load_student(arguments.load, arguments.stage)
        require_speaking(loaded)
        show = _show_boundaries if arguments.show_boundaries else _stream
        show(loaded.student, prompt, settings)


def _stream(student: Student, prompt: bytes, settings: GenerationSettings) -> None:
    from megabyte_distill.inference.generation import Generation, complete_characters, new_bytes

    running = Generation(student, [prompt], settings)
    # a character that the prompt leaves open is shown with its end
    print(prompt.decode("utf-8", errors="ignore"), end="", flush=True)
    started, size = time.perf_counter(), 0

    def counted() -> Iterator[int]:
        nonlocal size
        for byte in new_bytes(running):
            size += 1
            yield byte

    for text in complete_characters(counted(), prompt):
        print(text, end="", flush=True)
    print(flush=True)
    _report(size, time.perf_counter() - started)


def _show_boundaries(student: Student, prompt: bytes, settings: GenerationSettings) -> None:
    from megabyte_distill.inference.generation import generate

    started = time.perf_counter()
    result = generate(student, [prompt], settings)[0]
    bits = [*result.prompt_bits, *result.bits]
    print(mark_chunks(prompt + result.byte_ids, bits, colour=sys.stdout.isatty()), flush=True)
    _report(len(result.byte_ids), time.perf_counter() - started)
    if any(bits):
        print(f"{len(bits) / sum(bits):.2f} bytes per chunk", file=sys.stderr)


def mark_chunks(text: bytes, bits: Sequence[bool], *, colour: bool) -> str:
    """Text [L bytes] with a mark behind each byte whose bit [L] is set, or its chunks in changing colours."""
    chunks, begin = [], 0
    for position, bit in enumerate(bits, start=1):
        if bit or position == len(bits):
            chunks.append(text[begin:position].decode("utf-8", errors="replace"))
            begin = position
    if colour:
        return "".join(f"{_SHADES[number % 2]}{chunk}{_PLAIN}" for number, chunk in enumerate(chunks))
    return "".join(f"{chunk}|" for chunk in chunks[:-1]) + "".join(chunks[-1:]) + ("|" if bits and bits[-1] else "")


def _report(size: int, seconds: float) -> None:
    print(f"{size} bytes in {seconds:.1f} s ({size / max(seconds, 1e-9):.0f} bytes/s)", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_tool(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
