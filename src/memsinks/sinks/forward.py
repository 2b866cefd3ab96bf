"""The forward of a model with sinks: from the ids of a batch to what each layer opens and what each token may teach."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from memsinks.batch import BLANK, IGNORED, ISOLATIONS, NO_SINKS, check_ids
from memsinks.errors import ArchitectureError, ConfigError, DataError
from memsinks.sinks.caches import cache_of, check_cache, mark_cache
from memsinks.sinks.exact import opened_and_weight, run_apart
from memsinks.sinks.families import ISOLATES_PACKED
from memsinks.sinks.run import run, run_weighted
from memsinks.sinks.sharding import is_sharded
from memsinks.sinks.state import SinkState, refuse_taken, require_sinks

NOT_TEXT = ("pixel_", "image_", "video_", "audio_", "input_features", "mm_encoder")
"""How the names of a multimodal model's arguments begin that are no text."""


def forward(
    model: Any,
    stock: Any,
    arguments: dict[str, Any],
    document_ids: Tensor | None,
    exposures: Tensor | None,
    places: Tensor | None,
    isolation: Tensor | None = None,
) -> Any:
    """What a model with sinks computes.

    Args:
        model: the model; stock: its stock forward, bound.
        arguments: of the stock forward, by name.
        document_ids, exposures: int64 [B] or [B, T]; needed in training, in evaluation sinks are opened by `sinks_open`.
        places: int64 [B], see `batch.collate`: the order in which rows are met is checked where it is given.
        isolation: int64 [B] or [B, T], see `batch.ISOLATIONS`; None = 0 for all.
    """
    if getattr(model, "_is_replica", False):
        raise ArchitectureError("DataParallel is not supported: its replicas share one routing plan; use DDP")
    tokens = arguments.get("input_ids")
    tokens = arguments.get("inputs_embeds") if tokens is None else tokens
    if tokens is None:
        raise DataError("give the model input_ids or inputs_embeds")
    rows, length = tokens.shape[:2]
    if not rows:
        raise DataError("a batch without rows; a process that has run out of them gives memsinks.blank_batch(batch)")
    if model.training:
        return _train(model, stock, (rows, length), document_ids, exposures, places, isolation, arguments)
    if (
        torch.is_grad_enabled()
        and arguments.get("labels") is not None
        and (document_ids is not None or exposures is not None)
    ):
        raise ConfigError(
            "the model is in evaluation mode, in which document_ids and exposures are not looked at, but labels and gradients "
            "are asked for; call model.train() to train (from_pretrained and memsinks.load give models in evaluation mode)"
        )
    state = model.sink_state
    # A cache switches off the isolation of packed documents.
    packed = arguments.get("labels") is not None or _restart(arguments)
    if packed and "use_cache" in state.arguments and arguments.get("use_cache") is None:
        arguments["use_cache"] = False
    opened = state.opened.last if torch.compiler.is_compiling() else state.opened.get()
    cache = arguments.get("past_key_values")
    check_cache(cache, opened)
    if opened is None:
        return stock(**arguments)
    out = run(model, stock, arguments, _opened_ids(opened, rows, length, tokens.device, cache), None)
    if cache is None and not torch.compiler.is_compiling():
        mark_cache(cache_of(out), opened)
    return out


def _restart(arguments: dict[str, Any]) -> bool:
    """Whether positions do not go on by one within a row, so that it holds several documents; a compiled forward cannot look."""
    positions = arguments.get("position_ids")
    if positions is None or arguments.get("attention_mask") is not None:
        return False
    return torch.compiler.is_compiling() or bool((positions.diff() != 1).any())


def check_prompts(state: SinkState, prompts: int) -> None:
    """DataError if `sinks_open` was given ids for so many rows that there is not one prompt for each.

    Later a multiple of them is taken for beams and returned sequences of each row, which stand together.
    """
    opened = state.opened.get()
    if opened is not None and opened.shape[0] not in (1, prompts):
        raise DataError(
            f"sinks_open was given ids for {opened.shape[0]} rows, there are {prompts} prompts; give an id for each"
        )


