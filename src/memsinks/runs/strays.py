"""Files of weights that no settings describe: sinks or their moments in them are refused, for nobody can say whose they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from memsinks.errors import CheckpointError
from memsinks.sinks.state import is_sink
from memsinks.training.complete import METADATA, NOT_PLAIN, sharded_names

OF_TORCH = (".pt", ".pth", ".bin", ".ckpt")
"""What `torch.save` writes is called so."""


def refuse_sinks_within(path: Path) -> bool:
    """Whether a file holds weights; CheckpointError if sinks or moments of sinks are among them, or if it is damaged."""
    if path.suffix == ".safetensors":
        names = _of_safetensors(path)
    elif path.name == METADATA:
        names = sharded_names(path)
    elif path.suffix in OF_TORCH:
        names = _of_torch(path)
    else:
        return False
    inside = next((name for name in names or () if is_sink(f"{name}.")), None)
    if inside is not None:
        what = path.parent if path.name == METADATA else path
        raise CheckpointError(
            f"{what} holds sinks ({inside}, ...) without the settings that say whose they are; move it elsewhere or remove "
            "it. The sinks of an adapter of PEFT are erased in memory: load base, sinks and adapter, erase, save both again"
        )
    return names is not None


def _of_safetensors(path: Path) -> list[str]:
    try:
        with safe_open(path, "pt") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read: {error}; remove it, or restore it") from error


def _of_torch(path: Path) -> list[str] | None:
    """Names in a file of `torch.save`; None where it holds other things than tensors, numbers and text."""
    try:
        return list(_names(torch.load(path, map_location="meta", weights_only=True)))
    except NOT_PLAIN:
        return None
    except Exception as error:  # zip and torch raise half a dozen types
        raise CheckpointError(f"{path} cannot be read ({error}); remove it, or restore it") from error


def _names(value: Any) -> Iterator[str]:
    """Names of tensors and of groups of an optimizer, however deep."""
    if isinstance(value, dict):
        if isinstance(value.get("params"), list) and value.get("name") == "sinks":
            yield "param_groups.sinks."
        for name, inner in value.items():
            yield str(name)
            yield from _names(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _names(inner)
