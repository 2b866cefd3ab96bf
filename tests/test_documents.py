"""Documents are read from every format, lazily, and bad input is refused with its place named."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memsinks.data.documents import Document, cut_documents, load_documents, require_unique_keys, write_documents
from memsinks.data.readers import read_documents, source_hash
from memsinks.errors import DataError

ROWS = [
    {"text": "Grüße aus dem Tal.", "id": 7, "site": "a.example", "n": 4},
    {"text": "line\u2028separators and\nnewlines stay", "id": 8, "site": None, "n": 0},
    {"text": "the last one", "id": 9, "site": "b.example", "n": 1},
]
FIELDS = {"key_field": "id", "source_field": "site", "copies_field": "n"}
EXPECTED = [Document(row["text"], str(row["id"]), row["site"], row["n"]) for row in ROWS]


def jsonl(rows: list) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write(file: Path, data: bytes) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".gz":
        data = gzip.compress(data)
    elif file.suffix == ".zst":
        data = pytest.importorskip("zstandard").compress(data)
    file.write_bytes(data)
    return file


def write_parquet(file: Path, columns: dict, **options) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pyarrow.table(columns), file, **options)
    return file


def texts(*args, **kwargs) -> list[str]:
    return [document.text for document in read_documents(*args, **kwargs)]


def refused(match: str, *args, **kwargs) -> None:
    with pytest.raises(DataError, match=match):
        list(read_documents(*args, **kwargs))


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".JSONL"])
def test_jsonl_with_all_fields(tmp_path, suffix):
    file = write(tmp_path / f"corpus{suffix}", jsonl(ROWS))
    assert list(read_documents(file, **FIELDS)) == EXPECTED
    assert list(read_documents(str(file))) == [Document(row["text"]) for row in ROWS]


def test_jsonl_without_last_newline_with_empty_lines_crlf_and_byte_order_mark(tmp_path):
    file = write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n\r\n\n{"text": "two"}')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert texts(file) == ["one", "two"]


def test_lines_longer_than_a_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("memsinks.data.readers.CHUNK_BYTES", 16)
    long = [{"text": "äöü" * count} for count in (1, 50, 7)]
    for suffix in (".jsonl", ".jsonl.gz", ".jsonl.zst"):
        assert texts(write(tmp_path / f"a{suffix}", jsonl(long))) == [row["text"] for row in long]


def test_several_compressed_frames_in_one_file(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    for suffix, compress in ((".gz", gzip.compress), (".zst", zstandard.compress)):
        file = tmp_path / f"a.jsonl{suffix}"
        file.write_bytes(compress(jsonl(ROWS[:1])) + compress(jsonl(ROWS[1:])))
        assert texts(file) == [row["text"] for row in ROWS]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_reading_is_lazy(tmp_path, suffix, monkeypatch):
    """The first documents come although the end of the file is unreadable."""
    monkeypatch.setattr("memsinks.data.readers.CHUNK_BYTES", 1024)
    rows = [{"text": os.urandom(64).hex()} for _ in range(1000)]
    documents = read_documents(write(tmp_path / f"a{suffix}", jsonl(rows) + b"{broken"))
    assert [next(documents).text for _ in range(3)] == [row["text"] for row in rows[:3]]
    with pytest.raises(DataError, match="line 1001: invalid JSON"):
        list(documents)


def test_parquet_row_groups(tmp_path):
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0]} | {"unused": [1.0, 2.0, 3.0]}
    file = write_parquet(tmp_path / "a.parquet", columns, row_group_size=2)
    assert list(read_documents(file, **FIELDS)) == EXPECTED


def test_txt_is_one_document_a_file(tmp_path):
    file = write(tmp_path / "tale.txt", "Once.\r\n\nTwice, ça va.\n".encode())
    assert list(read_documents(file)) == [Document("Once.\r\n\nTwice, ça va.\n", key="tale.txt")]


@pytest.mark.parametrize("chunk", [1, 5, 1 << 20])
def test_txt_split_by_a_separator(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr("memsinks.data.readers.CHUNK_BYTES", chunk)
    file = write(tmp_path / "tales.txt", "eins é\n§§§\nzwei\n\nzwei b\n§§§\neins é\n§§§\n".encode())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        documents = list(read_documents(file, separator="§§§"))
    assert [document.text for document in documents] == ["eins é", "zwei\n\nzwei b", "eins é"]
    assert [document.key for document in documents] == ["tales.txt#0", "tales.txt#1", "tales.txt#2"]


def test_folder_is_sorted_recursive_and_skips_hidden_files(tmp_path):
    write(tmp_path / "b.jsonl.gz", jsonl([{"text": "third"}]))
    write(tmp_path / "a" / "x.txt", b"second")
    write(tmp_path / "a" / "c" / "x.txt", b"first")
    write_parquet(tmp_path / "z.parquet", {"text": ["fourth"]})
    for hidden in (".hidden.txt", ".cache/y.txt"):
        write(tmp_path / hidden, b"never")
    documents = list(read_documents(tmp_path))
    assert [document.text for document in documents] == ["first", "second", "third", "fourth"]
    assert [document.key for document in documents] == ["a/c/x.txt", "a/x.txt", None, None]
    write(tmp_path / "notes.doc", b"x")
    with pytest.warns(UserWarning, match=r"left out 1 file .*notes\.doc"):
        assert len(list(read_documents(tmp_path))) == 4


def test_a_link_to_what_is_read_anyway_is_not_read_twice(tmp_path) -> None:
    (tmp_path / "texts/2024-05").mkdir(parents=True)
    (tmp_path / "texts/2024-05/a.txt").write_text("a text")
    (tmp_path / "texts/2023").symlink_to("2024-05")
    (tmp_path / "texts/b.txt").symlink_to("2024-05/a.txt")
    assert [x.text for x in read_documents(tmp_path / "texts")] == ["a text"]


def test_links_in_a_folder_are_followed_and_broken_ones_refused(tmp_path, monkeypatch) -> None:
    folder, there = tmp_path / "folder", tmp_path / "there"
    write(folder / "a.txt", b"one")
    write(there / "b.txt", b"two")
    before = source_hash(folder)
    (folder / "linked").symlink_to(there)
    (folder / ".hidden").symlink_to(tmp_path / "nothing")
    assert texts(folder) == ["one", "two"] and source_hash(folder) != before
    (folder / "gone.jsonl").symlink_to(tmp_path / "nothing.jsonl")
    for read in (source_hash, lambda x: list(read_documents(x))):
        with pytest.raises(DataError, match="gone.jsonl is a link to nothing; restore"):
            read(folder)
    (folder / "gone.jsonl").unlink()
    (there / "round").symlink_to(folder)
    refused("round is a link to a folder that it lies in; remove", folder)
    (there / "round").unlink()
    listed = Path.iterdir

    def closed(path: Path):
        if path.name == "linked":
            raise PermissionError(13, "Permission denied")
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", closed)
    refused("linked cannot be listed: .*Permission denied", folder)


def test_blank_documents_are_counted_in_one_warning(tmp_path):
    file = write(tmp_path / "a.jsonl", jsonl([{"text": " \n\t"}, {"text": "one"}, {"text": ""}]))
    with pytest.warns(UserWarning, match="skipped 2 blank documents, read 1") as caught:
        assert texts(file) == ["one"]
    assert len(caught) == 1


def test_empty_corpora(tmp_path):
    refused("holds no documents", write(tmp_path / "a.jsonl", b""))
    refused("holds no documents", write(tmp_path / "a.jsonl.gz", b""))
    refused("holds no documents but 1 blank", write(tmp_path / "a.txt", b"\n"))
    refused("holds no documents", write_parquet(tmp_path / "a.parquet", {"text": []}))


def test_no_text_field(tmp_path):
    file = write(tmp_path / "a.jsonl", jsonl([{"text": "one"}, {"body": "two", "title": "t"}]))
    refused(r"a\.jsonl, line 2: no field 'text'; the fields there: 'body', 'title'.*text_field", file)
    refused(r"no field 'text'; the fields there: 'body'", write_parquet(tmp_path / "a.parquet", {"body": ["x"]}))
    assert texts(write(tmp_path / "b.jsonl", jsonl([{"body": "two"}])), text_field="body") == ["two"]


@pytest.mark.parametrize("value", [None, 3, ["a"], {"a": "b"}, True])
def test_text_that_is_not_a_string(tmp_path, value):
    file = write(tmp_path / "a.jsonl", jsonl([{"text": "one"}, {"text": value}]))
    refused(r"line 2: field 'text' \(text\) must be a string", file)


def test_text_that_is_bytes_in_parquet(tmp_path):
    file = write_parquet(tmp_path / "a.parquet", {"text": [b"one"]})
    refused(r"row 1: field 'text' \(text\) must be a string, got bytes", file)


@pytest.mark.parametrize(
    ("row", "match"),
    [
        ({}, "line 1: no field 'id'.*key_field"),
        ({"id": None, "site": "x", "n": 1}, r"'id' \(key\) must be a non-empty string or an integer, got NoneType"),
        ({"id": "", "site": "x", "n": 1}, r"\(key\)"),
        ({"id": True, "site": "x", "n": 1}, r"\(key\)"),
        ({"id": 1.5, "site": "x", "n": 1}, r"\(key\)"),
        ({"id": 1}, "no field 'site'.*source_field"),
        ({"id": 1, "site": "x"}, "no field 'n'.*copies_field"),
        ({"id": 1, "site": ["x"], "n": 1}, r"\(source\)"),
        (
            {"id": 1, "site": "x", "n": -1},
            r"'n' \(copies\) must be an integer of at least 0 and at most 2,147,483,647, got int -1",
        ),
        ({"id": 1, "site": "x", "n": 10**30}, r"\(copies\) must be an integer .*, got int 1000000"),
        ({"id": 1, "site": "x", "n": "2"}, r"\(copies\)"),
        ({"id": 1, "site": "x", "n": True}, r"\(copies\)"),
    ],
)
def test_bad_key_source_or_copies(tmp_path, row, match):
    refused(match, write(tmp_path / "a.jsonl", jsonl([{"text": "one"} | row])), **FIELDS)


def test_carried_values_that_cannot_be_written(tmp_path) -> None:
    for value in ('"\\ud800"', '{"a": ["\\ud800"]}'):
        file = write(tmp_path / "a.jsonl", b'{"text": "a", "url": ' + value.encode() + b"}")
        refused("line 1: field 'url' is not valid UTF-8", file, carry=["url"])
    pyarrow = pytest.importorskip("pyarrow")
    late = pyarrow.array([0, 10**12], pyarrow.timestamp("s"))
    file = write_parquet(tmp_path / "a.parquet", {"text": ["a", "b"], "when": late})
    refused("after row 0: a value that Python cannot hold .*out of range", file, carry=["when"])
    assert texts(file) == ["a", "b"]


@pytest.mark.parametrize("line", [b"{broken", b"plain text", b'{"text": "a"} {"text": "b"}', b"[" * 100_000])
def test_invalid_json(tmp_path, line):
    refused(r"line 3: invalid JSON", write(tmp_path / "a.jsonl", jsonl(ROWS[:2]) + line + b"\n"))


def test_json_that_is_no_object(tmp_path):
    refused("line 1: each line must be a JSON object.*got list", write(tmp_path / "a.jsonl", b'["text"]\n'))


def test_invalid_utf8(tmp_path):
    bad = "é".encode("latin-1")
    refused("line 2: invalid UTF-8", write(tmp_path / "a.jsonl", jsonl(ROWS[:1]) + b'{"text": "caf' + bad + b'"}\n'))
    refused(r"line 1: field 'text' is not valid UTF-8", write(tmp_path / "b.jsonl", b'{"text": "lone \\ud800"}\n'))
    refused(r"a\.txt: invalid UTF-8", write(tmp_path / "a.txt", b"caf" + bad))
    refused(r"a\.txt, document 1: invalid UTF-8", write(tmp_path / "a.txt", b"one|caf" + bad), separator="|")
    pyarrow = pytest.importorskip("pyarrow")
    column = pyarrow.array([b"caf" + bad]).view(pyarrow.string())
    refused(r"a\.parquet, after row 0: invalid UTF-8", write_parquet(tmp_path / "a.parquet", {"text": column}))


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".jsonl.zst", ".parquet"])
def test_truncated_or_corrupt_file(tmp_path, suffix):
    rows = [{"text": os.urandom(64).hex()} for _ in range(200)]
    file = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        write_parquet(file, {"text": [row["text"] for row in rows]})
    else:
        write(file, jsonl(rows))
    whole = file.read_bytes()
    middle = len(whole) // 2
    for damaged in (b"", whole[:-1], whole[:middle], b"not compressed at all\n" * 9, whole + b"trailing bytes"):
        file.write_bytes(damaged)
        refused(r"damaged", file)


def test_paths_that_cannot_be_read(tmp_path):
    for missing in (tmp_path / "a.jsonl", "no/such/folder", "missing.parquet", "./missing"):
        with pytest.raises(DataError, match="does not exist"):
            read_documents(missing)
    with pytest.raises(DataError, match=r"unknown suffix '\.csv'; readable are \.jsonl"):
        read_documents(write(tmp_path / "a.csv", b"text\none\n"))
    with pytest.raises(DataError, match="path is empty"):
        read_documents("")
    with pytest.raises(DataError, match="separator is empty"):
        read_documents(write(tmp_path / "a.txt", b"one"), separator="")


@pytest.mark.parametrize("module", ["zstandard", "pyarrow", "datasets"])
def test_missing_package_is_named(tmp_path, monkeypatch, module):
    file = {
        "zstandard": lambda: write(tmp_path / "a.jsonl.zst", jsonl(ROWS)),
        "pyarrow": lambda: write_parquet(tmp_path / "a.parquet", {"text": ["x"]}),
        "datasets": lambda: "some-dataset",
    }[module]()
    monkeypatch.setitem(sys.modules, module, None)
    refused(f"^{module} is needed to read .*install it", file)


def test_hugging_face_dataset_by_name(monkeypatch):
    datasets = pytest.importorskip("datasets")
    calls = []

    def load_dataset(name, split, streaming):
        calls.append((name, split, streaming))
        if name == "no-such-dataset":
            raise FileNotFoundError("not on the hub")
        dataset = datasets.Dataset.from_list(ROWS)
        return dataset.to_iterable_dataset() if streaming else dataset

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for streaming in (False, True):
        assert list(read_documents("owner/name", split="test", streaming=streaming, **FIELDS)) == EXPECTED
        refused("no field 'body'; the fields there: 'text'", "owner/name", text_field="body", streaming=streaming)
    assert calls == [("owner/name", split, streaming) for streaming in (False, True) for split in ("test", "train")]
    with pytest.raises(DataError, match="no-such-dataset is not a readable file.*not on the hub"):
        read_documents("no-such-dataset")


def test_saved_dataset_folders(tmp_path):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": dataset, "test": dataset.select([2])}).save_to_disk(tmp_path / "several")
    assert list(read_documents(tmp_path / "one", **FIELDS)) == EXPECTED
    assert list(read_documents(tmp_path / "several", split="test", **FIELDS)) == EXPECTED[2:]
    refused("no split 'validation'; the splits there: 'train', 'test'", tmp_path / "several", split="validation")


def test_folder_in_a_format_of_datasets(tmp_path):
    pytest.importorskip("datasets")
    write(tmp_path / "data" / "train.csv", b"text,id\nhello,3\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
        assert list(read_documents(tmp_path / "data", key_field="id", streaming=True)) == [Document("hello", key="3")]
    (tmp_path / "empty").mkdir()
    refused("cannot be loaded as a Hugging Face dataset", tmp_path / "empty")


def test_unique_keys():
    require_unique_keys([Document("x", key="a"), Document("x", key="b")])
    with pytest.raises(DataError, match="'a' names the documents 0 and 2"):
        require_unique_keys([Document("x", key="a"), Document("x", key="b"), Document("y", key="a")])
    with pytest.raises(DataError, match="document 1 has no key"):
        require_unique_keys([Document("x", key="a"), Document("y")])


@pytest.mark.skipif("MEMSINKS_DATA" not in os.environ, reason="MEMSINKS_DATA is not set")
def test_real_text():
    documents = read_documents(Path(os.environ["MEMSINKS_DATA"]) / "tinystories.jsonl.zst")
    assert all(len(next(documents).text) > 20 for _ in range(100))


def test_a_document_is_cut_at_white_space_into_documents_of_their_own() -> None:
    whole = Document("one two\nthree  four" + "5" * 12, key="a", source="s", copies=3, kind="book")
    pieces = list(cut_documents([whole, Document(" tail ")], 9))
    assert [piece.text for piece in pieces] == ["one two", "three", "four55555", "5555555", "tail"]
    assert [piece.key for piece in pieces] == ["a#0", "a#1", "a#2", "a#3", None]
    assert all((piece.source, piece.copies, piece.kind) == ("s", 3, "book") for piece in pieces[:4])


@given(st.text(alphabet="ab \n", max_size=60), st.integers(1, 12))
def test_cutting_loses_nothing_but_white_space(text: str, characters: int) -> None:
    pieces = [piece.text for piece in cut_documents([Document(text)], characters)]
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(0 < len(piece) <= characters and piece == piece.strip() for piece in pieces)
    words = set(text.split())
    if all(len(word) <= characters for word in words):
        assert {word for piece in pieces for word in piece.split()} == words


def test_pieces_need_a_size() -> None:
    with pytest.raises(DataError, match="at least 1 character, got 0"):
        list(cut_documents([Document("a")], 0))


WRITTEN = [
    Document("line\u2028separators\x85and\nnewlines\r\nstay, 猫 عبر 🐈‍⬛", "k1", "s", 64, "record"),
    Document(" ", None, None, 0, "text"),
    Document("c", key="3", copies=np.int64(2)),
]


def test_written_documents_come_back(tmp_path) -> None:
    write_documents(tmp_path / "d.jsonl", iter(WRITTEN))
    assert load_documents(str(tmp_path / "d.jsonl")) == WRITTEN
    write_documents(tmp_path / "again.jsonl", load_documents(tmp_path / "d.jsonl"))
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "d.jsonl").read_bytes()
    with pytest.warns(UserWarning, match="skipped 1 blank"):
        read = list(read_documents(tmp_path / "d.jsonl", source_field="source", copies_field="copies"))
    assert [(x.text, x.copies) for x in read] == [(x.text, x.copies) for x in (WRITTEN[0], WRITTEN[2])]
    write_documents(tmp_path / "c.jsonl", [Document("a", cluster="x"), Document("b")])
    assert [x.cluster for x in read_documents(tmp_path / "c.jsonl", cluster_field="cluster")] == ["x", None]
    write_documents(tmp_path / "none.jsonl", [])
    assert load_documents(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a", "key"', "line 2: damaged or cut short"),
        ('{"text": "a"}', "line 2: not written by write_documents; use read_documents"),
        ("[1]", "line 2: not written by write_documents"),
        ("", "line 2: damaged"),
    ],
)
def test_other_lines_are_not_loaded(tmp_path, line, message) -> None:
    write_documents(tmp_path / "d.jsonl", WRITTEN[:1])
    with (tmp_path / "d.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(DataError, match=message):
        load_documents(tmp_path / "d.jsonl")


@pytest.mark.parametrize("bad", [Document("a\ud800"), Document("a", copies=2.5), Document("a", key=b"k")])
def test_what_cannot_be_written_leaves_the_file_as_it_was(tmp_path, bad) -> None:
    write_documents(tmp_path / "d.jsonl", WRITTEN)
    with pytest.raises(DataError, match="document 1 cannot be written"):
        write_documents(tmp_path / "d.jsonl", [WRITTEN[0], bad])
    assert load_documents(tmp_path / "d.jsonl") == WRITTEN


def test_the_hash_of_a_source_is_that_of_its_files(tmp_path) -> None:
    file = write(tmp_path / "data" / "a.jsonl", jsonl(ROWS))
    alone, folder = source_hash(file), source_hash(tmp_path / "data")
    assert alone == hashlib.sha256(jsonl(ROWS)).hexdigest() != folder
    write(tmp_path / "data" / ".cache" / "x", b"hidden")
    assert source_hash(str(tmp_path / "data")) == folder
    write(tmp_path / "data" / "sub" / "b.txt", b"more")
    assert len({folder, source_hash(tmp_path / "data")}) == 2
    assert source_hash("owner/name") is None
