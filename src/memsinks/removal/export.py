"""The plain checkpoint: the stock part, alone or with the sinks of chosen documents as neurons of its own."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memsinks.data.tokens import save_tokenizer
from memsinks.errors import ArchitectureError, CheckpointError, ConfigError
from memsinks.files import read_json, written_beside
from memsinks.removal.model_card import model_card
from memsinks.removal.opened import OpenDocuments, Opening, open_for_export
from memsinks.removal.verify import sample_closed, verify_closed, verify_open
from memsinks.sinks.opening import down_modules, rescale_factor
from memsinks.sinks.quantized import refuse_quantized
from memsinks.sinks.sharding import full_state_dict, is_sharded, on_first_rank
from memsinks.sinks.state import is_sink, refuse_adapters, require_sinks, unwrap
from memsinks.sinks.storage import fingerprint

OPEN_SINKS = "memsinks.json"
"""In a checkpoint in which sinks stay: whose they are."""


def export(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    open: OpenDocuments | None = None,
    rescale: str = "none",
    notes: str = "",
    verify: bool = True,
) -> Path:
    """Write the model without its sinks as a plain checkpoint that needs nothing of ours.

    The folder holds the stock weights, config.json, the tokenizer if one is given, and a model card. It is written beside
    and renamed when it is whole. With `verify`, that is only after a fresh process, in which memsinks cannot be imported,
    has loaded it with stock transformers and computed the logits that this model has with its sinks closed, or with those
    of `open` open (to rounding).

    Args:
        model: a model with sinks, in any mode and wrapped or not; not changed. If it is sharded (FSDP2), all ranks must call
            this: it is gathered, and the first one writes.
        directory: must not exist or be empty.
        tokenizer: written along if given.
        open: the documents whose sinks stay, as neurons of a wider MLP, see `removal.opened`: an id, a list or set of ids
            (their union), or {name: id}, the names for the model card. None = nobody's.
        rescale: factor of the general neurons, see `SinkConfig.rescale_factors`; their down projection is multiplied.
        notes: text for the model card: what it was trained on, what for.
        verify: run the check (about 5 s and, in the fresh process, the memory of a second copy of the model).

    Returns:
        The directory.

    Raises:
        ArchitectureError: the model has no sinks; its MLPs cannot be widened (BLOOM, MPT, MLPs of different
            widths, mixtures of experts), or a mixture of experts is to be rescaled; it is quantized; a sharded one is to be
            rescaled, or to keep open sinks.
        ConfigError: an unknown `rescale`, or one other than ``"none"`` together with `open`.
        DataError: `open` is empty, or names something that is no id or an id that opens nothing (-1).
        CheckpointError: the directory is not empty, writing failed, or the check did not pass.
            Nothing is left behind.
    """
    state = require_sinks(model)
    refuse_adapters(model)
    refuse_quantized(model, "its weights are no plain checkpoint")
    model, target = unwrap(model), Path(directory)
    on_first_rank(model, lambda: _check_place(target))
    factor = rescale_factor(state, rescale)
    if open is not None and rescale != "none":
        raise ConfigError(f'rescale={rescale!r} stands in for closed sinks; with open use rescale="none"')
    sharded = is_sharded(model)
    if sharded and (open is not None or factor != 1.0):
        raise ArchitectureError(
            "a sharded model is exported with all sinks closed and no rescale; for these save it, load it in one process with "
            "memsinks.load, and export that"
        )
    whole = full_state_dict(model) if sharded else model.state_dict(keep_vars=True)
    tensors = {name: tensor for name, tensor in whole.items() if not is_sink(name)}
    opening = None if open is None else open_for_export(model, open, tensors)
    if not sharded:
        tensors = _rescaled(model, tensors, factor) if opening is None else opening.tensors
    check = _check(model, rescale, opening) if verify else None
    card = model_card(model, rescale, notes, verify, opening)
    on_first_rank(model, lambda: _write(model, target, tensors, tokenizer, opening, check, card))
    return target


def _check(model: PreTrainedModel, rescale: str, opening: Opening | None) -> Callable[[Path], None]:
    """How a folder is compared with the model."""
    if is_sharded(model):  # all ranks compute, the first one compares
        return sample_closed(model).verify
    if opening is None:
        return lambda part: verify_closed(model, part, rescale)
    return lambda part: verify_open(model, part, opening.ids)


def _write(
    model: PreTrainedModel,
    target: Path,
    tensors: dict[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | None,
    opening: Opening | None,
    check: Callable[[Path], None] | None,
    card: str,
) -> None:
    with written_beside(target) as part:
        model.stock_class.save_pretrained(model, part, state_dict=tensors)  # type: ignore[attr-defined]
        if tokenizer is not None:
            save_tokenizer(tokenizer, part)
        _mend_config(part / "config.json", model, opening)
        if check is not None:
            check(part)
        if opening is not None:
            owners = {"open": {str(key): name for key, name in zip(opening.ids, opening.names, strict=True)}}
            (part / OPEN_SINKS).write_text(json.dumps(owners | {"fingerprint": fingerprint(model)}, indent=2) + "\n")
        (part / "README.md").write_text(card, encoding="utf-8")


def whose_sinks(directory: str | os.PathLike[str]) -> list[int]:
    """The ids whose sinks an exported checkpoint holds as neurons; none for any other folder."""
    path = Path(directory) / OPEN_SINKS
    if not path.is_file():
        return []
    try:
        return [int(key) for key in dict(read_json(path, "export the model again")["open"])]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path} is damaged ({error!r:.200}); export the model again") from error


def _check_place(target: Path) -> None:
    """CheckpointError unless the target is free."""
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise CheckpointError(
            f"{target} is not an empty folder; export into a new one, so that no other file gets into it"
        )


def _rescaled(model: PreTrainedModel, tensors: dict[str, Tensor], factor: float) -> dict[str, Tensor]:
    """The tensors, the down projections beside sinks multiplied by the factor."""
    scaled = {id(host.weight) for host in down_modules(model)} if factor != 1.0 else set()
    return {name: tensor * factor if id(tensor) in scaled else tensor.detach() for name, tensor in tensors.items()}


def _mend_config(path: Path, model: PreTrainedModel, opening: Opening | None) -> None:
    """Put in the width of opened MLPs, and drop an entry that a model keeps which was loaded quantized and dequantized."""
    before = json.loads(path.read_text(encoding="utf-8"))
    values = copy.deepcopy(before)
    values.pop("quantization_config", None)
    if opening is not None:
        opening.write(values, model.config)
    if values != before:
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
