#!/usr/bin/env python3
"""Train a small Llama teacher from scratch: byte-level BPE, next-token prediction, a Hugging Face folder.

The embedded teacher in examples/tiny/teacher was made by

    python tools/train_teacher.py --input examples/tiny/train.jsonl.xz --valid-input examples/tiny/heldout.jsonl.xz \\
        --work-dir runs/teacher --hf-path examples/tiny/teacher

It uses the product's own backbone class, packed rows, loop and checkpoints: stopped and started again, it goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megabyte_distill.config import ranges
from megabyte_distill.config.model import BackboneConfig
from megabyte_distill.config.stage import StageConfig
from megabyte_distill.config.training import RunConfig
from megabyte_distill.tool import ToolParser, in_range, run_tool

if TYPE_CHECKING:
    from megabyte_distill.model.backbone import Backbone
    from megabyte_distill.parallel.process_groups import World
    from megabyte_distill.training.loop import StopReason

SPLIT_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""Words with their leading space, numbers of up to three digits, punctuation, line ends."""
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"


def build_parser() -> ToolParser:
    """The command line."""
    parser = ToolParser(description=__doc__)
    files = parser.add_argument_group("files").add_argument
    files("--input", nargs="+", required=True, metavar="FILE",
        help="training text, jsonl with a text field (.gz and .xz too)")  # fmt: skip
    files("--valid-input", nargs="+", required=True, metavar="FILE", help="held-out text, whole works")
    files("--work-dir", type=Path, required=True, metavar="DIR", help="tokenizer, data and checkpoints")
    files("--hf-path", type=Path, required=True, metavar="DIR", help="Hugging Face folder to write")
    model, training = parser.add_argument_group("model"), parser.add_argument_group("training")
    for group, flag, default, what in (
        (model, "--vocab-size", 4096, "W: tokens, the two special ones included"),
        (model, "--num-layers", 6, "transformer layers"),
        (model, "--hidden-size", 192, "E: width, a multiple of the attention heads"),
        (model, "--ffn-hidden-size", 512, "width inside a feed-forward layer"),
        (model, "--num-attention-heads", 6, "H: attention heads"),
        (model, "--num-query-groups", 2, "heads of keys and values, which divide the attention heads"),
        (training, "--train-iters", 1700, "updates"),
        (training, "--seq-length", 2048, "bytes of a packed row"),
        (training, "--global-batch-size", 8, "rows of an update"),
        (training, "--threads", 1, "torch threads"),
    ):
        group.add_argument(flag, type=in_range(ranges.COUNT), default=default, metavar="N", help=f"{what} ({default})")
    training.add_argument("--lr", type=in_range(ranges.Range(above=0)), default=3e-3, metavar="RATE",
        help="highest learning rate, after the warm-up (0.003)")  # fmt: skip
    training.add_argument("--seed", type=in_range(ranges.SEED), default=1234, metavar="N",
        help="of weights and of the order of the rows (1234)")  # fmt: skip
    return parser


