"""From a run to a Hugging Face folder, and the backbone back out of it; what cannot be exported is said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megabyte_distill.config.model import DechunkMode
from megabyte_distill.conversion import safetensors_folder
from megabyte_distill.conversion.compare import compare_logits, roundtrip
from megabyte_distill.conversion.flat_sources import ROOTS, flat_sources
from megabyte_distill.conversion.hf_config import HfConfig
from megabyte_distill.conversion.hf_import import HfModel, import_teacher
from megabyte_distill.conversion.student_export import export_student
from megabyte_distill.conversion.student_folder import BACKBONE_TOKENIZER, MODEL_TYPE, SHORTEST_CONTEXT
from megabyte_distill.conversion.teacher_folder import load_teacher
from megabyte_distill.hf.configuration_megabyte import DEFAULT_CONTEXT, MegabyteConfig
from megabyte_distill.model.backbone import Backbone
from megabyte_distill.runs import load_student
from tests.hf.exported import Exported, load, make_exported, native_log_probabilities
from tests.pretrain.conftest import finished, job
from tests.pretrain.job import Job
from tests.tiny_student import FAMILIES
from tools.convert_checkpoint import main

__all__ = ["finished", "job"]
pytestmark = pytest.mark.usefixtures("world")


@pytest.fixture(scope="module")
def exported(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Read only."""
    return make_exported(tmp_path_factory.mktemp("student"))


