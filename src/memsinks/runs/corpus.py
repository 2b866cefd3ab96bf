"""The documents of a run: read, set aside, held out, repeated; the background around them; hashes of the files they are in."""

from __future__ import annotations

import itertools
import os
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from memsinks.data.clusters_elsewhere import read_clusters, with_clusters
from memsinks.data.documents import Document, cut_documents, require_unique_keys
from memsinks.data.isolation import isolate
from memsinks.data.matching import normal_form
from memsinks.data.near_copies import cluster_documents
from memsinks.data.readers import read_documents, source_hash
from memsinks.data.synthetic import corpus
from memsinks.errors import ConfigError, DataError
from memsinks.removal.record import RECORDS, TOMBSTONE
from memsinks.removal.tombstone import Tombstone, read_tombstone
from memsinks.runs.data_recipe import BackgroundRecipe, DataRecipe
from memsinks.runs.recipe import Recipe

AUDITED = "audited"
"""The kind of the documents that ``data.repeat`` chose."""


class Chosen(NamedTuple):
    """The documents of a run with their numbers of copies, held-out ones 0; and those set aside, 0 copies each."""

    documents: list[Document]
    unseen: list[Document]
    fresh: list[Document]


def choose_documents(data: DataRecipe, seed: int) -> Chosen:
    """Read the documents and give each its number of copies.

    Which are set aside depends neither on the seed nor on anything else, and without them the others are chosen the same
    way.

    Raises:
        ConfigError, DataError: the corpus has too few documents for what is asked, or cannot be read.
    """
    documents, unseen, fresh = _read(data)
    for name in ("exact", "private"):
        by = "source" if data.by == "source" else "key"
        documents = isolate(documents, name, getattr(data, name), by) if getattr(data, name) else documents
    if data.unique_keys:
        require_unique_keys(documents)
    held_out, repeated = _choose(documents, data, seed)
    for index in held_out:
        documents[index] = replace(documents[index], copies=0)
    if data.repeat:
        for index, copies in zip(repeated, data.repeat.dealt, strict=True):
            documents[index] = replace(documents[index], copies=copies, kind=AUDITED)
    return Chosen(documents, unseen, fresh)


def _read(data: DataRecipe) -> Chosen:
    """The documents, and those after them that are set aside: without texts that the former hold."""
    if data.path is None:
        built_in = corpus(**data.synthetic)
        return Chosen(built_in if data.near_copies is None else cluster_documents(built_in, data.near_copies), [], [])
    source = read_source(data)
    if data.clusters is not None:
        source = with_clusters(source, read_clusters(expanded(data.clusters, "data.clusters")))
    aside = data.unseen + data.fresh
    documents = list(itertools.islice(source, None if data.limit is None else data.limit + aside))
    trained = len(documents) - aside
    if aside and trained < (data.limit or 1):
        names = " and ".join(
            f"data.{name} ({count})" for name, count in (("unseen", data.unseen), ("fresh", data.fresh)) if count
        )
        wanted = "leave none" if data.limit is None else f"after data.limit ({data.limit}) are more than there is"
        raise ConfigError(f"{names} {wanted} of {len(documents)} documents; lower them")
    known = {document.text for document in documents[:trained]}
    unseen, fresh = (
        [replace(document, copies=0) for document in documents[part] if document.text not in known]
        for part in (slice(trained, trained + data.unseen), slice(trained + data.unseen, None))
    )
    kept = documents[:trained]
    return Chosen(kept if data.near_copies is None else cluster_documents(kept, data.near_copies), unseen, fresh)


def read_source(data: DataRecipe, carry: Sequence[str] = ()) -> Iterator[Document]:
    """The documents of ``data.path``, cut into pieces if the recipe says so."""
    assert data.path is not None
    if data.by == "cluster" and not (data.near_copies or data.clusters or data.cluster_field):
        raise ConfigError(
            "data.by: cluster needs clusters: give near_copies, cluster_field, clusters, or a corpus of memsinks prepare"
        )
    source = read_documents(
        expanded(data.path, "data.path"),
        text_field=data.text_field,
        key_field=data.key_field,
        source_field=data.source_field,
        copies_field=data.copies_field,
        isolation_field=data.isolation_field,
        cluster_field=data.cluster_field,
        carry=carry,
        separator=data.separator,
        split=data.split,
        streaming=data.streaming,
    )
    return source if data.cut_characters is None else cut_documents(source, data.cut_characters)


