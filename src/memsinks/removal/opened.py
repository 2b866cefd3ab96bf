"""Sinks that stay in an export: those of chosen documents become ordinary neurons of a wider MLP.

What is written is a stock checkpoint with the logits of ``sinks_open(model, ids)``, for whatever serves stock models. All layers
grow by the same number: those that open fewer sinks, or have none, get neurons of zeros.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from memsinks.errors import ArchitectureError, DataError
from memsinks.sinks.experts import is_mixture
from memsinks.sinks.families import Mlp, decoder_layers, read_mlp
from memsinks.sinks.layer import Sinks
from memsinks.sinks.opening import parse_open
from memsinks.sinks.state import SinkState, refuse_taken, require_sinks
from memsinks.sinks.table import open_mask

OpenDocuments = int | Iterable[int] | Tensor | np.ndarray | Mapping[str, int]
"""Whose sinks an export keeps: a document id, several, or {name: id}."""

WIDTH_FIELDS = ("intermediate_size", "n_inner", "ffn_hidden_size", "ffn_dim")
"""Fields of a config that may say how wide the MLPs are; whether one does is tried on the model's class."""
ROUND_TO = 256
"""The widened MLP stays divisible by the power of two, up to this one, by which its host's width is: quantized and
tensor-parallel serving ask for it."""


@dataclass(frozen=True)
class Opening:
    """What stays open in an export.

    ids: of documents. names: of each, or "" for none. tensors: of the whole stock model, by name, some of them wider. field,
    width: the config's field for the width of the MLPs, and the new width. neurons: the most that any layer took over, before
    rounding.
    """

    ids: tuple[int, ...]
    names: tuple[str, ...]
    tensors: dict[str, Tensor]
    field: str
    width: int
    neurons: int

    def write(self, values: dict[str, Any], config: PretrainedConfig) -> None:
        """Put the width into what config.json says."""
        text = config.get_text_config()
        holder = next((values[name] for name in config.sub_configs if getattr(config, name, None) is text), values)
        holder[text.attribute_map.get(self.field, self.field)] = self.width


