"""Take one out: what is found, what is erased and what is not, the record, faults, and that he cannot come back."""

from __future__ import annotations

import json
import os
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_isolation import EXACT, MIXED, OTHER, PRIVATE, flagged_rows, own_hash, owned_llama, trained
from tiny import sink_llama, tiny_llama
from transformers import TrainingArguments

import memsinks as ms
from memsinks.cli import main
from memsinks.files import file_hash, write_json
from memsinks.removal.erase import blocks_of
from memsinks.removal.tombstone import read_tombstone, shares_words
from memsinks.runs.owners import read_members
from memsinks.runs.recipe import parse_recipe
from memsinks.runs.run import train
from memsinks.runs.takedown_table import format_takedown
from memsinks.sinks.state import named_sinks
from memsinks.training.complete import what_is_missing
from memsinks.training.loop import Training
from memsinks.training.optim import AdamW

ALICE, BOB = "record-8-001", "record-8-002"


@pytest.fixture(scope="session")
def run_with_owners(tmp_path_factory) -> Path:
    """A run in which every document of eight copies has own blocks; do not change it."""
    output = tmp_path_factory.mktemp("owners") / "run"
    recipe = {
        "output": str(output),
        "data": {
            "synthetic": {"stories": 40, "people_per_level": 4, "canaries_per_level": 2, "held_out_stories": 6,
                          "copies": [0, 1, 8]},
            "by": "key",
        },
        "tokenizer": {"vocab_size": 300},
        "model": {"config": {
            "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 2, "tie_word_embeddings": True,
        }},
        "sinks": {"neurons": 256, "active": 16, "block_size": 8, "reserved_blocks": 16},
        "own": {"from_copies": 8},
        "training": {"length": 256, "batch_rows": 8, "lr": 3e-3, "save_every": 2, "log_every": 1, "keep": 9,
                     "sinks_last": 0},
    }  # fmt: skip
    train(parse_recipe(recipe))
    return output


@pytest.fixture
def run(run_with_owners, tmp_path) -> Path:
    return Path(shutil.copytree(run_with_owners, tmp_path / "run"))


def hashes(folder: Path) -> dict[str, bytes]:
    return {x.relative_to(folder).as_posix(): x.read_bytes() for x in sorted(folder.rglob("*")) if x.is_file()}


def rewrite_members(run: Path, documents: list[ms.Document]) -> None:
    """As if the run had been trained on these documents."""
    ms.write_documents(run / "members.jsonl", documents)
    facts = json.loads((run / "run.json").read_text())
    write_json(run / "run.json", facts | {"members_sha256": file_hash(run / "members.jsonl")})


def text_of(run: Path, key: str) -> str:
    return next(x.text for x in ms.load_documents(run / "members.jsonl") if x.key == key)


# In memory


def test_an_erased_owner_was_never_there_bit_for_bit():
    """The model is then the one that was trained with his rows blank, and so is the optimizer where it is his."""
    rows = flagged_rows(MIXED)
    config = owned_llama().sink_state.config
    model, without = trained(rows), trained(ms.shadow_rows(rows, config, [OTHER]))
    erased = ms.erase(model, OTHER, record="request 7")
    assert erased.ids == [OTHER] and erased.own and "own" in str(erased)
    for name, value in model.state_dict().items():
        assert torch.equal(value, without.state_dict()[name]), name
    assert ms.free_blocks(model) == [10, 11]
    model.eval()
    with pytest.raises(ms.DataError, match="taken out \\(request 7\\)"), ms.sinks_open(model, [OTHER]):
        pass
    model.train()
    tokens = torch.arange(6)[None]
    with pytest.raises(ms.DataError, match="request 7"):
        model(input_ids=tokens, document_ids=torch.tensor([OTHER]), exposures=torch.tensor([1]))
    with pytest.raises(ms.DataError, match="taken out already.*request 7"):
        ms.erase(model, OTHER)
    with pytest.raises(ms.ConfigError, match="was taken out"):
        ms.assign(model, [OTHER])


def test_a_state_dict_from_before_does_not_bring_him_back():
    model = trained(flagged_rows(MIXED))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ms.erase(model, OTHER, record="request 7")
    after = {name: value.clone() for name, value in model.state_dict().items()}
    within = torch.nn.Sequential(model)
    for target, given in ((model, before), (within, {f"0.{name}": value for name, value in before.items()})):
        with pytest.raises(ms.CheckpointError, match=r"down that are nobody's .*request 7.*bring him back"):
            target.load_state_dict(given)
        assert all(torch.equal(value, after[name]) for name, value in model.state_dict().items())
    model.load_state_dict(after)
    ms.assign_blocks(model, {})  # frees the blocks of others, with what is in them
    model.load_state_dict(after)
    model.load_state_dict({name: value for name, value in before.items() if "sinks." not in name}, strict=False)


def test_moments_and_gradients_go_with_him_and_nobody_elses():
    model = owned_llama()
    optimizer = AdamW(ms.param_groups(model, 1e-2))
    for parameter in named_sinks(model).values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    before = {name: own_hash(model, owner) for name, owner in (("exact", EXACT), ("private", PRIVATE))}
    ms.erase(model, OTHER, optimizer=optimizer)
    for parameter in named_sinks(model).values():
        state = optimizer.state[parameter]
        assert not state["exp_avg"][10].any() and not state["exp_avg_sq"][10].any() and state["step"][10] == 0
        assert state["exp_avg"][8].any() and state["step"][8] == 1 and not parameter.grad[10].any()
    assert before == {name: own_hash(model, owner) for name, owner in (("exact", EXACT), ("private", PRIVATE))}


@pytest.mark.parametrize("owner", [-1, 2**70, "alice", True, 1.0])
def test_what_is_no_id_is_refused(owner, tmp_path):
    model = sink_llama()
    with pytest.raises(ms.DataError, match="a document id is an int from 0 to 2\\*\\*63 - 1"):
        ms.erase(model, owner)
    with pytest.raises(ms.DataError, match="a document id is an int"):
        ms.take_down(tmp_path, id=owner, documents=[], by="key")
    assert not model.sink_state.taken


def test_an_owner_goes_with_the_documents_within_him():
    model = sink_llama(neurons=96, reserved_blocks=4)
    ms.assign(model, [100, 1])
    ms.assign(model, [], within={1: 100, 2: 100})
    with pytest.raises(ms.DataError, match="id 2 has no blocks of its own, it opens those of \\[100\\]"):
        ms.erase(model, 2)
    assert ms.erase(model, 1).ids == [1]
    assert ms.erase(model, 100).ids == [2, 100]
    assert ms.free_blocks(model) == [8, 9, 10, 11]


