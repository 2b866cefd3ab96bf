"""Files of weights that no settings describe: sinks or their moments in them are refused, for nobody can say whose they are."""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError, safe_open

from memsinks.errors import CheckpointError
from memsinks.sinks.state import is_sink
from memsinks.training.complete import METADATA, sharded_names

OF_TORCH = (".pt", ".pth", ".bin", ".ckpt")
"""What `torch.save` writes is called so."""
ZIP = b"PK\x03\x04"
"""How its archives begin."""


def refuse_sinks_within(path: Path) -> bool:
    """CheckpointError for a file with sinks or moments of sinks, or a damaged one; of another, whether it holds weights."""
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
    """What strings an archive of `torch.save` holds, names of weights among them; None where it holds no tensors and no sinks.

    Nothing is loaded, so it does not matter what else was saved beside the weights.
    """
    with path.open("rb") as file:
        if file.read(len(ZIP)) != ZIP:
            return None
    try:
        with zipfile.ZipFile(path) as archive:
            inside = archive.namelist()
            strings = [x for name in inside if name.endswith(".pkl") for x in _strings(archive.read(name))]
    except (zipfile.BadZipFile, EOFError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); remove it, or restore it") from error
    tensors = any("/data/" in name for name in inside)
    return strings if tensors or any(is_sink(f"{x}.") for x in strings) else None


def _strings(pickled: bytes) -> Iterator[str]:
    """The strings in a pickle, which is read and not run."""
    return (value for _, value, _ in pickletools.genops(pickled) if isinstance(value, str))
