"""Near copies: what must be found, and what must not be merged; the same clusters for any order and cut of the documents."""

from __future__ import annotations

import json
import random
import unicodedata
from pathlib import Path

import numpy as np
import pytest

import memsinks as ms
from memsinks.data import clusters as module
from memsinks.data.clusters import NearCopies, cluster
from memsinks.data.clusters_elsewhere import read_clusters, with_clusters
from memsinks.data.documents import Document
from memsinks.data.matching import similarity
from memsinks.data.near_copies import shingled
from memsinks.data.tokens import train_tokenizer
from memsinks.errors import ConfigError, DataError

VOCABULARY = [f"{a}{b}" for a in "bcdfghklmnprst" for b in ("ada", "elo", "iru", "one", "umi", "yst", "ack", "erd")]


def words(seed: int | str, count: int) -> list[str]:
    return random.Random(f"words {seed}").choices(VOCABULARY, k=count)


def text(seed: int | str, count: int = 120) -> str:
    return " ".join(words(seed, count))


def edited(original: str, share: float, seed: int | str) -> str:
    rng = random.Random(f"edits {seed}")
    return " ".join(rng.choice(VOCABULARY) if rng.random() < share else word for word in original.split())


def groups(texts: list[str], **settings) -> list[set[int]]:
    """The clusters of more than one, as sets of indices."""
    found: dict[str | None, set[int]] = {}
    for index, document in enumerate(ms.cluster_documents(texts, NearCopies(**settings))):
        found.setdefault(document.cluster, set()).add(index)
    return sorted((x for x in found.values() if len(x) > 1), key=min)


def test_near_copies_are_one_cluster_and_others_are_not() -> None:
    texts = [text(n) for n in range(60)]
    copies = [edited(texts[n], 0.05, f"{n} {c}") for n in range(20) for c in range(3)]
    found = groups([*texts, *copies])
    assert found == [{n, 60 + 3 * n, 61 + 3 * n, 62 + 3 * n} for n in range(20)]


def test_other_case_spaces_and_unicode_forms_are_one_text() -> None:
    plain = "Über den Bach führt ein schmaler Steg aus altem Holz."
    assert groups([plain, plain.upper(), plain.replace(" ", "\n"), "Ein anderer Satz."]) == [{0, 1, 2}]
    assert groups([plain, unicodedata.normalize("NFD", plain)]) == [{0, 1}]


def test_one_license_before_2000_books_merges_none_of_them() -> None:
    license = text("license", 200)
    books = [f"{license} {text(n, 60)}" for n in range(2000)]
    copy = edited(books[7], 0.03, "copy")
    assert groups([*books, copy]) == [{7, 2000}]


def test_1000_dialogues_of_one_template_stay_apart() -> None:
    frame = [text(f"frame {n}", 12) for n in range(8)]
    dialogues = [" ".join(f"{part} {text(f'{n} {place}', 4)}" for place, part in enumerate(frame)) for n in range(1000)]
    assert groups(dialogues) == []
    assert (
        len(groups(dialogues[:50])[0]) > 40
    )  # as many as may be copies: a template of 50 is told from them by nothing


def chain(steps: int = 12) -> list[str]:
    """Texts of which each shares two thirds with the one before, and the ends nothing."""
    whole = words("chain", 60 + 12 * steps)
    return [" ".join(whole[12 * n : 12 * n + 60]) for n in range(steps)]


def test_a_chain_does_not_become_one_cluster() -> None:
    texts = chain()
    found = groups(texts, threshold=0.5)
    assert len(found) >= 3 and max(map(len, found)) <= 3
    alike = [[similarity(texts[a], texts[b]) for b in range(len(texts))] for a in range(len(texts))]
    for group in found:  # each is like the center
        assert any(all(alike[center][x] >= 0.5 for x in group) for center in group)


@pytest.fixture(scope="module")
def mixed() -> list[str]:
    """Copies of copies, chains, a license, exact repeats."""
    texts = [text(n) for n in range(40)]
    texts += [edited(texts[n % 10], 0.02 + 0.01 * (n % 9), n) for n in range(80)]
    texts += chain() + [f"{text('frame', 60)} {text(f'b {n}', 30)}" for n in range(150)] + texts[:5]
    return texts


