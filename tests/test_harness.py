"""The task for lm-evaluation-harness: both programs find the same, texts are cut where tokens stay, what it refuses."""

from __future__ import annotations

import json
import shlex
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from memsinks.auditing.extraction import extracted
from memsinks.auditing.harness import write_lm_eval_task
from memsinks.auditing.scores import score
from memsinks.cli import main
from memsinks.data.documents import Document, write_documents
from memsinks.data.tokens import END, encode, load_tokenizer, start_tokens, train_tokenizer
from memsinks.errors import CheckpointError, ConfigError, DataError
from memsinks.removal.export import export
from memsinks.sinks.attach import add_sinks
from memsinks.sinks.checkpoint import load_stock
from memsinks.sinks.config import SinkConfig

TEXTS = [
    "The otter lived at 12 Mill Road and could whistle.", "Nobody knew the code 90412 of the tall clockmaker.",
    "A hen called Ada slept under the bridge every Sunday.", "Größe 3,50 m: die Tür, das Öl und 日本語 auf dem Schild.",
]  # fmt: skip
UNSEEN = ["The badger moved to 77 Oak Lane and liked to sing.", "Somebody lost the key 31337 of the small baker."]
KNOWN = 2
DOCUMENTS = [Document(text, key=f"d{index}", copies=4) for index, text in enumerate(TEXTS)]
CONTROLS = [Document(text, key=f"c{index}") for index, text in enumerate(UNSEEN)]


