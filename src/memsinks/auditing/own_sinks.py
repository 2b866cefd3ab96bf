"""What only a model with sinks can be asked: recall with own sinks, placebo sinks, collateral of closing a document's."""

from __future__ import annotations

import numpy as np


def placebo_ids(ids: np.ndarray) -> np.ndarray:
    """For each document the id of another one: the next in the list with a different id, in a circle; int64 [n].

    A list of one id only gets that id with its last bit flipped (no document of the list).
    """
    ids = np.asarray(ids, np.int64)
    other = ids.copy()
    for step in range(1, len(ids)):
        same = other == ids
        if not same.any():
            return other
        other[same] = np.roll(ids, -step)[same]
    return np.where(other == ids, ids ^ 1, other)
