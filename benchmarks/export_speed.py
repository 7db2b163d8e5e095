"""How fast an exported student generates: stock ``generate`` over the byte filter beside its own ``generate_bytes``.

    python benchmarks/export_speed.py --hf-path OUT [--quick]

Both greedy, from the same prompts, on one thread; prints one JSON object with bytes per second (all rows together,
prompts not counted but read in the time) and their ratio.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

PROMPTS = ("It was a", "There is no doubt that ", "She looked at him, and", "On the next morning")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--hf-path", type=Path, required=True, metavar="DIR", help="an exported student")
    parser.add_argument("--bytes", type=int, default=128, help="new bytes of each row (128)")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, of which the fastest counts (3)")
    parser.add_argument("--quick", action="store_true", help="8 bytes, once: under a minute")
    arguments = parser.parse_args(argv)
    if arguments.quick:
        arguments.bytes, arguments.repeats = 8, 1
    print(json.dumps(measure(arguments.hf_path, arguments.bytes, arguments.repeats)))
    return 0


def measure(folder: Path, count: int, repeats: int) -> dict[str, Any]:
    """The figures; both ways alternate."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    batch = tokenizer(list(PROMPTS), return_tensors="pt", padding=True)
    # no row ends early: both write the same number of bytes
    stock = {"max_new_tokens": count, "do_sample": False, "eos_token_id": None}
    seconds: dict[str, list[float]] = {"generate": [], "generate_bytes": []}
    written: dict[str, int] = {}
    for _ in range(repeats):
        seconds["generate"].append(_timed(lambda: model.generate(**batch, **stock)))
        started = time.perf_counter()
        joint = model.generate_bytes(list(PROMPTS), max_new_bytes=count, temperature=0)
        seconds["generate_bytes"].append(time.perf_counter() - started)
        written = {"generate": count * len(PROMPTS), "generate_bytes": sum(len(row.byte_ids) for row in joint)}
    rates = {name: written[name] / min(times) for name, times in seconds.items()}
    return {
        "paths": model.config.paths,
        "rows": len(PROMPTS),
        "bytes_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "ratio": round(rates["generate_bytes"] / rates["generate"], 2),
    }


def _timed(work: Callable[[], Any]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    sys.exit(main())
