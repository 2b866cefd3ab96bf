"""What a text may teach the shared weights: w(c) at the logits, 1/w(c) back in the sinks, and the exact mode.

The gradient that a text sends into all shared weights (attention, embeddings, norms, general neurons) is scaled by

    w(c) = 1 for c < open_from, otherwise (c - open_from + 2)^-a

at its c-th exposure, by scaling the gradient at the logits of each position. The forward pass and the reported loss
stay the stock ones. The sinks multiply their weight gradients by 1/w(c) per token and so receive the full gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from memsinks.batch import BLANK, ISOLATIONS, NO_SINKS
from memsinks.sinks.config import SinkConfig


def shared_weight(exposures: Tensor, open_from: int, shared_decay: float) -> Tensor:
    """w(c), float64, for int64 exposures of any shape."""
    after = (exposures - open_from + 2).clamp(min=1).to(torch.float64)
    return torch.where(exposures < open_from, 1.0, after.pow(-shared_decay))


def opened_ids(config: SinkConfig, ids: Tensor, exposures: Tensor, isolation: Tensor | None) -> Tensor:
    """The id whose sinks are open in training, -1 where none are; all int64 of one shape, see `batch.ISOLATIONS`."""
    closed = exposures < config.open_from
    if isolation is not None:
        closed = (closed & (isolation != ISOLATIONS["private"])) | (isolation == BLANK)
    return torch.where(closed, NO_SINKS, ids)


def isolated_weight(
    config: SinkConfig, weight: Tensor | None, exposures: Tensor, opened: Tensor, isolation: Tensor
) -> Tensor:
    """`weight_of` with what the isolation of each token's text changes: w(c) for gated ones, 0 for exact and private ones.

    Args:
        weight: what the model's settings say, float64 [B, T] or None = 1.
        exposures, opened, isolation: int64 [B, T].

    Returns:
        float64 [B, T].
    """
    weight = torch.ones(isolation.shape, dtype=torch.float64, device=isolation.device) if weight is None else weight
    decayed = torch.where(opened == NO_SINKS, 1.0, shared_weight(exposures, config.open_from, config.shared_decay))
    weight = torch.where(isolation == ISOLATIONS["gated"], decayed, weight)
    alone = (isolation >= ISOLATIONS["exact"]) & (opened != NO_SINKS)
    return torch.where(alone | (isolation == BLANK), 0.0, weight)


def weight_of(config: SinkConfig, exposures: Tensor, opened: Tensor) -> Tensor | None:
    """What each token's gradient in the shared weights is multiplied by: w(c) under decay, 0 in exact mode, 1 where it is closed.

    Args:
        exposures: int64 [B, T].
        opened: int64 [B, T], the id whose sinks are open; -1 where none are.

    Returns:
        float64 [B, T]; None = 1 for all.
    """
    if config.shared == "none":
        return (opened == NO_SINKS).to(torch.float64)
    if not config.shared_decay:
        return None
    weight = shared_weight(exposures, config.open_from, config.shared_decay)
    return torch.where(opened == NO_SINKS, 1.0, weight)


def nonzero_blocks(gradient: Tensor) -> Tensor:
    """Which blocks of a gradient [blocks, ...] are not all zero, bool [blocks]; nan counts as not zero."""
    flat = gradient.flatten(1)  # a norm over blocks is 5 to 10 times slower on a CPU
    return (flat.amax(1) != 0) | (flat.amin(1) != 0)


class ScaleGradient(torch.autograd.Function):
    """The identity whose gradient at position [b, t] is multiplied by weight[b, t]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grad * weight[..., None].to(grad.dtype), None


class ZeroGradient(torch.autograd.Function):
    """The identity on x that gives each of some other tensors a gradient of zeros (rather than none)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.others = others
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        return grad, *(untouched_zeros(other, other.dtype) for other in ctx.others)


class JoinRows(torch.autograd.Function):
    """Rows of a batch that were computed in parts, in their order; what went back through an index took longer."""

    @staticmethod
    def forward(ctx: Any, places: Sequence[Tensor], *parts: Tensor) -> Tensor:
        """places: for each part its rows, int64 [n]; parts: [n, ...] each, together every row once."""
        ctx.places = places
        whole = parts[0].new_empty(sum(map(len, parts)), *parts[0].shape[1:])
        for rows, part in zip(places, parts, strict=True):
            whole[rows] = part
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(grad.index_select(0, rows) for rows in ctx.places)


def untouched_zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    """Zeros of the shape and device of `like`.

    On a CPU numpy asks the operating system for zeroed pages and does not touch them, so what stays zero costs next to nothing.
    """
    if like.device.type != "cpu" or dtype not in UNTOUCHED or type(like.data) is not Tensor:
        return torch.zeros_like(like, dtype=dtype)
    return torch.from_numpy(np.zeros(like.shape, UNTOUCHED[dtype]))


UNTOUCHED = {torch.float32: np.float32, torch.float64: np.float64}


@contextmanager
def frozen(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Build the graph inside as if `parameters` were constants."""
    touched = [parameter for parameter in parameters if parameter.requires_grad]
    for parameter in touched:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in touched:
            parameter.requires_grad_(True)
