"""A job small enough to run many times: a random teacher of 2 layers, a few KB of text, 4 updates a stage."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from megabyte_distill.config.model import BackboneConfig
from megabyte_distill.conversion.teacher_folder import save_teacher
from megabyte_distill.conversion.tokenizer_files import token_table
from megabyte_distill.data.chat_template import CHATML, ChatTemplate
from megabyte_distill.data.dialogues import MESSAGES_KEY
from megabyte_distill.model.backbone import Backbone, transformer_config
from megabyte_distill.parallel.process_groups import world
from megabyte_distill.pretrain.main import main
from tests import warm_ranks
from tests.data.preprocessing import preprocess

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "pretrain_byte_kd.sh"
STAGES = ("1a", "1b", "1c", "2a", "2b")
TIMES = ("time", "bytes/s")
"""What a record of metrics.jsonl has beside what must be equal."""
WORDS = [
    "the",
    "old",
    "house",
    "stood",
    "on",
    "a",
    "hill",
    "and",
    "nobody",
    "in",
    "town",
    "knew",
    "why",
    "its",
    "door",
    "was",
    "never",
    "shut",
    "at",
    "night",
]


@dataclass(frozen=True)
class Job:
    """A teacher, its data, and the flags of a job on them."""

    teacher: Path
    tokenizer: Path
    train: str
    held_out: str
    dialogues: str
    """With a loss mask."""

    def flags(self, save: Path, *more: str) -> list[str]:
        """The whole curriculum in the smallest size; ``more`` wins."""
        return [
            "--load", str(self.teacher), "--save", str(save),
            "--train-data-path", self.train, "--valid-data-path", self.held_out,
            "--train-iters", "4", "--seq-length", "256", "--global-batch-size", "2", "--micro-batch-size", "1",
            "--chunk-bucket", "32", "--byte-width", "32", "--encoder-layers", "1", "--decoder-layers", "1",
            "--encoder-ffn-hidden-size", "48", "--decoder-ffn-hidden-size", "48",
            "--router-hidden-size", "48", "--conv-ffn-hidden-size", "48",
            "--mamba-state-dim", "16", "--mamba-head-dim", "16", "--mamba-scan-chunk", "32",
            "--eval-interval", "2", "--eval-iters", "1", "--save-interval", "2", "--log-interval", "1",
            "--summary-bytes", "0",
            *more,
        ]  # fmt: skip

    def run(self, save: Path, *more: str) -> int:
        """The job in this process; its exit code."""
        return main(self.flags(save, *more))


def write_tokenizer(folder: Path, words: Sequence[str] = WORDS, size: int = 300) -> Path:
    """A byte-level BPE of ``size`` ids."""
    folder.mkdir(parents=True)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(words)] * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    return folder


def write_teacher(
    folder: Path, tokenizer: Path, *, width: int = 32, vocab_size: int = 300, layers: int = 2, seed: int = 3
) -> Path:
    """A random converted teacher."""
    config = BackboneConfig(
        family="llama",
        num_layers=layers,
        hidden_size=width,
        ffn_hidden_size=2 * width,
        num_attention_heads=4,
        num_query_groups=2,
        head_dim=width // 4,
        vocab_size=vocab_size,
        norm_eps=1e-5,
        rope_theta=10000.0,
    )
    with world():
        torch.manual_seed(seed)
        backbone = Backbone(config, transformer_config(config))
        with torch.no_grad():  # far from uniform, so that there is something to distil
            for parameter in backbone.parameters():
                if parameter.ndim > 1:
                    parameter.mul_(5.0)
        save_teacher(folder, backbone, token_table(tokenizer, vocab_size), tokenizer)
    return folder


def write_data(prefix: Path, tokenizer: Path, *, seed: int, documents: int, words: int = 120) -> str:
    """Stem of preprocessed random sentences."""
    choose = random.Random(seed)
    source = prefix.with_suffix(".jsonl")
    lines = [json.dumps({"text": " ".join(choose.choices(WORDS, k=words)) + "."}) for _ in range(documents)]
    source.write_text("\n".join(lines) + "\n")
    return preprocess([source], output_prefix=prefix, tokenizer_model=tokenizer).stems["text"]


def write_dialogues(prefix: Path, tokenizer: Path) -> str:
    """Stem of preprocessed dialogues of two questions and two answers."""
    choose = random.Random(2)
    source = prefix.with_suffix(".jsonl")
    with open(source, "w", encoding="utf-8") as stream:
        for _ in range(20):
            turns = [
                {"role": role, "content": " ".join(choose.choices(WORDS, k=choose.randrange(9)))}
                for role in ("user", "assistant") * 2
            ]
            stream.write(json.dumps({"messages": turns}) + "\n")
    keys = (MESSAGES_KEY,)
    done = preprocess(
        [source], output_prefix=prefix, tokenizer_model=tokenizer, json_keys=keys, chat_template=ChatTemplate(CHATML)
    )
    return done.stems[MESSAGES_KEY]


@cache
def make_job(folder: Path) -> Job:
    """Everything under ``folder``, made once."""
    tokenizer = write_tokenizer(folder / "hf")
    return Job(
        teacher=write_teacher(folder / "teacher", tokenizer),
        tokenizer=tokenizer,
        train=write_data(folder / "train", tokenizer, seed=0, documents=16),
        held_out=write_data(folder / "held", tokenizer, seed=1, documents=3),
        dialogues=write_dialogues(folder / "chat", tokenizer),
    )


def environment(**more: str) -> dict[str, str]:
    """For a job in a process of its own: one thread, this Python first in PATH, no rank of ours."""
    plain = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{plain.get('PATH', '')}"
    return {**plain, "OMP_NUM_THREADS": "1", "PATH": path, "PYTHONPATH": str(ROOT), **more}


def torchrun(*words: str, processes: int | None = None) -> list[str]:
    """The command line of ``torchrun [--nproc-per-node N] words``."""
    form = ["--nproc-per-node", str(processes)] if processes else []
    return [str(Path(sys.executable).parent / "torchrun"), *form, *words]


def run_as_ranks(*words: str, processes: int = 2, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """What ``torchrun --nproc-per-node processes words`` does, started faster."""
    return warm_ranks.run_ranks_of(*words, processes=processes, timeout=timeout, environment=environment())


def run_command(command: Sequence[str], timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run a job to its end in a process of its own."""
    return subprocess.run(
        list(command), capture_output=True, text=True, timeout=timeout, env=environment(), cwd=ROOT, check=False
    )


