"""What lies below the first sinks of a frozen model is computed once for each row and kept for the epochs that follow.

    with ms.prefix_kept(model): trainer.train()

Those layers never change, so the hidden states that enter the first layer with sinks are the same in every epoch.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from memsinks.errors import ArchitectureError, CheckpointError, refuse
from memsinks.sinks.families import decoder_layers
from memsinks.sinks.forward import refuse_reentrant
from memsinks.sinks.sharding import is_sharded
from memsinks.sinks.state import require_sinks, unwrap

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TO_DO = 'give prefix_kept another folder, dtype="bfloat16", or do without it'


@dataclass
class KeptPrefix:
    """What `prefix_kept` has done so far. rows, bytes: kept; hits, misses: batches that skipped the layers, or did not."""

    rows: int = 0
    bytes: int = 0
    hits: int = 0
    misses: int = 0


@contextmanager
def prefix_kept(
    model: nn.Module, folder: str | os.PathLike[str] | None = None, *, dtype: str = "float32"
) -> Iterator[KeptPrefix]:
    """Within the block, training skips the layers below the first sinks for rows that it has met before.

    The hidden states lie in a file without a name, which is gone when the process ends, however it ends: nothing of a text stays
    on disk that a take-down would have to find. A row is known by what enters the first layer, so rows of `pack` and `make_rows`,
    which have one length, are met again in every epoch; rows that a collator pads to the longest of a batch often are not.

    Args:
        model: with sinks, all below the first of them frozen and without dropout, as `add_owners` leaves it.
        folder: where the file is made; None = the system's place for temporary files. Per token it takes hidden size times the
            bytes of `dtype`.
        dtype: "float32" = outputs as without the block up to the rounding of another batch (1e-5); "bfloat16" = half the space,
            hidden states rounded to 8 bits.

    Raises:
        ConfigError: an unknown dtype; nothing below the sinks; a parameter that learns or a dropout there; a router loss.
        ArchitectureError: layers whose inputs or outputs are of a kind it does not know; a sharded or compiled model; re-entrant
            checkpointing.
        CheckpointError: no room for the file, or no such folder.
    """
    state, model = require_sinks(model), unwrap(model)
    refuse_reentrant(model, "a kept prefix, after which no input of a layer has a gradient")
    layers = decoder_layers(model)[0]
    below = [layers[index] for index in range(state.layers[0])]
    _check(model, below, dtype)
    with _nameless(folder) as file:
        store = _Store(file, DTYPES[dtype])
        try:
            for place, layer in enumerate(below):
                layer.forward = _skipping(layer, store, first=place == 0, last=place == len(below) - 1)
            yield store.kept
        finally:
            for layer in below:
                vars(layer).pop("forward", None)


def _nameless(folder: str | os.PathLike[str] | None) -> IO[bytes]:
    try:
        return tempfile.TemporaryFile(dir=folder, prefix="memsinks-prefix-", buffering=0)
    except OSError as error:
        raise CheckpointError(f"cannot write a temporary file: {error}; {TO_DO}") from error


def _check(model: Any, below: list[Any], dtype: str) -> None:
    problems = [] if dtype in DTYPES else [f"dtype must be one of {sorted(DTYPES)}, got {dtype!r}"]
    if not below:
        problems.append("the first layer has sinks, so nothing lies below them; see SinkConfig(layers=)")
    parts = {"the input embedding": model.get_input_embeddings()} | {f"layer {x}": part for x, part in enumerate(below)}
    for name, part in parts.items():
        if any(x.requires_grad for x in part.parameters()):
            problems.append(f"{name} learns; freeze it (memsinks.freeze_shared), or do without prefix_kept")
            break
    above = {x for layer in decoder_layers(model)[0][len(below) :] for x in layer.modules()}
    on = sorted({found for x in model.modules() if x not in above for found in _dropouts(x)})
    if on:
        problems.append(
            f"dropout or noise is on below the sinks ({', '.join(on)}), so what they give differs each time; set it to 0"
        )
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        problems.append("the router loss reads the layers below the sinks too; set config.output_router_logits=False")
    refuse(problems, "cannot keep what lies below the sinks")
    if is_sharded(model):
        raise ArchitectureError("prefix_kept does not know sharded models, whose layers must all run on all processes")
    if any("forward" in vars(part) for part in below):
        raise ArchitectureError(
            "a layer below the sinks has a forward of its own (prefix_kept within prefix_kept, or a wrapper)"
        )


def _dropouts(module: nn.Module) -> list[str]:
    """The dropout rates of a module that are on, and its noise, as name=rate."""
    if isinstance(module, nn.Dropout):
        return [f"p={module.p}"] if module.p > 0 else []
    rates = {
        name: x for name, x in vars(module).items() if ("drop" in name or "jitter" in name) and isinstance(x, float)
    }
    return [f"{name}={rate}" for name, rate in rates.items() if rate > 0]


class _Store:
    """Hidden states of rows in a file, and those of the batch at hand."""

    def __init__(self, file: IO[bytes], dtype: torch.dtype) -> None:
        self.file, self.dtype = file, dtype
        self.places: dict[bytes, int] = {}
        self.kept = KeptPrefix()
        self.keys: list[bytes] = []
        self.found: Tensor | None = None
        self.extra: tuple[Any, ...] | None = None

    def meet(self, hidden: Tensor, arguments: list[Any]) -> None:
        """A batch enters: its keys, and its hidden states if all of its rows were met before."""
        self.keys = _keys(hidden, arguments)
        self.found = None
        if all(key in self.places for key in self.keys):
            self.kept.hits += 1
            self.found = torch.stack([self._read(key, hidden) for key in self.keys])
        else:
            self.kept.misses += 1

    def keep(self, hidden: Tensor) -> None:
        values = hidden.detach().to("cpu", self.dtype).contiguous()
        for key, row in zip(self.keys, values, strict=True):
            if key in self.places:
                continue
            data = memoryview(row.view(torch.uint8).numpy().tobytes())
            try:
                self.file.seek(self.kept.bytes)
                written = 0
                while written < len(data):
                    written += self.file.write(data[written:])
            except OSError as error:
                raise CheckpointError(f"no room for the hidden states below the sinks: {error}; {TO_DO}") from error
            self.places[key] = self.kept.bytes
            self.kept.bytes += len(data)
            self.kept.rows += 1

    def _read(self, key: bytes, like: Tensor) -> Tensor:
        self.file.seek(self.places[key])
        count = like[0].numel() * self.dtype.itemsize
        data = torch.frombuffer(bytearray(self.file.read(count)), dtype=torch.uint8).view(self.dtype)
        return data.view(like.shape[1:]).to(like.device, like.dtype)


def _skipping(layer: Any, store: _Store, *, first: bool, last: bool) -> Callable[..., Any]:
    """A forward of a layer that hands on what was kept, where it was."""
    stock = layer.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not layer.training:
            return stock(*args, **kwargs)
        if torch.compiler.is_compiling():
            raise ArchitectureError("prefix_kept cannot be compiled: which rows were met before depends on the data")
        hidden = args[0] if args else kwargs["hidden_states"]
        if first:
            store.meet(hidden, [*args[1:], *(kwargs[x] for x in sorted(kwargs) if x != "hidden_states")])
        if store.found is not None:
            out = store.found if last else hidden
            return out if store.extra is None else (out, *store.extra)
        out = stock(*args, **kwargs)
        store.extra = _extra(out, layer)
        if last:
            store.keep(out if store.extra is None else out[0])
        return out

    return forward


def _extra(out: Any, layer: nn.Module) -> tuple[Any, ...] | None:
    """What stands for all that a layer gives beside hidden states (attention weights), which training does not read."""
    if isinstance(out, Tensor):
        return None
    if isinstance(out, tuple) and out and isinstance(out[0], Tensor):
        return (None,) * (len(out) - 1)
    raise ArchitectureError(f"{type(layer).__name__} gives a {type(out).__name__}, which prefix_kept does not know")


def _keys(hidden: Tensor, arguments: list[Any]) -> list[bytes]:
    """A hash of each row of what enters the first layer: hidden states, positions and masks."""
    rows = len(hidden)
    tensors = [hidden, *_tensors(arguments)]
    parts = [_bytes(x) if x.dim() and len(x) == rows else _bytes(x[None]) * rows for x in tensors]
    return [hashlib.blake2b(b"|".join(part[row] for part in parts), digest_size=16).digest() for row in range(rows)]


def _tensors(arguments: Any) -> Iterator[Tensor]:
    if isinstance(arguments, Tensor):
        yield arguments
    elif isinstance(arguments, dict | list | tuple):
        for value in arguments.values() if isinstance(arguments, dict) else arguments:
            yield from _tensors(value)
    elif arguments is not None and not isinstance(arguments, bool | int | float | str):
        raise ArchitectureError(
            f"prefix_kept cannot tell rows apart where layers are given a {type(arguments).__name__}; take another "
            "attention implementation (sdpa, eager), or do without it"
        )


def _bytes(x: Tensor) -> list[bytes]:
    values = x.detach().cpu().contiguous()
    return [np.asarray(row.reshape(-1).view(torch.uint8)).tobytes() for row in values]
