"""How fast bytes come out, beside the token teacher under transformers' ``generate``: CPU, fp32, greedy, one process.

    python benchmarks/generation.py [--load RUN] [--quick] [--threads 1]

(a) the teacher with its key/value cache, its tokens counted in bytes; (b) the engine; (c) the engine with drafts. All
write the same number of bytes behind prompts of the same length, in turns, and the fastest of the repeats counts.
Shapes are those of the embedded teacher with the tiny preset around it, and of SmolLM2-135M with the paper's byte side
in proportion. Speed does not ask what weights say, so they are random, and a held-out text decides what is written: its
bytes, its words as chunks (4.6 bytes; a token counts as much), and how many drafts a backbone pass finds right, drawn
from what a trained model showed (that of RUN where it is given). (b) and (c) are handed their prompts' bits, one packed
pass; "from_text" is (b) as it reads a prompt by itself, along four bit histories. With RUN, the trained model itself
also writes what it likes; its drafts are fitted to the embedded training text beforehand, but for "unfitted".

The last line is JSON, everything in ratios to (a) but what is named otherwise; the exit code is 1 where one of
FLOORS or CEILINGS is not kept.
"""

from __future__ import annotations

import argparse
import json
import lzma
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megabyte_distill.alphabet import BOS_BYTE, PAD_BYTE, joint_class
from megabyte_distill.config.model import BackboneConfig, ByteMixer, ByteSideConfig
from megabyte_distill.config.presets import PRESETS
from megabyte_distill.hf.torch_backbone import TorchBackbone
from megabyte_distill.inference.engine import Engine
from megabyte_distill.inference.generation import Generated, GenerationSettings, generate
from megabyte_distill.inference.sampling import Sampling
from megabyte_distill.kernels import build
from megabyte_distill.model.student import Student

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "examples" / "tiny"
GREEDY = Sampling(temperature=0)
SAMPLED = Sampling()
DRAFTS, DEMO_DRAFTS = 8, 16
"""Bytes drafted behind a chunk's end: where speed is measured, and where backbone passes are counted."""
PROMPT = 32
EARLY, LATE, SPAN = 384, 7936, 256
"""Bytes read before, and bytes measured behind them: around byte 512 and up to byte 8,192."""
TURN, UNCOUNTED, ROUNDS = 32, 8, 8
"""Bytes of one arm, how many of them do not count, and how often all is done again."""
WINDOW = 64
"""Chunks; fewer than stand in front of byte 384."""
FLOORS = {"tiny_plain": 0.4, "smollm2_plain": 0.8, "demo_auto_to_plain": 0.95}
"""What figures whose names begin so are at least."""
CEILINGS = {"demo_backbone_pass_ratio": 0.7}
"""What figures of these names are at most."""
PIECES = re.compile(rb" ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+")
SEEN_RUNS = (209, 398, 44, 21, 69, 60, 58, 11, 30, 20, 58, 4, 3, 9, 3, 1, 1)
"""Backbone passes of the demo's model that found 0, 1, … 16 drafts right: greedy, k = 16, 24 held-out prompts."""
LLAMA: dict[str, dict[str, int]] = {
    "tiny": {
        "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 32, "vocab_size": 4096,
    },
    "smollm2": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152,
    },
}  # fmt: skip
SIDE: dict[str, dict[str, Any]] = {
    "tiny": {
        name: value
        for name, value in PRESETS["tiny"].common.items()
        if name in ByteSideConfig.__dataclass_fields__
    },
    # E / 2 and the paper's widths over 3072 / 576
    "smollm2": {
        "byte_width": 288, "byte_mixer": ByteMixer.MAMBA2, "encoder_ffn_hidden_size": 768,
        "decoder_ffn_hidden_size": 768, "router_hidden_size": 1536, "mamba_state_dim": 64, "mamba_head_dim": 32,
    },
}  # fmt: skip


