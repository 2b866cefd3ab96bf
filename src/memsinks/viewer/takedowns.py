"""Taking an owner out from the page: what would happen, what has happened, and the records."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from memsinks.errors import CheckpointError, ConfigError, DataError
from memsinks.files import read_json
from memsinks.removal.record import RECORD_PAGE, RECORDS, STATEMENT
from memsinks.runs.takedown import MOST_COLLATERAL, TakedownFinished, take_down
from memsinks.runs.takedown_result import Takedown
from memsinks.sinks.state import require_sinks
from memsinks.viewer.owners import ShownOwner
from memsinks.viewer.view import View

SHOWN = 12
"""Copies and files of a kind that the page lists."""


def taken_out(view: View, asked: Mapping[str, Any]) -> dict[str, Any]:
    """Plan a take-down, or do it.

    Args:
        asked: ``id`` (text), ``do`` (False = a dry run), ``typed`` (the owner's name once more, where it is to be done), and
            ``copies``, ``collateral``, ``repair`` as `take_down` has them.

    Returns:
        What was found or done, see `_facts`.

    Raises:
        DataError: nobody of that id; a typed name that is not his. MemsinksError: see `take_down`.
    """
    owner = view.owners.get(view.owner_named(str(asked.get("id"))))
    if owner is None:
        raise DataError(f"nobody here has the id {asked.get('id')!r:.60}, or he was taken out")
    do, copies = asked.get("do") is True, asked.get("copies") is True
    collateral, repair = asked.get("collateral", MOST_COLLATERAL), asked.get("repair", 0)
    if do and asked.get("typed") != owner.name:
        raise DataError(f"the name that was typed is not {owner.name!r}; nothing was changed")
    with view.takedowns:
        try:
            done = take_down(
                view.place.folder,
                **_who(owner, view),
                dry_run=not do,
                copies=copies,
                most_collateral=collateral,
                repair_passes=repair,
                documents=view.documents[: view.members] if not view.place.run else None,
                by=view.by if not view.place.run else None,
                epochs=view.epochs or require_sinks(view.model).config.open_from,  # not known: all have met their sinks
            )
        except TakedownFinished as finished:
            view.reload()
            return {"finished": str(finished), "record": finished.record.name}
        found = _facts(done, owner)
        if do:
            try:
                view.reload()
            except Exception as error:
                raise CheckpointError(
                    f"{owner.name!r} was taken out (record {found['record']}), but what is left could not be read again "
                    f"({type(error).__name__}: {error!s:.200}); end memsinks view and start it again"
                ) from error
    return found


def _who(owner: ShownOwner, view: View) -> dict[str, Any]:
    """By his name where his id comes from it: a key of texts that have ids of their own is no owner."""
    return {owner.by: owner.name} if owner.by == view.by else {"id": owner.id}


def _facts(done: Takedown, owner: ShownOwner) -> dict[str, Any]:
    """A take-down for the page: who, what of others, what happens to each file, figures before and after."""
    fates: dict[str, list[dict[str, str]]] = {"rewritten": [], "deleted": [], "untouched": []}
    for fate in done.fates.files:
        fates[fate.fate].append({"path": fate.path, "why": fate.why})
    copies = [
        {"name": done.documents[x.index].key or f"document {x.index}", "kind": x.kind, "differences": x.differences}
        for x in done.owner.copies
    ]
    return {
        "id": str(owner.id),
        "name": owner.name,
        "by": owner.by,
        "documents": len(done.owner.documents),
        "ids": [str(x) for x in done.owner.ids],
        "copies": {"count": len(copies), "shown": copies[:SHOWN]},
        "erased": [
            {
                "checkpoint": checkpoint,
                "blocks": sum(len(blocks) for one in erased for blocks in one.blocks.values()),
                "own": all(one.own for one in erased),
            }
            for checkpoint, erased in done.erased.items()
        ],
        "collateral": {"documents": len(done.collateral), "most": max(done.collateral.values(), default=0.0)},
        "files": {fate: {"count": len(x), "shown": x[:SHOWN]} for fate, x in fates.items()},
        "warnings": [f"{x.path}: {x.why}" for x in done.fates.files if x.look],
        "audit": _audit(done),
        "same_blocks": done.same_blocks,
        "record": None if done.record is None else done.record.name,
    }


def _audit(done: Takedown) -> list[dict[str, Any]]:
    """Rows of figures: group of documents, loss and share recited before and after; None where it was not measured."""
    if not done.audit:
        return []
    before, after = done.audit["before"], done.audit["after"]
    rows = [{"who": name, "before": before.get(name), "after": after.get(name)} for name in {**before, **after}]
    placebo = done.audit["placebo"]["owner"]
    return [*rows, {"who": "owner, as many random blocks closed (placebo)", "before": None, "after": placebo}]


def records(view: View) -> list[dict[str, str]]:
    """The records in the folder: name, owner, date."""
    found = []
    for path in sorted((view.place.folder / RECORDS).glob(f"*/{STATEMENT}")):
        try:
            predicate = read_json(path)["predicate"]
            found.append({"name": path.parent.name, "owner": predicate["asked"]["owner"], "date": predicate["date"]})
        except (CheckpointError, KeyError, TypeError):
            found.append({"name": path.parent.name, "owner": "a record that cannot be read", "date": ""})
    return found


def record_file(view: View, name: str) -> Path:
    """The readable page of a record; ConfigError if there is none of that name."""
    path = view.place.folder / RECORDS / name / RECORD_PAGE
    if not re.fullmatch(r"[a-z]+-[0-9a-f]{12}(-[0-9]+)?", name) or not path.is_file():
        raise ConfigError(f"there is no record {name[:60]!r}")
    return path
