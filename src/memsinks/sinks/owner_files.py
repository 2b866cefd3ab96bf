"""The sinks of some owners in files no larger than an adapter: written from one model, put beside the same weights in another.

    ms.save_sinks(model, "alice/", owners=[alice])
    base = AutoModelForCausalLM.from_pretrained("base/")
    ms.load_sinks(base, ["alice/", "bob/"])

Such a folder is the sinks folder of a model whose pool is just their blocks, all of them reserved and numbered from 0. Its
settings say so (``of_owners``), and beside which weights they were saved (``base_sha256``).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from memsinks.batch import checked_id
from memsinks.errors import ArchitectureError, CheckpointError, DataError, refuse
from memsinks.sinks.attach import add_sinks, undone_on_failure
from memsinks.sinks.config import TRAINING, SinkConfig
from memsinks.sinks.own import free_blocks, freeze_shared, grow
from memsinks.sinks.quantized import quantizer_of
from memsinks.sinks.reading import check_tensors, differences, read_tensors, say_training
from memsinks.sinks.sharding import is_sharded
from memsinks.sinks.state import (
    SinkState,
    has_adapters,
    has_sinks,
    named_sinks,
    require_sinks,
    shared_hash,
    sink_modules,
)
from memsinks.sinks.storage import SavedSinks, layout_of
from memsinks.sinks.table import EMPTY_TABLE, AssignmentTable

logger = logging.getLogger(__name__)

SHARED_LAYOUT = ("model_type", "layers", "intermediate_size", "routing", "block_size")
"""Parts of the layout that the sinks of owners share with the model they come into; the size of the pool is not among them."""
SHOWN = 20
"""Owners that are listed in a description, at most."""


@dataclass(frozen=True)
class OwnerFile:
    """The sinks of some owners, read: tensors [blocks, block_size, d] by name, on the CPU, and the table over these blocks."""

    folder: Path
    saved: SavedSinks
    tensors: dict[str, Tensor]
    table: AssignmentTable


# Writing


def of_owners(model: PreTrainedModel, owners: Iterable[int]) -> tuple[SinkState, dict[str, Tensor], dict[str, Any]]:
    """What `write_sinks` writes of some owners: a state with their blocks alone, tensors, settings; errors as `save_sinks`."""
    state = require_sinks(model)
    if has_adapters(model):
        raise ArchitectureError(
            "the model carries PEFT adapters, beside which these sinks were trained; save all sinks beside the adapter "
            "(save_sinks without owners), or merge_and_unload() first"
        )
    if isinstance(owners, str | bytes) or not isinstance(owners, Iterable):
        raise DataError(f"owners is a list of ids, got {owners!r:.60}; for one of them give [{owners!r:.60}]")
    own = {owner: state.table.own_blocks(owner) for owner in map(checked_id, owners)}
    owner_of = {block: owner for owner, blocks in own.items() for block in blocks}
    pairs = {key: row for key, row in state.table.to_pairs().items() if any(block in owner_of for block, _ in row)}
    refuse(_problems(state, own, owner_of, pairs), "cannot save the sinks of these owners", DataError)
    number = {block: place for place, block in enumerate(sorted(owner_of))}
    table = AssignmentTable.from_pairs(
        {key: [(number[block], owner) for block, owner in row] for key, row in pairs.items()}
    )
    config = _pool(state.config, len(number), max(map(len, pairs.values())))
    tensors = {name: value.detach()[sorted(owner_of)] for name, value in named_sinks(model).items()}
    part = SinkState(config, state.layers, state.intermediate_size, (), table=table)
    return part, tensors, {"of_owners": True, "base_sha256": shared_hash(model)}


def _problems(
    state: SinkState,
    own: Mapping[int, list[int]],
    owner_of: Mapping[int, int],
    pairs: Mapping[int, list[tuple[int, int]]],
) -> list[str]:
    """Why the own blocks of some owners cannot stand alone."""
    problems = [] if own else ["owners is empty; None saves all sinks"]
    for owner, blocks in own.items():
        taken = f", it was taken out ({state.taken[owner]})" if owner in state.taken else "; memsinks.assign gives some"
        problems += [] if blocks else [f"id {owner!r} has no blocks of its own{taken}"]
        hashed = [block for block in blocks if block < state.config.hashed_blocks]
        problems += [f"block {hashed[0]} of id {owner} is not its own: others are hashed to it"] if hashed else []
    mixed = []
    for key, row in pairs.items():
        whose = next(owner_of[block] for block, _ in row if block in owner_of)
        others = sorted({owner for _, owner in row if owner not in own})
        if others:
            mixed.append(f"id {key} opens blocks of {whose} and of {others[0]}, who is not saved; save both")
    return problems + mixed[:3]


def _pool(config: SinkConfig, blocks: int, most: int) -> SinkConfig:
    """The settings of a pool of so many blocks, all reserved, of which an id opens `most`."""
    size = config.block_size
    return replace(config, neurons=blocks * size, active=min(most, blocks) * size, reserved_blocks=blocks)


# Reading


def read_owners(directory: Path, saved: SavedSinks) -> OwnerFile:
    """The sinks of owners in a folder; CheckpointError for a file that cannot be read or has another fingerprint."""
    tensors, table = read_tensors(directory)
    check_tensors(directory, saved, tensors, table, saved.config)
    return OwnerFile(directory, saved, tensors, table)


def put_owners(model: PreTrainedModel, files: Sequence[OwnerFile], any_base: bool) -> None:
    """Put the sinks of owners into a model, with or without sinks; for the errors see `load_sinks`. All or nothing is done."""
    if is_sharded(model):
        raise ArchitectureError("the model is sharded already; load sinks before sharding")
    new = not has_sinks(model)
    state = None if new else require_sinks(model)
    _refuse_clashes(state, files)
    check_base(model, [(file.folder, file.saved) for file in files], any_base)
    with undone_on_failure(model):
        if new:
            _add_pool(model, files)
        for file in files:
            _check_fits(model, file)
        _fill(model, files)


def _add_pool(model: PreTrainedModel, files: Sequence[OwnerFile]) -> None:
    """Give a model sinks of just the blocks in these files, which start as those did, and freeze the rest."""
    first = files[0].saved
    blocks = sum(len(x.table.blocks.unique()) for x in files)
    most = max(x.saved.config.open_blocks for x in files)
    config = _pool(first.config, blocks, most)
    if quantizer_of(model):  # whose weights learn nothing, whatever the settings of training were
        config = replace(config, open_from=1, shared="none")
    add_sinks(model, config)
    for sinks in sink_modules(model).values():
        sinks.std = float(first.stored["start_std"].get(str(sinks.layer), sinks.std))
    freeze_shared(model)


def _refuse_clashes(state: SinkState | None, files: Sequence[OwnerFile]) -> None:
    """CheckpointError for an id that would have blocks twice, or was taken out, in the model or in one of the folders."""
    problems: list[str] = []
    table, taken = (state.table, dict(state.taken)) if state is not None else (EMPTY_TABLE, {})
    held = dict.fromkeys(table.ids.tolist(), "the model")
    for file in files:
        ids = file.table.ids.tolist()
        if not ids:
            records = sorted(set(file.saved.taken.values()))
            problems.append(f"{file.folder} holds the sinks of nobody, all were taken out ({', '.join(records)})")
        problems += [f"id {x} of {file.folder} has blocks in {held[x]} already" for x in ids if x in held][:3]
        held |= {x: str(file.folder) for x in ids if x not in held}
        taken |= file.saved.taken
    out = [x for x in held if x in taken]
    problems += [f"id {x} of {held[x]} was taken out ({taken[x]})" for x in out[:3]]
    refuse(problems, "cannot load the sinks of owners", CheckpointError)


def check_base(model: PreTrainedModel, files: Sequence[tuple[Path, SavedSinks]], any_base: bool) -> None:
    """CheckpointError, or a warning, for sinks that were saved beside other weights."""
    here = shared_hash(model)
    for folder, saved in files:
        there = str(saved.stored["base_sha256"])
        if here == there:
            continue
        said = (
            f"the sinks in {folder} were saved beside other weights (SHA-256 {there[:12]}...) than those of the model "
            f"({here[:12]}...)"
        )
        if not any_base:
            raise CheckpointError(
                f'{said}; load that model, in the same dtype. If it is the same in another dtype, give base="any"'
            )
        logger.warning("%s", said)


def _check_fits(model: PreTrainedModel, file: OwnerFile) -> None:
    """CheckpointError if the model's blocks are of another kind; differences in training settings are said."""
    layouts = [{name: x[name] for name in SHARED_LAYOUT} for x in (file.saved.layout, layout_of(model))]
    shapes = [{name: list(x.shape[1:]) for name, x in found.items()} for found in (file.tensors, named_sinks(model))]
    if found := differences(*layouts) or differences(*shapes):
        raise CheckpointError(f"the sinks in {file.folder} do not fit the model's: {found}")
    say_training(model, file.folder, file.saved)


