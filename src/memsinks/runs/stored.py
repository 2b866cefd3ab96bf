"""A corpus on disk: made of what the section `data` of a recipe says, and read in its place by a run."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memsinks.data.clusters_elsewhere import read_clusters, with_clusters
from memsinks.data.documents import Document, texts_hash
from memsinks.data.identity import By, identify
from memsinks.data.preparation import SHARD_CHARACTERS, prepare_corpus
from memsinks.data.readers import source_hash
from memsinks.data.shards import documents_hash
from memsinks.data.stored import StoredCorpus, is_corpus, is_unfinished, tokenizer_hash
from memsinks.data.synthetic import corpus
from memsinks.data.tokens import load_tokenizer
from memsinks.errors import ConfigError, refuse
from memsinks.removal.tombstone import Tombstone, read_tombstone, refuse_tombstoned
from memsinks.runs.corpus import expanded, read_source, tombstones_of
from memsinks.runs.data_recipe import DataRecipe
from memsinks.runs.recipe import PLAIN_TOKENIZER, Recipe, TokenizerRecipe
from memsinks.runs.tokenizer import tokenizer_of_corpus

CHOICES = ("held_out", "unseen", "fresh", "repeat", "background", "exact", "private", "unique_keys", "shadow")
"""Settings that choose among all documents, which only a run that has them in memory can."""
OF_RUNS = ("path", "by", "long", "one_document_per_row", "shadow", "tombstones")
"""Settings that a run on a corpus on disk may have."""
CHECKED = 1000
"""Documents that are compared with tombstones at a time."""


def prepare_data(
    data: DataRecipe,
    tokenizer: TokenizerRecipe,
    out: str | os.PathLike[str],
    *,
    carry: Sequence[str] = (),
    workers: int | None = None,
    shard_characters: int = SHARD_CHARACTERS,
) -> StoredCorpus:
    """Make the corpus on disk that a section `data` describes, see `prepare_corpus`.

    Raises:
        ConfigError: settings that choose among all documents (copies, controls and isolation come from their fields instead).
        DataError, CheckpointError: as `prepare_corpus`; a document that was taken down.
    """
    plain = DataRecipe()
    wrong = [name for name in CHOICES if getattr(data, name) != getattr(plain, name)]
    problems = [
        f"data.{name} chooses among all documents, which `train` does; leave it out, and give copies_field (0 = held out) or "
        "isolation_field"
        for name in wrong
    ]
    if carry and data.path is None:
        problems.append("the built-in corpus has no columns to carry along")
    refuse(problems, "cannot prepare a corpus")
    tombstones = _named_tombstones(data)
    clusters = None if data.clusters is None else read_clusters(expanded(data.clusters, "data.clusters"))

    def documents() -> Iterator[Document]:
        found = corpus(**data.synthetic) if data.path is None else read_source(data, carry)
        found = itertools.islice(found, data.limit)
        return _checked(found if clusters is None else with_clusters(found, clusters), tombstones)

    documents()  # what is wrong with the settings is said before anything is written
    return prepare_corpus(
        documents,
        tokenizer_of_corpus(tokenizer, documents, Path(out)),
        out,
        by=data.by,
        carry=carry,
        near_copies=data.near_copies,
        shard_characters=shard_characters,
        workers=workers,
        source=_source(data) | {"vocab_size": tokenizer.vocab_size},
    )


def _source(data: DataRecipe) -> dict[str, Any]:
    """What the documents follow from: settings, and hashes of files instead of where they lie."""
    values = dataclasses.asdict(data)
    for name in (*CHOICES, *OF_RUNS, "near_copies"):
        values.pop(name, None)
    for name in ("path", "clusters"):
        path = getattr(data, name)
        values[name] = None if path is None else source_hash(expanded(path, f"data.{name}")) or path
    return values


def _named_tombstones(data: DataRecipe) -> list[Tombstone]:
    paths = [Path(expanded(name, "data.tombstones")) for name in data.tombstones]
    missing = [str(path) for path in paths if not path.exists()]
    if missing:
        raise ConfigError(f"data.tombstones names {', '.join(missing)}, which does not exist")
    return [
        read_tombstone(file) for path in paths for file in ([path] if path.is_file() else path.rglob("tombstone.json"))
    ]


def _checked(documents: Iterable[Document], tombstones: Sequence[Tombstone]) -> Iterator[Document]:
    if not tombstones:
        yield from documents
        return
    source, done = iter(documents), 0
    while batch := list(itertools.islice(source, CHECKED)):
        refuse_tombstoned(batch, tombstones, first=done)
        yield from batch
        done += len(batch)


# In a run


class Members(Sequence[Document]):
    """The documents of a corpus on disk that are trained on, each read when it is asked for."""

    def __init__(self, stored: StoredCorpus) -> None:
        self.stored = stored
        self.places = np.flatnonzero(stored.copies)

    def __len__(self) -> int:
        return len(self.places)

    def __iter__(self) -> Iterator[Document]:
        return (document for document in self.stored if document.copies)

    def __getitem__(self, index: Any) -> Document:
        return self.stored[int(self.places[index])]


def stored_of(recipe: Recipe) -> StoredCorpus | None:
    """The corpus on disk that a recipe's ``data.path`` is; None if it is something else.

    Raises:
        ConfigError: settings that say how other data is read; a tokenizer that is not the corpus's.
        CheckpointError: the corpus is not finished, or damaged. DataError: a document was taken down.
    """
    data = recipe.data
    path = None if data.path is None else Path(expanded(data.path, "data.path")).expanduser()
    if path is None or not path.is_dir() or not (is_corpus(path) or is_unfinished(path)):
        return None
    stored = StoredCorpus(path)
    values, plain = dataclasses.asdict(data), dataclasses.asdict(DataRecipe())
    wrong = [f"data.{name}" for name in values if name not in OF_RUNS and values[name] != plain[name]]
    problems = (
        [f"{', '.join(wrong)} say how other data is read; {path} is a finished corpus, leave them out"] if wrong else []
    )
    if recipe.tokenizer.path is not None:
        own = load_tokenizer(expanded(recipe.tokenizer.path, "tokenizer.path"))
        if tokenizer_hash(own) != tokenizer_hash(stored.tokenizer):
            problems.append(
                f"tokenizer.path is not the tokenizer of {path}; leave the section out, the corpus has its own"
            )
    size, own_size = recipe.tokenizer.vocab_size, _vocab_size(stored)
    if size is not None and size != own_size and recipe.tokenizer != PLAIN_TOKENIZER:
        problems.append(
            f"tokenizer.vocab_size is {size}, but {path} has its own tokenizer of {own_size}; leave the section out"
        )
    refuse(problems, "cannot use the recipe")
    if tombstones := tombstones_of(recipe):
        for _ in _checked(stored, tombstones):
            pass
    return stored


def _vocab_size(stored: StoredCorpus) -> int:
    """What a tokenizer was asked to have when it was trained for a corpus, or what it has."""
    source = stored.manifest["settings"].get("source")
    asked = source.get("vocab_size") if isinstance(source, dict) else None
    return asked or int(stored.manifest["settings"]["vocabulary"])


def ids_of(members: Sequence[Document], by: By) -> np.ndarray:
    """int64 [members], their document ids."""
    if isinstance(members, Members):
        return members.stored.identify(by)[0][members.places]
    return identify(members, by)[0]


def members_hash(members: Sequence[Document]) -> str:
    """SHA-256, hexadecimal, of the documents that are trained on; of a corpus on disk from the hashes of its shards."""
    return members.stored.digest if isinstance(members, Members) else texts_hash(members)


def identity_hash(members: Sequence[Document]) -> str:
    """SHA-256, hexadecimal, of all that is known of these documents: ids, isolation and targets follow from it."""
    return members.stored.digest if isinstance(members, Members) else documents_hash(members)
