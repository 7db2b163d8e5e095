"""What a preprocessing run says at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from megabyte_distill.data.manifest import Manifest, StoredPaths
from megabyte_distill.data.skipped import OF_ONE_KEY

_PLACES_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class PreprocessSummary:
    """Counts of the data sets that were written; over all keys."""

    stems: dict[str, str]
    """JSON key → the stem that ``--data-path`` takes."""
    documents: int
    bytes: int
    """Without BOS."""
    tokens: int
    """Without start ids."""
    marked: int | None
    """Bytes and ends of documents that the loss masks mark; None for plain text."""
    normalized_documents: int
    skipped: dict[str, int] = field(default_factory=dict)
    """Reason → records, once each however many keys there are."""
    skipped_at: dict[str, list[str]] = field(default_factory=dict)
    seconds: float = 0.0

    @classmethod
    def of(cls, stored: Mapping[str, StoredPaths], *, seconds: float) -> PreprocessSummary:
        """From the manifests of the data sets, by key."""
        manifests = [Manifest.load(paths.manifest) for paths in stored.values()]
        reasons = {reason for manifest in manifests for reason in manifest.skipped}
        return cls(
            stems={key: paths.stem for key, paths in stored.items()},
            documents=sum(manifest.documents for manifest in manifests),
            bytes=sum(manifest.bytes for manifest in manifests),
            tokens=sum(manifest.tokens for manifest in manifests),
            marked=sum(manifest.marked for manifest in manifests) if manifests[0].loss_mask else None,
            normalized_documents=sum(manifest.normalized_documents for manifest in manifests),
            # a record that cannot be read is left out of every key, a document that does not rebuild of its own
            skipped={
                reason: (sum if reason in OF_ONE_KEY else max)(m.skipped.get(reason, 0) for m in manifests)
                for reason in sorted(reasons)
            },
            skipped_at={
                reason: max((m.skipped_at.get(reason, []) for m in manifests), key=len) for reason in sorted(reasons)
            },
            seconds=seconds,
        )

    def __str__(self) -> str:
        skipped = ", ".join(f"{count} {reason}" for reason, count in self.skipped.items()) or "none"
        per_token = f", bytes per token {self.bytes / self.tokens:.3f}" if self.tokens else ""
        rate = self.bytes / max(self.seconds, 1e-9) / 1e6
        share = 100 * (self.marked or 0) / max(1, self.bytes + self.documents)
        marked = (
            []
            if self.marked is None
            else [f"answers to train on: {self.marked} bytes and ends of documents ({share:.1f} %)"]
        )
        lines = [
            f"documents {self.documents}, bytes {self.bytes}, tokens {self.tokens}{per_token}",
            *marked,
            f"changed by normalisation {self.normalized_documents}, skipped: {skipped}",
        ]
        for reason, places in self.skipped_at.items():
            more = self.skipped[reason] - len(places[:_PLACES_SHOWN])
            if places:
                shown = "; ".join(places[:_PLACES_SHOWN]) + (f"; and {more} more" if more else "")
                lines.append(f"  {reason}: {shown}")
        lines.append(f"{self.seconds:.1f} s, {rate:.2f} MB/s")
        lines += [f"--data-path {stem}" for stem in self.stems.values()]
        return "\n".join(lines)
