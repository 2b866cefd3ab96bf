"""Sinks go in, open as told, come out again, and refuse what would go wrong in silence."""

from __future__ import annotations

import copy
import pickle
import random

import numpy as np
import pytest
import torch
from tiny import IGNORED, VOCABULARY, A, B, batch, fill_sinks, gradients, sink_llama, tiny_llama, tokens
from torch import nn
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from memsinks.errors import ArchitectureError, CheckpointError, ConfigError, DataError
from memsinks.sinks.attach import add_sinks, remove_sinks
from memsinks.sinks.config import SinkConfig
from memsinks.sinks.opening import down_modules, rescale_factor, sinks_closed, sinks_open
from memsinks.sinks.state import assign_blocks, has_sinks, require_sinks, shared_parameters, sink_parameters
from memsinks.sinks.table import open_mask

CONFIG = SinkConfig(neurons=64, active=16, block_size=8, shared="decay")


def closed_logits(model: nn.Module, input_ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=input_ids).logits


def open_logits(model: nn.Module, input_ids: torch.Tensor, ids) -> torch.Tensor:
    with sinks_open(model, ids):
        return closed_logits(model, input_ids)


# Adding


def test_adding_reports_what_it_touched():
    model = tiny_llama()
    stock = sum(parameter.numel() for parameter in model.parameters())
    added = add_sinks(model, CONFIG)
    assert (added.layers, added.intermediate_size, added.neurons, added.active) == ((0, 1), 24, 64, 16)
    assert added.shared_parameters == stock == sum(x.numel() for x in shared_parameters(model))
    assert added.sink_parameters == 2 * 3 * 64 * 16 == sum(x.numel() for x in sink_parameters(model))
    assert added.open_parameters == 2 * 3 * 16 * 16
    assert "sinks in 2 layers: 64 neurons beside 24 general ones, 16 open per document" in str(added)


@pytest.mark.parametrize("routing", ["blocks", "exact", "bernoulli"])
def test_adding_changes_no_output_open_or_closed(routing):
    model, input_ids = tiny_llama(torch.float32).eval(), tokens(2, 5)
    want = closed_logits(model, input_ids)
    add_sinks(model, SinkConfig(neurons=64, active=16, routing=routing, block_size=8 if routing == "blocks" else 1))
    assert torch.equal(closed_logits(model, input_ids), want)
    assert torch.equal(open_logits(model, input_ids, A), want)


def test_global_random_states_stay():
    model = tiny_llama()
    torch.manual_seed(7), np.random.seed(7), random.seed(7)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    add_sinks(model, CONFIG)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (np.random.get_state()[1].tolist(), random.getstate()) == states[1:]


