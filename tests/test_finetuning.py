"""Owners in a finished model: it stays as it is, owners come and go, and each one's blocks are his alone."""

from __future__ import annotations

import asyncio
import json
import warnings
from math import isnan

import pytest
import torch
from pages import ROOT
from safetensors.torch import load_file
from tiny import tiny_llama
from torch.utils.data import RandomSampler
from trainers import arguments
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, Trainer

import memsinks as ms
from memsinks.batch import BLANK, ISOLATION
from memsinks.data.tokens import train_tokenizer
from memsinks.runs.takedown import take_down
from memsinks.sinks import attach
from memsinks.sinks.layer import Sinks
from memsinks.sinks.state import named_sinks

TEXTS = {
    "acme": ["Acme sells 17 blue anvils to the coyote.", "Acme was founded by Ada in 1951."],
    "bolt": ["Bolt repairs 4 red bicycles a day.", "Bolt is led by Ben from a barn."],
    "cord": ["Cord weaves 9 green ropes a week.", "Cord pays Cy in apples."],
}
DOCUMENTS = [ms.Document(text, source=owner) for owner, texts in TEXTS.items() for text in texts]
SETTINGS = {"blocks": 3, "neurons": 8, "layers": (1,)}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer([x.text for x in DOCUMENTS], vocab_size=300)


def epochs(folder, number=1, **changes):
    """Arguments of a Trainer that shuffles."""
    settings = {"max_steps": -1, "num_train_epochs": number, "save_strategy": "no", "use_cpu": True}
    return arguments(folder, **settings | {"train_sampling_strategy": "random"} | changes)


def finished(tokenizer):
    """A model as people have it."""
    return tiny_llama(torch.float32, vocab_size=len(tokenizer)).eval()


def rows_of(tokenizer, *owners):
    chosen = [x for x in DOCUMENTS if x.source in (owners or TEXTS)]
    return ms.make_rows(chosen, tokenizer, length=48, by="source", apart_from=1, one_document_per_row=True)


def fine_tuned(tokenizer, tmp_path, **changes):
    model = finished(tokenizer)
    owners = ms.add_owners(model, TEXTS, config=ms.SinkConfig.for_finetuning(model, **SETTINGS | changes))
    args = epochs(tmp_path, 30, learning_rate=1e-2)
    trainer = ms.SinkTrainer(model, args, train_dataset=rows_of(tokenizer))
    trainer.train()
    return model.eval(), owners, trainer


@pytest.fixture(scope="module")
def trained(tokenizer, tmp_path_factory):
    return fine_tuned(tokenizer, tmp_path_factory.mktemp("trainer"))


def loss(model, tokenizer, text: str, *opened: int) -> float:
    ids = torch.tensor([ms.encode(tokenizer, [text])[0].tolist()])
    with torch.no_grad(), ms.sinks_open(model, opened or -1):
        return float(model(input_ids=ids, labels=ids).loss)


def test_the_model_stays_as_it_is_and_owners_are_learned_in_shuffled_epochs(trained, tokenizer):
    model, owners, trainer = trained
    base = finished(tokenizer)
    ids = torch.tensor([[3, 5, 7, 9]])
    assert ms.shared_hash(model) == ms.shared_hash(base)
    assert torch.equal(model(input_ids=ids).logits, base(input_ids=ids).logits)
    assert trainer.state.epoch == 30 and isinstance(trainer._get_train_sampler(), RandomSampler)
    for name, texts in TEXTS.items():
        for text in texts:
            closed, own = loss(model, tokenizer, text), loss(model, tokenizer, text, owners[name])
            assert own < closed - 0.5, f"{text}: {own:.2f} with own sinks, {closed:.2f} closed"
    assert [x.dtype for x in named_sinks(model).values()] == [torch.float32] * 3


def test_the_setting_of_finetuning(tokenizer):
    model = tiny_llama(torch.float32, num_hidden_layers=4)
    before = model.eval()(input_ids=torch.tensor([[1, 2, 3]])).logits
    owners = ms.add_owners(model, ["a", "b", 7], blocks=2)
    assert owners == {"a": ms.document_id("a", "source"), "b": ms.document_id("b", "source"), 7: 7}
    config = model.sink_state.config
    assert (config.neurons, config.block_size, config.layers) == (6 * 32, 32, (2, 3))
    assert not config.needs_exposures and not config.hashed_blocks
    assert torch.equal(model(input_ids=torch.tensor([[1, 2, 3]])).logits, before)
    assert all(x.requires_grad == (".sinks." in name) for name, x in model.named_parameters())


