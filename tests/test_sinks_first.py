"""Sinks first: what moves and what does not, against a plain step; packed rows, micro-batches, the exact mode, a Trainer."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny import sink_llama, tokens
from torch import Tensor

import memsinks as ms
from memsinks.errors import ConfigError, DataError
from memsinks.sinks.state import is_sink, shared_parameters, sink_parameters
from memsinks.training.evaluate import row_losses

ROWS, LENGTH, LR = 6, 12, 1e-2
EXPOSURES = torch.tensor([1, 2, 1, 5, 3, 1])


def batch(exposures: Tensor = EXPOSURES) -> dict[str, Tensor]:
    text = tokens(len(exposures), LENGTH)
    return {
        "input_ids": text,
        "labels": text,
        "document_ids": torch.arange(len(exposures)) + 10,
        "exposures": exposures,
    }


def packed() -> dict[str, Tensor]:
    """Two documents a row, ids and exposures [B, T]; the second row holds none that is met again."""
    made = batch(torch.ones(3, dtype=torch.int64))
    half = torch.arange(LENGTH) // (LENGTH // 2)
    documents = half + 2 * torch.arange(3)[:, None]
    exposures = torch.tensor([1, 4, 1, 1, 2, 3])[documents]
    return made | {"document_ids": documents + 10, "exposures": exposures,
                   "position_ids": (torch.arange(LENGTH) % (LENGTH // 2)).expand(3, -1)}  # fmt: skip


def optimizer_of(model) -> ms.AdamW:
    return ms.AdamW(ms.param_groups(model, LR, weight_decay=0.1))


def before(model) -> dict[str, Tensor]:
    return {name: x.detach().clone() for name, x in model.named_parameters()}


@pytest.mark.parametrize("made", [batch, packed])
@pytest.mark.parametrize("settings", [{}, {"shared_decay": 0.5}, {"shared": "none"}, {"open_from": 1}],
                         ids=["default", "half", "exact", "always open"])  # fmt: skip
def test_sinks_make_the_step_of_a_plain_loop_and_nothing_else_moves(made, settings) -> None:
    if settings.get("shared") == "none" and made is packed:
        pytest.skip("the exact mode takes one document a row")
    model = sink_llama(**settings)
    plain = copy.deepcopy(model)
    whole = made()
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)  # of an earlier micro-batch
    old, optimizer = before(model), optimizer_of(model)
    least = 1 if settings.get("open_from") == 1 else 2
    opens = (whole["exposures"] >= least).reshape(len(whole["input_ids"]), -1).any(1)
    assert ms.sinks_first(model, optimizer, [whole], max_norm=0.3) == int(opens.sum())
    targets = ms.target_count(whole["labels"])
    plain(**{name: x[opens] for name, x in whole.items()}, num_items_in_batch=targets).loss.backward()
    for parameter in shared_parameters(plain):
        parameter.grad = None
    ms.clip_grad_norm_(plain, 0.3)
    optimizer_of(plain).step()
    for (name, x), y in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert x.grad is not None and bool((x.grad == 0.5).all()) and x.requires_grad
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)
        assert is_sink(name) or torch.equal(x, old[name])
    assert any(not torch.equal(x, old[name]) for name, x in model.named_parameters() if is_sink(name))


def test_the_texts_are_known_better_afterwards() -> None:
    model, later = sink_llama(), batch(torch.full((ROWS,), 2))
    optimizer = optimizer_of(model)

    def loss() -> float:
        with torch.no_grad():
            return float(model(**later).loss)

    start = loss()
    for _ in range(20):
        ms.sinks_first(model, optimizer, [later])
    assert loss() < start - 0.2


def test_where_every_text_is_new_nothing_happens() -> None:
    model = sink_llama()
    old, optimizer = before(model), optimizer_of(model)
    assert ms.sinks_first(model, optimizer, [batch(torch.ones(ROWS, dtype=torch.int64))]) == 0
    assert not optimizer.state
    assert all(torch.equal(x, old[name]) and x.grad is None for name, x in model.named_parameters())


@pytest.mark.parametrize("divisor", [None, 66], ids=["counted", "given"])
def test_micro_batches_make_one_update(divisor) -> None:
    """Whatever the number of micro-batches, the gradient is that of one batch: of the open rows, over all targets."""
    whole = batch()
    halves = [{name: x.chunk(2)[place] for name, x in whole.items()} for place in (0, 1)]
    rows = [{name: x[place : place + 1] for name, x in whole.items()} for place in range(ROWS)]
    taken = []
    for parts in ([whole], halves, rows):
        model = sink_llama()
        optimizer = torch.optim.SGD(ms.param_groups(model, LR))
        optimizer.register_step_pre_hook(lambda *_, model=model: taken.append([x.grad for x in sink_parameters(model)]))
        assert ms.sinks_first(model, optimizer, parts, num_items_in_batch=divisor, max_norm=0) == 3
    for other in taken[1:]:
        for one, x in zip(taken[0], other, strict=True):
            torch.testing.assert_close(one, x, rtol=0, atol=1e-12)


def test_another_loss_is_learnt_where_one_is_given() -> None:
    models = [sink_llama(), sink_llama()]
    whole, seen = batch(), []

    def loss(model, rows, micro_batch) -> Tensor:
        seen.append((len(rows["labels"]), micro_batch))
        return model(**rows, num_items_in_batch=ms.target_count(whole["labels"])).loss

    ms.sinks_first(models[0], optimizer_of(models[0]), [whole], loss=loss)
    ms.sinks_first(models[1], optimizer_of(models[1]), [whole])
    assert [number for number, _ in seen] == [3] and seen[0][1] is whole
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("norm", [0, -1.0, None, float("inf")])
def test_no_clipping_whatever_says_so(norm) -> None:
    models = [sink_llama(), sink_llama()]
    for model, max_norm in zip(models, (norm, 1e9), strict=True):
        ms.sinks_first(model, torch.optim.SGD(ms.param_groups(model, 10.0)), [batch()], max_norm=max_norm)
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)


def test_places_in_the_training_order_are_for_the_step_itself() -> None:
    """A model that meets a row in sinks first must not take the step for its second meeting."""
    model = sink_llama()
    given = []
    model.register_forward_pre_hook(lambda module, args, kwargs: given.append(set(kwargs)), with_kwargs=True)
    ms.sinks_first(model, optimizer_of(model), [batch() | {"places": torch.arange(ROWS)}])
    assert given and "places" not in given[0] and "exposures" in given[0]


def test_after_an_error_gradients_are_as_before() -> None:
    model = sink_llama()
    for parameter in sink_parameters(model):
        parameter.grad = torch.ones_like(parameter)
    with pytest.raises(IndexError):
        ms.sinks_first(model, optimizer_of(model), [batch() | {"input_ids": tokens(ROWS, LENGTH) + 10_000}])
    assert all(bool((x.grad == 1).all()) for x in sink_parameters(model))
    assert all(x.grad is None and x.requires_grad for x in shared_parameters(model))


def test_a_model_in_evaluation_mode_is_refused() -> None:
    model = sink_llama().eval()
    with pytest.raises(ConfigError, match=r"evaluation mode; call model\.train\(\)"):
        ms.sinks_first(model, optimizer_of(model), [batch()])


def test_ids_and_exposures_must_be_there() -> None:
    model, whole = sink_llama(), batch()
    with pytest.raises(DataError, match=r"list of a step's micro-batches; give \[batch\]"):
        ms.sinks_first(model, optimizer_of(model), whole)  # type: ignore[arg-type]
    del whole["exposures"], whole["document_ids"]
    with pytest.raises(DataError, match="sinks_first needs document_ids and exposures in each batch"):
        ms.sinks_first(model, optimizer_of(model), [whole])


def test_whatever_the_forward_takes_is_taken() -> None:
    """Positions for all rows at once, ids a row and exposures a token, embeddings for tokens, no exposures where none count."""
    whole = batch()
    row = whole | {"position_ids": torch.arange(LENGTH)[None]}
    wide = whole | {"exposures": whole["exposures"][:, None].expand(-1, LENGTH)}
    embedded = sink_llama().get_input_embeddings()(whole["input_ids"]).detach()
    inputs = {name: x for name, x in whole.items() if name != "input_ids"} | {"inputs_embeds": embedded}
    models = [sink_llama() for _ in range(4)]
    for model, made in zip(models, (whole, row, wide, inputs), strict=True):
        assert ms.sinks_first(model, optimizer_of(model), [made]) == 3
    for model in models[1:]:
        for one, other in zip(models[0].parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-9)
    always = sink_llama(open_from=1, shared_decay=0.0)
    del whole["exposures"]
    assert ms.sinks_first(always, optimizer_of(always), [whole]) == ROWS


def test_several_updates_are_several_calls() -> None:
    models = [sink_llama(), sink_llama()]
    optimizers = [optimizer_of(model) for model in models]
    once = ms.sinks_first(models[0], optimizers[0], [batch()], updates=3)
    each = [ms.sinks_first(models[1], optimizers[1], [batch()]) for _ in range(3)]
    assert once == sum(each) > 0
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_row_whose_loss_is_low_takes_no_further_part() -> None:
    """Before each update the rows above the level are those of the update; in the end none is, or the updates are used up."""
    model, whole = sink_llama(), batch()
    optimizer = optimizer_of(model)
    with torch.no_grad():
        found = row_losses(model(**whole).logits, whole["labels"])
    opens = whole["exposures"] > 1 if whole["exposures"].dim() == 1 else (whole["exposures"] > 1).any(1)
    level = float(found[opens].median())
    first = int(opens.sum())
    assert ms.sinks_first(model, optimizer, [whole], updates=2, until=level) == first + int(
        (found[opens] > level).sum()
    )
    assert ms.sinks_first(model, optimizer, [whole], updates=50, until=1e9) == first


def test_of_a_packed_row_the_text_whose_sinks_are_open_counts() -> None:
    """A text that is met for the first time beside it cannot get better, and keeps no row in."""
    model, whole = sink_llama(), packed()
    with torch.no_grad():
        logits = model(**whole).logits
    opens = whole["exposures"] > 1
    own = row_losses(logits, whole["labels"].masked_fill(~opens, -100))
    both = row_losses(logits, whole["labels"])
    rows = opens.any(1)
    level = float((own[rows].min() + own[rows].max()) / 2)
    assert ((own > level) & rows).sum() == 1
    found = ms.sinks_first(model, optimizer_of(model), [whole], updates=2, until=level)
    assert found == int(rows.sum()) + 1
    assert not torch.allclose(own[rows], both[rows])


def test_how_many_and_until_when_must_make_sense() -> None:
    model = sink_llama()
    for wrong, part in (({"updates": 0}, "updates must be"), ({"until": -0.1}, "until must be")):
        with pytest.raises(ConfigError, match=part):
            ms.sinks_first(model, optimizer_of(model), [batch()], **wrong)
