"""Owners in a finished model: the model stays as it is, and what each owner's text teaches goes into blocks of his own.

owners = ms.add_owners(model, ["acme", "bolt"])             # ids by name; the rest of the model is frozen
rows = ms.make_rows(documents, tokenizer, length=256, by="source", apart_from=1)
ms.SinkTrainer(model, args, train_dataset=rows).train()     # shuffled, several epochs
with ms.sinks_open(model, owners["acme"]): model.generate(...)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

from torch import nn

from memsinks.batch import NO_SINKS
from memsinks.checks import int_at_least, is_int, one_of
from memsinks.data.identity import BY, By, document_id
from memsinks.errors import ConfigError, DataError, refuse
from memsinks.sinks.attach import add_sinks, check_host, undone_on_failure
from memsinks.sinks.config import SinkConfig
from memsinks.sinks.own import assign, cannot_have_blocks, free_blocks, freeze_shared, grow
from memsinks.sinks.state import has_sinks, require_sinks, sink_modules


def add_owners(
    model: Any,
    owners: Iterable[str | int],
    *,
    by: By = "source",
    blocks: int = 1,
    config: SinkConfig | None = None,
) -> dict[str | int, int]:
    """Give owners blocks of their own in a finished model, and freeze all else; or add owners to those it has.

    A model without sinks gets them (`SinkConfig.for_finetuning`); its function does not change. In one with owners the pool grows
    where it must, and nobody's blocks move by a bit: train the new ones on their texts alone, with a new optimizer.

    Args:
        model: a Hugging Face decoder, with owners or without sinks; not wrapped.
        owners: their names, as `by` tells documents apart, or their ids. Texts of ``by="content"`` are owners by their id.
        by: see `identify`.
        blocks: each gets so many, in every layer that has sinks.
        config: other settings for a model without sinks, of so many blocks at least; see `SinkConfig.for_finetuning`.

    Returns:
        {owner as given: id}, for `sinks_open`, `export(open=)` and `erase`.

    Raises:
        ConfigError: no owners, one twice, settings out of range, hashed blocks or a later `open_from` in them, or settings for a
            model that has sinks; a model in which blocks are hashed to.
        ArchitectureError: the model cannot carry sinks.
    """
    if isinstance(owners, str | bytes) or not isinstance(owners, Iterable):
        raise ConfigError(
            f"owners is a list of names or ids, got {owners!r:.60}; for one of them give [{owners!r:.60}]"
        )
    names = list(owners)
    problems = one_of("by", by, BY) + ([] if names else ["owners is empty"])
    refuse(problems, "cannot add owners")
    ids: dict[Any, int] = {name: int(name) if is_int(name) else document_id(name, by) for name in names}  # type: ignore[arg-type]
    if len(set(ids.values())) < len(names):
        twice = next(name for name in names if names.count(name) > 1 or list(ids.values()).count(ids[name]) > 1)
        raise ConfigError(f"owner {twice!r} is given twice")
    refuse(int_at_least("blocks", blocks, 1), "cannot add owners")
    with undone_on_failure(model):
        if not has_sinks(model):
            check_host(model)
            config = config or SinkConfig.for_finetuning(model, len(names) * blocks)
            _require_settings_of_owners(config)
            add_sinks(model, config)
        else:
            _require_own_blocks_alone(model, config)
            refuse(cannot_have_blocks(require_sinks(model), list(ids.values())), "cannot add owners")
            lacking = len(names) * blocks - len(free_blocks(model))
            if lacking > 0:
                grow(model, lacking)
        assign(model, ids.values(), blocks=blocks)
        freeze_shared(model)
    return ids


def _require_settings_of_owners(config: SinkConfig) -> None:
    """ConfigError for settings under which owners' blocks would not be their own, or stay closed."""
    problems = [f"{config.hashed_blocks} of its blocks are hashed to"] if config.hashed_blocks else []
    if config.open_from != 1:
        problems.append(f"texts open their sinks at exposure {config.open_from}, which must be 1")
    refuse(problems, "config is not one of owners, see SinkConfig.for_finetuning")


def _require_own_blocks_alone(model: nn.Module, config: SinkConfig | None) -> None:
    if config is not None:
        raise ConfigError(
            "the model has sinks already, whose settings hold for owners who come later; leave config out"
        )
    if require_sinks(model).config.hashed_blocks:
        raise ConfigError(
            "the model's blocks are hashed to, so text without owner opens them too; use memsinks.assign there, or add owners to "
            "a model without sinks"
        )


def require_owners_and_texts(model: nn.Module, ids: Collection[int]) -> None:
    """Check that each text has an owner and each owner a text, in a model without hashed blocks.

    Args:
        model: with sinks; one with hashed blocks passes.
        ids: of the texts that it is to be trained on; -1 = nobody's.

    Raises:
        DataError: an id without blocks; owners whose blocks never learned, and do not here.
    """
    state = require_sinks(model)
    if state.config.hashed_blocks:
        return
    table, wanted = state.table, set(ids) - {NO_SINKS}
    known = set(table.ids.tolist())
    problems = [
        f"document id {x} has no blocks; give it some with memsinks.add_owners" for x in sorted(wanted - known)[:3]
    ]
    opened = {block for key, blocks in table.to_dict().items() if key in wanted for block in blocks}
    idle = [owner for owner in owners_of(model) if not opened & set(table.own_blocks(owner))]
    last = next(reversed(sink_modules(model).values())).down.detach()
    never = [owner for owner in idle if not bool(last[table.own_blocks(owner)].any())]
    if never:
        problems.append(
            f"{len(never)} owners have blocks but no text, ids {never[:3]}; give texts of theirs, or leave them out of add_owners"
        )
    refuse(problems, "cannot train the sinks of these owners", DataError)


def owners_of(model: nn.Module) -> list[int]:
    """The ids that have blocks of their own, ascending."""
    return sorted(set(require_sinks(model).table.owners.tolist()))
