"""What was made with which settings: a stored result is used again only where it was made with the settings of now.

Files outlive versions. So settings are compared as they would be written today: old names are renamed, and settings that
were added later count with their defaults.
"""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from memsinks.errors import CheckpointError, MemsinksError

Upgrade = Callable[[Mapping[str, Any]], Mapping[str, Any]]
"""Settings as some version wrote them -> as they are written today."""


def refuse_other_settings(
    stored: Mapping[str, Any],
    now: Mapping[str, Any],
    where: Path | str,
    *,
    kinds: Mapping[str, type | Upgrade] | None = None,
    ignored: Collection[str] = (),
    remedy: str = "choose another output, or remove it",
    error: type[MemsinksError] = CheckpointError,
) -> None:
    """Raise unless what lies at `where` was made with the settings of now.

    Args:
        stored: the settings that were written beside it, nested mappings of what JSON or YAML holds.
        now: those of now, as they would be written.
        where: the file or folder, for the message.
        kinds: what the section of a dotted name ("" is the whole) is, so that files of older versions can be read: a
            dataclass (see `completed`), or a function that upgrades the section.
        ignored: dotted names of settings, or of whole sections, that may differ.
        remedy: what the reader can do.
        error: the type that is raised.

    Raises:
        CheckpointError: naming every setting that differs, with both values.
    """
    before, after = _plain(stored), _plain(now)
    for name, kind in (kinds or {}).items():
        before, after = _upgraded(before, name, kind), _upgraded(after, name, kind)
    other = [
        f"{name} {_shown(old)} (now {_shown(new)})"
        for name, old, new in differences(before, after)
        if not any(name == x or name.startswith(f"{x}.") for x in ignored)
    ]
    if other:
        raise error(f"{where} was made with other settings: {', '.join(other)}; {remedy}")


def completed(values: Mapping[str, Any], kind: Any) -> dict[str, Any]:
    """Settings of a dataclass as they would be written today: upgraded, with defaults for what they do not name.

    A dataclass that was ever written with other names has a function ``upgraded``, which gives today's. What is not known
    to the dataclass stays.
    """
    values = dict(kind.upgraded(values) if hasattr(kind, "upgraded") else values)
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if field.name not in values:
            if field.default is not dataclasses.MISSING:
                values[field.name] = _plain(field.default)
            elif field.default_factory is not dataclasses.MISSING:
                values[field.name] = _plain(field.default_factory())
        options = [hints[field.name], *typing.get_args(hints[field.name])]
        inner = next((x for x in options if dataclasses.is_dataclass(x)), None)
        if inner is not None and isinstance(values.get(field.name), Mapping):
            values[field.name] = completed(values[field.name], inner)
    return values


def differences(before: Any, now: Any, name: str = "") -> list[tuple[str, Any, Any]]:
    """(dotted name, value before, value now) of all that differs between two nested mappings; a missing value is None."""
    if not isinstance(before, Mapping) or not isinstance(now, Mapping):
        return [] if before == now else [(name, before, now)]
    return [
        entry
        for key in sorted({*before, *now})
        for entry in differences(before.get(key), now.get(key), f"{name}.{key}".lstrip("."))
    ]


def _plain(value: Any) -> Any:
    """As JSON reads it back."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    return json.loads(json.dumps(value))


def _upgraded(values: Any, name: str, kind: type | Upgrade) -> Any:
    """`values` with the section of a dotted name upgraded, where there is one."""
    if not isinstance(values, Mapping):
        return values
    if not name:
        return completed(values, kind) if isinstance(kind, type) else kind(values)
    first, _, rest = name.partition(".")
    return {key: _upgraded(value, rest, kind) if key == first else value for key, value in values.items()}


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
