"""A take-down, planned or done, and what its record states of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memsinks._version import versions
from memsinks.data.documents import Document
from memsinks.data.identity import By
from memsinks.files import file_hash
from memsinks.removal.erase import Erased, together
from memsinks.removal.tombstone import Tombstone, shares_words
from memsinks.runs.artifacts import Fates
from memsinks.runs.owners import Owner


@dataclass(frozen=True)
class Takedown:
    """A take-down, planned or done.

    Args:
        owner: who. erased: by checkpoint within the run. fates: of all files of the run.
        collateral: share of the open blocks of each other document with sinks that is erased too, by document id; only those
            above 0.
        elsewhere: {folder: what of the owner is in it}, of the folders that were named.
        audit: figures before and after, {} of one that is only planned or has no whole model. record: its folder; None = planned.
    """

    owner: Owner
    documents: list[Document]
    erased: dict[str, list[Erased]]
    fates: Fates
    collateral: dict[int, float]
    elsewhere: dict[str, str]
    audit: dict[str, Any] = field(default_factory=dict)
    same_blocks: int = 0
    record: Path | None = None

    @property
    def erased_everywhere(self) -> list[Erased]:
        """What was erased, in all checkpoints."""
        return [one for erased in self.erased.values() for one in erased]


def predicate_of(
    plan: Takedown, folder: Path, files: Path, by: By, tombstone: Tombstone | None, passes: int
) -> dict[str, Any]:
    """What the record states, see `write_record`.

    Args:
        folder: of the run. files: the new versions of its files. by: what gives documents their ids.
        tombstone: of the owner's texts. passes: of the repair.
    """
    config = next(iter(plan.fates.sinks.values())).state.config
    usual = "exact" if config.shared == "none" else "gated"
    flags = [plan.documents[x].isolation or usual for x in plan.owner.documents]
    kinds, asked_by = [copy.kind for copy in plan.owner.copies], plan.owner.by
    blocks = {
        f"{checkpoint}, layer {layer}": found
        for checkpoint, erased in plan.erased.items()
        for layer, found in together(erased).items()
    }
    listed = []
    for fate in plan.fates.files:
        path = folder / fate.path
        after = {"deleted": None, "untouched": path, "rewritten": files / fate.path}[fate.fate]
        digests = {"before": file_hash(path), "after": None if after is None else file_hash(after)}
        same = digests["before"] == digests["after"]  # a checkpoint from before the owner was met
        listed.append({"path": fate.path, "fate": "untouched" if same else fate.fate, "why": fate.why} | digests)
    return {
        "asked": {
            "owner": str(plan.owner.ids[0])
            if tombstone and shares_words(plan.owner.name, tombstone)
            else plan.owner.name,
            "by": by if asked_by in ("text", "id") else asked_by,
            "id": plan.owner.ids[0],
        },
        "matched": {
            "counts": {"of the owner": len(plan.owner.documents)}
            | {f"copies of others, {kind}": kinds.count(kind) for kind in dict.fromkeys(kinds)},
            "ids": plan.owner.ids,
        },
        "erased": {"layers": sorted({int(x.rpartition(" ")[2]) for x in blocks}), "blocks": blocks},
        "files": listed,
        "audit": plan.audit or {"before": {}, "after": {}},
        "isolation": {
            "documents": {kind: flags.count(kind) for kind in dict.fromkeys(flags)},
            "trained the shared weights": [
                {
                    "private": "private documents never",
                    "exact": f"exact documents before exposure {config.open_from} alone",
                    "gated": "gated documents at every exposure: a trace stays that attacks find",
                }[kind]
                for kind in dict.fromkeys(flags)
            ],
            "blocks of owners above, in which his texts stay": sorted(
                {x for one in plan.erased_everywhere for x in one.above}
            ),
        },
        "kept": {
            "sink blocks that kept every bit": plan.same_blocks,
            "others with erased blocks": len(plan.collateral),
        },
        "settings": {
            "own blocks": all(one.own for erased in plan.erased.values() for one in erased),
            "largest share of another's blocks": max(plan.collateral.values(), default=0.0),
            "passes of the repair": passes if plan.collateral else 0,
        },
        "versions": versions("torch", "transformers", "numpy", "safetensors"),
    }
