"""Ordinary training, also with a wider MLP."""

from __future__ import annotations

from memsinks.research.rivals.method import Method


def standard(*, width: int = 0) -> Method:
    """Ordinary training; `width` neurons more than the recipe's in each MLP, which are exported too."""
    return Method(width=width)
