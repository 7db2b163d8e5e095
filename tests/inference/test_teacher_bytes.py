"""The teacher as a byte model: stepping equals the packed targets, samples follow it, scores equal its token NLL."""

from __future__ import annotations

import itertools
import math
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megabyte_distill.alphabet import END_OF_DOCUMENT_CLASS
from megabyte_distill.data.packing import PackedRow, Segment, pack_row
from megabyte_distill.data.text_mask import text_chunks, text_positions
from megabyte_distill.inference.generation import Generated, GenerationMode, GenerationSettings, PromptReading
from megabyte_distill.inference.sampling import Sampling
from megabyte_distill.inference.scoring import score_tokens
from megabyte_distill.inference.teacher_bytes import TeacherBytes, score_teacher_bytes
from megabyte_distill.inference.teacher_generation import TeacherGeneration
from megabyte_distill.inference.utf8 import Utf8Mode
from megabyte_distill.model.backbone import Backbone
from megabyte_distill.objectives.byte_tree import ByteTree
from megabyte_distill.objectives.exact_targets import exact_targets
from tests.objectives.test_exact_targets import ALLOWED, TABLE, TEXT, TOKENS, row_of
from tests.tiny_student import tiny_backbone, world

__all__ = ["world"]
pytestmark = pytest.mark.usefixtures("world")


@pytest.fixture
def teacher() -> Backbone:
    torch.manual_seed(1)
    return tiny_backbone(vocab_size=len(TOKENS)).requires_grad_(False)


def targets_of(teacher: Backbone, row: PackedRow) -> Tensor:
    return exact_targets(
        ByteTree.of(TABLE),
        teacher(teacher.embed(row.tokens), row.cu_chunks),
        head=teacher.own_logits,
        byte_ids=row.byte_ids,
        bits=row.bits,
        labels=row.labels,
        wanted=row.is_real,
    ).distribution


def test_stepping_through_texts_gives_the_targets_of_their_rows(teacher: Backbone) -> None:
    text = [token for token in TEXT if token != 6]  # spelled as 2 is: which of them is read is a choice
    rows = [row_of(text), row_of([16, *text[:-1]])]
    size = min(int(row.is_real.sum()) for row in rows)
    running = TeacherBytes(teacher, TABLE, rows=2)
    for place in range(size):
        for index, row in enumerate(rows):
            expected = targets_of(teacher, row)[place].double()
            torch.testing.assert_close(running.next_pairs()[index], expected, atol=1e-5, rtol=0)
        if place + 1 < size:
            byte_ids = torch.stack([row.byte_ids[place + 1] for row in rows])
            running.advance(byte_ids, torch.stack([row.bits[place + 1] for row in rows]))
    assert running.tokens == [text, [16, *text[:-2]]]
    running.keep(torch.tensor([0]))
    assert running.rows == 1 and torch.allclose(running.next_pairs()[0].sum(), torch.ones((), dtype=torch.float64))


@pytest.mark.parametrize(
    "byte, bit, what", [(ord("z"), True, "ends"), (ord("z"), False, "goes on"), (ord("c"), False, "goes on")]
)
def test_a_pair_that_no_token_has_is_refused(teacher: Backbone, byte: int, bit: bool, what: str) -> None:
    running = TeacherBytes(teacher, TABLE)
    with pytest.raises(ValueError, match=f"no token {what} with byte {byte}"):
        running.advance(torch.tensor([byte]), torch.tensor([bit]))


def written(teacher: Backbone, prompts: list[bytes], **settings: object) -> list[Generated]:
    running = TeacherGeneration(teacher, TABLE, prompts, GenerationSettings(**settings))  # type: ignore[arg-type]
    for _ in running:
        pass
    return running.results()


def pieces_of(text: Generated) -> list[bytes]:
    """The finished tokens, spelled."""
    ends = [0, *(place + 1 for place, bit in enumerate(text.bits) if bit)]
    return [text.byte_ids[first:end] for first, end in itertools.pairwise(ends)]


