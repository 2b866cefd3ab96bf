"""Files that are never half written: made beside and renamed; and their hashes."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from memsinks.errors import CheckpointError


def file_hash(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_json(path: Path) -> Any:
    """What a JSON file of ours holds; CheckpointError if it is missing or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read {path}: {error}; remove it, and it is made again") from error


def write_json(path: Path, value: Any, indent: int | None = 2) -> None:
    """Write a JSON file, and its folder; the file is never half written. CheckpointError if it cannot be written."""
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(value, indent=indent) + "\n", encoding="utf-8")
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise CheckpointError(f"could not write {path}: {error}; free space, or choose another folder") from error


@contextmanager
def written_beside(target: Path) -> Iterator[Path]:
    """Give a new folder beside `target`; when the block ends well, move its contents into `target`.

    Raises:
        CheckpointError: writing failed (full disk, permissions); `target` is as it was.
    """
    target = target.resolve()
    if target == Path.cwd() or os.path.ismount(target):
        raise CheckpointError(
            f"{target} is the current folder or a mount point and cannot be replaced; give one inside it"
        )
    parent = target.parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.part-", dir=parent))
    except OSError as error:
        raise CheckpointError(f"cannot write beside {target}: {error}") from error
    part.chmod(0o755)
    try:
        yield part
        _move(part, target)
    except CheckpointError:
        raise
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"could not write {target}: {error}; nothing there was changed. Free space or choose another folder"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


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
    for path in old.iterdir():
        stale = any(path.match(pattern) for pattern in ("model*.safetensors", "model*.index.json"))
        if not stale and not (target / path.name).exists():
            os.replace(path, target / path.name)
    shutil.rmtree(old, ignore_errors=True)
