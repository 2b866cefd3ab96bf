"""A step for datatrove's pipelines: documents in, shards of a corpus out, on whatever its executors run (local, Slurm, Ray).

    from datatrove.executor import LocalPipelineExecutor  # or SlurmPipelineExecutor, RayPipelineExecutor
    from datatrove.pipeline.readers import ParquetReader

    step = MemsinksWriter("corpus/", "tokenizer/", by="source", source="site", carry=["license"])
    LocalPipelineExecutor([ParquetReader("texts/"), step], tasks=64).run()
    finish(step)

A task writes shards of its own, ``shards/00003-00000`` is the first of task 3, each of them whole or not at all; a task that
runs again finds them. `finish` is called once, after the last task. The bytes depend on the tasks, and on nothing else.
Near copies are datatrove's own here: its last MinHash step with ``load_cluster_ids=True`` gives each document
``minhash_cluster_id``, which is read as the cluster.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from datatrove.pipeline.base import PipelineStep

from memsinks.data.documents import Document
from memsinks.data.fields import CARRIED, document_of
from memsinks.data.identity import By
from memsinks.data.preparation import SHARD_CHARACTERS, WORK, corpus_settings, finish_corpus, opened
from memsinks.data.shards import ShardSettings, cut_into_shards, write_shard
from memsinks.data.stored import SHARDS, StoredCorpus, is_corpus
from memsinks.data.tokens import load_tokenizer
from memsinks.errors import CheckpointError
from memsinks.files import read_json, write_json

TASKS = "tasks"


class MemsinksWriter(PipelineStep):
    """Write the documents of a pipeline as shards of a corpus, and hand them on.

    The key of a document is datatrove's id. A blank document is handed on and not written.

    Args:
        out: the folder of the corpus, on a file system that all tasks see.
        tokenizer: a tokenizer's folder, file or name.
        by: what gives a document its id, see `identify`.
        source, copies, isolation, cluster: names in the metadata; a document without the cluster has none.
        carry: names in the metadata that are written beside each document, None where a document has none.
        shard_characters: see `prepare_corpus`.
    """

    type = "💾 - WRITER"
    name = "memsinks"

    def __init__(
        self,
        out: str | os.PathLike[str],
        tokenizer: str,
        *,
        by: By = "content",
        source: str | None = None,
        copies: str | None = None,
        isolation: str | None = None,
        cluster: str | None = "minhash_cluster_id",
        carry: Sequence[str] = (),
        shard_characters: int = SHARD_CHARACTERS,
    ) -> None:
        super().__init__()
        self.out, self.tokenizer, self.cluster = Path(out), tokenizer, cluster
        self.fields = {"text": "text", "key": "id"}
        given = {"source": source, "copies": copies, "isolation": isolation, "cluster": cluster}
        self.fields |= {slot: f"metadata.{name}" for slot, name in given.items() if name is not None}
        self.fields |= {f"{CARRIED}{name}": f"metadata.{name}" for name in carry}
        self.shard = ShardSettings(by, tuple(carry))
        self.characters = shard_characters
        loaded = load_tokenizer(tokenizer)
        self.settings = corpus_settings(loaded, by, carry, shard_characters)
        with opened(self.out, self.settings, loaded):
            pass

    def run(self, data: Any, rank: int = 0, world_size: int = 1) -> Iterator[Any]:
        tokenizer = load_tokenizer(self.tokenizer)
        handed: list[Any] = []
        names, first = [], 0
        for number, shard in enumerate(cut_into_shards(self._documents(data, handed, rank), self.characters)):
            names.append(f"{rank:05d}-{number:05d}")
            with self.track_time():
                record = write_shard(self.out / SHARDS / names[-1], shard, tokenizer, self.shard, first)
            first += len(shard)
            self.stat_update("documents", value=record["documents"])
            self.stat_update("tokens", value=record["tokens"])
            yield from handed
            handed.clear()
        write_json(self.out / WORK / TASKS / f"{rank:05d}.json", {"tasks": world_size, "shards": names})
        yield from handed

    def _documents(self, data: Any, handed: list[Any], rank: int) -> Iterator[Document]:
        for number, document in enumerate(data):
            handed.append(document)
            if document.text and not document.text.isspace():
                yield document_of(self._row(document), f"task {rank}, document {number}", self.fields)

    def _row(self, document: Any) -> Mapping[str, Any]:
        row = {"text": document.text, "id": document.id}
        row |= {f"metadata.{name}": value for name, value in document.metadata.items()}
        may_lack = [name for slot, name in self.fields.items() if slot.startswith(CARRIED) or slot == "cluster"]
        return dict.fromkeys(may_lack) | row


def finish(step: MemsinksWriter) -> StoredCorpus:
    """Write the manifest of what the tasks of a pipeline wrote, and give the corpus; where it is finished, that alone.

    Raises:
        CheckpointError: tasks that have not ended; shards that no task wrote, of an earlier input. DataError: no shards.
    """
    if is_corpus(step.out):
        return StoredCorpus(step.out)
    ended = [read_json(x) for x in sorted((step.out / WORK / TASKS).glob("*.json"))]
    tasks = max((task["tasks"] for task in ended), default=1)
    if len(ended) != tasks:
        raise CheckpointError(f"{len(ended)} of {tasks} tasks that write {step.out} have ended; run the others first")
    written = {name for task in ended for name in task["shards"]}
    other = sorted({x.name for x in (step.out / SHARDS).glob("[!.]*")} ^ written)
    if other:
        raise CheckpointError(
            f"the shards {', '.join(other[:3])} of {step.out} are not those that its {tasks} tasks wrote; remove the folder, and "
            "run the pipeline anew"
        )
    finish_corpus(step.out, step.settings, None)
    return StoredCorpus(step.out)
