"""The contract of a batch: its fields, the ignored label, the id that opens nothing, the collator, taking rows out of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from memsinks.checks import is_int, rounded_ids
from memsinks.errors import DataError, refuse

FIELDS = ("input_ids", "labels", "document_ids", "exposures", "position_ids")
"""What every row has: int64 [length] each in a row, [rows, length] in a batch."""
IGNORED = -100
"""The label of a token that is no target."""
NO_SINKS = -1
"""The document id that opens no sinks (padding, untracked text), and the group of a text counted with no other."""
PLACES = "places"
"""Where each row stands in its training order: int64, a scalar in a row, [rows] in a batch. The upper 31 bits are a hash of
the order, the lower 32 bits the number of the row in it, so a model can see whether rows come in the order in which their
exposures were counted. Not one of the `FIELDS`: rows made without `pack` need none."""
ISOLATION = "isolation"
"""What each token's text may teach the shared weights, where texts of a batch differ: int64 [length] in a row, [rows, length] or
[rows] in a batch; 0 = what the model's settings say (`SinkConfig.shared`), else one of `ISOLATIONS` or `BLANK`. Not one of the
`FIELDS`: rows without it are all 0."""
ISOLATIONS = {"gated": 1, "exact": 2, "private": 3}
"""How a text is isolated -> its number in a batch. *gated*: its sinks open from `open_from` on, and what it teaches the shared
weights decays. *exact*: from `open_from` on it trains its sinks alone. *private*: from its first exposure on."""
BLANK = 4
"""The token is there and counts as a target, but nothing learns from it, see `packing.shadow_rows`."""
ROW_ARGUMENTS = (*FIELDS, ISOLATION, "inputs_embeds", "attention_mask", "token_type_ids")
"""Arguments of a forward whose first dimension is the row, unless it is the same for all rows (1); `PLACES` apart, which
only the forward of a training step may be given."""


def collate(rows: Iterable[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Stack rows to a batch: the five fields, int64 [rows, length] each, and no attention_mask.

    `PLACES`, int64 [rows], is there too if every row has it, and `ISOLATION`, int64 [rows, length], if one has it. Rows are
    those of `Rows`, or dicts of tensors, arrays or lists, as a Hugging Face dataset gives them; other fields are left out. An
    attention_mask would let packed documents see each other.

    Raises:
        DataError: no rows, a field missing, not int64, of another length, or out of range (ids below -1, exposures
            below 1); ids that went through floats.
    """
    rows = list(rows)
    if not rows:
        raise DataError("no rows to collate")
    batch: dict[str, Tensor] = {}
    length: int | None = None
    for name in FIELDS:
        values = []
        for index, row in enumerate(rows):
            if name not in row:
                raise DataError(
                    f"row {index} has no {name}, only {sorted(row)}; use rows made by pack(), and under the HF Trainer "
                    "keep them with remove_unused_columns=False"
                )
            value = _tensor(row[name], f"{name} of row {index}")
            length = len(value) if length is None else length
            if len(value) != length:
                raise DataError(f"{name} of row {index} has length {len(value)}, others have {length}; pack() first")
            values.append(value)
        batch[name] = torch.stack(values)
    if all(row.get(PLACES) is not None for row in rows):
        batch[PLACES] = torch.stack(
            [_tensor(row[PLACES], f"places of row {x}", place=True) for x, row in enumerate(rows)]
        )
    if any(row.get(ISOLATION) is not None for row in rows):
        unflagged = torch.zeros(length or 0, dtype=torch.int64)
        values = [row[ISOLATION] if row.get(ISOLATION) is not None else unflagged for row in rows]
        batch[ISOLATION] = torch.stack([_tensor(x, f"isolation of row {row}") for row, x in enumerate(values)])
    for name, least in (("document_ids", NO_SINKS), ("exposures", 1), (PLACES, 0), (ISOLATION, 0)):
        if name in batch and batch[name].numel() and int(batch[name].min()) < least:
            raise DataError(f"{name} must be at least {least}, got {int(batch[name].min())}")
    refuse(rounded_ids("document_ids", batch["document_ids"].cpu().numpy()), "cannot collate", DataError)
    return batch


def _tensor(value: Any, what: str, place: bool = False) -> Tensor:
    """`value` as int64 [length]; a `place` (a number, or [1]) as int64 []."""
    try:
        if isinstance(value, np.ndarray) and not value.dtype.isnative:
            value = value.astype(value.dtype.newbyteorder("="))
        tensor = value if isinstance(value, Tensor) else torch.tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{what} is not a row of integers: {error}") from error
    shape, wanted = ("[]", tensor.numel() == 1) if place else ("[length]", tensor.ndim == 1)
    if tensor.dtype != torch.int64 or not wanted:
        raise DataError(f"{what} must be int64 {shape}, got {tensor.dtype} {list(tensor.shape)}")
    return tensor.reshape(()) if place else tensor


