"""Checkpoints, complete or absent: iter_N/ in torch_dist format, then a tracker file, both put in place by rename.

Layout of a stage's (or a converted teacher's) folder::

    latest_checkpointed_iteration.txt     the number of the newest complete checkpoint
    iter_0000100/                         all weights; the optimizer of what trained; loop state; run_config.yaml
    iter_0000100/manifest.json            size and hash of each of these files
    iter_0000200.incomplete/              a save under way or interrupted: ignored, and removed by the next save
"""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from megabyte_distill.files import fsync_tree, write_whole
from megabyte_distill.parallel.pipeline import VirtualStages, name_in_part
from megabyte_distill.parallel.watch import is_lost_contact
from megabyte_distill.training import rng
from megabyte_distill.training.checkpoint_writer import CheckpointWriter, Written
from megabyte_distill.training.manifest import (
    MANIFEST_FILE,
    ManifestError,
    check_files,
    manifest_text,
    read_manifest,
    records_of,
)

TRACKER = "latest_checkpointed_iteration.txt"
STATE_FILE = "loop_state.json"
_INCOMPLETE = ".incomplete"
_LISTED = "files are listed"
"""Entry of the loop state: such a checkpoint has a manifest, and without it is damaged. Older ones have none."""
_ANY_FAILURE = (Exception, CheckpointException)
"""torch's CheckpointException is not an Exception."""


class OptimizerState(Protocol):
    """What has a state that is saved beside the weights: optimizer.TrainerModel."""

    def sharded_state_dict(self, weights: dict[str, Any], *, is_loading: bool) -> Any: ...

    def load_state_dict(self, loaded: Any) -> None: ...


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message says which and what to do."""


def iteration_folder(folder: Path, iteration: int) -> Path:
    """Where the checkpoint of an iteration lives."""
    return folder / f"iter_{iteration:07d}"


def latest_iteration(folder: Path) -> int | None:
    """The newest complete checkpoint's iteration, or None where there is none."""
    tracker = folder / TRACKER
    if not tracker.exists():
        return None
    text = tracker.read_text().strip()
    if not text.isdigit():
        raise CheckpointError(f"{tracker} holds {text[:40]!r}; expected an iteration number")
    return int(text)


