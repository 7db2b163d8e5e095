"""What a run reads: its data sets, opened once and found to fit, and the rows that its stages make of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from megabyte_distill.config import STAGE_ORDER, Settings, StageConfig
from megabyte_distill.config.blend import DEFAULT_SPLIT
from megabyte_distill.curriculum.stages import STAGES
from megabyte_distill.data.chunk_merging import SAMPLE_ROW_BYTES, sample_rows
from megabyte_distill.data.dataset import Blend, Part, open_blend
from megabyte_distill.data.mock import MockRowStream
from megabyte_distill.data.packing import PackedRow
from megabyte_distill.data.sampler import RowPlan, RowStream
from megabyte_distill.data.stored_targets import StoredTargets
from megabyte_distill.pretrain.context import beyond_context
from megabyte_distill.pretrain.prepare import Prepared
from megabyte_distill.training.checkpoint import find_checkpoint
from megabyte_distill.training.target_cache import TargetCache, teacher_hash


class DataSets(NamedTuple):
    """What a stage trains on and is measured on; a set whose share of ``--split`` is empty is left out."""

    training: Blend
    held_out: Blend


class RunData:
    """The data of a run, open until it ends; every rank has all of it."""

    def __init__(self, settings: Settings, prepared: Prepared) -> None:
        """ValueError before any training where files are damaged or not of the teacher's tokenizer, a stage's data are
        not what it reads, or no text is held out to measure.
        """
        self._settings, self._prepared = settings, prepared
        self._opened: dict[tuple[str, ...], DataSets] = {}
        if not settings.data.mock_data:
            sharing = [config for config in settings.stages.values() if not config.dialogue_data_path]
            wanted = settings.run.summary_bytes > 0 or any(config.eval_iters for config in sharing)
            self._check_held_out(self.shared, wanted=wanted)
        for name, config in settings.stages.items():
            sets = self._of_stage(config)
            if config.dialogue_data_path and sets is not None:
                self._check_held_out(sets, wanted=config.eval_iters > 0)
            if sets is not None and STAGES[name].reads_loss_mask:
                _check_loss_masks(name, sets)

    @property
    def shared(self) -> DataSets:
        """Of the stages that have no data of their own; not of a run on mock data."""
        assert not self._settings.data.mock_data
        return self._open(self._settings.data.data_path)

    def _of_stage(self, config: StageConfig) -> DataSets | None:
        """None for mock data."""
        if config.dialogue_data_path:
            return self._open(config.dialogue_data_path)
        return None if self._settings.data.mock_data else self.shared

    def _open(self, data_path: tuple[str, ...]) -> DataSets:
        """Of a blend that is split, or without one of the two that are given apart."""
        if data_path not in self._opened:
            data, tokenizer_hash = self._settings.data, self._prepared.token_bytes.hash
            if data_path:
                blend = open_blend(data_path, tokenizer_hash=tokenizer_hash)
                parts = (blend.part(part, data.split_shares) for part in (Part.TRAINING, Part.VALIDATION))
                self._opened[data_path] = DataSets(*(part.without_empty() for part in parts))
            else:
                apart = (data.train_data_path, data.valid_data_path)
                self._opened[data_path] = DataSets(*(open_blend(p, tokenizer_hash=tokenizer_hash) for p in apart))
        return self._opened[data_path]

    def _check_held_out(self, sets: DataSets, *, wanted: bool) -> None:
        if wanted and not sets.held_out.datasets:
            raise ValueError(
                f"no document is held out by --split {self._settings.data.split or DEFAULT_SPLIT}: give "
                "--valid-data-path, a --split with a larger second share, or --eval-iters 0 --summary-bytes 0 to train "
                "without measuring"
            )

    def row_streams(self, stage: str, config: StageConfig) -> tuple[RowStream, RowStream | None]:
        """(training rows, held-out rows or None) of a stage. Each stage reads its data in another order."""
        seed = row_seed(self._settings.run.seed, stage)
        size: dict[str, Any] = {"row_bytes": config.seq_length, "chunk_bucket": config.chunk_bucket}
        size["reads_loss_mask"] = STAGES[stage].reads_loss_mask
        sets = self._of_stage(config)
        if sets is None:
            vocab_size = self._prepared.model_config.backbone.vocab_size
            return MockRowStream(vocab_size, seed=seed, **size), MockRowStream(vocab_size, seed=1, **size)
        held_out = RowStream(*sets.held_out, seed=1, **size) if sets.held_out.datasets else None
        return RowStream(*sets.training, seed=seed, **size), held_out

    def beyond_context(self, config: StageConfig) -> str | None:
        """What is wrong where a stage that runs the backbone reads documents longer than that was made for."""
        sets = self._of_stage(config)
        positions = self._prepared.model_config.backbone.max_position_embeddings
        return None if sets is None else beyond_context(sets.training.datasets, config.seq_length, positions)

    def chunk_sample(self) -> list[PackedRow]:
        """Training text on which chunks are measured: the same in every stage, at any length of rows and for any seed.

        The run's, also in a stage with data of its own, so that an equal length is an equal limit.
        """
        size: dict[str, Any] = {"row_bytes": SAMPLE_ROW_BYTES, "chunk_bucket": 1, "seed": 0}
        if self._settings.data.mock_data:
            return sample_rows(MockRowStream(self._prepared.model_config.backbone.vocab_size, **size))
        return sample_rows(RowStream(*self.shared.training, **size))


def row_seed(seed: int, stage: str) -> int:
    """Of the order in which a stage of a run with this seed reads its data."""
    return seed + 1000 * (1 + STAGE_ORDER.index(stage))


def _check_loss_masks(stage: str, sets: DataSets) -> None:
    both = [*sets.training.datasets, *sets.held_out.datasets]
    without = [dataset.name for dataset in both if not dataset.has_loss_mask]
    if without:
        raise ValueError(
            f"stage {stage} trains on the answers of dialogues, and {without[0]} has no loss mask that tells them from "
            "prompts: it was preprocessed as plain text. Preprocess dialogues with tools/preprocess_bytes.py "
            f"--chat-template chatml, and give them with --{stage}.dialogue-data-path (docs/training.md)"
        )


def stored_targets(
    settings: Settings, config: StageConfig, prepared: Prepared, rows: RowStream, *, has_losses: bool
) -> Callable[[RowPlan], StoredTargets] | None:
    """What gives the exact targets of a stage's planned rows from ``--logits-load-dir``; None where it is not given.

    ``has_losses``: this rank is at the pipeline's end; None on the others, which read no targets.
    ValueError where the cache is incomplete, damaged, or of another teacher, tokenizer or text.
    """
    if config.logits_load_dir is None or not has_losses:
        return None
    cache = TargetCache(Path(config.logits_load_dir), verify=settings.checkpoint.verify_checkpoint)
    teacher = teacher_hash(find_checkpoint(prepared.teacher))
    cache.require(tokenizer_hash=prepared.token_bytes.hash, teacher=teacher, datasets=rows.datasets)
    return lambda plan: cache.of_row(plan, rows.datasets, rows.row_bytes)