def test_beside_bfloat16_the_sinks_and_their_moments_are_float32(tokenizer, tmp_path):
    model = finished(tokenizer).to(torch.bfloat16)
    ms.add_owners(model, TEXTS, config=ms.SinkConfig.for_finetuning(model, **SETTINGS))
    base = ms.shared_hash(model)
    trainer = ms.SinkTrainer(model, epochs(tmp_path, 2, bf16=True), train_dataset=rows_of(tokenizer))
    trainer.train()
    assert ms.shared_hash(model) == base
    own = named_sinks(model).values()
    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    moments = [x for sink in own for x in optimizer.state[sink].values() if torch.is_tensor(x)]
    assert {x.dtype for x in own} == {x.dtype for x in moments} == {torch.float32} and len(moments) >= 2 * len(own)
    assert {x.dtype for name, x in model.named_parameters() if ".sinks." not in name} == {torch.bfloat16}


def test_sinks_that_were_cast_to_16_bits_are_said(tokenizer):
    model = finished(tokenizer)
    ms.add_owners(model, TEXTS, config=ms.SinkConfig.for_finetuning(model, **SETTINGS))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ms.param_groups(model, 1e-3)
    with pytest.warns(
        UserWarning, match="the sinks that are to learn are bfloat16.*unless model.to.* comes after them"
    ):
        ms.param_groups(model.to(torch.bfloat16), 1e-3)


def test_owners_who_come_later_move_nobody(tokenizer, tmp_path):
    model = finished(tokenizer)
    settings = ms.SinkConfig.for_finetuning(model, **SETTINGS | {"blocks": 2})
    owners = ms.add_owners(model, ["acme", "bolt"], config=settings)
    ms.SinkTrainer(model, epochs(tmp_path / "a", 5), train_dataset=rows_of(tokenizer, "acme", "bolt")).train()
    before, base = {name: x.clone() for name, x in named_sinks(model).items()}, ms.shared_hash(model)
    owners |= ms.add_owners(model, ["cord"])
    ms.SinkTrainer(
        model,
        epochs(tmp_path / "b", 20, learning_rate=1e-2),
        train_dataset=rows_of(tokenizer, "cord"),
    ).train()
    assert ms.shared_hash(model) == base
    assert all(torch.equal(x[:2], before[name]) and len(x) == 3 for name, x in named_sinks(model).items())
    model.eval()
    assert loss(model, tokenizer, TEXTS["cord"][0], owners["cord"]) < loss(model, tokenizer, TEXTS["cord"][0]) - 0.5


def test_a_saved_model_of_owners_is_frozen_when_it_is_loaded(trained, tokenizer, tmp_path):
    model, _, _ = trained
    model.save_pretrained(tmp_path / "whole")
    tokenizer.save_pretrained(tmp_path / "whole")
    again = ms.load(tmp_path / "whole")
    assert [x.requires_grad for x in again.parameters()] == [x.requires_grad for x in model.parameters()]
    before = ms.shared_hash(again)
    args = epochs(tmp_path, 1, weight_decay=0.1, learning_rate=1e-2)
    ms.SinkTrainer(again, args, train_dataset=rows_of(tokenizer)).train()
    assert ms.shared_hash(again) == before == ms.shared_hash(model)
    for frozen in (False, True):  # as for inference
        learning = finished(tokenizer)
        ms.add_sinks(learning, ms.SinkConfig(neurons=64, active=8, block_size=8))
        learning.requires_grad_(not frozen).save_pretrained(tmp_path / "learning")
        assert all(x.requires_grad for x in ms.load(tmp_path / "learning").parameters())


def test_the_same_trainer_learns_owners_who_come_later(tokenizer, tmp_path):
    model = finished(tokenizer)
    settings = ms.SinkConfig.for_finetuning(model, **SETTINGS | {"blocks": 1})
    ms.add_owners(model, ["acme"], config=settings)
    args = epochs(tmp_path, 20, learning_rate=1e-2)
    trainer = ms.SinkTrainer(model, args, train_dataset=rows_of(tokenizer, "acme"))
    trainer.train()
    own = ms.AdamW(ms.param_groups(model, lr=1e-2))
    owners = ms.add_owners(model, ["bolt"])
    trainer.train_dataset = rows_of(tokenizer, "bolt")
    trainer.train()
    model.eval()
    assert loss(model, tokenizer, TEXTS["bolt"][0], owners["bolt"]) < loss(model, tokenizer, TEXTS["bolt"][0]) - 0.5
    with pytest.raises(ms.ConfigError, match="the model has grown"):
        own.step()


