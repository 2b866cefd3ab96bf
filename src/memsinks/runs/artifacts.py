"""What lies in the folder of a run, or of one's own training, and what becomes of each file when an owner is taken out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from memsinks.data.matching import normal_form
from memsinks.data.router import COUNTS, Router
from memsinks.data.router import SETTINGS as ROUTER
from memsinks.errors import CheckpointError
from memsinks.removal.erase import Erased
from memsinks.removal.erase_files import SinksFile, erase_in_checkpoint, erase_in_optimizer
from memsinks.removal.export import OPEN_SINKS, whose_sinks
from memsinks.removal.tombstone import Tombstone, shares_words
from memsinks.runs.folder import RECORDS
from memsinks.sinks.state import is_sink
from memsinks.sinks.storage import FOLDER, SETTINGS, TENSORS, has_saved_sinks
from memsinks.training.checkpoint import MARKER, STATE, what_is_wrong

READABLE = (".json", ".jsonl", ".md", ".html", ".txt", ".csv", ".yaml", ".yml", ".log")
PREPARED = "index.npz"
"""Beside the tokens of a corpus, see `prepare`."""
REPORT = "audit.json"
MOST_READ = 2**28
"""Bytes of a text file that is searched for the texts."""


@dataclass(frozen=True)
class Fate:
    """What becomes of a file.

    Args:
        path: within the folder.
        fate: "rewritten", "deleted" or "untouched".
        why: a few words.
        write: writes what takes its place at the path it is given; beside "rewritten" alone.
    """

    path: str
    fate: str
    why: str
    write: Callable[[Path], None] | None = None


@dataclass(frozen=True)
class Wanted:
    """What is to go.

    Args:
        ids: document ids. texts: of the owner. names: (key, source) of his documents. tombstone: of the texts; None where none is
            known. record: its name.
    """

    ids: Sequence[int]
    record: str
    texts: frozenset[str] = frozenset()
    names: frozenset[tuple[Any, Any]] = frozenset()
    tombstone: Tombstone | None = None


@dataclass
class Fates:
    """The fates of all files of a folder, and what was erased where.

    sinks: by the folder of each checkpoint, read and erased in memory. erased: by the same.
    """

    folder: Path
    wanted: Wanted
    files: list[Fate] = field(default_factory=list)
    sinks: dict[str, SinksFile] = field(default_factory=dict)
    erased: dict[str, list[Erased]] = field(default_factory=dict)


def fates_of(folder: Path, wanted: Wanted) -> Fates:
    """What becomes of every file below `folder`; nothing is written.

    Raises:
        CheckpointError: a checkpoint that is damaged or cannot be rewritten, so that the owner would stay in it.
        DataError, ConfigError: an owner that cannot be erased from the sinks there, see `removal.erase.blocks_of`.
    """
    found = Fates(folder, wanted)
    everything = sorted(_files(folder))
    checkpoints = [x.parent.parent for x in everything if x.name == SETTINGS and x.parent.name == FOLDER]
    for checkpoint in sorted(checkpoints, key=lambda x: x != folder / "model"):
        _erase_sinks(found, checkpoint)
    fates: dict[str, Fate] = {}
    for path in everything:
        fates |= {fate.path: fate for fate in _group(found, path, everything)}
    for path in everything:
        name = path.relative_to(folder).as_posix()
        found.files.append(fates[name] if name in fates else _of_file(found, path, name))
    return found


def _files(folder: Path) -> Iterator[Path]:
    for where, folders, names in os.walk(folder):
        if Path(where) == folder:
            folders[:] = [x for x in folders if x != RECORDS and not x.startswith(".takedown.")]
        links = [x for x in (*folders, *names) if (Path(where) / x).is_symlink()]
        if links:
            raise CheckpointError(
                f"{Path(where) / links[0]} is a link; what it leads to would stay as it is, so put the files themselves there"
            )
        for name in names:
            yield Path(where) / name


def _erase_sinks(found: Fates, checkpoint: Path) -> None:
    name = checkpoint.relative_to(found.folder).as_posix()
    sinks = SinksFile(checkpoint)
    missing = [x for x in found.wanted.ids if sinks.state.taken.get(x)]
    ids = [x for x in found.wanted.ids if x not in missing]
    own = [x for erased in found.erased.values() for one in erased if one.own for x in one.ids]
    found.sinks[name], found.erased[name] = sinks, sinks.erase(ids, found.wanted.record, own)


def _group(found: Fates, path: Path, everything: Sequence[Path]) -> Iterator[Fate]:
    """The fates of the files that a file stands for; none for most."""
    where, name = path.parent, path.relative_to(found.folder).as_posix()
    if where.name == FOLDER and path.name == SETTINGS:
        yield from _of_sinks(found, name, where.parent.relative_to(found.folder).as_posix())
    elif path.name in (STATE, MARKER) and where.name.startswith("checkpoint-"):
        yield from _of_checkpoint(found, where)
    elif path.name == "optimizer.pt" and has_saved_sinks(where):
        sinks = where.relative_to(found.folder).as_posix()
        erased = found.erased[sinks]
        yield Fate(
            name,
            "rewritten" if erased else "untouched",
            "moments of the erased blocks are zero",
            (lambda to: erase_in_optimizer(path, found.sinks[sinks], erased, to)) if erased else None,
        )
    elif path.name == OPEN_SINKS and set(whose_sinks(where)) & _all_ids(found):
        yield from (
            Fate(x.relative_to(found.folder).as_posix(), "deleted", "an export with the owner's sinks as neurons")
            for x in everything
            if x.parent == where
        )
    elif path.name == ROUTER and (where / COUNTS).is_file():
        yield from _of_router(found, where)
    elif path.name == PREPARED and (where / "data.json").is_file():
        yield from (
            Fate(x.relative_to(found.folder).as_posix(), "deleted", "tokens of the corpus; made again from its sources")
            for x in everything
            if where in x.parents
        )
    elif (
        path.name == REPORT
        and _is_report(where)
        and _quotes(found.wanted, [x for x in everything if where in x.parents])
    ):
        yield from (
            Fate(x.relative_to(found.folder).as_posix(), "deleted", "an audit that measured and quotes the text")
            for x in everything
            if where in x.parents
        )


def _all_ids(found: Fates) -> set[int]:
    """The owner's ids and those of the documents within him."""
    within = {x for erased in found.erased.values() for one in erased for x in one.ids}
    return within | set(found.wanted.ids)


