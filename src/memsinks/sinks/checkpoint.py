"""Saving sinks alone; loading models with their sinks, sinks alone, and any others."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from memsinks.checks import one_of
from memsinks.errors import ArchitectureError, CheckpointError, ConfigError, refuse
from memsinks.files import read_json, written_beside
from memsinks.sinks.attach import add_sinks, undone_on_failure
from memsinks.sinks.config import TRAINING
from memsinks.sinks.own import freeze_shared
from memsinks.sinks.owner_files import check_base, describe_owners, of_owners, put_owners, read_owners
from memsinks.sinks.reading import check_fits, read_shapes, read_sinks
from memsinks.sinks.sharding import is_sharded
from memsinks.sinks.state import (
    has_adapters,
    has_sinks,
    is_sink,
    named_sinks,
    require_sinks,
    shared_hash,
)
from memsinks.sinks.storage import (
    FOLDER,
    check_files,
    has_saved_sinks,
    read_settings,
    write_sinks,
)

WHERE = ("revision", "subfolder", "cache_dir", "token", "local_files_only")
"""Arguments of `from_pretrained` that say where a checkpoint lies."""


def load(directory: str | os.PathLike[str], **arguments: Any) -> PreTrainedModel:
    """Load a model with its sinks, as `save_pretrained` wrote them, in eval mode.

    Args:
        directory: the checkpoint folder.
        arguments: passed to ``AutoModelForCausalLM.from_pretrained`` (of a multimodal model
            ``AutoModelForImageTextToText.from_pretrained``), e.g. ``dtype``.

    Raises:
        CheckpointError: see `load_sinks`.
        ConfigError: the settings are of a newer format version.
    """
    saved = read_settings(directory)
    if saved.alone:
        held = "the sinks of some owners" if saved.of_owners else "sinks"
        raise CheckpointError(
            f"{directory} holds {held} alone; load the model that they were trained beside, then "
            f"memsinks.load_sinks(model, {str(directory)!r})"
        )
    check_files(Path(directory), saved)
    model = load_stock(directory, **arguments)
    load_sinks(model, directory)
    return model.eval()


def load_sinks(
    model: PreTrainedModel,
    directory: str | os.PathLike[str] | Iterable[str | os.PathLike[str]],
    *,
    base: Literal["same", "any"] = "same",
) -> None:
    """Load the sinks of a checkpoint, or of folders that `save_sinks` wrote, in place.

    The sinks of some owners (``save_sinks(..., owners=...)``) come beside those that the model has: they take free blocks
    (`free_blocks`), and it grows where there are too few (`grow`); all that it has keeps every bit. A model without sinks gets a
    pool of just these blocks, to which nothing is hashed, and its other weights are frozen. They are frozen too where they were
    when all sinks were saved.

    Args:
        model: with sinks of the same layout; of owners: of the same layers, routing, block size and width. One without gets
            them first, with the settings they were saved with.
        directory: a folder with a subfolder ``sinks/``, or several of owners, in the order in which they take blocks.
        base: of sinks to which nothing is hashed: "same" refuses those that were saved beside other weights; "any" takes them
            with a warning, for instance beside the same weights in another dtype.

    Raises:
        CheckpointError: no sinks there, another layout, a file whose hash differs (a mixture of two checkpoints), tensors
            missing or of another shape; the sinks of somebody who was taken out of the model; of owners: other weights, an id
            that has blocks in the model or in two folders. The model is as it was then.
        ConfigError: several folders that are not all of owners; an unknown `base`; settings of a newer format version.
        ArchitectureError: the model cannot carry sinks, or not grow because it is wrapped or sharded.
    """
    refuse(one_of("base", base, ("same", "any")), "cannot load sinks")
    if not isinstance(directory, str | os.PathLike | Iterable):
        raise ConfigError(f"directory is a folder, or several of owners, got {directory!r:.60}")
    folders = [Path(x) for x in ([directory] if isinstance(directory, str | os.PathLike) else directory)]
    found = [(folder, read_settings(folder)) for folder in folders]
    whole = [str(folder) for folder, saved in found if not saved.of_owners]
    if not found or (whole and len(found) > 1):
        held = f"{whole[0]} holds all sinks of a model, load it first and alone" if whole else "give at least one"
        raise ConfigError(f"several folders are loaded together where each holds the sinks of some owners; {held}")
    for folder, saved in found:
        check_files(folder, saved)
    if not whole:
        put_owners(model, [read_owners(folder, saved) for folder, saved in found], any_base=base == "any")
        return
    folder, saved = found[0]
    if "base_sha256" in saved.stored:
        check_base(model, found, any_base=base == "any")
    with undone_on_failure(model):
        if not has_sinks(model):
            add_sinks(model, saved.config)
            if saved.frozen:
                freeze_shared(model)
        check_fits(model, folder, saved)
        read_sinks(model, folder, saved)


def save_sinks(model: PreTrainedModel, directory: str | os.PathLike[str], owners: Iterable[int] | None = None) -> Path:
    """Write the sinks alone, with their settings, into ``directory/sinks/``; see `load_sinks`.

    With `owners`, only the blocks that are their own (`assign`): tensors [their blocks, block_size, d], what the assignment
    table says of their ids and of the documents within them, and `shared_hash` of the other weights; nothing of other owners.

    Args:
        model: with sinks; may be a PeftModel, whose active adapter's sinks are written.
        directory: a folder, for instance that of an adapter; all else in it stays.
        owners: ids with own blocks; None = all sinks.

    Returns:
        The folder ``directory/sinks``.

    Raises:
        ArchitectureError: no sinks, or a sharded model; `owners` of a model with adapters.
        CheckpointError: they do not belong to the model's weights, or cannot be written; `owners` beside a folder in which all
            sinks of a model lie.
        DataError: an id without own blocks, or with one that others are hashed to; a document that opens the blocks of an owner
            who is not saved too.
    """
    state = require_sinks(model)
    if is_sharded(model):
        raise ArchitectureError("the model is sharded; save it with save_pretrained, which gathers its weights")
    tensors = dict(named_sinks(model))
    more: dict[str, Any] = {}
    if owners is not None:
        if has_saved_sinks(directory) and not read_settings(directory).of_owners:
            raise CheckpointError(f"{directory} holds all sinks of a model, which would be lost; give another folder")
        state, tensors, more = of_owners(model, owners)
    elif not state.config.hashed_blocks and not has_adapters(model):
        more = {"base_sha256": shared_hash(model)}
    target = Path(directory) / FOLDER
    with written_beside(target) as part:
        write_sinks(model, state, tensors, part, **more)
    return target


def load_stock(directory: str | os.PathLike[str], **arguments: Any) -> PreTrainedModel:
    """The stock part of a checkpoint, or any checkpoint without sinks; CheckpointError if it cannot be loaded."""
    generation = Path(directory) / "generation_config.json"
    if generation.is_file():  # of which transformers reads over what is damaged
        read_json(generation, "restore the checkpoint")
    _require_own_weights(Path(directory))
    try:
        return _auto_class(directory, arguments).from_pretrained(directory, **arguments)
    except Exception as error:  # transformers, huggingface_hub and safetensors raise some ten unrelated types here
        raise CheckpointError(f"cannot load a model from {directory}: {error}") from error


def _require_own_weights(directory: Path) -> None:
    """CheckpointError if an index of weights names files outside its folder."""
    for path in directory.glob("*.index.json"):
        index = read_json(path, "restore the checkpoint")
        names = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(names, dict) or not all(isinstance(x, str) for x in names.values()):
            raise CheckpointError(f"{path} is damaged: it maps no weights to files; restore the checkpoint")
        if outside := [x for x in names.values() if Path(x).name != x]:
            raise CheckpointError(f"{path} names {outside[0]!r}, which leads out of its folder; restore the checkpoint")


def _auto_class(directory: str | os.PathLike[str], arguments: Mapping[str, Any]) -> Any:
    """Which auto class loads a checkpoint: that of causal language models, or that of those which read images too."""
    where = {name: arguments[name] for name in WHERE if name in arguments}
    try:
        values, _ = PretrainedConfig.get_config_dict(directory, **where)
    except Exception:  # the class will say what is wrong
        values = {}
    multimodal = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(str(values.get("model_type", "")))
    return AutoModelForImageTextToText if multimodal in (values.get("architectures") or ()) else AutoModelForCausalLM


def load_config(directory: str | os.PathLike[str]) -> PretrainedConfig:
    """The configuration of any checkpoint, read without its weights; CheckpointError if it cannot be loaded."""
    try:
        return AutoConfig.from_pretrained(directory)
    except Exception as error:  # see load_stock
        raise CheckpointError(f"cannot load a model from {directory}: {error}") from error


def load_any(path: str | os.PathLike[str]) -> PreTrainedModel:
    """Load any causal language model in eval mode: with its sinks where the checkpoint has them."""
    if has_saved_sinks(path):
        return load(path)
    return load_stock(path).eval()


def describe(directory: str | os.PathLike[str]) -> str:
    """A checkpoint's sinks in a few lines of text, read from its files without building the model."""
    saved = read_settings(directory)
    if saved.of_owners:
        return describe_owners(read_owners(Path(directory), saved))
    config, layout = saved.config, saved.layout
    shapes = read_shapes(Path(directory))
    assigned = shapes.get("table.ids", [0])[0]
    numbers = sum(math.prod(shape) for name, shape in shapes.items() if is_sink(name))
    shown = ("block_size", "routing", "per_layer", "reserved_blocks", "seed", *TRAINING)
    lines = {
        f"{layout['model_type']} with sinks in layers": layout["layers"],
        "general neurons ": f"{layout['intermediate_size']} a layer",
        "sink neurons    ": f"{config.neurons} a layer, {config.active} open per document",
        "sink parameters ": f"{numbers:,}",
        "assigned ids    ": f"{assigned} (all others are hashed)",
        "settings        ": ", ".join(f"{name}={getattr(config, name)}" for name in shown),
        "fingerprint     ": saved.stored["fingerprint"],
    }
    return "\n".join(f"{name} {value}" for name, value in lines.items())
