"""Changed copies: the model is left alone, training is a plain loop, rounding is to the nearest of few values."""

from __future__ import annotations

import copy
import random

import numpy as np
import pytest
import torch
from audited import TEXTS, UNSEEN, llama, memorized_in_sinks, tokens_of, train

from memsinks.auditing.retrain import bare_copy, round_weights, seconds_of_a_step, train_further
from memsinks.sinks.state import has_sinks

SETTINGS = {"lr": 1e-2, "batch_rows": 2, "batch_tokens": 10_000, "seed": 0, "label": "model"}


def texts() -> list[np.ndarray]:
    return [one.astype(np.int32) for one in tokens_of(TEXTS)]


def loss(model, tokens: list[np.ndarray]) -> torch.Tensor:
    rows = [torch.from_numpy(one.astype(np.int64)) for one in tokens]
    batch = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    return model(input_ids=batch, labels=labels).loss


def test_the_model_itself_is_left_alone() -> None:
    for model in (train(llama(), TEXTS, 5), memorized_in_sinks()):
        sinks = has_sinks(model)
        model.train(not sinks).requires_grad_(False)
        before, kind = {name: tensor.clone() for name, tensor in model.state_dict().items()}, type(model)
        copied = bare_copy(model)
        assert not has_sinks(copied) and not copied.training
        round_weights(copied, 3)
        train_further(copied, texts(), (2,), lambda: None, **SETTINGS)
        assert (type(model), model.training, has_sinks(model)) == (kind, not sinks, sinks)
        assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        model.eval().requires_grad_(True)


def test_a_copy_is_in_float32_and_says_what_closed_sinks_say() -> None:
    assert bare_copy(llama().bfloat16()).dtype == torch.float32
    model = memorized_in_sinks()
    assert torch.equal(loss(bare_copy(model), texts()), loss(model, texts()))


@pytest.mark.parametrize("batch_rows", [1, 2, 16])
def test_training_is_a_plain_loop(batch_rows) -> None:
    """AdamW without decay, gradients clipped to norm 1, the texts in an order drawn anew for each pass over them."""
    model, tokens = bare_copy(llama(1)), texts()
    seen = train_further(
        model, tokens, range(6), lambda: loss(model, tokens).item(), **(SETTINGS | {"batch_rows": batch_rows})
    )
    rng, student = np.random.default_rng(0), llama(1)
    order = np.concatenate([rng.permutation(4) for _ in range(6)])
    optimizer, size = torch.optim.AdamW(student.parameters(), lr=1e-2, weight_decay=0.0), min(batch_rows, 4)
    for step in range(6):
        assert seen[step] == pytest.approx(loss(student, tokens).item(), rel=1e-4)
        loss(student, [tokens[index] for index in order[step * size : (step + 1) * size]]).backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def test_small_forwards_make_the_same_steps() -> None:
    losses = []
    for batch_tokens in (10_000, 40, 1):
        model = bare_copy(llama(1))
        train_further(
            model, texts(), (3,), lambda: None, **(SETTINGS | {"batch_rows": 4, "batch_tokens": batch_tokens})
        )
        losses.append(loss(model, texts()).item())
    assert losses[1:] == pytest.approx(losses[:1] * 2, rel=1e-3)


def test_a_copy_of_a_compiled_model_is_a_copy() -> None:
    """What was compiled calls the model that it was compiled for."""
    model = copy.deepcopy(memorized_in_sinks())
    model.compile(backend="eager")
    copied, before = bare_copy(model), loss(model, texts()).item()
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.zero_()
    assert loss(copied, texts()).item() == pytest.approx(float(np.log(280)), rel=1e-4) != before


def test_looks_come_where_asked_in_evaluation_mode() -> None:
    model = bare_copy(llama(attention_dropout=0.3))
    modes = train_further(model, texts(), (0, 3), lambda: model.training, **SETTINGS)
    assert modes == [False, False]


def test_the_same_figures_at_every_call_and_no_random_state_is_touched() -> None:
    def run(**changes) -> float:
        model = bare_copy(llama(attention_dropout=0.3))
        (found,) = train_further(model, texts(), (5,), lambda: loss(model, texts()).item(), **(SETTINGS | changes))
        return found

    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    first = run()
    seconds_of_a_step(bare_copy(llama(attention_dropout=0.3)), texts(), 2, 10_000)
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    torch.manual_seed(99)
    assert run() == first != run(seed=1)


def test_texts_are_cut_to_the_context() -> None:
    def run(tokens: list[np.ndarray]) -> torch.Tensor:
        model = bare_copy(llama(max_position_embeddings=16))
        train_further(model, tokens, (3,), lambda: None, **SETTINGS)
        return loss(model, [one[:16] for one in texts()])

    assert torch.equal(run(texts()), run([one[:16] for one in texts()]))


def test_timing_a_step_teaches_nothing() -> None:
    model = bare_copy(llama())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        assert seconds_of_a_step(model, texts(), 3, 40) > 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


# Rounding


@pytest.mark.parametrize(
    ("bits", "values"), [(2, [-1.0, 0.0, 1.0]), (3, [-1.0, -2 / 3, -1 / 3, 0.0, 1 / 3, 2 / 3, 1.0])]
)
def test_weights_are_rounded_to_the_nearest_of_few_values(bits, values) -> None:
    model = bare_copy(llama())
    weight = model.model.layers[0].mlp.up_proj.weight
    with torch.no_grad():
        weight[0] = torch.linspace(-1, 1, weight.shape[1])
        weight[1] = 0.0
        weight[2] = 5 * weight[0]
    norm = model.model.norm.weight.clone()
    round_weights(model, bits)
    for number, start in zip(weight[0].tolist(), torch.linspace(-1, 1, weight.shape[1]).tolist(), strict=True):
        assert number == pytest.approx(min(values, key=lambda x: abs(x - start)), abs=1e-6)
    assert not weight[1].any()
    assert torch.allclose(weight[2], 5 * weight[0])
    assert torch.equal(model.model.norm.weight, norm)


def test_many_bits_change_nearly_nothing_and_few_bits_much() -> None:
    model = train(llama(), TEXTS + UNSEEN, 40)
    losses = []
    for bits in (16, 8, 2):
        copied = bare_copy(model)
        round_weights(copied, bits)
        losses.append(abs((loss(copied, texts()) - loss(model, texts())).item()))
    assert max(losses[:2]) < 1e-2 < 0.1 < losses[2]
