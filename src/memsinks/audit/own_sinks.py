"""What only a model with sinks can be asked: recall with own sinks, placebo sinks, collateral of closing a document's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from ..attach import require_sinks
from ..routing import open_mask
from ..sinks import Sinks


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


@contextmanager
def documents_closed(model: nn.Module, ids: list[int]) -> Iterator[None]:
    """Within the block, the sink blocks of these documents give nothing, for any document that opens them.

    Their down rows are set to zero and put back, bit for bit, at the end.
    """
    state = require_sinks(model)
    config, wanted = state.config, torch.tensor(ids, dtype=torch.int64)
    kept: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    sinks = [module for module in model.modules() if isinstance(module, Sinks)]
    try:
        with torch.no_grad():
            for layer, module in zip(state.layers, sinks, strict=True):
                mask = open_mask(wanted, config, layer if config.per_layer else 0, state.table).any(0)
                mask = mask.to(module.down.device)
                kept.append((module.down, mask, module.down[mask].clone()))
                module.down[mask] = 0
        yield
    finally:
        with torch.no_grad():
            for down, mask, values in kept:
                down[mask] = values
