"""Configuration of an exported student, as transformers reads it from config.json."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from megabyte_distill.alphabet import BOS_BYTE, BYTE_VOCAB, PAD_BYTE
from megabyte_distill.config.ranges import BOUNDARY_THRESHOLD, COUNT

DEFAULT_CONTEXT = 8192
"""Bytes; lm-evaluation-harness cuts longer prompts off, and few-shot prompts of bytes are long."""


class MegabyteConfig(PreTrainedConfig):  # type: ignore[misc]
    """A byte-level student: a byte side around a teacher's transformer.

    Holds plain fields only: transformers may load this class from another copy of the folder's code than the model's,
    where enums and dataclasses would be other classes.
    """

    model_type = "megabyte"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012  transformers' declaration

    def __init__(
        self,
        byte_side: dict[str, Any] | None = None,
        backbone: dict[str, Any] | None = None,
        backbone_config: dict[str, Any] | None = None,
        paths: int = 4,
        boundary_threshold: float | None = None,
        max_position_embeddings: int = DEFAULT_CONTEXT,
        **kwargs: Any,
    ) -> None:
        """Every field is optional because transformers makes an empty configuration to compare with.

        Args:
            byte_side: fields of ByteSideConfig.
            backbone: fields of BackboneConfig.
            backbone_config: the teacher's own config.json; read where the backbone is taken out again, not here.
            paths: bit histories of the causal byte filter.
            boundary_threshold: of ``generate_bytes`` where it is given none (``Sampling.boundary_threshold``).
            max_position_embeddings: bytes; a hint to tools, not a limit of the model.
            kwargs: transformers' own fields.

        Raises:
            ValueError: for fewer than one path, and a threshold that no probability is compared with.
        """
        COUNT.require("paths", paths)
        if boundary_threshold is not None:
            BOUNDARY_THRESHOLD.require("boundary_threshold", boundary_threshold)
        self.boundary_threshold = boundary_threshold
        self.byte_side, self.backbone, self.backbone_config = byte_side, backbone, backbone_config
        self.paths, self.max_position_embeddings = paths, max_position_embeddings
        for name, value in (
            ("vocab_size", BYTE_VOCAB),
            ("bos_token_id", BOS_BYTE),
            ("eos_token_id", BOS_BYTE),
            ("pad_token_id", PAD_BYTE),
            ("tie_word_embeddings", False),
        ):
            kwargs.setdefault(name, value)
        super().__init__(**kwargs)
