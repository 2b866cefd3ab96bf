"""Which documents of a corpus are near copies of each other: clusters, found without comparing all pairs.

1. Each text becomes its set of shingles, runs of `size` words of its normal form (see `matching`).
2. *Boilerplate* is left out: shingles that stand in more than `boilerplate` different texts. A license before 2,000 books, or the
   frame of 1,000 dialogues, makes nothing alike. It also bounds all that follows: a shingle joins few texts, so work grows with
   the corpus and not with its square.
3. Candidates come from MinHash (Broder 1997; here rensa's R-MinHash) and locality-sensitive hashing: `bands` of `rows` minima
   each, and two texts that agree in a band are a candidate pair. A pair of Jaccard similarity s becomes one with probability
   1 - (1 - s^rows)^bands.
4. Every candidate pair is *verified*: the Jaccard similarity of the two sets is computed, not estimated.
5. A cluster is a center and texts similar to the *center*, so a chain A~B~C~D does not become one. Centers are taken by the
   number of their neighbors, then by the hash of their text: the order of the documents does not matter, nor how they are cut
   into files.

Texts of one normal form are one text in all of this, and stay together.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np

from memsinks.data.clusters import NearCopies, Shingled, cluster
from memsinks.data.documents import Document, as_documents
from memsinks.data.identity import document_id
from memsinks.data.matching import hashed_shingles, normal_form

logger = logging.getLogger(__name__)


def cluster_documents(documents: Iterable[Document | str], settings: NearCopies | None = None) -> list[Document]:
    """The documents, with near copies in the same `Document.cluster`; identify them by ``"cluster"``.

    What was found is in the log. In memory: about 20 bytes a word. For a corpus that is larger, `prepare_corpus`.

    Args:
        documents: documents or texts; a cluster that they have already is replaced.
        settings: None = `NearCopies()`.

    Raises:
        DataError: documents that are none; rensa is not installed.
    """
    documents = as_documents(documents)
    settings = settings or NearCopies()
    names, report = cluster([shingled((x.text for x in documents), settings.size)], settings)
    logger.info("near copies: %s", said(report))
    return [replace(x, cluster=name) for x, name in zip(documents, cluster_names(names), strict=True)]


def shingled(texts: Iterable[str], size: int) -> Shingled:
    """The shingles of texts."""
    forms, counts, found = [], [0], []
    for text in texts:
        form = normal_form(text)
        forms.append(document_id(form))
        own = np.sort(np.fromiter(hashed_shingles(form, size), np.int64)) if form else np.zeros(0, np.int64)
        found.append(own)
        counts.append(len(own))
    together = np.concatenate(found) if found else np.zeros(0, np.int64)
    return Shingled(np.array(forms, np.int64), np.cumsum(counts, dtype=np.int64), together)


def cluster_names(forms: np.ndarray) -> list[str]:
    """The name of each cluster: the hash of its center's normal form, hexadecimal."""
    return [f"{form:016x}" for form in forms.tolist()]


def said(report: dict[str, Any]) -> str:
    """A report in a line."""
    texts = f"{report['clustered']:,} of {report['documents']:,} documents in {report['clusters']:,} clusters"
    more = f", the largest of {report['largest']:,}" if report["clusters"] else ""
    cut = f"; {report['cut']:,} clusters were cut at the largest size" if report["cut"] else ""
    frame = f"; {report['mostly_boilerplate']:,} texts are mostly boilerplate" if report["mostly_boilerplate"] else ""
    return texts + more + cut + frame