def target_count(labels: Tensor) -> int:
    """The number of targets in `labels` [B, T], as Hugging Face counts them: the first column is never a target.

    The divisor of a step's loss is the sum of this over all its micro-batches and ranks; pass it to the model as
    ``num_items_in_batch``. It is never weighted and never counted after masking.
    """
    return int((labels[:, 1:] != IGNORED).sum())


def blank_batch(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same rows without anything to learn from them: no targets, and sinks closed.

    A process that has run out of rows gives this to the model, so that it takes part in the forwards and backwards of the others.
    """
    rows = {name: batch[name] for name in ("input_ids", "position_ids") if batch.get(name) is not None}
    return rows | {
        "labels": torch.full_like(batch["input_ids"], IGNORED),
        "document_ids": torch.full_like(batch["document_ids"], NO_SINKS),
        "exposures": torch.ones_like(batch["document_ids"]),
    }


def stock_arguments(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a model without sinks takes of a batch of `collate`."""
    return {name: batch[name] for name in ("input_ids", "labels", "position_ids")}


def check_ids(ids: Tensor, name: str = "document_ids", least: int = NO_SINKS) -> None:
    """Raise DataError unless `ids` is an int64 tensor with values of at least `least`."""
    if not isinstance(ids, Tensor):
        raise DataError(f"{name} must be an int64 tensor, got {type(ids).__name__}")
    if ids.dtype != torch.int64:
        raise DataError(f"{name} must be int64, got {ids.dtype}; convert with .long() before any rounding can happen")
    if not torch.compiler.is_compiling() and ids.numel() and int(ids.min()) < least:
        allowed = "non-negative, or exactly -1 for no sinks" if least == NO_SINKS else f"at least {least}"
        raise DataError(f"{name} must be {allowed}; the least value is {int(ids.min())}")


def is_id(value: Any, or_none: bool = False) -> bool:
    """Whether a value is a document's id; -1 (no sinks) is one with `or_none` alone."""
    return is_int(value) and (NO_SINKS if or_none else 0) <= value < 2**63


def checked_id(value: Any, or_none: bool = False) -> int:
    """A document's id as an int, with `or_none` also -1 (no sinks); DataError for anything else."""
    if is_id(value, or_none):
        return int(value)
    none = ", or exactly -1 for none" if or_none else ""
    raise DataError(
        f"a document id is an int from 0 to 2**63 - 1 (memsinks.document_id gives it){none}, got {value!r:.60}"
    )


def as_int64(values: Iterable[int] | np.ndarray, name: str, least: int, narrow: bool = False) -> np.ndarray:
    """Integers (an array of any byte order, a sequence, an iterator) as int64 [n].

    Args:
        narrow: take narrower integers too. Not for ids, which have lost bits there.

    Raises:
        DataError: not one-dimensional, floats or other types, below `least`, or rounded by floats on the way.
    """
    array = np.asarray(values if hasattr(values, "__len__") else list(values))
    if array.shape == (0,) and not isinstance(values, np.ndarray):
        array = array.astype(np.int64)
    whole = array.dtype.kind in "iu" and np.can_cast(array.dtype, np.int64)
    if array.ndim != 1 or not whole or (array.dtype.itemsize < 8 and not narrow):
        raise DataError(f"{name} must be int64, got {array.dtype} {list(array.shape)}; one integer for each document")
    if array.size and array.min() < least:
        raise DataError(f"{name} must be at least {least}, got {array.min()} at document {array.argmin()}")
    array = array.astype(np.int64, copy=False)
    refuse(rounded_ids(name, array), "unusable", DataError)
    return array


def trim(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch without the columns after its last target: rows of one short document are mostly padding.

    At least one column stays. What is no field of a row (`PLACES`) stays as it is.
    """
    targets = (batch["labels"] != IGNORED).any(0).nonzero()
    longest = int(targets.max()) + 1 if len(targets) else 1
    return {name: value[:, :longest] if value.dim() > 1 else value for name, value in batch.items()}


def take_rows(arguments: Mapping[str, Any], chosen: Tensor, rows: int) -> dict[str, Any]:
    """The rows `chosen` (int64 [n]) of a forward's arguments, which have `rows` rows; what is the same for all rows stays."""
    by_row = (*ROW_ARGUMENTS, PLACES)
    return {
        name: value[chosen] if name in by_row and value is not None and len(value) == rows else value
        for name, value in arguments.items()
    }
