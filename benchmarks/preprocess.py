#!/usr/bin/env python3
"""How fast a corpus is preprocessed, against what people use instead, on the same text in one run.

    python benchmarks/preprocess.py --quick                       # under a minute: shows that it runs
    python benchmarks/preprocess.py --bpe LLAMA3 --sentencepiece LLAMA2 --input 'corpus/*.jsonl'

``--bpe`` and ``--sentencepiece`` are folders with a tokenizer.json, ``--input`` jsonl files with the key text; without
them the embedded tokenizer, a SentencePiece model trained on the spot and the embedded text, which say little of real
ones. Each figure is a ratio of throughputs, this tool's over the other's, best of ``--repeats`` interleaved runs each,
``--workers`` processes or threads on both sides. Against byte-level BPE and SentencePiece:

- Megatron style: a pool of workers, each calling the Hugging Face tokenizer on one document after the other, and the
  parent adding them to megatron-core's indexed dataset builder, as Megatron-LM's preprocessing does;
- bare tiktoken, bare tokenizers: their own batched encoding of texts that are in memory already, ids and nothing else.

With bytes alone: jsonl.zst against a loop that decompresses and parses each line with orjson, files of text (.txt.zst)
against ``zstd -d | wc -c``. Memory: peak of a run (parent and largest worker) on the whole text over that on a quarter.
The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import glob
import io
import json
import lzma
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megabyte_distill.data.encoding import EncodeJob  # noqa: E402 - after the path is set
from megabyte_distill.data.preprocess import PreprocessOptions, preprocess  # noqa: E402
from megabyte_distill.data.tokenizers import TokenizerKind  # noqa: E402

FLOORS = {
    "bpe_to_megatron_style": 3.0,
    "bpe_to_bare_tiktoken": 0.75,
    "sentencepiece_to_megatron_style": 1.2,
    "sentencepiece_to_bare_tokenizers": 0.9,
    "bytes_only_to_decompress_orjson": 0.8,
    "bytes_only_to_zstd_wc": 0.5,
}
_state: dict[str, object] = {}


def ours(source: Path, folder: Path, workers: int, **settings: object) -> None:
    """This tool, from the file to the published data set; the last run's is removed beforehand."""
    for old in folder.glob("ours*"):
        old.unlink()
    started = time.perf_counter()
    options = PreprocessOptions(workers=workers)
    preprocess([source], output_prefix=folder / "ours", job=EncodeJob(**settings), options=options)  # type: ignore[arg-type]
    _state["seconds"] = time.perf_counter() - started


def _start_megatron_worker(tokenizer: str) -> None:
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _state["tokenizer"] = Tokenizer.from_file(tokenizer)


def _encode_like_megatron(line: str) -> tuple[list[int], int]:
    text = json.loads(line)["text"]
    return _state["tokenizer"].encode(text, add_special_tokens=False).ids, len(line)  # type: ignore[attr-defined]


def megatron_style(source: Path, folder: Path, workers: int, tokenizer: Path) -> None:
    """A pool of workers and one builder, documents one by one."""
    import numpy
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(folder / "megatron.bin"), dtype=numpy.int32)
    context = multiprocessing.get_context("spawn")
    with (
        context.Pool(workers, initializer=_start_megatron_worker, initargs=(str(tokenizer),)) as pool,
        open(source, encoding="utf-8") as lines,
    ):
        for ids, _ in pool.imap(_encode_like_megatron, lines, 32):
            builder.add_document(torch.tensor(ids, dtype=torch.int32), [len(ids)])
    builder.finalize(str(folder / "megatron.idx"))


def bare_tokenizers(texts: list[str], workers: int, tokenizer: Path) -> None:
    """The tokenizers library's batches, on threads of its own."""
    code = (
        "import sys, json, time; from tokenizers import Tokenizer\n"
        "texts = json.load(sys.stdin); tokenizer = Tokenizer.from_file(sys.argv[1]); started = time.perf_counter()\n"
        "for first in range(0, len(texts), 1000):\n"
        "    batch = tokenizer.encode_batch_fast(texts[first : first + 1000], add_special_tokens=False)\n"
        "    ids = [encoding.ids for encoding in batch]\n"
        "print(time.perf_counter() - started)"
    )
    # the number of its threads is read once a process
    environment = {**os.environ, "RAYON_NUM_THREADS": str(workers), "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tokenizer)],
        input=json.dumps(texts),
        env=environment,
        check=True,
        text=True,
        stdout=subprocess.PIPE,
    )
    _state["seconds"] = float(done.stdout)


