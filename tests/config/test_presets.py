"""Presets say what the paper says, and what they say makes sense."""

from __future__ import annotations

import pytest

from megabyte_distill.config import PRESETS, BoundarySource, DechunkMode, parse_arguments
from megabyte_distill.config.layers import all_options
from megabyte_distill.config.presets import SMOKE
from megabyte_distill.config.stage import STAGE_ORDER, AlignLossScale, ByteTargets
from megabyte_distill.curriculum.stage import TeacherNeed
from megabyte_distill.curriculum.stages import STAGES, resolved_stages

GPUS = 8
PUBLISHED = {"llama3.2-3b": 3072, "qwen3-4b": 2560, "olmo2-1b": 2048, "gemma3-1b": 1152}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("smoke", [False, True])
def test_a_preset_is_valid_as_it_is(name: str, smoke: bool) -> None:
    world_size = 1 if name == "tiny" or smoke else GPUS
    parse_arguments(["--mock-data", "--preset", name, *(["--smoke"] if smoke else [])], world_size=world_size)


@pytest.mark.parametrize("name", [*PRESETS, "smoke"])
def test_a_preset_names_only_settings_that_exist_where_they_act(name: str) -> None:
    layer = SMOKE if name == "smoke" else PRESETS[name]
    options = all_options()
    assert set(layer.common) <= set(options)
    assert set(layer.stages) <= set(STAGE_ORDER)
    for stage, values in layer.stages.items():
        for setting in values:
            assert options[setting].section == "stage"
            assert not options[setting].stages or stage in options[setting].stages


def test_official_is_the_recipe_point_by_point() -> None:
    settings = parse_arguments(["--mock-data", "--preset", "official"], world_size=GPUS)
    rows = {"1a": 131_072, "1b": 8_192, "1c": 131_072, "2a": 131_072, "2b": 8_192}
    lrs = {"1a": 1e-3, "1b": 2e-5, "1c": 1e-3, "2a": 1e-3, "2b": 4e-5}
    warmups = {"1a": 1000, "1b": 50, "1c": 500, "2a": 500, "2b": 50}
    floors = {"1a": 0.0, "1b": 0.1, "1c": 0.1, "2a": 0.1, "2b": 0.1}
    for stage, config in settings.stages.items():
        assert config.bytes_per_update == 2_097_152
        assert config.train_iters == 5_000
        assert config.seq_length == rows[stage]
        assert config.lr == lrs[stage]
        assert config.warmup_iterations == warmups[stage]
        assert config.floor_ratio == floors[stage]
        assert (config.adam_beta1, config.adam_beta2) == (0.9, 0.95)
        assert (config.weight_decay, config.clip_grad) == (0.1, 1.0)
        assert config.boundary_source is (BoundarySource.ROUTER if stage in ("2a", "2b") else BoundarySource.GOLD)
        assert stage != "1a" or config.align_loss_scale is AlignLossScale.MEAN
        assert config.byte_targets is ByteTargets.HARD
        assert not config.freeze_backbone
    assert settings.stages["2b"].backbone_peak_lr == 2e-5
    assert settings.stages["1b"].backbone_peak_lr == 2e-5
    assert settings.stages["2b"].router_loss_weight == 1.0
    assert settings.model.byte_side.dechunk_mode is DechunkMode.OFFICIAL
    assert not settings.model.document_mask
    assert settings.run.bf16


@pytest.mark.parametrize(("name", "width"), PUBLISHED.items())
def test_model_presets_have_the_published_widths_and_our_behaviour(name: str, width: int) -> None:
    settings = parse_arguments(["--mock-data", "--preset", name], world_size=GPUS)
    side = settings.model.byte_side_for(width)
    assert (side.backbone_width, side.byte_width) == (width, 1536)
    assert (side.encoder_ffn_hidden_size, side.decoder_ffn_hidden_size) == (4096, 4096)
    assert (side.router_hidden_size, side.encoder_layers, side.decoder_layers) == (8192, 4, 4)
    assert (side.mamba_state_dim, side.mamba_head_dim, side.mamba_expand) == (128, 64, 2)
    assert side.dechunk_mode is DechunkMode.HARD
    assert settings.model.document_mask
    assert settings.stages["2a"].boundary_source is BoundarySource.GOLD


def test_a_preset_refuses_another_teacher() -> None:
    model = parse_arguments(["--mock-data", "--preset", "qwen3-4b"], world_size=GPUS).model
    with pytest.raises(ValueError, match=r"hidden size is 3072.*expects 2560.*--backbone-width 3072"):
        model.byte_side_for(3072)


def test_tiny_takes_the_teachers_width() -> None:
    assert parse_arguments(["--mock-data"]).model.byte_side_for(192).backbone_width == 192


def test_smoke_keeps_the_model() -> None:
    tiny, smoke = parse_arguments(["--mock-data"]), parse_arguments(["--mock-data", "--smoke"])
    assert smoke.model == tiny.model
    assert all(config.bytes_per_update == 1024 and config.train_iters == 6 for config in smoke.stages.values())


@pytest.mark.parametrize("name", PUBLISHED)
def test_model_presets_learn_exact_targets_where_they_need_no_teacher(name: str) -> None:
    stages = resolved_stages(parse_arguments(["--mock-data", "--preset", name], world_size=GPUS).stages)
    assert stages["2a"].byte_targets is ByteTargets.EXACT and stages["2b"].byte_targets is ByteTargets.HARD
    assert {stage: STAGES[stage].teacher(config) for stage, config in stages.items()} == {
        "1a": TeacherNeed.BEGINNING,
        "1b": TeacherNeed.FROZEN,
        "1c": TeacherNeed.NONE,
        "2a": TeacherNeed.NONE,
        "2b": TeacherNeed.NONE,
    }
