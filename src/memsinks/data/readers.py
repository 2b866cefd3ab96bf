"""Readers of documents: .jsonl (.gz, .zst), .parquet, .txt, folders, Hugging Face datasets.

All readers stream: at most one document, one chunk of a file or one batch of a row group is in memory."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from memsinks.data.documents import Document
from memsinks.data.fields import CARRIED, check_fields, columns_of, document_of
from memsinks.data.folders import names_below
from memsinks.errors import DataError
from memsinks.files import file_hash

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt")
CHUNK_BYTES = 1 << 20
PARQUET_BATCH = 256


def read_documents(
    path: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
    *,
    text_field: str = "text",
    key_field: str | None = None,
    source_field: str | None = None,
    copies_field: str | None = None,
    isolation_field: str | None = None,
    cluster_field: str | None = None,
    carry: Sequence[str] = (),
    separator: str | None = None,
    split: str = "train",
    streaming: bool = False,
) -> Iterator[Document]:
    """Stream the documents of a file, a folder or a Hugging Face dataset, in a fixed order.

    A row without a field of the text is a chat if it has ``messages`` ({role, content} each), or a prompt with its answer if it
    has ``prompt`` and ``completion`` (two strings, or two lists of messages), see `Document`. Tools are not read.

    Args:
        path: a .jsonl, .jsonl.gz, .jsonl.zst, .parquet or .txt file (UTF-8); a folder of those, read whole (recursive,
            sorted by path, hidden ones left out, links followed); a folder written by ``save_to_disk``; otherwise anything that
            ``datasets.load_dataset`` takes: the name of a dataset, a folder in a format of its own; or a dataset itself, or
            rows of other kinds (a dict each).
        text_field: the field of the text, or of the messages of a chat.
        key_field, source_field, copies_field, isolation_field, cluster_field: names of the fields (columns). Integer keys become
            strings. Clusters are those that another tool made (a negative number is none).
            .txt files have no fields: the key is the file name (within a folder: the path below it).
        carry: columns that stay with the document, in `Document.extra`.
        separator: cuts .txt files into documents with the keys "name#0", "name#1", ...; line ends around a piece are
            dropped. Without it a .txt file is one document and is read whole.
        split, streaming: passed on to ``datasets``; files and folders of files have no splits.

    Returns:
        An iterator. Blank documents are skipped; their number is one warning at the end.

    Raises:
        DataError: at once, when there is nothing readable at `path`; while iterating, for the first unreadable
            document (naming file and line) and for a corpus without documents.
    """
    if separator == "":
        raise DataError('separator is empty; give the text between two documents, e.g. "<|endoftext|>", or None')
    fields = {"text": text_field, "key": key_field, "source": source_field, "copies": copies_field}
    fields |= {"isolation": isolation_field, "cluster": cluster_field}
    fields |= {f"{CARRIED}{name}": name for name in carry}
    fields = {slot: name for slot, name in fields.items() if name is not None}
    if not isinstance(path, str | os.PathLike):
        name = type(path).__name__
        return _counted(_read_dataset(_split_of(path, name, split), name, fields), name)
    if not os.fspath(path):
        raise DataError("path is empty; give a file, a folder or the name of a Hugging Face dataset")
    place = Path(path).expanduser()
    if place.is_file():
        _check_suffix(place)
        return _counted(_read_file(place, place.name, fields, separator), str(path))
    if place.is_dir() and not _is_saved_dataset(place):
        files = _files_below(place)
        if files:
            return _counted(_read_folder(place, files, fields, separator), str(path))
    elif not place.exists() and _looks_like_a_file(path):
        raise DataError(f"{path} does not exist; give a file, a folder or the name of a Hugging Face dataset")
    dataset = _load_dataset(place if place.is_dir() else str(path), split, streaming)
    return _counted(_read_dataset(dataset, str(path), fields), str(path))


def source_hash(path: str | os.PathLike[str]) -> str | None:
    """SHA-256, hexadecimal, of a file, or of the names and contents of all files below a folder but hidden ones.

    None where nothing lies at `path`, e.g. for the name of a data set.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return file_hash(place)
    if not place.is_dir():
        return None
    found = hashlib.sha256()
    for name in names_below(place):
        found.update(f"{name.as_posix()}\0{file_hash(place / name)}\0".encode())
    return found.hexdigest()


