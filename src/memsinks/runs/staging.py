"""Several files of a folder changed at once: all of them or none, whenever the process is killed.

New versions are written into a folder beside them. One rename makes them binding; from then on whoever comes next puts the rest
in its place. Before it, what lies there is dropped.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from memsinks.errors import CheckpointError
from memsinks.files import locked

BEGUN, BOUND = ".takedown.begun", ".takedown.bound"
FILES, PLAN = "files", "plan.json"


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A folder for new versions, by their paths within `folder`; dropped at the end of the block unless `bind` was called.

    Raises:
        CheckpointError: another process is at it, or `folder` cannot be written.
    """
    try:
        with locked(folder, "another take-down is at work there; wait for it"):
            finish(folder)
            begun = folder / BEGUN
            begun.mkdir()
            try:
                yield begun / FILES
            finally:
                shutil.rmtree(begun, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(f"cannot write into {folder}: {error}; nothing there was changed") from error


def bind(folder: Path, name: str, remove: Sequence[str]) -> None:
    """Make what was staged binding, and put it in place.

    Args:
        folder: as for `staged`.
        name: what is done, for whoever finishes it.
        remove: paths within `folder` of files that go.
    """
    begun = folder / BEGUN
    staged_files = sorted(str(x.relative_to(begun / FILES)) for x in (begun / FILES).rglob("*") if x.is_file())
    plan = {"name": name, "replace": staged_files, "remove": list(remove)}
    (begun / PLAN).write_text(json.dumps(plan, indent=2))
    for path in (*(begun / FILES / x for x in staged_files), begun / PLAN):
        with path.open("rb") as file:
            os.fsync(file.fileno())
    begun.rename(folder / BOUND)
    try:
        finish(folder)
    except OSError as error:
        raise CheckpointError(
            f"{name} is bound and half in place in {folder}: {error}; free space, and run the same command again, which "
            "finishes it"
        ) from error


def finish_what_was_bound(folder: Path) -> str | None:
    """`finish`, unless another process is at work there."""
    with locked(folder, "another take-down is at work there; wait for it"):
        return finish(folder)


def pending(folder: Path) -> bool:
    """Whether a take-down was bound here and is not all in place."""
    return (folder / BOUND / PLAN).is_file()


def finish(folder: Path) -> str | None:
    """Put in place what was bound here, drop what was only begun; the name of what was finished, None = nothing was bound."""
    shutil.rmtree(folder / BEGUN, ignore_errors=True)
    bound = folder / BOUND
    if not (bound / PLAN).is_file():
        shutil.rmtree(bound, ignore_errors=True)  # killed while it was dropped, all was in place
        return None
    plan = json.loads((bound / PLAN).read_text())
    for path in plan["replace"]:
        if (bound / FILES / path).is_file():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(bound / FILES / path, folder / path)
    for path in plan["remove"]:
        (folder / path).unlink(missing_ok=True)
        with suppress(OSError):  # not empty
            (folder / path).parent.rmdir()
    (bound / PLAN).unlink()
    shutil.rmtree(bound, ignore_errors=True)
    return str(plan["name"])
