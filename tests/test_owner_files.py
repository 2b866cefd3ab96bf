"""Sinks of some owners on disk: a base and several such folders are the model in which they were trained together."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import sink_llama, tiny_llama
from torch import Tensor

import memsinks as ms
from memsinks.batch import ISOLATIONS
from memsinks.cli import main
from memsinks.removal.erase_files import SinksFile
from memsinks.runs.takedown import take_down

ALICE, BOB, CAROL, PAGE = (ms.document_id(name, by="key") for name in ("alice", "bob", "carol", "page"))
TOKENS = torch.arange(12).view(2, 6)
LAYOUT = {"neurons": 96, "active": 16, "reserved_blocks": 4}
"""Eight blocks of 8 that are hashed to and four that are not."""


def owned(**settings):
    """A model that trained on private texts of three owners; a page is within Alice, who has two blocks."""
    model = sink_llama(torch.float32, **LAYOUT | settings)
    ms.assign(model, [ALICE], blocks=2)
    ms.assign(model, [BOB, CAROL], within={PAGE: ALICE})
    optimizer = ms.AdamW(ms.param_groups(model, lr=1e-2))
    marks = {"document_ids": torch.tensor([PAGE, BOB]), "exposures": torch.tensor([1, 1])}
    for isolation in ("gated", "private"):
        flags = torch.full((2,), ISOLATIONS[isolation])
        model(input_ids=TOKENS, labels=TOKENS, **marks, isolation=flags).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def base(**changes):
    """The model without sinks."""
    stock = tiny_llama(torch.float32, **changes).eval()
    if not changes:
        weights = {name: x for name, x in owned().state_dict().items() if ".sinks." not in name}
        stock.load_state_dict(weights)
    return stock


def logits(model, *opened, path: str = "tiled") -> Tensor:
    model.sink_state.path = path
    with torch.no_grad(), ms.sinks_open(model, *opened):
        return model(input_ids=TOKENS).logits


def bits(model) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in model.named_parameters()}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    model, folder = owned(), tmp_path_factory.mktemp("owners")
    for name, owner in (("alice", ALICE), ("bob", BOB), ("carol", CAROL)):
        assert ms.save_sinks(model, folder / name, owners=[owner]) == folder / name / "sinks"
    return folder


@pytest.fixture
def copies(folders, tmp_path) -> Path:
    return Path(shutil.copytree(folders, tmp_path / "owners"))


# A base and folders


@pytest.mark.parametrize("path", ["tiled", "grouped", "masked"])
def test_a_base_and_folders_are_the_model_in_which_owners_trained_together(folders, path) -> None:
    together, apart = owned(), base()
    assert ms.shared_hash(together) == ms.shared_hash(apart)
    closed = apart(input_ids=TOKENS).logits
    ms.load_sinks(apart, [folders / "alice", folders / "bob"])
    assert not apart.training and torch.equal(apart(input_ids=TOKENS).logits, closed)
    for opened in (ALICE, PAGE, BOB, [ALICE, BOB], [[PAGE], [BOB]]):
        one, other = logits(together, opened, path=path), logits(apart, opened, path=path)
        assert not torch.equal(other, closed)
        torch.testing.assert_close(other, one, **({} if path == "masked" else {"rtol": 0, "atol": 0}))
    config = apart.sink_state.config
    assert (config.blocks, config.hashed_blocks, ms.free_blocks(apart)) == (3, 0, [])
    assert apart.sink_state.table.to_dict() == {ALICE: [0, 1], PAGE: [0, 1], BOB: [2]}
    with pytest.raises(ms.DataError, match="has no blocks in this model"):
        logits(apart, CAROL)


def test_folders_come_one_after_the_other_too(folders) -> None:
    together, apart = owned(), base()
    for name in ("alice", "bob", "carol"):
        ms.load_sinks(apart, str(folders / name))
    assert apart.sink_state.config.reserved_blocks == apart.sink_state.config.blocks == 4
    assert torch.equal(logits(apart, [ALICE, CAROL]), logits(together, [ALICE, CAROL]))


@pytest.mark.parametrize("free", [0, 2, 5])
def test_beside_sinks_that_are_there_nothing_else_moves(folders, free) -> None:
    model = sink_llama(torch.float32, neurons=72 + 8 * free, active=16, reserved_blocks=1 + free, seed=3).eval()
    weights = base().state_dict()
    model.load_state_dict({name: weights.get(name, x) for name, x in model.state_dict().items()})
    ms.assign(model, [5])
    before, outputs = bits(model), [logits(model, x) for x in (5, 17, [5, 17])]
    ms.load_sinks(model, [folders / "alice", folders / "bob"])
    for name, value in bits(model).items():
        kept = value[[*range(9), *range(12, len(value))]] if ".sinks." in name else value
        start = before[name][[*range(9), *range(12, len(before[name]))]] if ".sinks." in name else before[name]
        assert torch.equal(kept, start)
    assert all(torch.equal(logits(model, x), y) for x, y in zip((5, 17, [5, 17]), outputs, strict=True))
    assert model.sink_state.config.blocks == max(12, 9 + free)
    assert model.sink_state.table.own_blocks(ALICE) == [9, 10]
    assert torch.equal(logits(model, [PAGE, BOB]), logits(owned(), [PAGE, BOB]))


def test_a_folder_holds_nothing_of_others(folders) -> None:
    model, tensors = owned(), load_file(folders / "alice" / "sinks" / "sinks.safetensors")
    for name, value in bits(model).items():
        if ".sinks." in name:
            assert torch.equal(tensors.pop(name), value[[8, 9]])
    assert {name: x.tolist() for name, x in tensors.items()} == {
        "table.ids": sorted([ALICE, PAGE]),
        "table.offsets": [0, 2, 4],
        "table.blocks": [0, 1, 0, 1],
        "table.owners": [ALICE] * 4,
    }
    text = (folders / "alice" / "sinks" / "sinks.json").read_text()
    assert ms.shared_hash(model) in text and str(BOB) not in text


def test_what_was_put_together_is_saved_and_split_again(folders, tmp_path) -> None:
    model = base()
    ms.load_sinks(model, [folders / "bob", folders / "alice"])
    model.save_pretrained(tmp_path / "model")
    again = ms.load(tmp_path / "model")
    assert torch.equal(logits(again, ALICE), logits(owned(), ALICE))
    ms.save_sinks(again, tmp_path / "alice", owners=[ALICE])
    first, second = (load_file(x / "alice/sinks/sinks.safetensors") for x in (folders, tmp_path))
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
    ms.save_sinks(model, tmp_path / "both", owners=[ALICE, BOB])
    both = base()
    ms.load_sinks(both, tmp_path / "both")
    assert torch.equal(logits(both, BOB), logits(model, BOB))


def test_a_folder_beside_the_checkpoint_that_it_was_saved_from(tmp_path, folders) -> None:
    model = owned()
    ms.erase(model, CAROL, record="away")
    model.save_pretrained(tmp_path / "model")
    loaded = ms.load(tmp_path / "model")
    with pytest.raises(ms.CheckpointError, match=f"id {BOB} of .*bob has blocks in the model already"):
        ms.load_sinks(loaded, folders / "bob")
    with pytest.raises(ms.CheckpointError, match=rf"id {CAROL} of .*carol was taken out \(away\)"):
        ms.load_sinks(loaded, folders / "carol")
    with pytest.raises(ms.CheckpointError, match="holds all sinks of a model, which would be lost"):
        ms.save_sinks(loaded, tmp_path / "model", owners=[BOB])


# What is refused


def refused(model, *arguments, match: str, error=ms.CheckpointError, **settings) -> None:
    """Loading is refused and changes nothing."""
    before, had = bits(model), ms.has_sinks(model)
    with pytest.raises(error, match=match):
        ms.load_sinks(model, *arguments, **settings)
    after = bits(model)
    assert ms.has_sinks(model) == had and before.keys() == after.keys()
    assert all(torch.equal(x, before[name]) for name, x in after.items())


def test_owners_that_cannot_be_saved_alone(tmp_path) -> None:
    model = owned()
    pairs = model.sink_state.table.to_pairs()
    ms.assign_blocks(model, ms.AssignmentTable.from_pairs(pairs | {7: [(0, 7)]}))
    for owners, message in (
        ([], "owners is empty"),
        ([5], "id 5 has no blocks of its own; memsinks.assign"),
        (["alice"], "a document id is an int from 0 .*, got 'alice'"),
        ([PAGE, 9], f"id {PAGE} has no blocks of its own.*id 9 has"),
        ([7], "block 0 of id 7 is not its own: others are hashed to it"),
    ):
        with pytest.raises(ms.DataError, match=message):
            ms.save_sinks(model, tmp_path / "x", owners=owners)
    ms.erase(model, ALICE, record="r-1")
    with pytest.raises(ms.DataError, match=rf"id {ALICE} has no blocks of its own, it was taken out \(r-1\)"):
        ms.save_sinks(model, tmp_path / "x", owners=[ALICE])
    assert not any(tmp_path.iterdir())


def test_a_document_of_two_owners_needs_both(tmp_path) -> None:
    model = owned()
    ms.assign(model, [], within={BOB: CAROL})
    for owner in (BOB, CAROL):
        pair = f"{BOB} and of {CAROL}" if owner == BOB else f"{CAROL} and of {BOB}"
        with pytest.raises(ms.DataError, match=f"id {BOB} opens blocks of {pair}, who is not saved; save both"):
            ms.save_sinks(model, tmp_path / "bob", owners=[owner])
    ms.save_sinks(model, tmp_path / "both", owners=[BOB, CAROL])
    other = base()
    ms.load_sinks(other, tmp_path / "both")
    assert torch.equal(logits(other, BOB), logits(model, BOB))


def test_an_owner_comes_once(folders, copies) -> None:
    refused(base(), [folders / "bob", copies / "bob"], match=f"id {BOB} of .*bob has blocks in .*bob already")
    model = base()
    ms.load_sinks(model, folders / "bob")
    refused(model, [folders / "alice", folders / "bob"], match=f"id {BOB} of .*bob has blocks in the model already")
    assert model.sink_state.config.blocks == 1


def test_another_base(folders, caplog) -> None:
    refused(base(initializer_range=0.1), folders / "bob", match='saved beside other weights .* give base="any"')
    double = base().double()
    refused(double, folders / "bob", match="saved beside other weights")
    ms.load_sinks(double, folders / "bob", base="any")
    assert "saved beside other weights" in caplog.text
    torch.testing.assert_close(logits(double, BOB), logits(owned(), BOB).double(), rtol=1e-4, atol=1e-5)
    refused(base(hidden_size=32), folders / "bob", base="any", match=r"do not fit .*\[8, 16\] there and \[8, 32\] here")
    refused(base(), folders / "bob", base="other", error=ms.ConfigError, match="base must be one of 'same', 'any'")


@pytest.mark.parametrize(
    ("settings", "named"),
    [({"layers": (0,)}, r"layers is \[0, 1\] there and \[0\] here"),
     ({"block_size": 4}, "block_size is 8 there and 4 here"),
     ({"block_size": None, "routing": "neurons"}, "routing is 'blocks' there and 'neurons' here")],
)  # fmt: skip
def test_other_sinks(folders, settings, named) -> None:
    model = base()
    ms.add_sinks(model, ms.SinkConfig(**{"neurons": 64, "active": 16, "block_size": 8} | settings))
    refused(model, folders / "bob", match=f"do not fit the model's: .*{named}")


def test_damaged_folders(copies, folders) -> None:
    path = copies / "bob" / "sinks" / "sinks.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    refused(base(), [folders / "alice", copies / "bob"], match="is not the file these sinks were saved with")
    path = copies / "alice" / "sinks" / "sinks.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps({name: x for name, x in stored.items() if name != "base_sha256"}))
    refused(base(), copies / "alice", match=r"lacks \['base_sha256'\]")
    path.write_text(json.dumps(stored | {"config": stored["config"] | {"seed": 1}}))
    refused(base(), copies / "alice", match="another fingerprint")


def test_folders_that_are_no_models(folders, tmp_path) -> None:
    with pytest.raises(ms.CheckpointError, match=r"the sinks of some owners alone; load the model .*load_sinks\(model"):
        ms.load(folders / "bob")
    ms.save_sinks(owned(), tmp_path / "all")
    both = [folders / "bob", tmp_path / "all"]
    refused(base(), both, error=ms.ConfigError, match="all holds all sinks of a model, load it first and alone")
    refused(base(), [], error=ms.ConfigError, match="give at least one")


def test_other_settings_of_training_are_said(folders, caplog) -> None:
    model = base()
    ms.add_sinks(model, ms.SinkConfig(neurons=64, active=16, block_size=8, shared="none"))
    ms.load_sinks(model, folders / "bob")
    assert "shared is 'decay' there and 'none' here" in caplog.text


# Described and taken out


def test_info(folders, capsys) -> None:
    assert main(["info", str(folders / "alice")]) == 0
    out = capsys.readouterr().out
    for part in ("llama, sinks of some owners alone, in layers [0, 1]", f"owners           {ALICE}\n", "1 more within them",
                 "16 a layer, in 2 blocks", ms.shared_hash(base())):  # fmt: skip
        assert part in out


def test_erasing_in_a_file_is_erasing_in_the_model_it_is_loaded_into(folders, copies, tmp_path) -> None:
    model = base()
    ms.save_sinks(owned(), tmp_path / "both", owners=[ALICE, BOB])
    ms.load_sinks(model, tmp_path / "both")
    ms.erase(model, ALICE, record="r-1")
    file = SinksFile(tmp_path / "both")
    (erased,) = file.erase([ALICE, CAROL], "r-1")
    assert erased.ids == sorted([ALICE, PAGE]) and erased.own
    file.write(tmp_path / "both" / "sinks")
    for name, value in file.tensors.items():
        assert torch.equal(value, bits(model)[name])
    again = base()
    ms.load_sinks(again, tmp_path / "both")
    assert again.sink_state.config.blocks == 1 and torch.equal(logits(again, BOB), logits(owned(), BOB))
    with pytest.raises(ms.DataError, match=r"taken out \(r-1\)"):
        logits(again, PAGE)
    refused(again, folders / "alice", match=rf"id {ALICE} of .* was taken out \(r-1\)")
    refused(base(), [folders / "alice", tmp_path / "both"], match=rf"id {ALICE} of .* was taken out \(r-1\)")


def test_a_take_down_among_folders_of_owners(copies) -> None:
    documents = [ms.Document(f"the text of {name} is here", key=name) for name in ("alice", "bob", "carol")]
    documents = ms.isolate(documents, "private", ["alice", "bob", "carol"])
    known = {"documents": documents, "by": "key"}
    before = {name: (copies / name / "sinks/sinks.safetensors").read_bytes() for name in ("alice", "bob", "carol")}
    with pytest.raises(ms.DataError, match="those of others alone"):
        take_down(copies / "alice", key="bob", **known)
    plan = take_down(copies, key="bob", dry_run=True, also=[copies], **known)
    assert [str(Path(x).name) for x in plan.elsewhere] == ["bob"]
    done = take_down(copies, key="bob", **known)
    assert {name: len(x) for name, x in done.erased.items()} == {"alice": 0, "bob": 1, "carol": 0}
    assert not any(check.ok is False for check in ms.verify_record(done.record, run=copies))
    for name, content in before.items():
        assert ((copies / name / "sinks/sinks.safetensors").read_bytes() == content) == (name != "bob")
    refused(base(), copies / "bob", match=f"holds the sinks of nobody, all were taken out.*{done.record.name}")
    ms.load_sinks(base(), [copies / "alice", copies / "carol"])