def _counted(documents: Iterator[Document], what: str) -> Iterator[Document]:
    """Drop blank documents, warn once about them, and refuse a corpus without any other."""
    kept = blank = 0
    for document in documents:
        if document.text.isspace() or not document.text:
            blank += 1
        else:
            kept += 1
            yield document
    if not kept:
        raise DataError(f"{what} holds no documents" + (f" but {blank} blank ones" if blank else ""))
    if blank:
        warnings.warn(f"{what}: skipped {blank} blank document{'s' if blank > 1 else ''}, read {kept}", stacklevel=2)


# Files and folders


def _suffix(file: Path) -> str | None:
    return next((suffix for suffix in SUFFIXES if file.name.lower().endswith(suffix)), None)


def _check_suffix(file: Path) -> None:
    if _suffix(file) is None:
        raise DataError(f"{file} has an unknown suffix {file.suffix!r}; readable are {', '.join(SUFFIXES)}")


def _looks_like_a_file(path: str | os.PathLike[str]) -> bool:
    text = os.fspath(path)
    return (
        not isinstance(path, str)
        or _suffix(Path(text)) is not None
        or text.startswith((".", "/", "~"))
        or text.count("/") > 1
    )


def _files_below(folder: Path) -> list[Path]:
    """The readable files below a folder, sorted by their path in it. Warns about files of other formats beside them."""
    names = names_below(folder)
    files = [folder / name for name in names if _suffix(name)]
    others = [name.as_posix() for name in names if not _suffix(name)]
    if files and others:
        warnings.warn(
            f"{folder}: left out {len(others)} file{'s' if len(others) > 1 else ''} of unknown format "
            f"({', '.join(others[:3])}{', ...' if len(others) > 3 else ''})",
            stacklevel=3,
        )
    return files


def _read_folder(folder: Path, files: list[Path], fields: dict[str, str], separator: str | None) -> Iterator[Document]:
    for file in files:
        yield from _read_file(file, file.relative_to(folder).as_posix(), fields, separator)


def _read_file(file: Path, name: str, fields: dict[str, str], separator: str | None) -> Iterator[Document]:
    suffix = _suffix(file)
    if suffix == ".txt":
        yield from _read_txt(file, name, separator)
    elif suffix == ".parquet":
        yield from _read_parquet(file, fields)
    else:
        for number, line in enumerate(_pieces(file, b"\n"), start=1):
            where = f"{file}, line {number}"
            if line.strip():
                yield document_of(_parse(_decode(line, where, first=number == 1), where), where, fields)


def _parse(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: invalid JSON ({error}); each line must be one JSON object") from None
    if not isinstance(row, dict):
        raise DataError(f"{where}: each line must be a JSON object with fields, got {type(row).__name__} {line:.60}")
    return row


def _read_txt(file: Path, name: str, separator: str | None) -> Iterator[Document]:
    if separator is None:
        yield Document(_decode(b"".join(_chunks(file)), str(file), first=True), key=name)
        return
    # UTF-8 is self-synchronizing: cutting the bytes cannot cut a character.
    for number, piece in enumerate(_pieces(file, separator.encode())):
        text = _decode(piece, f"{file}, document {number}", first=number == 0)
        yield Document(text.strip("\r\n"), key=f"{name}#{number}")


def _decode(data: bytes, where: str, first: bool) -> str:
    """Strict UTF-8; a byte order mark at the start of a file is not part of its text."""
    try:
        return data.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: invalid UTF-8 ({error}); convert the file to UTF-8") from None


def _pieces(file: Path, separator: bytes) -> Iterator[bytes]:
    """The file cut at each separator; what follows the last one is left out if it is blank."""
    rest = b""
    for chunk in _chunks(file):
        *pieces, rest = (rest + chunk).split(separator)
        yield from pieces
    if rest.strip():
        yield rest


def _chunks(file: Path) -> Iterator[bytes]:
    """The decompressed bytes of a file."""
    try:
        suffix = _suffix(file)
        if suffix in (".jsonl.gz", ".jsonl.zst") and not file.stat().st_size:
            raise EOFError("the file has 0 bytes")
        if suffix == ".jsonl.zst":
            yield from _zst_chunks(file)
            return
        with gzip.open(file, "rb") if suffix == ".jsonl.gz" else open(file, "rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file} is damaged or cut short ({error}); fetch or write it again") from None
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error}") from None