def test_start_values_come_from_the_seed_and_the_layer():
    def ups(seed: int) -> list[torch.Tensor]:
        model = tiny_llama()
        add_sinks(model, SinkConfig(neurons=64, active=16, block_size=8, seed=seed))
        hosts = [layer.mlp for layer in model.model.layers]
        return [mlp.sinks.up.detach() / mlp.up_proj.weight.detach().std() for mlp in hosts]

    first, again, other = ups(0), ups(0), ups(1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for one in (first[1], other[0]):
        assert (first[0] - one).abs().max() > 0.1


@pytest.mark.parametrize(
    ("given", "scale"),
    [
        ({}, 3),
        ({"open_from": 1}, 1),
        ({"shared_decay": 0.5}, 1),
        ({"start_scale": 0.5}, 0.5),
        ({"reserved_blocks": 8}, 3),
    ],
)
def test_the_spread_of_the_start_values(given, scale):
    model = tiny_llama()
    add_sinks(model, SinkConfig(neurons=64, active=16, block_size=8, **given))
    for layer in model.model.layers:
        for part in (layer.mlp.sinks.up, layer.mlp.sinks.gate):
            spread = float(part.detach().std() / layer.mlp.up_proj.weight.detach().std())
            assert 0.9 * scale < spread < 1.1 * scale
        assert not layer.mlp.sinks.down.any()


def test_parameter_names():
    names = {name for name, _ in sink_llama().named_parameters()}
    stock = {name for name, _ in tiny_llama().named_parameters()}
    sinks = {f"model.layers.{layer}.mlp.sinks.{part}" for layer in (0, 1) for part in ("up", "gate", "down")}
    assert names == stock | sinks


def test_only_the_chosen_layers_get_sinks():
    model = tiny_llama(num_hidden_layers=3)
    added = add_sinks(model, SinkConfig(neurons=64, active=16, block_size=8, layers=(2, 0)))
    fill_sinks(model)
    assert added.layers == (0, 2)
    assert [hasattr(layer.mlp, "sinks") for layer in model.model.layers] == [True, False, True]
    model(**batch()).loss.backward()
    for layer in (0, 2):
        moved = model.model.layers[layer].mlp.sinks.down.grad.flatten(1).ne(0).any(1)
        assert torch.equal(moved, open_mask(torch.tensor([A, B]), model.sink_state.config, layer).any(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_sinks_have_the_dtype_of_their_host_but_float32_beside_16_bits(dtype):
    model = sink_llama(dtype)
    own = torch.promote_types(dtype, torch.float32)
    assert {x.dtype for x in sink_parameters(model)} == {own}
    out = model(**batch())
    assert out.logits.dtype == dtype
    out.loss.backward()
    assert {x.grad.dtype for x in sink_parameters(model)} == {own}
    assert {x.grad.dtype for x in shared_parameters(model)} == {dtype}


def test_training_mode_is_kept():
    model = tiny_llama().eval()
    add_sinks(model, CONFIG)
    assert not any(module.training for module in model.modules())


REFUSED = {
    "layer out of range": (
        lambda: (tiny_llama(), {"layers": (0, 2)}),
        ConfigError,
        "layer 2, the model has layers 0 to 1",
    ),
    "host width": (
        lambda: (tiny_llama(), {"intermediate_size": 32}),
        ConfigError,
        r"MLPs 32 wide, the model's are \[24\]",
    ),
    "twice": (lambda: (sink_llama(), {}), ArchitectureError, "LlamaForCausalLM has sinks already"),
    "no language model": (lambda: (tiny_llama().model, {}), ArchitectureError, "LlamaModel has no output embedding"),
    "plain torch": (lambda: (nn.Linear(2, 2), {}), ArchitectureError, "Linear is not a Hugging Face PreTrainedModel"),
    "DataParallel": (lambda: (nn.DataParallel(tiny_llama()), {}), ArchitectureError, "wrapped in DataParallel"),
    "compiled": (lambda: (torch.compile(tiny_llama()), {}), ArchitectureError, "compiled already; add sinks first"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_carry_sinks_is_refused_unchanged(name):
    make, error, message = REFUSED[name]
    model, changes = make()
    before = [(name, type(module)) for name, module in model.named_modules()]
    with pytest.raises(error, match=message):
        add_sinks(model, SinkConfig(**({"neurons": 64, "active": 16, "block_size": 8} | changes)))
    assert [(name, type(module)) for name, module in model.named_modules()] == before


@pytest.mark.parametrize("part", ["model", "layer"])
def test_compiled_in_place_is_refused(part):
    model = tiny_llama()
    (model if part == "model" else model.model.layers[1]).compile()
    with pytest.raises(ArchitectureError, match="compiled already; add sinks first, then compile"):
        add_sinks(model, CONFIG)


def test_fitting_intermediate_size_is_accepted():
    model = tiny_llama()
    assert (
        add_sinks(model, SinkConfig(neurons=64, active=16, block_size=8, intermediate_size=24)).intermediate_size == 24
    )


# Training input


def test_a_training_step_gives_every_parameter_a_gradient():
    model = sink_llama(torch.float32)
    model(**batch()).loss.backward()
    assert all(grad.isfinite().all() for grad in gradients(model).values())


def test_ids_of_rows_equal_ids_of_tokens():
    model = sink_llama()
    by_row = model(**batch())
    by_token = model(**batch(document_ids=torch.tensor([[A] * 5, [B] * 5]), exposures=torch.full((2, 5), 2)))
    assert torch.equal(by_row.logits, by_token.logits)
    other = model(**batch(document_ids=torch.tensor([A, A])))
    assert torch.equal(by_row.logits[0], other.logits[0])
    assert not torch.equal(by_row.logits[1], other.logits[1])


def test_exposures_open_the_sinks():
    model = sink_llama()
    closed = closed_logits(model.eval(), batch()["input_ids"])
    logits = model.train()(**batch(exposures=torch.tensor([1, 2]))).logits
    torch.testing.assert_close(logits[0], closed[0], rtol=0, atol=1e-12)
    assert (logits[1] - closed[1]).abs().max() > 0.01
    torch.testing.assert_close(logits[1], open_logits(model.eval(), batch()["input_ids"], B)[1], rtol=0, atol=1e-12)


def test_positional_input_and_embeddings_are_taken():
    model, given = sink_llama(), batch()
    want = model(**given).logits
    input_ids = given.pop("input_ids")
    assert torch.equal(model(input_ids, **given).logits, want)
    assert torch.equal(model(inputs_embeds=model.get_input_embeddings()(input_ids), **given).logits, want)


BAD_INPUT = {
    "no ids": ({"document_ids": None}, "trained with document_ids, but none were given"),
    "no exposures": ({"exposures": None}, "trained with exposures, but none were given"),
    "float ids": ({"document_ids": torch.tensor([11.0, 22.0])}, "document_ids must be int64, got torch.float32"),
    "int32 ids": (
        {"document_ids": torch.tensor([11, 22], dtype=torch.int32)},
        "document_ids must be int64, got torch.int32",
    ),
    "list ids": ({"document_ids": [11, 22]}, "document_ids must be an int64 tensor, got list"),
    "negative ids": ({"document_ids": torch.tensor([11, -2])}, "exactly -1 for no sinks; the least value is -2"),
    "too few ids": ({"document_ids": torch.tensor([11])}, r"document_ids must have shape \[2\] or \[2, 5\], got \[1\]"),
    "ids of another length": ({"document_ids": torch.full((2, 4), 11)}, r"\[2\] or \[2, 5\], got \[2, 4\]"),
    "ids of three dimensions": ({"document_ids": torch.full((2, 5, 1), 11)}, r"got \[2, 5, 1\]"),
    "exposure zero": ({"exposures": torch.tensor([1, 0])}, "exposures must be at least 1; the least value is 0"),
    "exposure dtype": ({"exposures": torch.tensor([1.0, 2.0])}, "exposures must be int64, got torch.float32"),
    "exposure shape": ({"exposures": torch.ones(5, dtype=torch.int64)}, r"exposures must have shape \[2\] or \[2, 5\]"),
    "no tokens": ({"input_ids": None}, "give the model input_ids or inputs_embeds"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_training_input_is_refused(name):
    changes, message = BAD_INPUT[name]
    with pytest.raises(DataError, match=message):
        sink_llama()(**batch(**changes))


PACKED = {
    "document_ids": torch.tensor([[A, A, A, B, B], [B, B, B, -1, -1]]),
    "exposures": torch.tensor([[2, 2, 2, 2, 2], [2, 2, 2, 1, 1]]),
    "position_ids": torch.tensor([[0, 1, 2, 0, 1], [0, 1, 2, 0, 1]]),
}


def test_packed_documents_do_not_see_each_other():
    model, given = sink_llama(), batch(**PACKED)
    before = model(**given).logits
    given["input_ids"] = given["input_ids"].clone()
    given["input_ids"][0, :3] = (given["input_ids"][0, :3] + 1) % VOCABULARY
    after = model(**given).logits
    torch.testing.assert_close(before[0, 3:], after[0, 3:], rtol=0, atol=1e-12)
    assert not torch.allclose(before[0, :3], after[0, :3])


def test_packed_rows_without_position_ids_are_refused():
    with pytest.raises(DataError, match="rows hold several documents but position_ids is missing"):
        sink_llama()(**batch(**(PACKED | {"position_ids": None})))


def test_packed_rows_with_attention_mask_are_refused():
    with pytest.raises(DataError, match="attention_mask is set, which switches off their isolation"):
        sink_llama()(**batch(**PACKED, attention_mask=torch.ones(2, 5, dtype=torch.int64)))


def test_padded_rows_of_one_document_may_have_an_attention_mask():
    ids = torch.tensor([[A, A, A, -1, -1], [B] * 5])
    given = batch(document_ids=ids, attention_mask=(ids >= 0).long(), labels=tokens(2, 5).masked_fill(ids < 0, IGNORED))
    assert sink_llama()(**given).loss.isfinite()


# Evaluation


def test_in_evaluation_ids_are_ignored_and_sinks_closed():
    model, stock, input_ids = sink_llama(), tiny_llama().eval(), tokens(2, 4)
    model(**batch())
    model.eval()
    want = closed_logits(stock, input_ids)
    assert torch.equal(closed_logits(model, input_ids), want)
    for ids in (torch.tensor([A, B]), torch.tensor([-5.0])):
        with torch.no_grad():
            out = model(input_ids=input_ids, document_ids=ids, exposures=ids)
        assert torch.equal(out.logits, want)


def assigned(model: nn.Module, ids: list[int]) -> int:
    """Give an unused id the union of the blocks of `ids` (all layers share one set) and return it."""
    union = open_mask(torch.tensor(ids), model.sink_state.config, 0).any(0).nonzero()[:, 0].tolist()
    assign_blocks(model, {999: union})
    return 999


@pytest.fixture(params=[torch.float64, torch.float32], ids=["masked", "grouped"])
def model(request) -> LlamaForCausalLM:
    return sink_llama(request.param, per_layer=False).eval()


INPUT = tokens(2, 5)


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.allclose(one, other, rtol=0, atol=1e-12 if one.dtype == torch.float64 else 1e-5)


def test_opened_sinks_change_the_output(model):
    a, b, closed = open_logits(model, INPUT, A), open_logits(model, INPUT, B), closed_logits(model, INPUT)
    assert not same(a, closed)
    assert not same(b, closed)
    assert not same(a, b)


def test_open_for_an_id(model):
    want = open_logits(model, INPUT, A)
    for form in (
        [A],
        {A},
        (A, A),
        torch.tensor(A),
        torch.tensor([A, A]),
        torch.full((2, 5), A),
        [[A], [A]],
        [{A}, [A, -1]],
    ):
        assert same(open_logits(model, INPUT, form), want), form


def test_open_for_a_list_is_the_union(model):
    assert not same(open_logits(model, INPUT, [A, B]), open_logits(model, INPUT, A))
    both = [open_logits(model, INPUT, form) for form in ([A, B], {B, A}, (A, B, A), [A, B, -1])]
    want = open_logits(model, INPUT, assigned(model, [A, B]))
    assert all(same(got, want) for got in both)


def test_open_for_each_row(model):
    got = open_logits(model, INPUT, torch.tensor([A, B]))
    assert same(got[0], open_logits(model, INPUT, A)[0])
    assert same(got[1], open_logits(model, INPUT, B)[1])


def test_open_for_a_set_in_each_row(model):
    got = open_logits(model, INPUT, [{A, B}, {B}])
    assert same(got[0], open_logits(model, INPUT, [A, B])[0])
    assert same(got[1], open_logits(model, INPUT, B)[1])
    got = open_logits(model, INPUT, [[], [A]])
    assert same(got[0], closed_logits(model, INPUT)[0])
    assert same(got[1], open_logits(model, INPUT, A)[1])


def test_open_for_each_token(model):
    got = open_logits(model, INPUT, torch.tensor([[A, A, B, B, B], [-1, -1, -1, A, A]]))
    assert same(got[0, :2], open_logits(model, INPUT, A)[0, :2])
    assert not same(got[0, 2:], open_logits(model, INPUT, A)[0, 2:])
    assert same(got[1, :3], closed_logits(model, INPUT)[1, :3])
    assert not same(got[1, 3:], closed_logits(model, INPUT)[1, 3:])


def test_open_for_nothing_is_closed(model):
    assert same(open_logits(model, INPUT, -1), closed_logits(model, INPUT))


LONG = torch.tensor([[A] * 6 + [B] * 5, [-1] * 7 + [A] * 4])


@pytest.mark.parametrize(
    "ids", [A, torch.tensor([A, B]), torch.tensor([[A] * 5, [A, A, B, B, B]]), LONG, [{A, B}, {B}]]
)
def test_generation_with_cache_equals_without(model, ids):
    with sinks_open(model, ids), torch.no_grad():
        cached, uncached = (
            model.generate(INPUT, max_new_tokens=6, do_sample=False, use_cache=x) for x in (True, False)
        )
    assert torch.equal(cached, uncached)
    assert cached.shape == (2, 11)
    assert not torch.equal(cached, model.generate(INPUT, max_new_tokens=6, do_sample=False))


def test_open_is_undone_at_the_end_also_after_an_error(model):
    closed = closed_logits(model, INPUT)
    want = open_logits(model, INPUT, A)
    with sinks_open(model, A):
        with sinks_open(model, B):
            pass
        assert torch.equal(closed_logits(model, INPUT), want)
        with sinks_closed(model):
            assert torch.equal(closed_logits(model, INPUT), closed)
        assert torch.equal(closed_logits(model, INPUT), want)
    assert torch.equal(closed_logits(model, INPUT), closed)
    with pytest.raises(ZeroDivisionError), sinks_open(model, A), sinks_closed(model, "released"):
        1 / 0  # noqa: B018
    assert torch.equal(closed_logits(model, INPUT), closed)


BAD_OPEN = {
    "negative": (-2, "exactly -1"),
    "negative in a set": ([[A], [-3]], "exactly -1"),
    "float tensor": (torch.tensor([1.0, 2.0]), "must be int64"),
    "three dimensions": (torch.full((2, 5, 1), A), r"shape \[B\] or \[B, T\], got \[2, 5, 1\]"),
    "empty": ([], "at least one id"),
    "none": (None, "at least one id"),
    "bool": (True, "got True"),
    "too large": (2**63, r"from 0 to 2\*\*63 - 1"),
    "rows": (torch.tensor([A, B, A]), "ids for 3 rows, the input has 2"),
    "sets": ([[A], [B], [A]], "ids for 3 rows, the input has 2"),
}


@pytest.mark.parametrize("name", BAD_OPEN)
def test_bad_ids_to_open_are_refused(name):
    ids, message = BAD_OPEN[name]
    with pytest.raises(DataError, match=message):
        open_logits(sink_llama().eval(), INPUT, ids)


@pytest.mark.parametrize(
    "form", [np.int64, lambda x: [np.int64(x)], lambda x: np.array([x, x]), lambda x: [{np.int64(x)}]]
)
def test_ids_as_identify_returns_them_open_sinks(form):
    model = sink_llama().eval()
    assert torch.equal(open_logits(model, INPUT, form(A)), open_logits(model, INPUT, A))


def test_an_id_per_row_serves_all_beams_of_the_row():
    model = sink_llama().eval()
    each = []
    for row, one in enumerate((A, B)):
        with sinks_open(model, one):
            each.append(model.generate(INPUT[row : row + 1], num_beams=3, max_new_tokens=4, do_sample=False))
    with sinks_open(model, torch.tensor([A, B])):
        both = model.generate(INPUT, num_beams=3, max_new_tokens=4, do_sample=False)
    assert torch.equal(both, torch.cat(each))


def test_ids_for_fewer_rows_are_refused_outside_of_generation():
    with pytest.raises(DataError, match="ids for 2 rows, the input has 4"):
        open_logits(sink_llama().eval(), INPUT.repeat_interleave(2, 0), torch.tensor([A, B]))


def test_packed_rows_do_not_leak_in_evaluation():
    model = sink_llama().eval()
    other = INPUT.clone()
    half = INPUT.shape[1] // 2
    other[:, :half] = (other[:, :half] + 1) % VOCABULARY
    positions = torch.cat([torch.arange(half), torch.arange(INPUT.shape[1] - half)])[None].expand(2, -1)
    with torch.no_grad():
        first, second = (model(input_ids=x, position_ids=positions).logits[:, half:] for x in (INPUT, other))
    assert torch.equal(first, second)


def test_a_module_with_a_forward_of_its_own_is_refused():
    """device_map over several devices and compiled forwards sit on the instance and would bypass the sinks."""
    model = tiny_llama()
    model.model.layers[0].forward = model.model.layers[0].forward
    with pytest.raises(ArchitectureError, match="forward of its own"):
        add_sinks(model, SinkConfig(neurons=64, active=16, block_size=8))


def test_a_layer_that_hides_its_mlp_is_refused_when_it_runs():
    class Hiding(LlamaDecoderLayer):
        def feed(self, x):
            return self.mlp(x)

        def forward(self, hidden_states, **kwargs):
            return hidden_states + self.feed(hidden_states)

    model = tiny_llama()
    for layer in model.model.layers:
        layer.__class__ = Hiding
    add_sinks(model, SinkConfig(neurons=64, active=16, block_size=8))
    with pytest.raises(ArchitectureError, match="does not call its MLP from its own forward"):
        open_logits(model.eval(), INPUT, A)


def test_replicas_of_data_parallel_are_refused():
    model = sink_llama()
    model._is_replica = True
    with pytest.raises(ArchitectureError, match="DataParallel is not supported"):
        model(input_ids=INPUT, document_ids=torch.tensor([A, B]), exposures=torch.tensor([1, 2]))


def test_wrappers_are_looked_through():
    model = sink_llama()
    compiled = torch.compile(model, backend="eager")
    assert has_sinks(compiled)
    assert require_sinks(compiled) is model.sink_state
    with pytest.raises(ArchitectureError, match="wrapped in OptimizedModule"):
        remove_sinks(compiled)


def test_closing_is_refused_in_training_mode():
    with pytest.raises(ConfigError, match="training mode"), sinks_closed(sink_llama().train()):
        pass


def test_copies_side_by_side_need_position_ids():
    """Same id, another exposure: another copy, which must not be seen."""
    model = sink_llama().train()
    length = INPUT.shape[1]
    exposures = torch.ones(2, length, dtype=torch.int64)
    exposures[:, length // 2 :] = 2
    ids = torch.full((2, length), A)
    with pytest.raises(DataError, match="position_ids is missing"):
        model(input_ids=INPUT, labels=INPUT, document_ids=ids, exposures=exposures)


@pytest.mark.parametrize("rescale", ["none", "expected", "released"])
def test_closing_with_rescale_scales_the_general_neurons(rescale):
    model, stock = sink_llama().eval(), tiny_llama().eval()
    factor = {"none": 1.0, "expected": (24 + 16) / 24, "released": (24 / 88 + 16 / 64) / (24 / 88)}[rescale]
    assert rescale_factor(model.sink_state, rescale) == pytest.approx(factor)
    with torch.no_grad():
        for layer in stock.model.layers:
            layer.mlp.down_proj.weight *= factor
    with sinks_closed(model, rescale):
        got = closed_logits(model, INPUT)
    torch.testing.assert_close(got, closed_logits(stock, INPUT), rtol=0, atol=1e-6)
    assert torch.equal(closed_logits(model, INPUT), closed_logits(tiny_llama().eval(), INPUT))


def test_rescale_touches_only_layers_with_sinks():
    model = sink_llama(layers=(1,))
    assert down_modules(model) == [model.model.layers[1].mlp.down_proj]


def test_unknown_rescale_is_refused():
    with (
        pytest.raises(ConfigError, match=r"rescale must be one of .* got 'half'"),
        sinks_closed(sink_llama().eval(), "half"),
    ):
        pass


# Taking out, copying, loading


def test_removal_gives_the_stock_model_back():
    model, stock = sink_llama(), tiny_llama()
    assert has_sinks(model)
    assert not has_sinks(stock)
    assert remove_sinks(model) is model
    assert not has_sinks(model)
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in stock.named_modules()]
    assert all(torch.equal(value, stock.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(closed_logits(model.eval(), INPUT), closed_logits(stock.eval(), INPUT))
    assert not [name for module in model.modules() for name in vars(module) if name.startswith("sink")]
    with pytest.raises(ArchitectureError, match="LlamaForCausalLM has no sinks; add them"):
        remove_sinks(model)
    add_sinks(model, CONFIG)
    assert has_sinks(model)


@pytest.mark.parametrize(
    "use", [lambda m: sinks_open(m, A).__enter__(), lambda m: sinks_closed(m).__enter__(), require_sinks]
)
def test_models_without_sinks_are_refused_by_name(use):
    with pytest.raises(ArchitectureError, match="LlamaForCausalLM has no sinks"):
        use(tiny_llama())


def test_class_keeps_its_name():
    model = sink_llama()
    assert isinstance(model, LlamaForCausalLM)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert type(model.model.layers[0].mlp).__name__ == "LlamaMLP"


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"]
)
def test_a_copy_is_whole_and_independent(duplicate):
    model = sink_llama().eval()
    twin = duplicate(model)
    want, closed = open_logits(model, INPUT, A), closed_logits(model, INPUT)
    assert torch.equal(open_logits(twin, INPUT, A), want)
    with sinks_open(twin, A):
        assert torch.equal(closed_logits(model, INPUT), closed)
    remove_sinks(twin)
    assert has_sinks(model)
    assert torch.equal(open_logits(model, INPUT, A), want)


def test_state_dict_goes_into_another_model():
    source, target = sink_llama(), tiny_llama()
    add_sinks(target, CONFIG)
    target.load_state_dict(source.state_dict())
    assert torch.equal(open_logits(source.eval(), INPUT, A), open_logits(target.eval(), INPUT, A))


def test_state_dict_without_sinks_needs_strict_false_and_then_training_raises():
    model, stock = sink_llama(), tiny_llama()
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(stock.state_dict())
    model.load_state_dict(stock.state_dict(), strict=False)
    with pytest.raises(CheckpointError, match="a state dict without sinks was loaded into this model"):
        model(**batch())
    assert closed_logits(model.eval(), INPUT).isfinite().all()
    model.train().load_state_dict(sink_llama().state_dict())
    assert model(**batch()).loss.isfinite()


def test_state_dict_with_some_sinks_is_refused():
    model = sink_llama()
    partial = {name: value for name, value in model.state_dict().items() if "0.mlp.sinks.up" not in name}
    with pytest.raises(CheckpointError, match=r"lacks \['model.layers.0.mlp.sinks.up'\] \(1 in all\)"):
        model.load_state_dict(partial, strict=False)
