"""Tokens on disk: one int32 file, mapped into memory, so that a corpus may be larger than the memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memsinks.errors import CheckpointError

TOKEN = np.dtype("<i4")


class StoredTokens(Sequence[np.ndarray]):
    """The tokens of documents in a file, in any order and any number of copies; a document is read when asked for.

    Args:
        path: the file, `TOKEN` [tokens of all documents], one document after the other.
        offsets: int64 [documents + 1], where each begins in the file.
        order: int64 [n], the documents that stand here; None = each once.

    Raises:
        CheckpointError: the file is missing or not of the size that `offsets` say.
    """

    def __init__(self, path: Path, offsets: np.ndarray, order: np.ndarray | None = None) -> None:
        wanted = int(offsets[-1]) * TOKEN.itemsize
        found = path.stat().st_size if path.is_file() else None
        if found != wanted:
            raise CheckpointError(
                f"{path} should have {wanted} bytes, it has {found}; remove the folder and make it anew"
            )
        self.path, self.offsets = path, offsets
        self.order = np.arange(len(offsets) - 1) if order is None else order
        self._tokens = np.asarray(np.memmap(path, TOKEN, "r"))

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: Any) -> np.ndarray:
        """int32 [tokens of the document], not to be written to."""
        document = self.order[index]
        return self._tokens[self.offsets[document] : self.offsets[document + 1]]

    @property
    def sizes(self) -> np.ndarray:
        """int64 [n], the tokens of each."""
        return np.diff(self.offsets)[self.order]

    def in_order(self, order: np.ndarray) -> StoredTokens:
        """The documents of these indices, from the same file."""
        return StoredTokens(self.path, self.offsets, self.order[order])


def write_tokens(path: Path, documents: Iterable[np.ndarray]) -> np.ndarray:
    """Write the tokens of documents one after the other; returns the offsets, int64 [documents + 1]."""
    offsets = [0]
    with path.open("wb") as file:
        for document in documents:
            file.write(np.ascontiguousarray(document, TOKEN).tobytes())
            offsets.append(offsets[-1] + len(document))
    return np.array(offsets, np.int64)
