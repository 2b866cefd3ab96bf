"""The folder ``sinks/`` of a checkpoint: settings, fingerprint, tensors.

folder/                     what the stock save_pretrained writes; AutoModelForCausalLM.from_pretrained(folder) works
folder/sinks/sinks.json     settings, fingerprint, SHA-256 of every other file that belongs to the model
folder/sinks/sinks.safetensors"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from memsinks.errors import CheckpointError, ConfigError
from memsinks.files import file_hash, written_beside
from memsinks.sinks.config import FORMAT_VERSION
from memsinks.sinks.routing import HASH_VERSION
from memsinks.sinks.state import SinkState, is_sink, require_sinks
from memsinks.sinks.table import AssignmentTable

FOLDER, SETTINGS, TENSORS = "sinks", "sinks.json", "sinks.safetensors"
TABLE = ("ids", "offsets", "blocks")


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over what a checkpoint's sinks must agree on: format, hash, settings, architecture and shapes."""
    state = require_sinks(model)
    agreed = {
        "format_version": FORMAT_VERSION,
        "hash_version": HASH_VERSION,
        "config": state.config.to_dict(),
        "model_type": model.config.model_type,
        "layers": list(state.layers),
        "host_width": state.host_width,
        "shapes": {name: list(tensor.shape) for name, tensor in sorted(_sink_tensors(model).items())},
    }
    return hashlib.sha256(json.dumps(agreed, sort_keys=True).encode()).hexdigest()


def _sink_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: tensor.detach() for name, tensor in model.named_parameters() if is_sink(name)}


def save_with_sinks(
    model: Any,
    stock_save: Callable[..., None],
    directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    push_to_hub: bool = False,
    **arguments: Any,
) -> None:
    """What `save_pretrained` of a model with sinks does; `stock_save` writes the stock part."""
    if push_to_hub:
        raise ConfigError("push_to_hub would upload only a part; save to a folder and upload that (or an export)")
    target = Path(directory)
    if target.is_file():
        raise CheckpointError(f"{target} is a file; give a folder")
    if state_dict is None:
        state_dict = _full_state_dict(model)
    stock = {name: tensor for name, tensor in state_dict.items() if not is_sink(name)}
    sinks = {name: state_dict[name] for name in _sink_tensors(model)}
    if not is_main_process:
        return
    with written_beside(target) as part:
        stock_save(part, state_dict=stock, **arguments)
        write_sinks(model, sinks, part)


def _full_state_dict(model: Any) -> dict[str, Tensor]:
    if any(type(parameter).__name__ == "DTensor" for parameter in model.parameters()):
        from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        return get_model_state_dict(model, options=options)  # type: ignore[return-value]
    return model.state_dict()


def write_sinks(model: PreTrainedModel, tensors: dict[str, Tensor], part: Path) -> None:
    """Write ``sinks/`` into `part`, in which the stock files lie already."""
    state = require_sinks(model)
    folder = part / FOLDER
    folder.mkdir()
    table = {f"table.{name}": getattr(state.table, name) for name in TABLE}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in (tensors | table).items()}
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    stock = sorted(path for path in part.iterdir() if path.suffix == ".safetensors")
    settings = {
        "fingerprint": fingerprint(model),
        "config": state.config.to_dict(),
        "hash_version": HASH_VERSION,
        "model_type": model.config.model_type,
        "layers": list(state.layers),
        "host_width": state.host_width,
        "sha256": {str(path.relative_to(part)): file_hash(path) for path in [*stock, folder / TENSORS]},
    }
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")