def train_tokenizer(texts: list[str], folder: Path, vocab_size: int, max_length: int) -> None:
    """A byte-level BPE in Hugging Face format with BOS as id 0 and end of text as id 1."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(BOS, special=True), AddedToken(EOS, special=True)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": max_length,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))


def run(args: argparse.Namespace) -> None:
    """Trains what is not there yet and writes the folder; ValueError for what the user can mend."""
    from megabyte_distill.data.encoding import EncodeJob
    from megabyte_distill.data.preprocess import iterate_texts, preprocess

    tokenizer = args.work_dir / "tokenizer"
    if not (tokenizer / "tokenizer.json").exists():
        train_tokenizer(list(iterate_texts(args.input)), tokenizer, args.vocab_size, max_length=args.seq_length)
    stems = {}
    for name, inputs in (("train", args.input), ("valid", args.valid_input)):
        stems[name] = args.work_dir / f"{name}_text_document"
        if not stems[name].with_suffix(".json").exists():
            preprocess(inputs, output_prefix=args.work_dir / name, job=EncodeJob(tokenizer_model=str(tokenizer)))
    train(args, tokenizer, stems)


def backbone_config(args: argparse.Namespace) -> BackboneConfig:
    """A Llama with tied embeddings."""
    return BackboneConfig(
        family="llama",
        num_layers=args.num_layers,
        hidden_size=args.hidden_size,
        ffn_hidden_size=args.ffn_hidden_size,
        num_attention_heads=args.num_attention_heads,
        num_query_groups=args.num_query_groups,
        head_dim=args.hidden_size // args.num_attention_heads,
        vocab_size=args.vocab_size,
        norm_eps=1e-5,
        rope_theta=10000.0,
        tied_embeddings=True,
        max_position_embeddings=2048,
    )


def stage_config(args: argparse.Namespace) -> StageConfig:
    """One long stage of next-token prediction."""
    return StageConfig(
        train_iters=args.train_iters,
        seq_length=args.seq_length,
        global_batch_size=args.global_batch_size,
        micro_batch_size=args.global_batch_size,
        chunk_bucket=16,
        lr=args.lr,
        min_lr_ratio=0.02,
        lr_warmup_fraction=0.03,
        eval_interval=200,
        eval_iters=8,
        save_interval=100,
    )


def train(args: argparse.Namespace, tokenizer: Path, stems: dict[str, Path]) -> None:
    """Run the loop and write the Hugging Face folder."""
    import torch

    from megabyte_distill.parallel.process_groups import world

    torch.set_num_threads(args.threads)
    with world(seed=args.seed) as ranks:
        from megabyte_distill.conversion.hf_export import export_backbone
        from megabyte_distill.conversion.new_folder import EXPORT_MARKER, check_replaceable
        from megabyte_distill.model.backbone import Backbone
        from megabyte_distill.training.logging import say
        from megabyte_distill.training.loop import StopReason

        check_replaceable(args.hf_path, overwrite=True, marker=EXPORT_MARKER)  # not at the end of the training
        torch.manual_seed(args.seed)
        model = Backbone(backbone_config(args)).to(ranks.device)
        say(f"teacher of {sum(p.numel() for p in model.parameters()):,} parameters, torch threads: {args.threads}")
        if run_loop(args, model, ranks, stems) is StopReason.DONE and ranks.is_main:
            export_backbone(model, args.hf_path, tokenizer, dtype=torch.bfloat16, overwrite=True)
            say(f"wrote {args.hf_path}")


def run_loop(args: argparse.Namespace, model: Backbone, ranks: World, stems: dict[str, Path]) -> StopReason:
    """Train, from the last checkpoint in the work folder if there is one."""
    from megabyte_distill.data.dataset import ByteTokenDataset
    from megabyte_distill.data.sampler import RowStream
    from megabyte_distill.objectives.token_ce import TokenCrossEntropy
    from megabyte_distill.training.checkpoint import find_checkpoint, latest_iteration, load_checkpoint
    from megabyte_distill.training.logging import MetricWriter
    from megabyte_distill.training.loop import Loop
    from megabyte_distill.training.optimizer import wrap_for_training
    from megabyte_distill.training.rows import HeldOutRows, MicroBatches
    from megabyte_distill.training.saving import Saver
    from megabyte_distill.training.signals import stop_request

    stage, folder = stage_config(args), args.work_dir / "lm"

    def stream(name: str, seed: int) -> RowStream:
        dataset = ByteTokenDataset(str(stems[name]))
        return RowStream([dataset], row_bytes=stage.seq_length, chunk_bucket=stage.chunk_bucket, seed=seed)

    left = find_checkpoint(folder) if latest_iteration(folder) is not None else None
    if left is not None:
        load_checkpoint(left, model)  # before the optimizer takes its copy
    with stop_request() as stop:
        loop = Loop(
            stage="lm",
            trained=wrap_for_training(model, model.config, stage),
            objective=TokenCrossEntropy(),
            rows=MicroBatches(stream("train", args.seed), stage, ranks),
            config=stage,
            run_config=RunConfig(log_interval=20),
            world=ranks,
            saver=Saver(folder=folder, world=ranks),
            writer=MetricWriter(args.work_dir if ranks.is_main else None),
            stop=stop,
            valid_rows=HeldOutRows(stream("valid", 1), stage, ranks),
        )
        if left is not None:
            loop.resume(left)
        return loop.run()


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return run_tool(build_parser(), run, argv)


if __name__ == "__main__":
    sys.exit(main())
