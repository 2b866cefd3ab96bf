"""Exports and copies of a model outside its run: which of them still hold an owner."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from memsinks.errors import CheckpointError
from memsinks.removal.erase import Erased, collateral_in, together
from memsinks.removal.erase_files import SinksFile
from memsinks.removal.export import whose_sinks
from memsinks.sinks.storage import has_saved_sinks


def elsewhere(
    also: Sequence[str | os.PathLike[str]], ids: set[int], erased: Sequence[Erased], sinks: SinksFile
) -> dict[str, str]:
    """What of some ids is in other folders, by folder: sinks of the same model, exports in which their sinks are neurons.

    Copies from before or after a `grow` are of the same model, which only has other numbers of reserved blocks.

    Args:
        also: folders, looked through with all below them. ids: of the owner and of the documents within him. erased: of them.
        sinks: of the run's model, before or after erasing.

    Raises:
        CheckpointError: a folder that is not there; nothing is changed anywhere.
    """
    found, shared = {}, Erased([], together(erased), False)
    for folder in map(Path, also):
        if not folder.is_dir():
            raise CheckpointError(f"there is no folder {folder}")
        for where in [folder, *(x for x in folder.rglob("*") if x.is_dir())]:
            opened = set(whose_sinks(where))
            if opened & ids:
                found[str(where)] = "an export with the owner's sinks as neurons: delete it"
            elif opened and collateral_in(sinks.before, shared, opened).any():
                found[str(where)] = "an export with blocks as neurons that the owner shared: delete it, export it again"
            elif has_saved_sinks(where):
                other = SinksFile(where)
                if other.of_owners:
                    if ids & set(other.state.table.ids.tolist()):
                        found[str(where)] = "the owner's sinks alone: delete them, or take the owner out there too"
                elif _up_to_growth(other) == _up_to_growth(sinks) and (what := _in_copy(ids, other, sinks)):
                    found[str(where)] = what
    return found


def _up_to_growth(sinks: SinksFile) -> tuple[Any, ...]:
    """On what depends which hashed blocks an id opens, and the shapes of a block: what `grow` leaves as it is."""
    layout = {name: value for name, value in sinks.layout.items() if name not in ("neurons", "reserved_blocks")}
    shapes = {name: tuple(tensor.shape[1:]) for name, tensor in sinks.tensors.items()}
    return layout, sinks.stored["hash_version"], sinks.state.config.hashed_blocks, shapes


def _in_copy(ids: set[int], other: SinksFile, sinks: SinksFile) -> str:
    """What of some ids is in a copy of the model, with as many blocks or not; "" for nothing."""
    if ids <= other.state.taken.keys():
        return ""
    blocks, of_run = other.state.config.blocks, sinks.state.config.blocks
    copy = "the sinks of the same model" + (
        "" if blocks == of_run else f", with {blocks:,} blocks instead of {of_run:,}"
    )
    own = any(sinks.before.table.own_blocks(one) for one in ids)
    if not own or ids & set(other.state.table.ids.tolist()):
        return f"{copy}: take the owner out there too"
    if not other.state.config.hashed_blocks:
        return ""  # only own blocks open there, and he has none
    return (
        f"{copy}, from before the owner had blocks of his own: if it was trained on his texts, take him out there too"
    )
