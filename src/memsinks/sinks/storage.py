"""The folder ``sinks/`` of a checkpoint: settings, fingerprint, tensors.

    folder/                     what the stock save_pretrained writes; AutoModelForCausalLM.from_pretrained(folder) works
    folder/sinks/sinks.json     versions, layout, training settings, fingerprint, SHA-256 of what the sinks belong to
    folder/sinks/sinks.safetensors

The sinks may stand alone, without the other files; or be those of some owners alone, see `owner_files`.

The *layout* (which sinks there are, and which of them an id opens) and the hash of its parts, the *fingerprint*, must agree
with the model that the sinks are loaded into; *training settings* are stored, and a difference is said. Files of format 1,
in which all this was one dict, are read for ever.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from memsinks.checks import is_int, is_number
from memsinks.errors import CheckpointError, ConfigError
from memsinks.files import file_hash, lies_within, written_beside
from memsinks.sinks.config import FORMAT_VERSION, LAYOUT, SinkConfig
from memsinks.sinks.layer import Sinks
from memsinks.sinks.quantized import quantizer_of, refuse_unsavable
from memsinks.sinks.routing import HASH_VERSION
from memsinks.sinks.sharding import full_state_dict, is_sharded, on_first_rank
from memsinks.sinks.state import (
    SinkState,
    canonical_name,
    is_sink,
    named_sinks,
    refuse_adapters,
    require_sinks,
    shared_parameters,
    sink_modules,
    sink_parameters,
    unwrap,
)
from memsinks.sinks.table import TABLE_VERSION

FOLDER, SETTINGS, TENSORS = "sinks", "sinks.json", "sinks.safetensors"
TABLE = ("ids", "offsets", "blocks", "owners")
ADDED_LATER: dict[str, Any] = {}
"""Parts of the layout that format 2 did not have at first, with the value that means what it did without them: a part that
has this value is not hashed, so that older fingerprints stay."""


@dataclass(frozen=True)
class SavedSinks:
    """What ``sinks.json`` says.

    version: of the format. layout: see `layout_of`. alone: saved without the other weights. stored: the file's own words.
    """

    version: int
    config: SinkConfig
    layout: dict[str, Any]
    alone: bool
    stored: dict[str, Any]

    @property
    def sha256(self) -> dict[str, str]:
        """Of the files that these sinks were saved with, by their path in the checkpoint."""
        return self.stored["sha256"]

    @property
    def of_owners(self) -> bool:
        """Whether these are the sinks of some owners alone, see `owner_files`."""
        return bool(self.stored.get("of_owners"))

    @property
    def frozen(self) -> bool:
        """Whether nothing but the sinks learned in the model that they were saved from."""
        return bool(self.stored.get("frozen", "base_sha256" in self.stored))

    @property
    def taken(self) -> dict[int, str]:
        """{id: name of the record} of owners that were taken out."""
        return {int(key): name for key, name in self.stored.get("taken", {}).items()}

    def fingerprint(self, shapes: Mapping[str, list[int]]) -> str:
        """As the version that wrote the file makes it, for tensors of these shapes."""
        if self.version > 1:
            return _fingerprint(self.layout, self.stored["hash_version"], shapes)
        names = ("hash_version", "config", "model_type", "layers", "host_width")
        return _hash({"format_version": 1, **{name: self.stored[name] for name in names}, "shapes": shapes})


def layout_of(model: PreTrainedModel) -> dict[str, Any]:
    """On what depends which sinks a model has and which of them an id opens, JSON-ready."""
    state = require_sinks(model, missing_ok=True)
    return _layout(state.config, unwrap(model).config.model_type, state.layers, state.intermediate_size)


def _layout(config: SinkConfig, model_type: str, layers: Any, intermediate_size: int) -> dict[str, Any]:
    values = {name: getattr(config, name) for name in LAYOUT}
    return values | {
        "model_type": model_type,
        "layers": list(layers),
        "intermediate_size": intermediate_size,
    }


def fingerprint(model: PreTrainedModel) -> str:
    """SHA-256 over what a checkpoint's sinks must agree on: hash, layout and shapes."""
    return _fingerprint(layout_of(model), HASH_VERSION, shapes_of(named_sinks(model)))


def _fingerprint(layout: Mapping[str, Any], hash_version: int, shapes: Mapping[str, list[int]]) -> str:
    hashed = {name: value for name, value in layout.items() if name not in ADDED_LATER or value != ADDED_LATER[name]}
    return _hash({"format_version": 2, "hash_version": hash_version, "layout": hashed, "shapes": shapes})


