"""The causal byte filter over a padded batch: what an exported model's ``forward`` runs and its cache holds."""

from __future__ import annotations

import torch
from torch import Tensor

from megabyte_distill.alphabet import BOS_BYTE, PAD_BYTE
from megabyte_distill.inference.bit_paths import BitPaths
from megabyte_distill.model.student import Student


class ByteFilter:
    """R rows read column by column, each along K bit histories.

    A row begins at a document's start, so a BOS in front changes nothing; a later BOS begins a new document, which
    sees nothing of the one before. PAD and masked columns are not read, wherever they stand.
    """

    def __init__(self, student: Student, rows: int, paths: int) -> None:
        self._paths = BitPaths(student, rows, paths)
        self._has_text = torch.zeros(rows, dtype=torch.bool, device=self._paths.log_weights.device)

    @property
    def rows(self) -> int:
        """R."""
        return self._paths.rows

    def read(self, byte_ids: Tensor, mask: Tensor) -> Tensor:
        """log P(next byte | what each row has read) [R, L, 256] fp32 behind each column of byte_ids [R, L] int64.

        Behind a column that is not read (mask [R, L] bool is False, or PAD) it is that of the last one that was.
        """
        columns = [
            self._read_column(byte_ids[:, place], mask[:, place] & (byte_ids[:, place] != PAD_BYTE))
            for place in range(byte_ids.shape[1])
        ]
        return torch.stack(columns, dim=1)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows [N] int64 only, in this order; a row may be taken several times."""
        self._paths.keep(rows)
        self._has_text = self._has_text[rows]

    def _read_column(self, byte_ids: Tensor, is_read: Tensor) -> Tensor:
        begins = is_read & (byte_ids == BOS_BYTE)
        restarted = (begins & self._has_text).nonzero()[:, 0]
        if restarted.shape[0]:
            self._paths.restart(restarted)
        text = is_read & ~begins
        self._has_text = (self._has_text & ~begins) | text
        rows = text.nonzero()[:, 0]
        if rows.shape[0] == self.rows:
            self._paths.advance(byte_ids)
        elif rows.shape[0]:
            self._paths.advance(byte_ids[rows], rows)
        return self._paths.next_byte_log_probabilities().float()
