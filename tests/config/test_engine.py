"""Transformer Engine and FP8: megatron's fields, all refusals together, chunk buckets that every rank can multiply."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megabyte_distill import optional
from megabyte_distill.config import ConfigError, parse_arguments
from megabyte_distill.config.engine import EngineConfig, Fp8Format, Fp8Recipe, TransformerImpl
from megabyte_distill.config.run_config import settings_from_dict, settings_to_dict
from megabyte_distill.runs import backbone_overrides

ENGINE = ["--transformer-impl", "transformer_engine", "--dry-run"]
"""A dry run asks for no Transformer Engine on this machine."""


def parsed(*words: str, size: int = 1):  # type: ignore[no-untyped-def]
    return parse_arguments(["--mock-data", "--micro-batch-size", "1", *words], world_size=size)


def problems(*words: str, size: int = 1) -> Sequence[str]:
    with pytest.raises(ConfigError) as caught:
        parsed(*words, size=size)
    return caught.value.problems


def test_without_flags_nothing_of_fp8_reaches_megatron() -> None:
    assert EngineConfig().transformer_fields == {"transformer_impl": "local"}
    assert EngineConfig().chunk_multiple == 1


@pytest.mark.parametrize("recipe", Fp8Recipe)
@pytest.mark.parametrize("number_format", Fp8Format)
def test_flags_become_megatrons_fields(recipe: Fp8Recipe, number_format: Fp8Format) -> None:
    keeps = recipe is not Fp8Recipe.DELAYED
    words = ["--first-last-layers-bf16", "--num-layers-at-end-in-bf16", "2"] if keeps else []
    settings = parsed(*ENGINE, "--bf16", "--fp8-format", number_format.value, "--fp8-recipe", recipe.value, *words)
    fields = backbone_overrides(settings, settings.stages["1b"])
    expected = {
        "transformer_impl": "transformer_engine",
        "fp8": number_format.value,
        "fp8_recipe": recipe.value,
        "first_last_layers_bf16": keeps,
        "num_layers_at_start_in_bf16": 1,
        "num_layers_at_end_in_bf16": 2 if keeps else 1,
    }
    assert {name: fields[name] for name in expected} == expected
    assert settings_from_dict(settings_to_dict(settings)) == settings


def test_a_run_of_before_has_local_layers() -> None:
    plain = settings_to_dict(parsed())
    del plain["engine"]
    assert settings_from_dict(plain).engine == EngineConfig(transformer_impl=TransformerImpl.LOCAL)


def test_everything_that_is_refused_is_refused_at_once() -> None:
    found = problems("--fp8-format", "hybrid", "--first-last-layers-bf16", "--2b.chunk-bucket", "20")
    assert len(found) == 4, found


def test_an_engine_that_cannot_be_used_is_refused_with_its_reason() -> None:
    why = optional.engine_problem()
    if why is None:
        pytest.skip("Transformer Engine is usable here")
    (problem,) = problems("--transformer-impl", "transformer_engine")
    assert why in problem and "leave the flag out" in problem


RANKS = [1, 2, 4, 8]


@settings(deadline=None)
@given(
    recipe=st.sampled_from(Fp8Recipe),
    tensor=st.sampled_from(RANKS),
    cuts=st.booleans(),
    bucket=st.integers(1, 600),
)
def test_a_bucket_is_taken_where_each_ranks_rows_divide_and_what_is_offered_instead_does(
    recipe: Fp8Recipe, tensor: int, cuts: bool, bucket: int
) -> None:
    cuts = cuts and tensor > 1
    words = [*ENGINE, "--bf16", "--fp8-format", "hybrid", "--fp8-recipe", recipe.value]
    words += ["--tensor-model-parallel-size", str(tensor), *(["--sequence-parallel"] if cuts else [])]
    rows_of_a_rank = bucket / (tensor if cuts else 1)
    if rows_of_a_rank % (32 if recipe is Fp8Recipe.MXFP8 else 16) == 0:
        assert parsed(*words, "--chunk-bucket", str(bucket), size=tensor).stages["2b"].chunk_bucket == bucket
        return
    told = problems(*words, "--chunk-bucket", str(bucket), size=tensor)
    (problem,) = (problem for problem in told if "--fp8-recipe" in problem)
    assert problem.startswith(f"--chunk-bucket: got {bucket}, expected a multiple of ")
    better = problem.split("; ")[-1].removesuffix(" would be")
    assert int(better) > bucket
    assert parsed(*words, "--chunk-bucket", better, size=tensor).stages["2b"].chunk_bucket == int(better)
