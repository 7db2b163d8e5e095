"""Every family against transformers: configuration, logits, gradients, alone and cut by tensors and pipeline stages."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from megabyte_distill.config.model import RopeScaling
from megabyte_distill.config.published import PUBLISHED_BACKBONES
from megabyte_distill.conversion.compare import roundtrip
from megabyte_distill.conversion.families import family_named, family_of_config
from megabyte_distill.conversion.hf_config import HfConfig
from megabyte_distill.conversion.hf_import import import_teacher
from megabyte_distill.conversion.model_config import read_model_config
from megabyte_distill.conversion.teacher_folder import load_teacher
from megabyte_distill.parallel.process_groups import World
from tests.conversion.conftest import write_tokenizer
from tests.conversion.family_cases import CASES, LENGTHS, SHAPE, their_answers, theirs, tokens
from tests.pretrain.job import run_as_ranks

WORKER = Path(__file__).with_name("parallel_backbones.py")
TOLERANCE = 1e-5
"""fp32 with logits of up to about 5 and gradients of up to about 1: what another order of additions leaves."""
Distances = dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def cases(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder a case: hf/, answers.pt and the imported megatron/."""
    root = tmp_path_factory.mktemp("families")
    for name in CASES:
        their_answers(name, root / name)
        write_tokenizer(root / name / "hf")
        import_teacher(root / name / "hf", root / name / "megatron")
    return root


@pytest.fixture(scope="module")
def measured(cases: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[int, int], Distances]]:
    """The distances of all cases at a tensor and a pipeline parallel size; ranks are started once for each."""
    output = tmp_path_factory.mktemp("distances")

    def measure(tensor: int, pipeline: int) -> Distances:
        found = output / f"{tensor}-{pipeline}.json"
        if not found.exists():
            words = [str(WORKER), str(cases), str(tensor), str(pipeline), str(found)]
            done = run_as_ranks(*words, processes=tensor * pipeline, timeout=280)
            assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(found.read_text())

    yield measure


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_equal_those_of_transformers(
    measured: Callable[[int, int], Distances], name: str, tensor: int, pipeline: int
) -> None:
    found = measured(tensor, pipeline)[name]
    assert set(found) == ({"logits", "gradients"} if pipeline == 1 else {"logits"})
    assert max(found.values()) < TOLERANCE, found


@pytest.mark.parametrize("name", CASES)
def test_config_fields_are_read_and_written(cases: Path, name: str) -> None:
    prefix, _ = CASES[name]
    read = read_model_config(cases / name / "megatron").backbone
    family = family_named(read.family)
    written = family.write_config(read)
    assert family.read_config(HfConfig(written, "config.json")) == read
    # what transformers makes of our fields is what it made of its own
    again = getattr(transformers, f"{prefix}ForCausalLM").config_class(**written).to_dict()
    assert family.read_config(HfConfig(again, "config.json")) == read
    assert family_of_config(HfConfig.read(cases / name / "hf")) is family


@pytest.mark.parametrize("name", CASES)
def test_roundtrip_is_bit_identical_and_transformers_reads_the_export(
    world: World, cases: Path, tmp_path: Path, name: str
) -> None:
    from megabyte_distill.conversion.hf_export import export_teacher

    assert roundtrip(cases / name / "hf") > 0
    (cases / name / "megatron" / "tokenizer" / "config.json").unlink(missing_ok=True)  # so that ours is written
    export_teacher(cases / name / "megatron", tmp_path / "out")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation="eager")
    assert type(model) is type(theirs(name))
    with torch.no_grad():
        got = torch.cat([model(ids[None]).logits[0] for ids in tokens().split(LENGTHS)])
    assert torch.equal(got, torch.load(cases / name / "answers.pt")["logits"])


@pytest.mark.parametrize("name", CASES)
def test_stepping_equals_reading_at_once(world: World, cases: Path, name: str) -> None:
    backbone = load_teacher(cases / name / "megatron").backbone
    ids = tokens()[: LENGTHS[0]]
    with torch.no_grad():
        at_once = backbone(backbone.embed(ids), torch.tensor([0, len(ids)], dtype=torch.int32))
        cache = backbone.init_cache(1)
        row = torch.tensor([0])
        stepped = torch.cat([backbone.step(backbone.embed(ids[i : i + 1]), cache, row) for i in range(len(ids))])
    torch.testing.assert_close(stepped, at_once, rtol=0, atol=1e-4)


