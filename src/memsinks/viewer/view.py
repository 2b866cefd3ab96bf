"""What a viewer looks at: a model with sinks, its documents and owners, and, if given, the ordinary model."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memsinks.data.documents import Document, load_documents
from memsinks.data.identity import By
from memsinks.data.readers import read_documents
from memsinks.data.tokens import load_tokenizer
from memsinks.errors import CheckpointError, ConfigError, DataError
from memsinks.runs.demo import MARK
from memsinks.runs.folder import RECIPE, RunFolder
from memsinks.runs.owners import read_members
from memsinks.sinks.checkpoint import load_any, load_sinks, load_stock
from memsinks.sinks.families import context_of
from memsinks.sinks.opening import sinks_closed, sinks_open
from memsinks.sinks.state import has_sinks, require_sinks
from memsinks.sinks.storage import has_saved_sinks, read_settings
from memsinks.viewer.owners import ShownOwner, owners_shown

logger = logging.getLogger(__name__)

Column = Literal["ordinary", "open", "closed"]
"""The ordinary model; the model with chosen sinks open; the same with all closed, which is the model without sinks."""


@dataclass(frozen=True)
class Place:
    """Where everything lies.

    Args:
        folder: what a take-down changes: a run, or a folder with sinks. model: the checkpoint, or the sinks alone.
        base: the model beside which sinks alone were trained. ordinary: of the ordinary model. run: whether it is a run's folder.
    """

    folder: Path
    model: Path
    base: Path | str | None
    ordinary: Path | str | None
    run: bool


@dataclass
class View:
    """What is looked at. One model is in memory, and one lock stands around its forward passes.

    Args:
        documents: those trained on, then those never seen; `members` is how many the first are.
        by: what gave the documents their ids. epochs: how often they were gone through, 0 = not known. owners: by document id.
        model: with sinks or not. ordinary: None where none was given.
        tokenizer: None where there is none. notes: what is missing, for the page.
        version: rises with each take-down, so that what was begun before ends. current: whether the model is that of after it.
    """

    place: Place
    documents: list[Document]
    members: int
    by: By
    epochs: int
    owners: dict[int, ShownOwner]
    model: PreTrainedModel
    ordinary: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase | None
    notes: list[str] = field(default_factory=list)
    version: int = 0
    current: bool = True
    lock: threading.Lock = field(default_factory=threading.Lock)
    takedowns: threading.Lock = field(default_factory=threading.Lock)

    @property
    def columns(self) -> list[Column]:
        """What can be seen side by side."""
        possible = {"ordinary": self.ordinary is not None, "open": has_sinks(self.model), "closed": True}
        return [name for name in get_args(Column) if possible[name]]

    @property
    def taken(self) -> dict[int, str]:
        """{id: record} of owners that were taken out."""
        return require_sinks(self.model).taken if has_sinks(self.model) else {}

    @property
    def context(self) -> int:
        """Tokens that every model here can read."""
        models = [x for x in (self.model, self.ordinary) if x is not None]
        return min(context_of(x.config) for x in models)

    def require_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer; ConfigError where there is none."""
        if self.tokenizer is None:
            raise ConfigError("there is no tokenizer, so nothing can be read or written; start again with --tokenizer")
        return self.tokenizer

    def ids_to_open(self, names: Sequence[str]) -> list[int]:
        """The document ids of names: ids in digits, ``key:NAME`` or ``source:NAME``; DataError for one that is nobody's."""
        return [self.owner_named(name) for name in names]

    def owner_named(self, name: str) -> int:
        """One of `ids_to_open`."""
        by, colon, rest = name.partition(":")
        found = [x.id for x in self.owners.values() if colon and (x.by, x.name) == (by, rest)]
        one = int(name) if name.isdecimal() else None
        found += [one] if one is not None and (one in self.owners or one in self.taken or not self.documents) else []
        if len(found) > 1:
            raise DataError(f"{name[:60]!r} is the name of {len(found)} documents with sinks of their own; give an id")
        if not found:
            raise DataError(
                f"nobody here is called {name[:60]!r}; give an id, key:NAME or source:NAME, or search for him"
            )
        return found[0]

    @contextmanager
    def running(self, column: Column, ids: Sequence[int], version: int) -> Iterator[PreTrainedModel]:
        """Within the block this thread alone runs the model of a column, with the sinks of `ids` open in the column "open".

        Raises:
            DataError: an owner was taken out since `version`; sinks of one who was.
        """
        with self.lock, torch.no_grad():
            if version != self.version:
                raise DataError("an owner was taken out meanwhile, and the model is another; ask again")
            if not self.current:
                raise DataError(
                    "the model is not read again since an owner was taken out; wait, or start memsinks view again"
                )
            if column == "ordinary":
                assert self.ordinary is not None
                yield self.ordinary
            elif not has_sinks(self.model):
                yield self.model
            else:
                with sinks_open(self.model, ids) if column == "open" and ids else sinks_closed(self.model):
                    yield self.model

    def end(self) -> None:
        """Wait until no forward and no take-down runs, and let none begin again: the process ends."""
        self.takedowns.acquire()
        self.lock.acquire()

    def reload(self) -> None:
        """Read model, documents and owners again, as a take-down has left them; the model of before answers no more."""
        with self.lock:
            self.version, self.current = self.version + 1, False
        model = _load_model(self.place)
        documents, members = self._left(model)
        if self.place.run:
            documents, members, *_ = _documents(self.place, None, self.by)
        owners = owners_shown(documents[:members], self.by, model)
        with self.lock:
            self.model, self.documents, self.members, self.owners = model, documents, members, owners
            self.version, self.current = self.version + 1, True

    def _left(self, model: PreTrainedModel) -> tuple[list[Document], int]:
        """The documents that were given, without those of owners who were taken out."""
        taken = require_sinks(model).taken
        gone = {index for owner in self.owners.values() if owner.id in taken for index in owner.documents}
        kept = [x for index, x in enumerate(self.documents) if index not in gone]
        return kept, self.members - len(gone)


