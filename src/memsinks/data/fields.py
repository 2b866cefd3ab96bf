"""A row of a file or data set -> a document: a text, a chat, or a prompt with its completion, as TRL names their fields."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from memsinks.batch import ISOLATIONS
from memsinks.checks import is_int
from memsinks.data.documents import Document
from memsinks.errors import DataError

STANDARD = (("messages",), ("prompt", "completion"))
"""Fields of a chat, and of a prompt with its completion; read where there is no field of the text."""

NAMES = ("key", "source", "cluster")
"""Slots that are names; an integer is read as one. A negative number names no cluster (datatrove writes -1)."""
CARRIED = "extra "
"""What the slot of a column begins with that is carried along; its name follows."""

MOST_COPIES = 2**31 - 1
"""Their product with the tokens of a document fits into int64."""

WANTED = {
    "text": "a string",
    "copies": f"an integer of at least 0 and at most {MOST_COPIES:,}",
    "isolation": f"one of {sorted(ISOLATIONS)} or null",
}


def document_of(row: Mapping[str, Any], where: str, fields: Mapping[str, str]) -> Document:
    """The document of a row.

    Args:
        row: its values. The field of the text may hold the messages of a chat.
        where: begins an error message.
        fields: slot of a document -> the field that it is in.

    Raises:
        DataError: a field is missing or holds something else.
    """
    check_fields(row, where, fields)
    names = _content_fields(row, fields)
    extra = {slot.removeprefix(CARRIED): row[name] for slot, name in fields.items() if slot.startswith(CARRIED)}
    fields = {slot: name for slot, name in fields.items() if not slot.startswith(CARRIED)}
    values: dict[str, Any] = {slot: row[name] for slot, name in fields.items() if slot != "text"}
    if is_int(values.get("cluster")) and values["cluster"] < 0:
        values["cluster"] = None
    for slot in NAMES:
        if is_int(values.get(slot)):
            values[slot] = str(values[slot])
    if names[0] == fields["text"] and not _is_chat(row[names[0]]):
        values["text"] = row[names[0]]
    for slot, value in values.items():
        name = names[0] if slot == "text" else fields[slot]
        if not _good(slot, value):
            wanted = WANTED.get(slot, "a non-empty string or an integer")
            raise DataError(
                f"{where}: field {name!r} ({slot}) must be {wanted}, got {type(value).__name__} {value!r:.60}"
            )
        _check_utf8(value, where, name)
    for name, value in extra.items():
        _check_utf8(value if isinstance(value, str) else _as_json(value), where, name)
    try:
        parts = {} if "text" in values else _parts([row[name] for name in names])
        document = Document(**parts, **values, extra=extra or None)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    _check_utf8(document.text, where, names[0])
    return document


def check_fields(names: Iterable[str], where: str, fields: Mapping[str, str]) -> None:
    """DataError if one of `fields` is not among `names`; for the text, those of a chat or completion will do."""
    names = list(names)
    for slot, name in fields.items():
        if name not in names and not (slot == "text" and _content_fields(names, fields)):
            there = ", ".join(repr(other) for other in names[:20]) or "none"
            more = ", or have messages, or prompt and completion" if slot == "text" else ""
            raise DataError(f"{where}: no field {name!r}; the fields there: {there}. {_remedy(slot)}{more}")


def _remedy(slot: str) -> str:
    return "Carry columns that are there" if slot.startswith(CARRIED) else f"Choose one with {slot}_field=..."


def columns_of(names: Iterable[str], fields: Mapping[str, str]) -> list[str]:
    """The columns that documents are made of."""
    return sorted({*_content_fields(names, fields), *(name for slot, name in fields.items() if slot != "text")})


def _content_fields(names: Iterable[str], fields: Mapping[str, str]) -> tuple[str, ...]:
    """The fields that the text of a document is in; none if there are none."""
    names = set(names)
    return next((x for x in ((fields["text"],), *STANDARD) if names.issuperset(x)), ())


def _good(slot: str, value: Any) -> bool:
    if slot == "copies":
        return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MOST_COPIES
    if slot == "isolation":
        return value is None or (isinstance(value, str) and value in ISOLATIONS)
    return (slot in ("source", "cluster") and value is None) or (
        isinstance(value, str) and bool(value or slot == "text")
    )


def _is_chat(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(x, Mapping) for x in value)


def _parts(contents: list[Any]) -> dict[str, Any]:
    """The arguments of a document that is a chat, or a prompt and its completion."""
    if len(contents) == 1:
        return {"messages": contents[0]}
    prompt, completion = contents
    if isinstance(prompt, str) and isinstance(completion, str):
        return {"text": prompt + completion, "prompt": len(prompt)}
    if _is_chat(prompt) and _is_chat(completion):
        return {"messages": [*prompt, *completion], "prompt": len(prompt)}
    kinds = f"{type(prompt).__name__} and {type(completion).__name__}"
    raise DataError(f"prompt and completion must be two strings or two lists of messages, got {kinds}")


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str, skipkeys=True)


def _check_utf8(value: Any, where: str, name: str) -> None:
    try:
        if isinstance(value, str):
            value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: field {name!r} is not valid UTF-8 ({error})") from None
