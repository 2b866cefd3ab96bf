"""The assignment table: ids that open listed blocks; and the blocks that any id opens, listed or hashed."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from memsinks.batch import NO_SINKS, is_id
from memsinks.checks import is_int
from memsinks.errors import ConfigError, refuse
from memsinks.sinks.config import SinkConfig
from memsinks.sinks.routing import bank_keys, shift, splitmix64


@dataclass(frozen=True)
class AssignmentTable:
    """Ids that open listed blocks instead of hashed ones: sorted int64 `ids` [n], `offsets` [n + 1], `blocks` [m], `owners` [m].

    Document ``ids[i]`` opens ``blocks[offsets[i]:offsets[i + 1]]`` in every layer; ``owners[j]`` is the id whose own
    ``blocks[j]`` is: ``ids[i]`` itself, or that of an author or a customer whose blocks it opens too. Empty by default; saved
    with the model.
    """

    ids: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    offsets: Tensor = field(default_factory=lambda: torch.zeros(1, dtype=torch.int64))
    blocks: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    owners: Tensor = None  # type: ignore[assignment]  # set in __post_init__

    def __post_init__(self) -> None:
        if self.owners is None:  # as tables of before: each id its own
            object.__setattr__(self, "owners", self.ids.repeat_interleave(self.offsets.diff()))

    @classmethod
    def from_dict(
        cls,
        assignments: Mapping[int, Collection[int]],
        config: SinkConfig,
        owners: Mapping[int, int] | None = None,
    ) -> AssignmentTable:
        """Build the table from {document id: blocks}; ConfigError on an id or a block that cannot be.

        Args:
            owners: {block: id whose own it is}; blocks that are not listed belong to the id that opens them.
        """
        problems = [
            f"a document id is an int from 0 to 2**63 - 1, got {key!r}" for key in assignments if not is_id(key)
        ]
        problems += [
            f"id {key} is assigned blocks {list(blocks)}, the pool has blocks 0 to {config.blocks - 1}"
            for key, blocks in assignments.items()
            if any(not is_int(block) or not 0 <= block < config.blocks for block in blocks)
        ]
        refuse(problems + _routing_problems(config, len(assignments)), "invalid assignment table")
        ids = sorted(assignments)
        offsets, listed = [0], []
        for key in ids:
            listed += sorted(set(assignments[key]))
            offsets.append(len(listed))
        table = cls(*(torch.tensor(x, dtype=torch.int64) for x in (ids, offsets, listed)))
        for place, block in enumerate(listed if owners else []):
            table.owners[place] = owners.get(block, int(table.owners[place]))  # type: ignore[union-attr]
        return table

    def to_dict(self) -> dict[int, list[int]]:
        """{document id: blocks}, as for `from_dict`."""
        blocks, ends = self.blocks.tolist(), self.offsets.tolist()
        return {key: blocks[ends[i] : ends[i + 1]] for i, key in enumerate(self.ids.tolist())}

    @classmethod
    def from_pairs(cls, pairs: Mapping[int, Collection[tuple[int, int]]]) -> AssignmentTable:
        """Build the table from {document id: (block, id whose own it is)}; nothing is checked, see `check`."""
        ids = sorted(pairs)
        listed = [sorted(set(pairs[key])) for key in ids]
        offsets = [0, *itertools.accumulate(map(len, listed))]
        blocks, owners = [x[0] for row in listed for x in row], [x[1] for row in listed for x in row]
        return cls(*(torch.tensor(x, dtype=torch.int64) for x in (ids, offsets, blocks, owners)))

    def to_pairs(self) -> dict[int, list[tuple[int, int]]]:
        """{document id: (block, id whose own it is)}, as for `from_pairs`."""
        pairs, ends = list(zip(self.blocks.tolist(), self.owners.tolist(), strict=True)), self.offsets.tolist()
        return {key: pairs[ends[i] : ends[i + 1]] for i, key in enumerate(self.ids.tolist())}

    def owner_of(self) -> dict[int, int]:
        """{block: id whose own it is}."""
        return dict(zip(self.blocks.tolist(), self.owners.tolist(), strict=True))

    def own_blocks(self, document_id: int) -> list[int]:
        """The blocks that are an id's own, in ascending order."""
        return sorted(set(self.blocks[self.owners == document_id].tolist()))

    def holds(self, ids: Tensor) -> Tensor:
        """Which of `ids` (int64, any shape) have listed blocks, bool of the same shape."""
        if not len(self):
            return torch.zeros_like(ids, dtype=torch.bool)
        known = self.ids.to(ids.device)
        return known[torch.searchsorted(known, ids.contiguous()).clamp(max=len(known) - 1)] == ids

    def check(self, config: SinkConfig) -> None:
        """ConfigError unless it fits a pool: sorted ids, blocks that are there."""
        problems = _routing_problems(config, len(self))
        if len(self.offsets) != len(self) + 1 or int(self.offsets[-1]) != len(self.blocks):
            problems.append(
                f"offsets must count up to the {len(self.blocks)} blocks, one more than the {len(self)} ids"
            )
        if len(self.owners) != len(self.blocks):
            problems.append(f"there are {len(self.owners)} owners for {len(self.blocks)} blocks")
        if len(self) and (int(self.ids[0]) < 0 or bool((self.ids[1:] <= self.ids[:-1]).any())):
            problems.append("ids must be non-negative and rise")
        if len(self.blocks) and not 0 <= int(self.blocks.min()) <= int(self.blocks.max()) < config.blocks:
            problems.append(
                f"blocks {int(self.blocks.min())} to {int(self.blocks.max())} are assigned, the pool has blocks 0 to "
                f"{config.blocks - 1}"
            )
        refuse(problems, "invalid assignment table")

    def __len__(self) -> int:
        return self.ids.numel()

    def to(self, device: torch.device) -> AssignmentTable:
        """The table on another device."""
        return AssignmentTable(*(x.to(device) for x in (self.ids, self.offsets, self.blocks, self.owners)))