def metrics(run: Path) -> dict[tuple[str, int, str], float]:
    """(stage, iteration, name) → value; of a repeated iteration the last record counts."""
    values: dict[tuple[str, int, str], float] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record: dict[str, Any] = json.loads(line)
        stage, iteration = record.pop("stage"), record.pop("iteration")
        values.update({(stage, iteration, name): value for name, value in record.items() if name not in TIMES})
    return values


def weights(run: Path, stage: str, iteration: int | None = None) -> dict[str, torch.Tensor]:
    """All weights after a stage (or at one of its checkpoints)."""
    from megabyte_distill.runs import load_student

    with world():
        student = load_student(run, stage, iteration=iteration).student
        return {name: value.detach().clone() for name, value in student.named_parameters()}


def assert_same_run(got: Path, wanted: Path, stages: Sequence[str] = STAGES) -> None:
    """Equal digit for digit: every recorded value, and the weights after each stage."""
    ours, theirs = metrics(got), metrics(wanted)
    assert ours.keys() == theirs.keys()
    different = {key: (ours[key], theirs[key]) for key in theirs if ours[key] != theirs[key]}
    assert not different, different
    for stage in stages:
        before, after = weights(wanted, stage), weights(got, stage)
        assert before.keys() == after.keys()
        unequal = [name for name in before if not torch.equal(before[name], after[name])]
        assert not unequal, (stage, unequal)
