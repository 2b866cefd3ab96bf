"""Documents -> a corpus on disk, in shards: streaming, in parallel, resumed after a kill.

corpus/shards/00000/ ...   see `shards`
corpus/tokenizer/          the tokenizer
corpus/manifest.json       settings, counts, hashes of all shards, what was found of near copies; written last
corpus/.work/              while it is made: settings, shingles, clusters

The documents are cut into shards by their characters, one after the other, whatever the number of workers; a shard is written
beside its place and renamed. So a corpus has the same bytes however many workers made it and however often they were killed.
In memory are one shard of text for each worker and two more, and what a worker makes of its own; near copies add what `clusters`
says.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from memsinks._version import versions
from memsinks.checks import int_at_least, one_of
from memsinks.data.clusters import NearCopies, Shingled, cluster
from memsinks.data.documents import Document
from memsinks.data.identity import BY, By
from memsinks.data.near_copies import cluster_names, said, shingled
from memsinks.data.shards import (
    RECORD,
    ShardSettings,
    cut_into_shards,
    documents_hash,
    read_record,
    require_shard,
    write_shard,
)
from memsinks.data.stored import MANIFEST, SHARDS, TOKENIZER, WORK, StoredCorpus, tokenizer_hash
from memsinks.data.token_store import load_array
from memsinks.data.tokens import encoding_problems, save_tokenizer
from memsinks.data.workers import Workers, cores
from memsinks.errors import CheckpointError, DataError, MemsinksError, refuse
from memsinks.files import file_hash, file_hashes, locked, read_json, remove_leftovers, write_json, written_beside
from memsinks.provenance import refuse_other_settings

logger = logging.getLogger(__name__)

SETTINGS, SHINGLES, CLUSTERS, REPORT, SCRATCH = (
    "settings.json", "shingles", "clusters.npy", "near_copies.json", "scratch",
)  # fmt: skip
SHARD_CHARACTERS = 1 << 24
FORMAT = 1
Documents = Callable[[], Iterable[Document]]
"""Gives the documents, in the same order at each call."""


def prepare_corpus(
    documents: Documents,
    tokenizer: PreTrainedTokenizerBase,
    out: str | os.PathLike[str],
    *,
    by: By = "content",
    carry: Iterable[str] = (),
    near_copies: NearCopies | None = None,
    shard_characters: int = SHARD_CHARACTERS,
    workers: int | None = None,
    source: Any = None,
) -> StoredCorpus:
    """Make a corpus on disk, or go on with one that was interrupted; one that is finished is opened.

    Args:
        documents: a function that gives the documents, in the same order at each call, e.g.
            ``lambda: ms.read_documents("texts/")``. It is called twice where near copies are looked for, and again on resuming.
        tokenizer: one of transformers; it is kept with the corpus.
        out: the folder, new or one of this corpus.
        by: what gives a document its id, see `identify`; other ids can be had from the corpus later.
        carry: columns of `Document.extra` that are written beside each document, as text.
        near_copies: look for near copies, see `clusters.NearCopies`; they replace the clusters that documents have.
        shard_characters: a shard has at least so many characters. Least memory and most files with few.
        workers: processes; None = one a core. A script that asks for several needs ``if __name__ == "__main__":``.
        source: what tells this input from another, of values that JSON holds (a hash): a change is refused on resuming.

    Raises:
        ConfigError: settings out of range, all at once.
        DataError: documents that cannot be used; none at all.
        CheckpointError: `out` is something else, was made with other settings or of other documents, or cannot be written.
    """
    carried = tuple(carry)
    problems = (
        encoding_problems(tokenizer) + one_of("by", by, BY) + int_at_least("shard_characters", shard_characters, 1)
    )
    problems += [] if workers is None else int_at_least("workers", workers, 1)
    refuse(problems, "cannot prepare a corpus")
    folder = Path(out)
    settings = corpus_settings(tokenizer, by, carried, shard_characters, near_copies, source)
    with opened(folder, settings, tokenizer) as finished:
        if not finished:
            pool = Workers(workers or cores(), folder / TOKENIZER)
            with pool:
                names, report = None, None
                if near_copies is not None:
                    names, report = _clusters(documents, folder, near_copies, shard_characters, pool)
                _write_shards(documents, folder, ShardSettings(by, carried), names, shard_characters, pool)
            finish_corpus(folder, settings, report)
    return StoredCorpus(folder)


def corpus_settings(
    tokenizer: PreTrainedTokenizerBase,
    by: By,
    carry: Iterable[str],
    shard_characters: int,
    near_copies: NearCopies | None = None,
    source: Any = None,
) -> dict[str, Any]:
    """What the bytes of a corpus follow from, besides its documents; see `prepare_corpus`."""
    return {
        "by": by,
        "carry": list(carry),
        "near_copies": None if near_copies is None else asdict(near_copies),
        "shard_characters": int(shard_characters),
        "tokenizer_sha256": tokenizer_hash(tokenizer),
        "vocabulary": len(tokenizer),
        "source": source,
        "format_version": FORMAT,
    }


@contextmanager
def opened(folder: Path, settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Iterator[bool]:
    """The folder of a corpus, locked, while it is made; gives whether it is finished.

    Raises:
        CheckpointError: something else lies there, another process is at work there, or it cannot be written.
    """
    work = folder / WORK
    try:
        entries = {x.name for x in folder.iterdir()} if folder.is_dir() else set()
        if entries and not entries & {MANIFEST, WORK}:
            raise CheckpointError(f"{folder} is not empty and holds no corpus; choose another folder")
        if MANIFEST not in entries:
            work.mkdir(parents=True, exist_ok=True)
        with locked(folder, "another process prepares it; wait for it"):
            yield _finished(folder, work, settings, tokenizer)
    except OSError as error:
        if isinstance(error, MemsinksError):
            raise
        raise CheckpointError(f"cannot write into {folder}: {error}; free space, or choose another folder") from error


def _finished(folder: Path, work: Path, settings: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Refuse other settings than before, remove what killed writes left, write what comes before the first shard."""
    manifest = folder / MANIFEST
    before = manifest if manifest.is_file() else work / SETTINGS
    if before.is_file():
        stored = read_json(before, f"remove {folder}, and make it anew")
        stored = stored.get("settings", {}) if before == manifest and isinstance(stored, dict) else stored
        refuse_other_settings(stored, settings, folder, remedy="choose another folder, or remove it")
    if manifest.is_file():
        shutil.rmtree(work, ignore_errors=True)
        return True
    for place in (folder, folder / SHARDS, work, work / SHINGLES):
        remove_leftovers(place, age=0)
    write_json(work / SETTINGS, settings)
    shutil.rmtree(folder / TOKENIZER, ignore_errors=True)
    with written_beside(folder / TOKENIZER) as part:
        save_tokenizer(tokenizer, part)
    return False