def test_hashed_blocks_cost_others():
    model = sink_llama()
    erased = ms.blocks_of(model, 5)
    assert not erased.own
    others = list(range(15, 200))
    shares = ms.collateral(model, erased, others)
    assert shares.max() > 0 and (ms.collateral(owned_llama(), ms.blocks_of(owned_llama(), EXACT), others) == 0).all()
    single = sink_llama(block_size=1, routing="bernoulli")
    with pytest.raises(ms.ConfigError, match="no own blocks.*all texts share"):
        ms.erase(single, 5)


# In a run folder


def test_one_is_taken_out_and_nothing_else_moves(run, capsys):
    before, text = hashes(run), text_of(run, ALICE)
    assert main(["takedown", str(run), "--key", ALICE]) == 0
    shown = capsys.readouterr().out
    assert "collateral: none" in shown and "owner, placebo blocks closed" in shown and "keep every bit" in shown
    after = hashes(run)
    changed = {name for name in before if before[name] != after.get(name)}
    assert changed == {"members.jsonl", "model/sinks/sinks.json", "model/sinks/sinks.safetensors"} | {
        name for name in before if name.startswith("checkpoints/") and name.split("-")[1][0] not in "24"
    }
    assert all(text.encode() not in value for value in after.values())
    old = {
        name: x for name, x in load_file(Path(_write(run, before)) / "sinks.safetensors").items() if "sinks." in name
    }
    new = load_file(run / "model/sinks/sinks.safetensors")
    model = ms.load(run / "model")
    alice = ms.document_id(ALICE, "key")
    moved = {int(b) for name in old for b in (old[name] != new[name]).flatten(1).any(1).nonzero()[:, 0]}
    assert len(moved) == 1 and moved <= set(ms.free_blocks(model))
    assert model.sink_state.taken.keys() == {alice}
    [record] = (run / "takedowns").iterdir()
    assert main(["verify", str(record), "--run", str(run)]) == 0
    statement = json.loads((record / "statement.json").read_text())["predicate"]
    audit = statement["audit"]
    own = audit["before"]["owner"]["loss"]
    assert audit["after"]["owner"]["loss"] == pytest.approx(audit["before"]["owner, sinks closed"]["loss"], abs=1e-6)
    assert audit["placebo"]["owner"]["loss"] == pytest.approx(own, abs=1e-6) and audit["after"]["owner"]["loss"] > own
    others = "others, own sinks open"
    assert audit["before"][others] == audit["after"][others]
    (run / "model/sinks/sinks.safetensors").write_bytes(before["model/sinks/sinks.safetensors"])
    assert main(["verify", str(record), "--run", str(run)]) == 2


def _write(run: Path, before: dict[str, bytes]) -> str:
    folder = run.parent / "before"
    folder.mkdir()
    (folder / "sinks.safetensors").write_bytes(before["model/sinks/sinks.safetensors"])
    return str(folder)


