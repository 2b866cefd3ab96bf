"""What each document may teach: gated, exact and private ones in one run, and the run in which flagged ones are blank."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import sink_llama
from torch import Tensor

import memsinks as ms
from memsinks.batch import BLANK, ISOLATION, ISOLATIONS
from memsinks.data.packing import pack
from memsinks.sinks.state import named_sinks, sink_modules
from memsinks.sinks.table import open_mask
from memsinks.training.checkpoint import last_checkpoint
from memsinks.training.config import TrainingConfig
from memsinks.training.loop import Training, steps

GATED, EXACT, PRIVATE, OTHER = 11, 12, 13, 14
OWNED = (EXACT, PRIVATE, OTHER)
LENGTH, PARTS = 16, 4
FLAGS = {GATED: "gated", EXACT: "exact", PRIVATE: "private", OTHER: "private"}


def flagged_rows(order: list[int], one_document_per_row: bool = False) -> ms.Rows:
    """Documents in training order, packed."""
    texts = {key: np.arange(key, key + 6 + place) % 37 for place, key in enumerate(FLAGS)}
    met: dict[int, int] = {}
    counts = [_next(met, key) for key in order]
    return pack(
        [texts[key] for key in order],
        order,
        counts,
        isolation=[ISOLATIONS[FLAGS[key]] for key in order],
        length=LENGTH,
        pad_id=0,
        apart_from=2,
        one_document_per_row=one_document_per_row,
    )


def _next(met: dict[int, int], key: int) -> int:
    met[key] = met.get(key, 0) + 1
    return met[key]


MIXED = [*FLAGS, GATED, GATED, EXACT, PRIVATE, *FLAGS, PRIVATE, PRIVATE, OTHER, OTHER, *FLAGS, GATED, EXACT, OTHER]
"""Windows of all flagged, mixed and none flagged rows come up."""


def owned_llama(**settings):
    """Eight blocks that are hashed to and four that are not, of which the flagged owners have one each."""
    model = sink_llama(torch.float32, neurons=96, active=16, reserved_blocks=4, **settings)
    for sinks in sink_modules(model).values():
        sinks.start_anew(range(8, 12))
    ms.assign(model, [*OWNED, GATED] if settings.get("shared") == "none" else OWNED)
    return model


def trained(
    rows: ms.Rows,
    folder: Path | None = None,
    accumulate: int = 1,
    resume: bool = False,
    checkpointing: bool = False,
    **sinks,
):
    model = owned_llama(**sinks)
    config = TrainingConfig(
        length=LENGTH,
        batch_rows=PARTS,
        accumulate=accumulate,
        lr=1e-2,
        save_every=2,
        log_every=1,
        gradient_checkpointing=checkpointing,
    )
    if checkpointing:
        model.gradient_checkpointing_enable()
    total = len(rows) // PARTS

    def parts(step: int) -> list[dict[str, Tensor]]:
        size = PARTS // accumulate
        firsts = range(step * PARTS, (step + 1) * PARTS, size)
        return [ms.collate([rows[first + row] for row in range(size)]) for first in firsts]

    training = Training(model, config, total)
    if resume:
        for _ in itertools.islice(steps(training, parts, checkpoints=folder), 3):
            pass
        model = owned_llama(**sinks)
        if checkpointing:
            model.gradient_checkpointing_enable()
        training = Training(model, config, total)
        training.resume(last_checkpoint(folder))
    for _ in steps(training, parts, checkpoints=folder):
        pass
    return model


def own_hash(model, owner: int) -> list[bytes]:
    """The bits of an owner's blocks."""
    blocks = model.sink_state.table.own_blocks(owner)
    return [value[blocks].detach().numpy().tobytes() for value in named_sinks(model).values()]


@pytest.mark.parametrize(
    ("accumulate", "checkpointing", "resume"), [(1, False, False), (4, False, False), (1, True, False), (4, True, True)]
)
@pytest.mark.parametrize("shared", ["decay", "none"])
def test_shared_weights_are_those_of_the_run_in_which_flagged_rows_are_blank(
    shared, accumulate, checkpointing, resume, tmp_path
):
    rows = flagged_rows(MIXED)
    config = owned_llama(shared=shared).sink_state.config
    settings = {"accumulate": accumulate, "checkpointing": checkpointing, "shared": shared}
    model = trained(rows, tmp_path / "run", resume=resume, **settings)
    shadow = trained(ms.shadow_rows(rows, config), **settings)
    assert ms.shared_hash(model) == ms.shared_hash(shadow)
    untouched = owned_llama(shared=shared)
    assert ms.shared_hash(model) != ms.shared_hash(untouched)
    for owner in OWNED:
        assert own_hash(model, owner) != own_hash(untouched, owner)
        assert own_hash(shadow, owner) == own_hash(untouched, owner)


