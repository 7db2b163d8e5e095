"""A Hugging Face folder's weights in memory, without a checkpoint between: what conversion is compared with."""

from __future__ import annotations

import torch

from megabyte_distill.conversion.hf_import import HfModel, ParameterSource
from megabyte_distill.model.backbone import Backbone, transformer_config


def read_backbone(model: HfModel, *, dtype: torch.dtype | None = None) -> Backbone:
    """A backbone with the folder's weights, in ``dtype`` (default: the folder's). Needs process groups."""
    backbone = Backbone(model.config, transformer_config(model.config, perform_initialization=False))
    backbone.to(dtype or model.stored_dtype)
    source = ParameterSource(model, backbone)
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            parameter.copy_(source.read(name))
    return backbone