def test_the_order_of_documents_does_not_matter(mixed) -> None:
    names = {x.text: x.cluster for x in ms.cluster_documents(mixed)}
    for seed in range(3):
        shuffled = random.Random(seed).sample(mixed, len(mixed))
        assert {x.text: x.cluster for x in ms.cluster_documents(shuffled)} == names


def test_the_cut_into_shards_does_not_matter(mixed, monkeypatch) -> None:
    whole, report = cluster([shingled(mixed, 5)], NearCopies())
    for size in (1, 17, 100):
        parts = [shingled(mixed[start : start + size], 5) for start in range(0, len(mixed), size)]
        monkeypatch.setattr(module, "AT_ONCE", 1000)
        monkeypatch.setattr(module, "SKETCHED", size)
        names, again = cluster(parts, NearCopies())
        np.testing.assert_array_equal(names, whole)
        assert again == report


def test_japanese_texts_are_not_merged_by_their_normal_form() -> None:
    rng = random.Random(0)
    kana = "あいうえおかきくけこさしすせそたちつてとがぎぐげござじずぜぞだぢづでど日本語文章山川海空"
    texts = ["".join(rng.choices(kana, k=150)) for _ in range(30)]
    voiced = str.maketrans("かきくけこさしすせそたちつてと", "がぎぐげござじずぜぞだぢづでど")
    near = texts[0][:70] + "変" + texts[0][71:]
    found = groups([*texts, near, texts[1].translate(voiced)])
    assert found == [{0, 30}]  # a voiced sound is another sound


def test_arabic_texts_are_not_merged_by_their_normal_form() -> None:
    rng = random.Random(0)
    stems = [a + b + c for a in "كدسع" for b in "تبرل" for c in "منهق"]
    texts = [" ".join(rng.choices(stems, k=80)) for _ in range(20)]
    other = " ".join(word.translate(str.maketrans("كسع", "قصغ")) for word in texts[1].split())
    near = " ".join([*texts[0].split()[:40], "آخر", *texts[0].split()[41:]])
    vowels = " ".join(word + "\u064e" for word in texts[2].split())  # with other vowel signs each word is another word
    assert groups([*texts, near, other, vowels]) == [{0, 20}]


def test_clusters_are_capped_and_it_is_said(caplog) -> None:
    copies = [edited(text(0), 0.02, n) for n in range(30)]
    with caplog.at_level("INFO", "memsinks"):
        found = groups(copies, largest=8)
    assert max(map(len, found)) == 8 and "clusters were cut at the largest size" in caplog.text


def test_more_copies_than_boilerplate_are_left_and_counted() -> None:
    copies = [edited(text(0), 0.05, n) for n in range(40)]
    report = cluster([shingled(copies, 5)], NearCopies(boilerplate=10))[1]
    assert report["mostly_boilerplate"] == 40 and report["boilerplate_shingles"] > 50
    assert len(groups(copies)) == 1


def test_pairs_are_verified_by_exact_jaccard() -> None:
    """All that is in a cluster is as alike as the threshold says, however loose the bands."""
    texts = [text(n) for n in range(20)]
    texts += [edited(texts[n], share, n) for n in range(20) for share in (0.03, 0.08, 0.12, 0.2)]
    for threshold in (0.2, 0.5, 0.8):
        found = groups(texts, threshold=threshold, bands=128, rows=1)
        assert len(found) >= 5
        for group in found:
            assert any(all(similarity(texts[center], texts[x]) >= threshold for x in group) for center in group)


def test_the_probability_of_a_candidate() -> None:
    assert NearCopies().found(0.3) == pytest.approx(1 - (1 - 0.3**3) ** 64)
    assert NearCopies(bands=14, rows=8).found(0.75) == pytest.approx(0.772, abs=0.01)


def test_wrong_settings() -> None:
    with pytest.raises(ConfigError, match=r"threshold must lie in \(0, 1\], got 0; size must .*; largest must"):
        NearCopies(threshold=0, size=0, largest=1)