def _train(
    model: Any,
    stock: Any,
    shape: tuple[int, int],
    document_ids: Tensor | None,
    exposures: Tensor | None,
    places: Tensor | None,
    isolation: Tensor | None,
    arguments: dict[str, Any],
) -> Any:
    state = require_sinks(model)
    config = state.config
    seen = [name for name, value in arguments.items() if value is not None and name.startswith(NOT_TEXT)]
    if seen:
        raise ArchitectureError(
            f"a model with sinks is trained on text alone, got {seen}; leave them out (evaluation takes them): no test shows "
            "what sinks do beside images"
        )
    ids = _aligned(document_ids, "document_ids", shape, NO_SINKS)
    counted = config.needs_exposures or _any_gated(isolation)
    counts = _aligned(exposures, "exposures", shape, 1) if counted else torch.ones_like(ids)
    _check_isolation(model, document_ids, exposures, arguments)
    if places is not None and counted and not torch.compiler.is_compiling():
        _check_order(state, places, shape[0])
    if "use_cache" in state.arguments:
        arguments["use_cache"] = False
    flags = None if isolation is None else _aligned(isolation, "isolation", shape, 0)
    if flags is not None and exposures is None:
        raise DataError("isolation needs exposures beside it, but none were given")
    opened, weight = opened_and_weight(state, ids, counts, flags)
    if state.taken and not torch.compiler.is_compiling():
        refuse_taken(state, ids)
    _refuse_unassigned(state, opened)
    if flags is not None:
        _check_isolated(state, opened, flags)
        _blank(arguments, flags)
    if config.shared == "none" or flags is not None:
        _refuse_reentrant(model)
        return run_apart(model, stock, arguments, opened, weight, ids)
    return run_weighted(model, stock, arguments, opened, weight)


def _refuse_reentrant(model: Any) -> None:
    """Two forwards of which each runs a backward of its own reach DDP as gradients that come twice."""
    if not dist.is_initialized() or dist.get_world_size() == 1 or is_sharded(model):
        return
    refuse_reentrant(model, "DDP where rows run apart (exact and private ones)")


def refuse_reentrant(model: Any, what: str) -> None:
    """ArchitectureError for a model with re-entrant checkpointing, which does not go with `what`."""
    for part in model.modules():
        call = getattr(part, "_gradient_checkpointing_func", None)
        if getattr(part, "gradient_checkpointing", False) and getattr(call, "keywords", {}).get("use_reentrant"):
            raise ArchitectureError(
                f"re-entrant checkpointing does not go with {what}; use "
                'model.gradient_checkpointing_enable({"use_reentrant": False}), in TrainingArguments '
                'gradient_checkpointing_kwargs={"use_reentrant": False}'
            )


def _any_gated(isolation: Tensor | None) -> bool:
    """Whether a text is gated whatever the model's settings say, so that its exposures count."""
    if isolation is None or torch.compiler.is_compiling():
        return isolation is not None
    return bool((isolation == ISOLATIONS["gated"]).any())


def _refuse_unassigned(state: SinkState, opened: Tensor) -> None:
    """Where no blocks are hashed to, an id must have blocks of its own."""
    if state.config.hashed_blocks or torch.compiler.is_compiling():
        return
    unknown = (opened != NO_SINKS) & ~state.table.holds(opened)
    if bool(unknown.any()):
        raise DataError(
            f"document id {int(opened[unknown][0])} has no blocks, and this model hashes to none; give it some with "
            "memsinks.assign"
        )


def _check_isolated(state: SinkState, opened: Tensor, flags: Tensor) -> None:
    """Texts that are flagged otherwise than the model's settings say need blocks that others do not open.

    Otherwise what trains sinks alone would write into blocks through which others send a gradient into the shared weights.
    """
    exact = state.config.shared == "none"
    other = flags == ISOLATIONS["gated"] if exact else (flags >= ISOLATIONS["exact"]) & (flags != BLANK)
    unknown = other & (opened != NO_SINKS) & ~state.table.holds(opened)
    if bool(unknown.any()):
        kinds = ("is gated", "train their sinks alone") if exact else ("is to train its sinks alone", "are gated")
        raise DataError(
            f"document id {int(opened[unknown][0])} {kinds[0]}, but its blocks are hashed, and documents that {kinds[1]} may "
            "open them too; give it blocks of its own with memsinks.assign"
        )


def _blank(arguments: dict[str, Any], flags: Tensor) -> None:
    """Drop the targets of blank tokens, which the divisor counts."""
    blank = flags == BLANK
    if not bool(blank.any()):
        return
    if arguments.get("num_items_in_batch") is None or arguments.get("labels") is None:
        raise DataError(
            "blank rows count as targets but have no loss: give labels and num_items_in_batch (memsinks.target_count of the step)"
        )
    arguments["labels"] = arguments["labels"].masked_fill(blank, IGNORED)


