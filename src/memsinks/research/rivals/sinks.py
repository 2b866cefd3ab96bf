"""Memorization sinks: as published, ours, and with ids that mean nothing."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from memsinks.research.rivals.method import Batch, TrainingMethod, settling, unchanged
from memsinks.sinks.config import SinkConfig
from memsinks.sinks.routing import splitmix64


def published(
    *, neurons: int, active: int, sink_lr_factor: float = 1.0, extra_neurons: int = 0, id_noise: float = 0.0
) -> TrainingMethod:
    """As the paper has it: each neuron open with its probability, one mask for all layers, from the first exposure on.

    With `id_noise`, a repeated document comes under a fresh id with that probability at each encounter (Fig. 5c).
    Source: Ghosal, Maini, Raghunathan, ICML 2025, section 5. Exported with each of the three rescales.
    """
    sinks = SinkConfig(
        neurons=neurons, active=active, routing="bernoulli", per_layer=False, open_from=1, shared_decay=0.0
    )

    def change(batch: Batch) -> Batch:
        fresh = _fresh_ids(batch)
        unlucky = (splitmix64(fresh) >> 11 & (2**53 - 1)) < id_noise * 2**53
        return {**batch, "document_ids": fresh.where(unlucky & batch["repeated"], batch["document_ids"])}

    return TrainingMethod(
        sinks=sinks,
        sink_lr_factor=sink_lr_factor,
        extra_neurons=extra_neurons,
        rescales=("expected", "released"),
        change=change if id_noise else unchanged,
    )


def _fresh_ids(batch: Batch) -> Tensor:
    """Another id for each document and exposure, int64 [rows, length]; -1 stays."""
    mixed = splitmix64(batch["document_ids"] ^ splitmix64(batch["exposures"])) & (2**63 - 1)
    return mixed.where(batch["document_ids"] >= 0, batch["document_ids"])


def gated(
    *,
    sink_lr_factor: float = 3.0,
    sinks_first: int = 0,
    sinks_first_until: float = 0.0,
    sinks_last: int = 0,
    fresh: bool = False,
    extra_neurons: int = 0,
    settle_lr: float = 0.0,
    settle_passes: int = 8,
    **settings: Any,
) -> TrainingMethod:
    """Ours: a text's sinks open from its second exposure on, and what it teaches the shared weights decays (docs/method.md).

    `settings` are those of `SinkConfig`; ``shared="none"`` is the exact mode. `sinks_first` to `fresh`: see `TrainingMethod`.
    With `settle_lr` what is left is leveled.
    """
    return TrainingMethod(
        sinks=SinkConfig(**settings),
        sink_lr_factor=sink_lr_factor,
        extra_neurons=extra_neurons,
        sinks_first=int(sinks_first),
        sinks_first_until=sinks_first_until,
        sinks_last=sinks_last,
        fresh=fresh,
        settle=settling(settle_lr, settle_passes),
    )


def untied(*, neurons: int, active: int, sink_lr_factor: float = 1.0, extra_neurons: int = 0) -> TrainingMethod:
    """As published, but every exposure of a document opens other sinks: dropout of the same density, tied to nothing.

    The control that shows whether identity matters.
    """

    def change(batch: Batch) -> Batch:
        return {**batch, "document_ids": _fresh_ids(batch)}

    base = published(neurons=neurons, active=active, sink_lr_factor=sink_lr_factor, extra_neurons=extra_neurons)
    return replace(base, change=change, rescales=())
