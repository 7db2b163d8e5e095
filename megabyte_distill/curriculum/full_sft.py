"""2b, byte SFT step 2: everything trains, the router through its own BCE beside the byte cross-entropy."""

from __future__ import annotations

from megabyte_distill.config.model import BackboneConfig
from megabyte_distill.config.stage import StageConfig
from megabyte_distill.curriculum.byte_sft import MEASURE, ByteSft, teacher_need
from megabyte_distill.curriculum.stage import Stage


def trains_all(config: StageConfig, backbone: BackboneConfig) -> tuple[str, ...]:
    """The byte side, and the backbone's layers unless they are frozen."""
    byte_side = ("byte_encoder.", "router.", "byte_decoder.")
    # the token embedding and the token head are not on the byte path: without gradient they would only decay
    return byte_side if config.freeze_backbone else (*byte_side, "backbone.decoder.")


STAGE = Stage(
    name="2b",
    title="byte SFT, everything",
    trains=trains_all,
    teacher=teacher_need,
    objective=lambda config, teacher, table: ByteSft(config, teacher, table, trains_router=True),
    measure=MEASURE,
)
