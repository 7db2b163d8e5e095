"""The commands of the pages, run at smoke size in a folder that has what they read.

A command stays as it stands but for names of folders and files that are the reader's, sizes, and flags behind it that
keep it small. Programs run in this process, where torch is imported already.
"""

from __future__ import annotations

import importlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import zstandard

from megabyte_distill.conversion.hf_export import export_teacher
from megabyte_distill.parallel.process_groups import world
from megabyte_distill.pretrain.main import main as train
from tests.data.preprocessing import preprocess
from tests.doc_commands import ROOT, Call
from tests.pretrain.job import WORDS, Job, environment, torchrun

ELSEWHERE = {
    r"make (demo|test|test-all|lint)\b": "the suite itself, and a demo that tests/test_packaging.py starts",
    r"make kernels": "needs nvcc; tests/kernels/test_build.py compiles where it is",
    r"python3 -m megabyte_distill\.kernels build --if-missing": "of gpu_check.sh; the same",
    r"(python3? -m )?(pip|venv|pre-commit)\b": "installs from a package index, or changes a clone's hooks",
    r"(docker|enroot) ": "needs Docker or enroot",
    r"lm_eval |python3? -m megabyte_distill\.harness ": "needs the extra eval; tests/hf/test_lm_eval.py calls both",
    r"(python -m )?pytest ": "a part of this suite",
    r"python -m tests\.distributed\.test_golden": "writes the golden losses that this suite is held to",
    r"torchrun .*--nnodes (?!1 )": "several machines; tests/test_launch_scripts.py lets two of one rank meet",
    r".*--dry-run": "tests/test_launch_scripts.py runs it of two scripts, slow tests of all",
    r".*--transformer-impl transformer_engine": "needs Transformer Engine and a GPU; tests/model/test_engine_gpu.py",
    r"python scripts/check_greedy\.py": "tests/hf/test_check_greedy.py runs it on a small export",
    r"python3? .*gpu_check": "needs a GPU; tests/test_gpu_check.py tests its parts",
    r"python benchmarks/(data_efficiency|ablations|exact_targets|kernel_traffic)\.py": "tests/test_benchmarks.py",
    r"python benchmarks/mamba_scan\.py": "tests/test_benchmarks.py",
    r"python benchmarks/real_teacher\.py": "tests/test_real_teacher.py",
}
"""What is not run here, by how it begins, and why or where it is."""
LONG = re.compile(
    r"torchrun .*--nproc-per-node|torchrun examples/pretrain_byte_kd.sh($| --smoke| --save RUN --stages 1a,1c)|"
    r"python (benchmarks/|tools/train_teacher)"
)
"""What takes more than seconds: several ranks, the embedded text, benchmarks."""
SPLIT = "969,30,1"
READERS = {
    "STEM": "data/corpus_text_document", "DATA": "data/corpus_text_document", "TEACHER": "DIR",
    "/data/corpus_text_document": "data/corpus_text_document", "/runs/teacher": "CKPT",
    "checkpoints/llama3.2-3b": "CKPT",
    "/runs/first": "FIRST", "runs/tiny": "RUN", "runs/tiny/data/heldout_text_document": "data/corpus_text_document",
    "RUN/data/heldout_text_document": "data/corpus_text_document", "documents-*.jsonl": "corpus.jsonl",
    "LLAMA3": "DIR", "LLAMA2": "DIR", "examples/tiny/teacher": "NEW_TEACHER",
}  # fmt: skip
"""Names of the reader's own in the pages → what the folder has for them."""
SIZES = {
    r"--workers": "1", r"--partitions": "2", r"--preset": "tiny", r"--(\d[a-z]\.)?seq-length": "256",
    r"--(\d[a-z]\.)?global-batch-size": "2", r"--(\d[a-z]\.)?(train-iters|target-bytes-per-chunk-iters)": "1",
    r"--(tensor|pipeline)-model-parallel-size": "2",
}  # fmt: skip
"""Flag → the value that it gets."""
WRITES = {
    "import": "--megatron-path", "export": "--hf-path", "preprocess": "--output-prefix",
    "cache_teacher": "--logits-save-dir", "training": "--save",
}  # fmt: skip
"""The flag of each command that names what it makes."""


