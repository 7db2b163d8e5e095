"""Checks that greedy generation writes the same bytes, bits and endings in every way there is.

    python scripts/check_greedy.py RUN [--export FOLDER]
    python scripts/check_greedy.py --smollm2-shape --longest 24 --max-new-bytes 16

RUN is a trained run or an exported folder, --export what was exported of it, in the dtype that it is stored in;
--smollm2-shape takes random weights in SmolLM2-135M's shape. Prompts of many lengths are cut anywhere out of the run's
held-out text: inside words, inside characters. All in fp32, against reading everything again for each byte: plain
steps, the engine with one row and with all, in torch's step, with fewer places than prompts in three orders, with
drafts of 1 to 16 bytes and of auto, and the export's generate_bytes; its generate(), which draws bytes, against byte
generation here and one pass over what was written. Where the two likeliest are nearer than fp32 can tell, the check
fails: --seed takes other prompts.

A line a way, and one JSON object as the last line; a margin is null where nothing was second.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.generation import OneText, documents, make_student  # noqa: E402 - path is set
from megabyte_distill.alphabet import BOS_BYTE, PAD_BYTE, joint_class, split_class  # noqa: E402
from megabyte_distill.config import ranges  # noqa: E402
from megabyte_distill.config.training import KernelMode  # noqa: E402
from megabyte_distill.conversion.hf_config import HfConfig  # noqa: E402
from megabyte_distill.conversion.student_folder import is_student  # noqa: E402
from megabyte_distill.conversion.teacher_folder import BACKBONE_PREFIX  # noqa: E402
from megabyte_distill.inference.engine import Engine  # noqa: E402
from megabyte_distill.inference.generation import (  # noqa: E402
    Generated,
    GenerationMode,
    GenerationSettings,
    generate,
)
from megabyte_distill.inference.prompt_reading import read_prompts  # noqa: E402
from megabyte_distill.inference.sampling import Sampling  # noqa: E402
from megabyte_distill.model.student import Student  # noqa: E402
from megabyte_distill.run_folder import is_run, split_stage  # noqa: E402
from megabyte_distill.student_folders import open_student, require_student  # noqa: E402
from megabyte_distill.tool import (  # noqa: E402
    Failure,
    ToolParser,
    file_to_read,
    folder_to_read,
    in_range,
    judged,
    problems_of,
    run_tool,
)

LEAST_MARGIN = 1e-4
"""Of logits: what fp32 sums in another order cannot turn around."""
DRAFTS: tuple[int | str, ...] = (*range(1, 17), "auto")
_PADDING = [joint_class(PAD_BYTE, 0), joint_class(PAD_BYTE, 1)]

Written = tuple[bytes, tuple[bool, ...], bool]
"""(new bytes, their bits, whether the document ended)."""


def build_parser() -> ToolParser:
    """The command line."""
    parser = ToolParser(description=__doc__, failure="something differs, or is too near to tell")
    add = parser.add_argument_group("model").add_argument
    add("load", nargs="?", type=Path, metavar="RUN", help="a run, a stage of it, or an exported folder")
    add("--smollm2-shape", action="store_true", help="random weights in SmolLM2-135M's shape instead of RUN")
    add("--export", type=judged(folder_to_read), metavar="FOLDER",
        help="the run's exported folder, for transformers (none)")  # fmt: skip
    add = parser.add_argument_group("text").add_argument
    add("--text", type=judged(file_to_read), metavar="FILE",
        help="text that prompts are cut out of (the run's held-out text, or the embedded one's)")  # fmt: skip
    add("--prompts", type=in_range(ranges.COUNT), default=32, metavar="N", help="how many (32)")
    add("--longest", type=in_range(ranges.COUNT), default=96, metavar="BYTES", help="longest prompt (96)")
    add("--max-new-bytes", type=in_range(ranges.COUNT), default=48, metavar="N", help="bytes written (48)")
    add("--seed", type=in_range(ranges.SEED), default=0, metavar="N", help="of where prompts are cut (0)")
    return parser


def flags_problems(options: argparse.Namespace) -> Iterator[str]:
    """What is wrong with the flags together, and with the folders."""
    if bool(options.load) == options.smollm2_shape:
        yield "RUN or --smollm2-shape: give one of the two"
    elif options.load:
        yield from problems_of("RUN", lambda: require_student(options.load))
    if options.export and options.smollm2_shape:
        yield "--export: is RUN's, and the weights of --smollm2-shape are random; leave one of the two out"
    elif options.export:
        yield from problems_of("--export", lambda: require_export(options.export))


def require_export(folder: Path) -> None:
    """ValueError where a folder is no exported student."""
    config = HfConfig.read(folder)
    if not is_student(config):
        raise ValueError(f"{folder} holds a model of type {config.fields.get('model_type')!r}, no exported student")


def load_export(folder: Path, student: Student) -> Any:
    """transformers' model of an exported folder, in fp32. ValueError where its byte side is not the student's."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, local_files_only=True, dtype=torch.float32
    ).eval()
    theirs = dict(model.named_parameters(remove_duplicate=False))
    own = {name: weight for name, weight in student.named_parameters() if not name.startswith(BACKBONE_PREFIX)}
    other = [name for name in own if name not in theirs or not torch.equal(theirs[name].cpu(), own[name].cpu())]
    if other:
        raise ValueError(
            f"--export: {folder} has other weights than RUN ({other[0]}; {len(other)} of {len(own)} tensors differ); "
            "give what convert_checkpoint.py export writes of this run and stage, without --torch-dtype"
        )
    return model


