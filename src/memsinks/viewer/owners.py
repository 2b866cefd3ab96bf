"""The owners and documents of a view, as a page lists them, and searching them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from memsinks.data.documents import Document
from memsinks.data.identity import By, identify
from memsinks.runs.owners import AskedBy
from memsinks.sinks.state import has_sinks, require_sinks

EXCERPT = 90
"""Characters of a text that a list shows."""


@dataclass(frozen=True)
class ShownOwner:
    """Whoever has one id.

    Args:
        id: document id. name, by: what a take-down asks for, see `take_down`.
        documents: indices of his documents.
        own: whether the blocks he opens are assigned to him, not hashed.
    """

    id: int
    name: str
    by: AskedBy
    documents: tuple[int, ...]
    own: bool


def owners_shown(documents: Sequence[Document], by: By, model: PreTrainedModel) -> dict[int, ShownOwner]:
    """All owners by id: those of the documents in their order, then ids with blocks of which no document is known.

    Raises:
        DataError: a document without the key or source asked for.
    """
    table = require_sinks(model).table if has_sinks(model) else None
    listed = set() if table is None else set(table.ids.tolist())
    places: dict[int, list[int]] = {}
    for index, one in enumerate(identify(documents, by)[0].tolist() if documents else ()):
        places.setdefault(one, []).append(index)
    found = {}
    for one, indices in places.items():
        name, asked_by = _name(documents[indices[0]], by, one)
        found[one] = ShownOwner(one, name, asked_by, tuple(indices), one in listed)
    return found | {x: ShownOwner(x, str(x), "id", (), True) for x in sorted(listed - found.keys())}


def _name(document: Document, by: By, one: int) -> tuple[str, AskedBy]:
    if by == "source":
        return str(document.source), "source"
    return (document.key, "key") if document.key else (str(one), "id")


def owner_facts(owner: ShownOwner, taken: dict[int, str]) -> dict[str, Any]:
    """An owner for the page; ids are text, because they do not fit into a number of JavaScript."""
    return {
        "id": str(owner.id),
        "name": owner.name,
        "by": owner.by,
        "documents": len(owner.documents),
        "own": owner.own,
        "taken": owner.id in taken,
    }


def document_facts(
    index: int, document: Document, owner: ShownOwner | None, taken: dict[int, str], epochs: int
) -> dict[str, Any]:
    """A document for the page; `owner` is None of one that was never trained on, `epochs` 0 where they are not known."""
    words = " ".join(document.text.split())
    return {
        "index": index,
        "name": document.key or document.source or f"document {index}",
        "source": document.source,
        "kind": document.kind,
        "met": document.copies * epochs if owner is not None else 0,
        "excerpt": words[:EXCERPT] + ("…" if len(words) > EXCERPT else ""),
        "owner": None if owner is None else owner_facts(owner, taken),
    }


def matching_documents(documents: Sequence[Document], members: int, text: str) -> list[int]:
    """Indices of the documents in whose key, source or text all words of `text` stand: the most repeated first, unseen last."""
    words = text.casefold().split()
    found = [
        index
        for index, document in enumerate(documents)
        if _has_all(words, (document.key, document.source, document.text))
    ]
    return sorted(found, key=lambda index: (index >= members, -documents[index].copies))


def matching_owners(owners: Iterable[ShownOwner], text: str) -> list[ShownOwner]:
    """Those of several documents, or of none that is known, whose name or id holds all words of `text`."""
    words = text.casefold().split()
    return [x for x in owners if len(x.documents) != 1 and _has_all(words, (x.name, str(x.id)))]


def _has_all(words: Sequence[str], parts: Iterable[str | None]) -> bool:
    text = "\n".join(x for x in parts if x).casefold()
    return all(word in text for word in words)
