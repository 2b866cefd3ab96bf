"""Who is meant: from a key, an id, a source or a text to document ids, with the copies that others have."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from memsinks.batch import checked_id
from memsinks.data.documents import Document, load_documents, utf8
from memsinks.data.identity import BY, By, document_id, identify
from memsinks.data.matching import Copy, find_copies
from memsinks.errors import CheckpointError, ConfigError, DataError
from memsinks.files import file_hash
from memsinks.removal.erase import ids_within
from memsinks.removal.record import RECORDS, STATEMENT
from memsinks.removal.statement import read_statement
from memsinks.runs.folder import MEMBERS, RECIPE, RunFolder
from memsinks.runs.sections import load_yaml
from memsinks.sinks.config import SinkConfig
from memsinks.sinks.state import SinkState
from memsinks.sinks.table import AssignmentTable

AskedBy = Literal["key", "id", "source", "text"]


@dataclass(frozen=True)
class Owner:
    """Who is to be taken out.

    Args:
        name: as asked for; the id where it was a text. by: what the name is.
        ids: document ids, each once.
        documents: indices of his documents among those of the run.
        copies: of his texts among the documents of others.
    """

    name: str
    by: AskedBy
    ids: list[int]
    documents: list[int]
    copies: list[Copy]


def asked(key: str | None, id: int | None, source: str | None, text: str | None) -> tuple[str | int, AskedBy]:
    """The one name that was given, and what it is.

    Raises:
        ConfigError: none or several. DataError: an id that is none, a name that has no UTF-8 form.
    """
    given: list[tuple[str | int, AskedBy]] = [
        (value, name)
        for value, name in ((key, "key"), (id, "id"), (source, "source"), (text, "text"))
        if value is not None
    ]  # type: ignore[misc]
    if len(given) != 1:
        raise ConfigError(f"give one of key, id, source and text, got {len(given)}")
    name, asked_by = given[0]
    if asked_by == "id":
        return checked_id(name), asked_by
    utf8(str(name), f"the {asked_by}")
    return name, asked_by


def read_members(run: Path) -> tuple[list[Document], By, int]:
    """The documents of a run, what gives them their id, and its epochs.

    Raises:
        CheckpointError: no run of a recipe; damaged files, or documents of another run. DataError: a damaged line.
    """
    if not (run / MEMBERS).is_file() or not (run / RECIPE).is_file():
        raise CheckpointError(
            f"{run} is not the folder of a finished run: members.jsonl or recipe.yaml is missing; give the folder that "
            "memsinks train wrote, or documents and by"
        )
    _require_own(run)
    try:
        recipe = load_yaml((run / RECIPE).read_bytes(), RECIPE)
        by, epochs = BY[BY.index(recipe["data"]["by"])], int(recipe["training"].get("epochs", 1))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{run / RECIPE} is damaged ({error!r:.200}); restore it") from error
    return load_documents(run / MEMBERS), by, epochs


def _require_own(run: Path) -> None:
    """CheckpointError if members.jsonl is neither what the run has written nor what a take-down there has left of it."""
    known = {RunFolder(run).facts().get("members_sha256")}
    if None in known:  # a run of before
        return
    for path in run.glob(f"{RECORDS}/*/{STATEMENT}"):
        files = read_statement(path)["predicate"].get("files")
        known |= {str(x.get("after")) for x in files or () if isinstance(x, dict) and x.get("path") == MEMBERS}
    if file_hash(run / MEMBERS) not in known:
        raise CheckpointError(
            f"{run / MEMBERS} is not what this run has written ({RunFolder(run).path / 'run.json'} has its SHA-256); restore it, "
            "for what is done with the documents of another run would be wrong"
        )


def find_owner(
    documents: Sequence[Document],
    by: By,
    name: str | int,
    asked_by: AskedBy,
    tables: Sequence[AssignmentTable] = (),
    near: float = 0.8,
) -> Owner:
    """The owner, his documents, and copies of his texts among the documents of others.

    Args:
        documents: of the run.
        by: what gave them their id, see `identify`.
        name: a key, a source, a text, or a document id.
        asked_by: which of them it is.
        tables: the assignments of the checkpoints: an owner may be none of the documents himself, and have documents within him.
        near: see `find_copies`.

    Raises:
        DataError: nobody has that name, with the nearest ones; a key whose documents share their sinks with others of a source.
    """
    ids = identify(documents, by)[0].tolist() if documents else []
    above, within = _owner_above(name, asked_by, tables)
    if above is None or not (len(within) > 1 or (asked_by == "id" and above not in ids)):
        above, within = None, set()
    if asked_by == "id":
        named = [index for index, one in enumerate(ids) if one == int(name)]
    elif asked_by == "text":
        known = {document.text for document in documents}
        name = next((x for x in _as_written(str(name)) if x in known), name)
        named = [index for index, document in enumerate(documents) if document.text == name]
    else:
        named = [index for index, document in enumerate(documents) if getattr(document, asked_by) == name]
    if not named and above is None:
        raise DataError(_nobody(documents, name, asked_by))
    wanted = {ids[index] for index in named} - within
    mine = {*named, *(index for index, one in enumerate(ids) if one in within)}
    chosen = sorted(mine)
    more = [index for index, one in enumerate(ids) if one in wanted and index not in mine]
    if more and asked_by != "id":
        raise DataError(_shared_sinks(documents[more[0]], len(more), name, asked_by, by))
    texts = [documents[index].text for index in chosen]
    copies = find_copies(texts, documents, near) if chosen else []
    copies = [copy for copy in copies if copy.index not in mine]
    shown = str(min(wanted)) if asked_by == "text" else str(name)
    return Owner(shown, asked_by, sorted(wanted | ({above} if above is not None else set())), chosen, copies)


def _as_written(text: str) -> list[str]:
    """A text from a file, and what it was before an editor ended it with a line break, or wrote all of them as CRLF."""
    plain = text.replace("\r\n", "\n")
    return [text, text.removesuffix("\n").removesuffix("\r"), plain, plain.removesuffix("\n")]


def _shared_sinks(other: Document, count: int, name: str | int, asked_by: AskedBy, by: By) -> str:
    """Why one cannot go alone whose documents have the id of others."""
    start = f"the documents of {asked_by} {str(name)[:60]!r} share their sinks with {count} others"
    if by == "content":
        return f"{start}, which have the same text under other names; take the text out"
    shared = other.source if by == "source" else other.key
    return f"{start} of the {by} {shared!r}; take that {by} out"


def called_in_lines(owner: Owner, documents: Sequence[Document], by: By) -> tuple[str, str] | None:
    """The field of a line of documents, and what it says, by which the line is the owner's; None where texts alone tell.

    Args:
        documents: his.
    """
    if owner.by in ("key", "source"):
        return owner.by, owner.name
    said = {getattr(x, by) for x in documents} if owner.by == "id" and by in ("key", "source") else set()
    return (by, said.pop()) if len(said) == 1 and None not in said else None


def _owner_above(name: str | int, asked_by: AskedBy, tables: Sequence[AssignmentTable]) -> tuple[int | None, set[int]]:
    """The id of an owner with blocks of his own, and that id with those of the documents within him; None where he has none."""
    if asked_by == "text":
        return None, set()
    one = int(name) if asked_by == "id" else document_id(str(name), asked_by)
    within = {x for table in tables if table.own_blocks(one) for x in ids_within(table, one)}
    return (one if within else None), within


def with_copies(owner: Owner, documents: Sequence[Document], by: By) -> Owner:
    """The owner and those who have copies of his texts."""
    ids = identify(documents, by)[0]
    theirs = {int(ids[copy.index]) for copy in owner.copies}
    everyone = sorted({*owner.ids, *theirs})
    chosen = {*owner.documents, *(index for index, one in enumerate(ids) if int(one) in everyone)}
    return Owner(owner.name, owner.by, everyone, sorted(chosen), owner.copies)


def meetings(documents: Sequence[Document], by: By, epochs: int) -> dict[int, int]:
    """How often the most repeated text of each document id was met."""
    if not documents:
        return {}
    ids, groups = (x.tolist() for x in identify(documents, by))
    times: dict[int, int] = {}
    for document, group in zip(documents, groups, strict=True):
        times[group] = times.get(group, 0) + document.copies * epochs
    found: dict[int, int] = {}
    for one, group in zip(ids, groups, strict=True):
        found[one] = max(found.get(one, 0), times[group])
    return found


def others_with_sinks(
    owner: Owner, documents: Sequence[Document], by: By, state: SinkState, epochs: int
) -> list[tuple[int, Document]]:
    """(id, document) of the others whose sinks opened in training and are still there."""
    mine, met = set(owner.ids), meetings(documents, by, epochs)
    assigned = None if state.config.hashed_blocks else set(state.table.ids.tolist())
    found = []
    for document, one in zip(documents, identify(documents, by)[0].tolist(), strict=True):
        opened = document.isolation == "private" or met[one] >= state.config.open_from
        if one not in mine and opened and one not in state.taken and (assigned is None or one in assigned):
            found.append((one, document))
    return found


def require_sinks_of(owner: Owner, documents: Sequence[Document], by: By, config: SinkConfig, epochs: int) -> None:
    """DataError if none of the owner's texts ever opened its sinks, so that there is nothing to erase."""
    met = meetings(documents, by, epochs)
    private = any(documents[index].isolation == "private" for index in owner.documents)
    if private or any(met.get(one, 0) >= config.open_from for one in owner.ids):
        return
    raise DataError(
        f"{owner.by} {owner.name[:60]!r} has no sinks: each text was met less than {config.open_from} times, at which its sinks "
        "open. What it taught then lies in the shared weights: only training again without it takes it out; make such documents "
        "private (isolation) before training"
    )


def _nobody(documents: Sequence[Document], name: str | int, asked_by: AskedBy) -> str:
    if asked_by == "id":
        return f"no document of the run has the id {name}"
    if asked_by == "text":
        near = find_copies(str(name), documents)[:3]
        hint = "; near copies are documents " + ", ".join(str(x.index) for x in near) if near else ""
        return f"the text is none of the run's {len(documents)} documents{hint}"
    known = sorted({x for document in documents if (x := getattr(document, asked_by))})
    near = difflib.get_close_matches(str(name), known, 3)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else f"; there are {len(known)}"
    return f"no document of the run has the {asked_by} {name!r}{hint}"