@torch.no_grad()
def read_again(student: Student, prompt: bytes, prompt_bits: Sequence[bool], count: int) -> tuple[Written, float]:
    """(what is written where everything is read again for each byte, the smallest margin of the likeliest pair)."""
    byte_ids, bits, margin = list(prompt), list(prompt_bits), float("inf")
    for _ in range(count):
        logits = student(OneText(byte_ids, bits)).logits[-1].clone()
        logits[_PADDING] = -torch.inf
        best = logits.topk(2)
        margin = min(margin, float(best.values[0] - best.values[1]))
        byte, bit = split_class(int(best.indices[0]))
        if byte == BOS_BYTE:
            break
        byte_ids.append(byte)
        bits.append(bool(bit))
    size = len(prompt)
    return (bytes(byte_ids[size:]), tuple(bits[size:]), len(byte_ids) - size < count), margin


def path_margin(student: Student, prompts: Sequence[bytes], settings: GenerationSettings) -> float:
    """Smallest difference between the log-weights of a prompt's likeliest segmentation and the next."""
    read = read_prompts(student, prompts, settings.paths, path_window=settings.path_window)
    best = read.log_weights.topk(2).values
    return float((best[:, 0] - best[:, 1]).min())


def written(results: Sequence[Generated]) -> list[Written]:
    """What is compared."""
    return [(bytes(row.byte_ids), tuple(row.bits), row.ended) for row in results]


