"""Document id -> open sink blocks, by integer arithmetic alone; and the routing plan of one forward.

An id is looked up in the assignment table first; an id that is not there is hashed. The hash cuts the blocks that are
not reserved into as many banks as a document opens blocks and picks one block of each bank, so a document always opens
distinct blocks. The result is the same on every device and rank, eager and compiled.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .config import FORMAT_VERSION, ConfigError, DataError, SinkConfig, refuse
from .identity import NO_SINKS

_INCREMENT, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_MASK = 2**64 - 1


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def splitmix64(x: Tensor) -> Tensor:
    """The splitmix64 hash of int64 values, as int64 bit patterns (splitmix64(0) = 0xe220a8397b1dcdaf).

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014.
    """
    x = x + _signed(_INCREMENT)
    x = (x ^ _shift(x, 30)) * _signed(_FIRST)
    x = (x ^ _shift(x, 27)) * _signed(_SECOND)
    return x ^ _shift(x, 31)


def _splitmix64_int(x: int) -> int:
    x = (x + _INCREMENT) & _MASK
    x = ((x ^ (x >> 30)) * _FIRST) & _MASK
    x = ((x ^ (x >> 27)) * _SECOND) & _MASK
    return x ^ (x >> 31)


def _keys(config: SinkConfig, layer: int, count: int) -> list[int]:
    """One hash key for each of `count` banks (or neurons) of a layer, from the seed; int64 bit patterns."""
    base = _splitmix64_int(_splitmix64_int(config.seed) ^ (layer + 1 if config.per_layer else 0))
    return [_signed(_splitmix64_int(base ^ (index + 1))) for index in range(count)]


@dataclass(frozen=True)
class AssignmentTable:
    """Ids that open listed blocks instead of hashed ones: sorted int64 `ids` [n], `offsets` [n + 1], `blocks` [m].

    Document ``ids[i]`` opens ``blocks[offsets[i]:offsets[i + 1]]`` in every layer. Empty by default; saved with the
    model.
    """

    ids: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    offsets: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    blocks: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))

    @classmethod
    def from_dict(cls, assignments: dict[int, list[int]], config: SinkConfig) -> AssignmentTable:
        """Build the table from {document id: blocks}; ConfigError on an id or a block that cannot be."""
        problems = [f"id {key} lies outside [0, 2**63)" for key in assignments if not 0 <= key < 2**63]
        problems += [
            f"id {key} is assigned blocks {sorted(blocks)}, the pool has blocks 0 to {config.blocks - 1}"
            for key, blocks in assignments.items()
            if any(not 0 <= block < config.blocks for block in blocks)
        ]
        refuse(problems, "invalid assignment table")
        ids = sorted(assignments)
        offsets, listed = [0], []
        for key in ids:
            listed += sorted(set(assignments[key]))
            offsets.append(len(listed))
        return cls(*(torch.tensor(x, dtype=torch.int64) for x in (ids, offsets, listed)))

    def __len__(self) -> int:
        return self.ids.numel()

    def to(self, device: torch.device) -> AssignmentTable:
        """The table on another device."""
        return AssignmentTable(self.ids.to(device), self.offsets.to(device), self.blocks.to(device))


EMPTY_TABLE = AssignmentTable()


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
    """What one layer opens, for the tiled path: runs of neighbouring tokens that open the same blocks.

    spans: int64 [runs, 2], the tokens ``spans[i, 0]`` up to ``spans[i, 1]``; in order, closed runs left out (compiled plans
        keep them, and have as many runs as tokens, the last ones empty).
    blocks: int64 [runs, most], the number of blocks in places that open nothing, which come last.
    tokens: in all spans.
    """

    spans: Tensor
    blocks: Tensor
    tokens: int


LayerPlan = Mask | Pairs | Runs
Path = Literal["masked", "grouped", "tiled"]


class RoutingPlan(NamedTuple):
    """The plan of one forward: a `LayerPlan` a sink layer and, under decay, 1/w(c) of each token, float64 [tokens]."""

    layers: tuple[LayerPlan, ...]
    weight_scale: Tensor | None


def open_blocks(ids: Tensor, config: SinkConfig, layer: int, table: AssignmentTable = EMPTY_TABLE) -> Tensor:
    """The blocks each id opens in a layer; not for Bernoulli routing.

    Args:
        ids: int64 [n]; -1 opens nothing.

    Returns:
        int64 [n, most]; ``config.blocks`` fills places that open nothing.
    """
    count, none = config.open_blocks, config.blocks
    keys = torch.tensor(_keys(config, layer, count), dtype=torch.int64, device=ids.device)
    start = torch.tensor([bank * config.hashed_blocks // count for bank in range(count + 1)], device=ids.device)
    size = start[1:] - start[:-1]
    blocks = start[:-1] + _shift(splitmix64(ids[:, None] ^ keys), 1) % size
    if config.hashed_blocks % count:  # banks of two sizes: turn them, or a block of a small bank opens more often
        turn = torch.tensor(_keys(config, layer, count + 1)[count:], dtype=torch.int64, device=ids.device)
        blocks = (blocks + _shift(splitmix64(ids[:, None] ^ turn), 1) % config.hashed_blocks) % config.hashed_blocks
    if len(table):
        table = table.to(ids.device)
        most = int((table.offsets[1:] - table.offsets[:-1]).max())
        row = torch.searchsorted(table.ids, ids).clamp(max=len(table) - 1)
        assigned = table.ids[row] == ids
        place = table.offsets[row, None] + torch.arange(most, device=ids.device)
        listed = place < table.offsets[row + 1, None]
        padded = torch.cat([table.blocks, table.blocks.new_full((1,), none)])
        own = torch.where(listed, padded[place.clamp(max=len(table.blocks))], none)
        wide = max(count, most)
        blocks, own = (torch.nn.functional.pad(x, (0, wide - x.shape[1]), value=none) for x in (blocks, own))
        blocks = torch.where(assigned[:, None], own, blocks)
    return torch.where(ids[:, None] == NO_SINKS, none, blocks)


def open_mask(ids: Tensor, config: SinkConfig, layer: int, table: AssignmentTable = EMPTY_TABLE) -> Tensor:
    """The blocks each id opens in a layer, as a mask, for every routing.

    Args:
        ids: int64 [n]; -1 opens nothing.

    Returns:
        bool [n, blocks].
    """
    if config.routing == "bernoulli":
        keys = torch.tensor(_keys(config, layer, config.hashed_blocks), dtype=torch.int64, device=ids.device)
        threshold = round(config.active / config.neurons * 2**53)
        mask = _shift(splitmix64(ids[:, None] ^ keys), 11) < threshold
        mask = mask & (ids[:, None] != NO_SINKS)
        if len(table):
            raise ConfigError('an assignment table needs routing "blocks" or "exact"; this config has "bernoulli"')
        return mask
    blocks = open_blocks(ids, config, layer, table)
    mask = torch.zeros(len(ids), config.blocks + 1, dtype=torch.bool, device=ids.device)
    return mask.scatter(1, blocks, True)[:, : config.blocks]


def _united(ids: Tensor, config: SinkConfig, layer: int, table: AssignmentTable) -> Tensor:
    """The blocks that each row of `ids` [n, union] opens, each once, as `open_blocks` gives them."""
    count, union = ids.shape
    blocks = open_blocks(ids.reshape(-1), config, layer, table)
    blocks = blocks.view(count, union * blocks.shape[1])
    if union > 1:
        blocks = blocks.sort(1).values
        again = torch.nn.functional.pad(blocks[:, 1:] == blocks[:, :-1], (1, 0))
        blocks = torch.where(again, config.blocks, blocks).sort(1).values
    return blocks


def _mask(ids: Tensor, document: Tensor | None, config: SinkConfig, layer: int, table: AssignmentTable) -> Mask:
    count, union = ids.shape
    mask = open_mask(ids.reshape(-1), config, layer, table).view(count, union, -1).any(1)
    return Mask(mask if document is None else mask[document])


def _pairs(ids: Tensor, document: Tensor | None, config: SinkConfig, layer: int, table: AssignmentTable) -> Pairs:
    none = config.blocks
    blocks = _united(ids, config, layer, table)
    tokens = len(ids) if document is None else len(document)
    compiling = torch.compiler.is_compiling()
    if compiling:
        open_token = torch.arange(tokens, device=ids.device)
    else:
        opens = (blocks < none).any(1)
        open_token = (opens if document is None else opens[document]).nonzero()[:, 0]
    rows = open_token if document is None else document[open_token]
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


def _spans(ids: Tensor) -> tuple[Tensor, Tensor, int]:
    """The runs of equal rows in `ids` [tokens, union]: spans as in `Runs`, the ids of each [runs, union], tokens in all."""
    tokens = len(ids)
    starts = torch.nn.functional.pad((ids[1:] != ids[:-1]).any(1), (1, 0), value=True)[:tokens]
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
    path: Path,
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
    if path == "tiled":
        spans, run_ids, tokens = _spans(ids)

        def plan_layer(layer: int) -> LayerPlan:
            return Runs(spans, _united(run_ids, config, layer, table), tokens)
    else:
        document = None
        if not torch.compiler.is_compiling():
            ids, document = torch.unique(ids, dim=0, return_inverse=True)
        make = _mask if path == "masked" else _pairs

        def plan_layer(layer: int) -> LayerPlan:
            return make(ids, document, config, layer, table)

    if config.per_layer:
        return RoutingPlan(tuple(plan_layer(layer) for layer in layers), weight_scale)
    return RoutingPlan((plan_layer(0),) * len(layers), weight_scale)


def check_ids(ids: Tensor, name: str = "document_ids", least: int = NO_SINKS) -> None:
    """Raise DataError unless `ids` is an int64 tensor with values of at least `least`."""
    if not isinstance(ids, Tensor):
        raise DataError(f"{name} must be an int64 tensor, got {type(ids).__name__}")
    if ids.dtype != torch.int64:
        raise DataError(f"{name} must be int64, got {ids.dtype}; convert with .long() before any rounding can happen")
    if not torch.compiler.is_compiling() and ids.numel() and int(ids.min()) < least:
        allowed = "non-negative, or exactly -1 for no sinks" if least == NO_SINKS else f"at least {least}"
        raise DataError(f"{name} must be {allowed}; the least value is {int(ids.min())}")


HASH_VERSION = FORMAT_VERSION
"""Changes whenever the same id would open other blocks; part of a checkpoint's fingerprint."""