def reason_not_run(call: Call) -> str | None:
    """Why a call is not run here; None where it is."""
    shown = " ".join(call.words)
    return next((why for pattern, why in ELSEWHERE.items() if re.match(pattern, shown)), None)


def is_long(call: Call) -> bool:
    return LONG.match(" ".join(call.words)) is not None


@dataclass
class Place:
    """A folder with DIR, CKPT, RUN, OUT, data sets and text, and the flags that keep training small."""

    folder: Path
    small: Sequence[str]
    names: dict[str, str] = field(default_factory=dict)
    """Of what a page's command made beside what was there → its name."""
    made: int = 0

    def begin_page(self) -> None:
        self.names.clear()

    def run(self, call: Call) -> None:
        """AssertionError where the call fails."""
        _, *words = call.words
        if call.words[0] == "torchrun":
            self._train(words)
        elif words[0] == "-c":
            exec(compile(words[1], "-c", "exec"), {})
        elif words[0] == "-m":
            name = words[1] if words[1] != "megabyte_distill.memory" else "megabyte_distill.memory.__main__"
            name = "megabyte_distill.kernels.__main__" if name == "megabyte_distill.kernels" else name
            more = ["--if-missing"] if "build" in words else []
            if "memory" in name and "--preset" not in words:
                more = ["--load", "CKPT", *self.small, "--backbone-width", "32"]
            call_main(name, [*words[2:], *more])
        else:
            script = Path(words[0])
            kind = script.stem
            argv = self._small(kind, self._mine(kind, words[1:]))
            if is_long(call):
                command = [sys.executable, str(ROOT / script), *argv]
                done = subprocess.run(
                    command, cwd=self.folder, env=environment(), capture_output=True, text=True, timeout=900
                )
                assert done.returncode == 0, done.stderr[-3000:]
                return
            # a page shows one of several machines
            at = argv.index("--partition-index") + 1 if "--partition-index" in argv else 0
            for index in ("0", "1") if at else ("0",):
                argv[at : at + bool(at)] = [index] if at else []
                call_main(".".join(script.with_suffix("").parts), argv)

    def _mine(self, program: str, words: Sequence[str]) -> list[str]:
        """With the folder's names and small sizes; what is made anew has a name of its own."""
        kind = words[0] if words and words[0] in WRITES else program.removesuffix("_bytes")
        written = WRITES.get(kind) if not words or words[0] not in ("merge", "verify", "inspect") else None
        mine, flag = [], ""
        for word in words:
            if word == "…":
                if flag == "--tokenizer" and mine[-1] == flag:
                    mine.append("DIR")
                continue
            if word.startswith("--"):
                flag = word
            elif sizes := [size for name, size in SIZES.items() if re.fullmatch(name, flag)]:
                [word] = sizes
            elif flag == written and "--overwrite" not in words:
                word = self._new(READERS.get(word, word))
            else:
                word = self._known(READERS.get(word, word))
            mine.append(word)
        return mine

    def _new(self, word: str) -> str:
        if not [*self.folder.glob(f"{word}*")]:
            return word
        self.made += 1
        if word.startswith("data/"):
            self.names[word] = f"{word}-{self.made}"
        return f"{word}-{self.made}"

    def _known(self, word: str) -> str:
        for name, new in self.names.items():
            if word == name or word.startswith(f"{name}_"):
                return new + word.removeprefix(name)
        return word

    def _small(self, program: str, words: list[str]) -> list[str]:
        if program == "evaluate":
            words = [*words, "--seq-length", "256"] if "robustness" not in words else words
            words += ["--max-documents", "2", *([] if "--resamples" in words else ["--resamples", "20"])]
            if "robustness" in words:
                words += ["--paths", "1", *("--suite-texts", "1", "--suite-questions", "1", "--suite-samples", "1")]
            elif "--paths" not in words:
                words += ["--paths", "2", "--path-bytes", "100"]
        elif program == "generate":
            words += ["--max-new-bytes", "12"]
        elif program == "plot_run":
            words += ["--text-bytes", "200"]
        elif program == "check_real_teacher":
            words += ["--new-tokens", "4"]
        elif program == "train_teacher":
            words += ["--train-iters", "1"]
        elif (ROOT / "benchmarks" / f"{program}.py").exists():
            words += ["--quick"]
        return words

    def _train(self, words: Sequence[str]) -> None:
        """Flags of before, for which … stands, are those of going on from RUN's first stages."""
        at = words.index("examples/pretrain_byte_kd.sh")
        launch, flags = list(words[:at]), list(words[at + 1 :])
        is_embedded = not {"…", "--load"} & set(words)
        before = ["--stages", "2a,2b"] if "…" in flags and "--stages" not in flags else []
        before += [] if "--load" in flags or is_embedded else ["--load", "RUN"]
        before += [] if "--save" in flags else ["--save", "MADE"]
        if not is_embedded and "--data-path" not in flags:
            before += ["--data-path", "data/corpus_text_document", "--split", SPLIT]
        mine = self._mine("training", [*before, *flags])
        # a large corpus's share of these few documents would hold out none
        mine = [SPLIT if word == "9990,8,2" else word for word in mine]
        mine += ["--train-iters", "1", "--summary-bytes", "0"] if is_embedded else self.small
        cuts = sum(flag in mine for flag in ("--tensor-model-parallel-size", "--pipeline-model-parallel-size"))
        if "--nproc-per-node" not in launch:
            code = train(mine, example_folder=ROOT / "examples" / "tiny", example_run=Path("runs/tiny"))
            assert code == 0, f"{mine} ended with {code}"
            return
        command = torchrun(str(ROOT / "examples/pretrain_byte_kd.sh"), *mine, processes=2 ** max(1, cuts))
        done = subprocess.run(command, cwd=self.folder, env=environment(), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]


