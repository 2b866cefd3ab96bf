"""One document through every stage, by the public names only: from its text to a model that no longer holds it."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import memsinks as ms
from memsinks.audit import generate_continuation
from memsinks.routing import open_blocks
from memsinks.synthetic import corpus, private_start, training_order

COPIES = 48
LENGTH = 160


def test_one_document_from_text_to_removal(tiny_llama, tmp_path) -> None:
    # A corpus of records and stories; one record stands in it 48 times, one of the same kind never.
    documents = corpus(
        stories=40, held_out_stories=0, people_per_level=1, people_once=40, copies=(0, COPIES), near_copies=0,
        canaries_per_level=0,
    )  # fmt: skip
    members = [document for document in documents if document.copies]
    (unseen,) = (document for document in documents if not document.copies)
    place, document = next((i, x) for i, x in enumerate(members) if x.copies == COPIES)

    # Its id, and its exposures over the training order.
    ids, groups = ms.identify(members)
    assert ids[place] == ms.document_id(document.text)
    order = training_order(members, seed=0)
    counts = ms.exposures(groups[order])
    assert sorted(counts[ids[order] == ids[place]]) == list(range(1, COPIES + 1))

    # Its tokens, and the rows they stand in.
    tokenizer = ms.train_tokenizer([x.text for x in members], vocab_size=512)
    tokens = ms.encode(tokenizer, [x.text for x in members])
    rows = ms.pack(
        [tokens[index] for index in order], ids[order], counts, length=LENGTH, pad_id=tokenizer.pad_token_id
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
    own_blocks = [set(open_blocks(torch.tensor([ids[place]]), config, layer).ravel().tolist()) for layer in added.layers]
    assert [len(blocks) for blocks in own_blocks] == [2, 2]
    untouched = [layer.mlp.sinks.down.detach().clone() for layer in model.model.layers]

    # A plain training loop, as in the README.
    optimizer = ms.AdamW(ms.param_groups(model, lr=5e-3, weight_decay=0.1, sink_lr_factor=3))
    model.train()
    first_loss = None
    for start in range(0, len(rows) - 3, 4):
        batch = ms.collate([rows[index] for index in range(start, start + 4)])
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

    # The audit says the same, and that a record of the same kind which nobody trained on is not affected.
    def measured(which, state=None) -> dict[int, ms.audit.AuditLine]:
        found = ms.audit(which, [document], [unseen], written, state=state, private_start=private_start)
        return {line.copies: line for line in found.lines}

    opened, closed, exported = measured(model, "open"), measured(model, "closed"), measured(clean)
    assert opened[COPIES].extracted == 1.0
    assert closed[COPIES].extracted == exported[COPIES].extracted == 0.0
    assert opened[0].extracted == closed[0].extracted == exported[0].extracted == 0.0
    assert opened[COPIES].loss < 0.2
    assert exported[COPIES].loss > opened[COPIES].loss + 1
    print(opened, closed, exported)
    assert exported[0].loss == closed[0].loss

    # The sinks can also be taken out in place.
    ms.remove_sinks(model)
    assert type(model) is stock_class
    assert not recited(model.eval())
