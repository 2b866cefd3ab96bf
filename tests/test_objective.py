"""The gradient truth table: which weights a text moves, and by how much, document by document in float64."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny import IGNORED, VOCABULARY, fill_sinks, gradients, sink_llama, tiny_llama, tokens
from torch.nn.functional import cross_entropy, linear
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from memsinks.batch import target_count
from memsinks.errors import ConfigError, DataError
from memsinks.sinks.attach import add_sinks
from memsinks.sinks.config import SinkConfig
from memsinks.sinks.gradient import frozen, shared_weight
from memsinks.sinks.state import is_sink
from memsinks.sinks.table import open_mask

IDS = torch.tensor([11, 22, 33, 44, 22])
EXPOSURES = torch.tensor([1, 2, 3, 7, 3])
LENGTH = 6


def rows_batch() -> dict[str, torch.Tensor]:
    """A document a row; some targets ignored, so that documents have different numbers of them."""
    input_ids = tokens(len(IDS), LENGTH)
    labels = input_ids.clone()
    labels[1, :3] = labels[3, 5:] = IGNORED
    return {"input_ids": input_ids, "labels": labels, "document_ids": IDS, "exposures": EXPOSURES}


def packed_batch() -> dict[str, torch.Tensor]:
    """[2, 12]: rows of three and four documents, the last one padding; nothing is predicted across a border."""
    lengths, ids, counts = [[5, 4, 3], [2, 4, 3, 3]], [[11, 22, 33], [44, 22, 55, -1]], [[1, 2, 5], [9, 3, 1, 1]]
    position_ids = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in lengths])

    def spread(values: list[list[int]]) -> torch.Tensor:
        pairs = zip(values, lengths, strict=True)
        return torch.stack([torch.tensor(v).repeat_interleave(torch.tensor(n)) for v, n in pairs])

    input_ids, document_ids = tokens(2, 12), spread(ids)
    labels = input_ids.masked_fill(position_ids == 0, IGNORED).masked_fill(document_ids == -1, IGNORED)
    return {
        "input_ids": input_ids, "labels": labels, "document_ids": document_ids, "exposures": spread(counts),
        "position_ids": position_ids,
    }  # fmt: skip


def documents_of(batch: dict[str, torch.Tensor]) -> list[tuple[int, dict[str, torch.Tensor]]]:
    """(exposure, a batch of this document alone) for each document of a batch."""
    if "position_ids" not in batch:
        return [(int(batch["exposures"][i]), {n: t[i : i + 1] for n, t in batch.items()}) for i in range(len(IDS))]
    found = []
    for row in range(len(batch["input_ids"])):
        starts = [*(batch["position_ids"][row] == 0).nonzero()[:, 0].tolist(), batch["input_ids"].shape[1]]
        for start, end in itertools.pairwise(starts):
            alone = {name: tensor[row : row + 1, start:end] for name, tensor in batch.items()}
            found.append((int(alone["exposures"][0, 0]), alone))
    return found


BATCHES = {"a document a row": rows_batch, "packed rows": packed_batch}


def exact_loss(logits, labels, vocab_size, num_items_in_batch):
    """The stock loss without its rounding to float32."""
    flat = logits[:, :-1].reshape(-1, vocab_size)
    return cross_entropy(flat, labels[:, 1:].reshape(-1), reduction="sum") / num_items_in_batch


def float64_llama(**settings) -> LlamaForCausalLM:
    """A Llama that is float64 throughout: the stock norms and the stock loss round to float32."""
    model = sink_llama(torch.float64, **settings)
    model.loss_function = exact_loss
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, LlamaRMSNorm):
                norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon, dtype=torch.float64)
                setattr(module, name, norm)
    return model


def backward(model: torch.nn.Module, batch: dict[str, torch.Tensor], targets: int) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**batch, num_items_in_batch=targets).loss.backward()
    return gradients(model)


def assert_equal(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float = 1e-12) -> None:
    for name, value in want.items():
        error = float((got[name] - value).abs().max())
        assert error <= tolerance * float(value.abs().max()), f"{name}: {error:.2g} of {float(value.abs().max()):.2g}"


def split(grads: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The gradients of the shared weights, and those of the sinks."""
    shared = {name: grad for name, grad in grads.items() if not is_sink(name)}
    return shared, {name: grad for name, grad in grads.items() if is_sink(name)}


# w(c)


