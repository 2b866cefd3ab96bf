"""The contract of a batch: its fields, the ignored label, the id that opens nothing, the collator, taking rows out of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from memsinks.errors import DataError

FIELDS = ("input_ids", "labels", "document_ids", "exposures", "position_ids")
"""What every row has: int64 [length] each in a row, [rows, length] in a batch."""
IGNORED = -100
"""The label of a token that is no target."""
NO_SINKS = -1
"""The document id that opens no sinks (padding, untracked text), and the group of a text counted with no other."""
ROW_ARGUMENTS = (*FIELDS, "inputs_embeds", "attention_mask")
"""Arguments of a forward whose first dimension is the row, unless it is the same for all rows (1)."""


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Stack rows to a batch: exactly the five fields, int64 [rows, length] each, and no attention_mask.

    Rows are those of `Rows`, or dicts of tensors, arrays or lists, as a Hugging Face dataset gives them; fields other
    than the five are left out. An attention_mask would let packed documents see each other.

    Raises:
        DataError: no rows, a field missing, not int64, of another length, or out of range (ids below -1, exposures
            below 1).
    """
    if not rows:
        raise DataError("no rows to collate")
    batch: dict[str, torch.Tensor] = {}
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
    for name, least in (("document_ids", NO_SINKS), ("exposures", 1)):
        if batch[name].numel() and int(batch[name].min()) < least:
            raise DataError(f"{name} must be at least {least}, got {int(batch[name].min())}")
    return batch


def _tensor(value: Any, what: str) -> torch.Tensor:
    try:
        tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{what} is not a row of integers: {error}") from error
    if tensor.dtype != torch.int64 or tensor.ndim != 1:
        raise DataError(f"{what} must be int64 [length], got {tensor.dtype} {list(tensor.shape)}")
    return tensor


def target_count(labels: Tensor) -> int:
    """The number of targets in `labels` [B, T], as Hugging Face counts them: the first column is never a target.

    The divisor of a step's loss is the sum of this over all its micro-batches and ranks; pass it to the model as
    ``num_items_in_batch``. It is never weighted and never counted after masking.
    """
    return int((labels[:, 1:] != IGNORED).sum())


def stock_arguments(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
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


def trim(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch without the columns after its last target: rows of one short document are mostly padding."""
    longest = int((batch["labels"] != IGNORED).any(0).nonzero().max()) + 1
    return {name: value[:, :longest] for name, value in batch.items()}


def take_rows(arguments: Mapping[str, Any], chosen: Tensor, rows: int) -> dict[str, Any]:
    """The rows `chosen` (int64 [n]) of a forward's arguments, which have `rows` rows; what is the same for all rows stays."""
    return {
        name: value[chosen] if name in ROW_ARGUMENTS and value is not None and len(value) == rows else value
        for name, value in arguments.items()
    }
