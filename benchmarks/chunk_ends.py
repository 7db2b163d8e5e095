"""How hard merged chunk ends are to tell from the bytes around them: --target-bytes-per-chunk against counting bytes.

    python benchmarks/chunk_ends.py [--bytes 600000] [--length 6] [--quick]

Bits a byte that the ends of the second half of the embedded text cost, told from the last four bytes and the next one
by what followed them in the text so far. At the same mean length: the rule's ends, and "the first token end at or
behind n bytes", whose place depends on every end before it. Prints one JSON object; ``ratio`` is the rule's cost over
the other's.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megabyte_distill.data import tokenizers  # noqa: E402 - after the path is set
from megabyte_distill.data.chunk_merging import ChunkSizes, merged_ends  # noqa: E402
from megabyte_distill.data.packing import Segment, pack_row  # noqa: E402

TINY = ROOT / "examples" / "tiny"
CONTEXT = 4


def cost(byte_ids: NDArray[np.int64], bits: NDArray[np.bool_]) -> float:
    """Bits a byte of text that the ends of its second half take, by counts of what was seen before."""
    counts: defaultdict[bytes, list[float]] = defaultdict(lambda: [0.4, 0.4])
    text, total, half = bytes(byte_ids.tolist()), 0.0, len(byte_ids) // 2
    for place in range(CONTEXT, len(text) - 1):
        seen, bit = counts[text[place - CONTEXT + 1 : place + 2]], int(bits[place])
        if place >= half:
            total -= math.log2(seen[bit] / sum(seen))
        seen[bit] += 1
    return total / (len(text) - 1 - half)


def counting(ends: NDArray[np.int64], length: int) -> NDArray[np.int64]:
    """The token ends that are the first at or behind ``length`` bytes."""
    kept, place = [0], 0
    while (place := int(np.searchsorted(ends, ends[place] + length))) < len(ends):
        kept.append(place)
    return ends[kept]


def measure(size: int, length: int) -> dict[str, float]:
    """The figures on ``size`` bytes, at the mean length that counting to ``length`` gives."""
    with lzma.open(TINY / "train.jsonl.xz", "rt", encoding="utf-8") as lines:
        text = "".join(json.loads(line)["text"] for line in lines).encode()[:size].decode(errors="ignore")
    tokenizer = tokenizers.load(TINY / "teacher")
    tokens = tokenizer.encode_batch([text])[0]
    lengths = tokenizer.token_bytes.lengths[tokens]
    segment = Segment(
        document=0,
        byte_ids=np.frombuffer(text.encode(), dtype=np.uint8),
        tokens=tokens,
        token_lengths=lengths,
        next_byte=None,
        next_token=None,
        next_token_length=None,
    )
    row = pack_row([segment], row_bytes=segment.byte_ids.size + 1, chunk_bucket=1, start_id=0, end_of_text_id=0)
    byte_ids, token_bits = row.byte_ids.numpy(), row.bits.numpy()
    counted = np.zeros_like(token_bits)
    counted[counting(np.concatenate(([0], np.cumsum(lengths))), length)] = True
    limit = ChunkSizes([row]).limit_for(segment.byte_ids.size / (int(counted.sum()) - 1))
    found = {
        "tokens": token_bits,
        "rule": token_bits if limit is None else merged_ends(byte_ids, token_bits, limit).bits,
        "counting": counted,
    }
    return {
        **{f"{name}_bytes_per_chunk": byte_ids.size / int(bits.sum()) for name, bits in found.items()},
        **{f"{name}_bits_per_byte": cost(byte_ids, bits) for name, bits in found.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--bytes", type=int, default=600_000, help="text, the second half of which is scored (600000)")
    parser.add_argument("--length", type=int, default=6, help="bytes that the other rule counts to (6)")
    parser.add_argument("--quick", action="store_true", help="20,000 bytes, under a minute; the figures mean little")
    arguments = parser.parse_args()
    figures = measure(20_000 if arguments.quick else arguments.bytes, arguments.length)
    ratio = figures["rule_bits_per_byte"] / figures["counting_bits_per_byte"]
    print(json.dumps({**figures, "ratio": ratio}))


if __name__ == "__main__":
    main()
