"""Relearning: a copy is trained and the model is not; ratios at both ends; the same figures at every call."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from audited import TEXTS, UNSEEN, llama, memorized_in_sinks, tokens_of, train

from memsinks.auditing.relearning import RelearningCurve, compare, relearn, steps_until
from memsinks.errors import DataError

NONE = np.zeros(0, np.int64)
SETTINGS = {"steps": 30, "lr": 1e-2, "batch_size": 2, "seed": 0}


@pytest.fixture(scope="module")
def tokens() -> list[np.ndarray]:
    return [one.astype(np.int32) for one in tokens_of(TEXTS)]


@pytest.fixture(scope="module")
def ordinary():
    """Knows the texts by heart."""
    return train(llama(), TEXTS, 60)


@pytest.fixture(scope="module")
def twin():
    """Never saw them."""
    return train(llama(1), UNSEEN, 10)


def curve(model, tokens, name: str = "model", start: np.ndarray = NONE, **changes) -> RelearningCurve:
    return relearn(model, tokens, start, name=name, **(SETTINGS | changes))


# The curve


def test_the_model_itself_is_left_alone(ordinary, tokens) -> None:
    for model in (ordinary, memorized_in_sinks()):
        model.train(model is ordinary)
        model.requires_grad_(False)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        kind = type(model)
        found = curve(model, tokens, steps=4)
        assert found.same[-1] != found.same[0]
        assert type(model) is kind
        assert model.training == (model is ordinary)
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())
        assert list(before) == list(model.state_dict())
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        model.eval().requires_grad_(True)


def test_a_model_with_sinks_is_relearned_without_them(tokens) -> None:
    model = memorized_in_sinks()
    found = curve(model, tokens, steps=0)
    assert found.steps == (0,)
    assert min(*found.same, *found.other) > 5  # with open sinks it recites two of the texts


def test_the_losses_at_the_start_are_those_of_the_two_halves(twin, tokens) -> None:
    order = np.random.default_rng(0).permutation(4)
    found = curve(twin, tokens, steps=0)
    for half, part in ((found.same, order[0::2]), (found.other, order[1::2])):
        total, count = 0.0, 0
        for index in part:
            batch = torch.from_numpy(tokens[index].astype(np.int64))[None]
            with torch.no_grad():
                total += float(twin(input_ids=batch, labels=batch).loss) * (batch.shape[1] - 1)
            count += batch.shape[1] - 1
        assert half[0] == pytest.approx(total / count, rel=1e-5)
    assert curve(twin, tokens, steps=0, batch_size=1).same == pytest.approx(found.same)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_training_goes_by_a_plain_loop(twin, tokens, batch_size) -> None:
    """AdamW without decay, gradients clipped to norm 1, the half in an order drawn anew for each pass over it."""
    found = curve(twin, tokens, steps=5, batch_size=batch_size)
    rng = np.random.default_rng(0)
    texts = [torch.from_numpy(tokens[index].astype(np.int64)) for index in rng.permutation(4)[0::2]]
    order = np.concatenate([rng.permutation(2) for _ in range(6)])
    student = llama(1)
    student.load_state_dict(twin.state_dict())
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2, weight_decay=0.0)

    def loss(chosen: list[torch.Tensor]) -> torch.Tensor:
        rows = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True, padding_value=-100)
        return student(input_ids=rows, labels=labels).loss

    size = min(batch_size, 2)
    for step in range(6):
        assert found.same[step] == pytest.approx(loss(texts).item(), rel=1e-3)
        loss([texts[index] for index in order[step * size : (step + 1) * size]]).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def test_only_one_half_is_trained_on(twin, tokens) -> None:
    found = curve(twin, tokens, steps=40)
    assert found.same[-1] < 0.5 * found.same[0]
    assert found.other[-1] > found.same[-1] + 1
    assert found.steps == tuple(range(0, 41, 2))
    assert len(found.same) == len(found.other) == 21


@pytest.mark.parametrize(("steps", "marks"), [(0, (0,)), (3, (0, 1, 2, 3)), (20, tuple(range(21)))])
def test_losses_are_taken_at_the_start_and_the_end(twin, tokens, steps, marks) -> None:
    assert curve(twin, tokens, steps=steps).steps == marks


def test_the_same_figures_at_every_call_and_no_random_state_is_touched(tokens) -> None:
    model = llama(attention_dropout=0.3)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    a = curve(model, tokens, steps=5)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    torch.manual_seed(99)
    assert curve(model, tokens, steps=5) == a
    assert curve(model, tokens, steps=5, seed=1) != a


def test_a_start_token_and_the_end_of_the_context(twin, tokens) -> None:
    started = curve(twin, tokens, steps=0, start=np.array([3]))
    assert started.same != curve(twin, tokens, steps=0).same
    short = llama(max_position_embeddings=16)
    assert curve(short, tokens, steps=0) == curve(short, [one[:16] for one in tokens], steps=0)
    with_start = curve(short, tokens, steps=0, start=np.array([3]))
    assert with_start == curve(short, [one[:15] for one in tokens], steps=0, start=np.array([3]))


def test_training_is_in_float32(tokens) -> None:
    model = llama().bfloat16()
    found = curve(model, tokens, steps=10, lr=1e-4)
    assert found.same[-1] < found.same[0]  # steps this small are lost in bfloat16
    assert model.dtype == torch.bfloat16
    assert found == curve(llama().bfloat16().float(), tokens, steps=10, lr=1e-4)


def test_two_documents_are_the_least(twin, tokens) -> None:
    assert len(curve(twin, tokens[:2], steps=1).other) == 2
    with pytest.raises(DataError, match="at least 2 documents to halve, got 1"):
        curve(twin, tokens[:1])


# The comparison


def test_the_twin_itself_comes_back_as_fast_as_the_twin(ordinary, twin, tokens) -> None:
    against = curve(ordinary, tokens, "ordinary", steps=0)
    found = compare(curve(twin, tokens, "audited"), against, curve(twin, tokens, "twin"))
    assert found.ratio_same == 1.0
    assert found.steps_same["audited"] == found.steps_same["twin"] > 0
    assert found.target_same == pytest.approx((found.curves[1].same[0] + against.same[0]) / 2)
    assert found.target_other == pytest.approx((found.curves[1].other[0] + against.other[0]) / 2)


def test_a_model_that_still_knows_needs_no_step(ordinary, twin, tokens) -> None:
    against = curve(ordinary, tokens, "ordinary", steps=0)
    found = compare(curve(ordinary, tokens, "audited"), against, curve(twin, tokens, "twin"))
    assert found.steps_same["audited"] == found.steps_other["audited"] == 0.0
    assert found.ratio_same == 0.0
    assert [x.name for x in found.curves] == ["audited", "twin", "ordinary"]


def by_hand(name: str, same: tuple[float, ...], other: tuple[float, ...]) -> RelearningCurve:
    return RelearningCurve(name, tuple(10 * step for step in range(len(same))), same, other)


def test_the_comparison_by_hand() -> None:
    audited = by_hand("a", (3.0, 2.0, 1.0), (4.0, 3.5, 3.0))
    twin = by_hand("t", (3.0, 2.5, 2.0), (5.0, 4.0, 3.5))
    found = compare(audited, by_hand("o", (1.0,), (1.0,)), twin)
    assert (found.target_same, found.target_other) == (2.0, 3.0)
    assert found.steps_same == {"a": 10.0, "t": 20.0}
    assert found.steps_other == {"a": 20.0, "t": None}
    assert found.ratio_same == 0.5
    assert found.ratio_other is None
    slow = compare(by_hand("a", (3.0, 2.9), (3.0, 2.9)), by_hand("o", (1.0,), (1.0,)), twin)
    assert slow.steps_same["a"] is None
    assert slow.ratio_same is None


def test_without_anything_memorized_there_is_no_ratio() -> None:
    same = (3.0, 2.0)
    found = compare(by_hand("a", same, same), by_hand("o", (3.0,), (3.0,)), by_hand("t", same, same))
    assert found.steps_same == {"a": 0.0, "t": 0.0}
    assert found.ratio_same is None
    assert found.ratio_other is None


@pytest.mark.parametrize(
    ("target", "expected"),
    [(5.0, 0.0), (4.0, 0.0), (3.0, 5.0), (2.0, 10.0), (1.5, 15.0), (1.0, 20.0), (0.9, None)],
)
def test_steps_until_a_loss_by_hand(target, expected) -> None:
    assert steps_until((0, 10, 20, 30), (4.0, 2.0, 1.0, 3.0), target) == expected


def test_the_first_time_counts() -> None:
    assert steps_until((0, 1, 2, 3), (3.0, 1.0, 3.0, 1.0), 2.0) == 0.5
    assert steps_until((0, 4), (2.0, 2.0), 1.9) is None
