"""Erasing an owner from a model in memory: his blocks start anew, and nothing else moves.

    erased = ms.erase(model, ms.document_id("alice", by="key"), optimizer=optimizer, record="2026-11-28 alice")

Own blocks (`assign`) are nobody else's, so everyone else keeps every bit. Hashed blocks are shared by chance: what others lose is
told by `collateral` beforehand.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from memsinks.batch import checked_id
from memsinks.errors import ConfigError, DataError
from memsinks.sinks.layer import Sinks
from memsinks.sinks.opening import opened_blocks
from memsinks.sinks.state import SinkState, require_sinks
from memsinks.sinks.table import AssignmentTable, open_mask

MOMENTS = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")
"""What an optimizer keeps of a sink block."""


@dataclass(frozen=True)
class Erased:
    """What was erased.

    Args:
        ids: the owner and the documents within it. blocks: by layer. own: whether they were nobody else's.
        above: owners whose blocks these documents opened too; what they wrote there stays.
    """

    ids: list[int]
    blocks: dict[int, list[int]]
    own: bool
    above: tuple[int, ...] = ()

    def __str__(self) -> str:
        count = sum(map(len, self.blocks.values()))
        kind = "own" if self.own else "shared"
        stays = (
            f"; what they wrote into the blocks of {list(self.above)} stays, take these out too" if self.above else ""
        )
        return f"{len(self.ids)} ids, {count} {kind} sink blocks in {len(self.blocks)} layers{stays}"


def together(erased: Sequence[Erased]) -> dict[int, list[int]]:
    """{layer: all blocks there that were erased}, in ascending order."""
    layers = sorted({layer for one in erased for layer in one.blocks})
    return {layer: sorted({block for one in erased for block in one.blocks.get(layer, ())}) for layer in layers}


def blocks_of(model: nn.Module, owner: int) -> Erased:
    """What `erase` would erase.

    Args:
        model: with sinks.
        owner: an id. Own blocks: his, and those of the documents within him (`assign`). Otherwise those that the hash opens.

    Raises:
        DataError: no id; the owner was taken out already, is within another and has no own blocks, or has no blocks at all.
        ConfigError: single neurons by chance (Bernoulli routing), which all texts share.
    """
    return blocks_in(require_sinks(model), owner)


def blocks_in(state: SinkState, owner: int) -> Erased:
    """`blocks_of` a model with this state."""
    table, owner = state.table, checked_id(owner)
    if owner in state.taken:
        raise DataError(f"id {owner} was taken out already, see the record {state.taken[owner]!r}")
    own = table.own_blocks(owner)
    entries = table.to_dict()
    if not own and owner in entries:
        above = sorted(set(table.owners[torch.isin(table.blocks, torch.tensor(entries[owner]))].tolist()))
        raise DataError(
            f"id {owner} has no blocks of its own, it opens those of {above}; take that owner out, or assign own blocks before "
            "training"
        )
    if own:
        within = ids_within(table, owner)
        blocks = sorted({block for key in within for block in table.own_blocks(key)})
        others = {key for key, opened in entries.items() if key not in within and set(opened) & set(blocks)}
        alone = not others and blocks[0] >= state.config.hashed_blocks
        above = {
            int(x) for key in within for x in table.owners[torch.isin(table.blocks, torch.tensor(entries[key]))]
        } - within
        return Erased(sorted(within), dict.fromkeys(state.layers, blocks), alone, tuple(sorted(above - others)))
    if state.config.routing == "bernoulli":
        raise ConfigError(
            f'id {owner} has no own blocks, and under routing="bernoulli" it opens neurons that all texts share; only '
            "remove_sinks and export, which take all sinks out, remove it"
        )
    if not state.config.hashed_blocks:
        raise DataError(f"id {owner} has no blocks in this model: it was never trained, or its name is another")
    return Erased([owner], opened_blocks(state, [owner]), False)


def ids_within(table: AssignmentTable, owner: int) -> set[int]:
    """An owner's id, and those of all documents within him, by the assignment table."""
    ends = table.offsets.tolist()
    found = {key for i, key in enumerate(table.ids.tolist()) if owner in table.owners[ends[i] : ends[i + 1]].tolist()}
    return found | {owner}


def collateral(model: nn.Module, erased: Erased, others: Collection[int]) -> np.ndarray:
    """The share of each other id's open blocks, over all layers, that `erase` would erase: float64 [others], 0 for own blocks."""
    return collateral_in(require_sinks(model), erased, others)


def collateral_in(state: SinkState, erased: Erased, others: Collection[int]) -> np.ndarray:
    """`collateral` in a model with this state."""
    ids = torch.tensor([checked_id(x) for x in others], dtype=torch.int64)
    hit, opened = torch.zeros(len(ids)), torch.zeros(len(ids))
    for layer, blocks in erased.blocks.items():
        mask = open_mask(ids, state.config, layer if state.config.per_layer else 0, state.table)
        hit += mask[:, blocks].sum(1)
        opened += mask.sum(1)
    return (hit / opened.clamp(min=1)).double().numpy()


def erase(
    model: nn.Module, owner: int, *, optimizer: torch.optim.Optimizer | None = None, record: str = "erase"
) -> Erased:
    """Erase an owner, in place; all other blocks and all shared weights keep every bit.

    His blocks get the values that they started with, their moments and gradients become zero, own ones are free again
    (`free_blocks`), and his ids can be opened no more, neither in training nor by `sinks_open`. In a model with adapters of PEFT
    that goes for the sinks of every adapter, and for those of before.

    Args:
        model: with sinks, in any mode, wrapped or not.
        owner: see `blocks_of`.
        optimizer: of the model; its state is erased too.
        record: a name that is said to whoever opens the ids.

    Raises:
        DataError, ConfigError: see `blocks_of`; nothing was changed.
    """
    erased = blocks_of(model, owner)
    state = require_sinks(model)
    copies = [part for part in model.modules() if isinstance(part, Sinks)]
    for sinks in copies if optimizer is not None else ():
        for parameter in sinks.parameters():
            forget(_state_of(optimizer, parameter), [])
    with torch.no_grad():
        for sinks in copies:
            blocks = erased.blocks.get(sinks.layer, [])
            sinks.start_anew(blocks)
            for parameter in sinks.parameters():
                if parameter.grad is not None:
                    parameter.grad[blocks] = 0
                if optimizer is not None:
                    forget(_state_of(optimizer, parameter), blocks)
    strike_out(state, erased, record)
    return erased


def strike_out(state: SinkState, erased: Erased, record: str) -> None:
    """Free the blocks of erased ids, and keep the ids closed for ever."""
    gone = set(erased.ids)
    if gone & set(state.table.ids.tolist()):
        entries = {key: blocks for key, blocks in state.table.to_dict().items() if key not in gone}
        state.table = AssignmentTable.from_dict(entries, state.config, state.table.owner_of())
    state.taken |= dict.fromkeys(erased.ids, record)


def _state_of(optimizer: Any, parameter: nn.Parameter) -> Mapping[str, Any]:
    inner = getattr(optimizer, "optimizer", optimizer)
    return inner.state.get(parameter, {})


def forget(moments: Mapping[str, Any], blocks: Sequence[int]) -> None:
    """Set what an optimizer keeps of some blocks of one parameter to zero, in place."""
    for name, value in moments.items():
        if isinstance(value, Tensor) and value.dim() and name in MOMENTS:
            value[list(blocks)] = 0
        elif isinstance(value, Tensor) and value.dim():
            raise ConfigError(
                f"the optimizer keeps {name!r}, of which it is not known how to erase blocks; use memsinks.AdamW or torch's AdamW"
            )
