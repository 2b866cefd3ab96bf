"""Documents -> rows of one length.

A row holds whole documents side by side. Three things keep them apart: `position_ids` restart at 0 with each document
(transformers then builds a block-diagonal attention mask, but only if no attention_mask is given and there is no
cache), the label of each first token is -100 (transformers shifts labels by one inside the model, so that token would
be predicted from the document before), and each token carries its document's id and exposure."""

from __future__ import annotations

import functools
import hashlib
import operator
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

from memsinks.batch import FIELDS, IGNORED, ISOLATION, NO_SINKS, PLACES, as_int64
from memsinks.checks import int_at_least, one_of
from memsinks.data.isolation import row_kinds
from memsinks.data.targets import (
    Targets,
    check_targets,
    check_tokens,
    refuse_long,
    refuse_untaught,
    segment_targets,
    truncated,
)
from memsinks.data.token_store import StoredTokens
from memsinks.errors import DataError, refuse

Long = Literal["split", "fill", "truncate", "refuse"]


SEGMENT = np.dtype(
    [
        ("document", np.int64),
        ("start", np.int64),
        ("size", np.int32),
        ("column", np.int32),
        ("document_id", np.int64),
        ("exposure", np.int32),
        ("isolation", np.int32),
    ]
)
"""A piece of a document in a row: tokens [start, start + size) of the document stand from `column` on."""


@dataclass(frozen=True, eq=False)
class Rows:
    """Packed rows, a map-style dataset for torch and the HF Trainer; a row is filled when it is asked for.

    In memory are the documents as given to `pack` (which may lie on disk, see `prepare`), 40 bytes a segment and 8 a row.
    The first five attributes fill all rows at once, 40 bytes a token: for small corpora.

    Attributes, int64 [rows, length] unless said otherwise:
        input_ids: tokens; `pad_id` on padding, which is always at the end of a row.
        labels: input_ids, but -100 at the first token of every segment, at tokens that are no targets and on padding.
        document_ids: the id of the document; -1 on padding (and where a document opens no sinks).
        exposures: the exposure of the document; 1 on padding.
        position_ids: count from 0 within each segment; padding is a segment of its own.
        used: int64 [rows], the tokens of each row that are not padding.
        documents: integer [tokens] each, in training order.
        segments: `SEGMENT` [segments], in the order of the rows; those of row r are [first[r], first[r + 1]).
        length: tokens per row, padding included.
        places: int64 [rows], where each row stands in its training order, see `batch.PLACES`.
        masks: which tokens of each document are targets, see `targets.Targets`; None = all.
    """

    documents: Sequence[np.ndarray]
    segments: np.ndarray
    first: np.ndarray
    length: int
    pad_id: int
    places: np.ndarray
    masks: Targets | None = None

    def __post_init__(self) -> None:
        if len(self.places) != len(self):
            raise DataError(
                f"{len(self)} rows have {len(self.places)} places; take rows with select or one_segment_each"
            )

    def __len__(self) -> int:
        return len(self.first) - 1

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """Row `index` as a dict of the five fields, int64 [length] each, and its place, int64 []; `batch.ISOLATION` too where any
        document of these rows has one."""
        index = range(len(self))[operator.index(index)]
        row = {name: torch.from_numpy(values[0]) for name, values in self._fill([index]).items()}
        if self.isolated:
            row[ISOLATION] = torch.from_numpy(self._isolation(index))
        return row | {PLACES: torch.tensor(int(self.places[index]))}

    def select(self, rows: slice) -> Rows:
        """The rows of a slice, sharing the documents with these; each keeps its place in the training order."""
        chosen = range(len(self))[rows]
        spans = [np.arange(self.first[row], self.first[row + 1]) for row in chosen]
        segments = self.segments[np.concatenate([*spans, np.arange(0)])]
        first = np.cumsum([0, *map(len, spans)], dtype=np.int64)
        return Rows(self.documents, segments, first, self.length, self.pad_id, self.places[list(chosen)], self.masks)

    def one_segment_each(self, segments: np.ndarray) -> Rows:
        """Rows of one segment each, of some of these rows (`SEGMENT` [n]), in the order given: an order of their own."""
        segments = segments.copy()
        segments["column"] = 0
        return _rows(self.documents, segments, np.arange(len(segments) + 1), self.length, self.pad_id, self.masks)

    def texts(self) -> np.ndarray:
        """int64 [segments], a number for the text that each segment is of: the same for all meetings of a text.

        Texts are told apart by their document id, as exposures are, so near copies of one key are one text. Where the
        exposures of an id do not count up by one, it belongs to several texts (a source), which their tokens tell apart.
        """
        ids, number = np.unique(self.segments["document_id"], return_inverse=True)
        _, once = np.unique(self.segments["document"], return_index=True)
        own, exposure = number[once], self.segments["exposure"][once]
        order = np.lexsort((exposure, own))
        apart = (np.diff(own[order]) == 0) & (np.diff(exposure[order]) != 1)
        several = np.zeros(len(ids), bool)
        several[own[order][1:][apart]] = True
        several &= ids != NO_SINKS
        known: dict[tuple[int, bytes], int] = {}
        for index in np.flatnonzero(several[number]).tolist():
            tokens = np.asarray(self.documents[self.segments["document"][index]], np.int64)
            text = hashlib.blake2b(tokens.tobytes(), digest_size=16).digest()
            number[index] = len(ids) + known.setdefault((int(number[index]), text), len(known))
        return np.unique(number, return_inverse=True)[1]

    @property
    def input_ids(self) -> np.ndarray:
        return self._all["input_ids"]

    @property
    def labels(self) -> np.ndarray:
        return self._all["labels"]

    @property
    def document_ids(self) -> np.ndarray:
        return self._all["document_ids"]

    @property
    def exposures(self) -> np.ndarray:
        return self._all["exposures"]

    @property
    def position_ids(self) -> np.ndarray:
        return self._all["position_ids"]

    @property
    def used(self) -> np.ndarray:
        return np.diff(np.cumsum(np.r_[0, self.segments["size"]], dtype=np.int64)[self.first])

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return int(self.segments["size"].sum(dtype=np.int64))

    @property
    def targets(self) -> int:
        """Tokens that are predicted: labels other than -100."""
        return int(self.segment_targets.sum())

    @functools.cached_property
    def segment_targets(self) -> np.ndarray:
        """int64 [segments], the targets of each."""
        return segment_targets(self.segments, self.masks)

    @property
    def fill(self) -> float:
        """Share of the tokens that is not padding, in [0, 1]."""
        return self.tokens / max(1, len(self) * self.length)

    @functools.cached_property
    def isolated(self) -> bool:
        """Whether any document has an isolation of its own."""
        return bool(self.segments["isolation"].any())

    def _isolation(self, row: int) -> np.ndarray:
        """int64 [length], 0 on padding."""
        values = np.zeros(self.length, np.int64)
        for segment in self.segments[self.first[row] : self.first[row + 1]]:
            values[segment["column"] : segment["column"] + segment["size"]] = segment["isolation"]
        return values

    @functools.cached_property
    def _all(self) -> dict[str, np.ndarray]:
        return self._fill(range(len(self)))

    def _fill(self, rows: Sequence[int]) -> dict[str, np.ndarray]:
        shape = (len(rows), self.length)
        count = np.arange(self.length, dtype=np.int64)
        input_ids = np.full(shape, self.pad_id, np.int64)
        labels = np.full(shape, IGNORED, np.int64)
        document_ids = np.full(shape, NO_SINKS, np.int64)
        exposures = np.ones(shape, np.int64)
        position_ids = np.empty(shape, np.int64)
        for place, row in enumerate(rows):
            end = 0
            for index, start, size, column, one, exposure, _ in self.segments[
                self.first[row] : self.first[row + 1]
            ].tolist():
                part = self.documents[index][start : start + size]
                end = column + size
                input_ids[place, column:end] = part
                mask = None if self.masks is None else self.masks[index]
                wanted = part if mask is None else np.where(mask[start : start + size], part, IGNORED)
                labels[place, column + 1 : end] = wanted[1:]
                document_ids[place, column:end] = one
                exposures[place, column:end] = exposure
                position_ids[place, column:end] = count[:size]
            position_ids[place, end:] = count[: self.length - end]
        return dict(zip(FIELDS, (input_ids, labels, document_ids, exposures, position_ids), strict=True))


