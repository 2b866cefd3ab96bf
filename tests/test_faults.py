"""A short part of the suite of faults (`make test-faults` runs it whole): kills, full disks, damaged files, generated inputs.

And what it has found: each kind once more, plainly; no pickle is loaded; no path leads out of its folder.
"""

from __future__ import annotations

import ast
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint
import yaml
from faults.commands import COMMANDS, make_base, run
from faults.damage import SCENES, damage_each
from faults.disks import fill_disks, why_not
from faults.inputs import make_places, readers, try_inputs
from faults.kills import kill_often

import memsinks as ms
from memsinks.data.stored import StoredCorpus
from memsinks.errors import CheckpointError, ConfigError, DataError
from memsinks.files import lies_within, verify_files, write_json
from memsinks.removal.erase_files import SinksFile
from memsinks.research.compare.comparison import read_comparison
from memsinks.runs.folder import RunFolder
from memsinks.runs.owners import read_members
from memsinks.runs.recipe import read_recipe, read_sections
from memsinks.runs.staging import finish
from memsinks.training.checkpoint import Checkpoint
from memsinks.training.complete import MARKER, mark_complete, what_is_missing

RECIPES = Path(__file__).parents[1] / "recipes"
SOURCES = Path(__file__).parents[1] / "src" / "memsinks"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return make_base(tmp_path_factory.mktemp("faults") / "base")


@pytest.fixture(scope="module")
def places(base, tmp_path_factory) -> Path:
    return make_places(base, tmp_path_factory.mktemp("places") / "places")


# The suite, a little of each part


@pytest.mark.parametrize(("name", "times"), [("prepare", 3), ("takedown", 3), ("export", 2)])
def test_what_is_killed_ends_with_the_same_bytes(base, tmp_path, name, times) -> None:
    """`train` is in test_resume."""
    found = kill_often(COMMANDS[name], base, tmp_path, times)
    assert not found.faults and found.killed >= times


@pytest.mark.long
@pytest.mark.parametrize("name", ["train", "settle and save"])
def test_training_that_is_killed_ends_with_the_same_bytes(base, tmp_path, name) -> None:
    found = kill_often(COMMANDS[name], base, tmp_path, 3)
    assert not found.faults and found.killed >= 3


def test_a_full_disk_and_a_read_only_folder_are_one_error(base, tmp_path) -> None:
    if reason := why_not(tmp_path / "may"):
        pytest.skip(reason)
    found = fill_disks(COMMANDS["prepare"], base, tmp_path, shares=(0.3,))
    assert not found.faults and found.counts == {"full": 1, "read-only": 1}


def test_damaged_files_are_one_error_or_harmless(base, tmp_path) -> None:
    found = damage_each(SCENES["info"], (base, base), tmp_path, only=("cut", "missing"))
    assert not found.faults and found.by_kind()["refused"] >= 3


@pytest.mark.parametrize("part", range(4))
def test_generated_inputs_are_read_or_refused(places, part) -> None:
    faults = {}
    for reader in readers()[part::4]:
        tried = try_inputs(reader, places, 8)
        assert tried.counts.total() == 8
        faults |= {(reader.name, kind): example for kind, example in tried.faults.items()}
    assert not faults


# What it has found


