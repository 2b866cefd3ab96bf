"""The plain checkpoint: the stock part alone."""

from __future__ import annotations

import os
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from memsinks.errors import CheckpointError
from memsinks.files import written_beside
from memsinks.removal.model_card import model_card
from memsinks.removal.verify import verify_export
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

    The folder is written beside and renamed only after a fresh process, in which memsinks cannot be imported, has
    loaded it with stock transformers and computed the same logits as this model with sinks closed.

    Args:
        model: a model with sinks; not changed.
        directory: must not exist or be empty.
        tokenizer: written along if given.
        rescale: factor of the general neurons, see `SinkConfig.rescale_factors`; their down projection is multiplied.
        notes: text for the model card: what it was trained on, what for.
        verify: run the check (about 5 s and the memory of a second copy of the model).

    Returns:
        The directory.

    Raises:
        CheckpointError: the directory is not empty, writing failed, or the check did not pass; nothing is left behind.
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
        if verify:
            verify_export(model, part, rescale)
        (part / "README.md").write_text(model_card(model, rescale, notes, verify))
    return target
