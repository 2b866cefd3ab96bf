"""Hidden states beside the twin's: nothing to see between equal models or other bases, much where documents moved."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from audited import CONTROLS, MEMBERS, TEXTS, Oracle, llama, memorized_in_sinks, the_tokenizer, train

from memsinks.auditing import hidden_states
from memsinks.auditing.corpus import Corpus, read_corpus
from memsinks.auditing.hidden_states import distances, relations
from memsinks.auditing.settings import AuditSettings


@pytest.fixture(autouse=True)
def few_controls_will_do(monkeypatch) -> None:
    """The formula is the same with two controls; what it says of few is worth nothing, see the last test."""
    monkeypatch.setattr(hidden_states, "LEAST", 2)


def corpus() -> Corpus:
    return read_corpus(MEMBERS, CONTROLS, the_tokenizer(), AuditSettings())


def test_the_formula() -> None:
    given, model = corpus(), llama()
    found = relations(model, given)
    assert found is not None and found.shape == (6, 2, 2) and found.dtype == np.float32
    states = []
    for tokens in given.tokens:
        with torch.no_grad():
            out = model(input_ids=torch.from_numpy(tokens.astype(np.int64))[None], output_hidden_states=True)
        states.append([out.hidden_states[layer][0].mean(0).numpy() for layer in (1, 2)])
    centered = np.array(states) - np.array(states)[4:].mean(0)
    for text in range(6):
        for layer in range(2):
            for anchor in range(2):
                a, b = centered[text, layer], centered[4 + anchor, layer]
                cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
                if text == 4 + anchor:
                    assert np.isnan(found[text, layer, anchor])
                else:
                    assert found[text, layer, anchor] == pytest.approx(cosine, abs=1e-4)


def test_a_model_beside_itself_and_one_in_another_basis_stand_alike() -> None:
    """Turning all hidden states by one rotation changes no cosine."""
    given = corpus()
    one = relations(llama(), given)
    assert distances(one, one).tolist() == [0.0] * 6
    rng = np.random.default_rng(0)
    states = rng.normal(size=(6, 2, 8)).astype(np.float32)
    turned = states @ np.linalg.qr(rng.normal(size=(8, 8)))[0].astype(np.float32)
    plain = hidden_states._mean_states
    try:
        found = []
        for given_states in (states, turned):
            hidden_states._mean_states = lambda *_, given_states=given_states: given_states
            found.append(relations(llama(), given))
    finally:
        hidden_states._mean_states = plain
    assert distances(*found) == pytest.approx(np.zeros(6), abs=1e-6)


def test_documents_that_were_learned_stand_elsewhere() -> None:
    texts = read_corpus(
        [x for x in MEMBERS if x.copies > 1],
        CONTROLS,
        the_tokenizer(),
        AuditSettings(),
    )
    twin = llama()
    moved = distances(relations(train(llama(), TEXTS[1:], 40), texts), relations(twin, texts))
    still = distances(relations(llama(), texts), relations(twin, texts))
    assert moved[:3].min() > 0.05 and not still.any()


def test_batches_padding_and_the_context_change_nothing() -> None:
    given = corpus()
    whole = relations(llama(), given)
    for tokens in (1, 50, 10_000):
        np.testing.assert_allclose(relations(llama(), given, batch_tokens=tokens), whole, atol=1e-5)
    short = llama(max_position_embeddings=16)
    cut = Corpus(**(vars(given) | {"tokens": [one[:16] for one in given.tokens]}))
    np.testing.assert_allclose(relations(short, given), relations(short, cut), atol=1e-6)


def test_open_sinks_have_a_part_in_it() -> None:
    given, model = corpus(), memorized_in_sinks()
    closed, opened = relations(model, given), relations(model, given, own=given.ids)
    assert distances(opened, closed)[:2].min() > 0.01
    assert not model.training


def test_a_model_without_hidden_states_is_not_asked() -> None:
    class Silent(Oracle):
        def forward(self, input_ids, use_cache=False, output_hidden_states=False):
            return super().forward(input_ids)

    assert relations(Silent([]), corpus()) is None
    assert relations(Oracle([]), corpus()) is not None


def test_too_few_controls_are_no_anchors(monkeypatch) -> None:
    """Two centered controls are opposite to each other in every model: told from anything without any memory."""
    monkeypatch.undo()
    assert relations(llama(), corpus()) is None
    assert hidden_states.LEAST == 20
