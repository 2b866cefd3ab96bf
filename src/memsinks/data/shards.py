"""A shard: some documents of a corpus on disk, in a folder that is there whole or not at all.

tokens.bin         the tokens of all documents, uint16 or int32, one document after the other
index.npy          `ENTRY` [documents]: where each ends, its id, its group, its copies, its isolation
targets.npy        bool [tokens], which are targets; only where not all are
documents.parquet  a row a document: text, ids as strings (who reads integers as floats would open other sinks), names, copies and
                   the columns that were carried along
shard.json         counts, SHA-256 of these files and of the documents that they were made of

Its bytes follow from the documents and the settings alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from memsinks.batch import ISOLATIONS
from memsinks.checks import is_int
from memsinks.data.chat import encode_documents
from memsinks.data.documents import Document, utf8
from memsinks.data.identity import By, identify
from memsinks.data.readers import import_optional
from memsinks.data.token_store import load_array, token_type
from memsinks.data.tokens import start_tokens
from memsinks.errors import CheckpointError, DataError
from memsinks.files import file_hashes, read_json, verify_files, write_json, written_beside

ENTRY = np.dtype([("end", "<i8"), ("document_id", "<i8"), ("group", "<i8"), ("copies", "<i8"), ("isolation", "<i8")])
"""A document in the index of its shard; `end`: the first token in tokens.bin that is no more its own."""
TOKENS, INDEX, TARGETS, TABLE, RECORD = "tokens.bin", "index.npy", "targets.npy", "documents.parquet", "shard.json"
COUNTS = ("documents", "trained", "tokens", "tokens_with_copies")
"""In the record of a shard."""
AT_ONCE = 1 << 20
"""Characters that are encoded at once; a longer document is encoded whole."""
OF_BEFORE = "remove the corpus, and the same command makes it anew"
ROW_GROUP = 1024
"""Documents of a row group of the table, which is what is in memory when it is read."""


@dataclass(frozen=True)
class ShardSettings:
    """What a shard's bytes follow from, besides its documents and the tokenizer.

    Args:
        by: what gives a document its id.
        carry: columns that are carried along, from `Document.extra`.
    """

    by: By = "content"
    carry: tuple[str, ...] = ()


def write_shard(
    folder: Path,
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    settings: ShardSettings,
    first: int = 0,
) -> dict[str, Any]:
    """Write a shard, or find it there; returns its record.

    Args:
        first: the place of the first of the documents in the corpus, for errors.

    Raises:
        DataError, ConfigError: documents that cannot be encoded or have no id.
        CheckpointError: a shard lies there that was made of other documents, or is damaged; it cannot be written.
    """
    digest = documents_hash(documents)
    if folder.is_dir():
        return _found(folder, digest, tokenizer)
    ids, groups = identify(documents, settings.by, first=first)
    with written_beside(folder) as part:
        sizes, masks = _write_tokens(part / TOKENS, documents, tokenizer, first)
        index = np.zeros(len(documents), ENTRY)
        index["end"], index["document_id"], index["group"] = np.cumsum(sizes), ids, groups
        index["copies"] = [x.copies for x in documents]
        index["isolation"] = [ISOLATIONS[x.isolation] if x.isolation else 0 for x in documents]
        np.save(part / INDEX, index)
        if masks is not None:
            np.save(part / TARGETS, masks)
        _write_table(part / TABLE, documents, index, settings)
        record = {
            "documents": len(documents),
            "trained": int((index["copies"] > 0).sum()),
            "tokens": int(index["end"][-1]),
            "tokens_with_copies": int((sizes * index["copies"]).sum()),
            "documents_sha256": digest,
            "files": file_hashes(part),
        }
        write_json(part / RECORD, record)
    return record


def _found(folder: Path, digest: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    record = read_record(folder)
    require_shard(folder, record, digest)
    require_start(folder, tokenizer)
    return record


def require_start(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """CheckpointError for a shard from before texts began with the tokenizer's start token, where it has one.

    Its first text is looked at; chats begin as their template says.
    """
    start = start_tokens(tokenizer)
    place: int | None = 0
    if len(start) and (folder / TARGETS).is_file():
        rows = enumerate(read_table(folder / TABLE, ["text"]))
        place = next((number for number, row in rows if row["text"] is not None), None)
    if not len(start) or place is None:
        return
    ends = load_array(folder / INDEX, OF_BEFORE, "r")["end"]
    dtype = token_type(len(tokenizer))
    begin = int(ends[place - 1]) if place else 0
    if np.fromfile(folder / TOKENS, dtype, 1, offset=begin * dtype.itemsize).tolist() != start.tolist():
        raise CheckpointError(
            f"{folder} was made when texts did not begin with the tokenizer's start token; {OF_BEFORE}"
        )


def require_shard(folder: Path, record: Mapping[str, Any], digest: str) -> None:
    """CheckpointError unless a shard is whole and was made of the documents of a hash."""
    verify_shard(folder, record)
    if record["documents_sha256"] != digest:
        raise CheckpointError(
            f"{folder} was made of other documents: the source has changed since; restore it, or choose another folder"
        )


def read_record(folder: Path, counts: Sequence[str] = COUNTS) -> dict[str, Any]:
    """The record of a shard; CheckpointError if it is missing or none.

    Args:
        counts: that it must have.
    """
    record = read_json(folder / RECORD, f"remove {folder}, and the same command makes it again")
    good = (
        isinstance(record, dict)
        and all(is_int(record.get(name)) for name in counts)
        and isinstance(record.get("documents_sha256"), str)
        and isinstance(record.get("files"), dict)
    )
    if not good:
        raise CheckpointError(
            f"{folder / RECORD} is no record of a shard; remove {folder}, and the same command makes it again"
        )
    return record


def verify_shard(folder: Path, record: Mapping[str, Any]) -> None:
    """CheckpointError unless the files of a shard have the hashes of its record."""
    verify_files(folder, record["files"], f"remove {folder}, and the same command makes it again")


def documents_hash(documents: Iterable[Document]) -> str:
    """SHA-256, hexadecimal, of documents with all that is known of them, in this order."""
    found = hashlib.sha256()
    for x in documents:
        values = (x.key, x.source, x.copies, x.kind, x.isolation, x.messages, x.prompt, x.cluster, x.extra)
        found.update(utf8(f"{values!r}\0{x.text}\0", f"the document {x.text!r:.60}"))
    return found.hexdigest()


def cut_into_shards(documents: Iterable[Document], characters: int) -> Iterator[list[Document]]:
    """Consecutive documents of at least `characters` characters together, the last ones fewer; it depends on nothing else."""
    shard: list[Document] = []
    size = 0
    for document in documents:
        shard.append(document)
        size += len(document.text)
        if size >= characters:
            yield shard
            shard, size = [], 0
    if shard:
        yield shard


def _write_tokens(
    path: Path, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, first: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """(sizes of the documents in tokens, which tokens are targets or None)."""
    dtype, sizes, masks = token_type(len(tokenizer)), [], []
    with path.open("wb") as file:
        for batch in cut_into_shards(documents, AT_ONCE):
            tokens, targets = encode_documents(tokenizer, batch, first=first + len(sizes))
            sizes += [len(x) for x in tokens]
            masks += targets or [None] * len(tokens)
            file.write(np.concatenate(tokens).astype(dtype).tobytes())
    if all(mask is None for mask in masks):
        return np.array(sizes, np.int64), None
    whole = [np.ones(size, bool) if mask is None else mask for mask, size in zip(masks, sizes, strict=True)]
    return np.array(sizes, np.int64), np.concatenate(whole)


# The table


def _write_table(path: Path, documents: Sequence[Document], index: np.ndarray, settings: ShardSettings) -> None:
    pyarrow = import_optional("pyarrow", "to write a corpus")
    parquet = import_optional("pyarrow.parquet", "to write a corpus")
    text, number = pyarrow.string(), pyarrow.int64()
    columns: dict[str, tuple[Any, list[Any]]] = {
        "document_id": (text, [str(x) for x in index["document_id"].tolist()]),
        "group": (text, [str(x) for x in index["group"].tolist()]),
        "cluster": (text, [x.cluster for x in documents]),
        "key": (text, [x.key for x in documents]),
        "source": (text, [x.source for x in documents]),
        "copies": (number, index["copies"].tolist()),
        "tokens": (number, np.diff(index["end"], prepend=0).tolist()),
        "kind": (text, [x.kind for x in documents]),
        "isolation": (text, [x.isolation for x in documents]),
        "prompt": (number, [x.prompt for x in documents]),
        "messages": (text, [None if x.messages is None else _json(x.messages) for x in documents]),
        "text": (text, [None if x.messages is not None else x.text for x in documents]),
    }
    if clash := sorted(columns.keys() & set(settings.carry)):
        raise DataError(f"the columns {', '.join(clash)} cannot be carried along: the corpus has columns of that name")
    for name in settings.carry:
        columns[name] = (text, [_carried((x.extra or {}).get(name)) for x in documents])
    schema = pyarrow.schema([(name, kind) for name, (kind, _) in columns.items()])
    table = pyarrow.table({name: values for name, (_, values) in columns.items()}, schema=schema)
    parquet.write_table(table, path, compression="zstd", row_group_size=ROW_GROUP)


def _carried(value: Any) -> str | None:
    return value if value is None or isinstance(value, str) else _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def read_table(path: Path, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
    """The rows of a table; CheckpointError if it is missing or damaged."""
    pyarrow = import_optional("pyarrow", f"to read {path}")
    parquet = import_optional("pyarrow.parquet", f"to read {path}")
    try:
        with parquet.ParquetFile(path) as table:
            for batch in table.iter_batches(ROW_GROUP, columns=None if columns is None else list(columns)):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise CheckpointError(f"{path} is missing or damaged ({error}); make the corpus anew") from error


def document_of_row(row: Mapping[str, Any], carry: Sequence[str]) -> Document:
    """The document that a row of the table was made of; what was carried along is text. CheckpointError for another row."""
    plain = ("key", "source", "copies", "kind", "isolation", "prompt", "cluster")
    try:
        messages = None if row["messages"] is None else json.loads(row["messages"])
        extra = {name: row[name] for name in carry if row[name] is not None}
        values = {name: row[name] for name in plain}
        return Document(text=row["text"] or "", messages=messages, extra=extra or None, **values)
    except (KeyError, ValueError, TypeError) as error:
        raise CheckpointError(f"the table of a shard is damaged ({error!r}); make the corpus anew") from error
