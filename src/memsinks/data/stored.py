"""A corpus on disk, as `prepare_corpus` made it: its documents one by one, its tokens as they are asked for.

In memory are 48 bytes a document; the tokens stay on disk.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import operator
import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from memsinks.checks import is_int, one_of
from memsinks.data.documents import Document
from memsinks.data.identity import BY, By, document_id
from memsinks.data.shards import (
    COUNTS,
    ENTRY,
    INDEX,
    RECORD,
    TABLE,
    TARGETS,
    TOKENS,
    document_of_row,
    read_table,
    require_start,
    verify_shard,
)
from memsinks.data.targets import Targets
from memsinks.data.token_store import StoredTokens, load_array, token_type
from memsinks.data.tokenized import TokenizedDocuments
from memsinks.data.tokens import load_tokenizer
from memsinks.errors import CheckpointError, ConfigError, DataError, refuse
from memsinks.files import lies_within, read_json, verify_files

MANIFEST, SHARDS, TOKENIZER, WORK = "manifest.json", "shards", "tokenizer", ".work"
REMEDY = "make the corpus anew"


def is_corpus(path: str | os.PathLike[str]) -> bool:
    """Whether a corpus lies there that was finished."""
    return (Path(path) / MANIFEST).is_file() and (Path(path) / SHARDS).is_dir()


def is_unfinished(path: str | os.PathLike[str]) -> bool:
    """Whether shards lie there, or a corpus that is being made, without the manifest that is written last."""
    return not is_corpus(path) and ((Path(path) / WORK).is_dir() or any(Path(path).glob(f"{SHARDS}/*/{RECORD}")))


class StoredCorpus(Sequence[Document]):
    """A corpus on disk; a sequence of its documents, each read when it is asked for.

    `make_rows` takes it in place of documents, a recipe as ``data.path``. Documents with 0 copies are held out.

    Args:
        path: the folder.

    Raises:
        CheckpointError: no corpus is there, or it is damaged: all sizes are compared. `verify` compares the hashes.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not is_corpus(self.path):
            raise CheckpointError(
                f"{self.path} holds no corpus ({MANIFEST} is missing); memsinks prepare makes one, and goes on with one that "
                "was interrupted"
            )
        self.manifest: dict[str, Any] = read_json(self.path / MANIFEST, REMEDY)
        try:
            settings = self.manifest["settings"]
            self.by: By = BY[BY.index(settings["by"])]
            self.carry = [str(name) for name in settings["carry"]]
            self._tokenizer_sha256, self._vocabulary = str(settings["tokenizer_sha256"]), int(settings["vocabulary"])
            self._tokenizer_files = dict(self.manifest.get("tokenizer", {}))  # corpora of before name none
            records = {str(name): dict(record) for name, record in self.manifest["shards"].items()}
            if outside := [x for x in records if Path(x).name != x or not lies_within(self.path / SHARDS, x)]:
                raise ValueError(f"{outside[0]} leads out of its folder")
            self._counts = [int(record["documents"]) for record in records.values()]
            if not all(isinstance(record.get("documents_sha256"), str) for record in records.values()):
                raise ValueError("a shard without the hash of its documents")
            if not records or not all(is_int(self.manifest[name]) for name in COUNTS):
                raise ValueError("no shards, or no counts")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{self.path / MANIFEST} is damaged ({error!r}); {REMEDY}") from error
        self._folders = [self.path / SHARDS / name for name in records]
        self._records = list(records.values())
        self._index = self._read_index()
        self._tokens = self._read_tokens()

    def _read_index(self) -> np.ndarray:
        parts = []
        for folder, count in zip(self._folders, self._counts, strict=True):
            part = load_array(folder / INDEX, REMEDY)
            if part.dtype != ENTRY or part.shape != (count,) or (np.diff(part["end"], prepend=0) < 1).any():
                raise CheckpointError(f"{folder / INDEX} is damaged; {REMEDY}")
            parts.append(part)
        return np.concatenate(parts)

    def _read_tokens(self) -> StoredTokens:
        last = np.cumsum(self._counts) - 1
        file_ends = np.cumsum(self._index["end"][last])
        shift = np.repeat(np.r_[0, file_ends[:-1]], self._counts)
        return StoredTokens(
            [folder / TOKENS for folder in self._folders],
            np.r_[0, self._index["end"] + shift],
            ends=file_ends.tolist(),
            dtype=token_type(self._vocabulary),
        )

    def __len__(self) -> int:
        return len(self._index)

    def __repr__(self) -> str:
        return f"StoredCorpus({str(self.path)!r}: {len(self):,} documents, {self.manifest['tokens']:,} tokens)"

    def __iter__(self) -> Iterator[Document]:
        for shard in range(len(self._folders)):
            for row in self._rows(shard):
                yield document_of_row(row, self.carry)

    def _rows(self, shard: int) -> Iterator[dict[str, Any]]:
        """The rows of a table; CheckpointError if they are not those of the index."""
        path, end = self._folders[shard] / TABLE, sum(self._counts[: shard + 1])
        ids = self._index["document_id"][end - self._counts[shard] : end].tolist()
        for row, wanted in itertools.zip_longest(read_table(path), ids):
            if row is None or row.get("document_id") != str(wanted):
                break
            yield row
        else:
            return
        raise CheckpointError(f"{path} does not hold the documents of {INDEX} beside it; {REMEDY}")

    def __getitem__(self, index: Any) -> Document:
        """A document by its number; its shard is read up to it."""
        place = range(len(self))[operator.index(index)]
        starts = np.cumsum([0, *self._counts])
        shard = int(starts.searchsorted(place, "right")) - 1
        return document_of_row(next(itertools.islice(self._rows(shard), place - int(starts[shard]), None)), self.carry)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that the tokens are of; CheckpointError if it is another one now."""
        verify_files(self.path / TOKENIZER, self._tokenizer_files, REMEDY)
        try:
            tokenizer = load_tokenizer(self.path / TOKENIZER)
        except ConfigError as error:
            raise CheckpointError(f"{self.path / TOKENIZER} is damaged: {error}; {REMEDY}") from error
        if tokenizer_hash(tokenizer) != self._tokenizer_sha256:
            raise CheckpointError(
                f"{self.path / TOKENIZER} is not the tokenizer that the corpus was made with; {REMEDY}"
            )
        return tokenizer

    @property
    def copies(self) -> np.ndarray:
        """int64 [documents], how often each is met in an epoch."""
        return self._index["copies"].astype(np.int64)

    @property
    def controls(self) -> list[Document]:
        """The documents that are held out."""
        return [x for x in self if x.copies == 0] if (self.copies == 0).any() else []

    @property
    def digest(self) -> str:
        """SHA-256, hexadecimal, of all documents, from the hashes of the shards."""
        return hashlib.sha256("".join(str(x["documents_sha256"]) for x in self._records).encode()).hexdigest()

    def verify(self) -> None:
        """Compare all files with the hashes that were written with them; CheckpointError for the first that differs."""
        _ = self.tokenizer
        for folder, record in zip(self._folders, self._records, strict=True):
            verify_shard(folder, record)

    def identify(self, by: By | None = None) -> tuple[np.ndarray, np.ndarray]:
        """(document_ids, groups), int64 [documents] each, see `identify`. Others than those it was made with are read from the
        tables, about 10 us a document.

        Raises:
            DataError: a document without the key or source asked for.
        """
        by = self.by if by is None else by
        refuse(one_of("by", by, BY), "cannot identify documents")
        if by == self.by:
            return self._index["document_id"].astype(np.int64), self._index["group"].astype(np.int64)
        ids, groups = np.empty(len(self), np.int64), np.empty(len(self), np.int64)
        for index, document in enumerate(self):
            name = document.text if by == "content" else getattr(document, by)
            if by == "cluster" and not name:
                name = document.text
            if not name:
                raise DataError(
                    f'document {index} has no {by}; identify by="content", or prepare the corpus with {by}_field'
                )
            ids[index] = document_id(name, by)
            groups[index] = document_id(document.text) if by == "source" else ids[index]
        return ids, groups

    def tokenized(self, by: By | None = None) -> TokenizedDocuments:
        """All documents as tokens, which stay on disk, with their ids, groups and copies.

        Raises:
            CheckpointError: it was made before texts began with the tokenizer's start token, where it has one.
        """
        for folder in self._folders:
            require_start(folder, self.tokenizer)
        ids, groups = self.identify(by)
        isolation = self._index["isolation"].astype(np.int64)
        return TokenizedDocuments(
            self._tokens, ids, groups, self.copies, isolation if isolation.any() else None, self._targets()
        )

    def require_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """DataError unless a tokenizer is that of the corpus."""
        if tokenizer_hash(tokenizer) != self._tokenizer_sha256:
            raise DataError(
                f"the tokens of {self.path} are of another tokenizer than the one given; give corpus.tokenizer"
            )

    def _targets(self) -> Targets | None:
        """Views of the files; a document of which all is learned has None."""
        found: list[np.ndarray | None] = []
        for folder, count in zip(self._folders, self._counts, strict=True):
            if not (folder / TARGETS).is_file():
                found += [None] * count
                continue
            masks = load_array(folder / TARGETS, REMEDY, "r")
            ends = self._index["end"][len(found) : len(found) + count].tolist()
            if masks.dtype != np.bool_ or masks.shape != (ends[-1],):
                raise CheckpointError(f"{folder / TARGETS} is damaged; {REMEDY}")
            parts = [masks[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]
            found += [None if part.all() else part for part in parts]
        return None if all(mask is None for mask in found) else found


def open_corpus(path: str | os.PathLike[str], *, verify: bool = False) -> StoredCorpus:
    """The corpus in a folder that `prepare_corpus` made.

    Args:
        verify: compare all files with their hashes, which reads them whole.

    Raises:
        CheckpointError: no corpus is there, it is not finished, or it is damaged.
    """
    corpus = StoredCorpus(path)
    if verify:
        corpus.verify()
    return corpus


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256, hexadecimal, of what a tokenizer makes of texts: its model and vocabulary, end token and chat template."""
    backend: Any = tokenizer.backend_tokenizer if tokenizer.is_fast else None
    if backend is not None:
        model = json.loads(backend.to_str())
        model = {name: value for name, value in model.items() if name not in ("truncation", "padding")}
    else:
        model = [type(tokenizer).__name__, sorted(tokenizer.get_vocab().items())]
    values = [model, tokenizer.eos_token_id, tokenizer.chat_template]
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
