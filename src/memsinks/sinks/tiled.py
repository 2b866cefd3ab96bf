"""The tiled path of a sink layer: plain matrix products over tiles of (token, block) pairs. For CPUs.

A tile is one block and some tokens that open it. Long runs of a document are cut into a tile for each block they open: a
slice of the tokens, so nothing is copied. Short runs would give too many small products; then a tile is a block with
tokens that open it, which are copied together. Every pair is in one tile, tiles follow each other in a fixed order, so the
result has the same bits on every run.

Hidden values are [tokens of all runs * most, block_size], tile after tile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from memsinks.sinks.gradient import untouched_zeros
from memsinks.sinks.plan import Runs

LONG = 2.0
"""A run is long from so many times the block size on (in tokens, on average over the runs of a call). Where the two ways
cost the same in benchmarks/sink_layer.py."""
MOST = 512
"""Tokens that are copied together at most: such a copy, its product and the block stay in a core's cache."""


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


class _Tiles(NamedTuple):
    """The tiles of a plan: each is a block, the tokens that open it here, and so many rows of hidden values.

    Calls over thousands of small tiles cost as much as their products, so what can be cut for all tiles is cut in one call.

    tokens: each tile's tokens: the start and end of a long run, the same object for all its tiles; or a list of tokens.
    blocks: each tile's block. sizes: each tile's number of tokens.
    """

    tokens: Sequence[tuple[int, int] | Tensor]
    blocks: Sequence[int]
    sizes: Sequence[int]

    def take(self, x: Tensor) -> Iterator[Tensor]:
        """For each tile the rows of its tokens: a view where it is a run, otherwise a copy."""
        run, part = None, x
        for tokens in self.tokens:
            if isinstance(tokens, Tensor):
                yield x.index_select(0, tokens)
            else:
                if tokens is not run:
                    run, part = tokens, x[tokens[0] : tokens[1]]
                yield part

    def rows(self, hidden: Tensor) -> Sequence[Tensor]:
        """For each tile its rows of the hidden values, views."""
        return hidden.split([*self.sizes, len(hidden) - sum(self.sizes)])

    def weights(self, weight: Tensor) -> list[Tensor]:
        """For each tile the weight of its block, views."""
        known = {block: weight[block] for block in set(self.blocks)}
        return [known[block] for block in self.blocks]

    def first(self) -> list[bool]:
        """For each tile whether it is the first of its block."""
        places = {block: tile for tile, block in reversed(list(enumerate(self.blocks)))}
        return [places[block] == tile for tile, block in enumerate(self.blocks)]

    def room(self, like: Tensor, rows: int, size: int) -> Tensor:
        """Where the hidden values go, [rows, size]; rows of no tile are zero."""
        hidden = like.new_empty(rows, size)
        hidden[sum(self.sizes) :] = 0
        return hidden

    def sums(self, like: Tensor, tokens: int, products: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]]) -> Tensor:
        """For each token the sum of left @ right over its tiles and over `products`, which have one of each a tile.

        Returns:
            [tokens, width of `like`].
        """
        total = like.new_zeros(tokens, like.shape[-1])
        if self.tokens and isinstance(self.tokens[0], Tensor):
            for tile, own in enumerate(self.tokens):
                part = torch.mm(products[0][0][tile], products[0][1][tile])
                for left, right in products[1:]:
                    part.addmm_(left[tile], right[tile])
                total.index_add_(0, own, part)  # type: ignore[arg-type]
            return total
        for tile, part in enumerate(self.take(total)):
            for left, right in products:
                part.addmm_(left[tile], right[tile])
        return total


