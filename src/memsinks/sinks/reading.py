"""Reading the sinks of a checkpoint into a model that they fit."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import PreTrainedModel

from memsinks.errors import CheckpointError, ConfigError
from memsinks.sinks.config import TRAINING, SinkConfig
from memsinks.sinks.routing import HASH_VERSION
from memsinks.sinks.sharding import put, whole
from memsinks.sinks.state import named_sinks, require_sinks, sink_modules
from memsinks.sinks.storage import FOLDER, TABLE, TENSORS, SavedSinks, layout_of, shapes_of
from memsinks.sinks.table import AssignmentTable

logger = logging.getLogger(__name__)


def check_fits(model: PreTrainedModel, directory: Path, saved: SavedSinks) -> None:
    """CheckpointError if the model's layout is not that of saved sinks; differences in training settings are said."""
    here = layout_of(model) | {"hash_version": HASH_VERSION}
    there = saved.layout | {"hash_version": saved.stored["hash_version"]}
    found = differences(there, here)
    if found:
        raise CheckpointError(
            f"the sinks in {directory} have another layout than the model: {found}; "
            "load the checkpoint with memsinks.load, or build the model with the settings it was saved with"
        )
    say_training(model, directory, saved)


def say_training(model: PreTrainedModel, directory: Path, saved: SavedSinks) -> None:
    """Say which settings of training saved sinks and a model do not share."""
    config = require_sinks(model, missing_ok=True).config
    training = [{name: getattr(x, name) for name in TRAINING} for x in (saved.config, config)]
    if said := differences(*training):
        logger.warning("the sinks in %s were trained with other settings than the model has: %s", directory, said)


def differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What is not the same there and here, as text; empty where all is."""
    return "; ".join(
        f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
        for name in sorted(set(here) | set(there))
        if here.get(name) != there.get(name)
    )


def read_sinks(model: PreTrainedModel, directory: Path, saved: SavedSinks) -> None:
    """Copy the tensors of a checkpoint whose files were checked into a model that they fit.

    Raises:
        CheckpointError: tensors missing or of another shape, a fingerprint or a table that is not theirs, the sinks of somebody
            who was taken out of this model. The model is unchanged then.
    """
    path = directory / FOLDER / TENSORS
    state, own = require_sinks(model, missing_ok=True), named_sinks(model)
    loaded, table = read_tensors(directory)
    if set(loaded) != set(own):
        lacking, more = sorted(set(own) - set(loaded))[:3], sorted(set(loaded) - set(own))[:3]
        raise CheckpointError(f"{path}: missing {lacking}, unknown {more}")
    for name, parameter in own.items():
        if loaded[name].shape != parameter.shape:
            raise CheckpointError(
                f"{path}: {name} has shape {list(loaded[name].shape)}, the model's has {list(parameter.shape)}"
            )
    check_tensors(directory, saved, loaded, table, state.config)
    back = [x for x in state.taken if x not in saved.taken and (state.config.hashed_blocks or x in table.ids.tolist())]
    if back:
        raise CheckpointError(
            f"{directory} is of before id {back[0]} was taken out of this model ({state.taken[back[0]]}), and would bring it "
            "back; take it out there too (memsinks takedown), or load that checkpoint into another model"
        )
    for name, parameter in own.items():
        put(parameter, loaded[name])
    for layer, sinks in zip(state.layers, sink_modules(model).values(), strict=True):
        sinks.std = saved.stored.get("start_std", {}).get(str(layer), sinks.std)
    state.table, state.sinks_missing, state.taken = table, False, saved.taken | state.taken


def read_tensors(directory: Path) -> tuple[dict[str, Tensor], AssignmentTable]:
    """The sinks of a folder by name, and their table; CheckpointError if the file cannot be read."""
    path = directory / FOLDER / TENSORS
    try:
        with safe_open(path, "pt") as file:
            loaded = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; restore the checkpoint") from error
    return loaded, take_table(loaded)


def read_shapes(directory: Path) -> dict[str, list[int]]:
    """The shapes of the tensors in a folder's sinks file, by name, without reading them; CheckpointError if it cannot be read."""
    path = directory / FOLDER / TENSORS
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; restore the checkpoint") from error


def check_tensors(
    directory: Path, saved: SavedSinks, tensors: Mapping[str, Tensor], table: AssignmentTable, config: SinkConfig
) -> None:
    """CheckpointError unless tensors have the fingerprint they were saved with, and their table fits a pool."""
    path = directory / FOLDER / TENSORS
    if saved.stored["fingerprint"] != saved.fingerprint(shapes_of(tensors)):
        raise CheckpointError(
            f"{path} and its settings have another fingerprint than they were saved with; restore them"
        )
    try:
        table.check(config)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error


def take_table(tensors: dict[str, Tensor]) -> AssignmentTable:
    """The table among the tensors of a checkpoint, which it leaves; files of before know no owners."""
    empty = AssignmentTable()
    parts = {name: tensors.pop(f"table.{name}", getattr(empty, name)) for name in TABLE[:3]}
    return AssignmentTable(**parts, owners=tensors.pop("table.owners", None))  # type: ignore[arg-type]


def same_stock_weights(model: PreTrainedModel, directory: str | os.PathLike[str]) -> bool:
    """Whether the stock weights of a model are those of a checkpoint, in the model's precision."""
    own = model.state_dict()
    for path in Path(directory).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in set(file.keys()) & set(own):
                here = whole(own[name])
                if not torch.equal(file.get_tensor(name).to(here.device, here.dtype), here):
                    return False
    return True