@pytest.mark.parametrize(
    ("open_from", "decay", "weights"),
    [
        (1, 1.0, [1 / 2, 1 / 3, 1 / 4, 1 / 5]),
        (2, 1.0, [1, 1 / 2, 1 / 3, 1 / 4]),
        (3, 1.0, [1, 1, 1 / 2, 1 / 3]),
        (2, 0.5, [1, 2**-0.5, 3**-0.5, 0.5]),
        (2, 2.0, [1, 1 / 4, 1 / 9, 1 / 16]),
        (2, 0.0, [1, 1, 1, 1]),
    ],
)
def test_weight_of_the_first_four_exposures(open_from, decay, weights):
    got = shared_weight(torch.tensor([1, 2, 3, 4]), open_from, decay)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, torch.tensor(weights, dtype=torch.float64), rtol=1e-15, atol=0)


def test_weight_keeps_any_shape():
    assert shared_weight(torch.ones(2, 3, dtype=torch.int64), 2, 1.0).shape == (2, 3)


def test_target_count_is_the_divisor_of_the_stock_loss():
    batch = rows_batch()
    model = tiny_llama()
    inputs = {"input_ids": batch["input_ids"], "labels": batch["labels"]}
    count = target_count(batch["labels"])
    assert count == 5 * len(IDS) - 2 - 1
    total = model(**inputs, num_items_in_batch=1).loss
    torch.testing.assert_close(total / count, model(**inputs).loss, rtol=1e-13, atol=0)


# The truth table under decay


@pytest.mark.parametrize("make", BATCHES.values(), ids=BATCHES)
def test_closed_sinks_get_exactly_zero_gradient_and_open_ones_do_not(make):
    batch = make()
    model = sink_llama()
    _, sinks = split(backward(model, batch, 10))
    opens = batch["document_ids"][batch["exposures"] >= 2].unique()
    for layer in (0, 1):
        is_open = open_mask(opens, model.sink_state.config, layer).any(0)
        assert 0 < int(is_open.sum()) < 8
        for name in ("up", "gate", "down"):
            moved = sinks[f"model.layers.{layer}.mlp.sinks.{name}"].flatten(1)
            assert moved[~is_open].eq(0).all()
            assert moved[is_open].ne(0).any(1).all()


def test_first_exposures_move_no_sink_but_give_them_gradients_of_zero():
    batch = rows_batch() | {"exposures": torch.ones_like(IDS)}
    shared, sinks = split(backward(sink_llama(), batch, 10))
    assert all(grad.eq(0).all() for grad in sinks.values())
    assert all(grad.ne(0).any() for grad in shared.values())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize(("open_from", "decay"), [(2, 1.0), (1, 0.5), (3, 2.0)])
@pytest.mark.parametrize("make", BATCHES.values(), ids=BATCHES)
def test_decay_scales_each_documents_shared_gradient_and_only_it(make, open_from, decay, checkpointing):
    batch = make()
    targets = target_count(batch["labels"]) + 3
    plain = float64_llama(open_from=open_from, shared_decay=0.0)
    want: dict[str, torch.Tensor] = {}
    for exposure, alone in documents_of(batch):
        if alone["labels"].eq(IGNORED).all():
            continue
        weight = float(shared_weight(torch.tensor(exposure), open_from, decay))
        for name, grad in backward(plain, alone, targets).items():
            want[name] = want.get(name, 0) + grad * (1 if is_sink(name) else weight)
    model = float64_llama(open_from=open_from, shared_decay=decay)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_equal(backward(model, batch, targets), want)


@pytest.mark.parametrize("make", BATCHES.values(), ids=BATCHES)
def test_sinks_get_the_gradient_of_no_decay(make):
    batch = make()
    got_shared, got_sinks = split(backward(float64_llama(shared_decay=1.0), batch, 20))
    want_shared, want_sinks = split(backward(float64_llama(shared_decay=0.0), batch, 20))
    assert_equal(got_sinks, want_sinks)
    for name, grad in got_shared.items():
        assert not torch.allclose(grad, want_shared[name], rtol=1e-2)


@pytest.mark.parametrize("make", BATCHES.values(), ids=BATCHES)
def test_grouped_path_in_float32_agrees(make):
    batch = make()
    want = backward(sink_llama(), batch, 20)
    got = backward(sink_llama(torch.float32), batch, 20)
    assert_equal({name: grad.double() for name, grad in got.items()}, want, 1e-4)


def test_untracked_text_is_not_scaled_at_any_exposure():
    batch = rows_batch() | {"document_ids": torch.full_like(IDS, -1)}
    got = backward(sink_llama(shared_decay=1.0), batch, 20)
    want = backward(sink_llama(shared_decay=0.0), batch, 20)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_gradients_add_up_over_micro_batches_of_one_divisor():
    batch = rows_batch()
    model, targets = sink_llama(), target_count(batch["labels"])
    whole = backward(model, batch, targets)
    model.zero_grad()
    for part in (slice(0, 2), slice(2, 5)):
        model(**{name: tensor[part] for name, tensor in batch.items()}, num_items_in_batch=targets).loss.backward()
    assert_equal(gradients(model), whole)