def finish_corpus(folder: Path, settings: dict[str, Any], report: dict[str, Any] | None) -> None:
    """Write the manifest of all shards in `folder`, and drop what was kept while they were made.

    Raises:
        DataError: there are no shards. CheckpointError: one is damaged.
    """
    names = sorted(x.name for x in (folder / SHARDS).glob("[!.]*") if (x / RECORD).is_file())
    records = {name: read_record(folder / SHARDS / name) for name in names}
    if not records:
        raise DataError(f"{folder} has no shards: there were no documents")
    totals = ("documents", "trained", "tokens", "tokens_with_copies")
    manifest = {
        "settings": settings,
        **{name: sum(record[name] for record in records.values()) for name in totals},
        "near_copies": report,
        "versions": versions("tokenizers", "transformers", "numpy", "pyarrow", *(["rensa"] if report else [])),
        "tokenizer": file_hashes(folder / TOKENIZER),
        "shards": records,
    }
    write_json(folder / MANIFEST, manifest)
    shutil.rmtree(folder / WORK, ignore_errors=True)


# Passes over the documents


def _write_shards(
    documents: Documents,
    folder: Path,
    settings: ShardSettings,
    names: np.ndarray | None,
    characters: int,
    pool: Workers,
) -> None:
    tasks = (
        (shard, folder / SHARDS / f"{number:05d}", settings, first)
        for number, first, shard in _shards(documents, characters, names)
    )
    count = 0
    with tqdm(desc="tokens", unit="tokens", unit_scale=True, disable=None) as bar:
        for record in pool.run(_encode, tasks):
            count += 1
            bar.update(record["tokens"])
    made = {f"{number:05d}" for number in range(count)}
    extra = [x.name for x in (folder / SHARDS).glob("[!.]*") if x.is_dir() and x.name not in made]
    if extra:
        raise CheckpointError(
            f"{folder / SHARDS} holds shards of more documents than there are now ({', '.join(sorted(extra)[:3])}): the source "
            "has changed since; restore it, or choose another folder"
        )