def _is_report(where: Path) -> bool:
    """Whether a folder is what `memsinks audit` writes, and nothing else."""
    return (
        (where / "documents.jsonl").is_file()
        and not any(where.rglob("*.safetensors.index.json"))
        and not any(where.rglob("config.json"))
    )


def _of_sinks(found: Fates, name: str, checkpoint: str) -> Iterator[Fate]:
    sinks = found.sinks[checkpoint]
    prefix = name.rpartition("/")[0]
    before = {int(key) for key in sinks.stored.get("taken", {})}
    if sinks.state.taken.keys() == before:
        why = "taken out before" if sinks.state.taken.keys() & set(found.wanted.ids) else "the sinks of others alone"
        yield from (Fate(f"{prefix}/{x}", "untouched", why) for x in (SETTINGS, TENSORS))
        return
    yield Fate(f"{prefix}/{TENSORS}", "rewritten", "the owner's blocks start anew", lambda to: sinks.write(to.parent))
    yield Fate(f"{prefix}/{SETTINGS}", "rewritten", "the owner's ids stay closed", lambda to: None)


def _of_checkpoint(found: Fates, where: Path) -> Iterator[Fate]:
    """A checkpoint of ours has the sinks of the model of its run."""
    problem = what_is_wrong(where)
    if problem is not None:
        raise CheckpointError(f"{where} is not whole: {problem}; remove it, or restore it, for he may still be in it")
    prefix = where.relative_to(found.folder).as_posix()
    if "model" not in found.sinks or found.sinks["model"].of_owners:
        raise CheckpointError(
            f"{where} is of a run that is not finished (there is no model/sinks), so it is not known which blocks are whose; "
            "finish the run first"
        )
    sinks, erased = found.sinks["model"], found.erased["model"]
    yield Fate(
        f"{prefix}/{STATE}",
        "rewritten",
        "the owner's blocks start anew, their moments are zero",
        lambda to: erase_in_checkpoint(where, sinks, erased, to.parent),
    )
    yield Fate(f"{prefix}/{MARKER}", "rewritten", "its hash", lambda to: None)