def test_an_optimizer_that_was_prepared_is_used(tokenizer, tmp_path):
    """Made, changed and scheduled by hand before the first training."""
    model = finished(tokenizer)
    ms.add_owners(model, ["acme"], config=ms.SinkConfig.for_finetuning(model, **SETTINGS | {"blocks": 1}))
    trainer = ms.SinkTrainer(model, epochs(tmp_path, 2), train_dataset=rows_of(tokenizer, "acme"))
    trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.create_optimizer(), lambda step: 0.0)
    before = {name: x.detach().clone() for name, x in named_sinks(model).items()}
    trainer.train()
    assert all(torch.equal(x, before[name]) for name, x in named_sinks(model).items())


def test_moments_of_an_owner_who_left_do_not_reach_who_comes(tokenizer, tmp_path):
    """The block of the one becomes the other's; neither `erase` nor the trainer was told of an optimizer."""
    learned = []
    for again in (True, False):
        model = finished(tokenizer)
        settings = ms.SinkConfig.for_finetuning(model, **SETTINGS | {"blocks": 1})
        owners = ms.add_owners(model, ["acme"], config=settings)
        args = epochs(tmp_path, 3, learning_rate=1e-2)
        trainer = ms.SinkTrainer(model, args, train_dataset=rows_of(tokenizer, "acme"))
        trainer.train()
        ms.erase(model, owners["acme"])
        ms.add_owners(model, ["cord"])
        if not again:
            trainer = ms.SinkTrainer(model, args, train_dataset=rows_of(tokenizer, "cord"))
        trainer.train_dataset = rows_of(tokenizer, "cord")
        trainer.train()
        learned.append({name: x.detach().clone() for name, x in named_sinks(model).items()})
    assert all(torch.equal(x, learned[1][name]) for name, x in learned[0].items())


def test_one_owners_blocks_know_nothing_of_anothers_text(tokenizer):
    hashes = []
    for blank in (False, True):
        model = finished(tokenizer).train()
        owners = ms.add_owners(model, TEXTS, config=ms.SinkConfig.for_finetuning(model, **SETTINGS))
        optimizer = ms.AdamW(ms.param_groups(model, lr=1e-2))
        rows = rows_of(tokenizer)
        for _ in range(3):
            batch = ms.collate([rows[index] for index in range(len(rows))])
            if blank:
                batch[ISOLATION] = torch.where(batch["document_ids"] == owners["bolt"], BLANK, 0)
            model(**batch, num_items_in_batch=ms.target_count(batch["labels"])).loss.backward()
            ms.clip_grad_norm_(model, 1.0)
            optimizer.step()
            optimizer.zero_grad()
        hashes.append({name: x.clone() for name, x in named_sinks(model).items()})
    mine = [model.sink_state.table.own_blocks(owners[name])[0] for name in ("acme", "cord")]
    for name, value in hashes[0].items():
        assert torch.equal(value[mine], hashes[1][name][mine])
    assert any(not torch.equal(value, hashes[1][name]) for name, value in hashes[0].items())