def config_of(architecture: str, **fields: Any) -> HfConfig:
    return HfConfig({"architectures": [f"{architecture}ForCausalLM"], **SHAPE, **fields}, "config.json")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (config_of("Qwen3", attention_bias=True), "attention_bias = True"),
        (config_of("Qwen2", num_key_value_heads=None), "num_key_value_heads is missing"),
        (config_of("Qwen2", use_sliding_window=True, max_window_layers="all"), "max_window_layers is 'all'"),
        (
            config_of(
                "Qwen2", use_sliding_window=True, max_window_layers=1, rope_scaling={"type": "yarn", "factor": 2}
            ),
            "sliding window together with RoPE scaling",
        ),
        (config_of("Olmo3", layer_types=["full_attention"]), "expected 4 times"),
        (config_of("Olmo3", rope_parameters={"rope_type": "yarn", "factor": 2}), "neither full_attention nor"),
        (
            config_of(
                "Olmo3",
                rope_parameters={
                    "full_attention": {"rope_type": "default", "rope_theta": 1e4},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
                },
            ),
            "expected no scaling and the rope_theta",
        ),
        (config_of("Qwen2", rope_scaling={"type": "yarn", "factor": 2, "mscale": 1.0}), "mscale = 1.0"),
        (config_of("Olmo2", attention_bias=True), "attention_bias = True"),
        (config_of("Gemma", hidden_act="silu"), "hidden_act = 'silu' is not supported"),
        (config_of("Gemma", use_bidirectional_attention=True), "the backbone is causal"),
        (config_of("Gemma3", num_key_value_heads=None), "num_key_value_heads is missing"),
        (config_of("Gemma3", final_logit_softcapping=30.0), "final_logit_softcapping = 30.0"),
        (config_of("Gemma3", attn_logit_softcapping=50.0), "attn_logit_softcapping = 50.0"),
        (
            config_of("Gemma3", rope_parameters={"sliding_attention": {"rope_type": "linear", "factor": 2.0}}),
            "expected no scaling",
        ),
        (config_of("Gemma3", rope_parameters={"rope_type": "default"}), "neither full_attention nor"),
    ],
)
def test_what_a_family_cannot_reproduce_is_refused(config: HfConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        family_of_config(config).read_config(config)


def test_olmo3s_old_spelling_scales_the_full_layers_alone() -> None:
    """As transformers 4 wrote it."""
    scaling = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192}
    fields = {"rope_theta": 5e5, "rope_scaling": scaling, "sliding_window": 16}
    config = config_of("Olmo3", **fields)
    read = family_of_config(config).read_config(config)
    assert read.sliding_layers == (0, 1, 2) and read.rope_scaling is not None and read.rope_scaling["factor"] == 8.0
    theirs_of = transformers.Olmo3Config(**{**SHAPE, **fields, "rope_scaling": dict(scaling)})
    assert theirs_of.rope_parameters["sliding_attention"]["rope_type"] == "default"
    assert family_of_config(config).read_config(HfConfig(theirs_of.to_dict(), "config.json")) == read


GEMMA3_1B = {
    "architectures": ["Gemma3ForCausalLM"], "attention_bias": False, "attn_logit_softcapping": None,
    "eos_token_id": [1, 106], "final_logit_softcapping": None, "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152, "intermediate_size": 6912,
    "max_position_embeddings": 32768, "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26,
    "num_key_value_heads": 1, "pad_token_id": 0, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512,
    "sliding_window_pattern": 6, "vocab_size": 262144,
}  # fmt: skip
"""As the first releases of Gemma 3 spell it."""


@pytest.mark.parametrize("fields", [{}, {"rope_scaling": {"factor": 8.0, "rope_type": "linear"}}])
def test_gemma3s_old_spelling_is_read_as_transformers_reads_it(fields: dict[str, Any]) -> None:
    config = HfConfig({**GEMMA3_1B, **fields}, "config.json")
    read = family_of_config(config).read_config(config)
    scaled = {"rope_scaling": {"factor": 8.0}, "rope_scaling_kind": RopeScaling.LINEAR} if fields else {}
    assert read == replace(PUBLISHED_BACKBONES["gemma3-1b"], **scaled)
    theirs_of = transformers.Gemma3TextConfig(**{**GEMMA3_1B, **copy.deepcopy(fields)}).to_dict()
    assert theirs_of["rope_parameters"]["sliding_attention"]["rope_type"] == "default"
    assert family_of_config(config).read_config(HfConfig(theirs_of, "config.json")) == read


def test_gemmas_first_releases_say_gelu_and_mean_its_tanh() -> None:
    read = family_of_config(config_of("Gemma")).read_config
    assert read(config_of("Gemma", hidden_act="gelu")) == read(config_of("Gemma"))
    assert transformers.GemmaConfig(hidden_act="gelu").hidden_act == "gelu_pytorch_tanh"


REQUIRED = {
    "hidden_size": 72, "intermediate_size": 92, "num_hidden_layers": 4, "num_attention_heads": 6,
    "num_key_value_heads": 2, "vocab_size": 131,
}  # fmt: skip


@pytest.mark.parametrize("prefix", ["Llama", "Mistral", "Qwen2", "Qwen3", "Olmo2", "Olmo3", "Gemma", "Gemma3"])
def test_absent_fields_mean_what_transformers_takes_them_for(prefix: str) -> None:
    config = HfConfig({"architectures": [f"{prefix}ForCausalLM"], **REQUIRED}, "config.json")
    family = family_of_config(config)
    theirs_of = getattr(transformers, f"{prefix}ForCausalLM").config_class(**REQUIRED).to_dict()
    assert theirs_of["rope_parameters"] and "rms_norm_eps" in theirs_of
    assert family.read_config(config) == family.read_config(HfConfig({**config.fields, **theirs_of}, "config.json"))


def test_olmo3s_old_fields_may_not_contradict_the_new_ones() -> None:
    plain = {"rope_type": "default", "rope_theta": 5e5}
    both = config_of(
        "Olmo3",
        rope_parameters={"full_attention": plain, "sliding_attention": plain},
        rope_scaling={"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 8192},
    )
    with pytest.raises(ValueError, match="contradict each other"):
        family_of_config(both).read_config(both)


def test_a_mistral_without_the_field_has_a_window() -> None:
    read = family_of_config(config_of("Mistral")).read_config
    assert read(config_of("Mistral", max_position_embeddings=8192)).sliding_window == 4096
    assert read(config_of("Mistral", max_position_embeddings=8192, sliding_window=None)).sliding_window is None
    assert read(config_of("Mistral")).sliding_layers == ()
