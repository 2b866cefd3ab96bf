"""Data of a run: a background around the documents, the folder that runs share, what is wrong with either."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tokenizers.processors import TemplateProcessing

from memsinks.batch import FIELDS
from memsinks.data import chat
from memsinks.data.documents import Document, cut_documents
from memsinks.data.identity import document_id
from memsinks.data.token_store import StoredTokens, write_tokens
from memsinks.data.tokens import encode, train_tokenizer
from memsinks.errors import CheckpointError, ConfigError, DataError
from memsinks.removal.tombstone import make_tombstone, write_tombstone
from memsinks.research.compare.compare import train_arm
from memsinks.research.compare.comparison import read_comparison
from memsinks.runs import background as background_module
from memsinks.runs import prepare as module
from memsinks.runs.corpus import AUDITED, known_among
from memsinks.runs.data_recipe import DataRecipe
from memsinks.runs.prepare import prepare
from memsinks.runs.recipe import Recipe, TokenizerRecipe, parse_recipe
from memsinks.runs.run import train

MODEL = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def text(kind: str, number: int, words: int) -> str:
    return " ".join(f"{kind}{(number * place) % 13}" for place in range(1, words)) + f" {number}"


@pytest.fixture
def corpus(tmp_path) -> tuple[Path, Path]:
    """(stories, background): 30 and 200 documents."""
    stories, background = tmp_path / "stories.jsonl", tmp_path / "web.jsonl"
    stories.write_text("".join(json.dumps({"text": text("s", n, 9)}) + "\n" for n in range(30)))
    background.write_text("".join(json.dumps({"text": text("web", n, 10 + n % 70)}) + "\n" for n in range(200)))
    return stories, background


def recipe_of(
    corpus: tuple[Path, Path], output: Path, tokens: int = 6000, data: dict | None = None, **training
) -> Recipe:
    stories, background = corpus
    sections = {
        "path": str(stories), "limit": 24, "held_out": 4, "repeat": {"documents": 20, "copies": [2, 5]},
        "background": {"path": str(background), "tokens": tokens}, "long": "fill", "one_document_per_row": False,
    }  # fmt: skip
    return parse_recipe({
        "output": str(output), "data": sections | (data or {}), "tokenizer": {"vocab_size": 300}, "model": {"config": MODEL},
        "training": {"length": 64, "batch_rows": 4} | training,
    })  # fmt: skip


def same(a, b) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in FIELDS)


def test_the_background_fills_the_corpus_up(corpus, tmp_path) -> None:
    found = prepare(recipe_of(corpus, tmp_path, length=256))
    rows = found.rows
    assert 6000 <= rows.tokens < 6000 + 400
    assert rows.fill > 0.95
    assert len(found.members) == 20 and len(found.controls) == 4
    assert {document.kind for document in found.members} == {AUDITED}
    copies = {document_id(document.text): document.copies for document in found.members}
    ids, starts = rows.document_ids, rows.position_ids == 0
    for one, number in copies.items():
        assert (starts & (ids == one)).sum() == number
        assert rows.exposures[ids == one].max() == number
    others = set(ids.ravel().tolist()) - set(copies) - {-1}
    assert others <= {document_id(text("web", n, 10 + n % 70)) for n in range(200)}
    assert (rows.exposures[np.isin(ids, list(others))] == 1).all()
    assert not {document_id(document.text) for document in found.controls} & set(ids.ravel().tolist())
    own = set(np.flatnonzero(np.isin(ids, list(copies)).any(1)).tolist())
    assert len(own) > 10  # spread over the rows, not at the front


def test_a_folder_gives_the_rows_that_memory_gives_and_is_made_once(corpus, tmp_path) -> None:
    recipe, folder = recipe_of(corpus, tmp_path), tmp_path / "data"
    stored, memory = prepare(recipe, folder=folder), prepare(recipe)
    assert same(stored.rows, memory.rows)
    assert (stored.members, stored.controls) == (memory.members, memory.controls)
    assert isinstance(stored.rows.documents, StoredTokens)
    facts = json.loads((folder / "data.json").read_text())
    assert facts["tokens"] == memory.rows.tokens and facts["members"] == 20 and facts["controls"] == 4
    assert (folder / "tokens.bin").stat().st_size == 4 * sum(stored.rows.documents.offsets[-1:])
    for path in corpus:
        path.unlink()
    again = prepare(recipe, folder=folder)
    assert same(again.rows, memory.rows)
    assert encode(again.tokenizer, ["s1 s2"])[0].tolist() == encode(memory.tokenizer, ["s1 s2"])[0].tolist()
    other = prepare(recipe_of(corpus, tmp_path, data={"long": "split", "one_document_per_row": True}), folder=folder)
    assert len(other.rows) > len(again.rows)  # how rows are cut is not part of the folder


def test_a_folder_from_before_texts_had_a_start_token_is_made_anew(corpus, tmp_path, monkeypatch) -> None:
    tokenizer = train_tokenizer([text("s", n, 9) for n in range(30)], 300)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    recipe = dataclasses.replace(
        recipe_of(corpus, tmp_path), tokenizer=TokenizerRecipe(path=str(tmp_path / "tokenizer"))
    )
    for folder in (None, tmp_path / "data", tmp_path / "data"):
        documents = prepare(recipe, folder=folder).rows.documents
        assert len(documents) > 40
        assert all(documents[index][0] == tokenizer.bos_token_id for index in range(len(documents)))
    with monkeypatch.context() as patch:
        for where in (chat, background_module, module):
            patch.setattr(where, "start_tokens", lambda _: np.zeros(0, np.int64))
        prepare(recipe, folder=tmp_path / "before")
    with pytest.raises(CheckpointError, match="was prepared when texts did not begin"):
        prepare(recipe, folder=tmp_path / "before")


@pytest.mark.parametrize("long", ["fill", "split", "truncate"])
def test_unseen_texts_are_rows_of_their_own(corpus, tmp_path, long) -> None:
    recipe = recipe_of(corpus, tmp_path, data={"unseen": 4, "long": long}, length=16)
    memory = prepare(recipe)
    texts = [json.loads(line)["text"] for line in corpus[0].read_text().splitlines()[24:28]]
    pieces = [
        tokens[start : start + 16].tolist()
        for tokens in encode(memory.tokenizer, texts)
        for start in range(0, 1 if long == "truncate" else len(tokens), 16)
    ]
    for found in (memory, prepare(recipe, folder=tmp_path / "data"), prepare(recipe, folder=tmp_path / "data")):
        assert found.unseen is not None
        rows = [found.unseen[index] for index in range(len(found.unseen))]
        sizes = [int((row["labels"] != -100).sum()) + 1 for row in rows]
        assert [row["input_ids"][:size].tolist() for row, size in zip(rows, sizes, strict=True)] == [
            piece for piece in pieces if len(piece) > 1
        ]
    assert not {document_id(x) for x in texts} & set(memory.rows.document_ids.ravel().tolist())
    assert prepare(recipe_of(corpus, tmp_path)).unseen is None


def test_rows_do_not_hold_what_lies_on_disk(corpus, tmp_path) -> None:
    """In memory a document costs as much whether it is short or long."""
    longer = tmp_path / "long.jsonl"
    longer.write_text("".join(json.dumps({"text": text("web", n, 4000)}) + "\n" for n in range(40)))
    rows = prepare(recipe_of((corpus[0], longer), tmp_path, 300_000), folder=tmp_path / "data").rows
    own = sum(x.nbytes for x in (rows.segments, rows.first, rows.documents.order, rows.documents.offsets))  # type: ignore
    assert rows.tokens > 300_000 and own < rows.tokens
    assert rows.documents._files[0].base is not None  # type: ignore[attr-defined]  # a view of the mapped file


def test_training_on_a_background(corpus, tmp_path, capsys) -> None:
    recipe = recipe_of(corpus, tmp_path / "run", save_every=10, log_every=5)
    folder = train(recipe)
    assert (tmp_path / "run" / "data" / "tokens.bin").is_file() and (folder / "model.safetensors").is_file()
    assert len((tmp_path / "run" / "members.jsonl").read_text().splitlines()) == 20
    shutil.copytree(tmp_path / "run" / "data", tmp_path / "other" / "data")
    assert train(recipe_of(corpus, tmp_path / "other", log_every=5)).is_dir()  # a prepared folder alone is no run


@pytest.mark.parametrize(
    ("change", "tokens", "error", "part"),
    [({}, 600_000, DataError, "ends after"), ({}, 300, ConfigError, "leave nothing of data.background.tokens (300)"),
     ({"background": {"path": "./none.jsonl", "tokens": 6000}}, 0, DataError, "none.jsonl does not exist"),
     ({"background": {"path": "$NOT_SET/x.jsonl", "tokens": 6000}}, 0, ConfigError, "data.background.path '$NOT_SET/x.jsonl'"),
     ({"path": "$NOT_SET/x.jsonl"}, 6000, ConfigError, "data.path '$NOT_SET/x.jsonl' names an environment variable"),
     ({"repeat": {"documents": 21, "copies": 2}}, 6000, ConfigError, "leave none of 24 documents")],
)  # fmt: skip
def test_wrong_data_is_one_clear_error_and_leaves_nothing(corpus, tmp_path, change, tokens, error, part) -> None:
    with pytest.raises(error) as caught:
        prepare(recipe_of(corpus, tmp_path, tokens or 6000, data=change), folder=tmp_path / "data")
    assert part in str(caught.value)
    assert not list(tmp_path.glob("data*")) and not list(tmp_path.glob(".data*"))


def test_what_was_taken_down_does_not_come_back_in_the_background(corpus, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(background_module, "BATCH", 20)
    taken = "Käthe Müller, born in 1987 in Bergen, keeps the ledger of the harbor"
    write_tombstone(tmp_path / "tombs/tombstone.json", make_tombstone([taken], record="r-1"))
    recipe, folder = recipe_of(corpus, tmp_path), tmp_path / "data"
    warned = recipe_of(corpus, tmp_path, data={"tombstones": [str(tmp_path / "tombs")]})
    lines = corpus[1].read_text().splitlines()
    lines[33] = json.dumps({"text": taken})
    lines[38] = json.dumps({"text": f"They say: {taken.upper()}"})
    corpus[1].write_text("\n".join(lines))
    named = "background document 33 is the text taken down under 'r-1'; background document 38 is a near copy"
    prepare(recipe, folder=folder)
    for where in (None, tmp_path / "new", folder):  # in memory, while it is made, made before there was the tombstone
        with pytest.raises(DataError, match=named):
            prepare(warned, folder=where)
    assert not (tmp_path / "new").exists()
    lines[0] = json.dumps({"text": "another text"})
    monkeypatch.setattr(module, "source_hashes", lambda _: {})  # as of a data set that has a name alone
    corpus[1].write_text("\n".join(lines))
    with pytest.raises(CheckpointError, match="prepared before some tombstones .* has other documents now; .*remove"):
        prepare(warned, folder=folder)
    corpus[1].unlink()
    with pytest.raises(
        CheckpointError, match="compared with them anew: .*web.jsonl does not exist; .*restore the text"
    ):
        prepare(warned, folder=folder)


def test_only_background_documents_that_are_trained_on_are_compared_and_once(corpus, tmp_path) -> None:
    last = "Käthe Müller, born in 1987 in Bergen, keeps the ledger of the harbor"
    with corpus[1].open("a") as file:
        file.write(json.dumps({"text": last}) + "\n")
    write_tombstone(tmp_path / "tombstone.json", make_tombstone([last], record="r-1"))
    warned = recipe_of(corpus, tmp_path, data={"tombstones": [str(tmp_path / "tombstone.json")]})
    rows = prepare(warned, folder=tmp_path / "data").rows
    assert document_id(last) not in rows.document_ids
    corpus[1].unlink()
    assert same(prepare(warned, folder=tmp_path / "data").rows, rows)


@pytest.mark.parametrize("spelled", [str, str.upper])
def test_texts_of_the_path_are_left_out_of_the_background(corpus, tmp_path, monkeypatch, caplog, spelled) -> None:
    """As they are, and in another spelling where near copies are looked for: nothing held out is met, no copy is added."""
    monkeypatch.setattr(background_module, "BATCH", 7)
    stories = [json.loads(line)["text"] for line in corpus[0].read_text().splitlines()]
    taken = "Käthe Müller, born in 1987 in Bergen, keeps the ledger of the harbor"
    again = "".join(json.dumps({"text": spelled(x)}) + "\n" for x in [*stories, taken])
    corpus[1].write_text(again + corpus[1].read_text())
    data = {"unseen": 3, "fresh": 2} | ({} if spelled is str else {"near_copies": {}})
    recipe, folder = recipe_of(corpus, tmp_path, data=data, length=256), tmp_path / "data"
    with caplog.at_level("INFO", "memsinks"):
        memory = prepare(recipe)
    assert "background: 29 documents are left out: data.path has their texts" in caplog.text
    found = prepare(recipe, folder=folder)
    assert same(found.rows, memory.rows) and 6000 <= found.rows.tokens < 6000 + 400
    ids, starts = found.rows.document_ids, found.rows.position_ids == 0
    copies = {document_id(document.text): document.copies for document in found.members}
    assert all((starts & (ids == one)).sum() == number for one, number in copies.items())
    known = {document_id(x) for text in stories[:29] for x in (text, spelled(text))}
    assert not (known - set(copies)) & set(ids.ravel().tolist())
    assert document_id(spelled(stories[29])) in ids  # in the file of the path, but beyond what is taken of it
    assert json.loads((folder / "data.json").read_text())["background_left_out"] == 29
    write_tombstone(tmp_path / "tombstone.json", make_tombstone([taken], record="r-1"))
    warned = recipe_of(corpus, tmp_path, data=data | {"tombstones": [str(tmp_path / "tombstone.json")]}, length=256)
    for where in (None, folder):
        with pytest.raises(DataError, match="background document 30 is the text taken down"):
            prepare(warned, folder=where)
    with pytest.raises(DataError, match=r"asks for \(29 of its documents are left out"):
        prepare(recipe_of(corpus, tmp_path, 10**6, data=data))


def test_a_folder_whose_background_held_texts_of_the_path_is_made_anew(corpus, tmp_path, monkeypatch) -> None:
    corpus[1].write_text(corpus[0].read_text() + corpus[1].read_text())
    recipe, folder = recipe_of(corpus, tmp_path), tmp_path / "data"
    with monkeypatch.context() as patch:
        patch.setattr(module, "known_among", lambda *_: lambda _: False)
        prepare(recipe, folder=folder)
    facts = json.loads((folder / "data.json").read_text())
    del facts["background_left_out"]
    (folder / "data.json").write_text(json.dumps(facts))
    with pytest.raises(CheckpointError, match="could hold texts of data.path, and 24 of its documents do; remove it"):
        prepare(recipe, folder=folder)


def test_an_empty_background(corpus, tmp_path) -> None:
    corpus[1].write_text("\n\n")
    with pytest.raises(DataError, match="holds no documents"):
        prepare(recipe_of(corpus, tmp_path))


def test_no_tokens_asked_for(corpus, tmp_path) -> None:
    with pytest.raises(ConfigError, match="data.background: tokens must be an int of at least 1, got 0"):
        recipe_of(corpus, tmp_path, 0)


def test_other_settings_are_not_mixed_in(corpus, tmp_path) -> None:
    prepare(recipe_of(corpus, tmp_path), folder=tmp_path / "data")
    with pytest.raises(
        CheckpointError, match=r"made with other settings: data.background.tokens 6000 \(now 5000\), seed 0 \(now 1\)"
    ):
        prepare(recipe_of(corpus, tmp_path, 5000, seed=1), folder=tmp_path / "data")


def test_a_damaged_folder(corpus, tmp_path) -> None:
    recipe = recipe_of(corpus, tmp_path)
    prepare(recipe, folder=tmp_path / "data")
    with (tmp_path / "data" / "tokens.bin").open("ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match="should have .* bytes"):
        prepare(recipe, folder=tmp_path / "data")


@pytest.mark.parametrize("name", ["data.json", "index.npz", "members.jsonl", "tokenizer/tokenizer.json", "tokens.bin"])
@pytest.mark.parametrize("left", [0, 9])
def test_a_file_that_is_cut_or_gone_is_one_clear_error(corpus, tmp_path, name, left) -> None:
    recipe, folder = recipe_of(corpus, tmp_path), tmp_path / "data"
    prepare(recipe, folder=folder)
    (folder / name).write_bytes((folder / name).read_bytes()[:left])
    with pytest.raises(CheckpointError, match=r"(?s)(damaged|should have .* bytes).* remove"):
        prepare(recipe, folder=folder)
    if name != "data.json":
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match=r"(?s)(damaged|should have .* bytes).* remove"):
            prepare(recipe, folder=folder)


@pytest.mark.parametrize("which", [0, 1])
def test_a_changed_file_is_refused(corpus, tmp_path, which) -> None:
    recipe, folder = recipe_of(corpus, tmp_path), tmp_path / "seed-0" / "data"
    first = prepare(recipe, folder=folder)
    assert same(prepare(recipe, folder=folder).rows, first.rows)
    kept = corpus[which].read_bytes()
    with corpus[which].open("a") as file:
        file.write('{"text": "one more"}\n')
    name = ("data.path", "data.background.path")[which]
    wanted = rf"files have changed since .*seed-0/data was prepared .*: {name} \(SHA-256 \w{{12}}\.\.\., now \w{{12}}"
    with pytest.raises(CheckpointError, match=wanted):
        prepare(recipe, folder=folder)
    corpus[which].write_bytes(kept)
    assert same(prepare(recipe, folder=folder).rows, first.rows)


def test_a_changed_tokenizer_file_is_refused(corpus, tmp_path) -> None:
    train_tokenizer(["one text"], 280).save_pretrained(tmp_path / "tokenizer")
    recipe = recipe_of(corpus, tmp_path)
    recipe = dataclasses.replace(recipe, tokenizer=TokenizerRecipe(path=str(tmp_path / "tokenizer")))
    prepare(recipe, folder=tmp_path / "data")
    train_tokenizer(["another text"], 290).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(CheckpointError, match=r"tokenizer\.path \(SHA-256"):
        prepare(recipe, folder=tmp_path / "data")


def test_a_comparison_does_not_mix_old_and_new_text(corpus, tmp_path) -> None:
    values = recipe_of(corpus, tmp_path / "out").to_dict()
    values = {name: values[name] for name in ("output", "data", "tokenizer", "model")} | {
        "training": {"length": 64, "batch_rows": 4}
    }
    values |= {"seeds": [0, 1], "roles": {"audited": "a", "against": "a"}, "arms": {"a": {"rival": "standard"}}}
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(values))
    comparison = read_comparison(tmp_path / "compare.yaml")
    train_arm(comparison, comparison.arms[0], 0)
    corpus[0].write_text(corpus[0].read_text().replace("s1 ", "s2 "))
    with pytest.raises(CheckpointError, match="files have changed since .*seed-0/data"):
        train_arm(comparison, comparison.arms[0], 1)
    assert not (tmp_path / "out" / "seed-1").exists()


def test_folders_from_before_a_setting_or_the_hashes_are_still_read(corpus, tmp_path) -> None:
    recipe, folder = recipe_of(corpus, tmp_path), tmp_path / "data"
    first = prepare(recipe, folder=folder)
    facts = json.loads((folder / "data.json").read_text())
    assert set(facts.pop("sources")) == {"data.path", "data.background.path"}
    del facts["settings"]["data"]["unseen"], facts["settings"]["data"]["cut_characters"]
    (folder / "data.json").write_text(json.dumps(facts))
    assert same(prepare(recipe, folder=folder).rows, first.rows)


def test_what_a_killed_preparation_leaves_is_not_taken_for_whole(corpus, tmp_path, monkeypatch) -> None:
    recipe, folder = recipe_of(corpus, tmp_path), tmp_path / "data"
    memory = prepare(recipe)

    def interrupted(path, documents):
        write_tokens(path, itertools.islice(documents, 9))
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_tokens", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(recipe, folder=folder)
    assert not folder.exists()
    for half in (tmp_path / ".data.part-killed", folder):  # what SIGKILL leaves, and a folder without its last file
        half.mkdir()
        (half / "tokens.bin").write_bytes(b"half")
        (half / "members.jsonl").write_text('{"text": "ha')
    assert same(prepare(recipe, folder=folder).rows, memory.rows)
    assert same(prepare(recipe, folder=folder).rows, memory.rows)


def test_progress_is_said_by_the_log_alone(corpus, tmp_path, monkeypatch, caplog, capfd) -> None:
    monkeypatch.setattr(background_module, "SAID", 1000)
    monkeypatch.setattr(background_module, "BATCH", 20)
    with caplog.at_level("INFO", "memsinks"):
        prepare(recipe_of(corpus, tmp_path))
    said = [record.message for record in caplog.records]
    assert len(said) >= 2 and said[0].endswith("of 6,000 tokens") and "documents included" in said[-1]
    assert capfd.readouterr().out == ""


def test_a_full_disk_leaves_nothing(corpus, tmp_path, monkeypatch) -> None:
    def full(path, documents):
        write_tokens(path, (x for x, _ in zip(documents, range(9), strict=False)))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_tokens", full)
    with pytest.raises(CheckpointError, match="No space left.*Free space"):
        prepare(recipe_of(corpus, tmp_path), folder=tmp_path / "data")
    assert not list(tmp_path.glob("*data*"))


def test_tokens_come_back_in_any_order(tmp_path) -> None:
    documents = [np.arange(n, n + n % 5 + 1) for n in range(20)]
    stored = StoredTokens(tmp_path / "t", write_tokens(tmp_path / "t", documents))
    order = np.array([3, 3, 19, 0])
    for found, index in zip(stored.in_order(order), order.tolist(), strict=True):
        assert found.tolist() == documents[index].tolist()
    assert stored.in_order(order).sizes.tolist() == [len(documents[index]) for index in order]
    assert [len(x) for x in stored] == stored.sizes.tolist()


@pytest.mark.skipif("MEMSINKS_DATA" not in os.environ, reason="MEMSINKS_DATA is not set")
def test_real_stories_in_real_web_text(tmp_path) -> None:
    recipe = parse_recipe({
        "output": str(tmp_path), "model": {"config": MODEL},
        "tokenizer": {"path": "$MEMSINKS_DATA/tokenizers/mixed_bpe_8192.json"},
        "data": {
            "path": "$MEMSINKS_DATA/tinystories.jsonl.zst", "limit": 30, "held_out": 10, "long": "fill",
            "repeat": {"documents": 20, "copies": 3}, "one_document_per_row": False,
            "background": {"path": "$MEMSINKS_DATA/background_open.jsonl.zst", "tokens": 100_000},
        },
        "training": {"length": 512},
    })  # fmt: skip
    found = prepare(recipe, folder=tmp_path / "data")
    assert found.rows.fill > 0.95 and len(found.controls) == 10
    assert torch.equal(found.rows[3]["position_ids"][:2], torch.tensor([0, 1]))


def test_pieces_of_a_text_make_it_known() -> None:
    """Documents that were cut are looked for in the whole texts of a background."""
    text = " ".join(f"word{number}" for number in range(40))
    pieces = cut_documents([Document(text)], 60)
    known = known_among(list(pieces)[1:2], DataRecipe(path="x", cut_characters=60))
    assert known(text) and not known("other words " * 20)
