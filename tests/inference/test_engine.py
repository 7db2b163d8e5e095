"""The engine against plain generation: the same bytes whatever runs beside a row, in whatever order, drafted or not."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from benchmarks.generation import smallest_margin
from megabyte_distill.alphabet import BOS_BYTE, PAD_BYTE, joint_class, split_class
from megabyte_distill.config.model import ByteMixer, ChunkPooling, DechunkMode
from megabyte_distill.config.training import KernelMode
from megabyte_distill.inference.bit_paths import BitPaths
from megabyte_distill.inference.engine import Engine
from megabyte_distill.inference.generation import Generated, GenerationMode, GenerationSettings, generate
from megabyte_distill.inference.sampling import Sampling
from megabyte_distill.inference.utf8 import Utf8Mode
from megabyte_distill.model.student import Student
from tests.inference.conftest import HAS_COMPILER, tiny_student
from tests.inference.test_generation import Row

GREEDY = Sampling(temperature=0)
SAMPLED = Sampling(temperature=0.8, top_p=0.95)
SAMPLINGS = {"greedy": GREEDY, "sampled": SAMPLED, "as the model says": Sampling()}
PROMPTS: list[str | bytes] = [
    "The king",
    "",
    b"half \xe6\x97",
    "a much longer prompt, é, and so long that it is read in blocks: " + "words and words " * 5,
    "日本語 العربية 🙂",
    b"\x80\0 no UTF-8",
    "x",
]
MANY = list(dict.fromkeys(prompt[:cut] for prompt in PROMPTS for cut in (1, 2, 3, 5, 8, 13, 30, 99)))
FEW = MANY[:12]
STEPPED = (DechunkMode.HARD, DechunkMode.CAUSAL)
FUSED, REFERENCE = KernelMode.FUSED, KernelMode.REFERENCE
FAST = FUSED if HAS_COMPILER else REFERENCE

pytestmark = pytest.mark.usefixtures("groups", "step_library_if_any")


@functools.cache
def shared_student() -> Student:
    """One for the tests that compare with the same results."""
    torch.manual_seed(5)
    return tiny_student()


@functools.cache
def plainly(sampling: str, count: int) -> list[Generated]:
    """What plain generation makes of the many prompts."""
    settings = GenerationSettings(max_new_bytes=count, sampling=SAMPLINGS[sampling], seed=3)
    return generate(shared_student(), MANY, settings)


def bits_of(sampling: str, count: int) -> list[tuple[bool, ...]]:
    """How its prompts are cut: given where inferring it again would only take time."""
    return [row.prompt_bits for row in plainly(sampling, count)]


def assert_same(got: Sequence[Generated], expected: Sequence[Generated]) -> None:
    """Equal bytes, bits and endings; log-probabilities as near as fp32 sums in another order are."""
    assert len(got) == len(expected)
    for own, other in zip(got, expected, strict=True):
        assert replace(own, log_probability=0.0) == replace(other, log_probability=0.0)
        assert own.log_probability == pytest.approx(other.log_probability, abs=2e-3)


@pytest.mark.parametrize(("kernels", "speculate"), [(REFERENCE, 0), (REFERENCE, 3), (FUSED, 0), (FUSED, 3)])
@pytest.mark.parametrize("pooling", list(ChunkPooling))
@pytest.mark.parametrize("mode", STEPPED)
@pytest.mark.parametrize("mixer", list(ByteMixer))
def test_every_kind_of_student_gives_the_bytes_of_plain_generation(
    mixer: ByteMixer, mode: DechunkMode, pooling: ChunkPooling, kernels: KernelMode, speculate: int
) -> None:
    if kernels is FUSED and not HAS_COMPILER:
        pytest.skip("needs g++; run on a machine that has it")
    student, expected = generated_by(mixer, mode, pooling)
    engine = Engine(student, max_batch_size=3, speculate=speculate, kernels=kernels)
    settings = GenerationSettings(max_new_bytes=12, sampling=GREEDY)
    assert_same(engine.generate(PROMPTS, settings, prompt_bits=[row.prompt_bits for row in expected]), expected)


@functools.cache
def generated_by(mixer: ByteMixer, mode: DechunkMode, pooling: ChunkPooling) -> tuple[Student, list[Generated]]:
    torch.manual_seed(6)
    student = tiny_student(mode, mixer, pooling)
    return student, generate(student, PROMPTS, GenerationSettings(max_new_bytes=12, sampling=GREEDY))


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("speculate", [0, 1, 2, 5, 16, "auto"])
def test_drafts_change_no_byte(sampling: str, speculate: int) -> None:
    settings = GenerationSettings(max_new_bytes=40, sampling=SAMPLINGS[sampling], seed=3)
    for size in (1, 7, 32):
        engine = Engine(shared_student(), max_batch_size=size, speculate=speculate, kernels=FAST)
        assert_same(engine.generate(MANY, settings, prompt_bits=bits_of(sampling, 40)), plainly(sampling, 40))
        counts = engine.counts
        assert counts.new_bytes == sum(len(row.byte_ids) + row.ended for row in plainly(sampling, 40))
        assert counts.accepted <= counts.drafted and bool(counts.drafted) == bool(speculate)
        assert sum(counts.runs.values()) == counts.backbone_passes


@pytest.mark.parametrize("speculate", [1, 4, 16])
def test_torch_drafts_change_no_byte(speculate: int) -> None:
    settings = GenerationSettings(max_new_bytes=40, sampling=GREEDY, seed=3)
    engine = Engine(shared_student(), speculate=speculate, kernels=REFERENCE)
    assert_same(engine.generate(MANY, settings, prompt_bits=bits_of("greedy", 40)), plainly("greedy", 40))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_prompts_are_cut_as_in_plain_generation_whoever_they_are_read_beside(sampling: str) -> None:
    settings = GenerationSettings(max_new_bytes=4, sampling=SAMPLINGS[sampling], seed=3)
    engine = Engine(shared_student(), max_batch_size=11, kernels=FAST)
    found = engine.generate(MANY, settings)
    assert [row.prompt_bits for row in found] == bits_of(sampling, 40)


@pytest.mark.parametrize("speculate", [0, 4])
def test_greedy_equals_reading_everything_again_for_each_byte(speculate: int) -> None:
    student = shared_student()
    engine = Engine(student, speculate=speculate, kernels=FAST)
    prompts = [prompt[:20] for prompt in PROMPTS]
    results = engine.generate(prompts, GenerationSettings(max_new_bytes=12, sampling=GREEDY))
    for prompt, result in zip(prompts, results, strict=True):
        byte_ids, bits = list(prompt.encode() if isinstance(prompt, str) else prompt), list(result.prompt_bits)
        for byte, bit in zip(result.byte_ids, result.bits, strict=True):
            with torch.no_grad():
                logits = student(Row(byte_ids, bits)).logits[-1].clone()
            logits[[joint_class(PAD_BYTE, 0), joint_class(PAD_BYTE, 1)]] = -torch.inf
            best = logits.topk(2)
            assert float(best.values[0] - best.values[1]) > 1e-4, "too near to say what greedy is"
            assert split_class(int(best.indices[0])) == (byte, bit)
            byte_ids.append(byte)
            bits.append(bit)


def test_what_is_greedy_among_the_many_is_no_matter_of_rounding() -> None:
    raw = [prompt.encode() if isinstance(prompt, str) else prompt for prompt in MANY]
    assert len(set(raw)) == 32
    assert smallest_margin(shared_student(), raw, plainly("greedy", 40)) > 1e-4


def an_order(seed: int) -> list[int]:
    return torch.randperm(len(MANY), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("speculate", [0, 5])
@pytest.mark.parametrize("order", [an_order(2), an_order(3), list(range(32))[::-1]], ids=["one", "other", "reversed"])
def test_a_rows_bytes_do_not_depend_on_when_it_is_admitted(order: list[int], speculate: int) -> None:
    settings = GenerationSettings(max_new_bytes=40, sampling=GREEDY)
    expected = [plainly("greedy", 40)[i] for i in order]
    engine = Engine(shared_student(), max_batch_size=5, speculate=speculate, kernels=FAST)
    found = engine.generate([MANY[i] for i in order], settings, prompt_bits=[row.prompt_bits for row in expected])
    assert_same(found, expected)


@functools.cache
def plainly_in_another_order() -> list[Generated]:
    settings = GenerationSettings(max_new_bytes=40, sampling=SAMPLED, seed=3)
    return generate(shared_student(), [MANY[i] for i in an_order(4)], settings)


@pytest.mark.parametrize("speculate", [0, 5])
@pytest.mark.parametrize("size", [3, 5])
def test_samples_depend_on_a_prompts_number_and_not_on_when_it_is_admitted(size: int, speculate: int) -> None:
    settings = GenerationSettings(max_new_bytes=40, sampling=SAMPLED, seed=3)
    expected = plainly_in_another_order()
    engine = Engine(shared_student(), max_batch_size=size, speculate=speculate, kernels=FAST)
    found = engine.generate([MANY[i] for i in an_order(4)], settings, prompt_bits=[row.prompt_bits for row in expected])
    assert_same(found, expected)
    assert [row.byte_ids for row in found] != [plainly("sampled", 40)[i].byte_ids for i in an_order(4)]


def test_drafts_of_every_length_change_no_byte() -> None:
    settings = GenerationSettings(max_new_bytes=40, sampling=GREEDY, seed=3)
    for speculate in range(1, 17):
        engine = Engine(shared_student(), max_batch_size=5, speculate=speculate, kernels=FAST)
        found = engine.generate(FEW, settings, prompt_bits=bits_of("greedy", 40)[: len(FEW)])
        assert_same(found, plainly("greedy", 40)[: len(FEW)])
        assert engine.counts.drafted > speculate


@pytest.mark.parametrize("sampling", [GREEDY, Sampling()])
def test_every_byte_but_two_may_stand_in_a_prompt(sampling: Sampling) -> None:
    broken = [b"\xc3(", b"\xed\xa0\x80", b"\xf8\x88\x80", b"a\xf0\x9f", b"\x80\xbf", b"\xf4\x90\x80\x80"]
    prompts = [*(bytes([byte]) for byte in range(BOS_BYTE)), *broken]
    settings = GenerationSettings(max_new_bytes=3, sampling=sampling)
    found = Engine(shared_student(), max_batch_size=len(prompts), kernels=FAST).generate(prompts, settings)
    assert_same(found, generate(shared_student(), prompts, settings))
    assert len({row.byte_ids for row in found}) > 30


@pytest.mark.parametrize("speculate", [0, 4])
@pytest.mark.parametrize("size", [2, 32])
def test_stop_strings_and_short_limits_end_rows_as_in_plain_generation(speculate: int, size: int) -> None:
    written = plainly("as the model says", 40)
    # what really occurs, in the middle of rows
    stop = (written[0].byte_ids[5:8], written[4].byte_ids[20:21], b"never written in forty bytes, surely not")
    for limit in (0, 1, 40):
        settings = GenerationSettings(max_new_bytes=limit, sampling=Sampling(), seed=3, stop=stop)
        engine = Engine(shared_student(), max_batch_size=size, speculate=speculate, kernels=FAST)
        found = engine.generate(FEW, settings, prompt_bits=bits_of("as the model says", 40)[: len(FEW)])
        assert_same(found, plainly_with(settings))
        assert any(row.stopped_by for row in found) == (limit == 40)


@functools.cache
def plainly_with(settings: GenerationSettings) -> list[Generated]:
    """What plain generation makes of the first of the many prompts."""
    return generate(shared_student(), FEW, settings)


@pytest.mark.parametrize("speculate", [0, 4])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_constrained_utf8_is_that_of_plain_generation(sampling: str, speculate: int) -> None:
    settings = GenerationSettings(max_new_bytes=40, sampling=SAMPLINGS[sampling], seed=3, utf8=Utf8Mode.CONSTRAIN)
    expected = plainly_with(settings)
    engine = Engine(shared_student(), max_batch_size=6, speculate=speculate, kernels=FAST)
    assert_same(engine.generate(FEW, settings, prompt_bits=[row.prompt_bits for row in expected]), expected)
    assert any(b > 127 for row in expected for b in row.byte_ids)


@pytest.mark.parametrize("speculate", [0, 4])
def test_rows_end_where_the_backbone_has_no_position_left(speculate: int, monkeypatch: pytest.MonkeyPatch) -> None:
    student = shared_student()
    longest = max(sum(row.prompt_bits) for row in plainly("as the model says", 40)) + 1
    limited = replace(student.backbone.backbone_config, max_position_embeddings=longest + 2)
    monkeypatch.setattr(student.backbone, "backbone_config", limited)
    settings = GenerationSettings(max_new_bytes=40, sampling=Sampling(), seed=3)
    bits = bits_of("as the model says", 40)
    expected = generate_under_limit(longest + 2, student, settings)
    assert 0 < sum(row.is_full for row in expected) < len(MANY)
    engine = Engine(student, max_batch_size=6, speculate=speculate, kernels=FAST)
    assert_same(engine.generate(MANY, settings, prompt_bits=bits), expected)
    with pytest.raises(ValueError, match="too long"):
        engine.generate([b"x" * 200], settings, prompt_bits=[[True] * 200])


@functools.cache
def generate_under_limit(limit: int, student: Student, settings: GenerationSettings) -> list[Generated]:
    """Of a student that has the limit now."""
    return generate(student, MANY, settings)


def test_a_session_that_is_left_early_tells_what_is_there() -> None:
    settings = GenerationSettings(max_new_bytes=40, sampling=GREEDY, seed=3)
    session = Engine(shared_student(), max_batch_size=2, kernels=FAST).begin(MANY, settings)
    for _, _ in zip(range(30), session, strict=False):
        pass
    whole = plainly("greedy", 40)
    assert all(full.byte_ids.startswith(part.byte_ids) for part, full in zip(session.results(), whole, strict=True))
    sizes = [len(row.byte_ids) for row in session.results()]
    assert 0 < sum(sizes) < sum(len(row.byte_ids) for row in whole) and sizes[-1] == 0


@pytest.mark.parametrize("speculate", [0, 4])
def test_a_stream_brings_the_same_bytes(speculate: int) -> None:
    settings = GenerationSettings(max_new_bytes=40, sampling=Sampling(), seed=3)
    engine = Engine(shared_student(), max_batch_size=6, speculate=speculate, kernels=FAST)
    rows: list[list[tuple[int, bool]]] = [[] for _ in MANY]
    total = [0.0] * len(MANY)
    for new in engine.begin(MANY, settings, prompt_bits=bits_of("as the model says", 40)):
        for row, byte, bit, score in zip(new.rows, new.byte_ids, new.bits, new.log_probabilities, strict=True):
            rows[row].append((byte, bit))
            total[row] += score
    for own, score, result in zip(rows, total, plainly("as the model says", 40), strict=True):
        ending = [BOS_BYTE] if result.ended else []
        assert [byte for byte, _ in own] == [*result.byte_ids, *ending]
        assert tuple(bit for _, bit in own[: len(result.bits)]) == result.bits
        assert score == pytest.approx(result.log_probability, abs=2e-3)
    assert any(result.ended for result in plainly("as the model says", 40))


def test_prompts_that_wait_are_read_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    passes: list[int] = []
    advance = BitPaths.advance
    monkeypatch.setattr(BitPaths, "advance", lambda *args: (passes.append(1), advance(*args))[1])
    settings = GenerationSettings(max_new_bytes=2, sampling=Sampling(), seed=3)
    texts = [bytes([97 + number]) * 20 for number in range(8)]
    Engine(shared_student(), max_batch_size=4, kernels=FUSED).generate(texts, settings)
    assert len(passes) == 2 * 20


def test_a_prompt_that_is_too_long_is_named_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    student = shared_student()
    limited = replace(student.backbone.backbone_config, max_position_embeddings=4)
    monkeypatch.setattr(student.backbone, "backbone_config", limited)
    texts = ["a", "b", "c", bytes(range(32, 126))]
    with pytest.raises(
        ValueError,
        match=r"the prompt 4 of 4 is too long: it has 94 bytes, and the first \d+ of them fill the 4 positions",
    ):
        Engine(student, max_batch_size=2, kernels=FUSED).begin(texts)


def test_known_bits_of_prompts_are_taken_as_they_are() -> None:
    settings = GenerationSettings(max_new_bytes=20, sampling=GREEDY)
    engine = Engine(shared_student(), kernels=FAST)
    inferred = engine.generate(PROMPTS, settings)
    again = engine.generate(PROMPTS, settings, prompt_bits=[row.prompt_bits for row in inferred])
    assert_same(again, inferred)
    others = [[not bit for bit in row.prompt_bits] for row in inferred]
    assert engine.generate(PROMPTS, settings, prompt_bits=others) != inferred
    with pytest.raises(ValueError, match=r"prompt_bits has \[1\] bits for prompts of \[2\] bytes"):
        engine.generate(["ab"], prompt_bits=[[True]])


def test_drafts_can_be_learned_from_text_beforehand() -> None:
    engine = Engine(shared_student(), speculate=8, kernels=FAST)
    engine.learn_drafts([b"some text and more " * 300, "日本語".encode() * 50])
    seen = engine.guess.seen
    assert seen > 256  # a fit
    settings = GenerationSettings(max_new_bytes=40, sampling=GREEDY, seed=3)
    assert_same(engine.generate(MANY, settings, prompt_bits=bits_of("greedy", 40)), plainly("greedy", 40))
    assert engine.guess.seen > seen
    with pytest.raises(ValueError, match="the text has byte 254"):
        engine.learn_drafts([b"\xfe"])


def test_what_cannot_be_is_refused(make_student: Callable[..., Student]) -> None:
    with pytest.raises(ValueError, match="max_batch_size is 0"):
        Engine(shared_student(), max_batch_size=0)
    with pytest.raises(ValueError, match="foo"):
        Engine(shared_student(), kernels="foo")  # type: ignore[arg-type]
    assert not Engine(shared_student(), kernels="reference").is_fused  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="speculate is -1"):
        Engine(shared_student(), speculate=-1)
    with pytest.raises(ValueError, match="drafts nothing"):
        Engine(shared_student()).learn_drafts([b"text"])
    with pytest.raises(ValueError, match="no prompts"):
        Engine(shared_student()).generate([])
    with pytest.raises(ValueError, match="prompts is one text"):
        Engine(shared_student()).begin("one text")
    with pytest.raises(ValueError, match="mode bytes"):
        Engine(shared_student()).generate(["a"], GenerationSettings(mode=GenerationMode.BYTES))
    with pytest.raises(ValueError, match="official"):
        Engine(make_student(DechunkMode.OFFICIAL)).generate(["a"])