def _routing_problems(config: SinkConfig, ids: int) -> list[str]:
    if ids and config.routing == "bernoulli":
        return ['assigned ids need routing "blocks" or "neurons", this config has "bernoulli"']
    return []


EMPTY_TABLE = AssignmentTable()
TABLE_VERSION = 1
"""Version of the table as it is written."""


def open_blocks(ids: Tensor, config: SinkConfig, layer: int, table: AssignmentTable = EMPTY_TABLE) -> Tensor:
    """The blocks each id opens in a layer; not for Bernoulli routing.

    Args:
        ids: int64 [n]; -1 opens nothing.

    Returns:
        int64 [n, most]; ``config.blocks`` fills places that open nothing.
    """
    return open_blocks_of_layers(ids, config, (layer,), table)[0]


def open_blocks_of_layers(
    ids: Tensor, config: SinkConfig, layers: tuple[int, ...], table: AssignmentTable = EMPTY_TABLE
) -> Tensor:
    """`open_blocks` of several layers, int64 [layers, n, most], in as many small operations as one layer takes."""
    count, none = config.open_blocks if config.hashed_blocks else 0, config.blocks
    keys = bank_keys(config, layers, count + 1, ids.device)[:, None]
    start = torch.tensor([bank * config.hashed_blocks // max(1, count) for bank in range(count + 1)], device=ids.device)
    size = start[1:] - start[:-1]
    blocks = start[:-1] + shift(splitmix64(ids[:, None] ^ keys[..., :count]), 1) % size
    if (
        count and config.hashed_blocks % count
    ):  # banks of two sizes: turn them, or a block of a small bank opens more often
        turn = shift(splitmix64(ids[:, None] ^ keys[..., count:]), 1)
        blocks = (blocks + turn % config.hashed_blocks) % config.hashed_blocks
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
        blocks, own = (torch.nn.functional.pad(x, (0, wide - x.shape[-1]), value=none) for x in (blocks, own))
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
        keys = bank_keys(config, (layer,), config.hashed_blocks, ids.device)
        threshold = round(config.active / config.neurons * 2**53)
        mask = shift(splitmix64(ids[:, None] ^ keys), 11) < threshold
        mask = mask & (ids[:, None] != NO_SINKS)
        if len(table):
            raise ConfigError('an assignment table needs routing "blocks" or "neurons"; this config has "bernoulli"')
        return mask
    blocks = open_blocks(ids, config, layer, table)
    mask = torch.zeros(len(ids), config.blocks + 1, dtype=torch.bool, device=ids.device)
    return mask.scatter(1, blocks, True)[:, : config.blocks]