def _hash(agreed: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(agreed, sort_keys=True).encode()).hexdigest()


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in sorted(tensors.items())}


# Writing


def save_with_sinks(
    model: Any,
    stock_save: Callable[..., None],
    directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    push_to_hub: bool = False,
    **arguments: Any,
) -> None:
    """What `save_pretrained` of a model with sinks does; `stock_save` writes the stock part.

    A sharded model is gathered, which all its ranks must call this for; the first one writes.
    """
    require_sinks(model)
    if push_to_hub:
        raise ConfigError("push_to_hub would upload only a part; save to a folder and upload that (or an export)")
    refuse_adapters(model)
    refuse_unsavable(model)
    target = Path(directory)
    if target.is_file():
        raise CheckpointError(f"{target} is a file; give a folder")
    gathered = state_dict is None and is_sharded(model)
    tensors = full_state_dict(model) if state_dict is None else state_dict

    def write() -> None:
        _write_whole(model, stock_save, target, tensors, arguments)

    if gathered:
        on_first_rank(model, write)
    elif is_main_process and (tensors or not is_sharded(model)):  # all ranks but one have an empty one
        write()


def _write_whole(
    model: Any, stock_save: Callable[..., None], target: Path, tensors: Mapping[str, Tensor], arguments: dict[str, Any]
) -> None:
    """Write whole tensors by name, stock ones and sinks, as a checkpoint."""
    tensors = {canonical_name(name): tensor for name, tensor in tensors.items()}
    wanted = named_sinks(model)
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise CheckpointError(
            f"the state dict that is to be saved lacks {len(missing)} sink tensors ({missing[0]}, ...); give the whole one"
        )
    with written_beside(target) as part:
        with _sinks_apart(model) if quantizer_of(model) else nullcontext():
            stock_save(part, state_dict={name: x for name, x in tensors.items() if not is_sink(name)}, **arguments)
        folder = part / FOLDER
        folder.mkdir()
        stock = sorted(part.glob("*.safetensors"))
        write_sinks(model, require_sinks(model), {name: tensors[name] for name in wanted}, folder, stock)


def write_sinks(
    model: PreTrainedModel,
    state: SinkState,
    tensors: Mapping[str, Tensor],
    folder: Path,
    stock: list[Path] | None = None,
    **more: Any,
) -> None:
    """Write settings and tensors into `folder`.

    Args:
        model: whose sinks they are. state: its own, or that of a model with a part of them.
        stock: the files of the other weights; None = there are none.
        more: settings.
    """
    layout = _layout(state.config, unwrap(model).config.model_type, state.layers, state.intermediate_size)
    table = {f"table.{name}": getattr(state.table, name) for name in TABLE}
    written = {name: tensor.detach().cpu().contiguous() for name, tensor in {**tensors, **table}.items()}
    save_file(written, folder / TENSORS, metadata={"format": "pt"})
    hashes = {f"{FOLDER}/{TENSORS}": file_hash(folder / TENSORS)}
    settings = {
        "format_version": FORMAT_VERSION,
        "hash_version": HASH_VERSION,
        "table_version": TABLE_VERSION,
        "fingerprint": _fingerprint(layout, HASH_VERSION, shapes_of(tensors)),
        "config": state.config.to_dict(),
        **{name: layout[name] for name in ("model_type", "layers", "intermediate_size")},
        "alone": stock is None,
        "frozen": _only_sinks_learn(model, state),
        "start_std": {str(layer): x.std for layer, x in zip(state.layers, sink_modules(model).values(), strict=True)},
        "taken": {str(key): name for key, name in sorted(state.taken.items())},
        "sha256": {path.name: file_hash(path) for path in stock or ()} | hashes,
    } | more
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")


def _only_sinks_learn(model: nn.Module, state: SinkState) -> bool:
    """Whether the shared weights are frozen; not where all weights are, as for inference, unless it is a model of owners."""
    learning = any(x.requires_grad for x in sink_parameters(model)) or not state.config.hashed_blocks
    return learning and not any(x.requires_grad for x in shared_parameters(model))


