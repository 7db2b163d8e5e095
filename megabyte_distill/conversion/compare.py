"""Proofs that a conversion lost nothing: logits against transformers, and a round trip compared bit for bit."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megabyte_distill.conversion.hf_config import HfConfig
from megabyte_distill.conversion.hf_export import export_teacher
from megabyte_distill.conversion.hf_import import HfModel, import_teacher
from megabyte_distill.conversion.safetensors_folder import SafetensorsFolder
from megabyte_distill.conversion.student_folder import is_student
from megabyte_distill.conversion.teacher_folder import find_root, load_teacher
from megabyte_distill.conversion.tensor_checks import same_bits
from megabyte_distill.conversion.tokenizer_files import TOKENIZER_FOLDER
from megabyte_distill.data import tokenizers
from megabyte_distill.data.progress import Show, silent
from megabyte_distill.data.token_bytes import TokenBytes
from megabyte_distill.model.backbone import Backbone

DEFAULT_TEXT = "The quick brown fox jumps over the lazy dog, and nobody in the old town asks it why."


@dataclass(frozen=True, slots=True, kw_only=True)
class PositionDifference:
    """How far two models' logits are apart at one position."""

    token_id: int
    text: str
    """Of the token, "<start>" for the start token; replacement characters where its bytes alone are no UTF-8."""
    max_abs_logit_difference: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """How far two models' logits are apart."""

    max_abs_logit_difference: float
    max_abs_logit: float
    tokens: int
    """Positions compared, the start token included."""
    largest_at: int
    """The position with the largest difference, counted from 0."""
    per_position: list[PositionDifference]


def compare_logits(hf_model: Path, megatron_path: Path, text: str = DEFAULT_TEXT) -> Comparison:
    """Both models in fp32 on the tokens of ``text`` behind the start token. Needs transformers and process groups.

    ValueError where they are different models, and for an exported student, which has no logits of tokens.
    """
    if is_student(HfConfig.read(hf_model)):
        raise ValueError(f"{hf_model} is a byte-level student, which has no logits of tokens; give a token model")
    teacher = load_teacher(megatron_path, dtype=torch.float32)
    tokenizer = tokenizers.load(find_root(megatron_path) / TOKENIZER_FOLDER)
    [ids] = tokenizer.encode_batch([tokenizer.normalize(text)])
    tokens = torch.tensor([teacher.token_bytes.start_id, *ids.tolist()])
    reference = _transformers_model(hf_model)
    with torch.no_grad():
        theirs = reference(tokens[None]).logits[0]
        ours = backbone_logits(teacher.backbone, tokens).cpu()
    if theirs.shape != ours.shape:
        raise ValueError(
            f"{hf_model} has {theirs.shape[-1]} tokens, {megatron_path} {ours.shape[-1]}; these are different models"
        )
    differences = (ours - theirs).abs().amax(-1)
    return Comparison(
        max_abs_logit_difference=float(differences.max()),
        max_abs_logit=float(theirs.abs().max()),
        tokens=len(tokens),
        largest_at=int(differences.argmax()),
        per_position=[
            PositionDifference(token_id=token, text=_shown(teacher.token_bytes, token), max_abs_logit_difference=value)
            for token, value in zip(tokens.tolist(), differences.tolist(), strict=True)
        ],
    )


def _shown(table: TokenBytes, token: int) -> str:
    if token == table.start_id:
        return "<start>"
    return table[token].decode("utf-8", errors="replace")


def backbone_logits(backbone: Backbone, tokens: Tensor) -> Tensor:
    """Logits [T, W] of one sequence of token ids [T]."""
    tokens = tokens.to(backbone.device)
    cu_seqlens = torch.tensor([0, len(tokens)], dtype=torch.int32, device=tokens.device)
    return backbone.logits(backbone(backbone.embed(tokens), cu_seqlens))


def roundtrip(hf_model: Path, *, show: Show = silent) -> int:
    """Imports and exports a folder in a temporary place and compares every tensor's bits; returns how many there are.

    Memory stays within a few times the largest tensor; the temporary place (TMPDIR) needs room for the model twice, at
    four bytes a weight where it holds several dtypes or float16. ValueError names the tensors that differ.
    """
    model = HfModel.open(hf_model)
    stored = {name: info.dtype for name, info in model.weights.tensors.items()}
    # float32 holds float16 exactly
    wide = torch.float32 if torch.float16 in stored.values() else model.stored_dtype
    with tempfile.TemporaryDirectory(prefix="megabyte-distill-") as scratch:
        checkpoint, exported = Path(scratch) / "megatron", Path(scratch) / "hf"
        import_teacher(hf_model, checkpoint, dtype=wide, show=show)
        export_teacher(checkpoint, exported, dtypes=stored, show=show)
        back = SafetensorsFolder(exported)
        differing = [name for name in back.tensors if not same_bits(model.weights.read(name), back.read(name))]
        if differing:
            raise ValueError(f"{hf_model}: {len(differing)} tensor(s) differ after the round trip: {differing[:8]}")
        return len(back.tensors)


def _transformers_model(folder: Path) -> Any:
    try:
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        raise ValueError("compare needs transformers; pip install 'megabyte-distill[hf]'") from error
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    except OSError as error:
        raise ValueError(f"{folder}: transformers cannot load it ({error})") from error
    model.eval()
    return model