def find_checkpoint(folder: Path, iteration: int | None = None) -> Path:
    """The folder of an iteration (default: the latest). CheckpointError names what is there instead."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a directory; expected a checkpoint folder with {TRACKER} in it")
    chosen = iteration if iteration is not None else latest_iteration(folder)
    there = sorted(p.name for p in folder.glob("iter_*") if not p.name.endswith(_INCOMPLETE))
    if chosen is None:
        raise CheckpointError(
            f"{folder} holds no complete checkpoint: no {TRACKER}; it has {there or 'no iter_* folder'}"
        )
    path = iteration_folder(folder, chosen)
    if not (path / "metadata.json").exists():
        raise CheckpointError(f"{path} is missing or incomplete; {folder} has {there or 'no iter_* folder'}")
    return path


def sharded_state_dict(module: nn.Module, prefix: str = "") -> dict[str, Any]:
    """megatron's sharded state of a module that mixes megatron layers and plain torch.

    Megatron modules answer for themselves. Elsewhere a parameter with ``tensor_model_parallel`` set is sharded along
    its ``partition_dim``, any other one is replicated. Entries are named as in the module's state dict; what a
    checkpoint calls them does not tell of virtual stages.
    """
    if isinstance(module, VirtualStages):
        return {
            f"{part}.{name}": tensor
            for part, child in module.items()
            for name, tensor in sharded_state_dict(child, prefix).items()
        }
    if isinstance(module, MegatronModule):
        return module.sharded_state_dict(prefix=prefix)  # type: ignore[no-any-return]
    sharded: dict[str, Any] = {}
    own: dict[str, Any] = dict(module.named_parameters(recurse=False))
    own.update(
        {name: b for name, b in module.named_buffers(recurse=False) if name not in module._non_persistent_buffers_set}
    )
    axes = {n: p.partition_dim for n, p in own.items() if getattr(p, "tensor_model_parallel", False)}
    sharded.update(make_sharded_tensors_for_checkpoint(own, prefix, axes, ()))
    for name, child in module.named_children():
        sharded.update(sharded_state_dict(child, f"{prefix}{name}."))
    return sharded


def _reason(error: BaseException) -> str:
    """What went wrong, in a line; torch wraps the errors of ranks, with their tracebacks, into one."""
    if isinstance(error, CheckpointException) and error.failures:
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {str(error)[:300]}"


def _room(folder: Path) -> str:
    """Space left on the disk, for messages about saves that failed."""
    try:
        return f"{shutil.disk_usage(folder).free / 2**20:,.0f} MiB are free in {folder}"
    except OSError as error:
        return str(error)


def _barrier_with_failures(error: BaseException | None, doing: str) -> None:
    """Meet all ranks; raise on every one of them where any failed, so that none waits for ever."""
    errors: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(errors, None if error is None else _reason(error))
    failed = {rank: text for rank, text in enumerate(errors) if text}
    if failed:
        where = "; ".join(f"rank {rank}: {text}" for rank, text in failed.items())
        raise CheckpointError(f"{doing} failed ({where}); earlier checkpoints are untouched") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingSave:
    """A checkpoint whose tensors are being written. It does not exist before :meth:`finish` has come back."""

    final: Path
    texts: Mapping[str, str]
    writer: CheckpointWriter

    @property
    def partial(self) -> Path:
        """Where it is written."""
        return self.final.with_name(self.final.name + _INCOMPLETE)

    def is_done(self) -> bool:
        """Whether this rank has written its part, so that it would not wait in :meth:`finish` for its own disk."""
        return self.writer.is_done()

    def finish(self) -> Path:
        """Wait until all ranks have written their parts, put the checkpoint in place and have the tracker name it.

        Collective. A failure on any rank (a full disk) raises CheckpointError on every rank, removes what was written
        and leaves earlier checkpoints.
        """
        saving = f"saving {self.final} ({_room(self.final.parent)})"
        with self._removed_on_failure():
            error: BaseException | None = None
            written: Written | None = None
            try:
                written = self.writer.wait()
            except _ANY_FAILURE as caught:  # every kind must reach the other ranks, or they wait for ever
                error = caught
            _barrier_with_failures(error, saving)
            ranks: list[Written] | None = [written] * dist.get_world_size() if dist.get_rank() == 0 else None  # type: ignore[list-item]
            dist.gather_object(written, ranks)
            try:
                if ranks is not None:
                    self._list_files(ranks)
                    fsync_tree(self.partial)
            except _ANY_FAILURE as caught:
                error = caught
            _barrier_with_failures(error, saving)
        try:
            if dist.get_rank() == 0:
                _put_in_place(self.partial, self.final)
                iteration = int(self.final.name.removeprefix("iter_"))
                write_whole(self.final.parent / TRACKER, f"{iteration}\n".encode())
        except OSError as caught:
            error = caught
        _barrier_with_failures(error, f"finishing {self.final}")
        return self.final

    def _list_files(self, ranks: list[Written]) -> None:
        """Write the metadata of the tensors, the small files, and the manifest of everything."""
        records = self.writer.complete(ranks)
        for name, text in self.texts.items():
            (self.partial / name).write_text(text, encoding="utf-8")
        records.update(records_of(path for path in self.partial.iterdir() if path.name not in records))
        (self.partial / MANIFEST_FILE).write_text(manifest_text(records), encoding="utf-8")

    @contextmanager
    def _removed_on_failure(self) -> Iterator[None]:
        try:
            yield
        except CheckpointError:
            if dist.get_rank() == 0:
                shutil.rmtree(self.partial, ignore_errors=True)
            raise


def begin_save(
    folder: Path,
    iteration: int,
    model: nn.Module,
    *,
    optimizer: OptimizerState | None,
    loop: Mapping[str, Any],
    texts: Mapping[str, str],
    writer: CheckpointWriter | None = None,
) -> PendingSave:
    """Have all ranks write ``folder/iter_N``; it is complete once ``finish`` of what is returned has come back.

    ``loop``: JSON-able state of the loop; ``texts``: further small files by name (run_config.yaml); ``writer``: writes
    the tensors, by default before this function returns; with ``CheckpointWriter(background=True)`` a copy of the state
    as it is now is written while the model trains on.
    """
    final = iteration_folder(folder, iteration)
    small = {STATE_FILE: json.dumps({**loop, _LISTED: True}, indent=1), **texts}
    save = PendingSave(final=final, texts=small, writer=writer or CheckpointWriter())
    error: BaseException | None = None
    try:
        if dist.get_rank() == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(f"iter_*{_INCOMPLETE}"):
                shutil.rmtree(leftover, ignore_errors=True)
            save.partial.mkdir()
    except OSError as caught:
        error = caught
    _barrier_with_failures(error, f"creating {save.partial}")
    try:
        weights = sharded_state_dict(model)
        state: dict[str, Any] = {"model": weights, rng.KEY: rng.sharded_rng_state()}
        if optimizer is not None:
            state["optimizer"] = optimizer.sharded_state_dict(weights, is_loading=False)
        dist_checkpointing.save(state, str(save.partial), sharded_strategy=save.writer)
    except _ANY_FAILURE as caught:
        error = caught
    with save._removed_on_failure():
        _barrier_with_failures(error, f"saving {final} ({_room(folder)})")
    return save


def save_checkpoint(
    folder: Path,
    iteration: int,
    model: nn.Module,
    *,
    optimizer: OptimizerState | None,
    loop: Mapping[str, Any],
    texts: Mapping[str, str],
    writer: CheckpointWriter | None = None,
) -> Path:
    """:func:`begin_save` and ``finish`` in one: on return the checkpoint is complete and the tracker names it."""
    return begin_save(folder, iteration, model, optimizer=optimizer, loop=loop, texts=texts, writer=writer).finish()


def remove_old_checkpoints(folder: Path, *, keep_last: int, retain_interval: int = 0) -> list[Path]:
    """Removes checkpoints up to the latest but the newest ``keep_last`` and those at a multiple of ``retain_interval``.

    Returns what was removed. Each first loses the name that makes it complete, so that a crash leaves none half there.
    """
    latest = latest_iteration(folder)
    numbers = [path.name.removeprefix("iter_") for path in folder.glob("iter_*")]
    there = sorted(
        int(number) for number in numbers if number.isdigit() and latest is not None and int(number) <= latest
    )
    old = [n for n in there[:-keep_last] if not (retain_interval and n % retain_interval == 0)]
    removed = []
    for iteration in old:
        path = iteration_folder(folder, iteration)
        leaving = path.with_name(f"{path.name}.old{_INCOMPLETE}")
        os.replace(path, leaving)
        shutil.rmtree(leaving, ignore_errors=True)
        removed.append(path)
    return removed


def _put_in_place(partial: Path, final: Path) -> None:
    if final.exists():  # a save that never reached the tracker
        replaced = final.with_name(f"{final.name}.replaced{_INCOMPLETE}")
        os.replace(final, replaced)
        shutil.rmtree(replaced)
    os.replace(partial, final)


def read_loop_state(checkpoint: Path) -> dict[str, Any]:
    """The loop's JSON state of a complete checkpoint."""
    state = _loop_state(checkpoint)
    state.pop(_LISTED, None)
    return state


