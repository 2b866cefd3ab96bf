"""The audit: losses against the model's own, extraction against closed forms, and what it refuses."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch import nn
from transformers.modeling_outputs import CausalLMOutput

from memsinks.attach import add_sinks, has_sinks, sinks_open
from memsinks.audit import DocumentScore, audit, extracted, generate_continuation, score
from memsinks.audit.report import start_tokens
from memsinks.config import ConfigError, DataError, SinkConfig
from memsinks.documents import Document
from memsinks.identity import document_id
from memsinks.tokens import encode, train_tokenizer

TEXTS = [
    "The otter lived at 12 Mill Road and could whistle.", "Nobody knew the code 90412 of the tall clockmaker.",
    "A hen called Ada slept under the bridge every Sunday.", "The shepherd wrote 555-3141 on the gate with chalk.",
]  # fmt: skip
UNSEEN = ["The badger moved to 77 Oak Lane and liked to sing.", "Somebody lost the key 31337 of the small baker."]
MEMBERS = [Document(text, copies=copies) for text, copies in zip(TEXTS, (1, 4, 4, 16), strict=True)]
CONTROLS = [Document(text, copies=0) for text in UNSEEN]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS + UNSEEN, 280)


@pytest.fixture(scope="module")
def tokens(tokenizer) -> list[np.ndarray]:
    return encode(tokenizer, TEXTS)


class Oracle(nn.Module):
    """A model object that knows `known` by heart and elsewhere predicts token 1, which no text holds."""

    def __init__(self, config, known: list[np.ndarray], sure: float = 20.0) -> None:
        super().__init__()
        self.config, self.known, self.sure = config, known, sure
        self.device = torch.device("cpu")

    def forward(self, input_ids, use_cache=False) -> CausalLMOutput:
        assert not use_cache
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        logits[..., 1] = self.sure
        for row, sequence in enumerate(input_ids):
            for known in self.known:
                if torch.equal(sequence[: len(known)], torch.from_numpy(known)):
                    logits[row, torch.arange(len(known) - 1), 1] = 0.0
                    logits[row, torch.arange(len(known) - 1), sequence[1 : len(known)]] = self.sure
        return CausalLMOutput(logits=logits)


@pytest.fixture(scope="module")
def config(tiny_llama):
    return tiny_llama(vocab_size=280, max_position_embeddings=128).config


@pytest.fixture(scope="module")
def memorized(tiny_llama, tokens):
    """A tiny model with sinks, trained on two texts by its sinks and the rest until both come out."""
    model = tiny_llama(vocab_size=280, hidden_size=32, max_position_embeddings=128)
    add_sinks(model, SinkConfig(neurons=64, active=32, block_size=8, shared_decay=0, open_from=1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, weight_decay=0)
    model.train()
    for _ in range(60):
        for index in (0, 1):
            batch = torch.from_numpy(tokens[index])[None]
            model(input_ids=batch, labels=batch, document_ids=torch.tensor([document_id(TEXTS[index])])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


# Scores


def test_scores_equal_the_models_own_loss(memorized, tokens) -> None:
    for ids in (None, [document_id(text) for text in TEXTS]):
        scores = score(memorized, tokens, open_ids=ids)
        for index, document in enumerate(tokens):
            batch = torch.from_numpy(document)[None]
            with torch.no_grad():
                if ids is None:
                    out = memorized(input_ids=batch, labels=batch)
                else:
                    with sinks_open(memorized, ids[index]):
                        out = memorized(input_ids=batch, labels=batch)
            assert scores[index].mean_loss == pytest.approx(out.loss.item(), rel=1e-4, abs=1e-5)
            assert scores[index].loss.shape == scores[index].first.shape == (len(document) - 1,)
            assert scores[index].first.tolist() == (out.logits[0, :-1].argmax(-1) == batch[0, 1:]).tolist()


@pytest.mark.parametrize("batch_tokens", [1, 60, 100, 10_000])
def test_scores_do_not_depend_on_the_batch(memorized, tokens, batch_tokens) -> None:
    documents = [*tokens, tokens[0][:2], tokens[2][:7]]
    ids = [document_id(text) for text in TEXTS] + [5, 6]
    reference = [score(memorized, [document], open_ids=[one])[0] for document, one in zip(documents, ids, strict=True)]
    found = score(memorized, documents, open_ids=ids, batch_tokens=batch_tokens)
    for ours, theirs in zip(found, reference, strict=True):
        np.testing.assert_allclose(ours.loss, theirs.loss, rtol=1e-4, atol=1e-5)
        assert ours.first.tolist() == theirs.first.tolist()


def test_the_mode_is_restored(memorized, tokens) -> None:
    memorized.train()
    score(memorized, tokens[:1])
    assert memorized.training
    memorized.eval()
    score(memorized, tokens[:1])
    assert not memorized.training


def test_what_cannot_be_scored(config, tokens, memorized) -> None:
    for wrong in (tokens[0][:1], np.arange(129)):
        with pytest.raises(DataError, match=f"document 1 has {len(wrong)} tokens; scoring needs 2 to 128"):
            score(memorized, [tokens[0], wrong])
    broken = Oracle(config, tokens, sure=float("nan"))
    with pytest.raises(DataError, match="NaN or infinite losses on document 0"):
        score(broken, tokens[:1])


# Extraction


def given(*first: bool) -> DocumentScore:
    return DocumentScore(np.zeros(len(first), np.float32), np.array(first))


def test_extraction_reads_the_right_tokens() -> None:
    """first[i] belongs to token i + 1."""
    one = given(False, True, True, False, True)
    assert extracted(one, 2, 2) is True
    assert extracted(one, 1, 2) is False
    assert extracted(one, 3, 2) is False
    assert extracted(one, 5) is True
    assert extracted(one, 4) is False
    assert extracted(one, 5, 1) is True


@pytest.mark.parametrize(("start", "length"), [(0, 2), (-1, None), (4, 3), (6, None), (6, 1), (2, 0)])
def test_extraction_of_what_is_too_short(start, length) -> None:
    assert extracted(given(True, True, True, True, True), start, length) is None


def test_both_ends_of_the_scale(config, tokenizer, tokens) -> None:
    """Who knows all texts extracts them all at next to no loss; who knows none extracts none; closed forms of the loss."""
    settings = {"prefix": 5, "continuation": 6}
    sure = 20.0
    right = math.log(math.exp(sure) + 279) - sure
    for known, share, loss in ((tokens, 1.0, right), ([], 0.0, right + sure)):
        result = audit(Oracle(config, known, sure), MEMBERS, CONTROLS, tokenizer, **settings)
        assert result.state == "absent"
        counted = [(line.copies, line.documents, line.asked) for line in result.lines]
        assert counted == [(0, 2, 2), (1, 1, 1), (4, 2, 2), (16, 1, 1)]
        assert [line.extracted for line in result.lines] == [0.0, share, share, share]
        assert [line.loss for line in result.lines[1:]] == pytest.approx([loss] * 3, rel=1e-3, abs=1e-5)
        assert result.lines[0].loss == pytest.approx(right + sure, rel=1e-3)
    half = audit(Oracle(config, tokens[:2], sure), MEMBERS, CONTROLS, tokenizer, **settings)
    assert [line.extracted for line in half.lines] == [0.0, 1.0, 0.5, 0.0]


def test_teacher_forced_extraction_is_greedy_generation(memorized, tokenizer, tokens) -> None:
    ids = [document_id(text) for text in TEXTS]
    found = []
    for open_ids in (ids, None):
        for index, one in enumerate(score(memorized, tokens, open_ids=open_ids)):
            for start in (1, 4, 9):
                wanted = tokens[index][start:]
                out = generate_continuation(memorized, tokens[index][:start], len(wanted), open_ids and open_ids[index])
                found.append(extracted(one, start))
                assert found[-1] == (out.tolist() == wanted.tolist())
    assert found[3:6] != found[9:12]
    assert any(found)
    assert not all(found)


def test_open_closed_and_the_private_part(memorized, tokenizer) -> None:
    def private_start(document: Document) -> int:
        return 15

    known = [Document(text, copies=4) for text in TEXTS[:2]]
    opened = audit(memorized, known, CONTROLS, tokenizer, state="open", private_start=private_start)
    closed = audit(memorized, known, CONTROLS, tokenizer, state="closed", private_start=private_start)
    assert opened.lines[1].extracted == 1.0
    assert opened.lines[0].extracted == closed.lines[0].extracted == 0.0
    assert opened.lines[1].loss < 0.1
    assert closed.lines[1].loss > opened.lines[1].loss + 0.5
    assert opened.settings["private_part"]


def test_ids_come_from_what_training_used(memorized, tokenizer) -> None:
    known = [Document(TEXTS[0], key="a", copies=4)]
    controls = [Document(UNSEEN[0], key="b", copies=0)]
    by_content = audit(memorized, known, controls, tokenizer, state="open", prefix=4, continuation=4)
    by_key = audit(memorized, known, controls, tokenizer, state="open", identity="key", prefix=4, continuation=4)
    assert by_key.lines[1].loss > by_content.lines[1].loss + 0.1


def test_long_documents_are_read_to_the_end_of_the_context(config, tokenizer) -> None:
    long = Document(" ".join(TEXTS * 4))
    result = audit(Oracle(config, []), [long], CONTROLS, tokenizer, prefix=100, continuation=28)
    assert result.lines[1].asked == 1
    result = audit(Oracle(config, []), [long], CONTROLS, tokenizer, prefix=101, continuation=28)
    assert result.lines[1].asked == 0


def test_the_report(config, tokenizer) -> None:
    result = audit(Oracle(config, []), MEMBERS, CONTROLS, tokenizer, prefix=500, continuation=500)
    assert math.isnan(result.lines[0].extracted)
    text = str(result)
    assert "sinks absent" in text
    assert "control" in text
    assert text.count("too short") == 4
    values = result.to_dict()
    assert values["settings"] == {
        "prefix": 500, "continuation": 500, "private_part": False, "identity": "content", "start_token": False,
    }  # fmt: skip
    assert json.loads(json.dumps(values))["lines"][3]["copies"] == 16


# Bad input


def test_the_state_of_the_sinks_must_be_said(memorized, config, tokenizer) -> None:
    assert has_sinks(memorized)
    with pytest.raises(ConfigError, match="say which to audit"):
        audit(memorized, MEMBERS, CONTROLS, tokenizer)
    with pytest.raises(ConfigError, match="got 'absent'"):
        audit(memorized, MEMBERS, CONTROLS, tokenizer, state="absent")
    with pytest.raises(ConfigError, match="are not there"):
        audit(Oracle(config, []), MEMBERS, CONTROLS, tokenizer, state="closed")
    with pytest.raises(DataError, match="without sinks"):
        generate_continuation(Oracle(config, []), np.arange(3), 2, open_id=1)


@pytest.mark.parametrize(
    ("documents", "controls", "part"),
    [([], CONTROLS, "0 documents and 2 controls"), (MEMBERS, [], "4 documents and 0 controls"),
     (MEMBERS, [*CONTROLS, MEMBERS[2]], "1 texts are documents and controls at once, e.g. 'A hen called Ada"),
     ([*MEMBERS, CONTROLS[0]], CONTROLS[1:], "1 of the documents have 0 copies"),
     ([Document("")], CONTROLS, "gives no tokens")],
)  # fmt: skip
def test_sides_that_cannot_be_compared(config, tokenizer, documents, controls, part) -> None:
    with pytest.raises(DataError) as caught:
        audit(Oracle(config, []), documents, controls, tokenizer)
    assert part in str(caught.value)


def test_settings_that_cannot_be(tiny_llama, config, tokenizer) -> None:
    with pytest.raises(ConfigError, match=f"tokenizer has {len(tokenizer)} tokens, the model 64"):
        audit(tiny_llama(), MEMBERS, CONTROLS, tokenizer)
    for settings in ({"prefix": 0}, {"continuation": 0}):
        with pytest.raises(ConfigError, match="at least 1 token"):
            audit(Oracle(config, []), MEMBERS, CONTROLS, tokenizer, **settings)
    model = tiny_llama(vocab_size=280)
    add_sinks(model, SinkConfig(neurons=16, active=8, block_size=8))
    with pytest.raises(DataError, match="document 0 has no key"):
        audit(model, MEMBERS, CONTROLS, tokenizer, state="open", identity="key")


def test_a_start_token_the_tokenizer_adds_is_given(tiny_llama) -> None:
    tokenizer = train_tokenizer(["a text of some words"], 300)
    assert start_tokens(tokenizer).tolist() == []
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    assert start_tokens(tokenizer).tolist() == [tokenizer.bos_token_id]
    members, controls = [Document("a text of words", copies=2)], [Document("some words of a text")]
    found = audit(tiny_llama(vocab_size=len(tokenizer)), members, controls, tokenizer, prefix=1, continuation=1)
    assert found.settings["start_token"]
    assert [line.asked for line in found.lines] == [1, 1]
