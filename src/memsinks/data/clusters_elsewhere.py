"""Clusters that another tool made: a file that names the cluster of each document, or pairs of near copies.

| tool | what it writes | how it is read |
|---|---|---|
| datatrove | ``minhash_cluster_id`` in the metadata of a document, -1 for none | ``cluster_field`` of `read_documents` |
| NeMo Curator | Parquet with an id and ``_duplicate_group_id`` | `read_clusters` |
| any | .csv, .jsonl or .parquet with a key and a cluster, or with two keys | `read_clusters` |

They are taken as they are: nothing is verified. Pairs are joined, so a chain of pairs is one cluster.
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from memsinks.data.documents import Document
from memsinks.data.readers import import_optional
from memsinks.errors import DataError

CLUSTER_COLUMNS = ("cluster", "minhash_cluster_id", "_duplicate_group_id", "group")
"""Names of the column that holds the cluster; of two columns with other names both hold keys."""
NO_CLUSTER = re.compile(r"-\d+(\.\d+)?")
"""A negative number, which says that a document is in no cluster."""


def read_clusters(path: str | os.PathLike[str]) -> dict[str, str]:
    """Key -> cluster, of a file of two columns; about 200 bytes a document in memory.

    Args:
        path: .csv (with a header), .jsonl or .parquet. One of the columns is called as in `CLUSTER_COLUMNS`, or each row is a
            pair of keys. Other columns than these are refused.

    Raises:
        DataError: a file that is none of these; names the line.
    """
    place = Path(path)
    rows = list(_rows(place))
    if not rows:
        raise DataError(f"{place} holds no clusters")
    names = list(rows[0])
    known = [x for x in CLUSTER_COLUMNS if x in names]
    if len(names) != 2 or len(known) > 1:
        raise DataError(
            f"{place} must have two columns, a key and a cluster ({', '.join(CLUSTER_COLUMNS)}), or two keys; it has "
            f"{', '.join(map(str, names)) or 'none'}"
        )
    by = known[0] if known else names[1]
    of = next(x for x in names if x != by)
    pairs = [_pair(row, of, by, f"{place}, row {number}") for number, row in enumerate(rows, start=1)]
    if not known:
        return _joined(pairs)
    clusters = {key: cluster for key, cluster in pairs if not NO_CLUSTER.fullmatch(cluster)}
    twice = [key for key, count in Counter(key for key, _ in pairs).items() if count > 1]
    if twice:
        raise DataError(f"{place} names {len(twice)} keys more than once: {', '.join(map(repr, twice[:5]))}")
    return clusters


def with_clusters(documents: Iterable[Document], clusters: Mapping[str, str]) -> Iterator[Document]:
    """The documents with the clusters of their keys; DataError if no key is known."""
    found = count = 0
    for document in documents:
        cluster = None if document.key is None else clusters.get(document.key)
        found += cluster is not None
        count += 1
        yield replace(document, cluster=cluster)
    if not found:
        raise DataError(
            f"none of the {count} documents has a key that the file of clusters names; choose another key_field"
        )


def _pair(row: Mapping[str, Any], of: str, by: str, where: str) -> tuple[str, str]:
    values = [row.get(of), row.get(by)]
    if row.keys() != {of, by} or any(isinstance(x, bool) or not isinstance(x, str | int) or x == "" for x in values):
        raise DataError(f"{where}: must hold {of} and {by}, a string or an integer each, got {dict(row)!r:.80}")
    return str(values[0]), str(values[1])


def _joined(pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Key -> the least key of those that pairs connect it with."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    for a, b in pairs:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    return {key: root(key) for key in parent}


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.suffix == ".parquet":
        pyarrow = import_optional("pyarrow", f"to read {path}")
        parquet = import_optional("pyarrow.parquet", f"to read {path}")
        try:
            with parquet.ParquetFile(path) as table:
                for batch in table.iter_batches():
                    yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError, OverflowError, LookupError) as error:
            raise DataError(f"{path} cannot be read ({error}); give a file that is whole") from None
        return
    if path.suffix not in (".csv", ".jsonl"):
        raise DataError(f"{path} has an unknown suffix {path.suffix!r}; readable are .csv, .jsonl, .parquet")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".csv":
                yield from csv.DictReader(file)
                return
            for number, line in enumerate(file, start=1):
                row = json.loads(line) if line.strip() else None
                if row is not None and not isinstance(row, dict):
                    raise DataError(f"{path}, line {number}: must be a JSON object, got {line:.60}")
                if row is not None:
                    yield row
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} cannot be read ({error}); give a UTF-8 file of rows") from None
