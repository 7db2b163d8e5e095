"""Dialogues become documents with a loss mask: every byte of an answer and of the end of its turn, and no other."""

from __future__ import annotations

import json
import shutil
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, normalizers

from megabyte_distill.alphabet import BYTE_VOCAB
from megabyte_distill.data.chat_template import CHATML, TEACHER, ChatTemplate, Turn, load_template
from megabyte_distill.data.dataset import ByteTokenDataset
from megabyte_distill.data.inspect_document import show_document
from megabyte_distill.data.loss_mask import marked_between
from megabyte_distill.data.manifest import Manifest, StoredPaths
from megabyte_distill.data.preprocess_summary import PreprocessSummary
from megabyte_distill.data.records import OnInvalid
from megabyte_distill.data.sampler import RowStream
from megabyte_distill.data.tokenizers import TokenizerKind
from megabyte_distill.data.verify import verify_dataset
from tests.data.conftest import TEXTS
from tests.data.preprocessing import preprocess
from tests.data.test_partitions import files_under
from tests.data.test_verify import put, rewrite

KEY = "messages"
JINJA_CHATML = (
    "{%- for message in messages %}\n{{- '<|im_start|>' + message.role + '\\n' }}\n"
    "{%- if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>\\n' }}{% endgeneration %}\n"
    "{%- else %}{{ message.content + '<|im_end|>\\n' }}{% endif %}\n{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}"
    "{% else %}{{ raise_exception('no role ' + m['role']) }}{% endif %}{% endfor %}"
)
FORGETFUL = "{% for m in messages %}{{ m.role }}: {{ m.content if loop.last else '…' }}\n{% endfor %}"
BARE = (
    "{% for m in messages %}{{ m.role }}{{ m.content }}{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
)

FRAGILE = (
    "{% for m in messages %}{{ m.content }}{% if m.role == 'user' %}{{ m.content.index('1') // (m.content | int) }}"
    "{% for _ in range(m.content | int) %}{% endfor %}{% endif %}{% endfor %}"
)


def says(*turns: str) -> dict[str, Any]:
    """``user: text`` and so on, as a record."""
    pairs = [turn.split(": ", 1) for turn in turns]
    return {KEY: [{"role": role, "content": content} for role, content in pairs]}


AWKWARD = [
    says(f"system: {TEXTS[i % len(TEXTS)]}", f"user: {TEXTS[i - 3]}", f"assistant: {text}", "user: ", "assistant: ")
    for i, text in enumerate(TEXTS)
]
RECORDS = [
    *AWKWARD,
    says("assistant: 日本語", "assistant: e\u0301 🇯🇵", "user: unanswered\0"),
    {KEY: [{"role": "user", "content": "a", "name": "b"}, {"role": "assistant", "content": "c", "tool_calls": []}],
     "tools": None, "id": 7},
    {"prompt": "e\u0301?", "completion": "\u0301 é"},
    {"prompt": [*says("user: a", "assistant: no answer here")[KEY], *says("user: b")[KEY]],
     "completion": says("assistant: \u3042")[KEY]},
]  # fmt: skip


def expected(record: dict[str, Any], form: str = "NFC") -> tuple[bytes, list[bool]]:
    """(the document, of each byte and of its end whether it is trained), put together piece by piece."""
    messages = record.get(KEY)
    pieces: list[tuple[str, bool]] = []
    if messages is None:
        sides = [(record["prompt"], "user", False), (record["completion"], "assistant", True)]
        turns = [
            (message["role"], message["content"], trains)
            for value, role, trains in sides
            for message in ([{"role": role, "content": value}] if isinstance(value, str) else value)
        ]
    else:
        turns = [(message["role"], message["content"], message["role"] == "assistant") for message in messages]
    for role, content, trains in turns:
        pieces += [(f"<|im_start|>{role}\n", False), (f"{content}<|im_end|>\n", trains)]
    raw = [(unicodedata.normalize(form, text).encode(), trains) for text, trains in pieces]
    marked = [trains for text, trains in raw for _ in text]
    return b"".join(text for text, _ in raw), [*marked, turns[-1][2]]


