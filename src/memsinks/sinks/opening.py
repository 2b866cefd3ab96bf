"""Opening and closing sinks: those of chosen documents, all of them, or all but those of chosen documents."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from memsinks.batch import NO_SINKS, check_ids, checked_id
from memsinks.errors import ArchitectureError, ConfigError, DataError
from memsinks.sinks.experts import read_host
from memsinks.sinks.families import Mlp
from memsinks.sinks.host_classes import SinkMlp
from memsinks.sinks.state import SinkState, refuse_taken, require_sinks, sink_modules, unwrap
from memsinks.sinks.table import open_mask

OpenIds = int | Iterable[int] | Tensor | np.ndarray | Sequence[Iterable[int]]


def parse_open(ids: OpenIds) -> Tensor:
    """Any form that `sinks_open` takes, as int64 [rows or 1, columns, union], padded with -1."""
    if isinstance(ids, np.ndarray):
        ids = torch.from_numpy(ids)
    if isinstance(ids, Tensor):
        check_ids(ids)
        if ids.dim() not in (0, 1, 2):
            raise DataError(f"an id tensor for sinks_open has shape [B] or [B, T], got {list(ids.shape)}")
        if not ids.numel():
            raise DataError(f"sinks_open needs at least one id, got a tensor of shape {list(ids.shape)}")
        return ids.reshape(-1, 1, 1) if ids.dim() < 2 else ids[:, :, None]
    sets: list[list[Any]] = []
    if isinstance(ids, int | np.integer):
        sets = [[ids]]
    elif isinstance(ids, Iterable) and not isinstance(ids, str | bytes):
        values = list(ids)
        values = [x.item() if isinstance(x, Tensor) and not x.dim() else x for x in values]
        nested = any(isinstance(x, Iterable) for x in values)
        sets = [list(x) if isinstance(x, Iterable) else [x] for x in values] if nested else [values]
    if not any(sets):
        raise DataError(
            f"sinks_open needs at least one id: an int, a list or int64 tensor of ids, or sets; got {ids!r}"
        )
    sets = [[checked_id(value, or_none=True) for value in one] for one in sets]
    most = max(len(x) for x in sets)
    flat = torch.tensor([x + [NO_SINKS] * (most - len(x)) for x in sets], dtype=torch.int64)
    return flat[:, None, :]


@contextmanager
def sinks_open(model: nn.Module, ids: OpenIds) -> Iterator[None]:
    """Within the block, the model in eval mode runs with the sinks of `ids` open.

    Args:
        ids: an id, or a list or set of ids (their union), for all rows; an int64 tensor [B] or [B, T] with the id of
            each row or token; or a list with one set of ids for each row (their union). -1 opens nothing.

    They are open in this thread and this task of asyncio alone (`contextvars`): a thread that is started within the block opens
    its own, a task that is created there, and what it hands to ``asyncio.to_thread``, begin with them. A forward under
    torch.compile sees what its thread opened last, so give each task a thread of its own there, and open within it. Another
    ``sinks_open`` within the block replaces them until its end. A key-value cache that was filled while other sinks were open
    is refused with a DataError.

    Raises:
        DataError: an id that cannot be, that was taken out, or, in a model to which nothing is hashed, that has no blocks.
        ConfigError: a model in training mode, in which sinks follow the document ids.
    """
    state = require_sinks(model)
    if model.training:
        raise ConfigError("sinks_open is for evaluation, the model is in training mode; call model.eval() first")
    opened = parse_open(ids)
    refuse_taken(state, opened)
    _refuse_nobody(state, opened)
    with state.opened.within(opened):
        yield


@contextmanager
def own_sinks_open(model: nn.Module, ids: Tensor | int) -> Iterator[None]:
    """`sinks_open` with the id of each row or token, to measure texts of anybody: an id without blocks opens nothing."""
    state = require_sinks(model)
    opened = torch.as_tensor(ids)
    refuse_taken(state, opened)
    with sinks_open(model, with_blocks(state, opened)):
        yield


def with_blocks(state: SinkState, ids: Tensor) -> Tensor:
    """The ids that have blocks, of any shape, and -1 in place of the others."""
    return ids if state.config.hashed_blocks else torch.where(state.table.holds(ids), ids, NO_SINKS)


def _refuse_nobody(state: SinkState, opened: Tensor) -> None:
    """DataError for ids without blocks where nothing is hashed: with them the model would answer as without sinks."""
    if state.config.hashed_blocks:
        return
    unknown = opened[(opened != NO_SINKS) & ~state.table.holds(opened)]
    if len(unknown):
        known = sorted(set(state.table.owners.tolist()))
        raise DataError(
            f"document id {int(unknown[0])} has no blocks in this model; the {len(known)} owners there are {known[:3]}"
            + (", ..." if len(known) > 3 else "")
        )


@contextmanager
def sinks_closed(model: nn.Module, rescale: str = "none") -> Iterator[None]:
    """Within the block, sinks are closed and the general neurons are multiplied by a factor.

    Args:
        rescale: ``"none"`` (1), ``"expected"`` or ``"released"``, see `SinkConfig.rescale_factors`.

    Raises:
        ConfigError: an unknown rescale, or a model in training mode, in which sinks follow the document ids.
        ArchitectureError: a rescale beside mixtures of experts.
    """
    state = require_sinks(model)
    if model.training:
        raise ConfigError("sinks_closed is for evaluation, the model is in training mode; call model.eval() first")
    factor = rescale_factor(state, rescale)
    hosts = down_modules(model) if factor != 1.0 else []
    hooks = [host.register_forward_pre_hook(lambda _, args: (args[0] * factor, *args[1:])) for host in hosts]
    try:
        with state.opened.within(None):
            yield
    finally:
        for hook in hooks:
            hook.remove()


def rescale_factor(state: SinkState, rescale: str) -> float:
    """The factor of a named rescale; ConfigError for an unknown name."""
    factors = state.config.rescale_factors(state.intermediate_size)
    if rescale not in factors:
        raise ConfigError(f"rescale must be one of {sorted(factors)}, got {rescale!r}")
    return factors[rescale]


def down_modules(model: nn.Module) -> list[nn.Module]:
    """The down projections of the host MLPs that have sinks; ArchitectureError for a mixture of experts."""
    inner: Any = unwrap(model)
    hosts = [read_host(part, inner.config) for part in inner.modules() if issubclass(type(part), SinkMlp)]
    downs = [host.down for host in hosts if isinstance(host, Mlp)]
    if len(downs) < len(hosts):
        raise ArchitectureError(
            f"{type(inner).__name__} has mixtures of experts, which have no share of general neurons to rescale by; use "
            'rescale="none"'
        )
    return downs


def documents_closed(model: nn.Module, ids: Sequence[int]) -> AbstractContextManager[None]:
    """Within the block, the sink blocks of these documents give nothing, whoever opens them; see `blocks_closed`."""
    return blocks_closed(model, opened_blocks(require_sinks(model), ids))


def opened_blocks(state: SinkState, ids: Sequence[int]) -> dict[int, list[int]]:
    """{layer: the blocks that any of these ids opens there}, in ascending order."""
    config, wanted = state.config, torch.tensor([int(x) for x in ids], dtype=torch.int64)
    masks = {
        layer: open_mask(wanted, config, layer if config.per_layer else 0, state.table).any(0) for layer in state.layers
    }
    return {layer: mask.nonzero()[:, 0].tolist() for layer, mask in masks.items()}


@contextmanager
def blocks_closed(model: nn.Module, blocks: Mapping[int, Sequence[int]]) -> Iterator[None]:
    """Within the block, these sink blocks, by layer, give nothing.

    Their down rows are set to zero and put back, bit for bit, at the end.
    """
    state = require_sinks(model)
    kept: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    try:
        with torch.no_grad():
            for layer, module in zip(state.layers, sink_modules(model).values(), strict=True):
                chosen = torch.tensor(list(blocks.get(layer, ())), dtype=torch.int64, device=module.down.device)
                kept.append((module.down, chosen, module.down[chosen].clone()))
                module.down[chosen] = 0
        yield
    finally:
        with torch.no_grad():
            for down, chosen, values in kept:
                down[chosen] = values