def _of_router(found: Fates, where: Path) -> Iterator[Fate]:
    router, prefix = Router.load(where), where.relative_to(found.folder).as_posix()
    gone = sorted(_all_ids(found) & set(router.owners.tolist()))
    for owner in gone:
        router = router.remove(owner)
    if not gone:
        yield from (Fate(f"{prefix}/{x}", "untouched", "a router of others alone") for x in (ROUTER, COUNTS))
        return

    def write(to: Path) -> None:
        to.parent.mkdir(parents=True, exist_ok=True)
        router.write(to.parent)

    yield Fate(f"{prefix}/{COUNTS}", "rewritten", "the router without the owner", write)
    yield Fate(f"{prefix}/{ROUTER}", "rewritten", "the router without the owner", lambda to: None)


def _of_file(found: Fates, path: Path, name: str) -> Fate:
    if path.suffix == ".jsonl" and (documents := _without(path, found.wanted)) is not None:
        kept, gone = documents
        if gone:
            return Fate(name, "rewritten", "lines that hold the text are left out", lambda to: _write(to, kept))
        return Fate(name, "untouched", "documents of others")
    if path.suffix == ".safetensors":
        _refuse_sinks_within(path)
        return Fate(name, "untouched", "weights that no take-down changes")
    if path.suffix in READABLE and (why := _not_searched(path)):
        return Fate(name, "untouched", f"not searched: {why}; see for yourself whether it holds the text")
    if path.suffix in READABLE and _quotes(found.wanted, [path]):
        return Fate(name, "untouched", "QUOTES THE TEXT and is no file that memsinks rewrites: remove it yourself")
    if path.name.startswith("tokenizer"):
        return Fate(name, "untouched", "a tokenizer; its entries may be words of any text")
    if path.suffix in READABLE:
        return Fate(name, "untouched", "the text does not stand in it")
    return Fate(name, "untouched", "no file that memsinks knows; see for yourself whether it holds the text")


def _quotes(wanted: Wanted, paths: Sequence[Path]) -> bool:
    """Whether five words in a row of the texts stand in one of these files; texts of fewer words are looked for whole."""
    short = {normal_form(text) for text in wanted.texts if len(text.split()) < 5}
    for path in paths:
        if path.suffix not in READABLE or _not_searched(path):
            continue
        for text in _plain(path, path.read_text(encoding="utf-8")):
            if short and normal_form(text) in short:
                return True
            if wanted.tombstone is not None and shares_words(text, wanted.tombstone):
                return True
    return False


def _not_searched(path: Path) -> str:
    """Why a text file cannot be searched; "" where it can."""
    if path.stat().st_size > MOST_READ:
        return f"larger than {MOST_READ >> 20} MiB"
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return "not UTF-8"
    return ""


def _refuse_sinks_within(path: Path) -> None:
    """CheckpointError for weights in which sinks stand that no settings file says anything about."""
    try:
        with safe_open(path, "pt") as file:
            inside = [name for name in file.keys() if is_sink(name)]  # noqa: SIM118
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read: {error}; remove it, or restore it") from error
    if inside:
        raise CheckpointError(
            f"{path} holds sinks ({inside[0]}, ...) without the settings that say whose they are; remove it, or move it elsewhere"
        )


def _plain(path: Path, content: str) -> Iterator[str]:
    """The texts in a file: strings of JSON without their escapes, else all of it."""
    try:
        lines = content.splitlines() if path.suffix == ".jsonl" else [content]
        values = [json.loads(x) for x in lines if x.strip()] if path.suffix in (".json", ".jsonl") else None
    except (ValueError, RecursionError):
        values = None
    yield from _strings(values) if values is not None else [content]


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield str(key)
            yield from _strings(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _strings(inner)


def _without(path: Path, wanted: Wanted) -> tuple[list[bytes], int] | None:
    """The lines of a file of documents that are not the owner's, and how many are; None for another file.

    His are those with one of his texts, up to case and white space, and, where the file says so, his key and source.
    """
    forms = {normal_form(text) for text in wanted.texts}
    kept, gone = [], 0
    for line in path.read_bytes().splitlines(keepends=True):
        if not line.strip():
            kept.append(line)
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not isinstance(row, dict) or not isinstance(row.get("text"), str):
            return None
        his = "key" not in row or [row["key"], row.get("source")] in [list(x) for x in wanted.names]
        if his and normal_form(row["text"]) in forms:
            gone += 1
        else:
            kept.append(line)
    return kept, gone


def _write(path: Path, lines: list[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(lines))
