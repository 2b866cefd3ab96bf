"""Sinks last: texts are recited, every shared weight keeps its bits, and nothing else is touched."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from tiny import VOCABULARY, sink_llama, tiny_llama

import memsinks as ms
from memsinks.errors import ArchitectureError, ConfigError, DataError
from memsinks.sinks.state import is_sink
from memsinks.training.evaluate import losses

LENGTH = 16


def rows(count: int = 5, *, together: bool = False) -> ms.Rows:
    rng = np.random.default_rng(0)
    texts = [rng.integers(1, VOCABULARY, 7 if together else 12) for _ in range(count)]
    return ms.pack(
        texts, np.arange(count) + 50, [2] * count, length=LENGTH, pad_id=0, one_document_per_row=not together
    )


def made(**settings):
    return sink_llama(torch.float32, **({"shared": "none"} | settings))


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_texts_come_back_and_shared_weights_keep_their_bits() -> None:
    model, documents = made(), rows()
    before, closed = state(model), losses(model, documents)
    found = ms.sinks_last(model, documents, lr=3e-2, passes=60, batch_rows=3)
    assert found.steps == 100
    np.testing.assert_array_equal(found.after, losses(model, documents, opened=True))
    assert found.after.max() < 1.5 and found.before.min() > 3.5
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) != is_sink(name), name
    np.testing.assert_array_equal(losses(model, documents), closed)
    assert "5 documents in 100 steps: loss with their own sinks" in str(found)


def test_what_is_known_is_met_no_more() -> None:
    model, documents = made(), rows()
    found = ms.sinks_last(model, documents, lr=3e-2, passes=20, batch_rows=1, until=2.5)
    assert 5 < found.steps < 90
    assert 1.5 < found.after.max() < 2.8  # with all 100 steps: below 1.5
    with pytest.raises(ConfigError, match="until must be a finite number of at least 0"):
        ms.sinks_last(model, documents, lr=3e-2, until=-1.0)


def test_a_step_is_a_plain_step_of_the_sinks() -> None:
    """One step at the peak rate: AdamW of the open blocks on the mean of the texts' mean losses, all in one batch."""
    documents, model = rows(3), made()
    reference = copy.deepcopy(model).eval()
    ms.sinks_last(model, documents, lr=1e-2, passes=1, batch_rows=3, max_norm=0)
    parameters = [x for name, x in reference.named_parameters() if is_sink(name)]
    optimizer = ms.AdamW([{"params": parameters, "lazy": True}], lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    total = torch.tensor(0.0, dtype=torch.float64)
    for row in range(3):
        batch = ms.collate([documents[row]])
        with ms.sinks_open(reference, batch["document_ids"][:, 0]):
            logits = reference(input_ids=batch["input_ids"][:, :12]).logits[:, :-1]
        labels = batch["input_ids"][:, 1:12]
        total = total + torch.nn.functional.cross_entropy(logits[0].double(), labels[0]) / 3
    total.backward()
    optimizer.step()
    for (name, a), b in zip(model.named_parameters(), reference.parameters(), strict=True):
        apart = (
            a - b
        ).abs() > 1e-4  # the sign of a gradient that is all rounding may differ, and AdamW steps by the sign
        assert apart.float().mean() < 0.01, name


def test_only_the_blocks_of_the_texts_move() -> None:
    model = made()
    ms.assign_blocks(model, {50: [0], 51: [2]})
    before = state(model)
    ms.sinks_last(model, rows(2), lr=1e-2, passes=4)
    for name, tensor in model.state_dict().items():
        if is_sink(name):
            moved = (tensor != before[name]).flatten(1).any(1).nonzero()[:, 0].tolist()
            assert moved == [0, 2], name


def test_few_texts_are_met_as_often_as_many() -> None:
    """A step holds no text twice."""
    for count, steps in ((1, 40), (5, 40), (20, 50)):
        assert ms.sinks_last(made(), rows(count), lr=1e-2).steps == steps


def test_gradients_that_are_there_stay_and_take_no_part() -> None:
    model, plain = made(), made()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    ms.sinks_last(model, rows(), lr=1e-2, passes=2)
    ms.sinks_last(plain, rows(), lr=1e-2, passes=2)
    for parameter, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(parameter, other) and torch.equal(parameter.grad, torch.full_like(parameter, 0.5))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ConfigError, match="every sink is frozen"):
        ms.sinks_last(model, rows(), lr=1e-2)


def test_gradients_that_are_there_stay_where_it_does_not_end(monkeypatch) -> None:
    model = made()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 2.0)
    calls = []

    def interrupted(*_, **__) -> None:
        calls.append(None)
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr("memsinks.training.last.clip_grad_norm_", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ms.sinks_last(model, rows(), lr=3e-2, passes=4, batch_rows=3)
    assert all((parameter.grad == 2.0).all() for parameter in model.parameters())


def test_micro_batches_make_the_same_steps() -> None:
    whole, cut = made(), made()
    ms.sinks_last(whole, rows(), lr=1e-2, passes=3)
    ms.sinks_last(cut, rows(), lr=1e-2, passes=3, micro_rows=2)
    for a, b in zip(whole.parameters(), cut.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_the_model_is_in_the_mode_it_was_in_and_no_random_state_is_touched() -> None:
    model = made().train()
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = ms.sinks_last(model, rows(), lr=1e-2, passes=2)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    torch.manual_seed(5)
    np.testing.assert_array_equal(ms.sinks_last(made(), rows(), lr=1e-2, passes=2).after, first.after)


def test_what_is_wrong_is_said_before_anything_moves() -> None:
    model = made()
    before = state(model)
    for settings, part in (
        ({"lr": 0.0}, "lr must be"), ({"lr": 1e-2, "passes": 0}, "passes must be"),
        ({"lr": 1e-2, "batch_rows": 0}, "batch_rows must be"), ({"lr": 1e-2, "micro_rows": 0}, "micro_rows must be"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=part):
            ms.sinks_last(model, rows(), **settings)
    with pytest.raises(DataError, match="documents is empty: no text was repeated"):
        ms.sinks_last(model, rows().select(slice(0)), lr=1e-2)
    with pytest.raises(DataError, match="row 0 of documents does not hold one document"):
        ms.sinks_last(model, rows(together=True), lr=1e-2)
    short = ms.pack([np.array([3])], [1], [2], length=LENGTH, pad_id=0)
    with pytest.raises(DataError, match="row 0 of documents holds no target"):
        ms.sinks_last(model, short, lr=1e-2)
    with pytest.raises(ArchitectureError, match="has no sinks"):
        ms.sinks_last(tiny_llama(torch.float32), rows(), lr=1e-2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
