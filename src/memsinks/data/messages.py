"""The messages of a chat: what they may be, and the text that they are, which depends on no tokenizer and no template."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from memsinks.errors import DataError

ANSWERING = "assistant"
"""The role whose messages are learned."""


def checked_messages(messages: Iterable[Mapping[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Messages as plain dicts, without keys whose value is None, which tables fill in where another row has such a key.

    Raises:
        DataError: no messages; one without a role, or with neither a text as its content nor anything else; says which.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Iterable):
        raise DataError(f"messages must be a list of {{role, content}}, got {type(messages).__name__}")
    found = []
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise DataError(f"message {index} must have role and content, got {type(message).__name__} {message!r:.60}")
        known = {name: value for name, value in message.items() if value is not None}
        role, content = known.get("role"), known.get("content")
        if not isinstance(role, str) or not role:
            raise DataError(f"the role of message {index} must be a string, e.g. {ANSWERING!r}, got {role!r:.60}")
        if not isinstance(content, str) and (content is not None or len(known) == 1):
            raise DataError(
                f"the content of message {index} must be a string, got {type(content).__name__} {content!r:.60}; pictures, sound "
                "and lists of parts are not supported"
            )
        found.append(known)
    if not found:
        raise DataError("messages is empty")
    return tuple(found)


def text_of(messages: Iterable[Mapping[str, Any]]) -> str:
    """The text of a chat: a line ``role: content`` for each message; what else a message has follows as JSON."""
    return "\n".join(f"{message['role']}: {_content(message)}" for message in messages)


def _content(message: Mapping[str, Any]) -> str:
    more = {name: value for name, value in message.items() if name not in ("role", "content")}
    parts = [message["content"]] if "content" in message else []
    try:
        return " ".join([*parts, *([json.dumps(more, ensure_ascii=False, sort_keys=True)] if more else [])])
    except (TypeError, ValueError) as error:
        raise DataError(f"a message of {message['role']} has what JSON cannot hold: {error}") from error