def test_settings_without_bounds_and_names_that_are_lists_are_refused(tmp_path) -> None:
    recipe = yaml.safe_load((RECIPES / "compare-tinystories.yaml").read_text())
    recipe["roles"]["twin"] = ["twin"]
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ConfigError, match="roles.twin names no arm"):
        read_comparison(tmp_path / "a.yaml")
    recipe["model"]["config"]["hidden_size"] = 2**63
    (tmp_path / "b.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ConfigError, match="below 16,777,216"):
        read_sections(tmp_path / "b.yaml", scale=0.01)


def test_a_marker_with_a_name_that_cannot_be_a_file_is_damaged(tmp_path) -> None:
    write_json(tmp_path / MARKER, {"sha256": {"s(" * 999: "0"}})
    assert "is missing" in str(what_is_missing(tmp_path))


def test_manifests_without_the_hash_of_a_shard_and_sinks_without_their_start_are_damaged(
    base, places, tmp_path
) -> None:
    shutil.copytree(places / "corpus", tmp_path / "corpus")
    manifest = json.loads((tmp_path / "corpus/manifest.json").read_text())
    next(iter(manifest["shards"].values())).pop("documents_sha256")
    write_json(tmp_path / "corpus/manifest.json", manifest)
    with pytest.raises(CheckpointError):
        StoredCorpus(tmp_path / "corpus")
    shutil.copytree(base / "run/model", tmp_path / "model")
    stored = json.loads((tmp_path / "model/sinks/sinks.json").read_text())
    stored["start_std"].pop("0")
    write_json(tmp_path / "model/sinks/sinks.json", stored)
    with pytest.raises(CheckpointError, match="how the sinks of each layer started"):
        SinksFile(tmp_path / "model")


def test_shingles_and_clusters_of_a_killed_preparation_are_checked(base, tmp_path) -> None:
    scene = SCENES["prepare, shards in part"]
    folder = scene.make(base, tmp_path / "place")
    clusters = folder / "corpus/.work/clusters.npy"
    np.save(clusters, np.load(clusters)[::-1])
    ended = run(folder, COMMANDS["prepare"].argv)
    assert ended.code == 2 and "clusters.npy or near_copies.json is damaged" in ended.said


def test_a_corpus_without_its_manifest_is_not_read_as_a_folder_of_tables(base, tmp_path) -> None:
    COMMANDS["prepare"].start(base, tmp_path / "place")
    folder = tmp_path / "place"
    assert run(folder, COMMANDS["prepare"].argv).code == 0
    corpus = ms.open_corpus(folder / "corpus")
    first, second = (folder / f"corpus/shards/0000{n}/documents.parquet" for n in (0, 1))
    shutil.copy(first, second)
    with pytest.raises(CheckpointError, match="does not hold the documents of index.npy"):
        list(corpus)
    (folder / "corpus/tokenizer/tokenizer_config.json").unlink()
    with pytest.raises(CheckpointError, match="tokenizer_config.json is missing or damaged"):
        _ = ms.open_corpus(folder / "corpus").tokenizer
    (folder / "corpus/manifest.json").unlink()
    (folder / "r.yaml").write_text("data: {path: corpus}\nmodel: {config: {model_type: llama}}\noutput: out")
    ended = run(folder, ("train", "r.yaml"))
    assert ended.code == 2 and "manifest.json is missing" in ended.said


def test_a_take_down_does_not_pass_over_half_a_checkpoint(base, tmp_path) -> None:
    """Its state would keep the owner."""
    COMMANDS["takedown"].start(base, tmp_path / "place")
    (tmp_path / "place/run/checkpoints/checkpoint-8/checkpoint.json").unlink()
    ended = run(tmp_path / "place", COMMANDS["takedown"].argv)
    assert ended.code == 2 and "checkpoint-8 is not whole" in ended.said


def test_a_bound_take_down_checks_what_it_puts_in_place(base, tmp_path) -> None:
    folder = SCENES["takedown, bound"].make(base, tmp_path / "place")
    staged = folder / "run/.takedown.bound/files/model/sinks/sinks.safetensors"
    before = (folder / "run/model/sinks/sinks.safetensors").read_bytes()
    content = staged.read_bytes()
    staged.write_bytes(content[:-1])
    ended = run(folder, COMMANDS["takedown"].argv)
    assert ended.code == 2 and "of an interrupted take-down is missing or damaged" in ended.said
    assert (folder / "run/model/sinks/sinks.safetensors").read_bytes() == before
    staged.write_bytes(content)
    assert run(folder, COMMANDS["takedown"].argv).code == 0


def test_members_of_another_run_are_refused(base, tmp_path) -> None:
    shutil.copytree(base / "run", tmp_path / "run")
    documents = ms.load_documents(tmp_path / "run/members.jsonl")
    ms.write_documents(tmp_path / "run/members.jsonl", documents[1:])
    with pytest.raises(CheckpointError, match="is not what this run has written"):
        read_members(tmp_path / "run")


@pytest.mark.parametrize("content", ["", "a: [1", "data: 1", "\x00", "data: {by: 7}\ntraining: {}", "[" * 3000])
def test_a_damaged_recipe_of_a_run_is_one_error(base, tmp_path, content) -> None:
    shutil.copytree(base / "run", tmp_path / "run")
    (tmp_path / "run/recipe.yaml").write_text(content)
    with pytest.raises(CheckpointError, match="recipe.yaml is damaged"):
        read_members(tmp_path / "run")
    (tmp_path / "r.yaml").write_text(content)
    with pytest.raises(ConfigError, match="r.yaml"):
        read_recipe(tmp_path / "r.yaml")


def test_lost_lines_of_metrics_are_said(tmp_path, caplog) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\x80\x02\n{"step": []}\n{"step": 4}\n{"st')
    RunFolder(tmp_path).cut_metrics(4)
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n{"step": 4}\n'
    assert "has 2 of 4 lines" in caplog.text


def test_an_export_does_not_leave_out_a_damaged_tokenizer(base, tmp_path) -> None:
    COMMANDS["export"].start(base, tmp_path / "place")
    (tmp_path / "place/run/model/tokenizer.json").write_text("{")
    ended = run(tmp_path / "place", COMMANDS["export"].argv)
    assert ended.code == 2 and "cannot load a tokenizer" in ended.said and not (tmp_path / "place/clean").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("clusters .csv", b"id,clster\nk1,2,a\n"),
        ("documents .jsonl", b'{"text": "a", "isolation": {}, "key": "k", "source": "s", "copies": 1, "cluster": 1}'),
        ("index of a shard", b"\x93NUMPY\x01\x00\x10\x00{'descr': ('')(\n  "),
        ("config.json", b"null"),
        ("config.json", b'{"model_type": "llama", "hidden_size": null}'),
        ("memsinks.json of an export", b'{"open": ["#"]}'),
        ("router.json", b"null"),
        ("compare.json", b"[]"),
        ("recipe, shrunk", b"model: {config: {model_type: llama, hidden_size: null}}\noutput: o"),
        ("sinks.json", b"[" * 3000),
        ("recipe", b"model: {config: {model_type: [llama]}}\noutput: o"),
        ("run.json", b'{"corpus_sha256": {}}'),
    ],
)
def test_what_generated_inputs_have_found(places, name, content) -> None:
    reader = next(x for x in readers() if x.name == name)
    valid = (places / reader.path).read_bytes()
    (places / reader.path).write_bytes(content)
    try:
        with pytest.raises(ms.MemsinksError):
            reader.read(places)
    finally:
        (places / reader.path).write_bytes(valid)