def test_a_dry_run_shows_and_changes_nothing(run, capsys):
    before = hashes(run)
    assert main(["takedown", str(run), "--key", ALICE, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "nothing was changed" in shown and "members.jsonl" in shown and hashes(run) == before


def test_moments_in_checkpoints_go_too(run):
    ms_folder = sorted((run / "checkpoints").iterdir())[-1]
    sinks = {x["name"]: x["params"] for x in _state(ms_folder)["optimizer"]["param_groups"]}["sinks"]
    block = ms.load(run / "model").sink_state.table.own_blocks(ms.document_id(ALICE, "key"))[0]
    before = [_state(ms_folder)["optimizer"]["state"][n]["exp_avg"].clone() for n in sinks]
    assert any(x[block].any() for x in before)
    ms.take_down(run, key=ALICE)
    state = _state(ms_folder)
    for number, old in zip(sinks, before, strict=True):
        new = state["optimizer"]["state"][number]["exp_avg"]
        assert not new[block].any()
        old[block] = 0
        assert torch.equal(old, new)


def _state(folder: Path) -> dict:
    return torch.load(folder / "state.pt", weights_only=True)


def test_he_cannot_come_back(run, run_with_owners, tmp_path):
    text = text_of(run, ALICE)
    ms.take_down(run, key=ALICE)
    with pytest.raises(ms.DataError, match="taken out already, see .*takedowns"):
        ms.take_down(run, key=ALICE)
    [record] = (run / "takedowns").iterdir()
    for changed in (text, text.upper().replace(" ", "\u00a0")):
        (tmp_path / "new.jsonl").write_text(
            json.dumps({"text": changed}) + "\n" + json.dumps({"text": "other words"}) + "\n"
        )
        recipe = {
            "output": str(tmp_path / "again"),
            "data": {"path": str(tmp_path / "new.jsonl"), "tombstones": [str(run)]},
            "model": {
                "config": {"model_type": "llama", "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
            },
        }
        with pytest.raises(ms.DataError, match=f"document 0 is the text taken down under '{record.name}'"):
            train(parse_recipe(recipe))


def test_copies_of_others_are_shown_and_go_only_if_asked(run, capsys):
    members = ms.load_documents(run / "members.jsonl")
    alice = next(x for x in members if x.key == ALICE)
    copied = [
        ms.Document(alice.text.replace(" ", "  ").upper(), key=x.key, copies=8) if x.key == BOB else x for x in members
    ]
    rewrite_members(run, copied)
    assert main(["takedown", str(run), "--key", ALICE, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert f"key {BOB}: normal" in shown and "--copies" in shown
    done = ms.take_down(run, key=ALICE, copies=True)
    assert set(done.owner.ids) == {ms.document_id(x, "key") for x in (ALICE, BOB)}
    assert ms.load(run / "model").sink_state.taken.keys() == set(done.owner.ids)


@pytest.mark.parametrize("left", ["checkpoints alone", "the model, killed before run.json"])
def test_a_run_that_is_not_finished_is_refused_until_it_is(run, left, monkeypatch):
    values = yaml.safe_load((run / "recipe.yaml").read_text()) | {"output": str(run)}
    (run / "recipe.yaml").write_text(yaml.safe_dump(values))
    facts = json.loads((run / "run.json").read_text())
    write_json(run / "run.json", {name: value for name, value in facts.items() if name != "seconds"})
    if left == "checkpoints alone":
        shutil.rmtree(run / "model")
    before, update, tried = hashes(run), Training.update, []

    def refused(**asked) -> None:
        with pytest.raises(
            ms.CheckpointError, match="is not finished .* being trained; .*memsinks train RECIPE --resume"
        ):
            ms.take_down(run, **asked)

    def update_and_try(self, parts):
        tried.append(refused(key=ALICE))
        return update(self, parts)

    refused(key=ALICE)
    refused(key=ALICE, dry_run=True)
    refused(key=ALICE, documents=ms.load_documents(run / "members.jsonl"), by="key")
    assert hashes(run) == before
    monkeypatch.setattr(Training, "update", update_and_try)
    train(parse_recipe(values), resume=True)
    assert tried, "no step was left to try a take-down in"
    done = ms.take_down(run, key=ALICE)
    assert done.erased["model"] and any("checkpoints/" in x.path and x.fate == "rewritten" for x in done.fates.files)
    after = hashes(run)
    train(parse_recipe(values), resume=True)
    assert hashes(run) == after, "a finished run gets no new checkpoints"


def test_who_cannot_be_taken_out(run, tmp_path):
    for asked, message in (
        ({"key": "record-8-0001"}, "no document of the run has the key 'record-8-0001'; did you mean 'record-8-001'"),
        ({"key": "record-1-001"}, "has no sinks: each text was met less than 2 times.*private"),
        ({"id": 5}, "no document of the run has the id 5"),
        ({"text": "never there"}, "the text is none of the run's"),
    ):
        with pytest.raises(ms.DataError, match=message):
            ms.take_down(run, **asked)
    for asked in ({}, {"key": "a", "source": "b"}):
        with pytest.raises(ms.ConfigError, match="give one of key, id, source and text"):
            ms.take_down(run, **asked)
    with pytest.raises(ms.CheckpointError, match="there is no folder"):
        ms.take_down(tmp_path / "nowhere", key="a")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ms.CheckpointError, match="not the folder of a finished run"):
        ms.take_down(tmp_path / "empty", key="a")
    (run / "model/sinks/sinks.safetensors").write_bytes(b"damaged")
    with pytest.raises(ms.CheckpointError, match="SHA-256"):
        ms.take_down(run, key=ALICE)


def test_by_source_many_documents_go_at_once(run):
    done = ms.take_down(run, text=text_of(run, ALICE))
    assert done.owner.ids == [ms.document_id(ALICE, "key")] and done.owner.name not in ("", ALICE)


def test_hashed_blocks_need_a_permission(tiny_run, tmp_path):
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    members = ms.load_documents(run / "members.jsonl")
    text = next(x.text for x in members if x.copies == 8)
    with pytest.raises(
        ms.DataError, match="has no blocks of its own: .* other documents would lose up to .*--collateral"
    ):
        ms.take_down(run, text=text)
    before = {name: value.clone() for name, value in named_sinks(ms.load(run / "model")).items()}
    done = ms.take_down(run, text=text, most_collateral=1.0, repair_passes=40)
    assert max(done.collateral.values()) > 0 and done.record is not None
    after = done.audit["after"]
    lost = after["others, own sinks open"]["loss"] - done.audit["before"]["others, own sinks open"]["loss"]
    assert after["others, repaired"]["loss"] < after["others, own sinks open"]["loss"] - lost / 2
    [erased] = done.erased["model"]
    for name, value in named_sinks(ms.load(run / "model")).items():
        layer = int(name.split(".layers.")[1].split(".")[0])
        rest = [x for x in range(len(value)) if x not in erased.blocks[layer]]
        assert torch.equal(value[rest], before[name][rest]), "only erased blocks learn"
    assert "others, repaired" in format_takedown(done) and all(
        x.ok is not False for x in ms.verify_record(done.record, run=run)
    )


def test_a_repair_that_cannot_be_is_refused_before_anything_is_changed(run, tmp_path):
    before = hashes(run)
    with pytest.raises(ms.ConfigError, match="repair_passes must be"):
        ms.take_down(run, key=ALICE, repair_passes=-1)
    members, _, _ = read_members(run)
    (run / "recipe.yaml").rename(tmp_path / "recipe.yaml")
    with pytest.raises(ms.ConfigError, match="no recipe.yaml .* others cannot be repaired"):
        ms.take_down(run, key=ALICE, documents=members, by="key", repair_passes=2)
    (tmp_path / "recipe.yaml").rename(run / "recipe.yaml")
    assert hashes(run) == before


def test_folders_elsewhere_are_looked_through(run, tmp_path):
    model = ms.load(run / "model")
    alice = ms.document_id(ALICE, "key")
    ms.export(model, tmp_path / "elsewhere/opened", open={"alice": alice}, verify=False)
    ms.export(model, tmp_path / "elsewhere/closed", verify=False)
    ms.save_sinks(model, tmp_path / "elsewhere/sinks-alone")
    done = ms.take_down(run, key=ALICE, also=[tmp_path / "elsewhere"])
    names = {Path(folder).name: what for folder, what in done.elsewhere.items()}
    assert set(names) == {"opened", "sinks-alone"} and "delete it" in names["opened"]


def test_copies_from_before_and_after_blocks_were_added(tmp_path):
    documents = [ms.Document(f"{name} lives in the {name} house by the sea", key=name, copies=6) for name in "ab"]
    known = {"documents": documents, "by": "key"}
    a, b = (ms.document_id(x.key, "key") for x in documents)
    model = sink_llama(torch.float32, neurons=96, reserved_blocks=4, shared="none")
    ms.assign(model, [a])
    model.save_pretrained(tmp_path / "older/model")
    sink_llama(torch.float32, neurons=96, reserved_blocks=4, shared="none", seed=1).save_pretrained(
        tmp_path / "older/another"
    )
    ms.grow(model, 2)
    ms.assign(model, [b])
    model.save_pretrained(tmp_path / "run/model")
    ms.grow(model, 1)
    model.save_pretrained(tmp_path / "newer")
    also = [tmp_path / "older", tmp_path / "newer"]

    def found(key: str) -> dict[str, str]:
        plan = ms.take_down(tmp_path / "run", key=key, dry_run=True, also=also, **known)
        return {Path(folder).relative_to(tmp_path).as_posix(): what for folder, what in plan.elsewhere.items()}

    assert found("a") == {
        "older/model": "the sinks of the same model, with 12 blocks instead of 14: take the owner out there too",
        "newer": "the sinks of the same model, with 15 blocks instead of 14: take the owner out there too",
    }
    assert "from before the owner had blocks of his own" in found("b")["older/model"]
    [block] = model.sink_state.table.own_blocks(a)
    done = ms.take_down(tmp_path / "older", key="a", **known)
    assert done.erased["model"][0].blocks == {0: [block], 1: [block]}
    older = ms.load(tmp_path / "older/model")
    assert all(not x[block].any() for name, x in named_sinks(older).items() if name.endswith("down"))
    assert set(found("a")) == {"newer"}


def test_checkpoints_of_the_trainer(tmp_path, caplog):
    """A folder of one's own training: the documents are given, the optimizer of each checkpoint is rewritten."""
    documents = [
        ms.Document(f"{name} lives in the {name} house by the sea and sings", key=name, copies=6) for name in "abcd"
    ]
    tokenizer = ms.train_tokenizer([x.text for x in documents], 300)
    model = sink_llama(torch.float32, neurons=64, active=16, block_size=8, reserved_blocks=4)
    model.resize_token_embeddings(len(tokenizer))
    ids = [ms.document_id(x.key, "key") for x in documents]
    ms.assign(model, ids)
    rows = ms.make_rows(documents, tokenizer, length=32, by="key", one_document_per_row=True)
    arguments = TrainingArguments(
        str(tmp_path / "out"),
        per_device_train_batch_size=4,
        save_steps=2,
        num_train_epochs=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    ms.SinkTrainer(model, arguments, train_dataset=rows).train()
    checkpoints = sorted((tmp_path / "out").glob("checkpoint-*"))
    assert checkpoints
    with caplog.at_level("WARNING", "memsinks"):
        done = ms.take_down(tmp_path / "out", key="b", documents=documents, by="key")
    assert not caplog.records
    assert set(done.erased) == {x.name for x in checkpoints}
    for checkpoint in checkpoints:
        again = ms.load(checkpoint)
        assert what_is_missing(checkpoint) is None, "training goes on from it"
        assert again.sink_state.taken.keys() == {ids[1]}
        [block] = model.sink_state.table.own_blocks(ids[1])
        assert all(not value[block].any() for name, value in named_sinks(again).items() if name.endswith("down"))
        state = torch.load(checkpoint / "optimizer.pt", weights_only=True)
        group = next(x for x in state["param_groups"] if x["name"] == "sinks")
        assert all(not state["state"][n]["exp_avg"][block].any() for n in group["params"])
    state = max(checkpoints, key=lambda x: int(x.name.split("-")[1])) / "trainer_state.json"
    steps = json.loads(state.read_text())["max_steps"]
    write_json(state, json.loads(state.read_text()) | {"max_steps": steps + 1})
    ms.take_down(tmp_path / "out", key="c", documents=documents, by="key", dry_run=True)
    assert f"is of step {steps} of {steps + 1}: if that training goes on, stop it" in caplog.text


# Faults


@pytest.mark.parametrize("after", range(6))
def test_cut_off_while_files_are_put_in_place(run, after, monkeypatch):
    """Whatever was put in place when the process died, the next take-down finishes the rest."""
    from memsinks.runs import staging

    replace, done = staging.os.replace, []

    def dies(*where):
        if len(done) == after:
            raise KeyboardInterrupt
        done.append(where)
        replace(*where)

    monkeypatch.setattr(staging.os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        ms.take_down(run, key=ALICE)
    monkeypatch.undo()
    assert main(["takedown", str(run), "--key", ALICE]) == 0
    [record] = (run / "takedowns").iterdir()
    assert main(["verify", str(record), "--run", str(run)]) == 0
    assert not list(run.glob(".takedown*")) and ms.load(run / "model").sink_state.taken


def test_a_folder_that_cannot_be_written_keeps_everything(run, monkeypatch):
    from memsinks.runs import takedown

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    before = hashes(run)
    monkeypatch.setattr(takedown, "write_record", full)
    with pytest.raises(ms.CheckpointError, match="No space left on device.*nothing there was changed"):
        ms.take_down(run, key=ALICE)
    assert hashes(run) == before


# What a reader of the code found


def test_an_export_within_the_run_goes_too(run):
    model = ms.load(run / "model")
    ms.export(model, run / "export", open={"alice": ms.document_id(ALICE, "key")}, verify=False)
    ms.export(model, run / "closed", verify=False)
    ms.take_down(run, key=ALICE)
    assert not (run / "export").exists() and (run / "closed/model.safetensors").is_file()


def test_what_cannot_be_rewritten_is_refused_or_named(run, tmp_path, capsys):
    text = text_of(run, ALICE)
    (run / "notes.md").write_text(f"She wrote: {text}")
    (run / "wide.txt").write_bytes(text.encode("utf-16"))
    (run / "quoted.jsonl").write_text(
        json.dumps({"text": f"{text}\n", "n": 1}) + "\r\n\r\n" + json.dumps({"text": "x"}) + "\n"
    )
    ms.take_down(run, key=ALICE)
    [record] = (run / "takedowns").iterdir()
    fates = {x["path"]: x for x in json.loads((record / "statement.json").read_text())["predicate"]["files"]}
    assert "QUOTES THE TEXT" in fates["notes.md"]["why"] and "not UTF-8" in fates["wide.txt"]["why"]
    assert fates["quoted.jsonl"]["fate"] == "rewritten" and '"x"' in (run / "quoted.jsonl").read_text()
    assert fates["model/config.json"]["fate"] == "untouched"
    (run / "link").symlink_to(tmp_path)
    with pytest.raises(ms.CheckpointError, match="is a link"):
        ms.take_down(run, key=BOB)
    (run / "link").unlink()
    shutil.copy(run / "model/sinks/sinks.safetensors", run / "adapter_model.safetensors")
    with pytest.raises(ms.CheckpointError, match="holds sinks .* without the settings"):
        ms.take_down(run, key=BOB)


def test_somebody_elses_line_of_the_same_text_stays(run):
    members = ms.load_documents(run / "members.jsonl")
    alice = next(x for x in members if x.key == ALICE)
    twice = [ms.Document(alice.text, key=BOB, copies=8) if x.key == BOB else x for x in members]
    rewrite_members(run, twice)
    done = ms.take_down(run, key=ALICE)
    assert [copy.kind for copy in done.owner.copies] == ["exact"]
    assert [x.key for x in ms.load_documents(run / "members.jsonl") if x.text == alice.text] == [BOB]
    ms.take_down(run, key=BOB)
    for record in (run / "takedowns").iterdir():
        assert main(["verify", str(record), "--run", str(run)]) == 0


@pytest.mark.parametrize("after", ["model", "z"])
def test_blocks_that_were_assigned_later_are_not_looked_for_among_hashed_ones(tmp_path, after):
    documents = [ms.Document(f"{name} lives in the {name} house by the sea", key=name, copies=6) for name in "ab"]
    model = sink_llama(torch.float32, neurons=96, reserved_blocks=4, shared="none")
    model.save_pretrained(tmp_path / "checkpoint-1")
    ms.assign(model, [ms.document_id("a", "key")])
    model.save_pretrained(tmp_path / after)
    before = load_file(tmp_path / "checkpoint-1/sinks/sinks.safetensors")
    ms.take_down(tmp_path, key="a", documents=documents, by="key")
    after = load_file(tmp_path / "checkpoint-1/sinks/sinks.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert ms.load(tmp_path / "checkpoint-1").sink_state.taken


def test_an_author_goes_with_his_pages_and_a_page_says_what_stays(tmp_path):
    author = ms.document_id("author", "key")
    documents = [ms.Document(f"page {name} of the long book about the sea", key=name, copies=6) for name in "abc"]
    ids = [ms.document_id(x.key, "key") for x in documents]
    model = sink_llama(torch.float32, neurons=96, reserved_blocks=4, shared="none")
    ms.assign(model, [author, ids[0]])
    ms.assign(model, [ids[2]], within={ids[0]: author, ids[1]: author})
    model.save_pretrained(tmp_path / "model")
    planned = ms.take_down(tmp_path, key="a", documents=documents, by="key", dry_run=True)
    [erased] = planned.erased["model"]
    assert erased.above == (author,) and "stays" in str(erased)
    done = ms.take_down(tmp_path, key="author", documents=documents, by="key")
    assert done.owner.documents == [0, 1] and done.erased["model"][0].ids == sorted([author, *ids[:2]])
    assert ms.load(tmp_path / "model").sink_state.taken.keys() == {author, *ids[:2]}


def test_collateral_counts_the_union_of_several_ids(tmp_path):
    documents = [
        ms.Document(f"text number {n} about the sea", key="many" if n < 20 else f"k{n}", copies=6) for n in range(40)
    ]
    model = sink_llama(torch.float32, neurons=256, shared="none")
    model.save_pretrained(tmp_path / "model")
    planned = ms.take_down(tmp_path, key="many", documents=documents, by="content", dry_run=True)
    assert max(planned.collateral.values()) > 0.5


def test_an_author_is_audited_with_his_pages(tmp_path):
    """Whatever the order of ids: a page without blocks of its own may come before the author."""
    documents = [ms.Document(f"page {name} of the long book about the sea", key=name, copies=6) for name in "abcdef"]
    tokenizer = ms.train_tokenizer([x.text for x in documents], 300)
    author = next(x for x in (ms.document_id(f"author {n}", "key") for n in range(99)) if x > 2**62)
    pages = [x for x in (ms.document_id(x.key, "key") for x in documents) if x < author]
    assert pages
    model = sink_llama(torch.float32, neurons=96, reserved_blocks=4, shared="none")
    model.resize_token_embeddings(len(tokenizer))
    ms.assign(model, [author], within=dict.fromkeys(pages, author))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    copied = Path(shutil.copytree(tmp_path, tmp_path.with_name("copied")))
    done = ms.take_down(tmp_path, id=author, documents=documents, by="key")
    assert done.audit["after"]["owner"]["documents"] == len(pages) and done.record is not None
    (copied / "notes.md").write_text(documents[0].text)
    unknown = ms.take_down(copied, id=author, documents=[], by="key")
    [fate] = [x for x in unknown.fates.files if x.path == "notes.md"]
    assert "none of his texts is known" in fate.why and not unknown.audit
    assert all(x.ok is not False for x in ms.verify_record(unknown.record, run=copied))
    for name, value in named_sinks(ms.load(tmp_path / "model")).items():
        assert torch.equal(value, named_sinks(ms.load(copied / "model"))[name])


def _folder(tmp_path: Path, documents: list[ms.Document], name: str = "model") -> Path:
    """A folder with a model in which everybody by key has own blocks."""
    model = sink_llama(torch.float32, neurons=96, reserved_blocks=4, shared="none")
    ms.assign(model, {ms.document_id(x.key, "key"): None for x in documents})
    model.save_pretrained(tmp_path / name)
    return tmp_path


def test_nobody_else_is_at_work_from_the_first_look_to_the_last_file(run, monkeypatch):
    """The later of two would put files in place that it had read before the earlier one was done."""
    from memsinks.runs import takedown

    plan, tried = takedown._planned, []

    def planned(*arguments):
        with pytest.raises(ms.CheckpointError, match="is locked: a training or another take-down"):
            ms.take_down(run, key=BOB)
        tried.append(BOB)
        return plan(*arguments)

    monkeypatch.setattr(takedown, "_planned", planned)
    ms.take_down(run, key=ALICE)
    assert tried == [BOB] and list(ms.load(run / "model").sink_state.taken) == [ms.document_id(ALICE, "key")]


def test_a_record_holds_only_while_nobody_brings_him_back(run, tmp_path):
    """Files that another take-down made of those from before do not count as what became of them later."""
    other = Path(shutil.copytree(run, tmp_path / "other"))
    ms.take_down(run, key=ALICE)
    ms.take_down(other, key=BOB)
    [record], [of_bob] = (run / "takedowns").iterdir(), (other / "takedowns").iterdir()
    shutil.copytree(of_bob, run / "takedowns" / of_bob.name)
    shutil.copytree(other / "model/sinks", run / "model/sinks", dirs_exist_ok=True)
    failed = [x.name for x in ms.verify_record(record, run=run) if x.ok is False]
    assert "file model/sinks/sinks.safetensors" in failed


def test_lines_are_his_by_what_they_say_of_it(tmp_path):
    text, other = "Ann lives in the old house by the sea", "Ben lives in a new flat near the station"
    documents = [ms.Document(text, key="a", source="s", copies=6), ms.Document(other, key="b", source="t", copies=6)]
    run = _folder(tmp_path, documents)
    rows = [
        {"text": text, "source": "s"},
        {"text": text.upper(), "key": "a"},
        {"text": text},
        {"text": text, "source": "t"},
        {"text": text, "key": "b"},
        {"text": other, "answer": f"She said: {text}"},
    ]
    (run / "rows.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    done = ms.take_down(run, key="a", documents=documents, by="key")
    assert [json.loads(x) for x in (run / "rows.jsonl").read_text().splitlines()] == rows[3:]
    [fate] = [x for x in done.fates.files if x.path == "rows.jsonl"]
    assert "3 lines that are not his by text, key and source quote him and stay" in fate.why


def test_a_line_that_says_more_than_the_documents_is_his(tmp_path):
    text, other = "Ann lives in the old house by the sea", "Ben lives in a new flat near the station"
    documents = [ms.Document(text, key="a", copies=6), ms.Document(other, key="b", copies=6)]
    run = _folder(tmp_path, documents)
    rows = [{"text": text, "key": "a", "source": "web"}, {"text": text, "key": None}, {"text": "ok", "n": "bad \ud83d"}]
    (run / "rows.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows))
    ms.take_down(run, key="a", documents=documents, by="key")
    assert [json.loads(x) for x in (run / "rows.jsonl").read_text().splitlines()] == rows[2:]


def test_by_content_a_text_is_his_whatever_its_line_says(tmp_path):
    documents = [ms.Document(f"{x} lives in the {x} house by the sea", copies=6) for x in "ab"]
    model = sink_llama(torch.float32, neurons=96, reserved_blocks=4, shared="none")
    ms.assign(model, [ms.document_id(documents[0].text)])
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"text": documents[0].text, "source": "web"}) + "\n")
    ms.take_down(tmp_path, text=documents[0].text, documents=documents, by="content")
    assert not (tmp_path / "rows.jsonl").read_text()


def test_an_audit_of_others_stays_where_a_short_text_stands_within(tmp_path):
    documents = [
        ms.Document("Yes.", key="a", copies=6),
        ms.Document("yes, he said in the old house", key="b", copies=6),
    ]
    run = _folder(tmp_path, documents)
    for name, text in (("of others", documents[1].text), ("of his", "yes")):
        (run / name).mkdir()
        (run / name / "audit.json").write_text("{}")
        (run / name / "documents.jsonl").write_text(json.dumps({"document": text}) + "\n")
    ms.take_down(run, key="a", documents=documents, by="key")
    assert (run / "of others/audit.json").exists() and not (run / "of his").exists()


def test_others_without_blocks_are_no_hindrance(tmp_path):
    """In a model of owners alone, documents of others have none: there is nothing of theirs to measure."""
    documents = [ms.Document(f"{x} lives in the {x} house by the sea", key=x, copies=6) for x in "abc"]
    tokenizer = ms.train_tokenizer([x.text for x in documents], 300)
    model = tiny_llama(torch.float32, vocab_size=len(tokenizer))
    ms.add_owners(model, ["a", "b"], by="key")
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    done = ms.take_down(tmp_path, key="a", documents=documents, by="key")
    assert done.audit["before"]["others, own sinks open"]["documents"] == 1


def test_copies_go_beside_the_pages_of_an_owner(tmp_path):
    author, other = ms.document_id("author", "key"), ms.document_id("c", "key")
    documents = [ms.Document(f"page {x} of the long book about the sea", key=x, copies=6) for x in "ab"]
    documents.append(ms.Document(documents[0].text.upper(), key="c", copies=6))
    model = sink_llama(torch.float32, neurons=96, reserved_blocks=4, shared="none")
    ms.assign(model, [author, other], within={ms.document_id(x, "key"): author for x in "ab"})
    model.save_pretrained(tmp_path / "model")
    assert ms.take_down(tmp_path, key="author", documents=documents, by="key", copies=True).owner.documents == [0, 1, 2]


def test_earlier_checkpoints_close_his_pages_too_and_a_killed_one_is_passed_over(tmp_path):
    author, page = ms.document_id("author", "key"), ms.document_id("a", "key")
    documents = [ms.Document("page a of the long book about the sea", key="a", copies=6)]
    model = sink_llama(torch.float32, neurons=96, reserved_blocks=4, shared="none")
    model.save_pretrained(tmp_path / "before")
    ms.assign(model, [author], within={page: author})
    model.save_pretrained(tmp_path / "model")
    (tmp_path / ".takedown.begun/files/model/sinks").mkdir(parents=True)
    shutil.copy(tmp_path / "model/sinks/sinks.json", tmp_path / ".takedown.begun/files/model/sinks")
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3/memsinks-complete.json").write_text("{}")
    ms.take_down(tmp_path, key="author", documents=documents, by="key", dry_run=True)
    ms.take_down(tmp_path, key="author", documents=documents, by="key")
    assert ms.load(tmp_path / "before").sink_state.taken.keys() == {author, page}


def test_chats_completions_and_short_texts_are_found(tmp_path):
    chat = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "Ann, of the old house."}]
    documents = [
        ms.Document(messages=chat, key="a", copies=6),
        ms.Document("Where is Ann? In the house by the sea.", prompt=14, key="a", copies=6),
        ms.Document("Ann Lee-Park.", key="a", copies=6),
        ms.Document("\u5b89\u662f\u8c01", key="a", copies=6),
        ms.Document("Ben lives in a new flat near the station", key="b", copies=6),
    ]
    run = _folder(tmp_path, documents)
    line = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day"}]}
    (run / "chats.jsonl").write_text(json.dumps({"messages": chat}) + "\n" + json.dumps(line) + "\n")
    pair = {"prompt": "Where is Ann? ", "completion": "In the house by the sea."}
    (run / "pairs.jsonl").write_text(json.dumps(pair) + "\n")
    for name, content in (
        ("short.md", "as ann  lee-park\tsaid"),
        ("chinese.md", "\u6211\u95ee\u5b89\u662f\u8c01\u5462"),
        ("middle.md", "Joann Lee-Parker"),
    ):
        (run / name).write_text(content)
    done = ms.take_down(run, key="a", documents=documents, by="key")
    fates = {x.path: x for x in done.fates.files}
    assert [json.loads(x) for x in (run / "chats.jsonl").read_text().splitlines()] == [line]
    assert (run / "pairs.jsonl").read_text() == ""
    assert all("QUOTES THE TEXT" in fates[x].why for x in ("short.md", "chinese.md"))
    assert fates["middle.md"].why == "the text does not stand in it"


def test_a_folder_that_cannot_be_listed_is_not_passed_over(run, monkeypatch):
    (run / "hidden").mkdir()
    scandir = os.scandir

    def listed(path):
        if Path(path).name == "hidden":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", listed)
    with pytest.raises(ms.CheckpointError, match="hidden cannot be listed .Permission denied., and he may be in it"):
        ms.take_down(run, key=ALICE)


def test_places_are_looked_at_before_anything_is_in_place(run, tmp_path, monkeypatch):
    before = hashes(run)
    (tmp_path / "elsewhere").mkdir()
    (run / "takedowns").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ms.CheckpointError, match="takedowns is a link that leads out .* Nothing was changed"):
        ms.take_down(run, key=ALICE)
    (run / "takedowns").unlink()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "sinks" and access(path, mode))
    with pytest.raises(ms.CheckpointError, match="sinks cannot be written; make it writable. Nothing was changed"):
        ms.take_down(run, key=ALICE)
    assert hashes(run) == before and not list(run.glob(".takedown*"))


def test_who_may_read_a_file_stays(run):
    (run / "members.jsonl").chmod(0o600)
    ms.take_down(run, key=ALICE)
    assert (run / "members.jsonl").stat().st_mode & 0o777 == 0o600


def test_one_who_came_back_gets_another_record(tmp_path):
    documents = [ms.Document(f"{x} lives in the {x} house by the sea", key=x, copies=6) for x in "ab"]
    run = _folder(tmp_path, documents)
    first = ms.take_down(run, key="a", documents=documents, by="key").record
    assert first is not None
    kept = hashes(first)
    _folder(run, documents, "copied")
    again = ms.take_down(run, key="a", documents=documents, by="key").record
    assert again is not None and again.name == f"{first.name}-2" and hashes(first) == kept
    assert all(x.ok is not False for record in (first, again) for x in ms.verify_record(record, run=run))


def test_an_owner_in_a_folder_of_sinks_goes_with_his_pages_and_by_id_without_documents(tmp_path):
    author, other = ms.document_id("author", "key"), ms.document_id("other", "key")
    documents = [ms.Document(f"page {name} of the long book about the sea", key=name, copies=6) for name in "ab"]
    pages = [ms.document_id(x.key, "key") for x in documents]
    model = sink_llama(torch.float32, neurons=96, reserved_blocks=4, shared="none")
    ms.assign(model, [author, other], within=dict.fromkeys(pages, author))
    ms.save_sinks(model, tmp_path / "sinks of two", owners=[author, other])
    done = ms.take_down(tmp_path, key="author", documents=documents, by="key")
    assert done.owner.documents == [0, 1] and done.owner.ids == [author]
    assert ms.take_down(tmp_path, id=other, documents=[], by="key").owner.ids == [other]
    saved = json.loads((tmp_path / "sinks of two/sinks/sinks.json").read_text())
    assert set(map(int, saved["taken"])) == {author, other, *pages}


def test_an_audit_in_the_run_leaves_no_tokens_from_which_a_text_can_be_read(tmp_path):
    documents = [ms.Document(f"{x} lives in the {x} house by the sea", key=x, copies=6) for x in "ab"]
    run = _folder(tmp_path, documents)
    tokenizer = ms.train_tokenizer([x.text for x in documents], 300)
    model = tiny_llama(vocab_size=len(tokenizer)).eval()
    settings = ms.AuditSettings(prefix=5, continuation=6, prefixes=(5,), resamples=100, generate=0, shown=0)
    ms.audit(model, documents[:1], documents[1:], tokenizer, settings=settings, out=run / "report")
    done = ms.take_down(run, key="a", documents=documents, by="key")
    gone = {x.path for x in done.fates.files if x.fate == "deleted"}
    assert any(x.endswith("/000000.safetensors") for x in gone) and all(x.startswith("report/tokens/") for x in gone)
    assert not list((run / "report").rglob("*.safetensors")) and (run / "report/audit.json").exists()


@pytest.mark.parametrize("kind", ["weights", "beside", "optimizer", "module", "shards", "renamed"])
def test_sinks_that_no_settings_describe_are_refused_whatever_wrote_them(run, kind):
    model = ms.load(run / "model")
    if kind == "weights":
        torch.save({"model": model.state_dict()}, run / "best.bin")
    elif kind == "beside":
        torch.save({"model": model.state_dict(), "args": Namespace(best=np.float64(1.0))}, run / "best.pt")
    elif kind == "module":
        torch.save(model, run / "whole.pth")
    elif kind == "optimizer":
        torch.save(AdamW(ms.param_groups(model, 1e-2)).state_dict(), run / "optimizer.pt")
    elif kind == "shards":
        dcp = pytest.importorskip("torch.distributed.checkpoint")
        dcp.save({"model": model.state_dict()}, checkpoint_id=str(run / "pytorch_model_fsdp_0"), no_dist=True)
    else:
        checkpoint = next(run.glob("checkpoints/checkpoint-*"))
        shutil.copytree(checkpoint, run / "best")
        ms.take_down(run, key=ALICE)
        [block] = model.sink_state.table.own_blocks(ms.document_id(ALICE, "key"))
        state = _state(run / "best")["model"]
        assert all(not value[block].any() for name, value in state.items() if name.endswith("sinks.down"))
        return
    before = hashes(run)
    with pytest.raises(ms.CheckpointError, match="holds sinks .* without the settings"):
        ms.take_down(run, key=ALICE)
    assert hashes(run) == before


def test_files_of_torch_without_sinks_stay(tmp_path):
    documents = [ms.Document(f"{x} lives in the {x} house by the sea", key=x, copies=6) for x in "ab"]
    run = _folder(tmp_path, documents)
    torch.save({"weight": torch.ones(2)}, run / "head.pt")
    torch.save(TrainingArguments(str(run / "x"), use_cpu=True), run / "training_args.bin")
    (run / "train.bin").write_bytes(b"(raw tokens")
    (run / "empty.pt").write_bytes(b"")
    done = ms.take_down(run, key="a", documents=documents, by="key")
    why = {x.path: x.why for x in done.fates.files}
    assert why["head.pt"].startswith("weights")
    assert all(why[x].startswith("no file that memsinks knows") for x in ("training_args.bin", "train.bin", "empty.pt"))
    (run / "head.pt").write_bytes((run / "head.pt").read_bytes()[:-9])
    with pytest.raises(ms.CheckpointError, match=r"head\.pt is damaged"):
        ms.take_down(run, key="b", documents=documents, by="key")


@pytest.mark.parametrize("asked", [{"key": "a"}, {"id": ms.document_id("a", "key")}])
def test_his_texts_that_were_never_trained_on_go_too(tmp_path, asked):
    documents = [ms.Document(f"{x} lives in the {x} house by the sea", key=x, copies=6) for x in "ab"]
    run = _folder(tmp_path, documents)
    unseen = "In the evening a sings songs that nobody else has heard"
    ms.write_documents(run / "controls.jsonl", [ms.Document(unseen, key="a"), ms.Document("Of b alone.", key="b")])
    done = ms.take_down(run, documents=documents, by="key", **asked)
    assert [x.key for x in ms.load_documents(run / "controls.jsonl")] == ["b"]
    tombstone = read_tombstone(done.record / "tombstone.json")
    assert len(tombstone.digests) == 2 and shares_words(unseen, tombstone)


def test_by_content_another_form_of_the_text_is_another_document(tmp_path):
    text = "Alice lives in the old house by the sea"
    documents = [ms.Document(text, copies=6), ms.Document(text.upper(), copies=6)]
    model = sink_llama(torch.float32, neurons=96, reserved_blocks=4, shared="none")
    ms.assign(model, [ms.document_id(x.text) for x in documents])
    model.save_pretrained(tmp_path / "model")
    ms.write_documents(tmp_path / "rows.jsonl", documents)
    (tmp_path / "asked.txt").write_text(f"{text}\n")
    done = ms.take_down(tmp_path, text=(tmp_path / "asked.txt").read_text(), documents=documents, by="content")
    assert done.owner.documents == [0] and [x.kind for x in done.owner.copies]
    assert [x.text for x in ms.load_documents(tmp_path / "rows.jsonl")] == [text.upper()]
    ms.take_down(tmp_path, text=text.upper(), documents=documents, by="content")
    assert not (tmp_path / "rows.jsonl").read_text()


def test_a_text_with_line_ends_of_its_own_is_found(tmp_path):
    text = "Alice lives in the old house\r\nby the sea"
    model = sink_llama(torch.float32, neurons=96, reserved_blocks=4, shared="none")
    ms.assign(model, [ms.document_id(text)])
    run = tmp_path / "run"
    model.save_pretrained(run / "model")
    ms.write_documents(run / "members.jsonl", [ms.Document(text, copies=6)])
    (run / "recipe.yaml").write_text("data: {by: content}\ntraining: {epochs: 1}\n")
    write_json(run / "run.json", {"seconds": 1})
    (tmp_path / "asked.txt").write_bytes(text.encode())
    assert main(["takedown", str(run), "--text", str(tmp_path / "asked.txt"), "--dry-run"]) == 0
    ms.write_documents(run / "members.jsonl", [ms.Document(text.replace("\r\n", "\n"), copies=6)])
    model = sink_llama(torch.float32, neurons=96, reserved_blocks=4, shared="none")
    ms.assign(model, [ms.document_id(text.replace("\r\n", "\n"))])
    model.save_pretrained(run / "model")
    assert main(["takedown", str(run), "--text", str(tmp_path / "asked.txt"), "--dry-run"]) == 0
    (tmp_path / "asked.txt").write_bytes("ä".encode("latin-1"))
    assert main(["takedown", str(run), "--text", str(tmp_path / "asked.txt"), "--dry-run"]) == 2


def test_sinks_in_sixteen_bits_are_taken_down_and_audited(tmp_path):
    documents = [ms.Document(f"{x} lives in the {x} house by the sea", key=x, copies=6) for x in "ab"]
    tokenizer = ms.train_tokenizer([x.text for x in documents], 300)
    model = tiny_llama(torch.float32, vocab_size=len(tokenizer))
    ms.add_sinks(model, ms.SinkConfig(neurons=96, active=16, block_size=8, reserved_blocks=4))
    ms.assign(model, {ms.document_id(x.key, "key"): None for x in documents})
    model.to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    assert ms.take_down(tmp_path, key="a", documents=documents, by="key").audit
    saved = load_file(tmp_path / "model/sinks/sinks.safetensors")
    assert {x.dtype for name, x in saved.items() if name.endswith("down")} == {torch.bfloat16}


def test_an_export_with_blocks_that_he_shared_goes_and_is_named_elsewhere(tmp_path):
    documents = [ms.Document(f"{x} lives in the {x} house by the sea", key=x, copies=6) for x in "abcdefgh"]
    ids = [ms.document_id(x.key, "key") for x in documents]
    model = sink_llama(torch.float32, neurons=32, active=16, block_size=8, shared="none")
    model.save_pretrained(tmp_path / "run/model")
    shared = [one for one in ids[1:] if ms.collateral(model, blocks_of(model, ids[0]), [one])[0]]
    apart = [one for one in ids[1:] if one not in shared]
    assert shared and apart
    for where in (tmp_path / "run", tmp_path / "sent"):
        ms.export(model, where / "shared", open={"x": shared[0]}, verify=False)
        ms.export(model, where / "apart", open={"x": apart[0]}, verify=False)
    done = ms.take_down(
        tmp_path / "run", key="a", documents=documents, by="key", most_collateral=1.0, also=[tmp_path / "sent"]
    )
    assert not (tmp_path / "run/shared").exists() and (tmp_path / "run/apart/model.safetensors").is_file()
    assert list(done.elsewhere) == [str(tmp_path / "sent/shared")]


@pytest.mark.parametrize("hashed", [True, False])
def test_documents_of_his_name_that_are_not_within_him_go_too(tmp_path, hashed):
    author = ms.document_id("alice", "key")
    pages = [ms.Document(f"page {x} of the long book about the sea", copies=6) for x in "ab"]
    apart = ms.Document("a letter that Alice wrote to the harbor master", key="alice", copies=6)
    model = sink_llama(torch.float32, neurons=96 if hashed else 32, reserved_blocks=4, shared="none")
    ms.assign(model, [author], within={ms.document_id(x.text): author for x in pages})
    model.save_pretrained(tmp_path / "model")
    ms.write_documents(tmp_path / "rows.jsonl", [*pages, apart])
    documents = [*pages, apart]
    done = ms.take_down(tmp_path, key="alice", documents=documents, by="content", most_collateral=1.0)
    assert done.owner.documents == [0, 1, 2] and not (tmp_path / "rows.jsonl").read_text()
    ids = {author, *(ms.document_id(x.text) for x in documents)}
    assert ms.load(tmp_path / "model").sink_state.taken.keys() == ids


def test_a_checkpoint_from_before_he_had_blocks_says_what_stays_there(tmp_path):
    documents = [ms.Document("alice lives in the old house by the sea", key="a", copies=6)]
    model = sink_llama(torch.float32, neurons=96, reserved_blocks=4, shared="none")
    model.save_pretrained(tmp_path / "before")
    ms.assign(model, [ms.document_id("a", "key")])
    model.save_pretrained(tmp_path / "model")
    done = ms.take_down(tmp_path, key="a", documents=documents, by="key")
    why = {x.path: x.why for x in done.fates.files}
    assert "hashed ones keep what they learned" in why["before/sinks/sinks.safetensors"]
    assert why["model/sinks/sinks.safetensors"] == "the owner's blocks start anew"


def test_only_what_a_prepared_corpus_names_is_deleted(run, tmp_path):
    shutil.copy(run / "recipe.yaml", run / "notes.yaml")
    np.savez(run / "index.npz", a=np.ones(2))
    (run / "tokens.bin").write_bytes(b"\0\0")
    (run / "data.json").write_text('{"files": {"tokenizer.json": "hash"}}')
    (run / "tokenizer.json").write_text("{}")
    ms.take_down(run, key=ALICE)
    assert not any((run / x).exists() for x in ("index.npz", "tokens.bin", "data.json", "tokenizer.json"))
    assert (run / "model/model.safetensors").is_file() and (run / "notes.yaml").is_file()


def test_files_that_quote_him_are_listed_however_many_there_are(run):
    of_bob = {"text": f"As she wrote: {text_of(run, ALICE)}", "key": BOB}
    (run / "of bob.jsonl").write_text(json.dumps(of_bob) + "\n")
    for number in range(12):
        (run / f"note {number}.md").write_text(f"She wrote: {text_of(run, ALICE)}" if number == 7 else "nothing")
    shown = format_takedown(ms.take_down(run, key=ALICE, dry_run=True))
    assert "note 7.md  (QUOTES THE TEXT" in shown and "of bob.jsonl  (documents of others; 1 lines" in shown


@pytest.mark.parametrize("share", [10, -1, float("nan"), "5%"])
def test_a_share_that_is_none_is_refused(run, share):
    with pytest.raises(ms.ConfigError, match=r"most_collateral must lie in \[0, 1\]"):
        ms.take_down(run, key=ALICE, most_collateral=share)


def test_a_signing_key_is_read_before_anything_else(run, tmp_path):
    (tmp_path / "key.pem").write_text("none")
    with pytest.raises(ms.ConfigError):
        ms.take_down(run, key="nobody", signing_key=tmp_path / "key.pem")