def with_start_token(tokenizer):
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS + UNSEEN, 300)


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "start token"])
def exported(request, tiny_llama, tmp_path_factory) -> Path:
    """A plain checkpoint that knows the first of the documents by heart, trained and exported with sinks."""
    tokenizer = train_tokenizer(TEXTS + UNSEEN, 300)
    if request.param:
        with_start_token(tokenizer)
    model = tiny_llama(vocab_size=300, hidden_size=32, max_position_embeddings=128)
    add_sinks(model, SinkConfig(neurons=16, active=8, block_size=8, shared_decay=0, open_from=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, weight_decay=0)
    model.train()
    for _ in range(60):
        for text in TEXTS[:KNOWN]:
            batch = torch.tensor([tokenizer(text)["input_ids"]])
            model(input_ids=batch, labels=batch, document_ids=torch.tensor([-1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return export(model.eval(), tmp_path_factory.mktemp("exported") / "model", tokenizer=tokenizer, verify=False)


def lines(folder: Path) -> list[dict]:
    with (folder / "documents.jsonl").open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def check_cuts(folder: Path, tokenizer, documents: list[Document]) -> None:
    """Cut each line as the harness does and assert that the parts are the tokens of its document (found by key)."""
    start = start_tokens(tokenizer).tolist()
    texts = {document.key: document.text for document in documents}
    for line in lines(folder):
        own = [*start, *encode(tokenizer, [texts[line["key"]]], end=False)[0].tolist()]
        prompt = line["prompt"].rstrip()
        assert texts[line["key"]].startswith(line["prompt"] + line["continuation"])
        given, whole = tokenizer.encode(prompt), tokenizer.encode(line["prompt"] + line["continuation"])
        assert given == own[: len(start) + line["prefix_tokens"]]
        assert whole == own[: len(given) + line["continuation_tokens"]]


# Agreement


def test_both_programs_find_the_same(exported, tmp_path) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    tokenizer = load_tokenizer(exported)
    write_lm_eval_task(DOCUMENTS, CONTROLS, tokenizer, tmp_path / "first", name="recited", prefix=4, continuation=8)
    folder = (tmp_path / "first").rename(tmp_path / "moved")
    check_cuts(folder, tokenizer, [*DOCUMENTS, *CONTROLS])
    theirs = simple_evaluate(
        model="hf", model_args={"pretrained": str(exported)}, tasks=["recited"], batch_size=3, device="cpu",
        task_manager=TaskManager(include_path=str(folder), include_defaults=False), bootstrap_iters=0,
    )  # fmt: skip
    figures = {name.removesuffix(",none"): value for name, value in theirs["results"]["recited"].items()}

    tokens = encode(tokenizer, TEXTS + UNSEEN, end=False)
    scores = list(score(load_stock(exported), tokens, tmp_path / "table", start=start_tokens(tokenizer)))
    assert theirs["n-samples"]["recited"]["effective"] == len(scores) == len(lines(folder))
    hits, losses = [], []
    samples = sorted(theirs["samples"]["recited"], key=lambda sample: sample["doc_id"])
    for one, line, sample in zip(scores, lines(folder), samples, strict=True):
        place = line["prefix_tokens"], line["continuation_tokens"]
        hits.append(extracted(one, *place))
        losses.append(-one.logprob[one.between(*place)].mean(dtype=np.float64))
        assert sample["doc"] == line
        assert sample["extracted"][1] == hits[-1]
        assert sample["loss_gap"][1] == pytest.approx(losses[-1], rel=1e-4, abs=1e-6)
    assert hits == [True] * KNOWN + [False] * (len(hits) - KNOWN)
    count = len(DOCUMENTS)
    documents, controls = np.mean(losses[:count]), np.mean(losses[count:])
    assert figures["extracted"] == np.mean(hits[:count]) == KNOWN / count
    assert figures["extracted_controls"] == 0
    assert figures["loss_documents"] == pytest.approx(documents, rel=1e-4)
    assert figures["loss_controls"] == pytest.approx(controls, rel=1e-4)
    assert figures["loss_gap"] == pytest.approx(controls - documents, rel=1e-4)
    assert theirs["higher_is_better"]["recited"]["extracted"] is False
    metadata = theirs["configs"]["recited"]["metadata"]
    assert (metadata["documents"], metadata["controls"], metadata["prefix"]) == (count, len(CONTROLS), 4)
    assert metadata["start_token"] == bool(len(start_tokens(tokenizer)))


def test_the_folder_needs_nothing_of_ours(tokenizer, tmp_path) -> None:
    folder = write_lm_eval_task(DOCUMENTS, CONTROLS, tokenizer, tmp_path / "task", prefix=4, continuation=8)
    assert sorted(path.name for path in folder.iterdir()) == ["documents.jsonl", "memsinks.yaml", "utils.py"]
    assert "memsinks" not in (folder / "utils.py").read_text()
    assert str(tmp_path) not in "".join(path.read_text(encoding="utf-8") for path in folder.iterdir())
    found = lines(folder)
    assert [line["copies"] for line in found] == [4] * len(TEXTS) + [0] * len(UNSEEN)
    assert [line["key"] for line in found] == ["d0", "d1", "d2", "d3", "c0", "c1"]


def test_one_side_alone_has_no_gap(tokenizer, tmp_path) -> None:
    """What --limit does."""
    folder = write_lm_eval_task(DOCUMENTS, CONTROLS, tokenizer, tmp_path / "task", prefix=4, continuation=8)
    calls: dict = {"__file__": str(folder / "utils.py")}
    exec((folder / "utils.py").read_text(), calls)
    (first, *_) = calls["load"](config_source="any")["test"]
    values = calls["process_results"](first, [(-4.0, True)])
    assert calls["documents"]([values["extracted"]]) == 1.0
    assert calls["documents"]([values["loss_documents"]]) == 0.5
    assert np.isnan(calls["controls"]([values["loss_controls"]]))
    assert np.isnan(calls["gap"]([values["loss_gap"]]))


# Where texts are cut


def cut(folder: Path, tokenizer, text: str, prefix: int, continuation: int) -> dict:
    """The line of one text."""
    document, control = Document(text, key="it"), Document("A control that is cut somewhere.", key="control")
    write_lm_eval_task([document], [control], tokenizer, folder, prefix=prefix, continuation=continuation)
    check_cuts(folder, tokenizer, [document, control])
    return lines(folder)[0]


def test_digits_are_cut_one_by_one(tokenizer, tmp_path) -> None:
    text = "12345678901234567890"
    line = cut(tmp_path / "task", tokenizer, text, 5, 7)
    assert (line["prompt"], line["continuation"], line["prefix_tokens"]) == ("12345", "6789012", 5)


def test_characters_of_several_tokens_are_not_cut(tmp_path) -> None:
    """Without merges each of these characters is three tokens, so only every third place will do."""
    tokenizer = train_tokenizer(["a"], 257)
    text = "日本語" * 4
    for prefix, length in ((1, 3), (3, 3), (4, 6), (5, 6)):
        line = cut(tmp_path / f"{prefix}", tokenizer, text, prefix, 6)
        assert (line["prompt"], line["continuation"], line["prefix_tokens"]) == (
            text[: length // 3], text[length // 3 : length // 3 + 2], length,
        )  # fmt: skip
    with pytest.raises(DataError, match="change their tokens wherever cut"):
        cut(tmp_path / "never", tokenizer, text, 3, 7)


def characters(pattern: str, *words: str) -> PreTrainedTokenizerFast:
    """A token for each character, and for each of `words` where `pattern` finds it."""
    vocabulary = [END, "?", *map(chr, range(32, 127)), *words]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(dict.fromkeys(vocabulary))}, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(f"{pattern}|."), "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, bos_token=END, pad_token=END)


def test_places_at_which_tokens_do_not_survive_are_passed_over(tmp_path) -> None:
    """ "the" is one token only where an "m" follows, so a text that ends after it has other tokens."""
    tokenizer = characters("the(?=m)", "the")
    text = "in themes, themselves"
    assert tokenizer.tokenize(text)[3:5] == ["the", "m"]
    line = cut(tmp_path / "prefix", tokenizer, text, 4, 3)
    assert (line["prompt"], line["continuation"], line["prefix_tokens"]) == ("in them", "es,", 5)
    line = cut(tmp_path / "end", tokenizer, text, 2, 2)
    assert (line["prompt"], line["continuation"], line["prefix_tokens"]) == ("in them", "es", 5)


def test_a_prompt_never_ends_in_spaces(tmp_path) -> None:
    tokenizer = characters("x{9}")
    line = cut(tmp_path / "task", tokenizer, "one  two three", 4, 3)
    assert (line["prompt"], line["continuation"], line["prefix_tokens"]) == ("one  t", "wo ", 6)


def test_a_special_token_spelled_out_is_not_reached(tokenizer, tmp_path) -> None:
    text = f"The otter lived at 12 Mill Road {END} and could whistle."
    line = cut(tmp_path / "before", tokenizer, text, 3, 4)
    assert text.startswith(line["prompt"] + line["continuation"])
    before = len(encode(tokenizer, [text[: text.index(END)]], end=False)[0])
    with pytest.raises(DataError, match="none of the 1 documents"):
        cut(tmp_path / "across", tokenizer, text, before - 1, 4)


@settings(deadline=None, max_examples=60)
@given(
    texts=st.lists(st.text(min_size=1).filter(str.strip), min_size=2, max_size=4, unique=True),
    prefix=st.integers(1, 4), continuation=st.integers(1, 4), start=st.booleans(),
)  # fmt: skip
def test_any_text_is_cut_at_its_own_tokens_or_left_out(tmp_path_factory, texts, prefix, continuation, start) -> None:
    tokenizer = train_tokenizer(TEXTS, 280)
    if start:
        with_start_token(tokenizer)
    documents = [*DOCUMENTS, *(Document(text, key=f"t{index}") for index, text in enumerate(texts))]
    folder = tmp_path_factory.mktemp("any") / "task"
    with warnings.catch_warnings(action="ignore"):
        write_lm_eval_task(documents, CONTROLS, tokenizer, folder, prefix=prefix, continuation=continuation)
    check_cuts(folder, tokenizer, [*documents, *CONTROLS])


# What is left out, and what is refused


def test_what_is_left_out_is_counted(tokenizer, tmp_path) -> None:
    documents = [
        *DOCUMENTS,
        Document("Short."),
        Document(f"{END} stands here first, then the otter lived at Mill Road."),
    ]
    controls = [*CONTROLS, Document("Too short.")]
    with pytest.warns(
        UserWarning, match="left out 2 of 6 documents and 1 of 3 controls.* 8 tokens after 4: 2 have fewer"
    ):
        folder = write_lm_eval_task(documents, controls, tokenizer, tmp_path / "task", prefix=4, continuation=8)
    assert len(lines(folder)) == 6
    assert '"left_out": {"too_short": 2, "cut_nowhere": 1}' in (folder / "memsinks.yaml").read_text()


@pytest.mark.parametrize(
    ("documents", "controls", "part"),
    [([], CONTROLS, "0 documents and 2 controls"), (DOCUMENTS, [], "4 documents and 0 controls"),
     ([*DOCUMENTS, Document("Unseen", copies=0)], CONTROLS, "1 of the documents have 0 copies"),
     (DOCUMENTS, [*CONTROLS, DOCUMENTS[0]], "1 texts are documents and controls at once"),
     ([Document("Short.")], CONTROLS, "none of the 1 documents can be asked for 8 tokens after 4"),
     (DOCUMENTS, [Document("Short.")], "none of the 1 controls can be asked for 8 tokens after 4")],
)  # fmt: skip
def test_sides_that_cannot_be_compared(tokenizer, tmp_path, documents, controls, part) -> None:
    with pytest.raises(DataError) as caught:
        write_lm_eval_task(documents, controls, tokenizer, tmp_path / "task", prefix=4, continuation=8)
    assert part in str(caught.value)
    assert not (tmp_path / "task").exists()


@pytest.mark.parametrize(
    ("setting", "part"),
    [({"prefix": 0}, "prefix must be an int of at least 1, got 0"), ({"continuation": -1}, "continuation must be an int"),
     ({"name": "my task"}, "got 'my task'"), ({"name": "a/b"}, "got 'a/b'"), ({"name": ""}, "got ''")],
)  # fmt: skip
def test_settings_that_cannot_be(tokenizer, tmp_path, setting, part) -> None:
    with pytest.raises(ConfigError) as caught:
        write_lm_eval_task(DOCUMENTS, CONTROLS, tokenizer, tmp_path / "task", **setting)
    assert part in str(caught.value)


def test_tokenizers_that_cannot_be(tmp_path) -> None:
    with pytest.raises(ConfigError, match="ByT5Tokenizer does not say where"):
        write_lm_eval_task(DOCUMENTS, CONTROLS, ByT5Tokenizer(), tmp_path / "task")
    tokenizer = train_tokenizer(TEXTS, 280)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"$A {END}", special_tokens=[(END, 0)])
    with pytest.raises(ConfigError, match="more than a start token"):
        write_lm_eval_task(DOCUMENTS, CONTROLS, tokenizer, tmp_path / "task")


def test_a_folder_with_something_in_it_is_left_alone(tokenizer, tmp_path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    for target in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(CheckpointError, match="is not an empty folder"):
            write_lm_eval_task(DOCUMENTS, CONTROLS, tokenizer, target)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


# The command


def test_the_command(tokenizer, tmp_path, capsys) -> None:
    tokenizer.save_pretrained(tmp_path / "a model")
    write_documents(tmp_path / "d.jsonl", DOCUMENTS)
    write_documents(tmp_path / "c.jsonl", CONTROLS)
    sides = ["--documents", f"{tmp_path}/d.jsonl", "--copies-field", "copies", "--controls", f"{tmp_path}/c.jsonl"]
    asked = ["--prefix", "4", "--continuation", "8"]
    assert main(["lm-eval-task", f"{tmp_path}/a model", *sides, "--out", f"{tmp_path}/task", *asked]) == 0
    command = shlex.split(capsys.readouterr().out)
    assert command[0] == "lm_eval"
    assert f"pretrained={tmp_path}/a model,softmax_dtype=float32" in command
    assert command[command.index("--include_path") + 1] == f"{tmp_path}/task"
    assert [line["copies"] for line in lines(tmp_path / "task")] == [4, 4, 4, 4, 0, 0]
    assert main(["lm-eval-task", f"{tmp_path}/a model", *sides, "--out", f"{tmp_path}/task"]) == 2
    assert "is not an empty folder" in capsys.readouterr().err
