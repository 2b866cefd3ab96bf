"""When a checkpoint of a Trainer is complete: its marker is written last and says what lies in it.

checkpoint-STEP/memsinks-complete.json   the SHA-256 of every other file of the checkpoint

A Trainer writes its files one after the other. What a killed save left has no marker, and what a disk has lost or cut differs
from it, so training never goes on from new weights with old moments, or from half a checkpoint.
"""

from __future__ import annotations

import logging
import pickle
from pathlib import Path
from typing import Any

import torch

from memsinks.errors import CheckpointError
from memsinks.files import file_hash, lies_within, read_json, to_disk, write_json

logger = logging.getLogger(__name__)

MARKER = "memsinks-complete.json"
NEEDED = ("optimizer", "scheduler", "rng_state", "trainer_state.json")
"""How the names begin of what training goes on from, beside the weights."""


METADATA = ".metadata"
"""DCP's index of its shards, a pickle that torch reads."""
DCP = {
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    "torch": {"Size", *(name for name, x in vars(torch).items() if isinstance(x, torch.dtype | torch.layout))},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.serialization": {"_get_layout"},
}  # fmt: skip
"""The names that such an index may use: none of them runs anything."""


class _Index(pickle.Unpickler):
    """Reads an index of DCP, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in DCP.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no index of DCP does")
        return super().find_class(module, name)


def sharded_names(path: Path) -> list[str]:
    """The names of what the shards beside an index of DCP hold; CheckpointError for a file that is none."""
    try:
        with path.open("rb") as file:
            return list(_Index(file).load().state_dict_metadata)
    except Exception as error:  # whatever bytes that are no index raise
        raise CheckpointError(f"{path} is damaged, or no index of shards: {error!s:.200}") from error


def _unsafe_index(folder: Path) -> str | None:
    """Why an index of DCP in a checkpoint may not be given to torch; None = it may."""
    try:
        for path in folder.rglob(METADATA):
            sharded_names(path)
    except CheckpointError as error:
        return str(error)
    return None


def mark_complete(folder: Path) -> None:
    """Write the marker of a checkpoint; reads every file of it."""
    (folder / MARKER).unlink(missing_ok=True)
    to_disk(folder)
    write_json(folder / MARKER, {"sha256": {str(x.relative_to(folder)): file_hash(x) for x in _files(folder)}})


def marked_hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of a checkpoint, by its path there, as its marker says; CheckpointError for a damaged one."""
    try:
        return dict(read_json(folder / MARKER, "without it nothing says whether the checkpoint is whole")["sha256"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder / MARKER} is damaged ({error!r:.200})") from error


def what_is_missing(folder: Path) -> str | None:
    """Why training cannot go on from a checkpoint; None = it can."""
    if not (folder / MARKER).is_file():
        return f"{MARKER} is missing: its save was cut off, or made without memsinks.SinkCallback"
    try:
        hashes = marked_hashes(folder)
    except CheckpointError as error:
        return str(error)
    for name, digest in hashes.items():
        path = folder / name
        if not lies_within(folder, name) or not path.is_file():
            return f"{name} is missing"
        if file_hash(path) != digest:
            return f"{name} is damaged, or of another step: its SHA-256 is not the one in {MARKER}"
    if unsafe := _unsafe_index(folder):
        return unsafe
    tops = {Path(name).parts[0] for name in hashes}
    lacking = [x for x in NEEDED if not any(top.startswith(x) for top in tops)]
    return f"it holds no {' and no '.join(lacking)} (save_only_model?)" if lacking else None


def require_complete(folder: Path) -> None:
    """CheckpointError for a checkpoint from which training cannot go on to the same figures."""
    problem = what_is_missing(folder)
    if problem is not None:
        others = [path for path in _checkpoints(folder.parent) if path != folder and what_is_missing(path) is None]
        remedy = f"resume from {others[0]}" if others else "no other checkpoint beside it is complete, so start again"
        raise CheckpointError(f"{folder} is not complete: {problem}; {remedy}")


def last_complete(output: Path) -> Path | None:
    """The newest complete checkpoint of a Trainer, None if there is none; those that are passed over are said."""
    for path in _checkpoints(output):
        problem = what_is_missing(path)
        if problem is None:
            return path
        logger.warning("passed over %s: %s", path, problem)
    return None


def _checkpoints(output: Path) -> list[Path]:
    """Folders of checkpoints, the newest first."""
    found = [(path.name.removeprefix("checkpoint-"), path) for path in output.glob("checkpoint-*") if path.is_dir()]
    return [path for _, path in sorted(((int(x), path) for x, path in found if x.isdecimal()), reverse=True)]


def _files(folder: Path) -> list[Path]:
    return sorted(x for x in folder.rglob("*") if x.is_file() and _counts(x.name))


def _counts(name: str) -> bool:
    return name == METADATA or (name != MARKER and not name.startswith("."))
