"""One document of a stored data set as a terminal shows it: its text with a mark at each boundary."""

from __future__ import annotations

from megabyte_distill.data.dataset import ByteTokenDataset

_MARK = "│"


def show_document(dataset: ByteTokenDataset, document: int, *, limit: int = 4000) -> str:
    """A header, then the first ``limit`` bytes with ``│`` behind each byte that ends a token.

    A token that does not end with a whole character is written in hexadecimal: ⟨e6 97⟩. ValueError for a document that
    is not there.
    """
    if not 0 <= document < len(dataset):
        there = f"documents 0 … {len(dataset) - 1}" if len(dataset) else "no documents"
        raise ValueError(f"--document {document}: {dataset.name} has {there}")
    found = dataset[document]
    size, tokens = int(found.byte_ids.size), int(found.tokens.size)
    split = 0
    parts: list[str] = []
    place = 0
    for token in found.tokens.tolist():
        piece = dataset.table[token]
        place += len(piece)
        if place <= limit:
            text, is_whole = _readable(piece)
            parts.append(text)
        else:
            is_whole = _readable(piece)[1]
        split += not is_whole
    per_token = f", {size / tokens:.2f} bytes per token" if tokens else ""
    header = (
        f"document {document} of {len(dataset)} in {dataset.name}: {size} bytes, {tokens} tokens{per_token}, "
        f"{split} tokens that split a character"
    )
    if dataset.has_loss_mask:
        spans = dataset.spans(document).tolist()
        shown = ", ".join(f"{start}–{stop}" for start, stop in zip(spans[::2], spans[1::2], strict=True)) or "none"
        header += f"\ntrained bytes (from – to, exclusive; {size} is the document's end): {shown}"
    rest = f"\n… {size - limit} more bytes (--limit)" if size > limit else ""
    return f"{header}\n{_MARK.join([*parts, ''])}{rest}"


def _readable(piece: bytes) -> tuple[str, bool]:
    """A token's bytes for a terminal, and whether they are whole characters; control characters are escaped."""
    try:
        text = piece.decode()
    except UnicodeDecodeError:
        return f"⟨{piece.hex(' ')}⟩", False
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text), True