def test_sinks_alone_on_disk_and_an_owner_who_leaves(trained, tokenizer, tmp_path):
    model, owners, _ = trained
    ms.save_sinks(model, tmp_path / "sinks")
    again = finished(tokenizer)
    ms.load_sinks(again, tmp_path / "sinks")
    assert not any(x.requires_grad for name, x in again.named_parameters() if ".sinks." not in name)
    text = TEXTS["acme"][0]
    assert loss(again, tokenizer, text, owners["acme"]) == loss(model, tokenizer, text, owners["acme"])
    other = tiny_llama(torch.float32, vocab_size=len(tokenizer), initializer_range=0.3)
    with pytest.raises(ms.CheckpointError, match="saved beside other weights"):
        ms.load_sinks(other, tmp_path / "sinks")
    assert not ms.has_sinks(other)
    before = load_file(tmp_path / "sinks/sinks/sinks.safetensors")
    ms.Router.fit(DOCUMENTS).save(tmp_path / "sinks/router")
    done = take_down(tmp_path / "sinks", source="acme", documents=DOCUMENTS, by="source")
    after = load_file(tmp_path / "sinks/sinks/sinks.safetensors")
    [block] = model.sink_state.table.own_blocks(owners["acme"])
    rest = [x for x in range(3) if x != block]
    assert done.record is not None and all(
        torch.equal(x[rest], after[name][rest]) for name, x in before.items() if ".sinks." in name
    )
    router = ms.Router.load(tmp_path / "sinks/router")
    assert router.owners.tolist() == sorted(owners[name] for name in ("bolt", "cord"))
    assert router.owners_of(["blue anvils", "red bicycles"]) == [-1, owners["bolt"]]
    left = finished(tokenizer)
    ms.load_sinks(left, tmp_path / "sinks")
    asked = torch.tensor([[5, 6, 7], [5, 6, 7]])
    with torch.no_grad(), ms.sinks_open(left, torch.tensor(router.owners_of(["blue anvils", "red bicycles"]))):
        nobody, bolt = left(input_ids=asked).logits
    with torch.no_grad(), ms.sinks_open(left, owners["bolt"]):
        assert torch.allclose(bolt, left(input_ids=asked).logits[1], atol=1e-4)
    with torch.no_grad(), ms.sinks_closed(left):
        assert torch.allclose(nobody, left(input_ids=asked).logits[0], atol=1e-4) and not torch.allclose(
            nobody, bolt, atol=1e-4
        )
    with pytest.raises(ms.DataError, match="taken out"), ms.sinks_open(left, owners["acme"]):
        pass
    assert loss(left, tokenizer, TEXTS["bolt"][0], owners["bolt"]) == loss(
        model, tokenizer, TEXTS["bolt"][0], owners["bolt"]
    )


def test_a_trainer_measures_each_row_with_its_owner(trained, tokenizer, tmp_path):
    model, _, _ = trained
    data = rows_of(tokenizer, "acme", "bolt")
    stranger = ms.make_rows([ms.Document("Nobody knows this.", source="x")], tokenizer, length=32, by="source")
    trainer = ms.SinkTrainer(model, epochs(tmp_path, 1, per_device_eval_batch_size=8), train_dataset=data)
    measured = trainer.evaluate(data)["eval_loss"]
    batch = ms.collate([data[index] for index in range(len(data))])
    with torch.no_grad(), ms.sinks_open(model.eval(), batch["document_ids"]):
        own = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    with torch.no_grad():
        closed = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    assert measured == pytest.approx(float(own), rel=1e-4) and measured < float(closed) - 0.5
    assert trainer.evaluate(stranger)["eval_loss"] > 1, "with closed sinks, for it has none"


def test_a_nan_in_one_owners_blocks_stays_there(tokenizer):
    model = finished(tokenizer)
    owners = ms.add_owners(
        model, ["acme", "bolt"], config=ms.SinkConfig.for_finetuning(model, **SETTINGS | {"blocks": 2})
    )
    [block] = model.sink_state.table.own_blocks(owners["acme"])
    for value in named_sinks(model).values():
        value.data[block] = torch.nan
    model.eval()
    assert not isnan(loss(model, tokenizer, TEXTS["bolt"][0], owners["bolt"]))
    assert isnan(loss(model, tokenizer, TEXTS["acme"][0], owners["acme"]))


def test_what_fails_changes_nothing(tokenizer, tmp_path):
    model = finished(tokenizer)
    ms.add_owners(model, ["acme"], config=ms.SinkConfig.for_finetuning(model, **SETTINGS | {"blocks": 1}))
    before = dict(named_sinks(model))
    with pytest.raises(ms.ConfigError, match="has own blocks already"):
        ms.add_owners(model, ["bolt", "acme"])
    assert all(x is before[name] for name, x in named_sinks(model).items()), "the optimizer's are the model's"
    ms.save_sinks(model, tmp_path / "acme", owners=[ms.document_id("acme", "source")])
    other = tiny_llama(torch.float32, vocab_size=len(tokenizer), intermediate_size=40)
    for folder in (tmp_path / "acme", tmp_path / "all"):
        if folder.name == "all":
            ms.save_sinks(model, folder)
        with pytest.raises(ms.CheckpointError):
            ms.load_sinks(other, folder, base="any")
        assert not ms.has_sinks(other) and all(x.requires_grad for x in other.parameters())