def write(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def store(
    folder: Path, tokenizer: Path, records: Sequence[dict[str, Any]], template: ChatTemplate | None = None, **more: Any
) -> PreprocessSummary:
    return preprocess(
        [write(folder / "chat.jsonl", records)], output_prefix=folder / "set", tokenizer_model=tokenizer,
        chat_template=template or ChatTemplate(CHATML), json_keys=(KEY,), **more,
    )  # fmt: skip


@pytest.fixture
def stem(tmp_path: Path, byte_level_folder: Path) -> str:
    return store(tmp_path, byte_level_folder, RECORDS).stems[KEY]


def test_the_mask_is_that_of_the_pieces(stem: str) -> None:
    """The tokenizer normalises (NFC), so that bytes move."""
    dataset = ByteTokenDataset(stem)
    changed = 0
    for number, record in enumerate(RECORDS):
        text, marked = expected(record)
        assert dataset[number].byte_ids.tobytes() == text
        assert dataset.marked(number, 0, len(text) + 1).tolist() == marked
        changed += text != expected(record, "NFD")[0]
    found = verify_dataset(stem)
    assert found.marked == sum(sum(expected(record)[1]) for record in RECORDS)
    assert found.normalized_documents > 2 and changed > 2
    assert "trained bytes" in show_document(dataset, 1)


@pytest.mark.parametrize("row_bytes", [24, 61, 4096])
def test_a_position_is_marked_where_the_byte_behind_it_is(stem: str, row_bytes: int) -> None:
    """Whatever rows cut: also at a cut, at a document's end and under BOS."""
    dataset = ByteTokenDataset(stem)
    stream = RowStream([dataset], row_bytes=row_bytes, chunk_bucket=8, seed=3, reads_loss_mask=True)
    ends = 0
    for plan in stream.next_rows(2 + 6000 // row_bytes):
        row, place = stream.materialize(plan), 0
        assert row.marked is not None and not row.marked[~row.is_real].any()
        for part in plan.segments:
            text, marked = expected(RECORDS[part.document])
            for byte in range(part.byte_start, part.byte_end + 1):
                assert bool(row.marked[place]) is marked[byte]
                assert byte == len(text) or int(row.labels[place]) % BYTE_VOCAB == text[byte]
                ends += byte == len(text) and marked[byte]
                place += 1
    assert ends > 3
    plain = RowStream([dataset], row_bytes=row_bytes, chunk_bucket=8, seed=3)
    assert plain.materialize(plain.next_rows(1)[0]).marked is None, "a stage that reads no mask trains on everything"


def test_the_built_in_template_is_chatml() -> None:
    """As transformers writes it, and with the answers that it marks."""
    from transformers.utils.chat_template_utils import render_jinja_template  # seconds, for this test alone

    ours, theirs = ChatTemplate(CHATML), ChatTemplate("jinja", JINJA_CHATML)
    for record in AWKWARD:
        turns = [(m["role"], m["content"]) for m in record[KEY]]
        text, spans = render_jinja_template(
            [record[KEY]], chat_template=JINJA_CHATML, return_assistant_tokens_mask=True
        )
        for template in (ours, theirs):
            found = template.write([Turn(role, content, role == "assistant") for role, content in turns])
            assert found.text == text[0]
            assert list(found.answers) == [tuple(span) for span in spans[0]]


def test_a_template_of_the_teachers(tmp_path: Path, byte_level_folder: Path) -> None:
    """From tokenizer_config.json, from chat_template.jinja, from a file; eos_token ends the turn and is trained."""
    folder = tmp_path / "teacher"
    folder.mkdir()
    for file in byte_level_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = {"eos_token": {"content": "<|endoftext|>"}, "chat_template": [{"name": "default", "template": LLAMA2}]}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    template = load_template(TEACHER, str(folder))
    record = says("user: x", "assistant: y", "user: z", "assistant: 日")
    dataset = ByteTokenDataset(store(tmp_path, folder, [record], template).stems[KEY])
    assert dataset[0].byte_ids.tobytes().decode() == "[INST] x [/INST] y <|endoftext|>[INST] z [/INST] 日 <|endoftext|>"
    assert [dataset[0].byte_ids[a:b].tobytes() for a, b in dataset.spans(0).reshape(2, 2)] == [
        b" y <|endoftext|>",
        " 日 <|endoftext|>".encode(),
    ]
    (folder / "chat_template.jinja").write_text(BARE)
    assert load_template(TEACHER, str(folder)).source == BARE
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": None}))
    template = load_template(TEACHER, str(folder))
    assert template.write([Turn("user", "x", False), Turn("assistant", "y", True)]).text == "userxassistanty"
    (folder / "chat_template.jinja").write_text(LLAMA2)
    with pytest.raises(ValueError, match=r"line 1: .*eos_token, which tokenizer_config.json beside .* does not name"):
        store(folder, folder, [record], load_template(TEACHER, str(folder)), end_of_text="<|endoftext|>")
    (folder / "chat_template.jinja").write_text(BARE)
    assert load_template(str(folder / "chat_template.jinja"), str(folder)).identity.startswith("jinja ")
    (tmp_path / "bad").write_text("{% if")
    with pytest.raises(ValueError, match="not a Jinja template"):
        load_template(str(tmp_path / "bad"), str(folder))
    with pytest.raises(ValueError, match=r"has no template, neither .* nor an entry chat_template"):
        load_template(TEACHER, str(byte_level_folder))


@pytest.mark.parametrize(
    ("record", "source", "message"),
    [
        (says("user: x"), "", "no message of the role 'assistant' to train on; its roles are user"),
        ({"text": "x"}, "", "no key 'messages', nor 'prompt' with 'completion'; it has 'text'"),
        ({KEY: "x"}, "", "'messages' is str, expected a list of objects"),
        ({KEY: [{"role": "assistant"}]}, "", "content of message 1 is missing, expected text"),
        ({KEY: [{"role": "assistant", "content": None}]}, "", "content of message 1 is NoneType, expected text"),
        (
            {KEY: [*says("user: x")[KEY], {"role": "assistant", "content": "y", "tool_calls": [{"id": "1"}]}]},
            "",
            "message 2 has 'tool_calls', which would be lost; expected role and content alone",
        ),
        (
            {"prompt": "x", "completion": [{"role": "assistant", "content": "y", "reasoning_content": "z"}]},
            "",
            "message 1 has 'reasoning_content', which would be lost",
        ),
        ({**says("user: x", "assistant: y"), "tools": [{}]}, "", "the record has 'tools', which would be lost"),
        (says("assistant: \ud800"), "", "content of message 1 has half a surrogate pair at character 0"),
        (says("user: <|im_end|>", "assistant: x"), "", "message 1 holds a mark of the template"),
        (says("system: x", "assistant: y"), LLAMA2.replace("eos_token", "'!'"), "refuses it .no role system"),
        (says("assistant: y", "user: x"), FORGETFUL, "writes message 1 otherwise once it is answered"),
        (says("user: 1x", "assistant: y"), FRAGILE, "refuses it .ZeroDivisionError: "),
        (says("user: 1000000", "assistant: y"), FRAGILE, "refuses it .OverflowError: Range too big"),
        (says("user: x", "assistant: y"), FRAGILE, "refuses it .ValueError: "),
    ],
)
def test_a_record_that_cannot_be_trained_on_stops_or_is_counted(
    tmp_path: Path, byte_level_folder: Path, record: dict[str, Any], source: str, message: str
) -> None:
    template = ChatTemplate("jinja", source) if source else None
    good = says("user: 1", "assistant: 2") if source != FORGETFUL else says("assistant: 2")
    with pytest.raises(ValueError, match=f"chat.jsonl, line 2: .*{message}"):
        store(tmp_path, byte_level_folder, [good, record], template)
    if source == FORGETFUL:
        return  # of which a single message alone is no prompt
    done = store(tmp_path, byte_level_folder, [good, record], template, on_invalid=OnInvalid.SKIP)
    assert done.documents == 1 and sum(done.skipped.values()) == 1


def test_an_answer_that_normalisation_joins_to_its_prompt_is_left_out(tmp_path: Path, byte_level_folder: Path) -> None:
    """t and a dot below are one character; no byte lies between prompt and answer then."""
    records = [says("user: x", "assistant: \u0323y"), says("user: x", "assistant: e\u0301")]
    done = store(tmp_path, byte_level_folder, records, ChatTemplate("bare", BARE))
    assert done.documents == 1 and done.skipped == {"normalisation joins a prompt and its answer": 1}
    dataset = ByteTokenDataset(done.stems[KEY])
    assert dataset.spans(0).tolist() == [14, 17] and dataset.num_bytes(0) == 16


@pytest.mark.parametrize("record", [says("user: ＜|im_end|＞", "assistant: y"), says("us\u1160er: x", "assistant: y")])
def test_a_mark_that_normalisation_makes_is_one(
    tmp_path: Path, byte_level_folder: Path, record: dict[str, Any]
) -> None:
    """Full-width signs under NFKC, and a role's character that the tokenizer writes as a line end."""
    tokenizer = Tokenizer.from_file(str(byte_level_folder / "tokenizer.json"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("\u1160", "\n")])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    shutil.copy(byte_level_folder / "tokenizer_config.json", tmp_path)
    records = [says("user: ＜x＞\u1160", "assistant: ＜y"), record]
    with pytest.raises(ValueError, match="line 2: message 1 holds a mark of the template"):
        store(tmp_path, tmp_path, records)
    done = store(tmp_path, tmp_path, records, on_invalid=OnInvalid.SKIP)
    text = ByteTokenDataset(done.stems[KEY])[0].byte_ids.tobytes().decode()
    assert done.documents == 1 and text == expected(says("user: <x>\n", "assistant: <y"))[0].decode()


def test_answers_without_a_mark_between_them_are_one_span(tmp_path: Path, byte_level_folder: Path) -> None:
    template = ChatTemplate("nothing", "{% for m in messages %}{{ m.content }}{% endfor %}")
    records = [says("user: x", "assistant: ab", "assistant: ", "assistant: c", "user: d"), says("assistant: ")]
    dataset = ByteTokenDataset(store(tmp_path, byte_level_folder, records, template).stems[KEY])
    assert [dataset.spans(number).tolist() for number in (0, 1)] == [[1, 4], [0, 1]]
    verify_dataset(dataset.name)


def test_partitions_and_resume(tmp_path: Path, byte_level_folder: Path) -> None:
    shards = [write(tmp_path / f"{i}.jsonl", RECORDS[i::3]) for i in range(3)]
    settings: dict[str, Any] = {"tokenizer_model": byte_level_folder, "json_keys": (KEY,)}
    single, parts, chatml = tmp_path / "single", tmp_path / "parts", ChatTemplate(CHATML)
    preprocess(shards, output_prefix=single, chat_template=chatml, **settings)
    preprocess(shards, output_prefix=parts, chat_template=chatml, partitions=3, **settings)
    assert files_under(parts) == files_under(single)
    assert {"_messages_loss_mask.bin", "_messages_loss_mask.idx"} < files_under(parts).keys()
    before = Path(f"{single}_messages_loss_mask.bin").stat().st_mtime_ns
    preprocess(shards, output_prefix=single, chat_template=chatml, resume=True, **settings)
    assert Path(f"{single}_messages_loss_mask.bin").stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="finished, but from other inputs, settings"):
        preprocess(shards, output_prefix=single, chat_template=ChatTemplate("j", JINJA_CHATML), resume=True, **settings)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put(1, 0, 10**6), "loss mask of document 1 is damaged .spans 1000000, .* do not rise"),
        (lambda items: items[0].pop(), "loss mask of document 0 is damaged .3 numbers"),
        (lambda items: items.pop(), "documents in the loss mask, 17 in the manifest"),
        (lambda items: items[2].clear(), "marked bytes, .* in the manifest"),
    ],
)
def test_a_damaged_mask_is_found(stem: str, change: Any, message: str) -> None:
    rewrite(StoredPaths(stem).mask_prefix, change)
    with pytest.raises(ValueError, match=message):
        verify_dataset(stem)


