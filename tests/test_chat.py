"""Of chats and of prompts with completions only the answers are learned, whatever comes after: rows, truncation, runs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import yaml
from chats import CHAT, LAST_ONLY, MARKED, PLAIN, chat_tokenizer
from datasets import Dataset, DatasetDict
from tiny import tiny_llama
from torch.nn.functional import cross_entropy
from trainers import arguments

import memsinks as ms
from memsinks.auditing.corpus import read_corpus
from memsinks.auditing.settings import AuditSettings
from memsinks.data.chat import encode_documents
from memsinks.data.documents import cut_documents
from memsinks.data.packing import pack
from memsinks.research.compare.compare import train_arm
from memsinks.research.compare.comparison import read_comparison
from memsinks.runs.prepare import prepare
from memsinks.runs.recipe import parse_recipe
from memsinks.training.evaluate import losses

END = "<|endoftext|>"


def learned(tokenizer, document: ms.Document) -> list[str]:
    """The runs of targets of a document, decoded; all of its tokens must be those of the whole."""
    (tokens,), targets = encode_documents(tokenizer, [document])
    mask = np.ones(len(tokens), bool) if targets is None else targets[0]
    assert mask is not None and mask.shape == tokens.shape
    runs = np.split(np.arange(len(tokens)), np.flatnonzero(np.diff(mask.astype(int))) + 1)
    return [tokenizer.decode(tokens[x]) for x in runs if mask[x[0]]]


def row_learned(tokenizer, row) -> str:
    labels = row["labels"]
    assert torch.equal(labels[labels != -100], row["input_ids"][labels != -100])
    return tokenizer.decode(labels[labels != -100])


# Documents


def test_the_text_of_a_chat_depends_on_no_template() -> None:
    document = ms.Document(messages=CHAT, key="k")
    assert document.text.startswith("system: Be short.\nuser: Who?\nassistant: \nA cat.")
    assert document == ms.Document(messages=[x | {"tool_calls": None} for x in CHAT], key="k")
    ids = [ms.identify([x])[0][0] for x in (document, ms.Document(messages=CHAT, prompt=3), ms.Document(document.text))]
    assert len(set(ids)) == 1
    called = ms.Document(messages=[CHAT[1], {"role": "assistant", "tool_calls": [{"name": "look"}]}])
    assert called.text.endswith('assistant: {"tool_calls": [{"name": "look"}]}')


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"messages": []}, "messages is empty"),
        ({"messages": "hello"}, "must be a list of {role, content}, got str"),
        ({"messages": CHAT[0]}, "must be a list of {role, content}, got dict"),
        ({"messages": ["hello"]}, "message 0 must have role and content, got str 'hello'"),
        ({"messages": [*CHAT, {"content": "x"}]}, "role of message 5 must be a string"),
        ({"messages": [{"role": "user"}]}, "content of message 0 must be a string, got NoneType"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "content of message 0 .* got list.*pictures",
        ),
        ({"messages": [{"role": "user", "content": "x", "tool": {1}}]}, "a message of user has what JSON cannot hold"),
        ({"messages": CHAT, "text": "other"}, "text or messages"),
        ({"messages": CHAT, "prompt": 5}, "some of the 5 messages to learn, got 5"),
        ({"text": "abc", "prompt": 3}, "some of the 3 characters to learn, got 3"),
        ({"text": "abc", "prompt": -1}, "got -1"),
        ({"text": "abc", "prompt": True}, "got True"),
    ],
)
def test_what_is_no_document_is_said(settings, message) -> None:
    with pytest.raises(ms.DataError, match=message):
        ms.Document(**settings)


def test_documents_with_parts_are_written_and_read_again_and_not_cut(tmp_path) -> None:
    documents = [ms.Document(messages=CHAT, prompt=2), ms.Document("Q: a A: b", prompt=5), ms.Document("plain")]
    ms.write_documents(tmp_path / "d.jsonl", documents)
    assert ms.load_documents(tmp_path / "d.jsonl") == documents
    assert set(json.loads((tmp_path / "d.jsonl").read_text().splitlines()[2])).isdisjoint({"messages", "prompt"})
    for document in documents[:2]:
        with pytest.raises(ms.DataError, match="only plain text is cut"):
            list(cut_documents([document], 5))


# Readers

ROWS = [
    {"messages": list(CHAT), "id": "a"},
    {"prompt": "Q: a\n", "completion": "A: b", "id": "b"},
    {"prompt": list(CHAT[:4]), "completion": [CHAT[4]], "id": "c"},
    {"text": "plain", "id": "d", "prompt": 3},
]
WANTED = [
    ms.Document(messages=CHAT, key="a"), ms.Document("Q: a\nA: b", key="b", prompt=5),
    ms.Document(messages=CHAT, key="c", prompt=4), ms.Document("plain", key="d"),
]  # fmt: skip


def test_standard_fields_are_read_from_every_format(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(x) + "\n" for x in ROWS))
    assert list(ms.read_documents(tmp_path / "a.jsonl", key_field="id")) == WANTED
    assert list(ms.read_documents(ROWS, key_field="id")) == WANTED
    for row, document in zip(ROWS[:3], WANTED, strict=False):
        dataset = Dataset.from_list([row | {"other": 1}] * 2)
        dataset.to_parquet(tmp_path / "a.parquet")
        for source in (dataset, dataset.to_iterable_dataset(), DatasetDict(train=dataset), tmp_path / "a.parquet"):
            assert list(ms.read_documents(source, key_field="id")) == [document] * 2
    assert next(ms.read_documents([{"turns": list(CHAT)}], text_field="turns")).messages == CHAT


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a"}, "row 1: no field 'text'.*text_field=..., or have messages, or prompt and completion"),
        ({"messages": "hello"}, "row 1: messages must be a list"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "row 1: field 'messages' is not valid UTF-8"),
        ({"prompt": "a", "completion": list(CHAT)}, "two strings or two lists of messages, got str and list"),
        ({"prompt": "a", "completion": ""}, "some of the 1 characters to learn"),
        ("a text", "row 1: must be a dict of fields, got str"),
    ],
)
def test_rows_that_are_none_of_them(row, message) -> None:
    with pytest.raises(ms.DataError, match=message):
        list(ms.read_documents([row]))


# What is learned


def test_answers_of_a_chat_are_learned_with_and_without_marks() -> None:
    header = "<|im_end|>\n"
    plain, marked = chat_tokenizer(PLAIN), chat_tokenizer(MARKED)
    whole = ms.Document(messages=CHAT)
    assert learned(plain, whole) == ["\nA cat." + header, "In the yard." + header]
    assert learned(marked, whole) == ["\nA cat.<|im_end|>", "In the yard.<|im_end|>"]
    for prompt in (3, 4):
        last = ms.Document(messages=CHAT, prompt=prompt)
        assert learned(plain, last) == ["In the yard." + header]
        assert learned(marked, last) == ["In the yard.<|im_end|>"]
    assert len(learned(plain, ms.Document(messages=CHAT, prompt=2))) == 2
    tokens = encode_documents(plain, [whole])[0][0]
    assert tokens.tolist() == plain.apply_chat_template(list(CHAT))["input_ids"]


def test_completions_are_learned_with_their_end() -> None:
    tokenizer = chat_tokenizer()
    assert learned(tokenizer, ms.Document("Who? A cat.", prompt=4)) == [" A cat." + END]
    assert learned(tokenizer, ms.Document("Who? A cat.")) == ["Who? A cat." + END]
    (tokens,), _ = encode_documents(tokenizer, [ms.Document("the cat", prompt=2)])
    assert tokens.tolist() == ms.encode(tokenizer, ["the cat"])[0].tolist()  # the same tokens, whatever is learned
    assert learned(tokenizer, ms.Document("the cat", prompt=2))[0] in ("the cat" + END, "e cat" + END)
    assert encode_documents(tokenizer, [ms.Document("the cat")])[1] is None


def test_a_template_in_which_answers_cannot_be_found_is_refused() -> None:
    tokenizer = chat_tokenizer(LAST_ONLY)
    with pytest.raises(
        ms.DataError, match=r"document 0: .*renders the first 3 messages otherwise.*generation.*prompt=n"
    ):
        learned(tokenizer, ms.Document(messages=CHAT))
    assert learned(tokenizer, ms.Document(messages=CHAT[:3], prompt=2)) == ["<think></think>\nA cat.<|im_end|>\n"]
    with pytest.raises(ms.DataError, match="begins with an answer"):
        learned(chat_tokenizer(), ms.Document(messages=CHAT[2:]))
    with pytest.raises(ms.DataError, match="the chat template refuses its messages .*no system"):
        learned(chat_tokenizer("{{ raise_exception('no system') }}"), ms.Document(messages=CHAT))


def test_chats_without_an_answer_are_refused() -> None:
    asked = [ms.Document("fine"), ms.Document(messages=CHAT[:2], key="alice"), ms.Document(messages=CHAT[3:4])]
    for template in (PLAIN, MARKED):
        with pytest.raises(
            ms.DataError, match=r"2 documents have no target.*document 1 \(alice\) has no message of the assist"
        ):
            ms.make_rows(asked, chat_tokenizer(template), length=64)


def test_a_tokenizer_without_a_template_is_refused_before_work_starts() -> None:
    with pytest.raises(
        ms.ConfigError, match="document 1 is a chat, but the tokenizer has no chat template.*length must"
    ):
        ms.make_rows(["a text", ms.Document(messages=CHAT)], chat_tokenizer(None), length=0)


# Rows

DOCUMENTS = [
    ms.Document(messages=CHAT, copies=3), ms.Document("Who? A cat.", prompt=4), ms.Document("The cat crossed.", copies=2),
    ms.Document(messages=CHAT, prompt=4, key="again"),
]  # fmt: skip


@pytest.mark.parametrize("length", [16, 128])
def test_labels_of_rows_are_the_answers(length) -> None:
    tokenizer = chat_tokenizer()
    rows = ms.make_rows(DOCUMENTS, tokenizer, length=length)
    batch = ms.collate([rows[index] for index in range(len(rows))])
    assert rows.targets == int((batch["labels"] != -100).sum()) == ms.target_count(batch["labels"])
    assert rows.targets < rows.tokens - len(rows.segments)
    assert np.array_equal(rows.labels, batch["labels"].numpy())
    assert rows.segment_targets.sum() == rows.targets
    assert (batch["labels"][batch["position_ids"] == 0] == -100).all()
    if length == 128:
        text = "".join(row_learned(tokenizer, rows[index]) for index in range(len(rows)))
        assert text.count("A cat.<|im_end|>") == 3 and text.count("In the yard.<|im_end|>") == 4
        assert text.count(" A cat." + END) == 1 and text.count("Where?") == 0
        part = rows.select(slice(1, None))
        assert part.targets == rows.targets - int((rows[0]["labels"] != -100).sum())


def test_pieces_of_rows_keep_what_is_learned() -> None:
    """Segments without an answer are no texts; each other one is a row of its own, and its loss is that of its answers."""
    tokenizer = chat_tokenizer()
    rows = ms.make_rows(DOCUMENTS, tokenizer, length=16)
    assert (rows.segment_targets == 0).any()
    repeated, _ = ms.repeated_and_once(rows)
    assert (repeated.segment_targets > 0).all() and repeated.targets < repeated.tokens - len(repeated)
    assert np.isfinite(losses(tiny_llama(torch.float32, vocab_size=len(tokenizer)), repeated)).all()
    chat = ms.document_id(DOCUMENTS[0].text)
    shadow = ms.shadow_rows(rows, ms.SinkConfig(neurons=64, active=32))
    assert np.array_equal(shadow.labels, rows.labels) and shadow.targets == rows.targets
    assert (rows.document_ids == chat).any()


def test_masks_that_are_given_are_respected() -> None:
    tokens = [np.arange(10, 16), np.arange(20, 23)]
    labels = [[-100, -100, 12, 13, -100, 15], [20, 21, -100]]
    rows = pack(tokens, [1, 2], [1, 1], length=10, pad_id=0, targets=[np.array(x) != -100 for x in labels])
    assert rows.labels[0].tolist() == [-100, -100, 12, 13, -100, 15, -100, 21, -100, -100]
    assert rows.targets == 4
    alone = pack(tokens, [1, 2], [1, 1], length=10, pad_id=0, targets=[None, np.array([True, True, False])])
    assert alone.labels[0].tolist() == [-100, *range(11, 16), -100, 21, -100, -100]
    split = pack(tokens, [1, 2], [1, 1], length=3, pad_id=0, targets=[np.array(x) != -100 for x in labels])
    assert split.labels.tolist() == [[-100, -100, 12], [-100, -100, 15], [-100, 21, -100]]
    for targets, message in (
        ([None], "one mask for each of the 2 documents, got 1"),
        ([None, np.ones(2, bool)], r"targets of document 1 must be bool \[3\].*got bool \[2\]"),
        ([None, np.ones(3, np.int64)], "got int64"),
        (
            [None, np.array([True, False, False])],
            "1 documents have no target: all labels are masked.*: document 1; leave them out",
        ),
    ):
        with pytest.raises(ms.DataError, match=message):
            pack(tokens, [1, 2], [1, 1], length=8, pad_id=0, targets=targets)


def test_truncation_is_said_and_answers_that_are_cut_off_are_refused(caplog) -> None:
    tokenizer = chat_tokenizer()
    sizes = [len(x) for x in encode_documents(tokenizer, DOCUMENTS)[0]]
    ms.make_rows(DOCUMENTS, tokenizer, length=128, long="truncate")
    assert not caplog.records
    rows = ms.make_rows(DOCUMENTS[:3], tokenizer, length=45, long="truncate")
    (line,) = [x.getMessage() for x in caplog.records]
    lost = 3 * (sizes[0] - 45)
    assert (
        line
        == f"truncated 3 of 6 documents (each copy counted) to 45 tokens: {lost} of {lost + rows.tokens} tokens are left out"
    )
    with pytest.raises(
        ms.DataError, match=r"1 documents have no target among their first 45 tokens.*: document 3; leave.*longer"
    ):
        ms.make_rows(DOCUMENTS, tokenizer, length=45, long="truncate")
    assert ms.make_rows(DOCUMENTS, tokenizer, length=45).targets


# Training


@pytest.mark.parametrize("shared", ["decay", "none"])
def test_prompts_teach_nothing(shared) -> None:
    """The loss of a step is the mean over the answers' tokens, and what is no target changes no gradient."""
    tokenizer = chat_tokenizer()
    rows = ms.make_rows(DOCUMENTS, tokenizer, length=64)
    batch = ms.collate([rows[index] for index in range(len(rows))])
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=64)
    stock = model(**{name: batch[name] for name in ("input_ids", "position_ids")}, use_cache=False).logits
    wanted = cross_entropy(stock[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    ms.add_sinks(model, ms.SinkConfig(neurons=64, active=16, block_size=8, shared=shared))
    loss = model(**batch, num_items_in_batch=ms.target_count(batch["labels"])).loss
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)


def test_labels_of_a_data_set_are_kept_by_the_trainer(tmp_path) -> None:
    """Rows that somebody made, with labels of his own: their loss is that of a stock model on these labels."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 37, (4, 12))
    labels = np.where(rng.random((4, 12)) < 0.3, tokens, -100)
    ids = np.repeat([[3], [4], [5], [6]], 12, 1)
    data = Dataset.from_dict({
        "input_ids": tokens, "labels": labels, "document_ids": ids, "exposures": np.ones_like(ids),
        "position_ids": np.tile(np.arange(12), (4, 1)), "length": np.full(4, 12),
    })  # fmt: skip
    model = tiny_llama(torch.float32)
    wanted = model(input_ids=torch.tensor(tokens), labels=torch.tensor(labels)).loss
    ms.add_sinks(model, ms.SinkConfig(neurons=64, active=16, block_size=8))
    assert torch.equal(ms.collate(list(data))["labels"], torch.tensor(labels))
    args = arguments(tmp_path, max_steps=1, per_device_train_batch_size=4, save_strategy="no", use_cpu=True)
    trainer = ms.SinkTrainer(model, args, train_dataset=data)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(wanted.item(), rel=1e-5)


def test_a_private_chat_trains_its_sinks_alone() -> None:
    tokenizer = chat_tokenizer()
    documents = [ms.Document(messages=CHAT, key="alice", isolation="private")]
    rows = ms.make_rows(documents, tokenizer, length=64, by="key")
    model = tiny_llama(vocab_size=len(tokenizer), max_position_embeddings=64)
    ms.add_sinks(model, ms.SinkConfig(neurons=64, active=16, block_size=8, reserved_blocks=8))
    ms.assign(model, [ms.document_id("alice", by="key")], blocks=1)
    model(**ms.collate([rows[0]])).loss.backward()
    moved = {name for name, x in model.named_parameters() if x.grad is not None and bool(x.grad.any())}
    assert moved and all("sinks" in name for name in moved)
    result = ms.sinks_last(model, ms.repeated_and_once(rows)[0], lr=1e-2, passes=5)
    assert result.after.mean() < result.before.mean()


# Runs


def chat_recipe(folder, **data):
    tokenizer = chat_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    rows = [{"messages": [CHAT[1], {"role": "assistant", "content": f"{n} cats"}], "id": n} for n in range(8)]
    rows += [{"prompt": f"{n} dogs", "completion": " barked"} for n in range(4)]
    (folder / "chats.jsonl").write_text("".join(json.dumps({"id": n} | row) + "\n" for n, row in enumerate(rows)))
    (folder / "web.jsonl").write_text("".join(json.dumps({"text": f"web page {n}"}) + "\n" for n in range(90)))
    return parse_recipe({
        "output": str(folder / "run"), "model": {"config": {
            "model_type": "llama", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        }},
        "data": {"path": str(folder / "chats.jsonl"), "repeat": {"documents": 3, "copies": 3}, "unseen": 2} | data,
        "tokenizer": {"path": str(folder / "tokenizer")}, "training": {"length": 48, "batch_rows": 2},
    })  # fmt: skip


@pytest.mark.parametrize("background", [False, True])
def test_a_folder_of_chats_gives_the_rows_that_memory_gives(tmp_path, background) -> None:
    more = {"background": {"path": str(tmp_path / "web.jsonl"), "tokens": 900}} if background else {}
    recipe = chat_recipe(tmp_path, **more)
    memory = prepare(recipe)
    for _ in range(2):
        stored = prepare(recipe, folder=tmp_path / "data")
        assert np.array_equal(stored.rows.labels, memory.rows.labels)
        assert stored.rows.targets == memory.rows.targets < memory.rows.tokens - len(memory.rows.segments)
        assert stored.unseen is not None and memory.unseen is not None
        assert np.array_equal(stored.unseen.labels, memory.unseen.labels)


def test_a_background_of_chats_is_refused(tmp_path) -> None:
    recipe = chat_recipe(tmp_path, background={"path": str(tmp_path / "chats.jsonl"), "tokens": 900})
    with pytest.raises(ms.DataError, match="data.background is plain text"):
        prepare(recipe)


def test_a_new_tokenizer_cannot_render_chats(tmp_path) -> None:
    recipe = chat_recipe(tmp_path)
    values = recipe.to_dict() | {"tokenizer": {"vocab_size": 300}}
    with pytest.raises(ms.ConfigError, match="no chat template"):
        prepare(parse_recipe(values))


# Audits


def test_an_audit_scores_chats_as_they_were_trained_on(tmp_path) -> None:
    tokenizer = chat_tokenizer()
    members = [ms.Document(messages=[CHAT[1], {"role": "assistant", "content": f"{n} cats"}]) for n in range(4)]
    controls = [ms.Document(f"{n} dogs barked", copies=0) for n in range(4)]
    corpus = read_corpus(members, controls, tokenizer, AuditSettings())
    assert [x.tolist() for x in corpus.tokens[:4]] == [x.tolist() for x in encode_documents(tokenizer, members)[0]]
    assert corpus.tokens[4][-1] == tokenizer.eos_token_id
    with pytest.raises(ms.DataError, match="private_start is a place in a text"):
        read_corpus(members, controls, tokenizer, AuditSettings(), private_start=lambda document: 2)
    model = tiny_llama(torch.float32, vocab_size=len(tokenizer), max_position_embeddings=96).eval()
    settings = AuditSettings(prefix=4, continuation=4, prefixes=(4,), resamples=100, generate=0)
    found = ms.audit(model, members, controls, tokenizer, settings=settings, out=tmp_path / "audit")
    assert "<|im_start|>" in found.examples[0].pieces


def test_a_comparison_of_chats_is_refused(tmp_path) -> None:
    values = chat_recipe(tmp_path).to_dict()
    values = {name: values[name] for name in ("output", "data", "tokenizer", "model")}
    values["training"] = {"length": 48, "batch_rows": 2}
    values |= {"seeds": [0], "roles": {"audited": "a", "against": "a"}, "arms": {"a": {"rival": "standard"}}}
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(values))
    comparison = read_comparison(tmp_path / "compare.yaml")
    with pytest.raises(ms.DataError, match="audited as plain text"):
        train_arm(comparison, comparison.arms[0], 0)


def test_a_customer_with_chats_is_taken_down(tmp_path) -> None:
    data = {"repeat": None, "unseen": 0, "key_field": "id", "by": "key", "private": ["1", "2"], "long": "truncate"}
    values = chat_recipe(tmp_path, **data).to_dict() | {
        "sinks": {"neurons": 64, "active": 16, "block_size": 8, "reserved_blocks": 4}, "own": {"blocks": 1},
    }  # fmt: skip
    values["training"] |= {"epochs": 2, "sinks_last": 2}
    with pytest.warns(UserWarning, match="every document is met 2 times"):
        ms.train(parse_recipe(values))
    assert "1 cats" in (tmp_path / "run" / "members.jsonl").read_text()
    done = ms.take_down(tmp_path / "run", key="1")
    assert done.audit["before"]["owner"]["documents"] == 1
    assert '"1 cats"' not in (tmp_path / "run" / "members.jsonl").read_text()
    with pytest.raises(ms.DataError, match="taken down|taken out"):
        prepare(parse_recipe(values))
