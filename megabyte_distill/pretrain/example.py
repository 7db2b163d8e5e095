"""The embedded example: a really trained tiny teacher and real text, made ready under the run's folder."""

from __future__ import annotations

import multiprocessing
import os
import shutil
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch.distributed as dist

from megabyte_distill.conversion.hf_import import import_teacher
from megabyte_distill.data.encoding import EncodeJob
from megabyte_distill.data.preprocess import PreprocessOptions, preprocess
from megabyte_distill.parallel.process_groups import world
from megabyte_distill.pretrain.failure import quiet_known_warnings


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
        """Convert the teacher and preprocess the text, unless that is done; only the main rank calls it.

        Beside other ranks a process of its own does it: a converted teacher is a checkpoint, which all ranks write.
        """
        if dist.get_world_size() == 1:
            self._prepare(root)
            return
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_prepare_alone, args=(self, root, sender))
        process.start()
        sender.close()
        try:
            problem = receiver.recv()
        except EOFError:
            problem = "the process that prepares the example was killed, perhaps for want of memory"
        process.join()
        if problem is not None:
            raise ValueError(problem)

    def _prepare(self, root: Path) -> None:
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


def _prepare_alone(example: Example, root: Path, answer: Connection) -> None:
    """In a fresh process: prepare in a world of one and send None, or what went wrong."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    quiet_known_warnings()
    try:
        with world():
            example.prepare(root)
    except (ValueError, OSError) as error:
        answer.send(str(error))
        return
    answer.send(None)