def _shards(
    documents: Documents, characters: int, names: np.ndarray | None
) -> Iterator[tuple[int, int, list[Document]]]:
    """(number, place of its first document, documents) of each shard; `names` are their clusters, int64 [documents]."""
    place = 0
    for number, shard in enumerate(cut_into_shards(documents(), characters)):
        if names is not None:
            if place + len(shard) > len(names):
                raise CheckpointError("the source has more documents than when near copies were looked for; restore it")
            own = cluster_names(names[place : place + len(shard)])
            shard = [replace(x, cluster=name) for x, name in zip(shard, own, strict=True)]
        yield number, place, shard
        place += len(shard)
    if names is not None and place < len(names):
        raise CheckpointError("the source has fewer documents than when near copies were looked for; restore it")


def _clusters(
    documents: Documents, folder: Path, settings: NearCopies, characters: int, pool: Workers
) -> tuple[np.ndarray, dict[str, Any]]:
    """(the cluster of each document, int64 [documents]; the report)."""
    work = folder / WORK
    if not (work / REPORT).is_file():
        tasks = (
            (shard, work / SHINGLES / f"{n:05d}", settings.size) for n, _, shard in _shards(documents, characters, None)
        )
        with tqdm(desc="shingles", unit="documents", unit_scale=True, disable=None) as bar:
            paths = []
            for path, count in pool.run(_shingle, tasks):
                paths.append(path)
                bar.update(count)
        if not paths:
            raise DataError("there are no documents")
        (work / SCRATCH).mkdir(exist_ok=True)
        names, report = cluster([_read_shingles(path) for path in paths], settings, work / SCRATCH)
        np.save(work / CLUSTERS, names)
        write_json(work / REPORT, {"report": report, "sha256": file_hash(work / CLUSTERS)})
        for path in (work / SHINGLES, work / SCRATCH):
            shutil.rmtree(path)
    names, report = _read_clusters(work)
    logger.info("near copies: %s", said(report))
    return names, report


def _read_clusters(work: Path) -> tuple[np.ndarray, dict[str, Any]]:
    remedy = f"remove {work / REPORT}, and the same command looks for near copies again"
    found = read_json(work / REPORT, remedy)
    whole = isinstance(found, dict) and found.keys() == {"report", "sha256"} and (work / CLUSTERS).is_file()
    if not whole or file_hash(work / CLUSTERS) != found["sha256"]:
        raise CheckpointError(f"{work / CLUSTERS} or {REPORT} is damaged; {remedy}")
    return load_array(work / CLUSTERS, remedy), found["report"]


def _read_shingles(path: Path) -> Shingled:
    remedy = f"remove {path}, and the same command makes it again"
    forms, offsets = (load_array(path / f"{name}.npy", remedy) for name in ("forms", "offsets"))
    return Shingled(forms, offsets, load_array(path / "shingles.npy", remedy, "r"))


# In a worker


def _encode(
    task: tuple[list[Document], Path, ShardSettings, int], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    documents, folder, settings, first = task
    return write_shard(folder, documents, tokenizer, settings, first)


def _shingle(task: tuple[list[Document], Path, int], tokenizer: PreTrainedTokenizerBase) -> tuple[Path, int]:
    documents, folder, size = task
    digest = documents_hash(documents)
    if folder.is_dir():
        require_shard(folder, read_record(folder, ()), digest)
        return folder, len(documents)
    found = shingled((x.text for x in documents), size)
    with written_beside(folder) as part:
        for name in ("forms", "offsets", "shingles"):
            np.save(part / f"{name}.npy", getattr(found, name))
        write_json(part / RECORD, {"documents_sha256": digest, "files": file_hashes(part)})
    return folder, len(documents)