@dataclass
class Check:
    """One student and its prompts; a line is printed for each way."""

    student: Student
    prompts: list[bytes]
    settings: GenerationSettings
    margins: dict[str, float] = field(default_factory=dict)
    ways: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        started = time.perf_counter()
        plain = generate(self.student, self.prompts, self.settings)
        seconds, self._bits = time.perf_counter() - started, [row.prompt_bits for row in plain]
        started = time.perf_counter()
        found = [
            read_again(self.student, prompt, bits, self.settings.max_new_bytes)
            for prompt, bits in zip(self.prompts, self._bits, strict=True)
        ]
        self.expected = [own for own, _ in found]
        print(f"everything read again for each byte: {time.perf_counter() - started:.1f} s", flush=True)
        self.margins["pairs"] = min(margin for _, margin in found)
        self.margins["segmentations"] = path_margin(self.student, self.prompts, self.settings)
        self._compare("plain steps", seconds, written(plain), self.expected)

    @property
    def is_same(self) -> bool:
        """True where every way wrote the same, and nothing was too near to tell."""
        is_same = all(way["same"] == len(self.prompts) for way in self.ways.values())
        return is_same and all(margin > LEAST_MARGIN for margin in self.margins.values())

    def engines(self) -> None:
        """The engine's ways."""
        count, few = len(self.prompts), max(1, len(self.prompts) // 6)
        for size in (1, count):
            self._engine(f"engine, {size} side by side", max_batch_size=size)
        self._engine(f"engine in torch, {count} side by side", max_batch_size=count, kernels=KernelMode.REFERENCE)
        shuffled = random.Random(self.settings.seed).sample(range(count), count)
        for name, order in (("given", range(count)), ("reversed", range(count)[::-1]), ("shuffled", shuffled)):
            self._engine(f"engine, {few} side by side, {name} order", list(order), max_batch_size=few)
        for drafts in DRAFTS:
            self._engine(f"engine, {few} side by side, drafts of {drafts}", max_batch_size=few, speculate=drafts)

    def _engine(self, name: str, order: list[int] | None = None, **options: Any) -> None:
        engine, started = Engine(self.student, **options), time.perf_counter()
        is_given = order is not None or "speculate" in options  # reading prompts again would only take time
        places = order or range(len(self.prompts))
        results = engine.generate(
            [self.prompts[place] for place in places],
            self.settings,
            prompt_bits=[self._bits[place] for place in places] if is_given else None,
        )
        more = {"drafted": engine.counts.drafted, "accepted": engine.counts.accepted} if engine.guess else {}
        seconds = time.perf_counter() - started
        self._compare(name, seconds, written(results), [self.expected[place] for place in places], **more)

    def exported(self, model: Any) -> None:
        """The ways of the export's model under transformers."""
        started = time.perf_counter()
        results = model.generate_bytes(
            self.prompts, max_new_bytes=self.settings.max_new_bytes, temperature=0, boundary_threshold=False,
            paths=self.settings.paths, path_window=self.settings.path_window,
        )  # fmt: skip
        self._compare("export, generate_bytes", time.perf_counter() - started, written(results), self.expected)
        started = time.perf_counter()
        new = generated_by(model, self.prompts, self.settings.max_new_bytes)
        seconds = time.perf_counter() - started
        longest = max(len(prompt) for prompt in self.prompts)
        settings = replace(
            self.settings, mode=GenerationMode.BYTES, paths=model.config.paths, path_window=max(longest, 1)
        )
        rows = generate(self.student, self.prompts, settings)
        self._compare("export, generate", seconds, new, [row.byte_ids + bytes([BOS_BYTE] * row.ended) for row in rows])
        started = time.perf_counter()
        found, self.margins["bytes"] = read_in_one_pass(model, self.prompts, new)
        self._compare("export, one pass over generate", time.perf_counter() - started, found, new)

    def _compare(self, name: str, seconds: float, found: Sequence[Any], expected: Sequence[Any], **counts: int) -> None:
        other = [place for place, (one, two) in enumerate(zip(found, expected, strict=True)) if one != two]
        same, seconds = len(expected) - len(other), round(seconds, 1)
        self.ways[name] = {"same": same, "seconds": seconds, **counts}
        where = "" if not other else f"; the first that differs is {found[other[0]]!r}, not {expected[other[0]]!r}"
        print(f"{name}: {same} of {len(expected)} the same, {seconds} s{where}", flush=True)


def padded(texts: Sequence[bytes]) -> tuple[Tensor, Tensor]:
    """(input_ids, attention_mask) [R, L] of texts behind BOS, padded in front."""
    longest = max(len(text) for text in texts)
    ids = torch.tensor([[PAD_BYTE] * (longest - len(text)) + [BOS_BYTE, *text] for text in texts])
    return ids, (ids != PAD_BYTE).long()


def generated_by(model: Any, prompts: Sequence[bytes], count: int) -> list[bytes]:
    """transformers' greedy continuation of each prompt; BOS last where the document ended."""
    ids, mask = padded(prompts)
    rows = model.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False)[:, ids.shape[1] :]
    found = [bytes(row).rstrip(bytes([PAD_BYTE])) for row in rows.tolist()]
    return [row[: row.index(BOS_BYTE) + 1] if BOS_BYTE in row else row for row in found]


