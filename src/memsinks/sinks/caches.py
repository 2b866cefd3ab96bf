"""Which sinks filled a key-value cache: what is in it may only be read while the same ones are open.

A cache keeps what the sinks did to the tokens in it. Read while others are open, it would mix the memory of two documents. So the
cache itself carries what was open when it was filled, also through `copy.deepcopy`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from memsinks.batch import NO_SINKS
from memsinks.errors import DataError

MARK = "_sinks_open"
"""Attribute of a cache: what was open, as in `Running.opened`. Without it sinks were closed."""


def check_cache(cache: Any, opened: Tensor | None) -> None:
    """Refuse a cache that was filled under other sinks, and mark one that is to be filled.

    Values are compared once for each `sinks_open`, not for each token. A compiled forward compares nothing.

    Args:
        cache: of transformers, or None.
        opened: what is open now, int64 [rows or 1, columns, union]; None = nothing.

    Raises:
        DataError: for a token in the cache other sinks were open than those that are open for its place now.
    """
    filled = getattr(cache, MARK, None)
    if cache is None or filled is opened or torch.compiler.is_compiling():
        return
    length = int(cache.get_seq_length())
    if length and not _same(filled, opened, length):
        before, now = _described(filled), _described(opened)
        now = now if now != before else "the same ones open for other rows or tokens"
        raise DataError(
            f"the key-value cache was filled with {before} and is now used with {now}; start with a fresh cache, or open "
            "the same sinks as when it was filled (memsinks.sinks_open)"
        )
    mark_cache(cache, opened)


def mark_cache(cache: Any, opened: Tensor | None) -> None:
    """Remember on a cache what is open while it is filled."""
    if cache is not None:
        setattr(cache, MARK, opened)


def cache_of(output: Any) -> Any:
    """The cache that a forward gives back, or None."""
    if isinstance(output, tuple):
        return next((part for part in output if hasattr(part, "get_seq_length")), None)
    return getattr(output, "past_key_values", None)


def _same(filled: Tensor | None, opened: Tensor | None, length: int) -> bool:
    """Whether both open the same for the first `length` tokens of every row."""
    closed = torch.full((1, 1, 1), NO_SINKS)
    first, second = (closed if x is None else x.cpu() for x in (filled, opened))
    rows = max(len(first), len(second))
    if rows % len(first) or rows % len(second):
        return False
    columns = torch.arange(min(length, max(first.shape[1], second.shape[1])))
    union = max(first.shape[2], second.shape[2])
    found = []
    for ids in (first, second):
        ids = ids.repeat_interleave(rows // len(ids), 0)[:, columns.clamp(max=ids.shape[1] - 1)].sort(-1).values
        again = pad(ids[..., 1:] == ids[..., :-1], (1, 0))
        found.append(pad(ids.masked_fill(again, NO_SINKS), (union - ids.shape[2], 0), value=NO_SINKS).sort(-1).values)
    return torch.equal(*found)


def _described(opened: Tensor | None) -> str:
    ids = [] if opened is None else [x for x in opened.unique().tolist() if x != NO_SINKS]
    if not ids:
        return "sinks closed"
    return f"the sinks of {', '.join(map(str, ids[:5]))}{' and others' if len(ids) > 5 else ''} open"
