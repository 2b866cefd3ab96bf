"""Checkpoints to resume from: whole, or passed over.

folder/checkpoint-STEP/state.pt          what `torch.save` wrote
folder/checkpoint-STEP/checkpoint.json   the SHA-256 of it and the facts of the caller, written last

A checkpoint is written beside its place and renamed, so a killed save leaves none; its hash is checked before it is used, so
a file that the disk has lost or cut is found.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from memsinks.errors import CheckpointError
from memsinks.files import file_hash, read_json, remove_leftovers, written_beside

logger = logging.getLogger(__name__)

STATE, MARKER = "state.pt", "checkpoint.json"


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint; `facts` are those given to `save_checkpoint`, as JSON gives them back."""

    path: Path
    step: int
    facts: dict[str, Any]

    def load(self) -> dict[str, Any]:
        """The state, tensors on the CPU; CheckpointError if it cannot be read."""
        try:
            return torch.load(self.path / STATE, map_location="cpu", weights_only=True, mmap=True)
        except Exception as error:  # pickle, zip and torch raise half a dozen types
            raise CheckpointError(f"{self.path / STATE} cannot be read ({error}); remove {self.path}") from error


def save_checkpoint(
    folder: Path, step: int, state: Mapping[str, Any], *, keep: int, facts: Mapping[str, Any] | None = None
) -> None:
    """Write the checkpoint of a step, then remove all but the newest `keep` up to this step, and those after it.

    Args:
        state: what ``torch.load(weights_only=True)`` can read again: tensors, numbers, text, and lists and dicts of them.
        facts: JSON-ready; can be read without the state.

    Raises:
        CheckpointError: it could not be written (full disk, permissions); earlier checkpoints are as they were.
    """
    with written_beside(folder / f"checkpoint-{step}") as part:
        save_state(dict(state), part / STATE)
        marker = {"step": step, "sha256": file_hash(part / STATE), "facts": dict(facts or {})}
        (part / MARKER).write_text(json.dumps(marker, indent=2) + "\n")
    earlier = [path for number, path in _folders(folder) if number <= step][:keep]
    for _, path in _folders(folder):
        if path not in earlier:
            shutil.rmtree(path, ignore_errors=True)


def save_state(state: dict[str, Any], path: Path) -> None:
    """`torch.save`; OSError if it cannot be written."""
    try:
        torch.save(state, path)
    except RuntimeError as error:  # what torch raises when the disk is full
        raise OSError(f"{path} cannot be written: {error}") from error


def last_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint, None if there is none; what killed saves left is removed.

    Raises:
        CheckpointError: there are only checkpoints of a memsinks that trained on the Trainer of transformers.
    """
    remove_leftovers(folder, age=0)
    passed_over = []
    for step, path in _folders(folder):
        problem, facts = _read(path)
        if problem is None:
            if passed_over:
                logger.warning("passed over %s; going on from %s", "; ".join(passed_over), path)
            return Checkpoint(path, step, facts)
        if (path / "trainer_state.json").is_file():
            raise CheckpointError(
                f"{path} was written by the Trainer of an earlier memsinks, from which this one cannot resume; finish the run "
                "with that version, or start it again in another output"
            )
        passed_over.append(f"{path} ({problem})")
    if passed_over:
        logger.warning("no checkpoint is whole: %s", "; ".join(passed_over))
    return None


def _folders(folder: Path) -> list[tuple[int, Path]]:
    """Checkpoints by step, the newest first, whole or not."""
    found = [(path.name.removeprefix("checkpoint-"), path) for path in folder.glob("checkpoint-*") if path.is_dir()]
    return sorted(((int(number), path) for number, path in found if number.isdecimal()), reverse=True)


def what_is_wrong(path: Path) -> str | None:
    """What is wrong with a checkpoint; None = it is whole."""
    return _read(path)[0]


def _read(path: Path) -> tuple[str | None, dict[str, Any]]:
    """What is wrong with a checkpoint (None = nothing), and its facts."""
    if not (path / MARKER).is_file():
        return f"{MARKER} is missing", {}
    try:
        marker = read_json(path / MARKER)
        digest, facts = marker["sha256"], dict(marker["facts"])
    except (CheckpointError, KeyError, TypeError, ValueError) as error:
        return f"{MARKER} cannot be read: {error}", {}
    if not (path / STATE).is_file():
        return f"{STATE} is missing", {}
    if file_hash(path / STATE) != digest:
        return f"{STATE} is damaged: its SHA-256 is not the one in {MARKER}", {}
    return None, facts