def _loop_state(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / STATE_FILE
    try:
        return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}). {_way_out(checkpoint)}") from error


def verify_checkpoint(checkpoint: Path, *, hashes: bool = True) -> None:
    """CheckpointError that names every file of a complete checkpoint which is not as it was written, and what to do.

    Collective. Sizes are always compared; ``hashes``: the content too, each file read by one of the ranks. A checkpoint
    of an earlier version, which listed no files, is let through with a warning: what can be wrong with it then shows
    when it is loaded, as it did in that version.
    """
    try:
        records = read_manifest(checkpoint)
        if records is None and _loop_state(checkpoint).get(_LISTED):
            raise ManifestError(f"{MANIFEST_FILE} is missing")
        check_files(checkpoint, records or {}, hashes=hashes)
    except ManifestError as error:
        raise CheckpointError(f"{checkpoint} is damaged: {error}. {_way_out(checkpoint)}") from error
    if records is None and dist.get_rank() == 0:
        warnings.warn(f"{checkpoint} has no {MANIFEST_FILE} and is loaded unverified", stacklevel=2)


def _way_out(checkpoint: Path) -> str:
    """What to do about a damaged checkpoint: the earlier ones that are there."""
    earlier = [
        int(path.name.removeprefix("iter_"))
        for path in sorted(checkpoint.parent.glob("iter_*"))
        if path.name < checkpoint.name and (path / "metadata.json").exists() and not path.name.endswith(_INCOMPLETE)
    ]
    if not earlier:
        return f"{checkpoint.parent} holds no earlier one: copy it again from where it came, or make it anew"
    numbers = ", ".join(map(str, earlier[-5:]))
    return (
        f"Earlier ones: {numbers}. Take one with --ckpt-step {earlier[-1]} where --load names its run for another "
        f"--save; where a run is to go on from it, write its number into {checkpoint.parent / TRACKER}"
    )