def open_for_export(model: PreTrainedModel, documents: OpenDocuments, tensors: dict[str, Tensor]) -> Opening:
    """Widen the MLPs by the sinks that documents open, their union; nothing is written, the model is not changed.

    Args:
        model: with sinks, unwrapped.
        documents: see `OpenDocuments`.
        tensors: the stock part of the model's state dict, by name.

    Raises:
        DataError: no ids, something that is no id, or an id that opens nothing.
        ArchitectureError: mixtures of experts, MLPs of several widths, or no field of the config says how wide they are.
    """
    ids, names = read_documents_to_open(documents)
    state = require_sinks(model)
    refuse_taken(state, torch.tensor(ids, dtype=torch.int64))
    chosen = _open_blocks(state, ids)
    layers, mlp_name = decoder_layers(model)
    mlps: list[Any] = [getattr(layer, mlp_name) for layer in layers]
    if any(is_mixture(mlp) for mlp in mlps):
        raise ArchitectureError(
            f"{type(model).__name__} has mixtures of experts, of which no expert is met by every token, so open sinks cannot "
            "become neurons of one; export without open, or keep the sinks beside the model: model.save_pretrained writes "
            "them, memsinks.load and memsinks.sinks_open use them"
        )
    hosts = [read_mlp(mlp, model.config.model_type) for mlp in mlps]
    widths = sorted({host.intermediate_size for host in hosts})
    if len(widths) > 1:
        raise ArchitectureError(
            f"the MLPs of {type(model).__name__} have different widths {widths}, so no config says how wide they are with "
            "sinks in them; export without open"
        )
    neurons = max(int(mask.sum()) for mask in chosen.values()) * state.config.block_size
    step = min(ROUND_TO, widths[0] & -widths[0])
    grown = -(-neurons // step) * step
    changed: dict[int, Tensor] = {}
    for index, (mlp, host) in enumerate(zip(mlps, hosts, strict=True)):
        mask = chosen.get(index)
        changed |= _widened(host, None if mask is None else _neurons(mlp.sinks, mask), grown)
    wider = {name: changed.get(id(tensor), tensor.detach()) for name, tensor in tensors.items()}
    field = _width_field(model, widths[0], widths[0] + grown, wider)
    return Opening(ids, names, wider, field, widths[0] + grown, neurons)


def read_documents_to_open(documents: OpenDocuments) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The ids that `open` names, each once, and the name of each ("" without); DataError for anything else."""
    named: list[tuple[str, Any]]
    if isinstance(documents, Mapping):
        wrong = [name for name in documents if not isinstance(name, str)]
        if wrong:
            raise DataError(f"open maps names to ids, got the name {wrong[0]!r}")
        named = [(str(name), value) for name, value in documents.items()]
    else:
        values: Any = documents.tolist() if isinstance(documents, Tensor | np.ndarray) else documents
        several = isinstance(values, Iterable) and not isinstance(values, str | bytes)
        named = [("", value) for value in (values if several else [values])]
    ids = [value for _, value in named]
    if not ids or any(isinstance(value, Iterable) for value in ids):
        raise DataError(f"open takes a document id, a list of ids or {{name: id}}, got {documents!r:.200}")
    parse_open(ids)
    once: dict[int, list[str]] = {}
    for name, value in named:
        once.setdefault(int(value), []).extend([name] if name not in ("", str(value)) else [])
    return tuple(once), tuple(", ".join(names) for names in once.values())


def _open_blocks(state: SinkState, ids: tuple[int, ...]) -> dict[int, Tensor]:
    """For each layer with sinks the blocks that these ids open, bool [blocks]; DataError for an id that opens none."""
    config, wanted = state.config, torch.tensor(ids, dtype=torch.int64)
    masks = {layer: open_mask(wanted, config, layer if config.per_layer else 0, state.table) for layer in state.layers}
    opens = torch.stack([mask.any(1) for mask in masks.values()]).any(0)
    nothing = [value for value, some in zip(ids, opens.tolist(), strict=True) if not some]
    if nothing:
        raise DataError(
            f"the ids {nothing} open no sinks, so there is nothing to export of them; leave them out of open"
        )
    return {layer: mask.any(0) for layer, mask in masks.items()}


def _neurons(sinks: Sinks, mask: Tensor) -> dict[str, Tensor]:
    """The open neurons of a layer, [neurons, hidden_size] each: up, down and, with a gate, gate."""
    mask = mask.to(sinks.up.device)
    return {name: part.detach()[mask].flatten(0, 1) for name, part in sinks.named_parameters()}


def _widened(host: Mlp, neurons: dict[str, Tensor] | None, grown: int) -> dict[int, Tensor]:
    """The tensors of an MLP with `grown` more neurons, by the id of what they replace.

    What `neurons` lack is zero, biases included: sinks have none. A zero row of `down` is silent whatever the activation gives.
    """
    projections = [(host.down, ("down",)), (host.up, ("gate", "up") if host.gate is host.up else ("up",))]
    if host.gated and host.gate is not host.up:
        projections.append((host.gate, ("gate",)))
    found: dict[int, Tensor] = {}
    for module, parts in projections:
        turned = (module is host.down) != host.transposed
        weight = module.weight.detach()
        rows = weight.t() if turned else weight  # [intermediate_size, hidden_size], gate before up
        more = [_padded(None if neurons is None else neurons[part], grown, rows) for part in parts]
        rows = torch.cat([x for pair in zip(rows.chunk(len(parts)), more, strict=True) for x in pair])
        found[id(module.weight)] = (rows.t() if turned else rows).contiguous()
        bias = getattr(module, "bias", None)
        if bias is not None and module is not host.down:
            silent = bias.new_zeros(grown)
            found[id(bias)] = torch.cat([x for half in bias.detach().chunk(len(parts)) for x in (half, silent)])
    return found


def _padded(rows: Tensor | None, length: int, like: Tensor) -> Tensor:
    """`rows` [n, hidden_size] as [length, hidden_size] in the dtype of `like`, zeros after them."""
    out = like.new_zeros(length, like.shape[1])
    if rows is not None:
        out[: len(rows)] = rows.to(like.dtype)
    return out


def _width_field(model: Any, width: int, wider: int, tensors: dict[str, Tensor]) -> str:
    """The field of the config under which the stock class has tensors of these shapes, tried on the meta device."""
    want = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    text = model.config.get_text_config()
    fields = [name for name in WIDTH_FIELDS if getattr(text, name, 0) in (None, width)]
    for name in fields:
        config = copy.deepcopy(model.config)
        setattr(config.get_text_config(), name, wider)
        with torch.device("meta"):
            found = {key: tuple(x.shape) for key, x in model.stock_class(config).state_dict().items()}
        if all(found.get(key) == shape for key, shape in want.items()):
            return name
    raise ArchitectureError(
        f"a {model.config.model_type} checkpoint cannot say that its MLPs are {wider} wide instead of {width} "
        f"({f'the config fields {fields} do not set it' if fields else 'its config has no field for it'}), so the open sinks "
        "cannot become neurons of them; export without open"
    )