def open_view(
    folder: str | os.PathLike[str],
    *,
    base: str | None = None,
    ordinary: str | None = None,
    documents: str | None = None,
    by: By = "content",
    tokenizer: str | None = None,
) -> View:
    """Load what a viewer shows.

    Args:
        folder: of a run, of the demo, of a model, or with sinks alone beside `base`.
        base: folder or name of the model that sinks alone were trained beside; loaded in float32.
        ordinary: folder or name of the ordinary model; the demo's is found by itself.
        documents: a file of documents where the folder is no run: one of `write_documents`, or any that `read_documents` takes.
        by: what gave these their ids.
        tokenizer: folder or name; None = beside the model.

    Raises:
        CheckpointError: nothing to show in the folder. ConfigError, DataError: options that do not fit each other or the
            documents. What only limits what can be shown (no sinks, no tokenizer, no documents) becomes a note of the view.
    """
    place = _place(Path(folder), base, ordinary)
    if documents is not None and place.run:
        raise ConfigError(f"{place.folder} is a run and has its documents; leave --documents out")
    model = _load_model(place)
    shown, members, by, epochs = _documents(place, documents, by)
    view = View(
        place,
        shown,
        members,
        by,
        epochs,
        owners_shown(shown[:members], by, model),
        model,
        None if place.ordinary is None else _on_device(load_any(place.ordinary)),
        None,
    )
    try:
        view.tokenizer = load_tokenizer(tokenizer or place.base or place.model)
    except ConfigError as error:
        view.notes.append(f"No tokenizer, so nothing can be read or written: {error}. Start again with --tokenizer.")
    view.notes += _notes(view)
    return view


def _place(folder: Path, base: str | None, ordinary: str | None) -> Place:
    if not folder.is_dir():
        raise CheckpointError(f"there is no folder {folder}")
    if (folder / MARK).is_file():  # the demo's, with a run for each of its models
        folder, ordinary = folder / "sinks", ordinary or str(folder / "ordinary" / "model")
    if (folder / RECIPE).is_file():
        run = RunFolder(folder)
        if not run.model.is_dir():
            raise CheckpointError(f"the run in {folder} is not finished: it has no model yet; resume it first")
        return Place(folder, run.model, base, ordinary, run=True)
    if has_saved_sinks(folder):
        alone = bool(read_settings(folder).alone)
        if alone and base is None:
            raise CheckpointError(f"{folder} holds sinks alone; give the model they were trained beside with --base")
        return Place(folder, folder, base if alone else None, ordinary, run=False)
    if (folder / "config.json").is_file():
        return Place(folder, folder, None, ordinary, run=False)
    raise CheckpointError(
        f"{folder} holds no run, no model and no sinks; give the folder that memsinks train or demo wrote"
    )


def _load_model(place: Place) -> PreTrainedModel:
    if place.base is None:
        return _on_device(load_any(place.model))
    model = load_stock(place.base, dtype=torch.float32)
    load_sinks(model, place.model)
    return _on_device(model.eval())


def _on_device(model: PreTrainedModel) -> PreTrainedModel:
    return model.to("cuda") if torch.cuda.is_available() else model  # type: ignore[arg-type]


def _documents(place: Place, documents: str | None, by: By) -> tuple[list[Document], int, By, int]:
    """All documents, how many of them were trained on, what gave them their ids, and the epochs (0 = not known)."""
    if place.run:
        members, by, epochs = read_members(place.folder)
        members = [x for x in members if x.text.strip()]
        controls = place.folder / "controls.jsonl"
        unseen = load_documents(controls) if controls.is_file() else []
        return members + unseen, len(members), by, epochs
    if documents is None:
        return [], 0, by, 0
    try:
        given = load_documents(documents)
    except (DataError, OSError):  # no file of `write_documents`
        fields = {"content": {}, "key": {"key_field": "key"}, "source": {"source_field": "source"}}[by]
        given = list(read_documents(documents, **fields))
    return given, len(given), by, 0


def _notes(view: View) -> list[str]:
    """What the folder lacks, and what cannot be seen for that."""
    found = []
    if not has_sinks(view.model):
        found.append("This model has no sinks: there is nothing to open and nobody to take out.")
    if not view.documents:
        found.append(
            "No documents are known here. Type a prompt; name the documents with --documents to search them and take owners out."
        )
    if view.ordinary is not None and view.tokenizer is not None:
        sizes = [int(x.get_input_embeddings().num_embeddings) for x in (view.model, view.ordinary)]  # type: ignore
        if sizes[0] != sizes[1]:
            found.append(
                f"The ordinary model has another vocabulary ({sizes[1]} tokens, not {sizes[0]}) and is left out; give one that "
                "shares the tokenizer."
            )
            view.ordinary = None
    return found