@torch.no_grad()
def _fill(model: PreTrainedModel, files: Sequence[OwnerFile]) -> None:
    """Copy the blocks of owners, who fit, into free ones of the model."""
    state = require_sinks(model)
    here = [file.table.blocks.unique().tolist() for file in files]
    lacking = sum(map(len, here)) - len(free_blocks(model))
    if lacking > 0:
        grow(model, lacking)
    free, pairs = free_blocks(model), state.table.to_pairs()
    own = named_sinks(model)
    for file, blocks in zip(files, here, strict=True):
        number = dict(zip(blocks, free, strict=False))
        free = free[len(blocks) :]
        for name, values in file.tensors.items():
            own[name][list(number.values())] = values[blocks].to(own[name].device, own[name].dtype)
        pairs |= {key: [(number[block], owner) for block, owner in row] for key, row in file.table.to_pairs().items()}
        state.taken |= file.saved.taken
    state.table = AssignmentTable.from_pairs(pairs)


def describe_owners(file: OwnerFile) -> str:
    """The sinks of owners in a few lines of text."""
    config, layout, taken = file.saved.config, file.saved.layout, file.saved.taken
    owners = sorted(set(file.table.owners.tolist()))
    more = f" and {len(owners) - SHOWN} more" if len(owners) > SHOWN else ""
    settings = {name: getattr(config, name) for name in ("block_size", "routing", "seed", *TRAINING)}
    lines = {
        f"{layout['model_type']}, sinks of some owners alone, in layers": layout["layers"],
        "owners          ": (", ".join(map(str, owners[:SHOWN])) or "none") + more,
        "documents       ": f"{len(set(file.table.ids.tolist()) - set(owners))} more within them",
        "sink neurons    ": f"{config.neurons} a layer, in {config.blocks} blocks",
        "sink parameters ": f"{sum(x.numel() for x in file.tensors.values()):,}",
        "taken out       ": ", ".join(f"{key} ({name})" for key, name in sorted(taken.items())) or "none",
        "settings        ": ", ".join(f"{name}={value}" for name, value in settings.items()),
        "saved beside    ": f"weights with SHA-256 {file.saved.stored['base_sha256']}",
        "fingerprint     ": file.saved.stored["fingerprint"],
    }
    return "\n".join(f"{name} {value}" for name, value in lines.items())
