"""Sections of YAML -> frozen dataclasses, with everything that is wrong said at once."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import yaml

from memsinks.errors import ConfigError

RENAMED = {"data": {"identity": "by"}, "arms.*": {"width": "extra_neurons"}}
"""Settings that had other names, by section: old name -> today's. Old names are read everywhere."""

DEEPEST = 100
"""Levels of a YAML file."""


def with_new_names(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """`values` with old names replaced; one that stands beside its new name stays, and is then refused as unknown."""
    return {
        names[name] if name in names and names[name] not in values else name: value for name, value in values.items()
    }


def unknown_keys(given: Iterable[Any], where: str, known: Iterable[str]) -> list[str]:
    """A sentence with the nearest known name for each key that is not known."""
    return unknown_names(given, f"key {where}." if where else "key ", known)


def unknown_names(given: Iterable[Any], what: str, known: Iterable[str]) -> list[str]:
    """A sentence with the nearest known name for each name that is not known; `what` stands before it."""
    known, problems = list(known), []
    for name in given:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"; did you mean {near[0]}?" if near else f"; known are {', '.join(known)}"
            problems.append(f"unknown {what}{name}{hint}")
    return problems


def section(kind: Any, values: Any, where: str, problems: list[str]) -> Any:
    """`values` as a frozen dataclass of this kind; what is wrong is added to `problems`, with names that begin with `where`."""
    if not isinstance(values, Mapping):
        problems.append(f"{where or 'the recipe'} must be a section of settings, got {values!r}")
        return None
    hints = typing.get_type_hints(kind)
    known = {entry.name: entry for entry in dataclasses.fields(kind)}
    if hasattr(kind, "upgraded"):
        try:
            values = kind.upgraded(values)
        except ConfigError as error:
            problems.append(f"{where}: {error}")
            return None
    given = {}
    before = len(problems)
    for name, value in values.items():
        full = f"{where}.{name}" if where else str(name)
        if name not in known:
            problems += unknown_keys([name], where, known)
        else:
            given[name] = _value(hints[name], value, full, problems)
    for name, entry in known.items():
        required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
        if required and name not in values:
            problems.append(f"{where + '.' if where else ''}{name} is missing")
    if len(problems) > before:
        return None
    try:
        return kind(**given)
    except ConfigError as error:
        text = str(error)
        problems.append(text if not where or text.startswith(f"{where}: ") else f"{where}: {text}")
        return None


def _value(hint: Any, value: Any, where: str, problems: list[str]) -> Any:
    """`value` as the type of a field; numbers written without a point are accepted as floats, 1e-3 (YAML: text) too."""
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        found: list[str] = []
        for kind in (option for option in options if option is not type(None)):
            found = []
            result = _value(kind, value, where, found)
            if not found:
                return result
        problems.extend(found)
        return None
    if dataclasses.is_dataclass(hint):
        return section(hint, value, where, problems)
    if origin is Literal:
        if value not in options:
            problems.append(f"{where} must be one of {', '.join(map(repr, options))}, got {value!r}")
        return value
    if hint is float:
        try:
            if isinstance(value, bool):
                raise ValueError
            return float(value)
        except (TypeError, ValueError):
            problems.append(f"{where} must be a number, got {value!r}")
            return None
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            problems.append(f"{where} must be a list, got {value!r}")
            return None
        return [_value(options[0], item, f"{where}[{index}]", problems) for index, item in enumerate(value)]
    kind = origin or hint
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        problems.append(f"{where} must be {kind.__name__}, got {value!r}")
    return value


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice in a mapping, of which PyYAML keeps the last."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                raise ValueError(f"the key {key.value!r} on line {lines[name]} is given again on line {line}; keep one")
            lines[name] = line
        return node


def load_yaml(content: bytes, what: str) -> Any:
    """The values of YAML in UTF-8; ConfigError, which begins with `what`, where it is none, gives a key twice or is nested
    deeper than `DEEPEST`."""
    try:
        text, depth = content.decode(), 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            opens, ends = isinstance(event, yaml.CollectionStartEvent), isinstance(event, yaml.CollectionEndEvent)
            depth += opens - ends
            if depth > DEEPEST:  # PyYAML takes minutes for thousands
                raise ValueError(f"it is nested more than {DEEPEST} deep")
        return _Loader(text).get_single_data()
    except (yaml.YAMLError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        # besides YAMLError what PyYAML raises for numbers, dates, keys and aliases that cannot be
        raise ConfigError(f"{what} is not valid YAML: {error!s:.300}") from error


def change(values: dict[str, Any], name: str, text: str) -> None:
    """Set one value by its dotted name, in place; `text` is YAML."""
    *sections, last = name.split(".")
    for section in sections:
        if values.get(section) is None:
            values[section] = {}
        values = values[section]
        if not isinstance(values, dict):
            raise ConfigError(f"cannot set {name}: {section} is not a section")
    values[last] = load_yaml(text.encode("utf-8", "surrogatepass"), f"cannot set {name}: its value")