class Text:
    """What is written whatever a model says: row i goes through the text from its own place on."""

    def __init__(self, runs: Sequence[int]) -> None:
        with lzma.open(EXAMPLE / "heldout.jsonl.xz", "rt", encoding="utf-8") as lines:
            raw = "\n".join(json.loads(line)["text"] for line in lines).encode()
        ends = np.cumsum([len(piece) for piece in PIECES.findall(raw)]) - 1
        self.raw = raw
        self._bytes = np.frombuffer(raw, np.uint8).astype(np.int64)
        self._bits = np.zeros(len(raw), bool)
        self._bits[ends] = True
        self.bytes_per_chunk = len(raw) / len(ends)
        counts = np.array(runs)
        self._right = np.random.default_rng(0).choice(len(counts), len(raw), p=counts / counts.sum())

    def prompts(self, rows: int) -> tuple[list[bytes], list[list[bool]]]:
        """Each row's first bytes and their bits."""
        begins = [row * 9973 for row in range(rows)]
        return (
            [self.raw[begin : begin + PROMPT] for begin in begins],
            [self._bits[begin : begin + PROMPT].tolist() for begin in begins],
        )

    def opening(self, size: int) -> tuple[bytes, list[bool]]:
        """The text's first bytes and their bits."""
        return self.raw[:size], self._bits[:size].tolist()

    def classes(
        self, prompts: np.ndarray, places: np.ndarray, drafted: np.ndarray, begin: int = PROMPT
    ) -> torch.Tensor:
        """The pair at each row's place, new bytes counted from ``begin`` on; a draft is right or wrong as the pass that
        will verify it shall find."""
        at = prompts * 9973 + begin + places
        is_wrong = drafted >= self._right[at - np.maximum(drafted, 0)]
        return torch.from_numpy((self._bytes[at] ^ is_wrong) + 256 * self._bits[at])


class Following(Engine):
    """An engine that computes everything and writes a given text."""

    text: Text
    begin_at: int = PROMPT
    """Where in the text the first new byte stands."""

    def pick(
        self, log_probabilities: Any, sampling: Any, uniform: Any, *, prompts: Any, places: Any, drafted: Any
    ) -> Any:
        log_probabilities.argmax(-1)
        return self.text.classes(prompts, places, drafted, self.begin_at)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--load", type=Path, metavar="RUN", help="a trained run, for what only a real model shows")
    parser.add_argument("--quick", action="store_true", help="short: under a minute")
    parser.add_argument("--threads", type=int, default=1, help="of torch (1)")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement, of which the fastest counts (3)")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    try:
        build.step_library_path().exists() or build.build_step()
    except build.BuildError as error:
        print(f"without the fused step: {error}", file=sys.stderr)
    figures: dict[str, Any] = {"threads": arguments.threads, "draft_bytes": DRAFTS}
    real = of_a_real_model(arguments.load, arguments.quick) if arguments.load else {"demo_backbone_pass_ratio": None}
    text = Text(real.pop("runs", SEEN_RUNS))
    figures["bytes_per_chunk"] = round(text.bytes_per_chunk, 2)
    repeats = 1 if arguments.quick else arguments.repeats
    for name in LLAMA:
        count = (220 if name == "tiny" else 64) if arguments.quick else (880 if name == "tiny" else 220)
        batches = (1, 8) if arguments.quick else (1, 8, 32)
        figures |= beside_the_teacher(name, text, count, batches, repeats)
    if not arguments.quick:
        torch.set_num_threads(1)
        figures |= along_the_length(text, ROUNDS)
    figures |= real
    figures["missed"] = [] if arguments.quick else missed(figures)
    print(json.dumps(figures))
    return 1 if figures["missed"] else 0


def missed(figures: dict[str, Any]) -> list[str]:
    """The figures that are beyond their floor or ceiling, in words."""
    below = [
        f"{name} {value} < {floor}"
        for prefix, floor in FLOORS.items()
        for name, value in figures.items()
        if name.startswith(prefix) and value < floor
    ]
    above = [f"{name} {figures[name]} > {most}" for name, most in CEILINGS.items() if (figures.get(name) or 0) > most]
    return below + above


