"""Own blocks: sink blocks that belong to one owner, so that taking him out touches nobody else.

    ms.assign(model, owners)                     # a document, a person, a customer, a source: one id each
    ms.assign(model, [author], within={page: author for page in pages})
    ms.grow(model, 64)                           # more blocks, for owners who come later

Own blocks are reserved ones (`SinkConfig.reserved_blocks`): the hash never opens them, only the assignment table does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from memsinks.batch import is_id
from memsinks.checks import int_at_least
from memsinks.errors import ArchitectureError, ConfigError, refuse
from memsinks.sinks.sharding import is_sharded
from memsinks.sinks.state import SinkState, require_sinks, shared_parameters, sink_modules, unwrap
from memsinks.sinks.table import AssignmentTable


def assign(
    model: nn.Module, owners: Iterable[int], *, blocks: int = 1, within: Mapping[int, int] | None = None
) -> dict[int, list[int]]:
    """Give owners blocks of their own, which no other id opens; the assignments there are stay.

    Args:
        model: with sinks and enough free blocks (`free_blocks`, `grow`).
        owners: ids (see `document_id`) that have no own blocks yet.
        blocks: each gets so many, in every layer.
        within: {document id: id of its owner}: such a document opens the blocks of its owner too (and those its owner
            opens). It need not have own blocks.

    Returns:
        {id: its own blocks}.

    Raises:
        ConfigError: too few free blocks, an id that cannot be or has own blocks already, an owner without blocks, a circle;
            nothing is assigned then.
    """
    state = require_sinks(model, missing_ok=True)
    wanted = [int(x) if isinstance(x, np.integer) else x for x in owners]
    within = dict(within or {})
    free = free_blocks(model)
    refuse(int_at_least("blocks", blocks, 1), "cannot assign blocks")
    problems = cannot_have_blocks(state, wanted, within)
    if len(wanted) * blocks > len(free):
        problems.append(
            f"{len(wanted)} owners with {blocks} blocks each need {len(wanted) * blocks} free blocks, there are {len(free)}; "
            f"add some with memsinks.grow(model, {len(wanted) * blocks - len(free)}), or set reserved_blocks higher"
        )
    refuse(problems, "cannot assign blocks")
    entries, owner_of, given = state.table.to_dict(), state.table.owner_of(), {}
    for place, owner in enumerate(wanted):
        given[owner] = free[place * blocks : (place + 1) * blocks]
        entries[owner] = [*entries.get(owner, ()), *given[owner]]
        owner_of |= dict.fromkeys(given[owner], owner)
    for document in within:
        entries[document] = _with_owners(document, within, entries)
    state.table = AssignmentTable.from_dict(entries, state.config, owner_of)
    return given


def cannot_have_blocks(state: SinkState, owners: Sequence[Any], within: Iterable[int] = ()) -> list[str]:
    """Why some of these ids cannot be given blocks of their own, [] where all can; documents `within` them must not be gone."""
    problems = [f"an id is an int from 0 to 2**63 - 1, got {x!r}" for x in owners if not is_id(x)]
    if problems:
        return problems[:3]
    again = sorted({x for x in owners if owners.count(x) > 1}) if len(set(owners)) < len(owners) else []
    having = set(state.table.owners.tolist())
    return [
        *[f"id {x} is given twice" for x in again[:3]],
        *[f"id {x} has own blocks already" for x in owners if x in having][:3],
        *[f"id {x} was taken out ({state.taken[x]})" for x in [*owners, *within] if x in state.taken][:3],
    ]


def _with_owners(document: int, within: Mapping[int, int], entries: Mapping[int, list[int]]) -> list[int]:
    """The blocks of a document and of all above it."""
    found, seen, current = list(entries.get(document, ())), {document}, document
    while current in within:
        current = within[current]
        if current in seen:
            raise ConfigError(f"id {current} is within itself")
        if current not in entries:
            raise ConfigError(f"document {document} is within {current}, which has no blocks; assign it some")
        seen.add(current)
        found += entries[current]
    return sorted(set(found))


def free_blocks(model: nn.Module) -> list[int]:
    """The blocks that are nobody's and never hashed to, in ascending order."""
    return require_sinks(model, missing_ok=True).free_blocks()


def grow(model: Any, blocks: int) -> None:
    """Add free blocks to a model, for owners who come later; which blocks an id opens stays.

    Outputs keep their bits on the tiled and grouped paths, and are equal to rounding on the masked path (small pools to which
    ids are hashed). The sinks'
    parameters are new ones: make the optimizer, and wrappers such as DDP, afterwards.

    Args:
        model: with sinks, not wrapped, compiled or sharded.
        blocks: how many, in every layer.

    Raises:
        ConfigError: fewer than 1; Bernoulli routing, which has no blocks of its own.
        ArchitectureError: a model that is wrapped or sharded.
    """
    state: SinkState = require_sinks(model)
    refuse(int_at_least("blocks", blocks, 1), "cannot grow")
    if state.config.routing == "bernoulli":
        raise ConfigError(
            'routing="bernoulli" has no blocks that only some ids open, so nothing can be added for owners'
        )
    if unwrap(model) is not model or is_sharded(model):
        raise ArchitectureError(f"the model is wrapped in {type(model).__name__} or sharded; grow it before")
    size = state.config.block_size
    layers = list(sink_modules(model).values())
    larger = [sinks.larger(blocks) for sinks in layers]  # all of them, or there is no room for any
    for sinks, parameters in zip(layers, larger, strict=True):
        sinks.grow(parameters)
    state.config = replace(
        state.config,
        neurons=state.config.neurons + blocks * size,
        reserved_blocks=state.config.reserved_blocks + blocks,
    )


def freeze_shared(model: nn.Module) -> None:
    """Let no weight learn but the sinks."""
    for parameter in shared_parameters(model):
        parameter.requires_grad_(False)
