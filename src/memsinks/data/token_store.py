"""Tokens on disk: files of integers, mapped into memory, so that a corpus may be larger than the memory."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from memsinks.errors import CheckpointError

TOKEN = np.dtype("<i4")
SMALL = np.dtype("<u2")
"""For vocabularies of up to 65,536 tokens."""


def token_type(vocabulary: int) -> np.dtype:
    """The smallest type that holds the tokens of a vocabulary of this size."""
    return SMALL if vocabulary <= 2**16 else TOKEN


def load_array(path: Path, remedy: str, mode: Literal["r"] | None = None) -> np.ndarray:
    """The array of a .npy file, which holds no objects; "r" maps it. CheckpointError if it is missing or damaged."""
    try:
        return np.load(path, mode, allow_pickle=False)
    except Exception as error:  # the parsers of its header raise a dozen types
        raise CheckpointError(f"{path} is missing or damaged ({error!s:.200}); {remedy}") from error


class StoredTokens(Sequence[np.ndarray]):
    """The tokens of documents in files, in any order and any number of copies; a document is read when asked for.

    Args:
        paths: the file, [tokens of all documents], one document after the other; or files, in which the documents go on.
        offsets: int64 [documents + 1], where each begins in the files put together.
        order: int64 [n], the documents that stand here; None = each once.
        ends: where each file ends in the files put together, at the end of a document; needed where there are several.
        dtype: of the tokens in the files.

    Raises:
        CheckpointError: a file is missing or not of the size that `offsets` and `ends` say.
    """

    def __init__(
        self,
        paths: Path | Sequence[Path],
        offsets: np.ndarray,
        order: np.ndarray | None = None,
        *,
        ends: Sequence[int] | None = None,
        dtype: np.dtype = TOKEN,
    ) -> None:
        self.paths = [paths] if isinstance(paths, Path) else list(paths)
        self.offsets = offsets
        self._starts = np.array([0, *(offsets[-1:] if ends is None else ends)], np.int64)
        for path, tokens in zip(self.paths, np.diff(self._starts).tolist(), strict=True):
            wanted, found = tokens * dtype.itemsize, path.stat().st_size if path.is_file() else None
            if found != wanted:
                raise CheckpointError(
                    f"{path} should have {wanted} bytes, it has {found}; remove the folder and make it anew"
                )
        self._files = [np.asarray(np.memmap(path, dtype, "r")) for path in self.paths]
        self.order = np.arange(len(offsets) - 1) if order is None else order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: Any) -> np.ndarray:
        """int32 [tokens of the document], not to be written to."""
        document = self.order[index]
        begin, end = self.offsets[document], self.offsets[document + 1]
        file = int(self._starts.searchsorted(begin, "right")) - 1
        start = self._starts[file]
        return self._files[file][begin - start : end - start].astype(TOKEN, copy=False)

    @property
    def sizes(self) -> np.ndarray:
        """int64 [n], the tokens of each."""
        return np.diff(self.offsets)[self.order]

    def in_order(self, order: np.ndarray) -> StoredTokens:
        """The documents of these indices, from the same files."""
        other = object.__new__(StoredTokens)
        other.__dict__.update(self.__dict__, order=self.order[order])
        return other


def write_tokens(path: Path, documents: Iterable[np.ndarray]) -> np.ndarray:
    """Write the tokens of documents one after the other; returns the offsets, int64 [documents + 1]."""
    offsets = [0]
    with path.open("wb") as file:
        for document in documents:
            file.write(np.ascontiguousarray(document, TOKEN).tobytes())
            offsets.append(offsets[-1] + len(document))
    return np.array(offsets, np.int64)