@pytest.mark.parametrize("accumulate", [1, 4])
def test_an_owners_blocks_do_not_depend_on_another_owner(accumulate):
    rows = flagged_rows(MIXED)
    config = owned_llama().sink_state.config
    model = trained(rows, accumulate=accumulate)
    without = trained(ms.shadow_rows(rows, config, [OTHER]), accumulate=accumulate)
    assert own_hash(model, PRIVATE) == own_hash(without, PRIVATE)
    assert own_hash(model, EXACT) == own_hash(without, EXACT)
    assert own_hash(model, OTHER) != own_hash(without, OTHER)
    assert ms.shared_hash(model) == ms.shared_hash(without)


def test_what_each_isolation_teaches():
    """Exposures 1 and 2, a document a row: which of them move the shared weights and which their sinks."""
    for name, shared, first, second in (
        ("gated", "none", (True, False), (True, True)),
        ("exact", "decay", (True, False), (False, True)),
        ("private", "decay", (False, True), (False, True)),
    ):
        for exposure, (moves_shared, moves_sinks) in ((1, first), (2, second)):
            model = owned_llama(shared=shared)
            tokens = torch.arange(6)[None] + 5
            out = model(
                input_ids=tokens,
                labels=tokens,
                document_ids=torch.tensor([EXACT]),
                exposures=torch.tensor([exposure]),
                isolation=torch.tensor([ISOLATIONS[name]]),
            )
            out.loss.backward()
            shared_grad = model.model.embed_tokens.weight.grad
            sinks_grad = sum(float(x.grad.abs().sum()) for x in named_sinks(model).values() if x.grad is not None)
            assert bool(shared_grad.abs().sum() > 0) == moves_shared, (name, exposure)
            assert bool(sinks_grad > 0) == moves_sinks, (name, exposure)


def test_the_gradient_of_gated_text_in_an_exact_model_is_decayed():
    tokens = torch.arange(6)[None] + 5
    grads = {}
    for shared, flag in (("decay", None), ("none", torch.tensor([ISOLATIONS["gated"]]))):
        model = sink_llama(shared=shared, shared_decay=0.5, neurons=96, reserved_blocks=4)
        ms.assign(model, [GATED])
        marks = {"document_ids": torch.tensor([GATED]), "exposures": torch.tensor([3])}
        model(input_ids=tokens, labels=tokens, **marks, isolation=flag).loss.backward()
        grads[shared] = model.model.embed_tokens.weight.grad
    torch.testing.assert_close(grads["decay"], grads["none"], rtol=0, atol=0)


def test_flagged_text_with_hashed_blocks_is_refused_beside_gated_text():
    model = sink_llama()
    tokens = torch.arange(6)[None]
    with pytest.raises(ms.DataError, match="document id 12 .* hashed, .* are gated .* memsinks.assign"):
        model(
            input_ids=tokens,
            labels=tokens,
            document_ids=torch.tensor([EXACT]),
            exposures=torch.tensor([2]),
            isolation=torch.tensor([ISOLATIONS["exact"]]),
        )


def test_blank_rows_need_their_divisor():
    model, tokens = owned_llama(), torch.arange(6)[None]
    marks = {"document_ids": torch.tensor([OTHER]), "exposures": torch.tensor([1]), "isolation": torch.tensor([BLANK])}
    with pytest.raises(ms.DataError, match="num_items_in_batch"):
        model(input_ids=tokens, labels=tokens, **marks)
    loss = model(input_ids=tokens, labels=tokens, **marks, num_items_in_batch=torch.tensor(5)).loss
    loss.backward()
    assert float(loss) == 0 and all(not x.grad.any() for x in model.parameters() if x.grad is not None)


def test_rows_keep_what_trains_sinks_alone_apart():
    rows = flagged_rows(MIXED)
    for row in rows:
        flags = row[ISOLATION][row["document_ids"] != -1]
        opened = (flags == ISOLATIONS["private"]) | (
            (flags == ISOLATIONS["exact"]) & (row["exposures"][: len(flags)] >= 2)
        )
        assert bool(opened.all()) or not bool(opened.any())
    plain = pack([np.arange(4)] * 3, [1, 2, 3], [1, 1, 2], length=8, pad_id=0, apart_from=2)
    assert ISOLATION not in plain[0]