def _zst_chunks(file: Path) -> Iterator[bytes]:
    zstandard = import_optional("zstandard", f"to read {file}")
    context = zstandard.ZstdDecompressor(max_window_size=2**31)  # files written with --long
    frame = None
    try:
        with open(file, "rb") as stream:
            while data := stream.read(CHUNK_BYTES // 8):
                while data:
                    frame = frame or context.decompressobj()
                    yield frame.decompress(data)
                    data = frame.unused_data if frame.eof else b""
                    frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise EOFError(error) from None
    if frame is not None:  # zstandard itself says nothing about a cut frame
        raise EOFError("the last frame is not complete")


def _read_parquet(file: Path, fields: dict[str, str]) -> Iterator[Document]:
    pyarrow = import_optional("pyarrow", f"to read {file}")
    parquet = import_optional("pyarrow.parquet", f"to read {file}")
    number = 0
    try:
        with parquet.ParquetFile(file) as table:
            check_fields(table.schema_arrow.names, str(file), fields)
            for batch in table.iter_batches(PARQUET_BATCH, columns=columns_of(table.schema_arrow.names, fields)):
                for row in _as_python(batch, f"{file}, after row {number}"):
                    number += 1
                    yield document_of(row, f"{file}, row {number}", fields)
    except UnicodeDecodeError as error:
        raise DataError(f"{file}, after row {number}: invalid UTF-8 ({error}); write the file again") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file} is damaged or not a parquet file ({error}); fetch or write it again") from None


def _as_python(batch: Any, where: str) -> list[dict[str, Any]]:
    """The rows of a batch; `where` begins an error message."""
    try:
        return batch.to_pylist()
    except (OverflowError, LookupError) as error:  # a date beyond the year 9999, an unknown time zone
        raise DataError(
            f"{where}: a value that Python cannot hold ({error}); leave its column out, or write it as text"
        ) from None


def import_optional(module: str, why: str) -> Any:
    """A module of a package that is not always there; DataError, with what it is needed for, if it is not."""
    try:
        return import_module(module)
    except ImportError as error:
        name = module.split(".")[0]
        raise DataError(f"{name} is needed {why} and cannot be imported ({error}); install it") from None


# Hugging Face datasets


def _is_saved_dataset(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _load_dataset(path: Path | str, split: str, streaming: bool) -> Any:
    """A Dataset or IterableDataset of one split."""
    datasets = import_optional("datasets", f"to read {path} (no file or folder of {', '.join(SUFFIXES)})")
    try:
        if isinstance(path, Path) and _is_saved_dataset(path):
            dataset = datasets.load_from_disk(str(path))
        else:
            dataset = datasets.load_dataset(str(path), split=split, streaming=streaming)
    except Exception as error:  # datasets raises some twenty unrelated types here
        raise DataError(
            f"{path} is not a readable file or folder, and cannot be loaded as a Hugging Face dataset with "
            f"split={split!r}: {type(error).__name__}: {error}"
        ) from error
    return _split_of(dataset, str(path), split)


def _split_of(dataset: Any, name: str, split: str) -> Any:
    if isinstance(dataset, dict):
        if split not in dataset:
            raise DataError(f"{name} has no split {split!r}; the splits there: {', '.join(map(repr, dataset))}")
        return dataset[split]
    return dataset


def _read_dataset(dataset: Any, name: str, fields: dict[str, str]) -> Iterator[Document]:
    if getattr(dataset, "column_names", None) is not None:
        check_fields(dataset.column_names, name, fields)
        dataset = dataset.select_columns(
            columns_of(dataset.column_names, fields)
        )  # other columns may be costly to decode
    for number, row in enumerate(dataset, start=1):
        if not isinstance(row, Mapping):
            raise DataError(f"{name}, row {number}: must be a dict of fields, got {type(row).__name__} {row!r:.60}")
        yield document_of(row, f"{name}, row {number}", fields)