@contextmanager
def readable(checkpoint: Path, name: str = "") -> Iterator[None]:
    """Raises CheckpointError for whatever goes wrong while the checkpoint (its parameter ``name``) is read."""
    try:
        yield
    except _ANY_FAILURE as error:  # megatron, torch and the file system each raise their own kind
        if is_lost_contact(error):
            raise
        what = f"{name} of {checkpoint}" if name else f"{checkpoint}"
        raise CheckpointError(
            f"{what} cannot be loaded ({_reason(error)}): it is damaged, or made with "
            f"other settings than its run_config.yaml says. To go on from an earlier one, write its number into "
            f"{checkpoint.parent / TRACKER}"
        ) from error


def check_shapes(wanted: Iterable[tuple[str, Any]], checkpoint: Path, *, padded: bool = True) -> None:
    """CheckpointError that names every tensor of a sharded state which the checkpoint has not, or in another shape.

    ``padded``: whether tensors that megatron pads may have another shape in the checkpoint.
    """
    with readable(checkpoint):
        stored = dist_checkpointing.load_tensors_metadata(str(checkpoint))
    problems = []
    for name, tensor in wanted:
        if not isinstance(tensor, ShardedTensor):
            continue
        found = stored.get(tensor.key)
        if found is None:
            problems.append(f"{name}: not in the checkpoint")
        elif tuple(found.global_shape) != tuple(tensor.global_shape) and not (padded and tensor.allow_shape_mismatch):
            problems.append(
                f"{name}: {tuple(found.global_shape)} in the checkpoint, {tuple(tensor.global_shape)} in the model"
            )
    if problems:
        shown = "\n  ".join(problems[:12]) + (f"\n  … and {len(problems) - 12} more" if len(problems) > 12 else "")
        raise CheckpointError(
            f"{checkpoint} does not fit the model ({len(problems)} tensors):\n  {shown}\n"
            "give the settings it was made with (its run_config.yaml holds them)"
        )


def load_checkpoint(checkpoint: Path, model: nn.Module, *, prefix: str = "", verify: bool = True) -> dict[str, Any]:
    """Load weights (those whose names in each part of the model start with ``prefix``); return the loop's state.

    Files (with ``verify`` their hashes too) and shapes are checked before anything is changed; CheckpointError names
    every file that is damaged and every tensor that does not fit.
    """
    verify_checkpoint(checkpoint, hashes=verify)
    weights = {
        name: tensor for name, tensor in sharded_state_dict(model).items() if name_in_part(name).startswith(prefix)
    }
    check_shapes(weights.items(), checkpoint)
    with readable(checkpoint):
        loaded = dist_checkpointing.load({"model": weights}, str(checkpoint))
    missing, unexpected = model.load_state_dict(loaded["model"], strict=False)
    assert not unexpected, unexpected
    lost = [name for name in missing if name_in_part(name).startswith(prefix) and "_extra_state" not in name]
    assert not lost, lost
    return read_loop_state(checkpoint)


def load_training_state(
    checkpoint: Path, model: nn.Module, optimizer: OptimizerState | None, *, with_rng: bool
) -> str | None:
    """Load what a checkpoint holds beside ``model``'s weights, which are loaded already.

    ``optimizer``: the one built on the model, or None to leave it fresh; ``with_rng``: the generators' states too.
    Returns what of the latter could not be taken up exactly.
    """
    if optimizer is not None:
        wanted = optimizer.sharded_state_dict(sharded_state_dict(model), is_loading=True)
        with readable(checkpoint):
            loaded = dist_checkpointing.load({"optimizer": wanted}, str(checkpoint))
        optimizer.load_state_dict(loaded["optimizer"])
    if not with_rng:
        return None
    with readable(checkpoint):
        return rng.load_rng_state(checkpoint)