def test_a_flag_goes_from_the_document_into_the_batch(tmp_path):
    documents = [ms.Document("one two three", key="a", source="acme"), ms.Document("four five six seven", key="b")]
    documents = ms.isolate(documents, "private", ["acme"], by="source")
    assert [x.isolation for x in documents] == ["private", None]
    rows = ms.make_rows(documents, ms.train_tokenizer([x.text for x in documents], 300), length=16, by="key")
    batch = ms.collate([rows[0], rows[1]])
    private = batch[ISOLATION] == ISOLATIONS["private"]
    assert set(batch["document_ids"][private].tolist()) == {ms.document_id("a", "key")}
    ms.write_documents(tmp_path / "documents.jsonl", documents)
    assert ms.load_documents(tmp_path / "documents.jsonl") == documents
    (tmp_path / "own.jsonl").write_text('{"text": "hello there", "how": "exact"}\n{"text": "and you", "how": null}\n')
    read = list(ms.read_documents(tmp_path / "own.jsonl", isolation_field="how"))
    assert [x.isolation for x in read] == ["exact", None]


def test_bad_flags(tmp_path):
    with pytest.raises(ms.DataError, match="isolation of document 0 must be one of .*, got 'secret'"):
        ms.make_rows([ms.Document("text", isolation="secret")], None, length=8)  # type: ignore[arg-type]
    with pytest.raises(ms.DataError, match="no document has the key 'nobody'"):
        ms.isolate([ms.Document("text", key="a")], "private", ["nobody"])
    with pytest.raises(ms.ConfigError, match="isolation must be one of"):
        ms.isolate([ms.Document("text", key="a")], "secret", ["a"])
    with pytest.raises(ms.DataError, match="document 0 is to train its sinks alone, but its id -1"):
        pack([np.arange(4)], [-1], [1], isolation=[ISOLATIONS["private"]], length=8, pad_id=0)
    with pytest.raises(ms.DataError, match="apart_from"):
        pack([np.arange(4)], [1], [1], isolation=[ISOLATIONS["exact"]], length=8, pad_id=0)
    (tmp_path / "own.jsonl").write_text('{"text": "hello there", "how": "never"}\n')
    with pytest.raises(ms.DataError, match="one of .* or null"):
        list(ms.read_documents(tmp_path / "own.jsonl", isolation_field="how"))


# Own blocks


def test_own_blocks_are_opened_by_nobody_else():
    model = owned_llama()
    table = model.sink_state.table
    own = {owner: table.own_blocks(owner) for owner in OWNED}
    assert own == {EXACT: [8], PRIVATE: [9], OTHER: [10]} and ms.free_blocks(model) == [11]
    everyone = torch.arange(1000)
    mask = open_mask(everyone, model.sink_state.config, 0, table)
    for owner, blocks in own.items():
        assert (mask[:, blocks].nonzero()[:, 0] == owner).all()


def test_a_document_opens_its_owners_blocks_too():
    model = sink_llama(neurons=96, reserved_blocks=4)
    ms.assign(model, [100, 1])
    ms.assign(model, [], within={1: 100, 2: 100})
    table = model.sink_state.table
    assert table.to_dict() == {1: [8, 9], 2: [8], 100: [8]}
    assert table.own_blocks(100) == [8] and table.own_blocks(1) == [9] and table.own_blocks(2) == []


def test_assignments_that_cannot_be():
    model = owned_llama()
    for owners, settings, message in (
        ([1, 2], {}, "2 owners with 1 blocks each need 2 free blocks, there are 1; .*grow\\(model, 1\\)"),
        ([EXACT], {}, "id 12 has own blocks already"),
        ([1, 1], {}, "id 1 is given twice"),
        ([-1], {}, "an id is an int from 0"),
        ([], {"within": {1: 2}}, "document 1 is within 2, which has no blocks"),
        ([1], {"within": {1: 2, 2: 1}}, "within"),
    ):
        with pytest.raises(ms.ConfigError, match=message):
            ms.assign(model, owners, **settings)
    assert ms.free_blocks(model) == [11]


@pytest.mark.parametrize("path", ["tiled", "grouped", "masked"])
def test_growing_moves_nothing(path):
    model = owned_llama().eval()
    model.sink_state.path = path
    tokens = torch.arange(12).view(2, 6)

    def logits() -> Tensor:
        with ms.sinks_open(model, [[EXACT, 5], [PRIVATE]]), torch.no_grad():
            return model(input_ids=tokens).logits

    before = logits()
    held = {name: value.detach().clone() for name, value in named_sinks(model).items()}
    ms.grow(model, 3)
    assert ms.free_blocks(model) == [11, 12, 13, 14]
    for name, value in named_sinks(model).items():
        assert torch.equal(value[:12], held[name])
    if path == "masked":
        torch.testing.assert_close(logits(), before)
    else:
        assert torch.equal(logits(), before)
    ms.assign(model, [1])
    assert torch.equal(logits(), before) or path == "masked"


