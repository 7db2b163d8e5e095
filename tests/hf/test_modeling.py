"""An exported student equals the one it was made from, as a causal byte model and as a joint one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, DynamicCache

from megabyte_distill.alphabet import BOS_BYTE, PAD_BYTE
from megabyte_distill.config.model import ByteMixer, ChunkPooling, DechunkMode, RouterKind
from megabyte_distill.hf.exported_folder import load_exported
from megabyte_distill.inference.engine import Engine
from megabyte_distill.inference.generation import GenerationSettings, generate
from megabyte_distill.inference.sampling import Sampling
from megabyte_distill.inference.utf8 import Utf8Mode
from tests.hf.exported import (
    PATHS,
    TEXTS,
    Exported,
    load,
    make_exported,
    native_greedy,
    native_log_probabilities,
    padded,
)

pytestmark = pytest.mark.usefixtures("world")


@pytest.mark.parametrize("mode", [DechunkMode.HARD, DechunkMode.CAUSAL])
@pytest.mark.parametrize("mixer", list(ByteMixer))
def test_logits_of_a_ragged_batch_equal_the_megatron_students(
    tmp_path: Path, mixer: ByteMixer, mode: DechunkMode
) -> None:
    router = RouterKind.LINEAR if mixer is ByteMixer.LOCAL_ATTENTION else RouterKind.OFFICIAL
    tied = mode is DechunkMode.CAUSAL
    exported = make_exported(tmp_path, mixer, mode, side={"router": router}, tied_embeddings=tied)
    for dtype, tolerance in ((torch.float64, 0.0), (torch.float32, 5e-6)):
        model = exported.load(dtype=dtype)
        exported.student.to(dtype)
        native = [native_log_probabilities(exported.student, text) for text in TEXTS]
        for side in ("left", "right"):
            input_ids, mask = padded(TEXTS, side)
            logits = model(input_ids, attention_mask=mask).logits
            assert logits.dtype is torch.float32 and logits.shape == (*input_ids.shape, 256)
            for row, wanted in enumerate(native):
                got = logits[row, mask[row] == 1].double()
                torch.testing.assert_close(got, wanted, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("pooling", [ChunkPooling.MEAN_LAST, ChunkPooling.MAX])
def test_pooling_and_ngrams_travel_with_the_student(tmp_path: Path, pooling: ChunkPooling) -> None:
    side = {"chunk_pooling": pooling, "byte_ngram_tables": (3, 5), "byte_ngram_rows": 40}
    exported = make_exported(tmp_path, side=side)
    assert exported.student.byte_encoder.ngram_table is not None and exported.student.byte_encoder.ngram_table.any()
    model, text = exported.load(), TEXTS[0]
    logits = model(torch.tensor([list(text)])).logits[0].double()
    torch.testing.assert_close(logits, native_log_probabilities(exported.student, text)[1:], rtol=5e-6, atol=1e-5)


def test_columns_that_are_not_read_repeat_the_last_one_read(exported: Exported, model: Any) -> None:
    input_ids, mask = padded(TEXTS, "right")
    logits = model(input_ids, attention_mask=mask).logits
    for row, text in enumerate(TEXTS):
        assert torch.equal(logits[row, len(text) :], logits[row, len(text)].expand_as(logits[row, len(text) :]))
    assert torch.equal(model(input_ids).logits, logits), "PAD is not read, mask or none"


def test_a_bos_begins_a_document_and_one_in_front_changes_nothing(exported: Exported, model: Any) -> None:
    texts = [b"first", b"2nd one"]
    with_bos = model(torch.tensor([[BOS_BYTE, *texts[0], BOS_BYTE, *texts[1]]])).logits[0].double()
    wanted = [native_log_probabilities(exported.student, text) for text in texts]
    torch.testing.assert_close(with_bos, torch.cat(wanted), rtol=5e-6, atol=1e-5)
    without = model(torch.tensor([list(texts[0])])).logits[0]
    torch.testing.assert_close(without.double(), with_bos[1 : 1 + len(texts[0])], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_reading_in_pieces_equals_reading_at_once(model: Any, side: str, name: str) -> None:
    input_ids, mask = padded(TEXTS, side)
    whole = model(input_ids, attention_mask=mask).logits
    cache, pieces, seen = None, [], 0
    for size in (3, 1, input_ids.shape[1] - 4):
        given = {} if cache is None else {name: cache}
        piece, seen = input_ids[:, seen : seen + size], seen + size
        output = model(piece, attention_mask=mask[:, :seen], use_cache=True, **given)
        cache = output["cache"] if "cache" in output else output["past_key_values"]
        assert cache.get_seq_length() == seen
        pieces.append(output.logits)
    assert torch.equal(torch.cat(pieces, dim=1), whole)


def test_what_is_no_argument_is_refused(model: Any) -> None:
    with pytest.raises(TypeError, match="position_ids"):
        model(torch.tensor([[1]]), position_ids=torch.tensor([[0]]))
    with pytest.raises(TypeError, match="past"):
        model(torch.tensor([[1]]), past=None)


def test_bad_input_is_named(model: Any) -> None:
    ids = torch.tensor([[BOS_BYTE, 65]])
    state = model(ids, use_cache=True)["cache"]
    for arguments, message in (
        ({"input_ids": torch.tensor([[256]])}, "from 256 to 256; expected bytes"),
        ({"input_ids": torch.tensor([[-1]])}, "from -1 to -1"),
        ({"input_ids": torch.tensor([1, 2])}, r"shape \[2\]; expected \[B, L\]"),
        ({"input_ids": torch.empty(1, 0, dtype=torch.int64)}, "at least one byte"),
        ({"input_ids": ids, "attention_mask": torch.ones(1, 3)}, r"shape \[1, 3\]; expected \[1, 2\]"),
        ({"input_ids": ids, "attention_mask": torch.full((1, 2), 0.5)}, "other than 0 and 1"),
        ({"input_ids": ids, "cache": DynamicCache()}, "cache is a DynamicCache"),
        ({"input_ids": ids.repeat(2, 1), "cache": state}, "cache has 1 rows, input_ids 2"),
        ({"input_ids": ids, "cache": state, "past_key_values": model(ids, use_cache=True)["cache"]}, "two names"),
        ({"input_ids": ids, "labels": torch.tensor([[1]])}, r"labels has shape \[1, 1\]"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**arguments)
    with pytest.raises(ValueError, match="cannot be cut back"):
        state.crop(-1)


def test_loss_is_the_mean_over_bytes_of_text(exported: Exported, model: Any) -> None:
    nats = [
        -native_log_probabilities(exported.student, text)[place, byte]
        for text in TEXTS
        for place, byte in enumerate(text)
    ]
    for side in ("left", "right"):
        input_ids, mask = padded(TEXTS, side)
        output = model(input_ids, attention_mask=mask, labels=input_ids)
        torch.testing.assert_close(output.loss.double(), torch.stack(nats).mean(), rtol=5e-6, atol=1e-5)
        assert torch.equal(model(input_ids, labels=input_ids).loss, output.loss)  # PAD speaks for itself
    loss, logits = model(input_ids, attention_mask=mask, labels=input_ids, return_dict=False)
    assert torch.equal(loss, output.loss) and torch.equal(logits, output.logits)
    last = model(input_ids, attention_mask=mask, logits_to_keep=2).logits
    assert torch.equal(last, output.logits[:, -2:])


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("bos", [True, False])
def test_greedy_generation_equals_the_native_filters(
    exported: Exported, model: Any, use_cache: bool, bos: bool
) -> None:
    texts = TEXTS if bos else [text for text in TEXTS if text]
    input_ids, mask = padded(texts, "left", bos=bos)
    got = model.generate(
        input_ids, attention_mask=mask, max_new_tokens=12, do_sample=False, use_cache=use_cache, eos_token_id=None
    )
    assert torch.equal(got[:, : input_ids.shape[1]], input_ids)
    wanted = [native_greedy(exported.student, text, 12) for text in texts]
    got_bytes = [row[input_ids.shape[1] :] for row in got.tolist()]
    # BOS begins another document, in the export and not in the loop it is compared with
    assert [cut(row) for row in got_bytes] == [cut(row) for row in wanted]
    assert sum(len(cut(row)) for row in wanted) > 20


def cut(taken: list[int]) -> list[int]:
    return taken[: taken.index(BOS_BYTE) + 1] if BOS_BYTE in taken else taken


def test_a_row_that_has_ended_is_padded_and_the_others_go_on(exported: Exported, model: Any) -> None:
    wanted = [native_greedy(exported.student, text, 10) for text in TEXTS]
    stop = next(byte for row in wanted for byte in row if any(byte not in other for other in wanted))
    input_ids, mask = padded(TEXTS, "left")
    got = model.generate(input_ids, attention_mask=mask, max_new_tokens=10, do_sample=False, eos_token_id=stop)
    for row, taken in zip(got[:, input_ids.shape[1] :].tolist(), wanted, strict=True):
        kept = taken[: taken.index(stop) + 1] if stop in taken else taken
        assert row == kept + [PAD_BYTE] * (10 - len(kept))


def test_sampling_and_beams_are_the_same_with_and_without_a_cache(model: Any) -> None:
    input_ids, mask = padded(TEXTS, "left")
    for settings in (
        {"do_sample": True, "num_return_sequences": 2},
        {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    ):
        drawn = []
        for use_cache in (True, False):
            torch.manual_seed(3)
            drawn.append(
                model.generate(input_ids, attention_mask=mask, max_new_tokens=8, use_cache=use_cache, **settings)
            )
        assert torch.equal(*drawn) and len(drawn[0]) == 2 * len(TEXTS)
    assert PAD_BYTE in model.generation_config.suppress_tokens


def test_generation_goes_on_from_a_returned_cache(model: Any) -> None:
    input_ids, mask = padded(TEXTS, "left")
    options = {"do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    whole = model.generate(input_ids, attention_mask=mask, max_new_tokens=8, **options).sequences
    half = model.generate(input_ids, attention_mask=mask, max_new_tokens=4, **options)
    longer = torch.cat((mask, mask.new_ones(len(mask), 4)), dim=1)
    rest = model.generate(half.sequences, attention_mask=longer, max_new_tokens=4, cache=half["cache"], **options)
    assert torch.equal(rest.sequences, whole)


@pytest.mark.parametrize("sampling", [Sampling(temperature=0.0), Sampling(temperature=0.9, top_p=0.95, top_k=40)])
def test_generate_bytes_equals_native_generation(exported: Exported, model: Any, sampling: Sampling) -> None:
    settings = GenerationSettings(max_new_bytes=20, sampling=sampling, paths=PATHS, seed=5)
    wanted = generate(exported.student, TEXTS, settings)
    got = model.generate_bytes(
        TEXTS, max_new_bytes=20, seed=5,
        temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k,
    )  # fmt: skip
    for mine, other in zip(got, wanted, strict=True):
        assert (mine.byte_ids, mine.bits, mine.prompt_bits) == (other.byte_ids, other.bits, other.prompt_bits)
        assert mine.log_probability == pytest.approx(other.log_probability, abs=1e-3)
    wanted = generate(exported.student, TEXTS, replace(settings, stop=(b"e",), utf8=Utf8Mode.CONSTRAIN))
    options = {"top_p": sampling.top_p, "top_k": sampling.top_k, "stop": "e", "utf8": "constrain"}
    got = model.generate_bytes(TEXTS, max_new_bytes=20, seed=5, temperature=sampling.temperature, **options)
    assert [row.byte_ids for row in got] == [row.byte_ids for row in wanted]
    with pytest.raises(ValueError, match="paths is 0"):
        model.generate_bytes(["a"], paths=0)


def test_a_configured_threshold_can_be_switched_off(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"max_new_bytes": 20, "seed": 5}
    exact = [(row.byte_ids, row.bits) for row in model.generate_bytes(TEXTS, **options)]
    monkeypatch.setattr(model.config, "boundary_threshold", 1e-6)
    decided, drawn = (
        [(row.byte_ids, row.bits) for row in model.generate_bytes(TEXTS, **options, boundary_threshold=threshold)]
        for threshold in (None, False)
    )
    assert drawn == exact != decided


@pytest.mark.parametrize("speculate", [0, 3])
def test_the_engine_writes_what_an_export_writes(exported: Exported, model: Any, speculate: int) -> None:
    wanted = [row.byte_ids for row in model.generate_bytes(TEXTS, max_new_bytes=20, temperature=0)]
    settings = GenerationSettings(max_new_bytes=20, sampling=Sampling(temperature=0), paths=PATHS)
    for student in (exported.student, load_exported(str(exported.folder))):
        got = Engine(student, max_batch_size=3, speculate=speculate).generate(TEXTS, settings)
        assert [row.byte_ids for row in got] == wanted


def test_saved_and_loaded_twice_it_is_the_same_folder(exported: Exported, model: Any, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(exported.folder, trust_remote_code=True)
    sources = {path.name: path.read_text() for path in exported.folder.glob("*.py")}
    input_ids, mask = padded(TEXTS, "left")
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    wanted, joint = model.generate(input_ids, **options), model.generate_bytes(TEXTS, max_new_bytes=8, temperature=0)
    current = model
    for folder in (tmp_path / "once", tmp_path / "twice"):
        current.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        assert {path.name: path.read_text() for path in folder.glob("*.py")} == sources
        assert load_file(folder / "model.safetensors").keys() == model.state_dict().keys()
        current = load(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        assert torch.equal(current.generate(input_ids, **options), wanted)
        assert [g.byte_ids for g in current.generate_bytes(TEXTS, max_new_bytes=8, temperature=0)] == [
            g.byte_ids for g in joint
        ]
        assert current.config.paths == PATHS and current.generation_config.suppress_tokens == [PAD_BYTE]
        assert tokenizer("ab")["input_ids"] == [BOS_BYTE, 97, 98]


def test_weights_that_do_not_fit_are_refused(exported: Exported, tmp_path: Path) -> None:
    weights = load_file(exported.folder / "model.safetensors")
    for change in ("missing", "unexpected", "mismatched"):
        folder = tmp_path / change
        folder.mkdir()
        for path in exported.folder.iterdir():
            if path.is_file():
                (folder / path.name).write_bytes(path.read_bytes())
        changed = dict(weights)
        name = "backbone.model.norm.weight"
        if change == "missing":
            del changed[name]
        elif change == "unexpected":
            changed["backbone.model.norm.bias"] = torch.zeros(32)
        else:
            changed[name] = torch.zeros(33)
        save_file(changed, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(
            (ValueError, RuntimeError), match=r"do not fit.*backbone\.model\.norm|ignore_mismatched_sizes"
        ):
            load(folder)


def test_a_config_that_makes_no_model_is_refused(exported: Exported, tmp_path: Path) -> None:
    from megabyte_distill.hf.configuration_megabyte import MegabyteConfig
    from megabyte_distill.hf.modeling_megabyte import MegabyteForCausalLM

    with pytest.raises(ValueError, match="paths is 0"):
        MegabyteConfig(paths=0)
    fields = json.loads((exported.folder / "config.json").read_text())
    for part, change, message in (
        ("byte_side", {"dechunk_mode": "official"}, "looks one byte ahead"),
        ("byte_side", {"wings": 2}, "unknown field wings"),
        ("backbone", {"qk_norm": "odd"}, "qk_norm is 'odd'"),
    ):
        config = MegabyteConfig(**{**fields, part: {**fields[part], **change}})
        with pytest.raises(ValueError, match=message):
            MegabyteForCausalLM(config)


def test_in_bfloat16_it_says_nearly_the_same(exported: Exported, model: Any) -> None:
    narrow = exported.load(dtype=torch.bfloat16)
    input_ids, mask = padded(TEXTS, "left")
    assert narrow.dtype is torch.bfloat16
    difference = narrow(input_ids, attention_mask=mask).logits - model(input_ids, attention_mask=mask).logits
    assert 0 < difference.abs().mean() < 0.2
    assert len(narrow.generate_bytes(["a"], max_new_bytes=5, seed=1)[0].byte_ids) <= 5