def make_student(name: str, window: int | None = None) -> Student:
    """Random weights in the shapes named; with ``window``, no layer attends to more than so many chunks."""
    shape = LLAMA[name]
    backbone = BackboneConfig(
        family="llama",
        num_layers=shape["num_hidden_layers"],
        hidden_size=shape["hidden_size"],
        ffn_hidden_size=shape["intermediate_size"],
        num_attention_heads=shape["num_attention_heads"],
        num_query_groups=shape["num_key_value_heads"],
        head_dim=shape["head_dim"],
        vocab_size=shape["vocab_size"],
        norm_eps=1e-5,
        rope_theta=1e4,
        tied_embeddings=True,
        sliding_window=window,
        sliding_layers=tuple(range(shape["num_hidden_layers"])) if window else (),
    )
    return Student(ByteSideConfig(backbone_width=shape["hidden_size"], **SIDE[name]), TorchBackbone(backbone)).eval()


def make_teacher(name: str) -> Any:
    """transformers' model, which never ends a document."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(tie_word_embeddings=True, **LLAMA[name])).eval()
    model.generation_config.eos_token_id = None
    return model


def following(student: Student, text: Text, **options: Any) -> Following:
    """An engine that writes the text."""
    engine = Following(student, **options)
    engine.text = text
    return engine


def beside_the_teacher(name: str, text: Text, count: int, batches: Sequence[int], repeats: int) -> dict[str, float]:
    """Ratios of (b) and (c) to (a), and the bytes a second of (a)."""
    teacher, student = make_teacher(name), make_student(name)
    engines = {"plain": following(student, text), "speculative": following(student, text, speculate=DRAFTS)}
    figures: dict[str, float] = {}
    for rows in batches:
        tokens = torch.randint(3, 4000, (rows, max(1, round(PROMPT / text.bytes_per_chunk))))
        prompts, bits = text.prompts(rows)
        settings = GenerationSettings(max_new_bytes=count, sampling=GREEDY)

        def write_tokens(tokens: torch.Tensor = tokens) -> None:
            teacher.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=round(count / text.bytes_per_chunk),
                do_sample=False, pad_token_id=0,
            )  # fmt: skip

        ways: dict[str, Callable[[], Any]] = {"teacher": write_tokens}
        for way, engine in engines.items():
            ways[way] = lambda engine=engine, p=prompts, b=bits, s=settings: engine.generate(p, s, prompt_bits=b)
        ways["from_text"] = lambda p=prompts, s=settings: engines["plain"].generate(p, s)
        seconds = fastest(ways, repeats)
        figures[f"{name}_teacher_bytes_per_second_b{rows}"] = round(rows * count / seconds["teacher"], 1)
        for way in (*engines, "from_text"):
            figures[f"{name}_{way}_b{rows}"] = round(seconds["teacher"] / seconds[way], 2)
        print(json.dumps({key: value for key, value in figures.items() if key.endswith(f"b{rows}")}), file=sys.stderr)
    counts = engines["speculative"].counts
    figures[f"{name}_backbone_passes_per_byte"] = round(counts.backbone_passes / counts.new_bytes, 3)
    return figures


def fastest(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Seconds of each way's fastest run; the ways alternate, after one run of each that does not count."""
    best = dict.fromkeys(ways, float("inf"))
    for repeat in range(repeats + 1):
        for name, run in ways.items():
            started = time.perf_counter()
            run()
            if repeat:
                best[name] = min(best[name], time.perf_counter() - started)
    return best


