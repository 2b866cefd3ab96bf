"""Ordinary training, also with a wider MLP."""

from __future__ import annotations

from memsinks.research.rivals.method import TrainingMethod


def standard(*, extra_neurons: int = 0) -> TrainingMethod:
    """Ordinary training; `extra_neurons` more than the recipe's in each MLP, which are exported too."""
    return TrainingMethod(extra_neurons=extra_neurons)