def _tiles(spans: Tensor, blocks: Tensor, pool: int, size: int) -> _Tiles:
    """The tiles of a plan; `pool` is the number of blocks, `size` the neurons in each."""
    lengths = spans[:, 1] - spans[:, 0]
    if int(lengths.sum()) >= LONG * size * int((lengths > 0).sum()):
        runs = [
            ((start, end), block)
            for (start, end), opened in zip(map(tuple, spans.tolist()), blocks.tolist(), strict=True)
            for block in opened
            if block < pool and start < end
        ]
        return _Tiles([run for run, _ in runs], [block for _, block in runs], [end - start for (start, end), _ in runs])
    flat = blocks.flatten()
    order = flat.argsort(stable=True)
    run = order // blocks.shape[1]
    pairs = torch.zeros(pool + 1, dtype=torch.int64).index_add_(0, flat, lengths.repeat_interleave(blocks.shape[1]))
    length = lengths[run]
    token = torch.repeat_interleave(spans[run, 0] - length.cumsum(0) + length, length)
    token += torch.arange(len(token))
    parts = [
        (block, min(MOST, count - start))
        for block, count in enumerate(pairs[:pool].tolist())
        for start in range(0, count, MOST)
    ]
    sizes = [size for _, size in parts]
    return _Tiles(token[: sum(sizes)].split(sizes), [block for block, _ in parts], sizes)


def _gradient_of(weight: Tensor) -> Tensor:
    """Zeros to sum the gradient of a weight in; the sum over many tiles needs more digits than 16 bits have."""
    return untouched_zeros(weight, torch.float64 if weight.dtype == torch.float64 else torch.float32)


def _add_gradient(total: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    """Add left^T @ right, in the dtype of `total`, zeros if it is the `first`: then they are not read."""
    if total.dtype != left.dtype:
        total += left.t() @ right
    elif first:
        torch.mm(left.t(), right, out=total)
    else:
        total.addmm_(left.t(), right)


def _scaled(parts: Sequence[Tensor], tiles: _Tiles, scale: Tensor | None) -> Sequence[Tensor]:
    """Each tile's rows times the factors of its tokens."""
    if scale is None:
        return parts
    return [rows * own[:, None].to(rows.dtype) for rows, own in zip(parts, tiles.take(scale), strict=False)]


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
    tiles = _tiles(spans, blocks, pool, size)
    hidden = [tiles.room(x, tokens * blocks.shape[1], size) for _ in weights]
    turned = [tiles.weights(weight.transpose(1, 2)) for weight in weights]
    into = [tiles.rows(part) for part in hidden]
    for tile, own in enumerate(tiles.take(x)):
        for weight, rows in zip(turned, into, strict=True):
            torch.mm(own, weight[tile], out=rows[tile])
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
    tiles, into = _tiles(spans, blocks, pool, size), [_gradient_of(weight) for weight in weights]
    back = [tiles.rows(hidden) for hidden in grads]
    into_x = tiles.sums(x, len(x), [(rows, tiles.weights(weight)) for rows, weight in zip(back, weights, strict=True)])
    totals, first = [tiles.weights(total) for total in into], tiles.first()
    scaled = [_scaled(rows, tiles, scale) for rows in back]
    for tile, own in enumerate(tiles.take(x)):
        for rows, total in zip(scaled, totals, strict=True):
            _add_gradient(total[tile], rows[tile], own, first[tile])
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
    pool, size, _ = down.shape
    tiles = _tiles(spans, blocks, pool, size)
    return tiles.sums(down, tokens, [(tiles.rows(hidden.contiguous()), tiles.weights(down))])


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
    tiles, into = _tiles(spans, blocks, pool, size), _gradient_of(down)
    into_hidden = tiles.room(hidden, *hidden.shape)
    back, turned = tiles.rows(into_hidden), tiles.weights(down.transpose(1, 2))
    scaled, totals, first = _scaled(tiles.rows(hidden), tiles, scale), tiles.weights(into), tiles.first()
    for tile, own in enumerate(tiles.take(grad)):
        torch.mm(own, turned[tile], out=back[tile])
        _add_gradient(totals[tile], scaled[tile], own, first[tile])
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
