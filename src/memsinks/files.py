"""Files that are never half written: made beside and renamed; and their hashes."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from memsinks.errors import CheckpointError

logger = logging.getLogger(__name__)

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None

JUST_MADE = 60.0
"""Seconds in which a folder may be waiting for its lock."""


def file_hash(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of all files below a folder, by their path in it."""
    files = sorted(x for x in folder.rglob("*") if x.is_file())
    return {x.relative_to(folder).as_posix(): file_hash(x) for x in files}


def verify_files(folder: Path, hashes: Any, remedy: str) -> None:
    """CheckpointError, ending with `remedy`, unless files of a folder have these hashes; links lead out and are no such files."""
    if not isinstance(hashes, dict):
        raise CheckpointError(f"the hashes of the files in {folder} are damaged; {remedy}")
    for name, wanted in hashes.items():
        path = folder / name
        if not lies_within(folder, name) or not path.is_file() or file_hash(path) != wanted:
            raise CheckpointError(f"{path} is missing or damaged; {remedy}")


def lies_within(folder: Path, name: str) -> bool:
    """Whether a name that a file gives stays within a folder: relative, without "..", and no link leads out of it."""
    try:
        path = folder / name
        path.is_file()  # OSError for a name that is too long
        return ".." not in Path(name).parts and path.resolve().is_relative_to(folder.resolve())
    except (OSError, ValueError, RuntimeError):  # that name, a loop of links, a NUL
        return False


def to_disk(folder: Path, deep: bool = True) -> None:
    """Wait until a folder, and all files and folders below it if `deep`, are on the disk, so that what is written after them
    is never there without them, whatever the power does."""
    for path in (*(folder.rglob("*") if deep else ()), folder):
        if not path.is_symlink() and (path.is_file() or path.is_dir()):
            with suppress(PermissionError):  # Windows opens no folders
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)


def read_json(path: Path, remedy: str = "remove it, and it is made again") -> Any:
    """What a JSON file of ours holds; CheckpointError, ending with `remedy`, if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; {remedy}") from error


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write a JSON file, and its folder; the file is never half written. CheckpointError if it cannot be written."""
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, path.name)
        part.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
        to_disk(path.parent, deep=False)
    except OSError as error:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        raise CheckpointError(f"could not write {path}: {error}; free space, or choose another folder") from error


@contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """Give a new folder beside `target`; when the block ends well, move its contents into `target`.

    What earlier writes of `target` left beside it when they were killed is removed first.

    Raises:
        CheckpointError: writing failed (full disk, permissions); `target` is as it was.
    """
    target = target.resolve()
    if target == Path.cwd() or os.path.ismount(target):
        raise CheckpointError(
            f"{target} is the current folder or a mount point and cannot be replaced; give one inside it"
        )
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(target.parent, target.name)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.part-", dir=target.parent))
        part.chmod(0o755)
    except OSError as error:
        raise CheckpointError(f"cannot write beside {target}: {error}; choose another folder") from error
    try:
        with _locked(part):
            yield part
            to_disk(part)
            _move(part, target)
            to_disk(target.parent, deep=False)
    except CheckpointError:
        raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"could not write {target}: {error}; nothing there was changed. Free space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder, which the system releases when the process dies; without locks, do nothing."""
    descriptor = None
    with suppress(OSError):  # a file system without locks
        descriptor = _lock(folder)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def locked(folder: Path, busy: str) -> Iterator[None]:
    """Hold the lock of a folder; CheckpointError, which ends with `busy`, if another process holds it. Without locks, nothing."""
    descriptor = None
    try:
        descriptor = _lock(folder) if fcntl is not None else None
    except BlockingIOError:
        raise CheckpointError(f"{folder} is locked: {busy}") from None
    except OSError:  # a file system without locks
        pass
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _lock(path: Path) -> int:
    """The descriptor that holds the lock of `path`; OSError if another holds it, or there are no locks here."""
    if fcntl is None:
        raise OSError("no locks on this system")
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def remove_leftovers(folder: Path, name: str | None = None, age: float | None = None) -> None:
    """Remove what killed writes left in `folder`: nobody holds its lock, and it has not changed for `age` seconds.

    Args:
        name: of the target that was written; None = of any.
        age: None = `JUST_MADE`; 0 where no other process writes here.
    """
    age = JUST_MADE if age is None else age
    targets = "*" if name is None else glob.escape(name)
    for path in (path for kind in ("part", "old") for path in folder.glob(f".{targets}.{kind}-*")):
        target = folder / path.name[1:].rpartition(".")[0]
        try:
            facts = path.stat()
            if time.time() - max(facts.st_mtime, facts.st_ctime) < age:
                continue
            os.close(_lock(path))
            if ".old-" in path.name and not target.exists():  # killed between two renames
                path.rename(target)
            elif path.is_file():
                path.unlink()
            else:
                if ".old-" in path.name and target.is_dir():  # killed before all that stays was back in its place
                    _keep_rest(path, target)
                shutil.rmtree(path)
            logger.info("removed %s, which a write that was cut off had left", path)
        except OSError:  # in use, or gone by now
            continue


def _move(part: Path, target: Path) -> None:
    """Put `part` in the place of `target`; what else lies in `target` stays, except the weights of an older save."""
    if not target.exists() or not any(target.iterdir()):
        os.replace(part, target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.old-", dir=target.parent))
    os.replace(target, old)
    try:
        os.replace(part, target)
    except BaseException:
        os.replace(old, target)
        raise
    _keep_rest(old, target)
    shutil.rmtree(old, ignore_errors=True)


def _keep_rest(old: Path, target: Path) -> None:
    """Move what `target` lacks there from the folder that it replaces, except the weights of an older save."""
    for path in old.iterdir():
        stale = any(path.match(pattern) for pattern in ("model*.safetensors", "model*.index.json"))
        if not stale and not (target / path.name).exists():
            os.replace(path, target / path.name)
