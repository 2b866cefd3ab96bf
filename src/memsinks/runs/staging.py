"""Several files of a folder changed at once: all of them or none, whenever the process is killed.

New versions are written into a folder beside them. One rename makes them binding; from then on whoever comes next puts the rest
in its place. Before it, what lies there is dropped.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError

from memsinks.errors import CheckpointError
from memsinks.files import file_hash, file_hashes, lies_within, locked, read_json, to_disk

BEGUN, BOUND = ".takedown.begun", ".takedown.bound"
FILES, PLAN = "files", "plan.json"


def at_work(folder: Path) -> AbstractContextManager[None]:
    """Keep others out of a folder: hold it from the first look at its files until the last one is in place.

    Raises:
        CheckpointError: another process is at work there.
    """
    return locked(folder, "a training or another take-down is at work there; wait for it")


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A folder for new versions, by their paths within `folder`, which is held (`at_work`); dropped at the end of the block
    unless `bind` was called.

    Raises:
        CheckpointError: `folder` cannot be written.
    """
    try:
        finish(folder)
        begun = folder / BEGUN
        begun.mkdir()
        try:
            yield begun / FILES
        finally:
            shutil.rmtree(begun, ignore_errors=True)
    except CheckpointError:
        raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot write into {folder}: {error}; nothing there was changed") from error


def bind(folder: Path, name: str, remove: Sequence[str]) -> None:
    """Make what was staged binding, and put it in place.

    Args:
        folder: as for `staged`.
        name: what is done, for whoever finishes it.
        remove: paths within `folder` of files that go.

    Raises:
        CheckpointError: a place that cannot be written, and nothing was changed; or the disk failed, and some is in place.
    """
    begun = folder / BEGUN
    _require_places(folder, [*file_hashes(begun / FILES), *remove])
    plan = {"name": name, "replace": file_hashes(begun / FILES), "remove": list(remove)}
    (begun / PLAN).write_text(json.dumps(plan, indent=2))
    to_disk(begun)
    begun.rename(folder / BOUND)
    to_disk(folder, deep=False)
    finish(folder)


def _require_places(folder: Path, paths: Sequence[str]) -> None:
    """CheckpointError unless all of these can be put in place, or removed, by renames within `folder`."""
    for path in paths:
        where = (folder / path).parent
        while not where.exists() and not where.is_symlink() and where != folder:
            where = where.parent
        if not lies_within(folder, path):
            problem = f"{where} is a link that leads out of {folder}; put the files themselves there"
        elif not where.is_dir():
            problem = f"{where} is no folder; move it elsewhere"
        elif not os.access(where, os.W_OK | os.X_OK):
            problem = f"{where} cannot be written; make it writable"
        elif where.stat().st_dev != folder.stat().st_dev:
            problem = f"{where} is a mount point, so its files cannot be replaced together with the others; move it into {folder}"
        else:
            continue
        raise CheckpointError(f"{problem}. Nothing was changed")


def pending(folder: Path) -> bool:
    """Whether a take-down was bound here and is not all in place."""
    return (folder / BOUND / PLAN).is_file()


def finish(folder: Path) -> str | None:
    """Put in place what was bound here, drop what was only begun; the name of what was finished, None = nothing was bound.

    Raises:
        CheckpointError: the plan or a file of it is damaged, or cannot be put in place.
    """
    shutil.rmtree(folder / BEGUN, ignore_errors=True)
    bound = folder / BOUND
    if not (bound / PLAN).is_file():
        shutil.rmtree(bound, ignore_errors=True)  # killed while it was dropped, all was in place
        return None
    name, replace, remove = _read_plan(folder, bound)
    try:
        _put_in_place(folder, bound, replace, remove)
    except OSError as error:
        raise CheckpointError(
            f"{name} is bound and half in place in {folder}, the rest lies in {bound}: {error}; mend that, and run the same "
            "command again, which finishes it"
        ) from error
    shutil.rmtree(bound, ignore_errors=True)
    return name


def _put_in_place(folder: Path, bound: Path, replace: Sequence[str], remove: Sequence[str]) -> None:
    for path in replace:
        if (bound / FILES / path).is_file():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            if (folder / path).is_file():
                shutil.copymode(folder / path, bound / FILES / path)
            os.replace(bound / FILES / path, folder / path)
    for path in remove:
        (folder / path).unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            (folder / path).parent.rmdir()
    to_disk(folder)
    (bound / PLAN).unlink()


def _read_plan(folder: Path, bound: Path) -> tuple[str, list[str], list[str]]:
    """(name, paths to put in place, paths to remove) of what was bound.

    Raises:
        CheckpointError: the plan is damaged or names paths outside the folder; a file is neither staged nor in place, whole.
    """
    remedy = "restore the folder from a copy"
    plan = read_json(bound / PLAN, remedy)
    try:
        name, replace, remove = str(plan["name"]), plan["replace"], [str(x) for x in plan["remove"]]
        hashes = replace if isinstance(replace, dict) else dict.fromkeys(replace)  # plans of before have no hashes
        outside = [x for x in (*hashes, *remove) if not lies_within(folder, x) or not lies_within(bound / FILES, x)]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{bound / PLAN} is damaged ({error!r}); {remedy}") from error
    if outside:
        raise CheckpointError(f"{bound / PLAN} names {outside[0]!r}, which lies outside the folder; {remedy}")
    damaged, done = [], 0
    for path, wanted in hashes.items():
        staged_file, placed = bound / FILES / path, folder / path
        done += not staged_file.is_file()
        there = staged_file if staged_file.is_file() else placed
        if not there.is_file() or (wanted is not None and file_hash(there) != wanted):
            damaged.append(str(there))
    if damaged:
        if not done:
            remedy = f"nothing is in place yet: remove {bound}, and run the take-down again"
        raise CheckpointError(f"{', '.join(damaged[:3])} of an interrupted take-down is missing or damaged; {remedy}")
    return name, list(hashes), remove
