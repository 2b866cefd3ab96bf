"""The plain checkpoint: the stock part alone."""

from __future__ import annotations

import json
import os
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memsinks.errors import CheckpointError
from memsinks.files import written_beside
from memsinks.removal.model_card import model_card
from memsinks.removal.verify import verify_closed
from memsinks.sinks.opening import down_modules, rescale_factor
from memsinks.sinks.state import is_sink, refuse_adapters, require_sinks, unwrap


def export(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    rescale: str = "none",
    notes: str = "",
    verify: bool = True,
) -> Path:
    """Write the model without its sinks as a plain checkpoint that needs nothing of ours.

    The folder holds the stock weights, config.json, the tokenizer if one is given, and a model card. It is written beside
    and renamed when it is whole. With `verify`, that is only after a fresh process, in which memsinks cannot be imported,
    has loaded it with stock transformers and computed the logits that this model has with its sinks closed (to rounding).

    Args:
        model: a model with sinks, in any mode and wrapped or not; not changed.
        directory: must not exist or be empty.
        tokenizer: written along if given.
        rescale: factor of the general neurons, see `SinkConfig.rescale_factors`; their down projection is multiplied.
        notes: text for the model card: what it was trained on, what for.
        verify: run the check (about 5 s and, in the fresh process, the memory of a second copy of the model).

    Returns:
        The directory.

    Raises:
        ArchitectureError: the model has no sinks.
        ConfigError: an unknown `rescale`.
        CheckpointError: the directory is not empty, the model is sharded, writing failed, or the check did not pass.
            Nothing is left behind.
    """
    state = require_sinks(model)
    refuse_adapters(model)
    model = unwrap(model)
    target = Path(directory)
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise CheckpointError(
            f"{target} is not an empty folder; export into a new one, so that no other file gets into it"
        )
    if any(type(parameter).__name__ == "DTensor" for parameter in model.parameters()):
        raise CheckpointError(
            "the model is sharded; save it, load it in one process with memsinks.load, and export that"
        )
    factor = rescale_factor(state, rescale)
    scaled = {id(host.weight) for host in down_modules(model)} if factor != 1.0 else set()
    tensors = {
        name: tensor * factor if id(tensor) in scaled else tensor.detach()
        for name, tensor in model.state_dict(keep_vars=True).items()
        if not is_sink(name)
    }
    with written_beside(target) as part:
        model.stock_class.save_pretrained(model, part, state_dict=tensors)  # type: ignore[attr-defined]
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        _drop_quantization(part / "config.json")
        if verify:
            verify_closed(model, part, rescale)
        (part / "README.md").write_text(model_card(model, rescale, notes, verify))
    return target


def _drop_quantization(path: Path) -> None:
    """A model that was loaded quantized and dequantized keeps the entry, which would say that these weights are quantized."""
    values = json.loads(path.read_text(encoding="utf-8"))
    if values.pop("quantization_config", None) is not None:
        path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
