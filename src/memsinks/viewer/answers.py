"""What the page asks, and the answers: a function for each question, JSON in and out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from memsinks.checks import is_int
from memsinks.errors import ConfigError, DataError
from memsinks.sinks.state import has_sinks, require_sinks, shared_parameters, sink_parameters
from memsinks.viewer.owners import document_facts, matching_documents, matching_owners, owner_facts
from memsinks.viewer.takedowns import records, taken_out
from memsinks.viewer.view import View
from memsinks.viewer.writing import Prompt, beginning, read, typed, write

Asked = Mapping[str, Any]
LISTED = 40
"""Documents, and owners, that a search lists."""


def state(view: View, _: Asked) -> dict[str, Any]:
    """What is looked at, what can be done with it, what is missing."""
    model = view.model
    facts = [
        f"{model.config.model_type}, {_short(sum(x.numel() for x in shared_parameters(model)))} parameters",
        f"{view.members:,} documents trained on" if view.documents else "",
        f"{len(view.documents) - view.members:,} never seen" if len(view.documents) > view.members else "",
    ]
    if has_sinks(model):
        config = require_sinks(model).config
        facts.insert(1, f"{_short(sum(x.numel() for x in sink_parameters(model)))} in sinks")
        facts.insert(2, f"{config.blocks:,} sink blocks a layer")
    return {
        "name": _tail(view.place.folder),
        "ordinary": None if view.place.ordinary is None else _tail(view.place.ordinary),
        "folder": str(view.place.folder),
        "facts": [x for x in facts if x],
        "columns": view.columns,
        "notes": view.notes,
        "sinks": has_sinks(model),
        "readable": view.tokenizer is not None,
        "chat": view.tokenizer is not None and bool(view.tokenizer.chat_template),
        "context": view.context,
        "records": records(view),
        "version": view.version,
    }


def _tail(path: Path | str) -> str:
    """The last two parts of a path."""
    return "/".join(Path(path).resolve().parts[-2:]) if Path(path).exists() else str(path)


def _short(number: int) -> str:
    for size, unit in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def search(view: View, asked: Asked) -> dict[str, Any]:
    """Owners and documents in which all words of ``text`` stand."""
    text, taken = str(asked.get("text", "")), view.taken
    documents, members = view.documents, view.members
    found, owners = matching_documents(documents, members, text), matching_owners(view.owners.values(), text)
    by_index = {index: owner for owner in view.owners.values() for index in owner.documents}
    return {
        "owners": [owner_facts(x, taken) for x in owners[:LISTED]],
        "documents": [document_facts(x, documents[x], by_index.get(x), taken, view.epochs) for x in found[:LISTED]],
        "counts": {"owners": len(owners), "documents": len(found)},
    }


def begin(view: View, asked: Asked) -> dict[str, Any]:
    """The beginning of the document with index ``document``, of ``given`` tokens or as many as is usual."""
    _require_current(view, asked)
    prompt = beginning(view, _number(asked, "document"), _number(asked, "given", None))
    assert prompt.truth is not None
    given = len(prompt.tokens) - prompt.start
    return {"text": prompt.text, "chat": prompt.chat, "given": given, "tokens": given + len(prompt.truth)}


def run(view: View, asked: Asked) -> Iterator[dict[str, Any]]:
    """What each column knows and writes, event by event, see `writing`.

    ``document`` and ``given``, or ``text`` and ``chat``; ``open``, names or ids; ``tokens``, how many to write;
    ``version``, of the list that the document was chosen from.
    """
    _require_current(view, asked)
    version = view.version
    prompt = _prompt(view, asked)
    opened = asked.get("open", [])
    if not isinstance(opened, list):
        raise ConfigError(f"open must be a list of ids, got {opened!r:.60}")
    ids = view.ids_to_open([str(x) for x in opened])
    events = write(view, prompt, ids, _number(asked, "tokens"), version)
    first = next(events)  # a prompt that is too long is refused before a long document is read
    if prompt.truth is not None:
        yield from ({"kind": "read", **event} for event in read(view, prompt, ids, version))
    yield {"kind": "write", **first}
    yield from ({"kind": "write", **event} for event in events)


def _prompt(view: View, asked: Asked) -> Prompt:
    if asked.get("document") is None:
        return typed(view, str(asked.get("text", "")), asked.get("chat") is True)
    return beginning(view, _number(asked, "document"), _number(asked, "given", None))


def _require_current(view: View, asked: Asked) -> None:
    """DataError where the documents are no longer those that a page has listed."""
    if asked.get("version", view.version) != view.version:
        raise DataError("an owner was taken out since this page was loaded; the list is new, choose again")


def named(view: View, asked: Asked) -> dict[str, Any]:
    """The owner of a typed name or id."""
    one = view.owner_named(str(asked.get("name", "")).strip())
    owner = view.owners.get(one)
    if owner is not None:
        return owner_facts(owner, view.taken)
    facts = {"id": str(one), "name": str(one), "by": "id", "documents": 0, "own": False}
    return facts | {"taken": one in view.taken}


def _number(asked: Asked, name: str, missing: Any = ...) -> Any:
    value = asked.get(name)
    if value is None and missing is not ...:
        return missing
    if not is_int(value):
        raise ConfigError(f"{name} must be a whole number, got {value!r:.60}")
    return value


ANSWERS: Mapping[str, Callable[[View, Asked], dict[str, Any]]] = {
    "state": state,
    "search": search,
    "begin": begin,
    "named": named,
    "takedown": taken_out,
}
STREAMS: Mapping[str, Callable[[View, Asked], Iterator[dict[str, Any]]]] = {"run": run}
"""Answers that come a line at a time."""
