"""What lies in the folder of a run, or of one's own training, and what becomes of each file when an owner is taken out."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from memsinks.auditing.scores import TOKENS_MARK
from memsinks.data.router import COUNTS, Router
from memsinks.data.router import SETTINGS as ROUTER
from memsinks.errors import CheckpointError
from memsinks.files import file_hash, read_json, write_json
from memsinks.removal.erase import Erased, collateral_in, ids_within, together
from memsinks.removal.erase_files import SinksFile, erase_in_checkpoint, erase_in_optimizer
from memsinks.removal.export import OPEN_SINKS, whose_sinks
from memsinks.removal.record import RECORDS
from memsinks.removal.tombstone import Tombstone
from memsinks.runs.strays import refuse_sinks_within
from memsinks.runs.text_search import READABLE, His, Quotes, not_searched, without_lines
from memsinks.sinks.storage import FOLDER, SETTINGS, TENSORS, has_saved_sinks
from memsinks.training.checkpoint import MARKER, STATE, what_is_wrong
from memsinks.training.complete import MARKER as COMPLETE
from memsinks.training.complete import marked_hashes

PREPARED = ("tokens.bin", "index.npz", "data.json")
"""The tokens of a corpus, see `prepare`; the last names the files beside them."""
REPORT, TOKENS = "audit.json", "tokens"


@dataclass(frozen=True)
class Fate:
    """What becomes of a file.

    Args:
        path: within the folder.
        fate: "rewritten", "deleted" or "untouched".
        why: a few words.
        write: writes what takes its place at the path it is given; beside "rewritten" alone.
        look: whether somebody must look at it.
    """

    path: str
    fate: str
    why: str
    write: Callable[[Path], None] | None = None
    look: bool = False


@dataclass(frozen=True)
class Wanted:
    """What is to go.

    Args:
        ids: document ids. his: which lines are the owner's. tombstone: of his texts; None where none is known. record: its name.
    """

    ids: Sequence[int]
    record: str
    his: His
    tombstone: Tombstone | None = None

    @cached_property
    def quotes(self) -> Quotes:
        """What quotes him."""
        return Quotes(self.his.texts, self.tombstone)


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


def sinks_below(folder: Path) -> dict[str, SinksFile]:
    """The sinks of all checkpoints below `folder`, that of a run's model first.

    Raises:
        CheckpointError: damaged files, a folder that cannot be listed, a link.
    """
    checkpoints = [
        x.parent.parent for x in sorted(files_below(folder)) if x.name == SETTINGS and x.parent.name == FOLDER
    ]
    checkpoints.sort(key=lambda x: x != folder / "model")
    return {x.relative_to(folder).as_posix(): SinksFile(x) for x in checkpoints}


def fates_of(folder: Path, wanted: Wanted, sinks: dict[str, SinksFile]) -> Fates:
    """What becomes of every file below `folder`; nothing is written.

    Args:
        sinks: all there, see `sinks_below`; the owner is erased in them, in memory.

    Raises:
        CheckpointError: a checkpoint that is damaged or cannot be rewritten, so that the owner would stay in it.
        DataError, ConfigError: an owner that cannot be erased from the sinks there, see `removal.erase.blocks_of`.
    """
    found = Fates(folder, wanted, sinks=sinks)
    everything = sorted(files_below(folder))
    _erase_sinks(found)
    fates: dict[str, Fate] = {}
    for path in everything:
        fates |= {fate.path: fate for fate in _group(found, path, everything)}
    for path in everything:
        name = path.relative_to(folder).as_posix()
        found.files.append(fates[name] if name in fates else _of_file(found, path, name))
    changed = {fate.path for fate in found.files if fate.fate != "untouched"}
    for index, fate in enumerate(found.files):
        if Path(fate.path).name == COMPLETE:
            found.files[index] = _of_trainer_marker(found, folder / fate.path, changed) or fate
    return found


def files_below(folder: Path) -> Iterator[Path]:
    """All files of a folder but the records of take-downs; CheckpointError for a link, or a folder that cannot be listed."""
    for where, folders, names in os.walk(folder, onerror=_unlisted):
        if Path(where) == folder:
            folders[:] = [x for x in folders if x != RECORDS and not x.startswith(".takedown.")]
        links = [x for x in (*folders, *names) if (Path(where) / x).is_symlink()]
        if links:
            raise CheckpointError(
                f"{Path(where) / links[0]} is a link; what it leads to would stay as it is, so put the files themselves there"
            )
        for name in names:
            yield Path(where) / name


def _unlisted(error: OSError) -> None:
    raise CheckpointError(
        f"{error.filename} cannot be listed ({error.strerror}), and he may be in it; make it readable, or move it elsewhere"
    )


def _erase_sinks(found: Fates) -> None:
    """Erase the owner in the sinks of all checkpoints, those in which he has own blocks yet and those from before."""
    tables = [sinks.state.table for sinks in found.sinks.values()]
    own = {x for table in tables for one in found.wanted.ids if table.own_blocks(one) for x in ids_within(table, one)}
    for name, sinks in found.sinks.items():
        later = own - set(sinks.state.table.ids.tolist())  # had no blocks yet: they only stay closed
        ids = [x for x in dict.fromkeys([*found.wanted.ids, *sorted(later)]) if x not in sinks.state.taken]
        beside = set(found.wanted.ids) if own and not sinks.state.config.hashed_blocks else set()  # open nothing there
        found.erased[name] = sinks.erase(ids, found.wanted.record, own | beside)


def _group(found: Fates, path: Path, everything: Sequence[Path]) -> Iterator[Fate]:
    """The fates of the files that a file stands for; none for most."""
    where, name = path.parent, path.relative_to(found.folder).as_posix()
    if where.name == FOLDER and path.name == SETTINGS:
        yield from _of_sinks(found, name, where.parent.relative_to(found.folder).as_posix())
    elif path.name in (STATE, MARKER) and (where.name.startswith("checkpoint-") or _is_ours(where)):
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
    elif path.name == OPEN_SINKS and (why := _why_export_goes(found, where)):
        yield from _gone(found, [x for x in everything if x.parent == where], why)
    elif path.name == ROUTER and (where / COUNTS).is_file():
        yield from _of_router(found, where)
    elif path.name == PREPARED[-1] and all((where / x).is_file() for x in PREPARED):
        known = {where / x for x in (*PREPARED, *read_json(path).get("files", {}))}
        yield from _gone(found, known & {*everything}, "tokens of the corpus; made again from its sources")
    elif where.name == TOKENS and path.name == "README" and path.read_bytes() == TOKENS_MARK.encode():
        why = "what models said to each token of an audit, from which texts can be read; measured again by the next one"
        yield from _gone(found, [x for x in everything if where in x.parents], why)
    elif path.name == REPORT and _is_report(where):
        below = [x for x in everything if where in x.parents]
        if any(found.wanted.quotes.within_file(x, whole=True) for x in below):
            yield from _gone(found, below, "an audit that measured and quotes the text")


def _gone(found: Fates, paths: Iterable[Path], why: str) -> Iterator[Fate]:
    """Files that are deleted for one reason."""
    return (Fate(x.relative_to(found.folder).as_posix(), "deleted", why) for x in paths)


def _is_ours(where: Path) -> bool:
    """Whether a folder of any name is a checkpoint of ours."""
    return (where / STATE).is_file() and (where / MARKER).is_file()


def _why_export_goes(found: Fates, where: Path) -> str:
    """Why an export has something of the owner; "" where it has nothing."""
    opened = set(whose_sinks(where))
    if opened & _all_ids(found):
        return "an export with the owner's sinks as neurons"
    for name, erased in found.erased.items():
        shared = Erased([], together(erased), False)
        if opened and collateral_in(found.sinks[name].before, shared, opened).any():
            return "an export with blocks as neurons that the owner shared; export it again"
    return ""


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
    why = (
        "the owner's blocks start anew"
        if found.erased[checkpoint]
        else "the owner's ids stay closed; he had no blocks of his own here yet, and hashed ones keep what they learned"
    )
    yield Fate(f"{prefix}/{TENSORS}", "rewritten", why, lambda to: sinks.write(to.parent))
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
    if path.suffix in READABLE and not found.wanted.his.texts:
        why = "not searched: none of his texts is known; see for yourself whether it holds one"
        return Fate(name, "untouched", why, look=True)
    if path.suffix == ".jsonl" and (lines := without_lines(path, found.wanted.his)) is not None:
        return _of_documents(found.wanted, name, *lines)
    if refuse_sinks_within(path):
        return Fate(name, "untouched", "weights that no take-down changes")
    if path.suffix in READABLE and (why := not_searched(path)):
        return Fate(name, "untouched", f"not searched: {why}; see for yourself whether it holds the text", look=True)
    if path.suffix in READABLE and found.wanted.quotes.within_file(path):
        why = "QUOTES THE TEXT and is no file that memsinks rewrites: remove it yourself"
        return Fate(name, "untouched", why, look=True)
    if path.name.startswith("tokenizer"):
        return Fate(name, "untouched", "a tokenizer; its entries may be words of any text")
    if path.suffix in READABLE:
        return Fate(name, "untouched", "the text does not stand in it")
    why = "no file that memsinks knows; see for yourself whether it holds the text"
    return Fate(name, "untouched", why, look=True)


def _of_documents(wanted: Wanted, name: str, kept: list[bytes], gone: list[bytes]) -> Fate:
    """Of a file of documents, or chats: the lines that stay, and those that are the owner's."""
    quoting = sum(map(wanted.quotes.within_line, kept))
    stay = f"{quoting} lines that are not his by text, key and source quote him and stay: see for yourself"
    if gone:
        why = "lines that are his are left out" + f"; {stay}" * bool(quoting)
        return Fate(name, "rewritten", why, lambda to: _write(to, kept))
    return Fate(name, "untouched", "documents of others" + f"; {stay}" * bool(quoting), look=bool(quoting))


def _of_trainer_marker(found: Fates, path: Path, changed: Collection[str]) -> Fate | None:
    """The marker of a checkpoint of a Trainer, with the hashes of what is rewritten there; None where nothing is.

    A file that is not the one that was marked keeps its hash, so that the checkpoint stays as incomplete as it was.
    """
    where = path.relative_to(found.folder).parent
    try:
        hashes = marked_hashes(path.parent)
    except CheckpointError:
        return None  # training does not go on from it as it is
    mine = [x for x in hashes if (where / x).as_posix() in changed and file_hash(path.parent / x) == hashes[x]]
    if not mine:
        return None

    def write(to: Path) -> None:
        staged = {x: to.parent / x for x in mine}
        there = {x: file_hash(y) for x, y in staged.items() if y.is_file()}
        write_json(to, {"sha256": {x: there.get(x, y) for x, y in hashes.items() if x in there or x not in mine}})

    return Fate(path.relative_to(found.folder).as_posix(), "rewritten", "its hashes", write)


def _write(path: Path, lines: list[bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"".join(lines))