@torch.no_grad()
def read_in_one_pass(model: Any, prompts: Sequence[bytes], new: Sequence[bytes]) -> tuple[list[bytes], float]:
    """(the likeliest byte behind each prompt and each of its new bytes but the last, the smallest margin)."""
    ids, mask = padded([prompt + own for prompt, own in zip(prompts, new, strict=True)])
    logits = model(ids, attention_mask=mask).logits.clone()
    logits[..., PAD_BYTE] = -torch.inf
    best, found, margin = logits.topk(2), [], float("inf")
    for row, own in enumerate(new):
        places = slice(ids.shape[1] - 1 - len(own), ids.shape[1] - 1)
        found.append(bytes(best.indices[row, places, 0].tolist()))
        values = best.values[row, places]
        margin = min([margin, *(values[:, 0] - values[:, 1]).tolist()])
    return found, margin


def cut_prompts(text: bytes, count: int, longest: int, seed: int) -> list[bytes]:
    """So many different prompts, cut anywhere out of a text: an empty one, one of each length that is evenly spread."""
    if len(text) < longest + count:
        raise ValueError(
            f"got a text of {len(text)} bytes, expected {longest + count} for {count} prompts; give another"
        )
    dice, found = random.Random(seed), dict.fromkeys([b""])
    for number in range(1, count):
        size, before = max(1, round(longest * number / max(count - 1, 1))), len(found)
        for _ in range(1000):
            begin = dice.randrange(len(text) - size)
            found[text[begin : begin + size]] = None
            if len(found) > before:
                break
        else:
            raise ValueError(f"the text has no {count} different prompts of up to {longest} bytes; give longer ones")
    return list(found)


def embedded_text() -> bytes:
    """The held-out text of the example."""
    return b"\n".join(documents("heldout", 10_000))


@contextlib.contextmanager
def opened(options: argparse.Namespace) -> Iterator[tuple[Student, Callable[[], bytes]]]:
    """A student in fp32, and what tells the text that its prompts are cut out of."""
    if options.smollm2_shape:
        torch.manual_seed(0)
        student = make_student("smollm2").requires_grad_(False)
        # logits that say something, and hear the backbone
        torch.nn.init.normal_(student.byte_decoder.head.get_parameter("weight"), std=0.5)
        torch.nn.init.normal_(student.byte_decoder.residual.get_parameter("weight"), std=0.1)
        yield student, embedded_text
        return
    from megabyte_distill.pretrain.held_out_page import held_out_text

    root, _ = split_stage(options.load)
    enough = 100 * options.longest * options.prompts
    with open_student(options.load) as student:
        yield (
            student.float(),
            (lambda: held_out_text(root, at_most=enough, flag="--text")) if is_run(root) else embedded_text,
        )


def run(options: argparse.Namespace) -> None:
    """A line a way; Failure where something differs or is too near to tell."""
    with opened(options) as (student, held_out):
        model = load_export(options.export, student) if options.export else None
        text = options.text.read_bytes() if options.text else held_out()
        prompts = cut_prompts(text, options.prompts, options.longest, options.seed)
        settings = GenerationSettings(max_new_bytes=options.max_new_bytes, sampling=Sampling(temperature=0))
        check = Check(student, prompts, settings)
        check.engines()
        if model is not None:
            check.exported(model)
    for name, margin in check.margins.items():
        far = "" if margin > LEAST_MARGIN else ": too near to tell; --seed takes other prompts"
        print(f"smallest margin between the two likeliest {name}: {margin:.2g}{far}")
    margins = {name: margin if math.isfinite(margin) else None for name, margin in check.margins.items()}
    sizes = {"prompts": len(prompts), "new_bytes": sum(len(own) for own, _, _ in check.expected)}
    sizes["compiled_step"] = Engine(student).is_fused
    print(json.dumps({**sizes, "margins": margins, "ways": check.ways, "is_same": check.is_same}))
    if not check.is_same:
        raise Failure("something differs, or is too near to tell; the lines above say what")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_tool(build_parser(), run, argv, check=flags_problems)


if __name__ == "__main__":
    sys.exit(main())
