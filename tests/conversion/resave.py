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
        from megatron.core import parallel_state

        from megabyte_distill.conversion.teacher_folder import TeacherHolder, find_teacher, save_teacher, stored_dtype
        from megabyte_distill.model.backbone import Backbone, transformer_config
        from megabyte_distill.training.checkpoint import load_checkpoint

        stored = find_teacher(Path(source))
        dtype = stored_dtype(stored.checkpoint)
        sizes = {"tensor_model_parallel_size": int(tensor), "pipeline_model_parallel_size": int(pipeline)}
        backbone = Backbone(
            stored.config,
            transformer_config(stored.config, perform_initialization=False, pipeline_dtype=dtype, **sizes),
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
        ).to(dtype)
        for parameter in backbone.parameters():
            torch.nn.init.constant_(parameter, float("nan"))
        load_checkpoint(stored.checkpoint, TeacherHolder(backbone))
        save_teacher(Path(target), backbone, stored.token_bytes, stored.tokenizer)


if __name__ == "__main__":
    main(*sys.argv[1:])