def pack(
    tokens: Iterable[np.ndarray] | Iterable[Sequence[int]],
    document_ids: Iterable[int] | np.ndarray,
    exposures: Iterable[int] | np.ndarray,
    *,
    length: int,
    pad_id: int,
    isolation: Iterable[int] | np.ndarray | None = None,
    targets: Iterable[np.ndarray | None] | None = None,
    apart_from: int | None = None,
    one_document_per_row: bool = False,
    long: Long = "split",
) -> Rows:
    """Pack documents in training order into rows: next-fit, a document that fits into a row is never cut.

    Args:
        tokens: integer [tokens of the document] each, in training order: a document with 64 copies stands here 64
            times (it may be the same array).
        document_ids: int64 [documents], at least -1; -1 opens no sinks.
        exposures: int64 [documents], from 1 to 2**31 - 1.
        length: tokens per row.
        pad_id: the token that fills a row up.
        isolation: int64 [documents], 0 or one of `batch.ISOLATIONS`; None = 0. Documents that train their sinks alone whatever
            the model's settings (exact ones from `apart_from` on, private ones) get rows of their own.
        targets: bool [tokens of the document] each, whether a token is learned (of labels that you have: ``labels != -100``);
            None, also of one document, = all. The first token of a segment is never a target.
        apart_from: documents of this exposure and more get rows of their own, apart from those with fewer exposures
            and from those of id -1 (`SinkConfig.open_from` in exact mode: such rows train nothing but sinks). Several rows
            are open then and rows come out in the order in which they were opened, so a document can stand one open
            row earlier than its turn. None: one kind of row, but for private documents.
        one_document_per_row: for architectures in which packed documents see each other.
        long: what happens to a document longer than `length`: ``"split"`` cuts it into segments of `length` tokens
            which carry its id and exposure and do not see each other, ``"fill"`` does so too and also cuts documents
            longer than a quarter of `length` where a row ends, so that rows of long documents are full, ``"truncate"``
            keeps the first `length` tokens and says in the log how many that leaves out, ``"refuse"`` raises.

    Raises:
        DataError: no documents, an empty one, tokens, ids or exposures of another dtype, shape or range, ids that went
            through floats, a long document under ``long="refuse"``, or one whose targets are all masked or cut off; names
            the index.
        ConfigError: `length` below 2, another setting out of range.
    """
    refuse(packing_problems(length, pad_id, apart_from, long), "cannot pack")
    documents = tokens if isinstance(tokens, StoredTokens) else check_tokens(tokens)
    sizes = documents.sizes if isinstance(documents, StoredTokens) else np.array([len(x) for x in documents], np.int64)
    ids = _one_each("document_ids", as_int64(document_ids, "document_ids", NO_SINKS), len(sizes))
    counts = _one_each("exposures", as_int64(exposures, "exposures", 1, narrow=True), len(sizes))
    flags = np.zeros(len(sizes), np.int64) if isolation is None else as_int64(isolation, "isolation", 0, narrow=True)
    kinds = row_kinds(ids, counts, _one_each("isolation", flags, len(sizes)), apart_from)
    masks = None if targets is None else check_targets(targets, sizes)
    if masks is not None:
        refuse_untaught(masks, None)
    if long == "refuse":
        refuse_long(sizes, length)
    elif long == "truncate":
        sizes = truncated(sizes, length, masks)
    found, used = _lay_out(sizes, kinds, length, one_document_per_row, long == "fill")
    segments = np.empty(len(found["row"]), SEGMENT)
    order = np.argsort(found["row"], kind="stable")
    for name in ("document", "start", "size", "column"):
        segments[name] = np.frombuffer(found[name], np.int64)[order]
    for name, values in (("document_id", ids), ("exposure", counts), ("isolation", flags)):
        segments[name] = values[segments["document"]]
    first = np.searchsorted(np.frombuffer(found["row"], np.int64)[order], np.arange(used + 1))
    return _rows(documents, segments, first, int(length), int(pad_id), masks)