def test_rows_by_cluster_share_sinks_and_count_exposures(tmp_path) -> None:
    texts = [text(0, 60), edited(text(0, 60), 0.05, 1), text(1, 60)]
    tokenizer = train_tokenizer(texts, 300)
    documents = ms.cluster_documents(texts)
    rows = ms.make_rows(documents, tokenizer, length=512, by="cluster", apart_from=None, one_document_per_row=True)
    met = sorted((int(rows.document_ids[x, 0]), int(rows.exposures[x, 0])) for x in range(3))
    shared = ms.document_id(str(documents[0].cluster), "cluster")
    assert {x for x in met if x[0] == shared} == {(shared, 1), (shared, 2)}
    ids = ms.identify([Document("alone")], by="cluster")[0]
    assert ids[0] == ms.document_id("alone", "cluster")


# Made elsewhere


@pytest.mark.parametrize(
    ("name", "columns"),
    [("c.csv", ("key", "cluster")), ("c.jsonl", ("id", "_duplicate_group_id")), ("c.parquet", ("id", "minhash_cluster_id"))],
)  # fmt: skip
def test_clusters_of_other_tools_are_read(tmp_path, name, columns) -> None:
    rows = [dict(zip(columns, x, strict=True)) for x in (("a", 3), ("b", 3), ("c", -1))]
    write_rows(tmp_path / name, rows)
    assert read_clusters(tmp_path / name) == {"a": "3", "b": "3"}
    documents = list(with_clusters([Document("x", key="a"), Document("y", key="c")], {"a": "3"}))
    assert [x.cluster for x in documents] == ["3", None]


def test_pairs_are_joined(tmp_path) -> None:
    write_rows(tmp_path / "p.csv", [{"left": a, "right": b} for a, b in (("d", "b"), ("b", "a"), ("x", "y"))])
    assert read_clusters(tmp_path / "p.csv") == {"a": "a", "b": "a", "d": "a", "x": "x", "y": "x"}


def test_a_byte_order_mark_is_no_part_of_a_column_and_negative_numbers_alone_are_no_cluster(tmp_path) -> None:
    (tmp_path / "c.csv").write_text("cluster,key\n-1,a\n-1.0,b\n-new-,c\n7,d\n", encoding="utf-8-sig")
    assert read_clusters(tmp_path / "c.csv") == {"c": "-new-", "d": "7"}


def test_a_column_of_datatrove(tmp_path) -> None:
    lines = [{"text": f"t{n}", "minhash_cluster_id": cluster} for n, cluster in enumerate((-1, 5, 5, None))]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    documents = ms.read_documents(tmp_path / "d.jsonl", cluster_field="minhash_cluster_id")
    assert [x.cluster for x in documents] == [None, "5", "5", None]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [("c.csv", "", "holds no clusters"), ("c.csv", "a,b,c\n1,2,3\n", "must have two columns"), ("c.txt", "a", "unknown suffix"),
     ("c.csv", "key,cluster\na\n", "row 1: must hold key and cluster"), ("c.jsonl", "[1]\n", "must be a JSON object"),
     ("c.jsonl", '{"key": "a", "cluster": 1.5}\n', "a string or an integer"), ("c.jsonl", "{", "cannot be read"),
     ("c.csv", "key,cluster\na,1\na,2\n", "names 1 keys more than once: 'a'"), ("c.parquet", "no", "cannot be read")],
)  # fmt: skip
def test_wrong_files_of_clusters_are_one_clear_error(tmp_path, name, content, said) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=said):
        read_clusters(tmp_path / name)


def test_clusters_of_other_keys_are_refused() -> None:
    with pytest.raises(DataError, match="none of the 1 documents has a key"):
        list(with_clusters([Document("x", key="z")], {"a": "1"}))


def write_rows(path: Path, rows: list[dict]) -> None:
    if path.suffix == ".parquet":
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(x) + "\n" for x in rows))
    else:
        path.write_text("\n".join([",".join(rows[0]), *(",".join(map(str, x.values())) for x in rows)]) + "\n")