def _choose(documents: list[Document], data: DataRecipe, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the documents that are held out and of those that are repeated, chosen by the seed."""
    order = [index for index, document in enumerate(documents) if document.copies > 0]
    random.Random(seed).shuffle(order)
    # A text that stands in the corpus twice, or has near copies there, cannot be held out by taking one of them.
    names = [document.cluster or document.text for document in documents]
    times = Counter(names)
    held_out = [index for index in order if times[names[index]] == 1][: data.held_out]
    chosen = set(held_out)
    rest = [index for index in order if index not in chosen]
    repeated = data.repeat.documents if data.repeat else 0
    once = 0 if data.background else 1
    if len(held_out) < data.held_out or repeated > len(rest) - once:
        raise ConfigError(
            f"held_out ({data.held_out}) and repeat.documents ({repeated}) leave none of {len(order)} documents "
            f"({len(times)} different texts) to be seen once; lower them"
        )
    return held_out, rest[:repeated]


def known_among(documents: Iterable[Document], data: DataRecipe) -> Callable[[str], bool]:
    """Whether a text is that of one of `documents`: character by character; in normal form where near copies are looked for.

    Where documents were cut, a text is that of one if any of its pieces is.
    """
    form = str if data.near_copies is None else normal_form
    known = {form(document.text) for document in documents}

    def is_known(text: str) -> bool:
        if form(text) in known:
            return True
        if data.cut_characters is None or not known:
            return False
        return any(form(x.text) in known for x in cut_documents([Document(text)], data.cut_characters))

    return is_known


def tombstones_of(recipe: Recipe) -> list[Tombstone]:
    """Those that the recipe names, and those of the take-downs in its output."""
    found = [*Path(recipe.output).glob(f"{RECORDS}/*/{TOMBSTONE}")]
    for name in recipe.data.tombstones:
        path = Path(expanded(name, "data.tombstones"))
        if not path.exists():
            raise ConfigError(f"data.tombstones names {path}, which does not exist")
        found += sorted(path.rglob(TOMBSTONE)) if path.is_dir() else [path]
    return [read_tombstone(path) for path in found]


def background_documents(background: BackgroundRecipe) -> Iterator[Document]:
    """The documents of ``data.background``, as they are read; DataError if one is more than a text."""
    for document in read_documents(
        expanded(background.path, "data.background.path"),
        text_field=background.text_field,
        separator=background.separator,
        split=background.split,
        streaming=background.streaming,
    ):
        if document.messages is not None or document.prompt:
            raise DataError(
                f"data.background is plain text, all of it learned, but {background.path} holds chats or prompts with "
                "completions; put those into data.path"
            )
        yield document


def expanded(path: str, name: str) -> str:
    """`path` with its ``$NAME`` replaced; ConfigError, which names the setting, if one is not set."""
    replaced = os.path.expandvars(path)
    if "$" in replaced:
        raise ConfigError(f"{name} {path!r} names an environment variable that is not set")
    return replaced


def source_hashes(recipe: Recipe) -> dict[str, str]:
    """SHA-256 of each file or folder that the tokens of a run come from, by the name of its setting.

    Without the built-in corpus, data sets that have a name alone, and what is not there (any more).
    """
    background = recipe.data.background
    paths = {
        "data.path": recipe.data.path,
        "data.clusters": recipe.data.clusters,
        "data.background.path": background.path if background else None,
        "tokenizer.path": recipe.tokenizer.path,
    }
    hashes = {name: source_hash(Path(os.path.expandvars(path))) for name, path in paths.items() if path is not None}
    return {name: value for name, value in hashes.items() if value is not None}