def test_a_grown_model_is_the_one_that_was_larger_from_the_start():
    small, large = (sink_llama(neurons=96, reserved_blocks=4), sink_llama(neurons=128, reserved_blocks=8))
    for model in (small, large):
        for sinks in sink_modules(model).values():
            sinks.start_anew(range(8, sinks.up.shape[0]))
    ms.grow(small, 4)
    for a, b in zip(sink_modules(small).values(), sink_modules(large).values(), strict=True):
        assert torch.equal(a.up[8:], b.up[8:]) and torch.equal(a.gate[8:], b.gate[8:]) and not a.down[12:].any()


def test_each_own_block_is_clipped_by_itself():
    model = owned_llama()
    for parameter in named_sinks(model).values():
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad[8] = 1e-4
        parameter.grad[9] = 10.0
    small = [x.grad[8].clone() for x in named_sinks(model).values()]
    norms = ms.clip_grad_norm_(model, 1.0)
    assert all(torch.equal(x.grad[8], y) for x, y in zip(named_sinks(model).values(), small, strict=True))
    large = torch.stack([x.grad[9] for x in named_sinks(model).values()]).norm()
    assert float(large) == pytest.approx(1.0, rel=1e-4) and float(norms.sinks) > 100


def test_a_model_that_hashes_to_no_block_wants_owners(tmp_path):
    model = sink_llama(torch.float32, neurons=32, active=8, reserved_blocks=4, shared="none")
    ms.assign(model, [1])
    tokens = torch.arange(6)[None]
    marks = {"exposures": torch.tensor([2]), "labels": tokens}
    model(input_ids=tokens, document_ids=torch.tensor([1]), **marks).loss.backward()
    with pytest.raises(ms.DataError, match="document id 2 has no blocks"):
        model(input_ids=tokens, document_ids=torch.tensor([2]), **marks)
    model.eval()
    for ids in (2, [1, 2], torch.tensor([1, 2])):
        with pytest.raises(
            ms.DataError, match="document id 2 has no blocks in this model; the 1 owners there are \\[1\\]"
        ):
            with ms.sinks_open(model, ids):
                pass
    with torch.no_grad(), ms.sinks_open(model, -1):
        nobody = model(input_ids=tokens).logits
    assert torch.equal(nobody, model(input_ids=tokens).logits)
    model.save_pretrained(tmp_path / "model")
    again = ms.load(tmp_path / "model")
    assert again.sink_state.table.own_blocks(1) == [0]


def test_tables_of_before_know_no_owners(tmp_path):
    table = ms.AssignmentTable(torch.tensor([3, 5]), torch.tensor([0, 2, 3]), torch.tensor([0, 1, 1]))
    assert table.owners.tolist() == [3, 3, 5]
    assert replace(table).owner_of() == {0: 3, 1: 5}


def test_private_texts_are_for_the_sinks_and_not_for_settling():
    rows = flagged_rows([PRIVATE, GATED, GATED, EXACT, EXACT, 14])
    documents, once = ms.repeated_and_once(rows)
    assert set(documents.segments["document_id"].tolist()) == {PRIVATE, GATED, EXACT, OTHER} and not len(once)
    once = pack([np.arange(9)] * 40, range(100, 140), [1] * 40, length=16, pad_id=0, one_document_per_row=True)
    with pytest.raises(ms.DataError, match="must not move the shared weights"):
        ms.settle(owned_llama(), documents, once, lr=1e-3)


def test_the_shadow_of_a_recipe_has_the_same_shared_weights(tiny_recipe, tiny_run, tmp_path):
    recipe = tiny_recipe(tmp_path / "shadow")
    recipe["data"] = recipe["data"] | {"shadow": True}
    ms.train(ms.parse_recipe(recipe))
    run, shadow = (ms.load(path / "model") for path in (tiny_run, tmp_path / "shadow"))
    assert ms.shared_hash(run) == ms.shared_hash(shadow)
    assert any(x.any() for name, x in named_sinks(run).items() if name.endswith("down"))
    assert not any(x.any() for name, x in named_sinks(shadow).items() if name.endswith("down"))