def _rows(
    documents: Sequence[np.ndarray],
    segments: np.ndarray,
    first: np.ndarray,
    length: int,
    pad_id: int,
    masks: Targets | None,
) -> Rows:
    """Rows that are a training order of their own: its hash is that of all that is in `segments`."""
    if len(first) > 2**32:
        raise DataError(
            f"{len(first) - 1} rows are more than the 2^32 that one training order may have; make rows longer"
        )
    order = hashlib.blake2b(digest_size=4, person=b"memsinks1order")
    for values in (segments, first, np.array([length])):
        order.update(np.ascontiguousarray(values).view(np.uint8).data)
    number = int.from_bytes(order.digest(), "little") & (2**31 - 1)
    return Rows(documents, segments, first, length, pad_id, (number << 32) + np.arange(len(first) - 1), masks)


def _lay_out(
    sizes: np.ndarray, kinds: np.ndarray, length: int, one_document_per_row: bool, fill: bool
) -> tuple[dict[str, array[int]], int]:
    """Where each segment stands, int64 [segments] each by name, and the number of rows."""
    found = {name: array("q") for name in ("document", "start", "size", "row", "column")}
    append = [column.append for column in found.values()]
    rows, open_rows, filled = 0, [-1] * 3, [length] * 3
    for index, (whole, kind) in enumerate(zip(sizes.tolist(), kinds.tolist(), strict=True)):
        start = 0
        while start < whole:
            room = 0 if one_document_per_row else length - filled[kind]
            size = min(length, whole - start)
            if size > room:
                if fill and room > 1 and whole > length // 4:
                    size = room
                else:
                    open_rows[kind], filled[kind], rows = rows, 0, rows + 1
            for add, value in zip(append, (index, start, size, open_rows[kind], filled[kind]), strict=True):
                add(value)
            filled[kind] += size
            start += size
    return found, rows


def packing_problems(length: int, pad_id: int, apart_from: int | None, long: str) -> list[str]:
    """What is wrong with settings of `pack`."""
    problems = int_at_least("length", length, 2) + int_at_least("pad_id", pad_id, 0)
    if apart_from is not None:
        problems += int_at_least("apart_from", apart_from, 1)
    return problems + one_of("long", long, get_args(Long))


def _one_each(name: str, numbers: np.ndarray, documents: int) -> np.ndarray:
    if len(numbers) != documents:
        raise DataError(f"{name} must have one number for each of the {documents} documents, got {len(numbers)}")
    return numbers