def _aligned(ids: Tensor | None, name: str, shape: tuple[int, int], least: int) -> Tensor:
    """`ids` [B] or [B, T] as [B, T]."""
    if ids is None:
        raise DataError(
            f"a model with sinks is trained with {name}, but none were given; pass an int64 tensor [B] or [B, T] "
            "(memsinks.collate does; memsinks.SinkTrainer takes it by itself, trainers that make batches of their own cannot "
            "train sinks), or model.eval() for evaluation"
        )
    check_ids(ids, name, least)
    if ids.shape != shape and ids.shape != shape[:1]:
        raise DataError(f"{name} must have shape [{shape[0]}] or [{shape[0]}, {shape[1]}], got {list(ids.shape)}")
    return ids if ids.dim() == 2 else ids[:, None].expand(shape)


def _check_order(state: SinkState, places: Tensor, rows: int) -> None:
    """Exposures were counted in the order of the rows, so a batch may not lie before the one met last."""
    check_ids(places, "places", 0)
    if places.shape != (rows,):
        raise DataError(f"places must have shape [{rows}], got {list(places.shape)}")
    order, place = int(places[0]) >> 32, int(places.min()) & (2**32 - 1)
    if state.place is not None and state.place[0] == order and place < state.place[1]:
        raise DataError(
            f"row {place} of the training order is met after row {state.place[1]}, but exposures were counted in that order; "
            "train on the rows once, in order, without shuffling (epochs are unrolled by make_rows(..., epochs=...)), "
            "or start from a new model"
        )
    state.place = order, place


def _check_isolation(
    model: Any, document_ids: Tensor | None, exposures: Tensor | None, arguments: dict[str, Any]
) -> None:
    """Refuse rows in which ids or exposures change, so that they hold several documents, without isolation.

    A compiled forward cannot look into the rows: there all ids [B, T] count as several documents a row.
    """
    marks = [mark for mark in (document_ids, exposures) if mark is not None and mark.dim() == 2]
    if not marks:
        return
    if not torch.compiler.is_compiling():
        borders = [mark[:, 1:] != mark[:, :-1] for mark in marks]
        # What follows a row's last target (or, without labels, its last id) is padding, not a document.
        labels = arguments.get("labels")
        ids = marks[0]
        text = ids != NO_SINKS if labels is None else labels != IGNORED
        before_the_end = text[:, 1:].flip(1).cumsum(1).flip(1).bool()
        if not any(bool((border & before_the_end).any()) for border in borders):
            return
    kinds = dict.fromkeys(config.model_type for config in (model.config, model.config.get_text_config()))
    if leaky := [kind for kind in kinds if kind not in ISOLATES_PACKED]:
        raise ArchitectureError(
            f"packed rows (several documents in one) leak between documents in {leaky[0]}, or were not shown not to; "
            "pack with one_document_per_row=True"
        )
    if arguments.get("position_ids") is None:
        raise DataError(
            "rows hold several documents but position_ids is missing, so documents would attend to each other; "
            "pass the position_ids of memsinks.pack (they restart with each document)"
        )
    if arguments.get("attention_mask") is not None:
        raise DataError(
            "rows hold several documents and attention_mask is set, which switches off their isolation in attention; "
            "leave attention_mask out (padding is a segment of its own)"
        )


def _opened_ids(opened: Tensor, rows: int, length: int, device: torch.device, cache: Any) -> Tensor:
    """The ids of `sinks_open` as [rows, length, union]; tokens past the last column have the ids of the last column."""
    generating = cache is not None
    if rows != opened.shape[0] and not (opened.shape[0] == 1 or (generating and rows % opened.shape[0] == 0)):
        hint = (
            ""
            if generating or rows % opened.shape[0]
            else " (beams and returned sequences of a row need use_cache=True)"
        )
        raise DataError(f"sinks_open was given ids for {opened.shape[0]} rows, the input has {rows}{hint}")
    opened = opened.repeat_interleave(
        rows // opened.shape[0], 0
    )  # beams and returned sequences of a row stand together
    first = 0 if cache is None else cache.get_seq_length()
    column = (torch.arange(length, device=device) + first).clamp(max=opened.shape[1] - 1)
    return opened.to(device)[:, column]
