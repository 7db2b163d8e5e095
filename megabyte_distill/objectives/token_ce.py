"""Next-token cross-entropy: how a teacher is trained and scored."""

from __future__ import annotations

import math
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from megabyte_distill.data.packing import PackedRow
from megabyte_distill.data.text_mask import text_chunks, text_positions
from megabyte_distill.model.stage_link import StageLink


def token_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Negative log-likelihood [M] in nats, fp32, of labels [M] under logits [M, W]."""
    return F.cross_entropy(logits.float(), labels, reduction="none")


class TokenCrossEntropy:
    """Objective of a plain token model over packed rows, document ends included in the loss.

    The measure "bits per byte" leaves the event "the document ends" out, as everywhere in this project.
    """

    on_first_stage = False

    def __init__(self) -> None:
        self.weights = {"lm loss": 1.0}
        self._measures: dict[str, tuple[Tensor, Tensor | int]] = {}

    def counts(self, row: PackedRow) -> dict[str, int]:
        """Real tokens of the row."""
        return {"lm loss": int(row.token_mask.sum())}

    def losses(self, model: nn.Module, row: PackedRow, link: StageLink | None = None) -> dict[str, Tensor]:
        """Summed cross-entropy in nats; ``model`` is a Backbone without pipeline stages, wrapped or not."""
        module: Any = getattr(model, "module", model)
        logits = module.logits(module(module.embed(row.tokens), row.cu_chunks))
        nll = token_nll(logits, row.token_labels)
        bits = nll.detach()[text_chunks(row)].sum() / math.log(2)
        self._measures = {"bits per byte": (bits, int(text_positions(row).sum()))}
        return {"lm loss": nll[row.token_mask].sum()}

    def measures(self) -> dict[str, tuple[Tensor, Tensor | int]]:
        """Bits per byte of text."""
        return self._measures