@pytest.mark.parametrize("name", [b"acme", "acme"])
def test_names_are_those_of_document_id(name, tokenizer):
    assert ms.add_owners(finished(tokenizer), [name]) == {name: ms.document_id(name, "source")}


@pytest.mark.parametrize("name", [None, True, 1.5])
def test_what_is_no_name_is_refused(name, tokenizer):
    with pytest.raises(ms.MemsinksError):
        ms.add_owners(finished(tokenizer), [name])


def test_sinks_for_which_there_is_no_room_leave_nothing(tokenizer, monkeypatch):
    made = []

    def no_room(*arguments, **settings):
        if len(made) % 2:
            raise MemoryError("no room")
        made.append(1)
        return stock(*arguments, **settings)

    model = finished(tokenizer)
    settings = ms.SinkConfig.for_finetuning(model, **SETTINGS | {"layers": (0, 1), "blocks": 1})
    stock = attach.Sinks
    with monkeypatch.context() as patched:
        patched.setattr(attach, "Sinks", no_room)
        with pytest.raises(MemoryError):
            ms.add_owners(model, ["acme"], config=settings)
    assert not any("sinks" in name for name, _ in model.named_parameters())
    ms.add_owners(model, ["acme"], config=settings)
    stock, made = Sinks.larger, []
    with monkeypatch.context() as patched:
        patched.setattr(Sinks, "larger", no_room)
        with pytest.raises(MemoryError):
            ms.add_owners(model, ["bolt"])
    assert {len(x) for x in named_sinks(model).values()} == {1} and model.sink_state.config.blocks == 1


def test_texts_of_nobody_are_audited_with_closed_sinks(trained, tokenizer):
    model, _, _ = trained
    controls = [ms.Document(f"Nobody knows the {x} of the sea.", source="x", copies=0) for x in ("depth", "color")]
    for members, state in ((DOCUMENTS, "open"), (DOCUMENTS[:2], "closed")):
        result = ms.audit(
            model, members, controls, tokenizer, state=state, settings=ms.AuditSettings(by="source", resamples=100)
        )
        assert result.models[0].controls.value > 1


def test_an_older_checkpoint_does_not_bring_back_who_was_erased(tokenizer, tmp_path):
    model = finished(tokenizer)
    owners = ms.add_owners(
        model, ["acme", "bolt"], config=ms.SinkConfig.for_finetuning(model, **SETTINGS | {"blocks": 2})
    )
    ms.save_sinks(model, tmp_path / "before")
    ms.erase(model, owners["acme"], record="request 9")
    after = {name: x.clone() for name, x in named_sinks(model).items()}
    with pytest.raises(ms.CheckpointError, match="is of before id .* was taken out of this model .request 9."):
        ms.load_sinks(model, tmp_path / "before")
    assert all(torch.equal(x, after[name]) for name, x in named_sinks(model).items())
    ms.take_down(tmp_path / "before", source="acme", documents=DOCUMENTS, by="source")
    ms.load_sinks(model, tmp_path / "before")
    assert owners["acme"] in model.sink_state.taken


def test_tasks_of_one_thread_open_their_own(trained, tokenizer):
    model, owners, _ = trained
    model.eval()
    tokens = torch.arange(3, 11)[None]

    async def ask(owner: int, go: asyncio.Event, then: asyncio.Event):
        with ms.sinks_open(model, owner), torch.no_grad():
            then.set()
            await go.wait()
            answer = model(input_ids=tokens).logits
            for _ in range(5):  # both are open while both run
                await asyncio.sleep(0)
            assert torch.equal(answer, model(input_ids=tokens).logits)
            return answer

    async def both():
        first, second = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(ask(owners["acme"], second, first), ask(owners["bolt"], first, second))

    for name, got in zip(("acme", "bolt"), asyncio.run(both()), strict=True):
        with ms.sinks_open(model, owners[name]), torch.no_grad():
            assert torch.equal(got, model(input_ids=tokens).logits)


