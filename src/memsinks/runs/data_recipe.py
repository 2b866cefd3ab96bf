"""The section `data` of a recipe: which documents, how they are read, chosen and identified."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

from memsinks.checks import int_at_least
from memsinks.data.clusters import NearCopies
from memsinks.data.identity import By
from memsinks.data.synthetic import corpus
from memsinks.errors import refuse
from memsinks.runs.sections import RENAMED, unknown_keys, with_new_names

OF_PATH = (
    "text_field", "key_field", "source_field", "copies_field", "isolation_field", "cluster_field", "clusters", "separator",
    "split", "streaming", "cut_characters", "limit",
)  # fmt: skip
"""Settings that say how documents of ``path`` are read; the built-in corpus is made."""


@dataclass(frozen=True, kw_only=True)
class RepeatRecipe:
    """Make a controlled study out of a plain corpus: repeat some of its documents.

    Args:
        documents: how many documents are repeated, chosen by the seed.
        copies: how often each; a list is dealt out in turn, so [1, 4, 16] gives a third of them each number.
    """

    documents: int
    copies: int | list[int]

    def __post_init__(self) -> None:
        problems = int_at_least("documents", self.documents, 1)
        if not self._numbers:
            problems.append("copies is empty; give how often the documents are repeated")
        problems += [problem for number in self._numbers for problem in int_at_least("copies", number, 1)]
        refuse(problems, "data.repeat")

    @property
    def dealt(self) -> list[int]:
        """The copies of each repeated document."""
        return [self._numbers[place % len(self._numbers)] for place in range(self.documents)]

    @property
    def _numbers(self) -> list[int]:
        return self.copies if isinstance(self.copies, list) else [self.copies]


@dataclass(frozen=True, kw_only=True)
class BackgroundRecipe:
    """Text around the documents of a study; it is kept as tokens, so it may be larger than the memory.

    Args:
        path, text_field, separator, split, streaming: as for `read_documents`; ``$NAME`` in the path is replaced.
        tokens: documents are taken in the order in which they are read until the training corpus, copies of the documents
            of ``data.path`` included, holds so many tokens. Those whose text is trained on, held out, unseen or fresh in
            ``data.path`` are left out: texts of the same characters or, where ``data.near_copies`` is given, of one normal form.
    """

    path: str
    tokens: int
    text_field: str = "text"
    separator: str | None = None
    split: str = "train"
    streaming: bool = False

    def __post_init__(self) -> None:
        refuse(int_at_least("tokens", self.tokens, 1), "data.background")


@dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """The training corpus.

    Args:
        path: a file, folder or data set name for `read_documents`, or the folder of a corpus that `memsinks prepare` made;
            ``$NAME`` is replaced from the environment. None = the built-in corpus. Chats, and prompts with completions, need a
            tokenizer with a chat template (`tokenizer.path`).
        text_field, key_field, source_field, copies_field, isolation_field, cluster_field, separator, split, streaming: as for
            `read_documents`.
        near_copies: look for near copies among the documents, see `clusters.NearCopies`; ``by: cluster`` gives them the same
            sinks.
        clusters: a file that names the clusters of keys, made by another tool, see `clusters_elsewhere`.
        exact, private: keys of documents (sources, where `by` is ``source``) that are isolated so, see `batch.ISOLATIONS`.
        tombstones: files, or folders in which any ``tombstone.json`` counts, of texts that were taken down: a document that comes
            back is refused, as are those of the take-downs in the output folder.
        cut_characters: cut documents into pieces of at most so many characters, each a document of its own, see
            `cut_documents`.
        limit: read at most so many documents (or pieces).
        by: what gives a document its id: its ``content``, ``key``, ``source`` or ``cluster``.
        unique_keys: refuse documents without a key and two documents with the same key.
        held_out: so many documents, chosen by the seed, are never trained on; they are evaluated and are the controls.
        unseen: so many documents, those read after the `limit` (without one, the last), are never trained on and no
            controls; they say to `settle` what loss a text should have that was never met.
        fresh: so many more, read after those, stand in for copies in the arms of a comparison that ask for it.
        repeat: repeat some documents.
        background: fill the corpus up with other text, each document of which is met once an epoch and has the id of its
            content.
        one_document_per_row: None = `train` puts several documents into a row and `compare` one.
        shadow: train the run in which all that trains sinks alone is blank, see `shadow_rows`; its `shared_hash` is that of the
            run without it.
        long: what happens to documents longer than a row, see `pack`.
        synthetic: arguments of `memsinks.synthetic.corpus` for the built-in corpus.
    """

    path: str | None = None
    text_field: str = "text"
    key_field: str | None = None
    source_field: str | None = None
    copies_field: str | None = None
    isolation_field: str | None = None
    cluster_field: str | None = None
    near_copies: NearCopies | None = None
    clusters: str | None = None
    exact: list[str] = field(default_factory=list)
    private: list[str] = field(default_factory=list)
    tombstones: list[str] = field(default_factory=list)
    separator: str | None = None
    split: str = "train"
    streaming: bool = False
    cut_characters: int | None = None
    limit: int | None = None
    by: By = "content"
    unique_keys: bool = False
    held_out: int = 0
    unseen: int = 0
    fresh: int = 0
    repeat: RepeatRecipe | None = None
    background: BackgroundRecipe | None = None
    one_document_per_row: bool | None = None
    shadow: bool = False
    long: Literal["split", "fill", "truncate", "refuse"] = "split"
    synthetic: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problems = [x for name in ("held_out", "unseen", "fresh") for x in int_at_least(name, getattr(self, name), 0)]
        for name in ("limit", "cut_characters"):
            if getattr(self, name) is not None:
                problems += int_at_least(name, getattr(self, name), 1)
        if self.path is not None and self.synthetic:
            problems.append("synthetic is for the built-in corpus; leave it out or leave out path")
        problems += [
            f"{name} is for documents of path; the built-in corpus has none to spare"
            for name in ("unseen", "fresh")
            if self.path is None and getattr(self, name)
        ]
        plain = {x.name: x.default for x in fields(self) if x.default is not MISSING}
        read = [x for x in OF_PATH if getattr(self, x) != plain[x]]
        if self.path is None and read:
            problems.append(f"{', '.join(read)} say how path is read; the built-in corpus is not read, leave them out")
        given = [x for x in ("near_copies", "clusters", "cluster_field") if getattr(self, x) is not None]
        if len(given) > 1:
            problems.append(f"give one of {' and '.join(given)}: clusters come from one place")
        if self.by == "cluster" and not given and self.path is None:
            problems.append("by: cluster needs near_copies; the built-in corpus has no clusters")
        if self.repeat is not None and self.copies_field is not None:
            problems.append("give repeat or copies_field, not both")
        problems += unknown_keys(self.synthetic, "data.synthetic", inspect.signature(corpus).parameters)
        refuse(problems, "data")

    @staticmethod
    def upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
        """The section as some version wrote it, under today's names."""
        return with_new_names(values, RENAMED["data"])

    def alone(self, default: bool) -> bool:
        """Whether each document has rows of its own; `default` where the recipe leaves it open."""
        return default if self.one_document_per_row is None else self.one_document_per_row
