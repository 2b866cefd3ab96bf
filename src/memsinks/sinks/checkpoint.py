"""Loading models with their sinks, and any others."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, PreTrainedModel

from memsinks.errors import CheckpointError
from memsinks.sinks.attach import add_sinks
from memsinks.sinks.config import SinkConfig
from memsinks.sinks.state import is_sink
from memsinks.sinks.storage import (
    FOLDER,
    TENSORS,
    _check_files,
    _check_fingerprint,
    _read_sinks,
    has_saved_sinks,
    read_settings,
)


def load_sinks(model: PreTrainedModel, directory: str | os.PathLike[str]) -> None:
    """Load the sinks of a checkpoint into a model that has sinks of the same settings.

    Raises:
        CheckpointError: no sinks there, another fingerprint, a file whose hash differs (a mixture of two checkpoints),
            tensors missing or of another shape. The model is unchanged then.
    """
    directory = Path(directory)
    settings = read_settings(directory)
    _check_fingerprint(model, directory, settings)
    _check_files(directory, settings)
    _read_sinks(model, directory)


def load(directory: str | os.PathLike[str], **arguments: Any) -> PreTrainedModel:
    """Load a model with its sinks, as `save_pretrained` wrote them, in eval mode.

    Args:
        directory: the checkpoint folder.
        arguments: passed to ``AutoModelForCausalLM.from_pretrained``, e.g. ``dtype``.

    Raises:
        CheckpointError: see `load_sinks`.
        ConfigError: the settings are of another format version.
    """
    settings = read_settings(directory)
    config = SinkConfig.from_dict(settings["config"])
    _check_files(Path(directory), settings)
    model = load_stock(directory, **arguments)
    add_sinks(model, config)
    _check_fingerprint(model, Path(directory), settings)
    _read_sinks(model, Path(directory))
    return model.eval()


def load_stock(directory: str | os.PathLike[str], **arguments: Any) -> PreTrainedModel:
    """The stock part of a checkpoint, or any checkpoint without sinks; CheckpointError if it cannot be loaded."""
    try:
        return AutoModelForCausalLM.from_pretrained(directory, **arguments)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"cannot load a model from {directory}: {error}") from error


def describe(directory: str | os.PathLike[str]) -> str:
    """A checkpoint's sinks in a few lines of text, read from its files without building the model."""
    settings = read_settings(directory)
    config = settings["config"]
    with safe_open(Path(directory) / FOLDER / TENSORS, "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    numbers = sum(math.prod(shape) for name, shape in shapes.items() if is_sink(name))
    assigned = shapes["table.ids"][0]
    defaults = {name: value for name, value in config.items() if name not in ("neurons", "active", "format_version")}
    return "\n".join([
        f"{settings['model_type']} with sinks in layers {settings['layers']}",
        f"general neurons  {settings['host_width']} a layer",
        f"sink neurons     {config['neurons']} a layer, {config['active']} open per document",
        f"sink parameters  {numbers:,}",
        f"assigned ids     {assigned} (all others are hashed)",
        f"settings         {', '.join(f'{name}={value}' for name, value in defaults.items())}",
        f"fingerprint      {settings['fingerprint']}",
    ])  # fmt: skip


def load_any(path: str | os.PathLike[str]) -> PreTrainedModel:
    """Load any causal language model in eval mode: with its sinks where the checkpoint has them."""
    if has_saved_sinks(path):
        return load(path)
    return load_stock(path).eval()