@pytest.mark.parametrize(
    ("name", "value"), [("taken", []), ("start_std", {"0": "x"}), ("layers", ["0"]), ("sha256", {"a": 1})]
)
def test_values_of_other_types_in_the_settings_of_sinks(places, tmp_path, name, value) -> None:
    shutil.copytree(places / "run/model", tmp_path / "model")
    path = tmp_path / "model/sinks/sinks.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    with pytest.raises(CheckpointError, match=f"{name} cannot be"):
        ms.load(tmp_path / "model")


def test_notes_with_keys_that_are_no_text_stay_out_of_a_take_down(base, tmp_path) -> None:
    COMMANDS["takedown"].start(base, tmp_path / "place")
    (tmp_path / "place/run/notes.jsonl").write_text('{"text": "a note", "key": {}}\n')
    assert run(tmp_path / "place", (*COMMANDS["takedown"].argv, "--dry-run")).code == 0


# No pickle


class _Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_no_code_of_ours_loads_pickles() -> None:
    found = []
    for path in SOURCES.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [x.name for x in node.names] + [getattr(node, "module", None) or ""]
                reader = {"pickle"} if path.name == "complete.py" else set()  # of some names alone
                unsafe_names = {"pickle", "joblib", "dill", "shelve"} - reader
                found += [f"{path}: import {x}" for x in names if x.split(".")[0] in unsafe_names]
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            called, keywords = ast.unparse(node.func), {x.arg: ast.unparse(x.value) for x in node.keywords}
            unsafe = (called == "torch.load" and keywords.get("weights_only") != "True") or (
                called.startswith("yaml.") and "load" in called and called != "yaml.safe_load"
            )
            if unsafe or keywords.get("allow_pickle") == "True":
                found.append(f"{path}:{node.lineno}: {called}")
    assert not found


def test_an_index_of_shards_that_names_anything_else_is_refused(places, tmp_path) -> None:
    folder = Path(shutil.copytree(places / "trainer", tmp_path / "trainer"))
    model = torch.nn.Linear(2, 2)
    torch.distributed.checkpoint.save(
        {"model": model.state_dict(), "step": 3}, checkpoint_id=folder / "shards", no_dist=True
    )
    mark_complete(folder)
    assert what_is_missing(folder) is None
    (folder / "shards/.metadata").write_bytes(pickle.dumps(_Bomb(tmp_path / "went-off")))
    assert "shards/.metadata is damaged" in (what_is_missing(folder) or "")
    mark_complete(folder)  # by whoever put it there
    assert "which no index of DCP does" in (what_is_missing(folder) or "") and not (tmp_path / "went-off").exists()