def test_a_run_is_exported_and_its_backbone_imported(
    job: Job, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    out = tmp_path / "out"
    command = ["export", "--megatron-path", str(finished), "--hf-path", str(out)]
    assert main([*command, "--paths", "2", "--boundary-threshold", "0.25"]) == 0
    assert "the student after stage 2b" in capsys.readouterr().out
    model = transformers.AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    student = load_student(finished, "2b").student
    assert model.config.paths == 2 and model.config.boundary_threshold == 0.25
    torch.testing.assert_close(
        model(torch.tensor([list(b"the old")])).logits[0].double(),
        native_log_probabilities(student, b"the old", 2)[1:],
        rtol=5e-6,
        atol=1e-5,
    )
    assert main(["import", "--hf-model", str(out), "--megatron-path", str(tmp_path / "teacher")]) == 0
    again = load_teacher(tmp_path / "teacher")
    assert again.config == student.backbone.backbone_config
    assert_same_backbone(student.backbone, again.backbone)
    assert again.token_bytes.hash == load_teacher(job.teacher).token_bytes.hash


def assert_same_backbone(one: Backbone, other: Backbone) -> None:
    """Bit for bit, but for the rows of the vocabulary's tables that only fill them up."""
    rows = one.backbone_config.vocab_size
    before, after = dict(one.named_parameters()), dict(other.named_parameters())
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        kept = rows if name in ("embedding.weight", "output_layer.weight") else len(tensor)
        assert same(tensor[:kept], after[name][:kept]), name


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def test_a_stage_is_exported_by_its_folder_and_an_early_one_refused(
    job: Job, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    assert main(["export", "--megatron-path", str(finished / "2a"), "--hf-path", out]) == 0
    assert "the student after stage 2a" in capsys.readouterr().out
    early = tmp_path / "early"
    shutil.copytree(finished, early, ignore=shutil.ignore_patterns("2a", "2b"))
    for path, more, message in (
        (finished / "1b", ["--overwrite"], "the decoder is untrained"),
        (early, ["--overwrite"], "after stage 1c the decoder is untrained"),
        (job.teacher, ["--overwrite"], "is not a run"),
        (finished / "2c", ["--overwrite"], "is not a folder"),
        (finished, [], "give --overwrite"),
        (finished, ["--overwrite", "--paths", "0"], "--paths: got 0, expected"),
        (
            finished,
            ["--overwrite", "--boundary-threshold", "1"],
            "--boundary-threshold: got 1, expected a number above 0 and below 1",
        ),
        (job.teacher, ["--teacher", "--paths", "2", "--overwrite"], "--paths: belongs to a student"),
    ):
        assert main(["export", "--megatron-path", str(path), "--hf-path", out, *more]) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("error: ") and message in error and "\n" not in error
    assert json.loads((tmp_path / "out" / "config.json").read_text())["paths"] == 4, "an error leaves the output"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_have_the_names_of_the_teachers_family(tmp_path: Path, dtype: torch.dtype) -> None:
    exported = make_exported(tmp_path, dtype=dtype)
    weights = load_file(exported.folder / "model.safetensors")
    config = json.loads((exported.folder / "config.json").read_text())
    assert {tensor.dtype for tensor in weights.values()} == {dtype}
    assert config["dtype"] == config["backbone_config"]["dtype"] == str(dtype).removeprefix("torch.")
    student = dict(exported.student.named_parameters())
    table = exported.student.backbone.embedding.weight[:150].to(dtype)
    assert same(weights["backbone.model.embed_tokens.weight"], table)
    assert weights["backbone.lm_head.weight"].shape == (150, 32), "padding rows of the vocabulary stay behind"
    assert "backbone.model.layers.1.self_attn.q_proj.weight" in weights
    for name, parameter in student.items():
        if not name.startswith("backbone."):
            assert same(weights[name], parameter.detach().to(dtype)), name


OTHERS = {**FAMILIES, "mistral": {"family": "mistral", "sliding_window": 8, "sliding_layers": (0, 1)}}


@pytest.mark.parametrize("family", [name for name in OTHERS if name != "llama"])
def test_other_families_come_back_bit_for_bit(tmp_path: Path, family: str) -> None:
    exported = make_exported(tmp_path, **OTHERS[family])
    logits = exported.load()(torch.tensor([list(b"some text")])).logits[0].double()
    wanted = native_log_probabilities(exported.student, b"some text")[1:]
    torch.testing.assert_close(logits, wanted, rtol=5e-6, atol=1e-5)
    import_teacher(exported.folder, tmp_path / "teacher")
    again = load_teacher(tmp_path / "teacher")
    assert again.config == exported.config.backbone
    assert_same_backbone(exported.student.backbone, again.backbone)


def test_above_the_limit_weights_are_sharded(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = safetensors_folder.write_tensors.__kwdefaults__
    monkeypatch.setattr(safetensors_folder.write_tensors, "__kwdefaults__", {**original, "max_shard_bytes": 30_000})
    sharded = tmp_path / "sharded"
    export_student(exported.student, exported.config, exported.tokenizer, sharded, dtype=torch.float32, paths=3)
    assert (
        len(list(sharded.glob("model-*-of-*.safetensors"))) > 1 and (sharded / "model.safetensors.index.json").exists()
    )
    one, other = exported.load().state_dict(), load(sharded).state_dict()
    assert one.keys() == other.keys() and all(same(tensor, other[name]) for name, tensor in one.items())
    assert HfModel.open(sharded).weights.shapes() == HfModel.open(exported.folder).weights.shapes()


def test_official_dechunk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"reads one byte ahead.*train stage 2 with"):
        make_exported(tmp_path, mode=DechunkMode.OFFICIAL)
    assert not (tmp_path / "exported").exists()


def test_transformers_reads_the_configuration_as_written(exported: Exported) -> None:
    written = json.loads((exported.folder / "config.json").read_text())
    read = MegabyteConfig(**written)
    assert read.model_type == written["model_type"] == MODEL_TYPE
    assert read.max_position_embeddings == SHORTEST_CONTEXT == DEFAULT_CONTEXT
    again = read.to_dict()
    assert {name: again[name] for name in written if name not in ("torch_dtype", "dtype")} == {
        name: value for name, value in written.items() if name not in ("torch_dtype", "dtype")
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone_config": None}, "a student without backbone_config"),
        ({"backbone": {}}, "backbone: missing field family"),
        ("norm_eps", "describe different models"),
        ("tokenizer", "save_pretrained does not copy"),
    ],
)
def test_a_damaged_export_is_not_imported(exported: Exported, tmp_path: Path, change: Any, message: str) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(exported.folder, folder)
    fields = json.loads((folder / "config.json").read_text())
    if change == "tokenizer":
        shutil.rmtree(folder / BACKBONE_TOKENIZER)
    elif change == "norm_eps":
        fields["backbone"]["norm_eps"] = 0.5
    else:
        fields |= change
    (folder / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=message):
        import_teacher(folder, tmp_path / "teacher")
    assert HfConfig.read(folder) and not (tmp_path / "teacher").exists()


def test_a_student_takes_part_in_a_round_trip_by_its_backbone_alone(exported: Exported, tmp_path: Path) -> None:
    assert roundtrip(exported.folder) == 2 * 9 + 3
    with pytest.raises(ValueError, match="is a byte-level student"):
        compare_logits(exported.folder, tmp_path)


def test_sources_name_no_package_of_ours() -> None:
    sources = flat_sources()
    assert {f"{root.split('.')[1]}.py" for root in ROOTS} <= sources.keys()
    for text in sources.values():
        assert "from megabyte_distill" not in text and "import megabyte_distill" not in text


def test_every_source_is_reached_as_transformers_looks_for_it(exported: Exported) -> None:
    from transformers.dynamic_module_utils import get_imports, get_relative_import_files, get_relative_imports

    reached: set[str] = set()
    for root in ROOTS:
        start = exported.folder / f"{root.split('.')[1]}.py"
        through_others = {Path(file).name for file in get_relative_import_files(start)}
        assert {f"{name}.py" for name in get_relative_imports(start)} == through_others, "some follow one step only"
        reached |= {start.name} | through_others
    assert reached == set(flat_sources()) == {path.name for path in exported.folder.glob("*.py")}
    outside = {name for file in exported.folder.glob("*.py") for name in get_imports(file)}
    assert {"torch", "transformers"} <= outside and not outside & {"megabyte_distill", "megatron", "numpy"}
