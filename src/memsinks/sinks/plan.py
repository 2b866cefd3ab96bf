"""The routing plan of one forward: what each token opens in each layer, in the form its compute path takes."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from memsinks.batch import NO_SINKS
from memsinks.sinks.config import SinkConfig
from memsinks.sinks.table import EMPTY_TABLE, AssignmentTable, open_blocks_of_layers, open_mask


class Mask(NamedTuple):
    """What one layer opens, for the masked path: bool [tokens, blocks]."""

    mask: Tensor


class Pairs(NamedTuple):
    """What one layer opens, for the grouped path: a ragged list of (token, block) pairs sorted by block.

    token: int64 [pairs], index into the flattened tokens.
    ends: int32 [blocks], the pairs of block b end at ``ends[b]``; pairs past ``ends[-1]`` open nothing (compiled plans
        have a fixed number of pairs).
    place: int64 [open_tokens, most], for each token that opens something the places of its pairs; ``pairs`` = none.
    open_token: int64 [open_tokens].
    """

    token: Tensor
    ends: Tensor
    place: Tensor
    open_token: Tensor


class Runs(NamedTuple):
    """What one layer opens, for the tiled path: runs of neighboring tokens that open the same blocks.

    spans: int64 [runs, 2], the tokens ``spans[i, 0]`` up to ``spans[i, 1]``; in order, closed runs left out (compiled plans
        keep them, and have as many runs as tokens, the last ones empty).
    blocks: int64 [runs, most], the number of blocks in places that open nothing, which come last.
    tokens: in all spans.
    """

    spans: Tensor
    blocks: Tensor
    tokens: int


class Closed(NamedTuple):
    """What one layer opens where no token of a forward opens anything: nothing is computed.

    zero_gradient: the sinks get a gradient of zeros, rather than none.
    """

    zero_gradient: bool = True


LayerPlan = Mask | Pairs | Runs | Closed
ComputePath = Literal["masked", "grouped", "tiled"]


class RoutingPlan(NamedTuple):
    """The plan of one forward: a `LayerPlan` a sink layer and, under decay, 1/w(c) of each token, float64 [tokens]."""

    layers: tuple[LayerPlan, ...]
    weight_scale: Tensor | None


def _united(ids: Tensor, config: SinkConfig, layers: tuple[int, ...], table: AssignmentTable) -> Tensor:
    """The blocks that each row of `ids` [n, union] opens in each layer, each once; [layers, n, most], see `open_blocks`."""
    count, union = ids.shape
    blocks = open_blocks_of_layers(ids.reshape(-1), config, layers, table)
    blocks = blocks.view(len(layers), count, union * blocks.shape[2])
    if union > 1:
        blocks = blocks.sort(2).values
        again = torch.nn.functional.pad(blocks[..., 1:] == blocks[..., :-1], (1, 0))
        blocks = torch.where(again, config.blocks, blocks).sort(2).values
    return blocks


def _mask(ids: Tensor, run: Tensor | None, config: SinkConfig, layer: int, table: AssignmentTable) -> Mask:
    count, union = ids.shape
    mask = open_mask(ids.reshape(-1), config, layer, table).view(count, union, -1).any(1)
    return Mask(mask if run is None else mask[run])


def _pairs(blocks: Tensor, ids: Tensor, run: Tensor | None, config: SinkConfig) -> Pairs:
    none = config.blocks
    tokens = len(ids) if run is None else len(run)
    compiling = torch.compiler.is_compiling()
    if compiling:
        open_token = torch.arange(tokens, device=ids.device)
    else:
        opens = (blocks < none).any(1)
        open_token = (opens if run is None else opens[run]).nonzero()[:, 0]
    rows = open_token if run is None else run[open_token]
    chosen = blocks[rows]
    flat = chosen.reshape(-1)
    order = flat.argsort(stable=True)
    ends = torch.searchsorted(flat[order], torch.arange(none, device=ids.device), right=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=ids.device)
    if not compiling:
        order = order[: int(ends[-1])]
    place = torch.where(chosen < none, place.view_as(chosen), len(order))
    token = open_token[order // chosen.shape[1]]
    return Pairs(token, ends.to(torch.int32), place, open_token)


def _starts(ids: Tensor) -> Tensor:
    """Where the runs of equal rows in `ids` [tokens, union] start, bool [tokens]."""
    return torch.nn.functional.pad((ids[1:] != ids[:-1]).any(1), (1, 0), value=True)[: len(ids)]


def _spans(ids: Tensor) -> tuple[Tensor, Tensor, int]:
    """The runs of equal rows in `ids` [tokens, union]: spans as in `Runs`, the ids of each [runs, union], tokens in all."""
    tokens, starts = len(ids), _starts(ids)
    if torch.compiler.is_compiling():
        run = starts.cumsum(0) - 1
        ends = torch.searchsorted(run, torch.arange(tokens, device=ids.device), right=True)
        spans = torch.stack([torch.nn.functional.pad(ends[:-1], (1, 0)), ends], 1)
        return spans, ids[spans[:, 0].clamp(max=tokens - 1)], tokens
    first = starts.nonzero()[:, 0]
    spans = torch.stack([first, torch.nn.functional.pad(first[1:], (0, min(1, tokens)), value=tokens)], 1)
    spans = spans[(ids[first] != NO_SINKS).any(1)]
    return spans, ids[spans[:, 0]], int((spans[:, 1] - spans[:, 0]).sum())


def plan(
    ids: Tensor,
    layers: tuple[int, ...],
    config: SinkConfig,
    table: AssignmentTable = EMPTY_TABLE,
    *,
    path: ComputePath,
    weight_scale: Tensor | None = None,
) -> RoutingPlan:
    """The routing plan of one forward.

    Args:
        ids: int64 [tokens] or [tokens, union], closed texts already -1; a token opens the blocks of all its ids.
        layers: the layers that have sinks.
        path: the compute path that the plan is for.
        weight_scale: float64 [tokens] or None, passed on.
    """
    ids = ids[:, None] if ids.dim() == 1 else ids
    different = layers if config.per_layer else (0,)
    run: Tensor | None = None
    plans: list[LayerPlan] = []
    if path == "tiled":
        spans, run_ids, tokens = _spans(ids)
        plans += [Runs(spans, blocks, tokens) for blocks in _united(run_ids, config, different, table).unbind()]
    else:
        if not torch.compiler.is_compiling():
            starts = _starts(ids)  # torch.unique of rows takes a microsecond a token
            ids, run = ids[starts], starts.cumsum(0) - 1
        if path == "masked":
            plans += [_mask(ids, run, config, layer, table) for layer in different]
        else:
            plans += [_pairs(blocks, ids, run, config) for blocks in _united(ids, config, different, table).unbind()]
    return RoutingPlan(tuple(plans if config.per_layer else plans * len(layers)), weight_scale)


def closed_plan(layers: tuple[int, ...], zero_gradient: bool) -> RoutingPlan:
    """The routing plan of a forward in which no token opens anything."""
    return RoutingPlan((Closed(zero_gradient),) * len(layers), None)
