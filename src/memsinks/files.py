"""Files that are never half written: made beside and renamed; and their hashes."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from memsinks.errors import CheckpointError


def file_hash(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
