"""The readable page of a record: made from the statement alone, so that anyone can make it again and compare."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from datetime import datetime
from importlib.resources import files
from typing import Any

from memsinks.removal.statement import FATES

PAGE = 1
"""Of the page's form. The statement names the one that it was written with: pages of another form are not compared."""
MONTHS = "January February March April May June July August September October November December".split()
MOST_SHOWN = 32
"""Values of a list that are shown; of longer ones, how many more there are."""


def record_page(statement: Mapping[str, Any], data: bytes) -> str:
    """One HTML page that opens offline, light or dark as the reader's system is, and prints on paper.

    Args:
        statement: well formed.
        data: the bytes of its file, of which the page shows the SHA-256.
    """
    import jinja2  # and not above: loading a record does not need it

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"shown": _shown, "short": lambda x: f"{x[:12]}…" if x else "–", "rows": _rows}
    template = environment.from_string((files("memsinks.removal") / "record.html.j2").read_text(encoding="utf-8"))
    predicate = statement["predicate"]
    fates = Counter(x["fate"] for x in predicate["files"])
    audit = {side: dict(_rows(predicate["audit"][side])) for side in ("before", "after")}
    return template.render(
        x=predicate,
        date=_date(predicate["date"]),
        matched=_matched(predicate["matched"]),
        digest=hashlib.sha256(data).hexdigest(),
        tombstone=predicate.get("tombstone", {}).get("sha256"),
        fates=[(fate, fates[fate]) for fate in FATES if fates[fate]],
        cards=_cards(predicate, fates),
        files=sorted(predicate["files"], key=lambda x: (FATES.index(x["fate"]), x["path"])),
        figures=[
            (name, *(side.get(name) for side in audit.values())) for name in {**audit["before"], **audit["after"]}
        ],
        tables=[(name, _rows(predicate[name])) for name in ("settings", "versions")],
        more=[(name, _rows(value)) for name, value in predicate.items() if name not in _TOLD],
    )


_TOLD = {"asked", "matched", "erased", "files", "audit", "settings", "versions", "date", "page", "tombstone"}


def _date(text: str) -> str:
    """A day or moment as it is read; as it stands where it is not ISO 8601."""
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        return text
    day = f"{moment.day} {MONTHS[moment.month - 1]} {moment.year}"
    zone = "" if moment.tzinfo is None else " UTC" if not moment.utcoffset() else f" {moment:%z}"
    return day if len(text) <= 10 else f"{day}, {moment:%H:%M}{zone}"


def _matched(matched: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """The kinds of match first, by their names alone."""
    counts = matched.get("counts")
    kinds = [(f"documents, {kind}", x) for kind, x in counts.items()] if isinstance(counts, Mapping) else []
    return kinds + _rows({name: x for name, x in matched.items() if name != "counts" or not kinds})


def _cards(predicate: Mapping[str, Any], fates: Mapping[str, int]) -> list[tuple[int, str]]:
    """The figures at the top: (number, what it counts)."""
    counts = predicate["matched"].get("counts")
    layers = predicate["erased"].get("layers")
    cards = []
    if isinstance(counts, Mapping) and all(isinstance(x, int) for x in counts.values()):
        number = sum(counts.values())
        cards.append((number, "document matched" if number == 1 else "documents matched"))
    if isinstance(blocks := predicate["erased"].get("blocks"), list | dict):
        number = _leaves(blocks)
        cards.append((number, "sink block erased" if number == 1 else "sink blocks erased"))
    if isinstance(layers, list):
        cards.append((len(layers), "layer" if len(layers) == 1 else "layers"))
    changed = fates["rewritten"] + fates["deleted"]
    return [*cards, (changed, "file rewritten or deleted" if changed == 1 else "files rewritten or deleted")]


def _leaves(value: Any) -> int:
    if isinstance(value, list | dict):
        return sum(_leaves(x) for x in (value.values() if isinstance(value, dict) else value))
    return 1


def _rows(value: Any, name: str = "") -> list[tuple[str, Any]]:
    """(name, value) of everything in a nested mapping, names joined by a dot that stands apart."""
    if not isinstance(value, Mapping):
        return [(name, value)]
    return [row for key, x in value.items() for row in _rows(x, f"{name} · {key}" if name else str(key))]


def _shown(value: Any) -> str:
    """A value as a reader wants it: figures short, lists cut."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        whole = value.is_integer() and abs(value) < 1e15
        return f"{value:.0f}" if whole else f"{value:.4g}" if math.isfinite(value) else "–"
    if isinstance(value, list):
        more = f" and {len(value) - MOST_SHOWN} more" if len(value) > MOST_SHOWN else ""
        return (", ".join(_shown(x) for x in value[:MOST_SHOWN]) or "none") + more
    if isinstance(value, Mapping):
        return "; ".join(f"{name}: {_shown(x)}" for name, x in value.items()) or "none"
    return str(value)