def masses_behind(teacher: Backbone, context: list[int]) -> dict[bytes, float]:
    """Of what follows some tokens, b"" being the end of text: the teacher's, without ids that cannot be text."""
    tokens = torch.tensor([TABLE.start_id, *context])
    hidden = teacher(teacher.embed(tokens), torch.tensor([0, tokens.shape[0]], dtype=torch.int32))
    p = teacher.logits(hidden)[-1].double().softmax(-1)
    found: dict[bytes, float] = defaultdict(float)
    for token in [*ALLOWED, 0]:
        found[TOKENS[token] or b""] += float(p[token])
    return {text: mass / sum(found.values()) for text, mass in found.items()}


def test_samples_are_the_teachers_tokens(teacher: Backbone) -> None:
    """First and second tokens against the teacher's own probabilities: chi-square at its 0.1 % point."""
    texts = written(teacher, [b""] * 3000, max_new_bytes=16, seed=3)
    pieces = [pieces_of(text) + ([b""] if text.ended else []) for text in texts]
    _assert_drawn([each[0] for each in pieces if each], masses_behind(teacher, []))
    common = max({each[0] for each in pieces} - {b"", b"ab"}, key=[each[0] for each in pieces].count)
    second = [each[1] for each in pieces if each[0] == common and len(each) > 1]
    assert len(second) > 100
    _assert_drawn(second, masses_behind(teacher, [TOKENS.index(common)]))


