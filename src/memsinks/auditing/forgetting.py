"""Loss figures of removal: gap, gap closed, counterfactual closure, price. Nats; floats or arrays of one shape."""

from __future__ import annotations

from typing import TypeVar

import numpy as np

Nats = TypeVar("Nats", float, np.ndarray)


def loss_gap(controls: Nats, documents: Nats) -> Nats:
    """How much better the model knows the documents than controls: L(controls) - L(documents); 0 = as if never seen."""
    return controls - documents


def gap_closed(gap: Nats, standard: Nats) -> Nats:
    """Share of the ordinary model's gap that is gone: 1 - gap / gap(standard); 0 = nothing removed, 1 = no gap left.

    Source: Ghosal, Maini, Raghunathan, ICML 2025, figure 3 (the share of the validation gap recovered).
    """
    return _divided(standard - gap, standard)


def counterfactual_closure(off: Nats, standard: Nats, twin: Nats) -> Nats:
    """(L_off - L_standard) / (L_twin - L_standard) on the documents.

    0 = nothing removed, 1 = as if never seen, above 1 = over-forgotten.
    """
    return _divided(off - standard, twin - standard)


def price(off: Nats, standard: Nats) -> Nats:
    """What it costs on held-out text: L_off(controls) - L_standard(controls); above 0 = worse than the ordinary model."""
    return off - standard


def _divided(part: Nats, whole: Nats) -> Nats:
    """nan where `whole` is 0: there was nothing to remove."""
    with np.errstate(divide="ignore", invalid="ignore"):
        result = np.where(np.asarray(whole) == 0, np.nan, np.divide(part, whole))
    return result if isinstance(part, np.ndarray) else float(result)  # type: ignore