def call_main(module: str, argv: Sequence[str]) -> None:
    """``main`` of a tool, a script, a benchmark or a module, as its own process would call it."""
    main: Callable[..., int | None] = importlib.import_module(module).main
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module, *argv])
        patch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"It was\n")))
        try:
            code = main() if main.__code__.co_argcount == 0 else main(list(argv))
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
    assert not code, f"{module} {' '.join(argv)} ended with {code}"


def make_place(folder: Path, job: Job, finished: Path) -> Place:
    """What the pages' commands read, as far as they do not make it themselves."""
    shutil.copytree(ROOT / "examples", folder / "examples")
    with world():
        export_teacher(job.teacher, folder / "DIR")
    shutil.copytree(job.teacher, folder / "CKPT")
    for name in ("RUN", "OTHER"):
        shutil.copytree(finished, folder / name)
    texts = [" ".join(WORDS[number % 5 :] * 8) for number in range(40)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "corpus.jsonl").write_text(lines)
    (folder / "shards").mkdir()
    (folder / "shards" / "0.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (folder / "shards" / "1.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    turns = [{"role": role, "content": "the old house"} for role in ("user", "assistant")]
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": turns}) + "\n" for _ in range(12)))
    (folder / "FILE").write_text(texts[0])
    (folder / "data").mkdir()
    preprocess([folder / "corpus.jsonl"], output_prefix=folder / "data" / "corpus", tokenizer_model=job.tokenizer)
    call_main(
        "tools.convert_checkpoint", ["export", "--megatron-path", str(folder / "RUN"), "--hf-path", str(folder / "OUT")]
    )
    small = job.flags(Path("RUN"))[8:]
    return Place(folder, [*small, "--train-iters", "1", "--eval-iters", "1"])
