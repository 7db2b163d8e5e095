"""Rebuild examples/tiny/*.jsonl.xz from two Debian packages: one JSON line a chapter, keys text, work, part.

    apt-get install bible-kjv bible-kjv-text
    apt-get download r-cran-janeaustenr && dpkg-deb -x r-cran-janeaustenr*.deb X
    pip install rdata
    python examples/tiny/build_text.py --janeaustenr X/usr/lib/R/site-library/janeaustenr/data

Sources: the six novels of Jane Austen as packaged in janeaustenr 1.0.0 (Project Gutenberg's public-domain texts), and
the King James Version as packaged in bible-kjv-text (public domain). Paragraphs are unwrapped to one line each and
verse numbers dropped. The held-out works are whole and never trained on: Persuasion, and The Acts of the Apostles.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import lzma
import re
import struct
import subprocess
import zlib
from collections.abc import Iterable
from pathlib import Path

NOVELS = {
    "sensesensibility": "Sense and Sensibility",
    "prideprejudice": "Pride and Prejudice",
    "mansfieldpark": "Mansfield Park",
    "emma": "Emma",
    "northangerabbey": "Northanger Abbey",
    "persuasion": "Persuasion",
}
HELD_OUT = ("Persuasion", "Acts")
CHAPTER = re.compile(r"^chapter\s+(\d+|[ivxlc]+)\.?$", re.IGNORECASE)

Document = dict[str, str]


def _unwrap(lines: Iterable[str]) -> str:
    paragraphs = re.split(r"\n\s*\n", "\n".join(lines))
    return "\n\n".join(" ".join(p.split()) for p in paragraphs if p.strip())


def austen_documents(data_dir: Path) -> Iterable[Document]:
    """Chapters of the novels in the R package's lazy-load data base (Rdata.rdb, Rdata.rdx)."""
    import rdata

    index = rdata.conversion.convert(rdata.parser.parse_data(gzip.decompress((data_dir / "Rdata.rdx").read_bytes())))
    store = (data_dir / "Rdata.rdb").read_bytes()
    for key, title in NOVELS.items():
        offset, length = (int(x) for x in index["variables"][key])
        (size,) = struct.unpack(">I", store[offset : offset + 4])
        raw = zlib.decompress(store[offset + 4 : offset + length])
        assert len(raw) == size
        lines = [str(x) for x in rdata.conversion.convert(rdata.parser.parse_data(raw))]
        starts = [i for i, line in enumerate(lines) if CHAPTER.match(line.strip())]
        for number, (start, end) in enumerate(zip(starts, [*starts[1:], len(lines)], strict=True), 1):
            body = [x for x in lines[start + 1 : end] if not re.match(r"^(volume|finis|the end)\b", x.strip().lower())]
            yield {"text": _unwrap(body), "work": title, "part": f"chapter {number}"}


def bible_documents() -> Iterable[Document]:
    """Chapters of the King James Version, printed by the `bible` command, one verse a line without its number."""
    printed = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], capture_output=True, text=True, check=True).stdout
    chapters: dict[tuple[str, str], list[str]] = {}
    for line in printed.splitlines():
        match = re.match(r"^(\d?[A-Za-z]+)(\d+):\d+ (.*)$", line)
        if match:
            chapters.setdefault((match[1], match[2]), []).append(match[3])
    for (book, chapter), verses in chapters.items():
        yield {"text": "\n".join(verses), "work": book, "part": f"chapter {chapter}"}


def interleave(works: list[list[Document]]) -> list[Document]:
    """A chapter of each work in turn, so that a measurement on the first bytes sees all of them."""
    return [document for row in itertools.zip_longest(*works) for document in row if document is not None]


def write(path: Path, documents: list[Document]) -> None:
    """One JSON line a document, compressed at xz's highest level."""
    lines = "".join(json.dumps(d, ensure_ascii=False) + "\n" for d in documents)
    path.write_bytes(lzma.compress(lines.encode(), preset=9 | lzma.PRESET_EXTREME))
    print(f"{path.name}: {len(documents)} documents, {sum(len(d['text'].encode()) for d in documents):,} bytes of text")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--janeaustenr", type=Path, required=True, help="the R package's data/ folder")
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    documents = [*austen_documents(args.janeaustenr), *bible_documents()]
    print(sorted({d["work"] for d in documents}))
    write(args.output_dir / "train.jsonl.xz", [d for d in documents if d["work"] not in HELD_OUT])
    write(
        args.output_dir / "heldout.jsonl.xz", interleave([[d for d in documents if d["work"] == w] for w in HELD_OUT])
    )


if __name__ == "__main__":
    main()
