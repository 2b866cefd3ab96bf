"""Loading models with their sinks, and any others."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from memsinks.errors import CheckpointError
from memsinks.sinks.attach import add_sinks
from memsinks.sinks.config import TRAINING
from memsinks.sinks.state import has_sinks, is_sink
from memsinks.sinks.storage import (
    FOLDER,
    TENSORS,
    check_files,
    check_fits,
    has_saved_sinks,
    read_settings,
    read_sinks,
)


def load(directory: str | os.PathLike[str], **arguments: Any) -> PreTrainedModel:
    """Load a model with its sinks, as `save_pretrained` wrote them, in eval mode.

    Args:
        directory: the checkpoint folder.
        arguments: passed to ``AutoModelForCausalLM.from_pretrained``, e.g. ``dtype``.

    Raises:
        CheckpointError: see `load_sinks`.
        ConfigError: the settings are of a newer format version.
    """
    saved = read_settings(directory)
    if saved.alone:
        raise CheckpointError(
            f"{directory} holds sinks alone; load the model that they were trained beside, then "
            f"memsinks.load_sinks(model, {str(directory)!r})"
        )
    check_files(Path(directory), saved)
    model = load_stock(directory, **arguments)
    load_sinks(model, directory)
    return model.eval()


def load_sinks(model: PreTrainedModel, directory: str | os.PathLike[str]) -> None:
    """Load the sinks of a checkpoint, or of a folder that `save_sinks` wrote, in place.

    Args:
        model: with sinks of the same layout; one without gets them first, with the settings they were saved with.
        directory: a folder with a subfolder ``sinks/``.

    Raises:
        CheckpointError: no sinks there, another layout, a file whose hash differs (a mixture of two checkpoints), tensors
            missing or of another shape. Sinks that the model had are unchanged then.
        ArchitectureError: the model cannot carry sinks.
    """
    directory = Path(directory)
    saved = read_settings(directory)
    check_files(directory, saved)
    if not has_sinks(model):
        add_sinks(model, saved.config)
    check_fits(model, directory, saved)
    read_sinks(model, directory, saved)


def load_stock(directory: str | os.PathLike[str], **arguments: Any) -> PreTrainedModel:
    """The stock part of a checkpoint, or any checkpoint without sinks; CheckpointError if it cannot be loaded."""
    try:
        return AutoModelForCausalLM.from_pretrained(directory, **arguments)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"cannot load a model from {directory}: {error}") from error


def load_config(directory: str | os.PathLike[str]) -> PretrainedConfig:
    """The configuration of any checkpoint, read without its weights; CheckpointError if it cannot be loaded."""
    try:
        return AutoConfig.from_pretrained(directory)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot load a model from {directory}: {error}") from error


def load_any(path: str | os.PathLike[str]) -> PreTrainedModel:
    """Load any causal language model in eval mode: with its sinks where the checkpoint has them."""
    if has_saved_sinks(path):
        return load(path)
    return load_stock(path).eval()


def describe(directory: str | os.PathLike[str]) -> str:
    """A checkpoint's sinks in a few lines of text, read from its files without building the model."""
    saved = read_settings(directory)
    config, layout = saved.config, saved.layout
    with safe_open(Path(directory) / FOLDER / TENSORS, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    numbers = sum(math.prod(shape) for name, shape in shapes.items() if is_sink(name))
    shown = ("block_size", "routing", "per_layer", "reserved_blocks", "seed", *TRAINING)
    lines = {
        f"{layout['model_type']} with sinks in layers": layout["layers"],
        "general neurons ": f"{layout['intermediate_size']} a layer",
        "sink neurons    ": f"{config.neurons} a layer, {config.active} open per document",
        "sink parameters ": f"{numbers:,}",
        "assigned ids    ": f"{shapes['table.ids'][0]} (all others are hashed)",
        "settings        ": ", ".join(f"{name}={getattr(config, name)}" for name in shown),
        "fingerprint     ": saved.stored["fingerprint"],
    }
    return "\n".join(f"{name} {value}" for name, value in lines.items())