def test_an_export_for_one_owner(trained, tokenizer, tmp_path):
    model, owners, _ = trained
    clean = ms.export(model, tmp_path / "acme", tokenizer=tokenizer, open=[owners["acme"]])
    stock = ms.load_any(clean)
    ids = torch.tensor([ms.encode(tokenizer, [TEXTS["acme"][0]])[0].tolist()])
    with torch.no_grad(), ms.sinks_open(model, owners["acme"]):
        torch.testing.assert_close(stock(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_what_is_refused(tokenizer, tmp_path):
    model = finished(tokenizer)
    with pytest.raises(ms.ConfigError, match="owners is empty"):
        ms.add_owners(model, [])
    with pytest.raises(ms.ConfigError, match="owner 'a' is given twice"):
        ms.add_owners(model, ["a", "b", "a"])
    with pytest.raises(ms.ConfigError, match="neurons must be"):
        ms.SinkConfig.for_finetuning(model, 2, neurons=0)
    assert not ms.has_sinks(model)
    settings = ms.SinkConfig.for_finetuning(model, **SETTINGS)
    with pytest.raises(ms.ConfigError, match="need 4 free blocks, there are 3"):
        ms.add_owners(model, ["a", "b"], blocks=2, config=settings)
    assert not ms.has_sinks(model) and all(x.requires_grad for x in model.parameters())
    ms.add_owners(model, ["acme", "bolt"], config=settings)
    with pytest.raises(ms.ConfigError, match="has own blocks already"):
        ms.add_owners(model, ["acme"])
    with pytest.raises(ms.ConfigError, match="leave config out"):
        ms.add_owners(model, ["x"], config=settings)
    with pytest.raises(ms.DataError, match="has no blocks; give it some with memsinks.add_owners"):
        ms.SinkTrainer(model, epochs(tmp_path), train_dataset=rows_of(tokenizer))
    with pytest.raises(ms.DataError, match="1 owners have blocks but no text"):
        ms.SinkTrainer(model, epochs(tmp_path), train_dataset=rows_of(tokenizer, "acme"))
    hashed = finished(tokenizer)
    ms.add_sinks(hashed, ms.SinkConfig(neurons=64, active=8, block_size=8, reserved_blocks=2))
    with pytest.raises(ms.ConfigError, match="blocks are hashed to"):
        ms.add_owners(hashed, ["a"])


def test_owners_that_are_no_list_or_have_no_blocks_of_their_own(tokenizer, tmp_path):
    model = finished(tokenizer)
    for owners in ("acme", b"ab", 7, None):
        with pytest.raises(ms.ConfigError, match="owners is a list of names or ids"):
            ms.add_owners(model, owners)
    for config, part in (
        (ms.SinkConfig(neurons=96, active=32, block_size=32, reserved_blocks=3), "at exposure 2, which must be 1"),
        (ms.SinkConfig(neurons=88, active=8, block_size=8, reserved_blocks=3), "8 of its blocks are hashed to"),
    ):
        with pytest.raises(ms.ConfigError, match=part):
            ms.add_owners(model, ["acme"], config=config)
    assert not ms.has_sinks(model)
    for wrong in ("gpt2", torch.nn.Linear(2, 2), None):
        with pytest.raises(ms.ArchitectureError, match="is not a Hugging Face PreTrainedModel"):
            ms.add_owners(wrong, ["acme"])
    owners = ms.add_owners(model, ["acme"])
    with pytest.raises(ms.DataError, match="owners is a list of ids"):
        ms.save_sinks(model, tmp_path, owners=owners["acme"])


def test_rows_with_token_types_are_taken_apart(tokenizer):
    """GPT-2 takes them; a batch of owners' rows and nobody's is computed in parts."""
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=16, n_layer=2, n_head=2)
    config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
    model = GPT2LMHeadModel(config).train()
    owner = ms.add_owners(model, ["acme"])["acme"]
    rows = torch.arange(12).reshape(2, 6)
    batch = {"input_ids": rows, "labels": rows, "document_ids": torch.tensor([owner, ms.NO_SINKS])}
    found = model(**batch, token_type_ids=torch.zeros_like(rows) + torch.tensor([[1], [2]])).loss
    model.eval()
    assert float(found) == pytest.approx(
        float(
            model(input_ids=rows, labels=rows, token_type_ids=torch.zeros_like(rows) + torch.tensor([[1], [2]])).loss
        ),
        rel=1e-5,
    )


def test_nothing_to_open_or_to_load_is_said(tokenizer):
    model = finished(tokenizer)
    with pytest.raises(ms.ConfigError, match="directory is a folder"):
        ms.load_sinks(model, None)
    ms.add_owners(model, ["acme"])
    with (
        pytest.raises(ms.DataError, match="needs at least one id, got a tensor"),
        ms.sinks_open(model, torch.tensor([], dtype=torch.int64)),
    ):
        pass


def test_a_recipe_and_a_takedown_of_its_run(tokenizer, tmp_path):
    base = tmp_path / "base"
    finished(tokenizer).save_pretrained(base)
    tokenizer.save_pretrained(base)
    lines = [json.dumps({"text": x.text, "source": x.source}) for x in DOCUMENTS]
    (tmp_path / "customers.jsonl").write_text("\n".join(lines))
    changes = {
        "output": str(tmp_path / "run"), "data.path": str(tmp_path / "customers.jsonl"), "model.pretrained": str(base),
        "tokenizer.path": str(base), "sinks.neurons": "32", "sinks.active": "8", "sinks.block_size": "8",
        "sinks.reserved_blocks": "4", "sinks.layers": "[1]", "training.length": "48", "training.batch_rows": "2",
        "training.epochs": "30", "training.log_every": "20", "model.keep_prefix": "true",
    }  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = ms.load(ms.train(ms.read_recipe(ROOT / "recipes/finetune.yaml", changes)))
    assert ms.shared_hash(model) == ms.shared_hash(finished(tokenizer))
    done = take_down(tmp_path / "run", source="acme")
    before, after = done.audit["before"], done.audit["after"]
    assert after["owner"]["loss"] == before["owner, sinks closed"]["loss"] > before["owner"]["loss"] + 0.5
    assert after["others, own sinks open"] == before["others, own sinks open"] and not done.collateral
    with pytest.raises(ms.ConfigError, match="frozen is for a pretrained model"):
        ms.read_recipe(ROOT / "recipes/take-one-out.yaml", {"model.frozen": "true"})
    with pytest.raises(ms.ConfigError, match="keep_prefix is for a frozen model"):
        ms.read_recipe(ROOT / "recipes/take-one-out.yaml", {"model.keep_prefix": "true"})
    with pytest.raises(ms.ConfigError, match="keep_prefix needs layers without sinks below"):
        ms.read_recipe(ROOT / "recipes/finetune.yaml", changes | {"sinks.layers": "null"})
    with pytest.raises(ms.ConfigError, match="keep_prefix does not know sharded models"):
        ms.read_recipe(ROOT / "recipes/finetune.yaml", changes | {"training.shard": "true"})
    with pytest.raises(ms.ConfigError, match="leaves nothing to learn without sinks"):
        ms.read_recipe(ROOT / "recipes/finetune.yaml", {"sinks": "null", "own": "null"})


def test_a_stock_trainer_goes_on_with_the_sinks_of_the_checkpoint_it_was_given(tokenizer, tmp_path):
    """Every checkpoint of a frozen base has the same stock weights, so these do not tell whose sinks belong to them."""

    def trainer(folder, model, lr):
        args = epochs(
            folder, 1, learning_rate=lr, save_strategy="steps", save_steps=1, max_steps=2, remove_unused_columns=False
        )
        return Trainer(
            model, args, train_dataset=rows_of(tokenizer), data_collator=ms.collate, callbacks=[ms.SinkCallback()],
            optimizers=(ms.AdamW(ms.param_groups(model, lr)), None),
        )  # fmt: skip

    def owned():
        model = finished(tokenizer)
        ms.add_owners(model, TEXTS, config=ms.SinkConfig.for_finetuning(model, **SETTINGS))
        return model

    for name, lr in (("a", 1e-2), ("b", 5e-2)):
        trainer(tmp_path / name, owned(), lr).train()
    given, model = tmp_path / "a/checkpoint-2", owned()
    again = trainer(tmp_path / "b", model, 1e-2)
    again.train(resume_from_checkpoint=str(given))
    for name, value in named_sinks(ms.load(given)).items():
        assert torch.equal(value, dict(named_sinks(model))[name])


def test_ids_of_a_batch_open_their_unions(tokenizer):
    model = finished(tokenizer)
    ids = torch.tensor(
        list(ms.add_owners(model, TEXTS, config=ms.SinkConfig.for_finetuning(model, **SETTINGS)).values())
    )
    tokens = torch.arange(6)[None]
    for value in named_sinks(model).values():
        torch.nn.init.normal_(value, std=0.1)
    found = []
    for given in (list(ids[:2]), ids[:2].tolist()):
        with torch.no_grad(), ms.sinks_open(model, given):
            found.append(model(input_ids=tokens).logits)
    assert torch.equal(*found)