def along_the_length(text: Text, repeats: int) -> dict[str, float]:
    """A byte's cost near byte 8,192 over that near byte 512, inside chunks and at their ends.

    ``…_beyond_attention``: the same of a backbone that attends to the last 64 chunks alone, at either place; whatever
    else grows with the length shows there. ``late_to_early_at_ends_read``: the weights, keys and values that the step
    of a chunk's end reads, counted, which is what attention explains. Both places write the same bytes, and the four
    arms go on in turns. Processor time, of each byte the least of the repeats; the first bytes of a turn, which find
    the processor's caches full of another arm's numbers, do not count. For one thread: threads that wait for others
    spend processor time too.
    """
    students = {"": make_student("tiny"), "_beyond_attention": make_student("tiny", window=WINDOW)}
    places = (EARLY, LATE)
    best = {(kind, place): np.full(SPAN, np.inf) for kind in students for place in places}
    is_end = np.zeros(SPAN, bool)
    for repeat in range(repeats):
        runs = {(kind, place): RowAt(students[kind], text, place) for kind, place in best}
        for first in range(0, SPAN, TURN):
            for arm, run in sorted(runs.items(), reverse=repeat % 2 == 1):
                for place in range(first, first + TURN):
                    seconds, is_end[place] = run.next_byte()
                    best[arm][place] = min(best[arm][place], seconds)
    counts = np.arange(SPAN) % TURN >= UNCOUNTED
    early, late = (numbers_read(students[""], text, place) for place in places)
    return {
        f"late_to_early_{name}{kind}": round(float(best[kind, LATE][which].sum() / best[kind, EARLY][which].sum()), 2)
        for name, which in (("inside_chunks", counts & ~is_end), ("at_ends", counts & is_end))
        for kind in students
    } | {"late_to_early_at_ends_read": round(late / early, 2)}


