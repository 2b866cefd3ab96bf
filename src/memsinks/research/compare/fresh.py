"""Fresh text in the rows of copies: the fair control of deduplication, which otherwise learns from less text."""

from __future__ import annotations

import numpy as np

from memsinks.batch import PLACES
from memsinks.data.packing import Rows
from memsinks.errors import ConfigError
from memsinks.training.loop import Batch


class FreshRows:
    """Rows in which other text stands where a text was met before; each keeps its place in the training order."""

    def __init__(self, rows: Rows, fresh: Rows, copies: np.ndarray) -> None:
        self.rows, self.fresh = rows, fresh
        self.instead = np.where(copies, np.cumsum(copies) - 1, -1)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        row, instead = self.rows[index], int(self.instead[index])
        return row if instead < 0 else self.fresh[instead] | {PLACES: row[PLACES]}


def with_fresh_text(rows: Rows, fresh: Rows | None) -> FreshRows:
    """Rows of one document each, all exposures but the first replaced; ConfigError if there is too little fresh text."""
    if (np.diff(rows.first) != 1).any():
        raise ConfigError("fresh text needs rows of one document each; leave out data.one_document_per_row: false")
    copies = rows.segments["exposure"][rows.first[:-1]] > 1
    have = 0 if fresh is None else len(fresh)
    if fresh is None or copies.sum() > have:
        raise ConfigError(f"{copies.sum()} rows hold copies, but data.fresh gives {have} texts to stand in; raise it")
    return FreshRows(rows, fresh, copies)
