"""Shingles of many texts -> clusters, in arrays; see `near_copies` for the method.

Memory, besides shingles and minima, which may lie on disk: about 200 bytes a document, 40 a candidate pair, and the sorting of
`AT_ONCE` shingles.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from memsinks.checks import int_at_least, is_number
from memsinks.data.matching import FEWEST, SIZE
from memsinks.data.readers import import_optional
from memsinks.errors import refuse

SEED = 1
"""Of the minima. Changing it may change which pairs are found."""
AT_ONCE = 1 << 22
"""Shingles that are sorted at once, about 40 bytes each."""
SKETCHED = 1000
"""Texts whose minima are computed at once."""
TOP = 10
"""Clusters that a report names."""


@dataclass(frozen=True, kw_only=True)
class NearCopies:
    """What counts as a near copy.

    Args:
        threshold: least Jaccard similarity of two texts, in (0, 1]. Copies of which 5% of the words were edited here and there
            have 0.63, of which 10% were 0.42.
        size: words of a shingle.
        bands, rows: of the minima. With 64 of 3, a pair of similarity 0.3 is found with probability 0.83, of 0.42 with 0.99.
        boilerplate: a shingle in more different texts than this is boilerplate. A text with more near copies than this is
            taken for a template, and they are not clustered; the report counts such texts.
        largest: most different texts of a cluster; what is more begins another. The report counts such clusters.

    Raises:
        ConfigError: out of range, all at once.
    """

    threshold: float = 0.3
    size: int = SIZE
    bands: int = 64
    rows: int = 3
    boilerplate: int = 100
    largest: int = 1000

    def __post_init__(self) -> None:
        good = is_number(self.threshold) and 0 < self.threshold <= 1
        problems = [] if good else [f"threshold must lie in (0, 1], got {self.threshold!r}"]
        for name, least in (("size", 1), ("bands", 1), ("rows", 1), ("boilerplate", 1), ("largest", 2)):
            problems += int_at_least(name, getattr(self, name), least)
        refuse(problems, "near_copies")

    def found(self, similarity: float) -> float:
        """The probability with which a pair of texts of this similarity becomes a candidate."""
        return 1 - (1 - similarity**self.rows) ** self.bands


@dataclass(frozen=True)
class Shingled:
    """The shingles of some texts.

    Attributes:
        forms: int64 [texts], a hash of the normal form of each.
        offsets: int64 [texts + 1], where the shingles of each begin.
        shingles: int64 [shingles], those of each text without repeats, ascending.
    """

    forms: np.ndarray
    offsets: np.ndarray
    shingles: np.ndarray


def cluster(
    parts: Sequence[Shingled], settings: NearCopies, scratch: Path | None = None
) -> tuple[np.ndarray, dict[str, Any]]:
    """(the normal form of each document's center, int64 [documents]; a report), the same for any order and cut of the parts.

    Args:
        scratch: a folder for shingles in another order, 8 bytes each, and for the minima, 8 bytes a band and document; None =
            they are in memory.
    """
    forms = np.concatenate([part.forms for part in parts])
    names, first, number = np.unique(forms, return_index=True, return_inverse=True)
    texts = _Texts(parts, first)
    boilerplate = texts.boilerplate(settings.boilerplate, scratch)
    texts.leave_out(boilerplate)
    pairs = _candidates(texts, settings, scratch)
    left, right, alike = _verified(texts, pairs, settings.threshold)
    center, cut = _centers(len(names), left, right, alike, settings.largest)
    found = names[center[number]]
    return found, _report(found, settings, texts, boilerplate, len(pairs), len(left), cut)


class _Texts:
    """The different texts of all parts, in the order of their forms, and their shingles but boilerplate."""

    def __init__(self, parts: Sequence[Shingled], first: np.ndarray) -> None:
        starts = np.cumsum([0, *(len(part.forms) for part in parts)])
        self.parts = parts
        self.part = starts.searchsorted(first, "right") - 1
        self.place = first - starts[self.part]
        self.whole = np.zeros(len(first), np.int64)
        for number, part in enumerate(parts):
            own = self.part == number
            self.whole[own] = np.diff(part.offsets)[self.place[own]]
        self.kept = self.whole.copy()
        self._boilerplate = np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self.part)

    def __getitem__(self, text: int) -> np.ndarray:
        """int64 [shingles], ascending."""
        part, place = self.parts[self.part[text]], self.place[text]
        return self._left(np.asarray(part.shingles[part.offsets[place] : part.offsets[place + 1]]))

    def _left(self, shingles: np.ndarray) -> np.ndarray:
        return shingles[~_stands_in(shingles, self._boilerplate)]

    def leave_out(self, boilerplate: np.ndarray) -> None:
        """Leave shingles (int64, ascending) out of all texts."""
        self._boilerplate = boilerplate
        if len(boilerplate):
            self.kept = np.array([len(self[text]) for text in range(len(self))], np.int64)

    def boilerplate(self, most: int, scratch: Path | None) -> np.ndarray:
        """The shingles that stand in more than `most` texts: int64, ascending."""
        ascending = [self._ascending(number, scratch) for number in range(len(self.parts))]
        found = [np.zeros(0, np.int64)]
        for low, high in _ranges(int(self.whole.sum())):
            own = [x[x.searchsorted(low) : x.searchsorted(high, "right")] for x in ascending]
            values, counts = np.unique(np.concatenate(own), return_counts=True)
            found.append(values[counts > most])
        return np.concatenate(found)

    def _ascending(self, number: int, scratch: Path | None) -> np.ndarray:
        """The shingles of the texts that stand in a part first, each as often as it stands in one."""
        values = np.sort(self._of_part(number))
        if scratch is None or not len(values):
            return values
        np.save(path := scratch / f"ascending-{number:05d}.npy", values)
        return np.load(path, "r")

    def _of_part(self, number: int) -> np.ndarray:
        """The shingles of the texts that stand in a part first."""
        part, places = self.parts[number], np.sort(self.place[self.part == number])
        if len(places) == len(part.forms):
            return np.asarray(part.shingles)
        own = [part.shingles[part.offsets[place] : part.offsets[place + 1]] for place in places.tolist()]
        return np.concatenate([*own, np.zeros(0, np.int64)])


def _ranges(entries: int) -> Iterator[tuple[int, int]]:
    """Ranges of 63-bit hashes, first and last, each of which holds about `AT_ONCE` of so many entries."""
    number = max(1, -(-entries // AT_ONCE))
    edges = [(1 << 63) * place // number for place in range(number + 1)]
    return ((low, high - 1) for low, high in itertools.pairwise(edges))


def _stands_in(values: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """bool [values]."""
    if not len(ascending):
        return np.zeros(len(values), bool)
    return ascending[ascending.searchsorted(values).clip(max=len(ascending) - 1)] == values


# Candidates


def _candidates(texts: _Texts, settings: NearCopies, scratch: Path | None) -> np.ndarray:
    """int64 [pairs], ``left * texts + right`` of each pair of texts that agree in a band, left < right."""
    compared = np.flatnonzero(texts.kept >= FEWEST)
    shape = (settings.bands, len(compared))
    keys = np.empty(shape, np.uint64)
    if scratch is not None and len(compared):
        keys = np.lib.format.open_memmap(scratch / "minima.npy", "w+", np.uint64, shape)
    for start in range(0, len(compared), SKETCHED):
        own = compared[start : start + SKETCHED]
        keys[:, start : start + SKETCHED] = _band_keys([texts[text] for text in own.tolist()], settings).T
    pairs = np.zeros(0, np.int64)
    for band in keys:
        order = np.argsort(band, kind="stable")
        places = [compared[order[low:high]] for low, high in _equal_runs(band[order])]
        codes = [_codes(np.sort(x), len(texts)) for x in places]
        pairs = np.union1d(pairs, np.concatenate([*codes, np.zeros(0, np.int64)]))
    return pairs


def _band_keys(sets: Sequence[np.ndarray], settings: NearCopies) -> np.ndarray:
    """uint64 [texts, bands]: equal where all minima of a band are."""
    rensa = import_optional("rensa", "to find near copies")
    offsets = np.cumsum([0, *map(len, sets)], dtype=np.uint64)
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        np.concatenate(sets).astype(np.uint64), offsets, settings.bands * settings.rows, SEED
    )
    minima = np.array(matrix.to_rows(), np.uint64).reshape(len(sets), settings.bands, settings.rows)
    keys = np.zeros((len(sets), settings.bands), np.uint64)
    for row in range(settings.rows):
        keys = (keys ^ minima[:, :, row]) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(29)
    return keys


def _equal_runs(ascending: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where runs of two and more equal values begin and end."""
    edges = np.flatnonzero(np.r_[True, ascending[1:] != ascending[:-1], True])
    longer = np.flatnonzero(np.diff(edges) > 1)
    return zip(edges[longer].tolist(), edges[longer + 1].tolist(), strict=True)


def _codes(members: np.ndarray, texts: int) -> np.ndarray:
    left, right = np.triu_indices(len(members), 1)
    return members[left] * texts + members[right]


def _verified(texts: _Texts, pairs: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(left, right, similarity) of the pairs whose Jaccard similarity is at least `threshold`."""
    left, right = np.divmod(pairs, max(1, len(texts)))
    alike = np.zeros(len(pairs))
    known, own = -1, np.zeros(0, np.int64)
    for place, (a, b) in enumerate(zip(left.tolist(), right.tolist(), strict=True)):
        smaller, larger = sorted((texts.kept[a], texts.kept[b]))
        if smaller < threshold * larger:
            continue
        if a != known:
            known, own = a, texts[a]
        other = texts[b]
        shared = int(_stands_in(other, own).sum())
        alike[place] = shared / (len(own) + len(other) - shared)
    good = alike >= threshold
    return left[good], right[good], alike[good]


# Clusters


def _centers(
    texts: int, left: np.ndarray, right: np.ndarray, alike: np.ndarray, largest: int
) -> tuple[np.ndarray, int]:
    """(the center of each text, int64 [texts]; how many clusters were cut at the largest size).

    The text with most neighbors is the first center; those of its neighbors that have none yet are its cluster, the most
    similar first. Texts are in the order of their forms, which decides between equals.
    """
    ends, others, similar = np.r_[left, right], np.r_[right, left], np.r_[alike, alike]
    order = np.lexsort((others, -similar, ends))
    ends, others = ends[order], others[order]
    starts = ends.searchsorted(np.arange(texts + 1))
    degrees = np.diff(starts)
    center, cut = np.full(texts, -1, np.int64), 0
    for text in np.lexsort((np.arange(texts), -degrees)).tolist():
        if degrees[text] == 0:
            break
        if center[text] >= 0:
            continue
        free = others[starts[text] : starts[text + 1]]
        free = free[center[free] < 0]
        cut += len(free) >= largest
        center[free[: largest - 1]] = text
        center[text] = text
    return np.where(center < 0, np.arange(texts), center), cut


def _report(
    found: np.ndarray, settings: NearCopies, texts: _Texts, boilerplate: np.ndarray, pairs: int, verified: int, cut: int
) -> dict[str, Any]:
    names, sizes = np.unique(found, return_counts=True)
    top = np.lexsort((names, -sizes))[:TOP]
    frame = (texts.kept < texts.whole / 2).sum()
    return {
        "documents": len(found),
        "texts": len(texts),
        "clusters": int((sizes > 1).sum()),
        "clustered": int(sizes[sizes > 1].sum()),
        "largest": int(sizes.max(initial=0)),
        "largest_clusters": {f"{names[x]:016x}": int(sizes[x]) for x in top.tolist() if sizes[x] > 1},
        "cut": int(cut),
        "boilerplate_shingles": len(boilerplate),
        "mostly_boilerplate": int(frame),
        "too_short": int((texts.kept < FEWEST).sum()),
        "candidate_pairs": pairs,
        "verified_pairs": verified,
        "found_at_threshold": round(settings.found(settings.threshold), 4),
    }