# The loss stays the stock loss


@pytest.mark.parametrize("make", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("shared", ["decay", "none"])
def test_reported_loss_is_the_stock_loss(make, shared):
    batch = make()
    if shared == "none":
        batch["exposures"] = batch["exposures"].clone()
        batch["exposures"][1:] = 5
        batch["exposures"][:1] = 1
    stock = {name: batch[name] for name in ("input_ids", "labels", "position_ids") if name in batch}
    model = tiny_llama()
    want = model(**stock, use_cache=False).loss
    add_sinks(model, SinkConfig(neurons=64, active=16, block_size=8, shared=shared))
    assert torch.equal(model(**batch).loss, want)


@pytest.mark.parametrize("make", BATCHES.values(), ids=BATCHES)
def test_decay_changes_neither_loss_nor_logits(make):
    batch = make()
    scaled, plain = sink_llama(shared_decay=1.0)(**batch), sink_llama(shared_decay=0.0)(**batch)
    assert torch.equal(scaled.loss, plain.loss)
    assert torch.equal(scaled.logits, plain.logits)


@pytest.mark.parametrize("settings", [{"shared_decay": 1.0}, {"shared": "none"}], ids=["decay", "exact"])
def test_own_loss_from_the_logits_gives_the_same_gradients(settings):
    batch = rows_batch()
    model = float64_llama(**settings)
    targets = target_count(batch["labels"])
    want = backward(model, batch, targets)
    labels = batch.pop("labels")
    model.zero_grad()
    out = model(**batch)
    assert out.loss is None
    logits = out.logits[:, :-1].reshape(-1, VOCABULARY)
    (cross_entropy(logits, labels[:, 1:].reshape(-1), reduction="sum") / targets).backward()
    assert_equal(gradients(model), want)


def test_two_forwards_before_one_backward():
    first, second = rows_batch(), rows_batch() | {"document_ids": IDS.flip(0), "exposures": EXPOSURES.flip(0)}
    model = sink_llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    one, other = backward(model, first, 20), backward(model, second, 20)
    model.zero_grad()
    loss = model(**first, num_items_in_batch=20).loss + model(**second, num_items_in_batch=20).loss
    loss.backward()
    assert_equal(gradients(model), {name: one[name] + other[name] for name in one})


# Exact mode


def rows_where(batch: dict[str, torch.Tensor], chosen: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: tensor[chosen] for name, tensor in batch.items()}


def exact_batch() -> dict[str, torch.Tensor]:
    """Rows 0, 3, 5 meet their text for the first time, the others again, in mixed order."""
    input_ids = tokens(6, LENGTH, seed=3)
    return {
        "input_ids": input_ids, "labels": input_ids.clone(), "document_ids": torch.tensor([11, 22, 33, 44, 22, 66]),
        "exposures": torch.tensor([1, 2, 5, 1, 3, 1]),
    }  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["masked", "grouped"])
def test_exact_mode_leaves_the_shared_weights_to_the_other_rows_bit_for_bit(dtype, checkpointing):
    batch = exact_batch()
    opens = batch["exposures"] >= 2
    model = sink_llama(dtype, shared="none")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    shared, sinks = split(backward(model, batch, 30))
    want, no_sinks = split(backward(model, rows_where(batch, ~opens), 30))
    assert all(torch.equal(shared[name], want[name]) for name in want)
    assert all(grad.ne(0).any() for grad in want.values())
    assert all(grad.eq(0).all() for grad in no_sinks.values())
    full = backward(sink_llama(dtype, shared_decay=0.0), batch, 30)
    assert_equal(sinks, split(full)[1], 1e-12 if dtype == torch.float64 else 1e-5)
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "checkpointed"])
def test_exact_mode_batch_of_only_sink_rows_gives_zeros(checkpointing):
    batch = exact_batch()
    batch = rows_where(batch, batch["exposures"] >= 2)
    model = sink_llama(shared="none")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    shared, sinks = split(backward(model, batch, 30))
    assert all(grad.eq(0).all() for grad in shared.values())
    assert_equal(sinks, split(backward(sink_llama(shared_decay=0.0), batch, 30))[1])


def test_exact_mode_keeps_rows_in_their_order():
    batch = exact_batch()
    plain, exact = sink_llama(shared_decay=0.0)(**batch), sink_llama(shared="none")(**batch)
    torch.testing.assert_close(exact.logits, plain.logits, rtol=0, atol=1e-13)
    torch.testing.assert_close(exact.loss, plain.loss, rtol=1e-13, atol=0)


