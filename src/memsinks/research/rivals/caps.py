"""Fewer copies: deduplication, caps, and the twin that never saw the documents.

The copies that are left out stay in their rows without a loss, so that steps, learning rate and divisor are those of
ordinary training: what differs is what the model learns, and nothing else.
"""

from __future__ import annotations

from memsinks.errors import ConfigError
from memsinks.research.rivals.method import Batch, TrainingMethod, settling, without


def cap(*, copies: int = 1, fresh: bool = False, settle_lr: float = 0.0, settle_passes: int = 8) -> TrainingMethod:
    """Learn from the first `copies` exposures of each document and from no later one; 1 = deduplication.

    With `fresh` other text stands in the rows of all copies but the first (so `copies` must be 1). With `settle_lr` what is
    left is leveled, as in our own arm.
    """

    def change(batch: Batch) -> Batch:
        return without(batch, batch["exposures"] > copies)

    if fresh and copies != 1:
        raise ConfigError(f"fresh text replaces all copies but the first, so copies must be 1, got {copies}")
    return TrainingMethod(change=change, fresh=fresh, settle=settling(settle_lr, settle_passes))


def twin() -> TrainingMethod:
    """Learn nothing from the audited documents: the model as if they had never been there."""

    def change(batch: Batch) -> Batch:
        return without(batch, batch["audited"])

    return TrainingMethod(change=change)
