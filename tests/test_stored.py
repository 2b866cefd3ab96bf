"""A corpus on disk: the same bytes however it is made, killed or not; what reads it; what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from chats import PLAIN
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import memsinks as ms
from memsinks.batch import FIELDS
from memsinks.cli import main
from memsinks.data import chat as chat_module
from memsinks.data import shards
from memsinks.data.documents import Document
from memsinks.data.identity import document_id
from memsinks.data.shards import TABLE, cut_into_shards, read_table
from memsinks.data.tokens import train_tokenizer
from memsinks.errors import CheckpointError, ConfigError, DataError
from memsinks.files import locked
from memsinks.removal.tombstone import make_tombstone, write_tombstone
from memsinks.runs import stored as runs_stored
from memsinks.runs.prepare import prepare as runs_prepare

WORDS = [a + b for a in ("ka", "lo", "mi", "ne", "pu") for b in ("ra", "so", "ti", "ve", "xu", "zan", "dor")]
SMALL = 3000
try:
    from memsinks.data import datatrove_step
except ImportError:  # the tests that need it are skipped
    datatrove_step: Any = None


def text(number: int, words: int = 40) -> str:
    return " ".join(random.Random(number).choices(WORDS, k=words)) + f" {number}."


def documents(count: int = 60) -> list[Document]:
    return [
        Document(text(n), key=f"k{n}", source=f"site{n % 7}", copies=n % 4, extra={"license": f"L{n % 2}", "stars": n})
        for n in range(count)
    ]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([text(n) for n in range(50)], 300)


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(x.relative_to(folder)): hashlib.sha256(x.read_bytes()).hexdigest()
        for x in sorted(folder.rglob("*")) if x.is_file()
    }  # fmt: skip


def prepare(out: Path, tokenizer, given: list[Document] | None = None, **settings) -> ms.StoredCorpus:
    given = documents() if given is None else given
    values = {"carry": ["license", "stars"], "shard_characters": SMALL, "workers": 1, "near_copies": ms.NearCopies()}
    return ms.prepare_corpus(lambda: given, tokenizer, out, **(values | settings))


@pytest.fixture(scope="module")
def made(tokenizer, tmp_path_factory) -> ms.StoredCorpus:
    return prepare(tmp_path_factory.mktemp("made") / "corpus", tokenizer)


def test_documents_come_back_with_all_that_was_known(made, tokenizer) -> None:
    assert len(made) == 60 and len(made.manifest["shards"]) > 4
    for before, after in zip(documents(), made, strict=True):
        assert (after.text, after.key, after.source, after.copies) == (
            before.text,
            before.key,
            before.source,
            before.copies,
        )
        assert after.extra == {"license": before.extra["license"], "stars": str(before.extra["stars"])}
    assert made[17].key == "k17" and made[-1].key == "k59"
    assert [x.key for x in made.controls] == [f"k{n}" for n in range(0, 60, 4)]
    made.verify()


@pytest.mark.parametrize("by", ["content", "key", "source", "cluster"])
def test_rows_are_those_of_documents_in_memory(made, tokenizer, by) -> None:
    stored = ms.make_rows(made, tokenizer, length=64, seed=3, epochs=2, by=by)
    memory = ms.make_rows(list(made), tokenizer, length=64, seed=3, epochs=2, by=by)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(stored, name), getattr(memory, name))


def test_the_table_has_ids_as_strings_and_the_columns_that_were_carried(made) -> None:
    rows = [row for x in sorted((made.path / "shards").iterdir()) for row in read_table(x / TABLE)]
    assert rows[5]["document_id"] == str(document_id(text(5))) == rows[5]["group"]
    assert rows[5]["license"] == "L1" and rows[5]["tokens"] > 0


def test_any_number_of_workers_gives_the_same_bytes(made, tokenizer, tmp_path) -> None:
    prepare(tmp_path / "corpus", tokenizer, workers=2)
    assert hashes(tmp_path / "corpus") == hashes(made.path)


@pytest.mark.long
def test_the_command_with_workers_is_killed_leaves_no_process_and_goes_on(tokenizer, tmp_path) -> None:
    write(tmp_path / "a.jsonl", documents(600))
    tokenizer.save_pretrained(tmp_path / "t")
    command = [
        sys.executable,
        "-m",
        "memsinks.cli",
        "prepare",
        str(tmp_path / "a.jsonl"),
        "--tokenizer",
        str(tmp_path / "t"),
    ]
    command += ["--near-copies", "--shard-characters", "2000", "--workers", "2", "-q", "--out"]
    for number in range(6):
        process = subprocess.Popen([*command, str(tmp_path / "c")], start_new_session=True)
        shards = tmp_path / "c" / ("shards" if number > 2 else ".work/shingles")
        deadline = time.monotonic() + 120
        while (
            process.poll() is None
            and len(list(shards.glob("0*"))) < 4 * (number % 3) + 1
            and time.monotonic() < deadline
        ):
            time.sleep(0.01)
        process.kill()
        process.wait()
        deadline = time.monotonic() + 30
        while of_session(process.pid) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not of_session(process.pid), "workers outlive the command"
    subprocess.run([*command, str(tmp_path / "c")], check=True)
    subprocess.run([*command, str(tmp_path / "d")], check=True)
    assert hashes(tmp_path / "c") == hashes(tmp_path / "d")


def of_session(session: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for place in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, *fields = place.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        found += [int(place.parent.name)] if int(fields[2]) == session and state != "Z" else []
    return found


def test_a_worker_that_is_killed_is_one_clear_error_and_the_same_command_goes_on(made, tokenizer, tmp_path) -> None:
    def dying():
        for number, document in enumerate(documents()):
            if number == 40:
                for worker in multiprocessing_children():
                    os.kill(worker, signal.SIGKILL)
            yield document

    with pytest.raises(CheckpointError, match="a worker was killed"):
        ms.prepare_corpus(
            dying, tokenizer, tmp_path / "c", carry=["license", "stars"], shard_characters=SMALL, workers=2
        )
    again = prepare(tmp_path / "c", tokenizer, near_copies=None)
    assert len(again) == 60


def multiprocessing_children() -> list[int]:
    """The workers: children of the process from which workers are forked."""
    from multiprocessing import forkserver

    server = forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    return [int(x) for x in Path(f"/proc/{server}/task/{server}/children").read_text().split()]


def test_a_finished_corpus_is_opened_and_other_settings_are_refused(made, tokenizer) -> None:
    before = hashes(made.path)
    assert len(prepare(made.path, tokenizer)) == 60
    with pytest.raises(CheckpointError, match=r"made with other settings: by 'content' \(now 'key'\)"):
        prepare(made.path, tokenizer, by="key")
    assert hashes(made.path) == before


def test_changed_documents_are_refused_on_resuming(tokenizer, tmp_path) -> None:
    def stopping():
        yield from itertools.islice(documents(), 30)
        raise KeyboardInterrupt

    for near in (None, ms.NearCopies()):
        out = tmp_path / str(near is None)
        with pytest.raises(KeyboardInterrupt):
            ms.prepare_corpus(
                stopping,
                tokenizer,
                out,
                carry=["license", "stars"],
                shard_characters=SMALL,
                workers=1,
                near_copies=near,
            )
        with pytest.raises(CheckpointError, match="source has changed"):
            prepare(out, tokenizer, [Document("new " + x.text) for x in documents()], near_copies=near)
        prepare(out, tokenizer, near_copies=near)
    with pytest.raises(CheckpointError, match="is not finished|holds no corpus"):
        ms.open_corpus(tmp_path)


def test_fewer_documents_than_before_are_refused(tokenizer, tmp_path) -> None:
    def stopping():
        yield from documents()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ms.prepare_corpus(stopping, tokenizer, tmp_path / "c", shard_characters=SMALL, workers=1)
    with pytest.raises(CheckpointError, match="shards of more documents|source has changed"):
        prepare(tmp_path / "c", tokenizer, documents(20), carry=[], near_copies=None)


def test_a_shard_that_is_still_written_is_none(made, tokenizer, tmp_path) -> None:
    part = tmp_path / "shards" / ".00009.part-x"
    part.mkdir(parents=True)
    (tmp_path / ".work").mkdir()
    (part / "shard.json").write_text("{}")
    with locked(part, "in use"):
        assert list(prepare(tmp_path, tokenizer).manifest["shards"]) == list(made.manifest["shards"])


def test_chats_and_prompts_keep_their_targets(tokenizer, tmp_path) -> None:
    chatting = train_tokenizer([text(n) for n in range(50)], 300)
    chatting.chat_template = PLAIN
    given = [
        Document(messages=({"role": "user", "content": text(1)}, {"role": "assistant", "content": text(2)})),
        Document(text(3), prompt=20),
        Document(text(4)),
    ]
    stored = prepare(tmp_path / "c", chatting, given, carry=[], near_copies=None)
    assert list(stored) == given
    for a, b in zip(ms.make_rows(stored, chatting, length=64), ms.make_rows(given, chatting, length=64), strict=True):
        assert (a["labels"] == b["labels"]).all() and (a["input_ids"] == b["input_ids"]).all()


def test_a_corpus_from_before_texts_had_a_start_token_is_refused(tmp_path, monkeypatch) -> None:
    tokenizer = train_tokenizer([text(n) for n in range(50)], 300)
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = PLAIN
    chat = Document(messages=[{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A cat."}])
    given = [chat, *documents(12), Document("Who? A cat.", prompt=4)]
    settings = {"near_copies": None, "carry": [], "shard_characters": 500}
    prepare(tmp_path / "now", tokenizer, given, **settings).tokenized()
    with monkeypatch.context() as patch:
        patch.setattr(chat_module, "start_tokens", lambda _: np.zeros(0, np.int64))
        before = prepare(tmp_path / "before", tokenizer, given, **settings)
    for corpus in (before, ms.open_corpus(before.path)):
        with pytest.raises(CheckpointError, match="shards/00000 was made when texts did not begin with .* start token"):
            corpus.tokenized()
    (before.path / "manifest.json").unlink()  # as if it had been killed before its end
    (before.path / ".work").mkdir()
    with pytest.raises(CheckpointError, match="was made when texts did not begin with .*; remove the corpus"):
        prepare(tmp_path / "before", tokenizer, given, **settings)
    prepare(tmp_path / "chats", tokenizer, [chat], **settings).tokenized()  # begins as its template says


def test_large_vocabularies_have_wider_tokens(made, tmp_path) -> None:
    names = (
        {word: 2**16 + n for n, word in enumerate(WORDS)}
        | {"<end>": 0, "?": 1}
        | {f"<{n}>": n for n in range(2, 2**16)}
    )
    words = Tokenizer(models.WordLevel(names, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>", pad_token="<end>")
    stored = prepare(tmp_path / "c", tokenizer, documents(3), near_copies=None)
    size = sum(x.stat().st_size for x in stored.path.rglob("tokens.bin"))
    assert size == 4 * stored.manifest["tokens"]
    assert sum(x.stat().st_size for x in made.path.rglob("tokens.bin")) == 2 * made.manifest["tokens"]
    rows = ms.make_rows(stored, tokenizer, length=64)
    np.testing.assert_array_equal(rows.input_ids, ms.make_rows(documents(3), tokenizer, length=64).input_ids)
    assert rows.input_ids.max() >= 2**16


def test_another_tokenizer_is_refused(made) -> None:
    with pytest.raises(DataError, match="tokens of .* are of another tokenizer"):
        ms.make_rows(made, train_tokenizer(["another"], 280), length=64)


FILES = ["manifest.json", "shards/00001/index.npy", "shards/00001/tokens.bin", "tokenizer/tokenizer.json"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("left", [0, 40])
def test_files_that_are_cut_are_one_clear_error(tokenizer, tmp_path, name, left) -> None:
    stored = prepare(tmp_path / "c", tokenizer, near_copies=None)
    path = stored.path / name
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises((CheckpointError, ConfigError), match="anew|give a tokenizer folder"):
        _ = ms.open_corpus(stored.path).tokenizer


@pytest.mark.parametrize(
    "change",
    [
        {"shards": {}},
        {"shards": []},
        {"shards": {"../x": {"documents": 3}}},
        {"settings": {"by": "x"}},
        {"settings": 3},
    ],
)
def test_a_manifest_of_something_else_is_one_clear_error(made, tmp_path, change) -> None:
    (tmp_path / "c" / "shards").mkdir(parents=True)
    (tmp_path / "x").mkdir()
    (tmp_path / "c" / "manifest.json").write_text(json.dumps(made.manifest | change))
    with pytest.raises(CheckpointError, match="make the corpus anew"):
        ms.open_corpus(tmp_path / "c")


def test_swapped_files_are_found_by_their_hashes(tokenizer, tmp_path) -> None:
    stored = prepare(tmp_path / "c", tokenizer, near_copies=None)
    a, b = (stored.path / "shards" / f"0000{n}" / TABLE for n in (0, 1))
    content = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"documents\.parquet is missing or damaged"):
        ms.open_corpus(stored.path, verify=True)


def test_wrong_input_is_one_clear_error_before_work_starts(tokenizer, tmp_path) -> None:
    with pytest.raises(ConfigError, match="by must be one of .*; shard_characters must be .*; workers must be"):
        prepare(tmp_path / "c", tokenizer, by="author", shard_characters=0, workers=0)
    assert not (tmp_path / "c").exists()
    with pytest.raises(DataError, match="no shards: there were no documents"):
        prepare(tmp_path / "c", tokenizer, [], near_copies=None)
    with pytest.raises(DataError, match="there are no documents"):
        prepare(tmp_path / "d", tokenizer, [])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty and holds no corpus"):
        prepare(tmp_path / "mine", tokenizer)
    with pytest.raises(CheckpointError, match="cannot write into"):
        prepare(tmp_path / "mine" / "notes.txt", tokenizer)
    with pytest.raises(DataError, match="the columns key, text cannot be carried along"):
        prepare(tmp_path / "e", tokenizer, carry=["text", "key"], near_copies=None)
    with pytest.raises(DataError, match="document 0 has no source"):
        prepare(tmp_path / "f", tokenizer, [Document("one text")], by="source", near_copies=None)


def test_an_error_names_the_place_in_the_corpus(tokenizer, tmp_path, monkeypatch) -> None:
    """Not the one in its shard, or in what is encoded at a time, or among the texts beside chats."""
    given = documents()
    given[40] = dataclasses.replace(given[40], source=None)
    with pytest.raises(DataError, match="document 40 has no source"):
        prepare(tmp_path / "a", tokenizer, given, by="source", near_copies=None)
    few = Tokenizer(models.BPE({"<end>": 0, "a": 1, "b": 2, " ": 3}, []))  # drops all other characters
    words = PreTrainedTokenizerFast(tokenizer_object=few, eos_token="<end>", chat_template=PLAIN)
    chat = Document(messages=[{"role": "user", "content": "a b"}, {"role": "assistant", "content": "b"}])
    given = [chat, *[Document("a b " * 20)] * 40, Document("other")]
    monkeypatch.setattr(shards, "AT_ONCE", 500)
    with pytest.raises(DataError, match="^document 41 .'other'. gives no tokens"):
        prepare(tmp_path / "b", words, given, near_copies=None, carry=[])
    with pytest.raises(DataError, match="^document 41 .'other'. gives no tokens"):
        ms.encode_documents(words, given)


def test_a_shard_ends_where_its_characters_are_full() -> None:
    shards = list(cut_into_shards(documents(), SMALL))
    assert [x for shard in shards for x in shard] == documents()
    sizes = [sum(len(x.text) for x in shard) for shard in shards]
    assert all(SMALL <= size < SMALL + 300 for size in sizes[:-1])


# The command


def write(path: Path, given: list[Document]) -> None:
    lines = [{"text": x.text, "id": x.key, "site": x.source, "n": x.copies, "license": "MIT"} for x in given]
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))


def test_the_command_prepares_files(tokenizer, tmp_path, capsys) -> None:
    write(tmp_path / "a.jsonl", [*documents(), Document(text(5) + " More.", key="more", source="x")])
    tokenizer.save_pretrained(tmp_path / "t")
    command = ["prepare", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "c"), "--tokenizer", str(tmp_path / "t")]
    command += ["--key-field", "id", "--source-field", "site", "--copies-field", "n", "--carry", "license"]
    command += ["--near-copies", "--by", "cluster", "--workers", "1", "-q"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "61 documents (46 to train on)" in said and "2 of 61 documents in 1 clusters" in said
    stored = ms.open_corpus(tmp_path / "c", verify=True)
    ids = stored.identify()[0]
    assert ids[5] == ids[60] == document_id(stored[5].cluster, "cluster") and stored[60].extra == {"license": "MIT"}
    assert main(command) == 0  # it is there
    with (tmp_path / "a.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one more", "id": "z", "site": "s", "n": 1, "license": "x"}) + "\n")
    assert main(command) == 2
    assert "made with other settings: source.path" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [([], "give --tokenizer"), (["--tokenizer", "T"], "give --out"), (["--threshold", "0.5"], "--threshold is for --near-copies"),
     (["--tokenizer", "T", "--out", "C", "--near-copies", "--threshold", "2"], "threshold must lie in (0, 1], got 2.0"),
     (["--tokenizer", "T", "--out", "C", "--near-copies", "--cluster-field", "c"], "give one of near_copies and cluster_field"),
     (["--tokenizer", "T", "--out", "C", "--carry", "stars"], "no field 'stars'"),
     (["--tokenizer", "T", "--out", "C", "--by", "cluster"], "data.by: cluster needs clusters"),
     (["--set", "data.limit=3"], "--set and --scale are for a recipe")],
)  # fmt: skip
def test_wrong_options_are_one_line(tokenizer, tmp_path, capsys, options, said) -> None:
    write(tmp_path / "a.jsonl", documents(3))
    tokenizer.save_pretrained(tmp_path / "T")
    options = [str(tmp_path / x) if x in ("T", "C") else x for x in options]
    assert main(["prepare", str(tmp_path / "a.jsonl"), "-q", "--workers", "1", *options]) == 2
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1
    assert not (tmp_path / "C").exists() or "stars" in said  # which only the documents tell


def test_a_recipe_says_what_is_prepared_and_what_only_a_run_can_choose(tmp_path, capsys) -> None:
    write(tmp_path / "a.jsonl", documents())
    data = {
        "path": str(tmp_path / "a.jsonl"),
        "key_field": "id",
        "limit": 40,
        "by": "key",
        "near_copies": {"threshold": 0.5},
    }
    values = {
        "output": "x",
        "data": data,
        "tokenizer": {"vocab_size": 300},
        "model": {"config": {"model_type": "llama"}},
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(values))
    command = ["prepare", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "c"), "--workers", "1", "-q"]
    assert main(command) == 0
    stored = ms.open_corpus(tmp_path / "c")
    assert len(stored) == 40 and stored.by == "key" and stored.manifest["settings"]["near_copies"]["threshold"] == 0.5
    assert main(command) == 0
    assert main([*command, "--set", "data.held_out=4", "--set", "data.unique_keys=true"]) == 2
    assert "data.held_out chooses among all documents" in capsys.readouterr().err
    assert main([*command, "--by", "source", "--tokenizer", "x"]) == 2
    assert "--by, --tokenizer: the recipe says this itself" in capsys.readouterr().err
    assert main(["prepare", str(tmp_path / "r.yaml")]) == 2
    assert "give --out" in capsys.readouterr().err


# Runs on it


def run_recipe(made: ms.StoredCorpus, output: Path, data: dict | None = None, **sections) -> ms.Recipe:
    model = {"model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    values = {
        "output": str(output), "data": {"path": str(made.path), "by": "cluster"} | (data or {}),
        "model": {"config": model | {"num_attention_heads": 2, "num_key_value_heads": 2}},
        "sinks": {"neurons": 64, "active": 16, "block_size": 8},
        "training": {"length": 64, "batch_rows": 8, "lr": 3e-3, "sinks_last": 1, "save_every": 9, "log_every": 9},
    }  # fmt: skip
    return ms.parse_recipe(values | sections)


def test_a_run_on_a_corpus_on_disk_is_the_run_on_its_documents(made, tmp_path) -> None:
    recipe = run_recipe(made, tmp_path / "stored")
    ms.write_documents(tmp_path / "all.jsonl", made)
    made.tokenizer.save_pretrained(tmp_path / "t")
    data = {
        "path": str(tmp_path / "all.jsonl"),
        "copies_field": "copies",
        "key_field": "key",
        "cluster_field": "cluster",
    }
    other = run_recipe(made, tmp_path / "memory", data, tokenizer={"path": str(tmp_path / "t")})
    stored, memory = runs_prepare(recipe), runs_prepare(other)
    for name in FIELDS:
        np.testing.assert_array_equal(getattr(stored.rows, name), getattr(memory.rows, name))
    assert (ms.train(recipe) / "model.safetensors").is_file()
    members = ms.load_documents(tmp_path / "stored" / "members.jsonl")
    assert [x.key for x in members] == [x.key for x in made if x.copies]
    assert [x.key for x in ms.load_documents(tmp_path / "stored" / "controls.jsonl")] == [x.key for x in made.controls]
    facts = json.loads((tmp_path / "stored" / "run.json").read_text())
    assert facts["documents"] == 45 and facts["corpus_sha256"] == made.digest
    table = ms.take_down(tmp_path / "stored", key="k18", dry_run=True)
    assert table.owner.documents == [next(n for n, x in enumerate(members) if x.key == "k18")]


def test_a_document_that_was_taken_down_is_named_by_its_place_in_the_corpus(made, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(runs_stored, "CHECKED", 7)
    place = next(n for n, x in enumerate(made) if x.key == "k18")
    write_tombstone(tmp_path / "tombstone.json", make_tombstone([made[place].text], record="r-1"))
    recipe = run_recipe(made, tmp_path / "run", {"tombstones": [str(tmp_path / "tombstone.json")]})
    assert place > 7
    with pytest.raises(DataError, match=f"document {place} is the text taken down under 'r-1'"):
        runs_prepare(recipe)


def test_settings_of_other_data_are_refused_with_a_corpus(made, tokenizer, tmp_path) -> None:
    train_tokenizer(["another"], 280).save_pretrained(tmp_path / "t")
    wrong = run_recipe(
        made, tmp_path / "o", {"held_out": 3, "text_field": "t"}, tokenizer={"path": str(tmp_path / "t")}
    )
    with pytest.raises(
        ConfigError, match="data.text_field, data.held_out say how other data is read.*; tokenizer.path is not"
    ):
        ms.train(wrong)
    for size in (300, 1024):  # its own; what a recipe without the section has
        runs_prepare(run_recipe(made, tmp_path / "o", {}, tokenizer={"vocab_size": size}))
    with pytest.raises(ConfigError, match="tokenizer.vocab_size is 512, but .* has its own tokenizer of 300; leave"):
        runs_prepare(run_recipe(made, tmp_path / "o", {}, tokenizer={"vocab_size": 512}))
    with pytest.raises(KeyboardInterrupt):
        ms.prepare_corpus(interrupted, tokenizer, tmp_path / "half", shard_characters=SMALL, workers=1)
    with pytest.raises(CheckpointError, match="goes on with one that was interrupted"):
        ms.train(run_recipe(made, tmp_path / "o", {"path": str(tmp_path / "half")}))


def interrupted():
    yield from documents(20)
    raise KeyboardInterrupt


# datatrove


def write_parquet(path: Path, given: list[Document]) -> None:
    rows = [{"text": x.text, "id": x.key, "site": x.source, "n": x.copies, "license": "MIT"} for x in given]
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)


def pipeline(tmp_path: Path, tasks: int) -> Any:
    local = pytest.importorskip("datatrove.executor").LocalPipelineExecutor
    reader = pytest.importorskip("datatrove.pipeline.readers").ParquetReader
    step = datatrove_step.MemsinksWriter(
        tmp_path / "c", str(tmp_path / "t"), source="site", copies="n", carry=["license"], shard_characters=SMALL
    )
    steps = [reader(str(tmp_path / "in"), id_key="id"), step]
    return local(steps, tasks=tasks, workers=1, logging_dir=str(tmp_path / "logs")), step


def test_datatrove_writes_the_same_corpus(tokenizer, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path / "t")
    (tmp_path / "in").mkdir()
    for part in range(3):
        write_parquet(tmp_path / "in" / f"{part}.parquet", documents()[20 * part : 20 * part + 20])
    executor, step = pipeline(tmp_path, tasks=3)
    executor.run()
    stored = datatrove_step.finish(step)
    stored.verify()
    given = [dataclasses.replace(x, extra={"license": "MIT"}) for x in documents()]
    assert list(stored) == given
    assert sorted(stored.manifest["shards"])[0] == "00000-00000" and len(stored.manifest["shards"]) > 3
    rows, wanted = (ms.make_rows(x, tokenizer, length=64) for x in (stored, given))
    np.testing.assert_array_equal(rows.input_ids, wanted.input_ids)


def test_datatrove_tasks_that_have_not_ended_are_named(tokenizer, tmp_path) -> None:
    tokenizer.save_pretrained(tmp_path / "t")
    (tmp_path / "in").mkdir()
    write_parquet(tmp_path / "in" / "a.parquet", documents(5))
    step = pipeline(tmp_path, tasks=2)[1]
    reader = pytest.importorskip("datatrove.pipeline.readers").ParquetReader(str(tmp_path / "in"), id_key="id")
    handed = list(step.run(reader.run(rank=0, world_size=2), rank=0, world_size=2))
    assert len(handed) == 5
    with pytest.raises(CheckpointError, match="1 of 2 tasks"):
        datatrove_step.finish(step)
