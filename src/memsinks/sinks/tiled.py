"""The tiled path of a sink layer: plain matrix products over tiles of (token, block) pairs. For CPUs.

A tile is one block and some tokens that open it. Long runs of a document are cut into a tile for each block they open: a
slice of the tokens, so nothing is copied. Short runs would give too many small products; then a tile is a block with all
tokens that open it, which are copied together. Every pair is in one tile, tiles follow each other in a fixed order, so the
result has the same bits on every run.

Hidden values are [tokens of all runs * most, block_size], tile after tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from memsinks.sinks.plan import Runs

LONG = 2.0
"""A run is long from so many times the block size on (in tokens, on average over the runs of a call). Where the two ways
cost the same in benchmarks/sink_layer.py."""


def tiled(
    x: Tensor,
    up: Tensor,
    gate: Tensor | None,
    down: Tensor,
    act: Callable[[Tensor], Tensor],
    plan: Runs,
    scale: Tensor | None,
) -> Tensor:
    """See `kernels.sink_forward`."""
    hidden, opened = tiled_into(x, up, gate, plan.spans, plan.blocks, plan.tokens, scale)
    hidden = act(hidden) if gate is None else act(opened) * hidden
    return tiled_out(hidden, down, plan.spans, plan.blocks, len(x), scale)


class _Tile(NamedTuple):
    """A block, the tokens that open it here, and where its hidden values stand."""

    tokens: slice | Tensor
    rows: slice
    block: int

    def take(self, x: Tensor) -> Tensor:
        """The rows of the tile's tokens."""
        return x[self.tokens] if isinstance(self.tokens, slice) else x.index_select(0, self.tokens)

    def add(self, total: Tensor, left: Sequence[Tensor], right: Sequence[Tensor]) -> None:
        """Add the rows of the sum of left @ right to the rows of the tile's tokens."""
        if isinstance(self.tokens, slice):
            part = total[self.tokens].addmm_(left[0], right[0])
        else:
            part = torch.mm(left[0], right[0])
        for rows, weight in zip(left[1:], right[1:], strict=True):
            part.addmm_(rows, weight)
        if not isinstance(self.tokens, slice):
            total.index_add_(0, self.tokens, part)


