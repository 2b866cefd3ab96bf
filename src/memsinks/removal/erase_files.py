"""Erasing an owner in files: the sinks of a checkpoint, and what training resumes from. Written anew, beside the old ones.

No model is built: a sinks file holds all that says which blocks are whose and how they started.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from memsinks.errors import CheckpointError
from memsinks.files import file_hash, read_json
from memsinks.removal.erase import Erased, blocks_in, forget, strike_out
from memsinks.sinks.layer import start_of
from memsinks.sinks.reading import read_tensors
from memsinks.sinks.state import SinkState
from memsinks.sinks.storage import FOLDER, SETTINGS, TABLE, TENSORS, check_files, read_settings
from memsinks.training.checkpoint import MARKER, STATE, save_state

PARTS = ("up", "gate", "down")
"""The parameters of a layer's sinks, in the order in which a model has them."""


class SinksFile:
    """The sinks of a checkpoint folder, read, for erasing.

    Attributes:
        folder: of the checkpoint. state: what the model would have as its sink state. tensors: by name, on the CPU.
        before: the state as it was read. layout: see `storage.layout_of`.
        of_owners: whether it holds the sinks of some owners alone, see `sinks.owner_files`; to erase another is to do nothing.

    Raises:
        CheckpointError: no sinks there, damaged files, or files that do not say how blocks started.
    """

    def __init__(self, folder: Path) -> None:
        saved = read_settings(folder)
        check_files(folder, saved)
        self.folder, self.stored = folder, saved.stored
        self.of_owners = saved.of_owners
        self.tensors, table = read_tensors(folder)
        self.layout = layout = saved.layout
        self.state = SinkState(
            saved.config, tuple(layout["layers"]), layout["intermediate_size"], (), table=table, taken=saved.taken
        )
        self.before = replace(self.state, taken=dict(self.state.taken))
        if {str(layer) for layer in layout["layers"]} - set(self.stored.get("start_std", ())):
            raise CheckpointError(
                f"{folder} does not say how the sinks of each layer started (an earlier memsinks, or damaged); load it with "
                "memsinks.load and save it again"
            )

    def erase(self, owners: Sequence[int], record: str, own_only: Collection[int] = ()) -> list[Erased]:
        """Erase owners in memory, as `removal.erase.erase` does in a model.

        Those of `own_only` that have no listed blocks here, in a checkpoint from before they were assigned any, only stay closed.
        """
        done = []
        for owner in owners:
            if self.state.taken.get(owner) == record:
                continue  # within one that came before it
            listed = owner in self.state.table.ids.tolist()
            if self.of_owners and not listed:
                continue
            if owner in own_only and not listed:
                self.state.taken[owner] = record
                continue
            erased = blocks_in(self.state, owner)
            self.erase_in(self.tensors, erased)
            strike_out(self.state, erased, record)
            done.append(erased)
        return done

    def erase_in(self, tensors: Mapping[str, Tensor], erased: Erased) -> None:
        """Give the erased blocks their start values in `tensors`, which have the names of a state dict, in place."""
        for name, layer, part in sink_parts(tensors):
            value, blocks = tensors[name], erased.blocks.get(layer, [])
            for block in blocks:
                std = float(self.stored["start_std"][str(layer)])
                up, gate = start_of(self.state.config.seed, layer, block, std, tuple(value.shape[1:]))
                value[block] = {"up": up, "gate": gate}[part].to(value.dtype) if part != "down" else 0

    def write(self, folder: Path) -> None:
        """Write the two files into `folder`."""
        folder.mkdir(parents=True, exist_ok=True)
        table = {f"table.{name}": getattr(self.state.table, name) for name in TABLE}
        save_file({**self.tensors, **table}, folder / TENSORS, metadata={"format": "pt"})
        stored = self.stored | {
            "taken": {str(key): name for key, name in sorted(self.state.taken.items())},
            "sha256": self.stored["sha256"] | {f"{FOLDER}/{TENSORS}": file_hash(folder / TENSORS)},
        }
        (folder / SETTINGS).write_text(json.dumps(stored, indent=2) + "\n")


def sink_parts(names: Any) -> list[tuple[str, int, str]]:
    """(name, layer, part) of each sink parameter among names of a state dict, in the order of the model."""
    found = []
    for name in names:
        match = re.search(r"\.(\d+)\..*\bsinks\.(up|gate|down)$", f".{name}")
        if match:
            found.append((name, int(match[1]), match[2]))
    return sorted(found, key=lambda x: (x[1], PARTS.index(x[2])))


def changed_blocks(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> tuple[dict[int, list[int]], int]:
    """({layer: blocks that differ in a bit}, number of blocks that do not) between two sets of sink tensors."""
    different: dict[int, set[int]] = {}
    same = 0
    for name, layer, _ in sink_parts(before):
        one, other = (x[name].view(len(x[name]), -1).contiguous().view(torch.uint8) for x in (before, after))
        moved = (one != other).any(1)
        different.setdefault(layer, set()).update(moved.nonzero()[:, 0].tolist())
        same += int((~moved).sum())
    return {layer: sorted(blocks) for layer, blocks in different.items()}, same


def erase_in_checkpoint(folder: Path, sinks: SinksFile, erased: Sequence[Erased], target: Path) -> None:
    """Write what a training checkpoint of ours is without some owners: sinks and their moments.

    Raises:
        CheckpointError: the state cannot be read.
    """
    state = _load(folder / STATE)
    for one in erased:
        sinks.erase_in(state["model"], one)
    if "optimizer" in state:
        _forget(state["optimizer"], list(state["model"]), erased, folder / STATE)
    target.mkdir(parents=True, exist_ok=True)
    save_state(state, target / STATE)
    marker = read_json(folder / MARKER) | {"sha256": file_hash(target / STATE)}
    (target / MARKER).write_text(json.dumps(marker, indent=2) + "\n")


def erase_in_optimizer(path: Path, sinks: SinksFile, erased: Sequence[Erased], target: Path) -> None:
    """Write what an ``optimizer.pt`` of the Trainer is without some owners."""
    if sinks.of_owners:
        raise CheckpointError(
            f"{path} lies beside the sinks of some owners alone, so it is not known which of its moments are theirs; remove it"
        )
    state = _load(path)
    _forget(state, list(sinks.tensors), erased, path)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_state(state, target)


def _load(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # pickle, zip and torch raise half a dozen types
        raise CheckpointError(f"{path} cannot be read ({error}); remove it, or restore it") from error


def _forget(optimizer: dict[str, Any], names: Sequence[str], erased: Sequence[Erased], path: Path) -> None:
    """Set the moments of erased blocks to zero in the state dict of an optimizer with the groups of `param_groups`."""
    group = next((x for x in optimizer["param_groups"] if x.get("name") == "sinks"), None)
    parts = sink_parts(names)
    if group is None or len(group["params"]) != len(parts):
        raise CheckpointError(
            f"{path} does not say which of its moments are those of sinks (no group named 'sinks' of {len(parts)}); remove it, "
            "or train with memsinks.param_groups"
        )
    for number, (_, layer, _) in zip(group["params"], parts, strict=True):
        for one in erased:
            if number in optimizer["state"] and one.blocks.get(layer):
                forget(optimizer["state"][number], one.blocks[layer])