def test_ids_that_are_spelled_alike_are_drawn_as_often_as_the_teacher_says(
    teacher: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[TeacherBytes] = []

    def noted(*arguments: Any) -> TeacherBytes:
        made.append(TeacherBytes(*arguments))
        return made[-1]

    monkeypatch.setattr("megabyte_distill.inference.teacher_generation.TeacherBytes", noted)
    teacher.output_layer.weight[2] = 0.8 * teacher.output_layer.weight[6]  # both often enough
    written(teacher, [b""] * 3000, max_new_bytes=2, seed=9)
    drawn = [tokens[0] for tokens in made[0].tokens if tokens and TOKENS[tokens[0]] == b"ab"]
    p = teacher.logits(teacher(teacher.embed(torch.tensor([TABLE.start_id])), torch.tensor([0, 1], dtype=torch.int32)))
    share = float(p[0, [2, 6]].double().softmax(-1)[0])
    deviation = math.sqrt(share * (1 - share) * len(drawn))
    assert len(drawn) > 60 and 0.2 < share < 0.8 and abs(drawn.count(2) - share * len(drawn)) < 3.3 * deviation


def _assert_drawn(drawn: list[bytes], p: dict[bytes, float]) -> None:
    assert set(drawn) <= set(p)
    chances = torch.tensor([*p.values()], dtype=torch.float64)
    counts = torch.tensor([drawn.count(text) for text in p], dtype=torch.float64)
    common = chances * len(drawn) >= 5
    wanted = torch.cat((chances[common], chances[~common].sum()[None])) * len(drawn)
    found = torch.cat((counts[common], counts[~common].sum()[None]))
    statistic = float(((found - wanted).square() / wanted.clamp(min=1.0)).sum())
    degrees = int(common.sum())
    assert statistic < degrees + 3.1 * math.sqrt(2 * degrees) + 6, (statistic, degrees)


def test_the_first_byte_has_the_teachers_chances_whatever_the_draw(teacher: Backbone) -> None:
    """The uniform number is turned into a pair as the exact pairs' probabilities say: each is drawn that often."""
    exact = TeacherBytes(teacher, TABLE).next_pairs()[0]
    texts = written(teacher, [b""] * 2000, max_new_bytes=1)
    chances: dict[bytes, float] = defaultdict(float)
    for joint in exact.nonzero()[:, 0].tolist():
        chances[b"" if joint == END_OF_DOCUMENT_CLASS else bytes([joint % 256])] += float(exact[joint])
    _assert_drawn([text.byte_ids for text in texts], chances)


def test_the_product_over_a_written_text_is_its_exact_score(teacher: Backbone) -> None:
    seen = 0
    for text in written(teacher, [b""] * 60, max_new_bytes=60, seed=11):
        pieces = pieces_of(text)
        if not text.ended or not pieces or b"ab" in pieces:  # two ids spell "ab": which was drawn is not told
            continue
        tokens = np.array([TOKENS.index(piece) for piece in pieces])
        assert b"".join(pieces) == text.byte_ids
        segment = Segment(
            document=0, byte_ids=np.frombuffer(text.byte_ids, dtype=np.uint8), tokens=tokens,
            token_lengths=np.array([len(piece) for piece in pieces]), next_byte=None, next_token=None,
            next_token_length=None,
        )  # fmt: skip
        row = pack_row(
            [segment], row_bytes=len(text.byte_ids) + 4, chunk_bucket=4, start_id=TABLE.start_id, end_of_text_id=0
        )
        score = score_teacher_bytes(teacher, ByteTree.of(TABLE, teacher.columns), row)
        bits = float(score.bits.sum()) + score.end_bits
        assert text.log_probability == pytest.approx(-bits * math.log(2), rel=1e-5)
        seen += 1
    assert seen > 10


def spellings(prompt: bytes) -> Iterator[tuple[list[int], bytes]]:
    """(finished tokens, begun bytes of the next) that a prompt may be read as."""
    yield [], prompt
    for token in ALLOWED:
        piece = TOKENS[token] or b""
        if prompt.startswith(piece):
            for tokens, rest in spellings(prompt[len(piece) :]):
                yield [token, *tokens], rest


def test_a_prompt_is_read_along_all_its_spellings(teacher: Backbone) -> None:
    """With paths for all of them, what a prompt is read as is drawn by their true posterior."""
    prompt = b"bca"
    posterior: dict[tuple[bool, ...], float] = defaultdict(float)
    for tokens, rest in spellings(prompt):
        chance = 1.0
        for number, token in enumerate(tokens):
            chance *= masses_behind(teacher, tokens[:number])[TOKENS[token] or b""]
        if rest:
            behind = masses_behind(teacher, tokens)
            chance *= sum(mass for text, mass in behind.items() if text.startswith(rest) and text != rest)
        lengths = [len(TOKENS[token] or b"") for token in tokens]
        ends = set(itertools.accumulate(lengths))
        posterior[tuple(place + 1 in ends for place in range(len(prompt)))] += chance
    total = sum(posterior.values())
    texts = written(teacher, [prompt] * 400, max_new_bytes=1, paths=16)
    drawn = ["".join(str(int(bit)) for bit in text.prompt_bits).encode() for text in texts]
    wanted = {
        "".join(str(int(b)) for b in bits).encode(): chance / total for bits, chance in posterior.items() if chance
    }
    assert len(wanted) > 3
    _assert_drawn(drawn, wanted)


def test_whatever_tokens_spell_is_read_along_one_path(teacher: Backbone) -> None:
    drawn = random.Random(3)
    prompts = [b"abaabcab\0"]
    for size in range(1, 9):
        prompts += [b"".join(TOKENS[token] or b"" for token in drawn.choices(ALLOWED, k=size)) for _ in range(8)]
    for prompt, text in zip(prompts, written(teacher, prompts, max_new_bytes=0, paths=1), strict=True):
        pieces = pieces_of(replace(text, byte_ids=prompt, bits=text.prompt_bits))
        assert set(pieces) <= set(TOKENS)
        rest = prompt[len(b"".join(pieces)) :]
        assert any(token.startswith(rest) for token in TOKENS if token)


def limited(teacher: Backbone, positions: int) -> Backbone:
    teacher.backbone_config = replace(teacher.backbone_config, max_position_embeddings=positions)
    return teacher


def test_a_prompt_of_too_many_tokens_is_refused_before_it_is_read(
    teacher: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [b"a", b"abc" * 2, b"\x97\xa5" * 5000]
    with monkeypatch.context() as patched:
        calls: list[int] = []
        chances = TeacherBytes.log_chances
        patched.setattr(TeacherBytes, "log_chances", lambda *arguments: calls.append(0) or chances(*arguments))
        says = "the prompt 3 of 3 is too long: it has 10000 bytes, and the first 5 of them fill the 6 positions"
        with pytest.raises(ValueError, match=f"{says}.* each token takes one"):
            written(limited(teacher, 6), prompts)
    assert len(calls) == 6
    fitting = written(teacher, [b"\x97\xa5" * 2 + b"\x97", b"abcabc"], max_new_bytes=8)
    assert fitting[0].is_full and not fitting[0].byte_ids  # five tokens and the start


def test_a_text_ends_where_the_teachers_positions_do(teacher: Backbone) -> None:
    texts = written(limited(teacher, 6), [b"", b"abcab", b"b"] * 10, max_new_bytes=60)
    tokens = [1 + sum(text.prompt_bits) + sum(text.bits) for text in texts]
    assert all(text.ended or text.is_full for text in texts) and sum(text.is_full for text in texts) > 5
    assert all(count == 6 if text.is_full else count <= 6 for text, count in zip(texts, tokens, strict=True))


def test_texts_do_not_depend_on_who_is_written_beside_them(teacher: Backbone) -> None:
    prompts = [b"abc", b"", "日".encode()[:2], b"abca"]
    together = written(teacher, prompts, max_new_bytes=20, seed=5)
    assert [text.byte_ids for text in written(teacher, prompts, max_new_bytes=12, seed=5)] == [
        text.byte_ids[:12] for text in together
    ]
    for number, prompt in enumerate(prompts):
        alone = written(teacher, [prompt], max_new_bytes=20, seed=5 + number)[0]
        assert (alone.byte_ids, alone.bits, alone.prompt_bits) == (
            together[number].byte_ids, together[number].bits, together[number].prompt_bits,
        )  # fmt: skip


def test_greedy_takes_the_likeliest_pairs(teacher: Backbone) -> None:
    text = written(teacher, [b""], max_new_bytes=12, sampling=Sampling(temperature=0), seed=1)[0]
    running = TeacherBytes(teacher, TABLE)
    for byte, bit in zip(text.byte_ids, text.bits, strict=True):
        assert int(running.next_pairs().argmax()) == byte + 256 * bit
        running.advance(torch.tensor([byte]), torch.tensor([bit]))
    assert len(text.byte_ids) == 12 or int(running.next_pairs().argmax()) == END_OF_DOCUMENT_CLASS


@pytest.mark.parametrize(
    ("prompt", "settings", "says"),
    [
        (b"abz", {}, "no tokens that spell its first 3 bytes"),
        (b"\xff", {}, "byte 255"),
        (b"a", {"mode": GenerationMode.BYTES}, "leave the mode out"),
        (b"a", {"reading": PromptReading.OFFICIAL}, "leave the mode out"),
        (b"a", {"utf8": Utf8Mode.CONSTRAIN}, "leave utf8"),
        (b"a", {"sampling": Sampling(boundary_threshold=0.5)}, "boundary threshold out"),
    ],
)
def test_what_the_teacher_cannot_write_is_refused(
    teacher: Backbone, prompt: bytes, settings: dict[str, object], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        written(teacher, [prompt], **settings)


def test_the_exact_score_is_the_token_nll_less_the_disallowed_mass(teacher: Backbone) -> None:
    row = row_of(TEXT)
    tree = ByteTree.of(TABLE, teacher.columns)
    exact, tokens = score_teacher_bytes(teacher, tree, row), score_tokens(teacher, row)
    assert torch.equal(exact.bytes, tokens.bytes) and exact.ends == tokens.ends == 1
    p = teacher.logits(teacher(teacher.embed(row.tokens), row.cu_chunks)).double().softmax(-1)
    allowed = p[:, [*ALLOWED, 0]].sum(-1).log2()
    mask = text_chunks(row)
    gained = (p[:, 2] + p[:, 6]).log2() - p.gather(1, row.token_labels[:, None])[:, 0].log2()  # two ids spell "ab"
    alike = mask & torch.isin(row.token_labels, torch.tensor([2, 6]))
    expected = tokens.bits.sum() + allowed[mask].sum() - gained[alike].sum()
    assert float(exact.bits.sum()) == pytest.approx(float(expected), rel=1e-6) and alike.any()
    # and it is what the bytes' own targets say
    picked = targets_of(teacher, row).gather(1, row.labels[:, None])[:, 0].double().log2()
    assert float(exact.bits.sum()) == pytest.approx(-float(picked[text_positions(row)].sum()), rel=1e-5)
    last = int(row.is_real.sum()) - 1
    assert int(row.labels[last]) == END_OF_DOCUMENT_CLASS
    assert exact.end_bits == pytest.approx(-float(picked[last]), rel=1e-5)
