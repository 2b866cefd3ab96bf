"""Exports and copies of a model outside its run: which of them still hold an owner."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from memsinks.errors import CheckpointError
from memsinks.removal.erase_files import SinksFile
from memsinks.removal.export import whose_sinks
from memsinks.sinks.storage import has_saved_sinks


def elsewhere(also: Sequence[str | os.PathLike[str]], ids: set[int], sinks: SinksFile) -> dict[str, str]:
    """What of some ids is in other folders, by folder: sinks of the same model, exports in which their sinks are neurons.

    CheckpointError for a folder that is not there. Nothing is changed.
    """
    found = {}
    for folder in map(Path, also):
        if not folder.is_dir():
            raise CheckpointError(f"there is no folder {folder}")
        for where in [folder, *(x for x in folder.rglob("*") if x.is_dir())]:
            if set(whose_sinks(where)) & ids:
                found[str(where)] = "an export with the owner's sinks as neurons: delete it"
            elif has_saved_sinks(where):
                other = SinksFile(where)
                same = other.stored["fingerprint"] == sinks.stored["fingerprint"]
                if other.of_owners:
                    if ids & set(other.state.table.ids.tolist()):
                        found[str(where)] = "the owner's sinks alone: delete them, or take the owner out there too"
                elif same and not ids <= other.state.taken.keys():
                    found[str(where)] = "the sinks of the same model: take the owner out there too"
    return found
