"""A program for torchrun: loads a converted teacher at given parallel sizes and saves it again from these ranks.

resave.py SOURCE TARGET T P
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from megabyte_distill.parallel.process_groups import world


def main(source: str, target: str, tensor: str, pipeline: str) -> None:
    with world(tensor_parallel=int(tensor), pipeline_parallel=int(pipeline)):
        from megabyte_distill.conversion.teacher_folder import TeacherHolder, find_teacher, save_teacher, stored_dtype
        from megabyte_distill.model.backbone import Backbone, transformer_config
        from megabyte_distill.training.checkpoint import load_checkpoint

        stored = find_teacher(Path(source))
        transformer = transformer_config(stored.config, perform_initialization=False)
        backbone = Backbone(stored.config, transformer).to(stored_dtype(stored.checkpoint))
        for parameter in backbone.parameters():
            torch.nn.init.constant_(parameter, float("nan"))
        load_checkpoint(stored.checkpoint, TeacherHolder(backbone))
        save_teacher(Path(target), backbone, stored.token_bytes, stored.tokenizer)


if __name__ == "__main__":
    main(*sys.argv[1:])
