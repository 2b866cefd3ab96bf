"""The statement of a take-down: what was asked, found, erased and rewritten, as an in-toto Statement v1.

`subject` lists the files of the run as they are afterwards, by name and SHA-256; `predicate` is the rest. It holds numbers, names
and hashes, never a text (https://github.com/in-toto/attestation/blob/main/spec/v1/statement.md).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from memsinks.checks import one_of
from memsinks.errors import CheckpointError, DataError, refuse
from memsinks.files import read_json
from memsinks.removal.tombstone import Tombstone, shares_words

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://github.com/memsinks/memsinks/takedown/v"
VERSION = 1
"""Of the predicate; a newer one than this is refused."""

FATES = ("rewritten", "deleted", "added", "untouched")
"""What became of a file of the run, in the order of the page."""
SECTIONS = ("asked", "matched", "erased", "files", "audit", "settings", "versions", "date")
"""What every predicate has."""
_FILE = {"path", "fate", "why", "before", "after"}
_HASH = re.compile("[0-9a-f]{64}")
_FIRST_INEXACT = 2**53


def make_statement(predicate: Mapping[str, Any], tombstone: Tombstone | None = None) -> dict[str, Any]:
    """The statement of a predicate, as JSON reads it back. Integers that floats cannot hold, such as ids, become strings.

    Raises:
        DataError: listing everything that is wrong: a section missing or of another form, a value that JSON cannot hold, five
            words in a row of a text that `tombstone` is of.
    """
    if not isinstance(predicate, Mapping):
        raise DataError(f"the predicate must be a mapping with {', '.join(SECTIONS)}, got {type(predicate).__name__}")
    try:
        plain = json.loads(json.dumps(_exact(predicate), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise DataError(f"the predicate must hold what JSON can hold, and no nan: {error}") from error
    files = plain.get("files")
    statement = {
        "_type": STATEMENT,
        "subject": subjects(files) if isinstance(files, list) else [],
        "predicateType": f"{PREDICATE}{VERSION}",
        "predicate": plain,
    }
    found = problems(statement)
    if tombstone is not None:
        shared = [f"{text[:20]!r}..." for text in _strings(plain) if shares_words(text, tombstone)]
        found += (
            [f"no text may stand in it, and words of one that was taken down do: {', '.join(shared[:3])}"]
            if shared
            else []
        )
    refuse(found, "cannot record the take-down", DataError)
    return statement


def subjects(files: list[Any]) -> list[dict[str, Any]]:
    """The files that are there afterwards, with their hashes, as in-toto has them."""
    there = [x for x in files if isinstance(x, Mapping) and x.get("after")]
    return [{"name": x.get("path"), "digest": {"sha256": x["after"]}} for x in there]


def read_statement(path: Path) -> dict[str, Any]:
    """The statement of a file.

    Raises:
        CheckpointError: missing, damaged, no statement of a take-down, or of a newer version. What is inside may still be wrong:
            see `problems`.
    """
    statement = read_json(path, remedy="fetch the record again from where it was made")
    kind = statement.get("predicateType") if isinstance(statement, dict) else None
    number = kind.removeprefix(PREDICATE) if isinstance(kind, str) and kind.startswith(PREDICATE) else ""
    if not re.fullmatch("[1-9][0-9]{0,5}", number) or not isinstance(statement.get("predicate"), dict):
        raise CheckpointError(f"{path} is no record of a take-down; give a folder that one was written into")
    if int(number) > VERSION:
        raise CheckpointError(f"{path} is a record of version {number}, newer than {VERSION}; update memsinks")
    return statement


def problems(statement: Mapping[str, Any]) -> list[str]:
    """What is wrong with a statement; empty where it is well formed."""
    predicate = statement["predicate"]
    found = [] if statement.get("_type") == STATEMENT else [f"_type is not {STATEMENT}"]
    missing = [name for name in SECTIONS if name not in predicate]
    if missing:
        return [*found, f"the predicate lacks {', '.join(missing)}"]
    for name in ("asked", "matched", "erased", "audit", "settings", "versions"):
        if not isinstance(predicate[name], dict):
            found.append(f"{name} must be a mapping, got {type(predicate[name]).__name__}")
    if isinstance(predicate["asked"], dict):
        lacking = [x for x in ("owner", "by", "id") if not isinstance(predicate["asked"].get(x), str | int)]
        found += [f"asked must say {', '.join(lacking)}"] if lacking else []
    if isinstance(predicate["audit"], dict) and not all(
        isinstance(predicate["audit"].get(x), dict) for x in ("before", "after")
    ):
        found.append("audit must have two tables of figures, before and after")
    if not isinstance(predicate["date"], str) or not predicate["date"]:
        found.append("date must be a str, ISO 8601")
    tombstone = predicate.get("tombstone", {"sha256": "0" * 64})
    if not isinstance(tombstone, dict) or not _is_hash(tombstone.get("sha256")):
        found.append("tombstone must hold the sha256 of its file")
    files = predicate["files"]
    if not isinstance(files, list) or not all(isinstance(x, dict) and x.keys() == _FILE for x in files):
        return [*found, f"files must be a list of mappings with {', '.join(sorted(_FILE))}"]
    found += [problem for x in files for problem in _file_problems(x)]
    names = [x["path"] for x in files]
    twice = sorted({str(x) for x in names if names.count(x) > 1}) if len({*map(str, names)}) < len(names) else []
    found += [f"files names {', '.join(twice[:3])} more than once"] if twice else []
    if statement.get("subject") != subjects(files):
        found.append("subject does not list the files as they are afterwards")
    return found if statement.get("subject") else [*found, "no file is there afterwards"]


def _file_problems(file: Mapping[str, Any]) -> list[str]:
    """A file has hashes that fit its fate, and a path within the run."""
    path, fate, before, after = (file[x] for x in ("path", "fate", "before", "after"))
    if not isinstance(path, str) or not is_within(path):
        return [f"a file's path must lie within the run, with / between its parts, got {path!r:.80}"]
    found = one_of(f"fate of {path}", fate, FATES)
    for name, value, without in (("before", before, "added"), ("after", after, "deleted")):
        if (value is None) != (fate == without) or not (value is None or _is_hash(value)):
            found.append(f"{name} of {path}, which is {fate}, must be {'None' if fate == without else 'its SHA-256'}")
    if not found and fate in ("rewritten", "untouched") and (before == after) != (fate == "untouched"):
        found.append(f"{path} is {fate}, but its hashes are {'the same' if before == after else 'two'}")
    return found if isinstance(file["why"], str) else [*found, f"why of {path} must be a str"]


def is_within(path: str) -> bool:
    """Whether a name leads to a file below a folder: relative, no "..", no drive."""
    parts = PurePosixPath(path)
    return bool(path) and parts.as_posix() == path and not parts.is_absolute() and not {"..", "."} & {*parts.parts} and (
        "\\" not in path and not PureWindowsPath(path).drive and "\0" not in path
    )  # fmt: skip


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and _HASH.fullmatch(value) is not None


def _exact(value: Any) -> Any:
    """Integers that a float rounds as strings: many readers of JSON make floats of them."""
    if isinstance(value, Mapping):
        return {str(key): _exact(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_exact(x) for x in value]
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) >= _FIRST_INEXACT:
        return str(value)
    return value


def _strings(value: Any) -> Iterator[str]:
    """Every string of nested JSON, names too."""
    if isinstance(value, str):
        yield value
    for x in [*value.keys(), *value.values()] if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _strings(x)