def test_exact_mode_on_packed_rows():
    batch = packed_batch()
    batch["exposures"] = torch.where(batch["document_ids"] == -1, 1, torch.tensor([[1], [4]]))
    model = sink_llama(shared="none")
    shared, sinks = split(backward(model, batch, 30))
    want, _ = split(backward(model, rows_where(batch, torch.tensor([True, False])), 30))
    assert all(torch.equal(shared[name], want[name]) for name in want)
    assert_equal(sinks, split(backward(sink_llama(shared_decay=0.0), batch, 30))[1])


def test_exact_mode_refuses_rows_that_mix_both_kinds():
    with pytest.raises(DataError, match=r"row 0 mixes.*pack with apart_from=config.open_from"):
        sink_llama(shared="none")(**packed_batch())


def test_exact_mode_refuses_mixed_rows_without_labels():
    batch = packed_batch()
    del batch["labels"]
    with pytest.raises(DataError, match="row 0 mixes"):
        sink_llama(shared="none")(**batch)


def test_frozen_gives_back_only_what_it_took():
    free, fixed = torch.nn.Parameter(torch.ones(1)), torch.nn.Parameter(torch.ones(1), requires_grad=False)
    with pytest.raises(ZeroDivisionError), frozen([free, fixed]):
        1 / int(free.requires_grad)
    assert free.requires_grad
    assert not fixed.requires_grad


# What is refused, and what is not needed


class FusedLlama(LlamaForCausalLM):
    """Takes its loss without going through the output embedding, as fused losses do."""

    def forward(self, input_ids=None, labels=None, **kwargs):
        kwargs.pop("num_items_in_batch", None)
        hidden = self.model(input_ids=input_ids, **kwargs).last_hidden_state
        logits = linear(hidden[:, :-1], self.lm_head.weight)
        loss = cross_entropy(logits.reshape(-1, VOCABULARY), labels[:, 1:].reshape(-1))
        return CausalLMOutputWithPast(loss=loss)


def test_fused_loss_is_refused_under_decay_and_allowed_without():
    with pytest.raises(ConfigError, match=r"computed none \(a fused loss\?\)"):
        sink_llama(cls=FusedLlama)(**rows_batch())
    assert sink_llama(cls=FusedLlama, shared_decay=0.0)(**rows_batch()).loss > 0


def test_logits_to_keep_is_refused_under_decay():
    batch = rows_batch()
    del batch["labels"]
    with pytest.raises(ConfigError, match=r"logits of every position.*logits_to_keep"):
        sink_llama()(**batch, logits_to_keep=1)
    assert sink_llama(shared_decay=0.0)(**batch, logits_to_keep=1).logits.shape[1] == 1


def test_auxiliary_loss_is_refused_under_decay():
    class AuxiliaryLlama(LlamaForCausalLM):
        def forward(self, **kwargs):
            out = super().forward(**kwargs)
            out.aux_loss = out.loss * 0.1
            return out

    with pytest.raises(ConfigError, match="aux_loss"):
        sink_llama(cls=AuxiliaryLlama)(**rows_batch())


def test_a_refused_forward_leaves_no_trace():
    model = sink_llama()
    batch = rows_batch()
    want = model(**batch).loss
    with pytest.raises(ConfigError):
        model(**{k: v for k, v in batch.items() if k != "labels"}, logits_to_keep=1)
    with pytest.raises(DataError):
        model(**(batch | {"exposures": EXPOSURES - 1}))
    assert torch.equal(model(**batch).loss, want)
    with torch.no_grad():
        assert torch.equal(
            model.eval()(input_ids=batch["input_ids"]).logits, tiny_llama().eval()(batch["input_ids"]).logits
        )


def test_published_method_needs_no_exposures():
    batch = rows_batch()
    model = sink_llama(open_from=1, shared_decay=0.0)
    want = backward(model, batch, 20)
    del batch["exposures"]
    got = backward(model, batch, 20)
    assert all(torch.equal(got[name], want[name]) for name in want)
    _, sinks = split(got)
    assert all(grad.ne(0).any() for grad in sinks.values())


def test_a_new_model_and_a_filled_one_differ():
    """Guards the tests above: with the down projection at zero, half of the sinks' gradients vanish."""
    model = tiny_llama()
    add_sinks(model, SinkConfig(neurons=64, active=16, block_size=8, shared="decay"))
    _, sinks = split(backward(model, rows_batch(), 20))
    assert all(grad.eq(0).all() == (not name.endswith("down")) for name, grad in sinks.items())
    fill_sinks(model)
    assert all(grad.ne(0).any() for grad in split(backward(model, rows_batch(), 20))[1].values())