def read_settings(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The settings in ``sinks/sinks.json``; CheckpointError if there are none or they cannot be read."""
    path = Path(directory) / FOLDER / SETTINGS
    kept = sorted(Path(directory).parent.glob(f".{Path(directory).name}.old-*"))
    if not Path(directory).exists() and kept:
        raise CheckpointError(f"saving {directory} was interrupted; what was there is in {kept[-1]}, rename it back")
    if not Path(directory).is_dir():
        raise CheckpointError(f"there is no folder {directory}")
    if (Path(directory) / "model" / FOLDER / SETTINGS).is_file():
        raise CheckpointError(f"{directory} is a run folder; its model is {Path(directory) / 'model'}")
    if not path.is_file():
        raise CheckpointError(
            f"{directory} holds no sinks ({path} is missing); a checkpoint without sinks is loaded with "
            "AutoModelForCausalLM.from_pretrained"
        )
    try:
        settings = json.loads(path.read_text())
        missing = {"fingerprint", "config", "sha256"} - set(settings)
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; restore the checkpoint") from error
    if missing:
        raise CheckpointError(f"{path} lacks {sorted(missing)}; it was not written by memsinks or is damaged")
    return settings


def has_saved_sinks(directory: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint folder holds sinks."""
    return (Path(directory) / FOLDER / SETTINGS).is_file()


def _check_fingerprint(model: PreTrainedModel, directory: Path, settings: dict[str, Any]) -> None:
    if settings["fingerprint"] != fingerprint(model):
        found = _differences(settings, require_sinks(model), model)
        raise CheckpointError(
            f"the sinks in {directory} have another fingerprint than the model: {found}; "
            "load the checkpoint with memsinks.load, or build the model with the settings it was saved with"
        )


def _read_sinks(model: PreTrainedModel, directory: Path) -> None:
    """Copy the tensors of a checkpoint whose settings and files were checked into the model."""
    state = require_sinks(model)
    own = {name: parameter for name, parameter in model.named_parameters() if is_sink(name)}
    with safe_open(directory / FOLDER / TENSORS, "pt") as file:
        names = set(file.keys())
        expected = set(own) | {f"table.{name}" for name in TABLE}
        if names != expected:
            raise CheckpointError(
                f"{directory / FOLDER / TENSORS}: missing {sorted(expected - names)[:3]}, unknown {sorted(names - expected)[:3]}"
            )
        loaded = {name: file.get_tensor(name) for name in names}
    for name, parameter in own.items():
        if loaded[name].shape != parameter.shape:
            raise CheckpointError(
                f"{directory / FOLDER / TENSORS}: {name} has shape {list(loaded[name].shape)}, the model's has "
                f"{list(parameter.shape)}"
            )
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(loaded[name])
    state.table = AssignmentTable(*(loaded[f"table.{name}"] for name in TABLE))
    state.sinks_missing = False


def same_stock_weights(model: PreTrainedModel, directory: str | os.PathLike[str]) -> bool:
    """Whether the stock weights of a model are those of a checkpoint, in the model's precision."""
    own = model.state_dict()
    for path in Path(directory).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in set(file.keys()) & set(own):
                if not torch.equal(file.get_tensor(name).to(own[name].device, own[name].dtype), own[name]):
                    return False
    return True


def _check_files(directory: Path, settings: dict[str, Any]) -> None:
    """Every safetensors file must be one that these sinks were saved with, and be unchanged."""
    for name, digest in settings["sha256"].items():
        path = directory / name
        if not path.is_file() or file_hash(path) != digest:
            raise CheckpointError(
                f"{path} is {'not the file' if path.is_file() else 'missing: a file'} these sinks were saved with "
                f"(SHA-256 {digest[:12]}...); the folder is a mixture of checkpoints or damaged, restore it"
            )
    for path in directory.glob("*.safetensors"):
        if path.name not in settings["sha256"]:
            raise CheckpointError(f"{path} does not belong to this checkpoint and may be read instead of it; remove it")


def _differences(settings: dict[str, Any], state: SinkState, model: PreTrainedModel) -> str:
    here = state.config.to_dict() | {
        "hash_version": HASH_VERSION, "model_type": model.config.model_type, "host_width": state.host_width,
    }  # fmt: skip
    there = settings["config"] | {name: settings.get(name) for name in ("hash_version", "model_type", "host_width")}
    found = [
        f"{name} is {there.get(name)!r} there and {here.get(name)!r} here"
        for name in sorted(set(here) | set(there))
        if here.get(name) != there.get(name)
    ]
    return "; ".join(found) or "the tensor shapes differ"
