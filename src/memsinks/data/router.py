"""Whose text is a question about? The nearest owner by words, or nobody.

    router = ms.Router.fit(documents, by="source")
    with ms.sinks_open(model, torch.tensor(router.owners_of(["What does Acme sell?"]))): ...  # a row each
    router.remove(owner); router.save("router/")

What it keeps of an owner is how often each hashed word stands in his documents. All else (how rare a word is) is computed from
the owners that are there, so a router from which one was removed is the one that never met him, bit for bit.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from memsinks.batch import NO_SINKS
from memsinks.checks import share
from memsinks.data.documents import Document, as_documents
from memsinks.data.identity import By, identify
from memsinks.data.matching import SPACELESS, normal_form
from memsinks.errors import CheckpointError, ConfigError, DataError, refuse
from memsinks.files import read_json, written_beside

FEATURES = 2**18
"""Places that words are hashed to."""
THRESHOLD = 0.2
"""Cosine below which a question is nobody's."""
SETTINGS, COUNTS = "router.json", "router.safetensors"
FORMAT_VERSION = 2
_TERMS = re.compile(f"([{SPACELESS}]+)|[^\\W{SPACELESS}]+")

REMEDY = "make it anew with Router.fit"


@dataclass(frozen=True)
class Router:
    """Owners and the words of their documents.

    Args:
        counts: scipy CSR matrix, float64 [owners, `FEATURES`], how often each hashed word stands in their documents.
        owners: int64 [owners], their ids, ascending.
        threshold: cosine, in [0, 1], below which a question is nobody's.
        version: what its terms are; 1: words of the lower case; 2: see `_terms`.
    """

    counts: Any
    owners: np.ndarray
    threshold: float = THRESHOLD
    version: int = FORMAT_VERSION

    @classmethod
    def fit(cls, documents: Iterable[Document], by: By = "source", *, threshold: float = THRESHOLD) -> Router:
        """A router over documents; those that share a name by `by` have one owner.

        Raises:
            ConfigError: a threshold outside [0, 1]; scikit-learn is missing. DataError: no documents, or some without owner by
                `by`.
        """
        refuse(share("threshold", threshold), "cannot make a router")
        documents = as_documents(documents)
        if not documents:
            raise DataError("a router needs documents, got none")
        texts: dict[int, list[str]] = {}
        for document, owner in zip(documents, identify(documents, by)[0].tolist(), strict=True):
            texts.setdefault(owner, []).append(document.text)
        owners = sorted(texts)
        return cls(_counted(["\n".join(texts[x]) for x in owners]), np.array(owners, np.int64), threshold)

    @cached_property
    def _rarity(self) -> np.ndarray:
        """log((1 + owners) / owners who use it), float64 [`FEATURES`]; words that nobody uses weigh as those of one.

        So a question whose names nobody uses, as those of an owner who left, is far from everybody.
        """
        count = self.counts.shape[0]
        held = np.bincount(self.counts.indices, minlength=FEATURES)
        return np.log((1 + count) / np.maximum(1, held))

    @cached_property
    def _weighted(self) -> Any:
        return self._weigh(self.counts)

    def _weigh(self, counts: Any) -> Any:
        """Rows of length 1: counts, as 1 + log, times rarity."""
        from scipy.sparse import csr_matrix

        values = (1 + np.log(counts.data)) * self._rarity[counts.indices]
        found = csr_matrix((values, counts.indices, counts.indptr), shape=counts.shape)
        norms = np.sqrt(np.asarray(found.multiply(found).sum(1)))[:, 0]
        values = values / np.repeat(np.where(norms > 0, norms, 1.0), np.diff(counts.indptr))
        return csr_matrix((values, counts.indices, counts.indptr), shape=counts.shape)

    def similarities(self, texts: Sequence[str], among: Collection[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The nearest owner of each text and how near he is: int64 [texts], cosine float64 [texts] in [0, 1].

        Of owners equally near the one with the lowest id. Source: cosine of TF-IDF with sublinear counts, Manning, Raghavan,
        Schütze, "Introduction to information retrieval", section 6.4.

        Args:
            among: only these owners, all ids; None = all. How rare a word is follows from all owners in either case.

        Raises:
            DataError: one of `among` is not in the router; one str instead of many.
        """
        if isinstance(among, int):
            raise DataError(f"among is a list of ids, got {among}; give [{among}]")
        if isinstance(texts, str):
            raise DataError("texts must be many texts, got one str; put it into a list")
        wanted = np.arange(len(self.owners)) if among is None else self._places(among)
        if not len(wanted):
            return np.full(len(texts), NO_SINKS, np.int64), np.zeros(len(texts))
        near = (self._weigh(_counted(list(texts), self.version)) @ self._weighted[wanted].T).toarray()
        return self.owners[wanted[near.argmax(1)]], near.max(1)

    def _places(self, owners: Collection[int]) -> np.ndarray:
        unknown = sorted(set(owners) - set(self.owners.tolist()))
        if unknown:
            raise DataError(f"id {unknown[0]} is not in the router; there are {len(self.owners)} owners")
        return np.flatnonzero(np.isin(self.owners, sorted(set(owners))))

    def owners_of(self, texts: Sequence[str], among: Collection[int] | None = None) -> list[int]:
        """The owner whose sinks to open for each text, -1 where none is near enough.

        For `sinks_open` make a tensor of it, a row each: a list of ids would open all of them in every row.

        Args:
            among: those whom the asker may open, ids; None = all.

        Raises:
            DataError: one of `among` is not in the router.
        """
        nearest, near = self.similarities(texts, among)
        return [int(x) if y >= self.threshold else NO_SINKS for x, y in zip(nearest, near, strict=True)]

    def remove(self, owner: int) -> Router:
        """The router without an owner; DataError if he is not in it."""
        self._places([owner])
        kept = self.owners != owner
        return replace(self, counts=self.counts[kept], owners=self.owners[kept])

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``router.json`` and ``router.safetensors`` into a folder of their own."""
        target = Path(folder)
        with written_beside(target) as part:
            self.write(part)
        return target

    def write(self, folder: Path) -> None:
        """Write the two files into a folder that is there."""
        parts = {"data": self.counts.data, "indices": self.counts.indices, "indptr": self.counts.indptr}
        arrays = {name: np.ascontiguousarray(x, np.int64) for name, x in (parts | {"owners": self.owners}).items()}
        save_file(arrays, folder / COUNTS)
        settings = {"format_version": self.version, "features": FEATURES, "threshold": self.threshold}
        (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n")

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Router:
        """Read what `save` wrote.

        Raises:
            CheckpointError: no router there, or one that cannot be read. ConfigError: scikit-learn is missing.
        """
        folder, sparse = Path(folder), _packages()[1]
        if not (folder / SETTINGS).is_file():
            raise CheckpointError(f"no router in {folder} ({SETTINGS} is not there); {REMEDY}")
        try:
            settings, arrays = read_json(folder / SETTINGS, REMEDY), load_file(folder / COUNTS)
            if settings["format_version"] not in (1, FORMAT_VERSION) or settings["features"] != FEATURES:
                raise CheckpointError(f"the router in {folder} is of another version: {settings!r:.200}; {REMEDY}")
            refuse(share("threshold", settings["threshold"]), "settings")
            shape = (len(arrays["owners"]), FEATURES)
            parts = (arrays["data"].astype(float), arrays["indices"], arrays["indptr"])
            counts = sparse.csr_matrix(parts, shape=shape)
            counts.check_format(full_check=True)
        except CheckpointError:
            raise
        except (OSError, SafetensorError, ValueError, TypeError, KeyError, IndexError, ArithmeticError) as error:
            raise CheckpointError(f"there is no router in {folder} that can be read: {error}; {REMEDY}") from error
        return cls(counts, arrays["owners"], settings["threshold"], settings["format_version"])


def _counted(texts: Sequence[str], version: int = FORMAT_VERSION) -> Any:
    """How often each hashed word stands in each text, CSR float64 [texts, `FEATURES`]."""
    vectorizer = _packages()[0](
        n_features=FEATURES, alternate_sign=False, norm=None, analyzer=_terms if version > 1 else _lower_words
    )
    return vectorizer.transform(texts).tocsr()


def _lower_words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


def _terms(text: str) -> list[str]:
    """The words of a text in its normal form, without punctuation; in scripts without spaces all pairs of neighbors.

    Source: Manning, Raghavan, Schütze, "Introduction to information retrieval", section 2.2.1.
    """
    found = []
    for match in _TERMS.finditer(normal_form(text)):
        term = match[0]
        found += [term[at : at + 2] for at in range(len(term) - 1)] if match[1] and len(term) > 1 else [term]
    return found


def _packages() -> tuple[Any, Any]:
    try:
        from scipy import sparse
        from sklearn.feature_extraction.text import HashingVectorizer
    except ImportError as error:
        raise ConfigError('a router needs scikit-learn; pip install "memsinks[router]"') from error
    return HashingVectorizer, sparse