@contextmanager
def _sinks_apart(model: nn.Module) -> Iterator[None]:
    """Within the block the model has no sinks and is not to be run; quantized weights are written from it, not a state dict."""
    hosts = [part for part in model.modules() if isinstance(part._modules.get("sinks"), Sinks)]
    kept = [part._modules.pop("sinks") for part in hosts]
    try:
        yield
    finally:
        for part, sinks in zip(hosts, kept, strict=True):
            part._modules["sinks"] = sinks


# Reading


def has_saved_sinks(directory: str | os.PathLike[str]) -> bool:
    """Whether a checkpoint folder holds sinks."""
    return (Path(directory) / FOLDER / SETTINGS).is_file()


def read_settings(directory: str | os.PathLike[str]) -> SavedSinks:
    """What ``sinks/sinks.json`` says; CheckpointError if there is none or it cannot be read, ConfigError for a newer format."""
    directory = Path(directory)
    path = directory / FOLDER / SETTINGS
    kept = sorted(directory.parent.glob(f".{directory.name}.old-*"))
    if not directory.exists() and kept:
        raise CheckpointError(f"saving {directory} was interrupted; what was there is in {kept[-1]}, rename it back")
    if not directory.is_dir():
        raise CheckpointError(f"there is no folder {directory}")
    if (directory / "model" / FOLDER / SETTINGS).is_file():
        raise CheckpointError(f"{directory} is a run folder; its model is {directory / 'model'}")
    if not path.is_file():
        raise CheckpointError(
            f"{directory} holds no sinks ({path} is missing); a checkpoint without sinks is loaded with "
            "AutoModelForCausalLM.from_pretrained"
        )
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        version = stored.get("format_version", 1)
        size = "host_width" if version == 1 else "intermediate_size"
        missing = {"fingerprint", "hash_version", "config", "model_type", "layers", size, "sha256"} - set(stored)
        missing |= {"base_sha256", "start_std"} - set(stored) if stored.get("of_owners") else set()
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; restore the checkpoint") from error
    if version not in (1, FORMAT_VERSION):
        raise ConfigError(
            f"{path} has format_version {version!r}, this memsinks reads 1 to {FORMAT_VERSION}; load it with the version of "
            "memsinks that wrote it"
        )
    if missing:
        raise CheckpointError(f"{path} lacks {sorted(missing)}; it was not written by memsinks or is damaged")
    if wrong := _wrong_types(stored, size):
        raise CheckpointError(f"{path} is damaged: {', '.join(wrong)} cannot be; restore the checkpoint")
    config = SinkConfig.from_dict({"start_scale": 1.0} | stored["config"])
    layout = _layout(config, stored["model_type"], stored["layers"], stored[size])
    return SavedSinks(version, config, layout, bool(stored.get("alone")), stored)


def _wrong_types(stored: Mapping[str, Any], size: str) -> list[str]:
    """The names of values in ``sinks.json`` that are of another type than memsinks writes."""
    texts: dict[str, Callable[[Any], bool]] = dict.fromkeys(("fingerprint", "model_type", "base_sha256"), _is_str)
    numbers: dict[str, Callable[[Any], bool]] = dict.fromkeys(("hash_version", size), is_int)
    checks = texts | numbers | {
        "config": lambda x: isinstance(x, dict),
        "layers": lambda x: isinstance(x, list) and all(map(is_int, x)),
        "frozen": lambda x: isinstance(x, bool),
        "sha256": lambda x: isinstance(x, dict) and all(map(_is_str, x.values())),
        "start_std": lambda x: isinstance(x, dict) and all(map(is_number, x.values())),
        "taken": lambda x: isinstance(x, dict) and all(k.isdecimal() and _is_str(v) for k, v in x.items()),
    }  # fmt: skip
    return [name for name, good in checks.items() if name in stored and not good(stored[name])]


def _is_str(value: Any) -> bool:
    return isinstance(value, str)


def check_files(directory: Path, saved: SavedSinks) -> None:
    """Every safetensors file must be one that these sinks were saved with, and be unchanged."""
    for name, digest in saved.sha256.items():
        path = directory / name
        if not lies_within(directory, name) or not path.is_file() or file_hash(path) != digest:
            raise CheckpointError(
                f"{path} is {'not the file' if path.is_file() else 'missing: a file'} these sinks were saved with "
                f"(SHA-256 {digest[:12]}...); the folder is a mixture of checkpoints or damaged, restore it"
            )
    for path in directory.glob("*.safetensors"):
        if path.name not in saved.sha256 and not saved.alone:
            raise CheckpointError(f"{path} does not belong to this checkpoint and may be read instead of it; remove it")
