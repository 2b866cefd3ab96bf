"""What each document may teach the shared weights: flags on documents, and the rows that flagged ones stand in."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from memsinks.batch import ISOLATIONS, NO_SINKS
from memsinks.checks import one_of
from memsinks.data.documents import Document
from memsinks.errors import DataError, refuse

CLOSED, OPEN, SINKS_ALONE = 0, 1, 2
"""Kinds of rows: a row holds documents of one kind. Those of `OPEN` may train sinks alone, as the model's settings say."""


def isolate(
    documents: Sequence[Document], isolation: str | None, names: Collection[str], by: Literal["key", "source"] = "key"
) -> list[Document]:
    """The documents, those of some owners with another isolation.

    Args:
        documents: the documents.
        isolation: ``"gated"``, ``"exact"``, ``"private"``, see `batch.ISOLATIONS`, or None = what the model's settings say.
        names: keys or sources; each must be that of a document.
        by: which of them they are.

    Raises:
        ConfigError: an unknown `isolation` or `by`.
        DataError: names that no document has; says the first ones.
    """
    problems = one_of("by", by, ("key", "source"))
    if isolation is not None:
        problems += one_of("isolation", isolation, tuple(ISOLATIONS))
    refuse(problems, "cannot isolate documents")
    wanted = set(names)
    known = {getattr(document, by) for document in documents}
    if missing := sorted(wanted - known):
        raise DataError(f"no document has the {by} {', '.join(map(repr, missing[:5]))} ({len(missing)} such names)")
    return [replace(x, isolation=isolation) if getattr(x, by) in wanted else x for x in documents]


def isolation_of(documents: Iterable[Document]) -> np.ndarray | None:
    """int64 [documents], the numbers of their isolation; None where none has one."""
    found = [ISOLATIONS[x.isolation] if x.isolation else 0 for x in documents]
    return np.array(found, np.int64) if any(found) else None


def row_kinds(ids: np.ndarray, counts: np.ndarray, flags: np.ndarray, apart_from: int | None) -> np.ndarray:
    """The kind of row that each document stands in, int64 [documents]: `CLOSED`, `OPEN` or `SINKS_ALONE`.

    Args:
        ids, counts, flags: int64 [documents], document ids, exposures and isolation.
        apart_from: see `packing.pack`.

    Raises:
        DataError: exposures or isolation out of range; a document that is to train its sinks alone, without any; exact documents
            without `apart_from`.
    """
    if counts.size and counts.max() >= 2**31:
        raise DataError(f"exposures must be less than 2**31, got {counts.max()} at document {counts.argmax()}")
    known = (0, *ISOLATIONS.values())
    if not np.isin(flags, known).all():
        raise DataError(f"isolation must be one of {known}, got {flags[~np.isin(flags, known)][0]}")
    flagged = flags >= ISOLATIONS["exact"]
    if (flagged & (ids == NO_SINKS)).any():
        raise DataError(
            f"document {np.flatnonzero(flagged & (ids == NO_SINKS))[0]} is to train its sinks alone, but its id -1 opens none"
        )
    private = flags == ISOLATIONS["private"]
    if apart_from is None:
        if (flags == ISOLATIONS["exact"]).any():
            raise DataError("exact documents need rows of their own: give apart_from=config.open_from")
        return np.where(private, SINKS_ALONE, CLOSED)
    opened = (counts >= apart_from) & (ids != NO_SINKS) & (flags != ISOLATIONS["gated"])
    return np.where(flagged & (opened | private), SINKS_ALONE, np.where(opened, OPEN, CLOSED))