def _tiles(spans: Tensor, blocks: Tensor, pool: int, size: int) -> Iterator[_Tile]:
    """The tiles of a plan; `pool` is the number of blocks, `size` the neurons in each."""
    lengths = spans[:, 1] - spans[:, 0]
    done = 0
    if int(lengths.sum()) >= LONG * size * int((lengths > 0).sum()):
        for (start, end), opened in zip(spans.tolist(), blocks.tolist(), strict=True):
            for block in opened:
                if block < pool and start < end:
                    yield _Tile(slice(start, end), slice(done, done + end - start), block)
                    done += end - start
        return
    most = blocks.shape[1]
    run = torch.repeat_interleave(lengths)
    token = torch.arange(len(run)) - (lengths.cumsum(0) - lengths - spans[:, 0])[run]
    flat = blocks[run].flatten()
    order = flat.argsort(stable=True)
    ends = torch.searchsorted(flat[order], torch.arange(pool), right=True).tolist()
    token = token[order // most]
    for block, end in enumerate(ends):
        if end > done:
            yield _Tile(token[done:end], slice(done, end), block)
        done = end


def _gradient_of(weight: Tensor) -> Tensor:
    """Zeros to sum the gradient of a weight in; the sum over many tiles needs more digits than 16 bits have.

    numpy asks the operating system for zeroed pages and does not touch them, so blocks that stay closed cost no memory.
    """
    return torch.from_numpy(np.zeros(weight.shape, np.float64 if weight.dtype == torch.float64 else np.float32))


def _add_gradient(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left^T @ right, in the dtype of `total`."""
    if total.dtype == left.dtype:
        total.addmm_(left.t(), right)
    else:
        total += left.t() @ right


def _scaled(rows: Tensor, tile: _Tile, scale: Tensor | None) -> Tensor:
    return rows if scale is None else rows * tile.take(scale)[:, None].to(rows.dtype)


@torch.library.custom_op("memsinks::tiled_into", mutates_args=())
def tiled_into(
    x: Tensor, up: Tensor, gate: Tensor | None, spans: Tensor, blocks: Tensor, tokens: int, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What the open blocks of each token make of it, before the activation.

    Args:
        x: [all tokens, d].
        up, gate: [blocks, block_size, d].
        spans, blocks, tokens: see `Runs`.
        scale: [all tokens] factor of each token's weight gradient, or None.

    Returns:
        up x and gate x (empty without gate), [tokens * most, block_size], rows of no tile zero.
    """
    pool, size, _ = up.shape
    weights = [weight for weight in (up, gate) if weight is not None]
    hidden = [x.new_zeros(tokens * blocks.shape[1], size) for _ in weights]
    for tile in _tiles(spans, blocks, pool, size):
        own = tile.take(x)
        for weight, into in zip(weights, hidden, strict=True):
            torch.mm(own, weight[tile.block].t(), out=into[tile.rows])
    return hidden[0], hidden[1] if gate is not None else x.new_zeros(0)


@tiled_into.register_fake
def _(
    x: Tensor, up: Tensor, gate: Tensor | None, _spans: Tensor, blocks: Tensor, tokens: int, _scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    shape = tokens * blocks.shape[1], up.shape[1]
    return x.new_empty(shape), x.new_empty(0 if gate is None else shape)


@torch.library.custom_op("memsinks::tiled_into_backward", mutates_args=())
def tiled_into_backward(
    grad: Tensor,
    grad_gate: Tensor,
    x: Tensor,
    up: Tensor,
    gate: Tensor | None,
    spans: Tensor,
    blocks: Tensor,
    scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `tiled_into` to x, up and gate (empty without gate)."""
    pool, size, _ = up.shape
    weights = [weight for weight in (up, gate) if weight is not None]
    grads = [grad.contiguous(), grad_gate.contiguous()][: len(weights)]
    into_x, into = torch.zeros_like(x), [_gradient_of(weight) for weight in weights]
    for tile in _tiles(spans, blocks, pool, size):
        own, back = tile.take(x), [hidden[tile.rows] for hidden in grads]
        tile.add(into_x, back, [weight[tile.block] for weight in weights])
        for rows, total in zip(back, into, strict=True):
            _add_gradient(total[tile.block], _scaled(rows, tile, scale), own)
    made = [total.to(up.dtype) for total in into]
    return into_x, made[0], made[1] if gate is not None else x.new_zeros(0)


@tiled_into_backward.register_fake
def _(
    _grad: Tensor,
    _grad_gate: Tensor,
    x: Tensor,
    up: Tensor,
    gate: Tensor | None,
    _spans: Tensor,
    _blocks: Tensor,
    _scale: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(up), x.new_empty(0) if gate is None else torch.empty_like(gate)


def _save_into(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, up, gate, spans, blocks, _, scale = inputs
    ctx.save_for_backward(x, up, gate, spans, blocks, scale)


def _back_into(ctx: Any, grad: Tensor, grad_gate: Tensor) -> tuple[Tensor | None, ...]:
    x, up, gate, spans, blocks, scale = ctx.saved_tensors
    into_x, into_up, into_gate = tiled_into_backward(grad, grad_gate, x, up, gate, spans, blocks, scale)
    return into_x, into_up, None if gate is None else into_gate, None, None, None, None


tiled_into.register_autograd(_back_into, setup_context=_save_into)


@torch.library.custom_op("memsinks::tiled_out", mutates_args=())
def tiled_out(hidden: Tensor, down: Tensor, spans: Tensor, blocks: Tensor, tokens: int, scale: Tensor | None) -> Tensor:
    """What the open blocks of each token add to the output.

    Args:
        hidden: [tokens of all runs * most, block_size].
        down: [blocks, block_size, d].
        spans, blocks: see `Runs`.
        tokens: all tokens, closed ones included.
        scale: [tokens] factor of each token's weight gradient, or None.

    Returns:
        [tokens, d].
    """
    pool, size, width = down.shape
    out, hidden = hidden.new_zeros(tokens, width), hidden.contiguous()
    for tile in _tiles(spans, blocks, pool, size):
        tile.add(out, [hidden[tile.rows]], [down[tile.block]])
    return out


@tiled_out.register_fake
def _(hidden: Tensor, down: Tensor, _spans: Tensor, _blocks: Tensor, tokens: int, _scale: Tensor | None) -> Tensor:
    return hidden.new_empty(tokens, down.shape[2])


@torch.library.custom_op("memsinks::tiled_out_backward", mutates_args=())
def tiled_out_backward(
    grad: Tensor, hidden: Tensor, down: Tensor, spans: Tensor, blocks: Tensor, scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of `tiled_out` to hidden and down."""
    pool, size, _ = down.shape
    hidden = hidden.contiguous()
    into_hidden, into = torch.zeros_like(hidden), _gradient_of(down)
    for tile in _tiles(spans, blocks, pool, size):
        own = tile.take(grad)
        torch.mm(own, down[tile.block].t(), out=into_hidden[tile.rows])
        _add_gradient(into[tile.block], _scaled(hidden[tile.rows], tile, scale), own)
    return into_hidden, into.to(down.dtype)


@tiled_out_backward.register_fake
def _(
    _grad: Tensor, hidden: Tensor, down: Tensor, _spans: Tensor, _blocks: Tensor, _scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(hidden), torch.empty_like(down)


def _save_out(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    hidden, down, spans, blocks, _, scale = inputs
    ctx.save_for_backward(hidden, down, spans, blocks, scale)


def _back_out(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *tiled_out_backward(grad, *ctx.saved_tensors), None, None, None, None


tiled_out.register_autograd(_back_out, setup_context=_save_out)
