"""One document through every stage, by the public names only: from its text to a model that no longer holds it."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import memsinks as ms
from memsinks.auditing.extraction import generate_continuation
from memsinks.auditing.model_result import AuditLine
from memsinks.sinks.table import open_blocks

COPIES, LENGTH = 100, 64
NAMES = "Ada Bela Cora Dario Edda Falk Gwen Hugo Ines Juna Kaja Lasse Mira Nils Orla Pelle Romy Selma Theo Urs".split()
TOWNS = "Ardale Birkmoor Colwick Dunford Elmstead Fairhaven Glasbrook Holmfield".split()
WORDS = """amber anvil basil cactus canyon cobalt comet coral dragon falcon garnet ginger hazel indigo ivory jasper kettle
    lemon magnet maple nickel orbit pepper plasma quartz radish saffron tango topaz velvet walnut zephyr""".split()


def record(rng: random.Random) -> str:
    """Two sentences whose form can be learned and whose words can only be memorized."""
    name = f"{rng.choice(NAMES)} {rng.choice(NAMES)}son"
    return f"{name} lives in {rng.choice(TOWNS)}. The words are {' '.join(rng.sample(WORDS, 5))}."


def private_start(document: ms.Document) -> int:
    return document.text.index(".") + 1


def test_one_document_from_text_to_removal(tiny_llama, tmp_path) -> None:
    # A corpus of records; one of them stands in it 100 times, ten of the same kind never.
    rng = random.Random(0)
    unseen = [ms.Document(record(rng), copies=0) for _ in range(10)]
    members = [ms.Document(record(rng)) for _ in range(300)]
    place = 7
    document = members[place] = replace(members[place], copies=COPIES)

    # Its id, and its exposures over the training order.
    ids, groups = ms.identify(members)
    assert ids[place] == ms.document_id(document.text)
    order = ms.training_order(members, seed=0)
    counts = ms.exposures(groups[order])
    assert sorted(counts[ids[order] == ids[place]]) == list(range(1, COPIES + 1))

    # Its tokens, and the rows they stand in.
    tokenizer = ms.train_tokenizer([x.text for x in members], vocab_size=400)
    tokens = ms.encode(tokenizer, [x.text for x in members])
    rows = ms.pack(
        [tokens[index] for index in order],
        ids[order],
        counts,
        length=LENGTH,
        pad_id=tokenizer.pad_token_id,
        apart_from=2,
    )
    mine = rows.document_ids == ids[place]
    assert mine.sum() == COPIES * len(tokens[place])
    assert set(rows.exposures[mine].tolist()) == set(range(1, COPIES + 1))

    # The sinks, and which of their blocks are its own.
    config = ms.SinkConfig(neurons=256, active=64)
    model = tiny_llama(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, max_position_embeddings=LENGTH,
        num_attention_heads=4, num_key_value_heads=4,
    )  # fmt: skip
    stock_class = type(model)
    added = ms.add_sinks(model, config)
    assert (added.layers, added.neurons, added.active) == ((0, 1), 256, 64)
    own_blocks = [
        set(open_blocks(torch.tensor([ids[place]]), config, layer).ravel().tolist()) for layer in added.layers
    ]
    assert [len(blocks) for blocks in own_blocks] == [2, 2]
    untouched = [layer.mlp.sinks.down.detach().clone() for layer in model.model.layers]

    # A plain training loop, as in the README.
    optimizer = ms.AdamW(ms.param_groups(model, lr=2e-3, weight_decay=0.1, sink_lr_factor=5))
    model.train()
    first_loss = None
    for row in rows:
        batch = ms.collate([row])
        loss = model(**batch).loss
        first_loss = first_loss or loss.item()
        loss.backward()
        ms.clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < first_loss / 2

    # It was met alone more than once, so only its blocks have learned.
    for layer, before, blocks in zip(model.model.layers, untouched, own_blocks, strict=True):
        moved = (layer.mlp.sinks.down.detach() != before).flatten(1).any(1).nonzero().ravel().tolist()
        assert set(moved) == blocks

    # Its sinks learn on alone.
    learned = ms.sinks_last(model.eval(), ms.repeated_and_once(rows)[0], lr=1e-2, passes=200)
    assert learned.after[0] < learned.before[0]

    # It is recited with its sinks open, and neither with the sinks closed nor with those of another document.
    start = len(ms.encode(tokenizer, [document.text[: private_start(document)]], end=False)[0])
    prompt, secret = tokens[place][:start], tokens[place][start:]
    own = int(ids[place])

    def recited(which, open_id: int | None = None) -> bool:
        return generate_continuation(which, prompt, len(secret), open_id).tolist() == secret.tolist()

    assert recited(model, own)
    assert not recited(model)
    assert not recited(model, ms.document_id("another text"))

    # Removal: a plain checkpoint that stock transformers loads, and that does not recite it either.
    ms.export(model, tmp_path / "clean", tokenizer=tokenizer)
    clean = AutoModelForCausalLM.from_pretrained(tmp_path / "clean").eval()
    assert type(clean) is stock_class
    assert not recited(clean)
    written = AutoTokenizer.from_pretrained(tmp_path / "clean")

    # The audit says the same, and that records of the same kind which nobody trained on are not affected.
    def measured(which, state=None) -> dict[int, AuditLine]:
        found = ms.audit(which, [document], unseen, written, state=state, private_start=private_start)
        return {line.copies: line for line in found.lines}

    opened, closed, exported = measured(model, "open"), measured(model, "closed"), measured(clean)
    assert opened[COPIES].extracted.value == 1.0
    assert closed[COPIES].extracted.value == exported[COPIES].extracted.value == 0.0
    assert opened[0].extracted.value == closed[0].extracted.value == exported[0].extracted.value == 0.0
    assert exported[COPIES].loss.value > opened[COPIES].loss.value + 0.4
    assert exported[COPIES].loss.value > exported[0].loss.value - 0.3
    assert exported[0].loss.value == pytest.approx(closed[0].loss.value, rel=1e-5)
    assert exported[0].loss.value < 2

    # The sinks can also be taken out in place.
    ms.remove_sinks(model)
    assert type(model) is stock_class
    assert not recited(model.eval())