def test_a_bomb_in_place_of_any_file_does_not_go_off(places, tmp_path) -> None:
    """Each file that a command reads; numpy's files of objects are pickles too."""
    mark = tmp_path / "went-off"
    bomb = pickle.dumps(_Bomb(mark))
    np.save(tmp_path / "objects.npy", np.array([_Bomb(mark)], object), allow_pickle=True)
    for reader in readers():
        path = places / reader.path
        valid = path.read_bytes()
        for content in (bomb, (tmp_path / "objects.npy").read_bytes()):
            path.write_bytes(content)
            try:
                reader.read(places)
            except (CheckpointError, ConfigError, DataError):
                pass
            finally:
                path.write_bytes(valid)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "sinks/sinks.safetensors", "pytorch_model.bin"):
        model = Path(shutil.copytree(places / "run/model", tmp_path / "model", dirs_exist_ok=True))
        (model / name).write_bytes(bomb)
        with pytest.raises(ms.MemsinksError) if name != "pytorch_model.bin" else pytest.MonkeyPatch.context():
            ms.load_tokenizer(model)
            ms.load(model)
        shutil.rmtree(model)
    (tmp_path / "state.pt").write_bytes(bomb)
    with pytest.raises(CheckpointError, match="cannot be read"):
        Checkpoint(tmp_path, 1, {}).load()
    assert not mark.exists()


# Paths


OUTSIDE = ["../secret", "/etc/passwd", "a/../../secret", "link/secret", "..", "\0"]


@pytest.fixture
def inside(tmp_path) -> Path:
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/link").symlink_to(tmp_path)
    (tmp_path / "folder/file").write_text("mine")
    return tmp_path / "folder"


@pytest.mark.parametrize("name", OUTSIDE)
def test_names_that_lead_out_of_a_folder_are_refused(inside, name) -> None:
    assert not lies_within(inside, name) and lies_within(inside, "file") and lies_within(inside, "new/file")
    with pytest.raises(CheckpointError, match="is missing or damaged; mend it"):
        verify_files(inside, {name: "0"}, "mend it")


@pytest.mark.parametrize("name", OUTSIDE)
@pytest.mark.parametrize("part", ["replace", "remove"])
def test_a_plan_of_a_take_down_stays_in_its_folder(inside, name, part) -> None:
    bound = inside / ".takedown.bound"
    (bound / "files").mkdir(parents=True)
    (bound / "plan.json").write_text(json.dumps({"name": "n", "replace": [], "remove": []} | {part: [name]}))
    with pytest.raises(CheckpointError, match="which lies outside the folder"):
        finish(inside)
    assert (inside.parent / "secret").read_text() == "secret"


@pytest.mark.parametrize("name", OUTSIDE[:3])
def test_an_index_of_weights_stays_in_its_folder(base, tmp_path, name) -> None:
    shutil.copytree(base / "run/model", tmp_path / "model")
    shutil.move(tmp_path / "model/model.safetensors", tmp_path / "secret")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": name}}
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(index))
    shutil.rmtree(tmp_path / "model/sinks")
    with pytest.raises(CheckpointError, match="leads out of its folder"):
        ms.load_any(tmp_path / "model")


def test_a_manifest_without_counts_is_damaged(places, tmp_path) -> None:
    shutil.copytree(places / "corpus", tmp_path / "corpus")
    path = tmp_path / "corpus/manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tokens": "many"}))
    with pytest.raises(CheckpointError, match="manifest.json is damaged"):
        ms.open_corpus(tmp_path / "corpus")


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd"])
def test_a_manifest_stays_in_its_folder(places, tmp_path, name) -> None:
    shutil.copytree(places / "corpus", tmp_path / "corpus")
    path = tmp_path / "corpus/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"] = {name: next(iter(manifest["shards"].values()))}
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="manifest.json is damaged"):
        ms.open_corpus(tmp_path / "corpus")


def test_a_statement_stays_in_its_run(places, tmp_path) -> None:
    shutil.copytree(places / "record", tmp_path / "record")
    path = tmp_path / "record/statement.json"
    statement = json.loads(path.read_text())
    statement["predicate"]["files"][0]["path"] = "../../etc/passwd"
    path.write_text(json.dumps(statement))
    checks = ms.verify_record(tmp_path / "record", run=places / "taken")
    assert any(check.ok is False and "must lie within the run" in check.detail for check in checks)


def test_the_page_has_the_counts_of_the_suite() -> None:
    from faults.__main__ import BEGIN, END, PAGE, RESULTS, table

    results = json.loads(RESULTS.read_text())
    assert table(results) == PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip()