def numbers_read(student: Student, text: Text, place: int) -> int:
    """By the step of a chunk's end amid what is measured behind so many bytes, of a student in the tiny shape."""
    shape = LLAMA["tiny"]
    unread = ("router.", "byte_encoder.embedding.", "byte_decoder.embedding.", "backbone.model.embed_tokens.")
    weights = sum(own.numel() for name, own in student.named_parameters() if not name.startswith(unread))
    _, bits = text.opening(place + SPAN // 2)
    keys = shape["num_hidden_layers"] * shape["num_key_value_heads"] * shape["head_dim"]
    return weights + 2 * keys * (1 + sum(bits))


class RowAt:
    """A row that has read so many bytes and writes on, the same bytes wherever it stands."""

    def __init__(self, student: Student, text: Text, place: int) -> None:
        self._engine = following(student, text)
        self._engine.begin_at = EARLY
        prompt, bits = text.opening(place)
        settings = GenerationSettings(max_new_bytes=SPAN + 1, sampling=GREEDY)
        self._bytes = iter(self._engine.begin([prompt], settings, prompt_bits=[bits]))
        next(self._bytes)  # chosen by what read the prompt

    def next_byte(self) -> tuple[float, bool]:
        """Seconds of processor time, and whether the backbone ran."""
        before, started = self._engine.counts.backbone_passes, time.process_time()
        next(self._bytes)
        return time.process_time() - started, self._engine.counts.backbone_passes > before


def of_a_real_model(run: Path, quick: bool) -> dict[str, Any]:
    """Backbone passes a byte and speed of a trained run with drafts over those without; and how drafts fared."""
    from megabyte_distill.parallel.process_groups import world
    from megabyte_distill.runs import load_student

    with world():
        student = load_student(run).student
        prompts = [text[:60] for text in documents("heldout", 4 if quick else 16)]
        learned = [text[:2000] for text in documents("train", 10 if quick else 110)]
        figures: dict[str, Any] = {}
        for name, sampling in (("", GREEDY), ("_sampled", SAMPLED)):
            settings = GenerationSettings(max_new_bytes=96 if quick else 256, sampling=sampling)
            found = drafts_against_plain(student, prompts, learned, settings, 1 if quick else 3)
            if name:
                found.pop("runs")
            figures |= {f"{key}{name}": value for key, value in found.items()}
        print(json.dumps(figures), file=sys.stderr)
        return figures


def drafts_against_plain(
    student: Student, prompts: Sequence[bytes], learned: Sequence[bytes], settings: GenerationSettings, repeats: int
) -> dict[str, Any]:
    """One prompt at a time, its bits known; AssertionError where a byte is not that of plain generation."""
    expected = [generate(student, [prompt], settings)[0] for prompt in prompts]
    engines = {"plain": Engine(student), "speculative": Engine(student, speculate=DEMO_DRAFTS)}
    engines["auto"] = Engine(student, speculate="auto")
    for name in ("speculative", "auto"):
        engines[name].learn_drafts(learned)
    written: dict[str, list[bytes]] = {}

    def write(name: str) -> None:
        written[name] = [
            engines[name].generate([prompt], settings, prompt_bits=[own.prompt_bits])[0].byte_ids
            for prompt, own in zip(prompts, expected, strict=True)
        ]

    seconds = fastest({name: lambda name=name: write(name) for name in engines}, repeats)
    # once: a second time it would have seen what it is to guess
    engines["unfitted"] = Engine(student, speculate=DEMO_DRAFTS)
    write("unfitted")
    wanted = [own.byte_ids for own in expected]
    assert all(own == wanted for own in written.values()), "drafts changed what was written"
    if settings.sampling == GREEDY:
        for engine in (Engine(student, max_batch_size=len(prompts)), engines["speculative"]):
            assert [own.byte_ids for own in engine.generate(prompts, settings)] == wanted, "a batch changed the text"
    rates = {name: engine.counts.backbone_passes / engine.counts.new_bytes for name, engine in engines.items()}
    margin = (
        {"demo_smallest_margin": smallest_margin(student, prompts, expected)} if settings.sampling == GREEDY else {}
    )
    return margin | {
        "demo_backbone_pass_ratio": round(rates["speculative"] / rates["plain"], 3),
        "demo_backbone_pass_ratio_unfitted": round(rates["unfitted"] / rates["plain"], 3),
        "demo_speculative_to_plain": round(seconds["plain"] / seconds["speculative"], 2),
        "demo_auto_to_plain": round(seconds["plain"] / seconds["auto"], 2),
        "runs": [engines["speculative"].counts.runs[length] for length in range(DEMO_DRAFTS + 1)],
    }


@torch.no_grad()
def smallest_margin(student: Student, prompts: Sequence[bytes], written: Sequence[Generated]) -> float:
    """Between the likeliest pair and the next, of logits from reading it all again; AssertionError where the likeliest
    is not what greedy generation took."""
    smallest = float("inf")
    for prompt, own in zip(prompts, written, strict=True):
        row = OneText(prompt + own.byte_ids, (*own.prompt_bits, *own.bits))
        logits = student(row).logits[len(prompt) : -1] if own.byte_ids else student(row).logits[:0]
        logits[:, [joint_class(PAD_BYTE, 0), joint_class(PAD_BYTE, 1)]] = -torch.inf
        best = logits.topk(2)
        taken = [byte + 256 * bit for byte, bit in zip(own.byte_ids, own.bits, strict=True)]
        assert best.indices[:, 0].tolist() == taken, "steps and one pass over the text differ"
        smallest = min(smallest, float((best.values[:, 0] - best.values[:, 1]).min()))
    return round(smallest, 5)


class OneText:
    """A text and its bits as a packed row."""

    chunk_bucket = 1

    def __init__(self, text: Sequence[int], bits: Sequence[bool]) -> None:
        self.byte_ids = torch.tensor([BOS_BYTE, *text])
        self.bits = torch.tensor([True, *bits])
        self.is_real = torch.ones_like(self.bits)
        self.cu_seqlens = torch.tensor([0, len(text) + 1], dtype=torch.int32)


def documents(name: str, count: int) -> Iterator[bytes]:
    """The first documents of the embedded text."""
    with lzma.open(EXAMPLE / f"{name}.jsonl.xz", "rt", encoding="utf-8") as lines:
        for _, line in zip(range(count), lines, strict=False):
            yield json.loads(line)["text"].encode()


if __name__ == "__main__":
    sys.exit(main())
