"""The embedded example: a really trained tiny teacher and real text, made ready under the run's folder."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from megabyte_distill.conversion.hf_import import import_teacher
from megabyte_distill.data.encoding import EncodeJob
from megabyte_distill.data.preprocess import PreprocessOptions, preprocess


@dataclass(frozen=True, slots=True)
class Example:
    """Where the embedded teacher and text lie."""

    folder: Path
    """With ``teacher/`` (Hugging Face format), ``train.jsonl.xz`` and ``heldout.jsonl.xz`` (whole works)."""

    def defaults(self, root: Path) -> dict[str, object]:
        """Settings of a run that uses it, by field name."""
        return {
            "load": str(root / "teacher"),
            "save": str(root),
            "train_data_path": (str(root / "data" / "train_text_document"),),
            "valid_data_path": (str(root / "data" / "heldout_text_document"),),
        }

    def prepare(self, root: Path) -> None:
        """Convert the teacher and preprocess the text, unless that is done; only the main rank calls it."""
        teacher, data = root / "teacher", root / "data"
        source = self.folder / "teacher"
        if not teacher.exists():
            import_teacher(source, teacher)
        for name in ("train", "heldout"):
            if (data / f"{name}_text_document.json").exists():
                continue
            data.mkdir(parents=True, exist_ok=True)
            preprocess(
                [self.folder / f"{name}.jsonl.xz"],
                output_prefix=data / name,
                job=EncodeJob(tokenizer_model=str(source)),
                options=PreprocessOptions(overwrite=True),
            )

    def remove(self, root: Path) -> None:
        """Forget what :meth:`prepare` made."""
        for name in ("teacher", "data"):
            shutil.rmtree(root / name, ignore_errors=True)
