"""Documents as tokens, before they are put in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memsinks.data.targets import Targets


@dataclass(frozen=True)
class TokenizedDocuments:
    """Documents as tokens, each once.

    Attributes:
        tokens: integer [tokens] each, in memory or on disk.
        ids, groups: int64 [documents], see `identify`.
        copies: int64 [documents], how often each is met in an epoch.
        isolation: int64 [documents], see `batch.ISOLATIONS`; None = 0 for all.
        targets: which tokens of each are targets, see `targets.Targets`; None = all.
    """

    tokens: Sequence[np.ndarray]
    ids: np.ndarray
    groups: np.ndarray
    copies: np.ndarray
    isolation: np.ndarray | None = None
    targets: Targets | None = None
