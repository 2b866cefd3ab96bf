"""The run that proves isolation: the same schedule, in which what trains sinks alone is blank.

rows = ms.make_rows(documents, tokenizer, ...)
...train a model on rows, and another one on ms.shadow_rows(rows, config)...
assert ms.shared_hash(model) == ms.shared_hash(shadow)
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np

from memsinks.batch import BLANK, ISOLATIONS, NO_SINKS
from memsinks.data.packing import Rows
from memsinks.sinks.config import SinkConfig


def shadow_rows(rows: Rows, config: SinkConfig, owners: Collection[int] | None = None) -> Rows:
    """Rows in the same places, in which all that trains sinks alone is blank: it counts as a target and nothing learns from it.

    A model that is trained on them has the same shared weights, bit for bit, as one that is trained on `rows` in the same
    way, and the same own blocks of all other owners. What couples rows must be off or the same: see docs/takedown.md.

    Args:
        rows: as they are trained on.
        config: of the model's sinks.
        owners: document ids; only these become blank. None = all.
    """
    segments = rows.segments.copy()
    flag, alone = segments["isolation"], np.zeros(len(segments), bool)
    exact = flag == ISOLATIONS["exact"]
    if config.shared == "none":
        exact |= flag == 0
    alone |= exact & (segments["exposure"] >= config.open_from)
    alone |= flag == ISOLATIONS["private"]
    alone &= segments["document_id"] != NO_SINKS
    if owners is not None:
        alone &= np.isin(segments["document_id"], np.array(list(owners), np.int64))
    segments["isolation"][alone] = BLANK
    return replace(rows, segments=segments)