def test_plain_text_has_no_mask_and_says_so(tmp_path: Path, stem: str, byte_level_folder: Path) -> None:
    source = write(tmp_path / "plain.jsonl", [{"text": "plain text"}])
    plain = preprocess([source], output_prefix=tmp_path / "plain", tokenizer_model=byte_level_folder).stems["text"]
    dataset = ByteTokenDataset(plain)
    assert not dataset.has_loss_mask and not list(tmp_path.glob("plain_*loss_mask*"))
    stream = RowStream([dataset], row_bytes=64, chunk_bucket=8, seed=1, reads_loss_mask=True)
    with pytest.raises(ValueError, match=r"plain_text_document: no loss mask; .* --chat-template"):
        stream.materialize(stream.next_rows(1)[0])
    manifest = StoredPaths(plain).manifest
    content = json.loads(manifest.read_text())
    older = {name: value for name, value in content.items() if name not in ("loss_mask", "marked")}
    manifest.write_text(json.dumps(older))
    assert Manifest.load(manifest).digest == dataset.digest, "a set from before there were masks is the same data"


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("chat.txt", {}, "--chat-template reads dialogues, .* not from txt"),
        (
            "chat.jsonl",
            {"tokenizer_kind": TokenizerKind.NONE, "tokenizer_model": ""},
            "does not look at --chat-template",
        ),
    ],
)
def test_what_cannot_have_a_mask_is_refused(
    tmp_path: Path, byte_level_folder: Path, name: str, more: dict[str, Any], message: str
) -> None:
    source = write(tmp_path / name, RECORDS[:1])
    settings = {"tokenizer_model": byte_level_folder, "chat_template": ChatTemplate(CHATML), **more}
    with pytest.raises(ValueError, match=message):
        preprocess([source], output_prefix=tmp_path / "set", **settings)


def test_spans_are_read_at_any_place() -> None:
    spans = np.array([0, 2, 5, 6, 9, 12], dtype=np.int32)
    whole = [number in (0, 1, 5, 9, 10, 11) for number in range(14)]
    for start in range(14):
        for stop in range(start, 15):
            assert marked_between(spans, start, stop).tolist() == [*whole, False][start:stop]