def bare_tiktoken(texts: list[str], workers: int, tokenizer: Path) -> None:
    """tiktoken's batches with the same ranks and pattern."""
    from megabyte_distill.data import tokenizers

    encoding = _state.get("encoding")
    if encoding is None:
        fast = tokenizers.load(tokenizer)._fast  # type: ignore[attr-defined]  # the same ranks and pattern, nothing around
        if fast is None:
            raise SystemExit(f"--bpe {tokenizer}: tiktoken does not give its ids; choose another byte-level BPE")
        encoding = fast._encoding
        _state["encoding"] = encoding
    started = time.perf_counter()
    for first in range(0, len(texts), 1000):
        encoding.encode_ordinary_batch(texts[first : first + 1000], num_threads=workers)  # type: ignore[union-attr]
    _state["seconds"] = time.perf_counter() - started


def decompress_and_parse(source: Path) -> None:
    """The least that reading jsonl.zst takes."""
    import orjson
    import zstandard

    with open(source, "rb") as file, zstandard.ZstdDecompressor().stream_reader(file) as stream:
        for line in io.BufferedReader(stream, 1 << 20):
            orjson.loads(line)["text"]


def zstd_wc(source: Path) -> None:
    """The command line's own pipe."""
    subprocess.run(f"zstd -dc '{source}'/*.zst | wc -c", shell=True, check=True, stdout=subprocess.DEVNULL)


def seconds(run: Callable[[], None]) -> float:
    """Wall time, or what the run itself measured behind its own start."""
    _state.pop("seconds", None)
    started = time.perf_counter()
    run()
    return float(_state.get("seconds", time.perf_counter() - started))  # type: ignore[arg-type]


def ratios(runs: dict[str, Callable[[], None]], repeats: int) -> dict[str, float]:
    """Each other run's best time over that of "ours", the runs interleaved."""
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for name, run in runs.items():
            best[name] = min(best[name], seconds(run))
            print(f"  {name}: {best[name]:.2f} s", flush=True)
    return {name: best[name] / best["ours"] for name in runs if name != "ours"}


def peak_memory(source: Path, folder: Path, tokenizer: Path, workers: int) -> int:
    """Bytes: the parent's peak and the largest worker's, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:  # a process of its own, whose pool is below it
        return pool.submit(_run_and_measure, source, folder, tokenizer, workers).result()


def _run_and_measure(source: Path, folder: Path, tokenizer: Path, workers: int) -> int:
    ours(source, folder, workers, tokenizer_model=str(tokenizer))
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(resource.getrusage(of).ru_maxrss for of in who) * 1024


def texts_from(patterns: list[str] | None, limit: int) -> list[str]:
    """About ``limit`` bytes of documents, each of the files giving its share."""
    if not patterns:
        with lzma.open(ROOT / "examples" / "tiny" / "train.jsonl.xz", "rt", encoding="utf-8") as lines:
            texts = [json.loads(line)["text"] for line in lines]
        parts = [text[start : start + 4000] for text in texts for start in range(0, len(text), 4000)]
        return _up_to(iter(parts), limit)
    files = [path for pattern in patterns for path in sorted(glob.glob(pattern))]
    chosen: list[str] = []
    for path in files:
        with open(path, encoding="utf-8") as lines_of:
            chosen += _up_to((json.loads(line)["text"] for line in lines_of), limit // len(files))
    return chosen


def _up_to(texts: Iterator[str], limit: int) -> list[str]:
    chosen, size = [], 0
    for text in texts:
        if size >= limit:
            break
        chosen.append(text)
        size += len(text.encode())
    return chosen


def sentencepiece_tokenizer(folder: Path, texts: list[str]) -> Path:
    """A tokenizer.json of the Metaspace kind, trained on a little of the text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=True)
    tokenizer.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme="never"), decoders.ByteFallback()])
    trainer = trainers.BpeTrainer(vocab_size=4096, special_tokens=["<unk>", "<s>", "</s>"])
    tokenizer.train_from_iterator(texts[:200], trainer)
    spec = json.loads(tokenizer.to_str())
    vocabulary = spec["model"]["vocab"]
    for byte in range(256):
        vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    return folder


