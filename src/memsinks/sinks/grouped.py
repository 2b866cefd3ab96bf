"""The grouped path of a sink layer: (token, block) pairs sorted by block, one `grouped_mm` a projection. For GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, pad

from memsinks.sinks.plan import Pairs

ALIGNED = 8
"""`grouped_mm` takes only rows of a multiple of 16 bytes: 8 numbers in bf16."""


def grouped(
    x: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    act: Callable[[Tensor], Tensor],
    plan: Pairs,
    scale: Tensor | None,
) -> Tensor:
    """See `kernels.sink_forward`."""
    token, ends, place, open_token = plan
    row_scale = None if scale is None else scale[token]
    width = x.shape[1]
    if spare := -width % ALIGNED:
        x, up, down = pad(x, (0, spare)), pad(up, (0, spare)), pad(down, (0, spare))
        gate = None if gate is None else pad(gate, (0, spare))
    rows = Spread.apply(x, token, place, open_token)
    hidden = act(grouped_linear(rows, up if gate is None else gate, ends, row_scale, True))
    if gate is not None:
        hidden = hidden * grouped_linear(rows, up, ends, row_scale, True)
    out = Collect.apply(grouped_linear(hidden, down, ends, row_scale, False), token, place, open_token, len(x))
    return out[:, :width]


def _spread(x: Tensor, token: Tensor) -> Tensor:
    return x.index_select(0, token)


def _collect(rows: Tensor, place: Tensor, open_token: Tensor, tokens: int) -> Tensor:
    """Sum the rows of each token in a fixed order: the same bits on every run and device, unlike index_add."""
    padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
    total = padded[place[:, 0]]
    for column in range(1, place.shape[1]):
        total = total + padded[place[:, column]]
    if len(open_token) == tokens:  # every token stands in the list, in order (always so when compiled)
        return total
    return rows.new_zeros(tokens, rows.shape[1]).index_copy(0, open_token, total)


class Spread(torch.autograd.Function):
    """x [tokens, d] -> the row of each (token, block) pair [pairs, d]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, place: Tensor, open_token: Tensor) -> Tensor:
        ctx.save_for_backward(place, open_token)
        ctx.tokens = len(x)
        return _spread(x, token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        place, open_token = ctx.saved_tensors
        return _collect(grad, place, open_token, ctx.tokens), None, None, None


class Collect(torch.autograd.Function):
    """The rows of the pairs [pairs, d] -> their sum per token [tokens, d]."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, token: Tensor, place: Tensor, open_token: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(token)
        return _collect(rows, place, open_token, tokens)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        (token,) = ctx.saved_tensors
        return _spread(grad.contiguous(), token), None, None, None, None


def _zero_unused(rows: Tensor, ends: Tensor) -> Tensor:
    """`grouped_mm` never writes the rows past the last group: make them zero."""
    used = torch.arange(len(rows), device=rows.device) < ends[-1]
    return torch.where(used[:, None], rows, 0)


@torch.library.custom_op("memsinks::grouped_linear", mutates_args=())
def grouped_linear(
    x: Tensor,
    weight: Tensor,
    ends: Tensor,
    scale: Tensor | None,
    transposed: bool,
) -> Tensor:
    """Each row times the weight of its block.

    Args:
        x: [pairs, n], sorted by block.
        weight: [blocks, m, n] if `transposed` (x @ weight^T), otherwise [blocks, n, m] (x @ weight).
        ends: int32 [blocks], the rows of block b end at ``ends[b]``; rows past ``ends[-1]`` give zero.
        scale: [pairs] factor of each row's weight gradient, or None.

    Returns:
        [pairs, m].
    """
    if not len(x):
        return x.new_zeros(0, weight.shape[1 if transposed else 2])
    return _zero_unused(grouped_mm(x, weight.transpose(1, 2) if transposed else weight, offs=ends), ends)


@grouped_linear.register_fake
def _(x: Tensor, weight: Tensor, _ends: Tensor, _scale: Tensor | None, transposed: bool) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1 if transposed else 2])


@torch.library.custom_op("memsinks::grouped_linear_backward", mutates_args=())
def grouped_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, ends: Tensor, scale: Tensor | None, transposed: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of `grouped_linear` to x and weight."""
    if not len(x):
        return torch.zeros_like(x), torch.zeros_like(weight)
    grad = grad.contiguous()
    into_x = _zero_unused(grouped_mm(grad, weight if transposed else weight.transpose(1, 2), offs=ends), ends)
    scaled = _zero_unused(grad if scale is None else grad * scale[:, None].to(grad.dtype), ends)
    left, right = (scaled, x) if transposed else (x, scaled)
    into_weight = grouped_mm(left.contiguous().t(), right.contiguous(), offs=ends)
    return into_x, into_weight


@grouped_linear_backward.register_fake
def _(
    _grad: Tensor, x: Tensor, weight: Tensor, _ends: Tensor, _scale: Tensor | None, _transposed: bool
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ends, scale, ctx.transposed = inputs
    ctx.save_for_backward(x, weight, ends, scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    into_x, into_weight = grouped_linear_backward(grad, *ctx.saved_tensors, ctx.transposed)
    return into_x, into_weight, None, None, None


grouped_linear.register_autograd(_backward, setup_context=_save)