def measure(args: argparse.Namespace, folder: Path) -> dict[str, float]:
    """All figures."""
    megabytes = 4 if args.quick else args.megabytes
    texts = texts_from(args.input, megabytes << 20)
    bpe = args.bpe or ROOT / "examples" / "tiny" / "teacher"
    pieces = args.sentencepiece or sentencepiece_tokenizer(folder / "pieces", texts)
    source, workers = folder / "text.jsonl", args.workers
    source.write_text(
        "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8"
    )
    print(f"{len(texts)} documents, {source.stat().st_size / 1e6:.1f} MB of jsonl, {workers} workers", flush=True)
    repeats, result = (1 if args.quick else args.repeats), {}

    print("byte-level BPE", flush=True)
    found = ratios(
        {
            "ours": lambda: ours(source, folder, workers, tokenizer_model=str(bpe)),
            "megatron_style": lambda: megatron_style(source, folder, workers, bpe / "tokenizer.json"),
            "bare_tiktoken": lambda: bare_tiktoken(texts, workers, bpe),
        },
        repeats,
    )
    result |= {f"bpe_to_{name}": value for name, value in found.items()}
    print("SentencePiece", flush=True)
    found = ratios(
        {
            "ours": lambda: ours(source, folder, workers, tokenizer_model=str(pieces)),
            "megatron_style": lambda: megatron_style(source, folder, workers, pieces / "tokenizer.json"),
            "bare_tokenizers": lambda: bare_tokenizers(texts, workers, pieces / "tokenizer.json"),
        },
        repeats,
    )
    result |= {f"sentencepiece_to_{name}": value for name, value in found.items()}
    result |= bytes_only(source, texts, folder, workers, repeats)
    print("memory", flush=True)
    quarter = folder / "quarter.jsonl"
    with open(source, "rb") as whole:
        lines = whole.readlines()
    quarter.write_bytes(b"".join(lines[::4]))
    small, large = (peak_memory(path, folder, bpe, workers) for path in (quarter, source))
    return result | {"peak_memory_growth": large / small, "peak_memory_bytes": large}


def bytes_only(source: Path, texts: list[str], folder: Path, workers: int, repeats: int) -> dict[str, float]:
    """The two ratios without a tokenizer."""
    import zstandard

    packed, text = folder / "text.jsonl.zst", folder / "text"
    compressor = zstandard.ZstdCompressor()
    with open(source, "rb") as plain, open(packed, "wb") as target:
        compressor.copy_stream(plain, target)
    text.mkdir()
    for first in range(0, len(texts), 1000):  # files of some MB, a document each
        (text / f"{first:08}.txt.zst").write_bytes(compressor.compress("\n".join(texts[first : first + 1000]).encode()))
    none = {"tokenizer_kind": TokenizerKind.NONE}
    print("bytes alone, jsonl.zst", flush=True)
    found = ratios(
        {
            "ours": lambda: ours(packed, folder, workers, **none),
            "decompress_orjson": lambda: decompress_and_parse(packed),
        },
        repeats + 2,
    )
    print("bytes alone, txt.zst", flush=True)
    found |= ratios(
        {"ours": lambda: ours(text, folder, workers, **none), "zstd_wc": lambda: zstd_wc(text)}, repeats + 2
    )
    return {f"bytes_only_to_{name}": value for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--bpe", type=Path, help="folder of a byte-level BPE tokenizer.json")
    parser.add_argument("--sentencepiece", type=Path, help="folder of a tokenizer.json of SentencePiece's family")
    parser.add_argument("--input", nargs="+", help="jsonl files or globs with the key text")
    parser.add_argument("--megabytes", type=int, default=48, help="text to use (48)")
    parser.add_argument("--workers", type=int, default=2, help="processes or threads on both sides (2)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, the best counts (3)")
    parser.add_argument("--quick", action="store_true", help="4 MB, one run each")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="preprocess-") as folder:
        result = measure(args, Path(folder))
    for name, floor in FLOORS.items():
        print(f"{name}: {result[name]:.2f} (wanted ≥ {floor})")
    print(json.dumps({name: round(value, 3) for name, value in result.items()}))


if __name__ == "__main__":
    main()
