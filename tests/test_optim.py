"""Groups, clipping, and an AdamW under which closed sinks stand still."""

from __future__ import annotations

import copy
import io
import itertools
import math
import warnings

import pytest
import torch
from tiny import gradients, sink_llama, tiny_llama, tokens
from torch import nn

from memsinks.errors import ArchitectureError, ConfigError
from memsinks.sinks.state import is_sink, shared_parameters, sink_parameters
from memsinks.sinks.table import open_mask
from memsinks.training.optim import AdamW, clip_grad_norm_, param_groups

A, B = 11, 22


def train(
    model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, document: int, exposure: int = 2
) -> list[float]:
    """Train on one fixed row of a document; the losses."""
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        input_ids = tokens(1, 6, seed=document)
        given = {"document_ids": torch.tensor([document]), "exposures": torch.tensor([exposure])}
        loss = model(input_ids=input_ids, labels=input_ids, **given).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def sinks_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if is_sink(name)}


def moments_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [value.clone() for x in sink_parameters(model) for value in optimizer.state[x].values()]


def is_open(model: nn.Module, document: int) -> list[torch.Tensor]:
    """For each sink parameter, bool [blocks]."""
    masks = [open_mask(torch.tensor([document]), model.sink_state.config, layer)[0] for layer in (0, 1)]
    return [masks[int(name.split(".")[2])] for name, _ in model.named_parameters() if is_sink(name)]


# Groups


def test_groups_hold_every_trainable_parameter_once():
    model = sink_llama()
    decay, no_decay, sinks = groups = param_groups(model, lr=0.01, weight_decay=0.1, sink_lr_factor=3)
    assert [group["name"] for group in groups] == ["decay", "no decay", "sinks"]
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    members = [sorted(names[id(x)] for x in group["params"]) for group in groups]
    assert sorted(itertools.chain(*members)) == sorted(names.values())
    assert members[1] == sorted(name for name in names.values() if "norm" in name)
    assert members[2] == sorted(name for name in names.values() if ".mlp.sinks." in name)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0]
    assert [group["lr"] for group in groups] == [0.01, 0.01, pytest.approx(0.03)]
    assert sinks["lazy"]
    assert not decay.get("lazy")
    assert not no_decay.get("lazy")


def test_defaults_of_the_groups():
    groups = param_groups(sink_llama(), lr=0.01)
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.01, 0.0), (0.01, 0.0), (0.03, 0.0)]


def test_frozen_parameters_stay_out_and_empty_groups_vanish():
    model = sink_llama()
    model.model.layers[0].mlp.sinks.up.requires_grad_(False)
    model.model.embed_tokens.weight.requires_grad_(False)
    members = {id(x) for group in param_groups(model, lr=0.01) for x in group["params"]}
    assert members == {id(x) for x in model.parameters() if x.requires_grad}
    for parameter in shared_parameters(model):
        parameter.requires_grad_(False)
    assert [group["name"] for group in param_groups(model, lr=0.01)] == ["sinks"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0}, "lr must be positive and finite, got 0"),
        ({"lr": -1e-3}, "lr must be positive and finite, got -0.001"),
        ({"lr": float("nan")}, "lr must be positive and finite, got nan"),
        ({"lr": float("inf")}, "lr must be positive and finite, got inf"),
        ({"sink_lr_factor": 0}, "sink_lr_factor must be positive and finite, got 0"),
        ({"weight_decay": -0.1}, "weight_decay must be a finite number of at least 0, got -0.1"),
        ({"weight_decay": float("nan")}, "weight_decay must be a finite number of at least 0, got nan"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        param_groups(sink_llama(), **({"lr": 0.01} | changes))


def test_shared_weights_of_16_bits_are_warned_of_and_their_sinks_learn_in_32():
    model = sink_llama(torch.bfloat16)
    with pytest.warns(UserWarning, match=r"are bfloat16.*dtype=torch\.float32"):
        groups = param_groups(model, lr=1e-5)
    optimizer = AdamW(groups)
    before = [parameter.detach().clone() for parameter in sink_parameters(model)]
    rows = tokens(2, 5)
    marks = {"document_ids": torch.tensor([3, 4]), "exposures": torch.tensor([2, 2])}
    model(input_ids=rows, labels=rows, **marks).loss.backward()
    optimizer.step()
    for parameter, value in zip(sink_parameters(model), before, strict=True):
        assert parameter.dtype == optimizer.state[parameter]["exp_avg"].dtype == torch.float32
        assert not torch.equal(parameter, value)
    for parameter in shared_parameters(model):
        parameter.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        param_groups(model, lr=1e-5)  # frozen shared weights may have any precision


def test_models_without_sinks_are_refused():
    for use in (lambda model: param_groups(model, lr=0.01), lambda model: clip_grad_norm_(model, 1.0)):
        with pytest.raises(ArchitectureError, match="LlamaForCausalLM has no sinks"):
            use(tiny_llama())


# Clipping


def clipped(max_norm: float | None) -> tuple[nn.Module, dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """A model after clipping, its gradients before, and the norms that were reported."""
    model = sink_llama(shared_decay=0.0)
    input_ids = tokens(2, 6)
    given = {"document_ids": torch.tensor([A, B]), "exposures": torch.tensor([2, 2])}
    model(input_ids=input_ids, labels=input_ids, **given).loss.backward()
    before = gradients(model)
    return model, before, *clip_grad_norm_(model, max_norm)


def norm(grads: list[torch.Tensor]) -> float:
    return float(torch.cat([grad.flatten() for grad in grads]).norm())


@pytest.mark.parametrize("max_norm", [0, 0.0, -1.0, None, math.inf])
def test_clipping_can_be_off(max_norm):
    """Then norms are only measured; below 0 it never turns gradients round."""
    model, before, shared, sinks = clipped(max_norm)
    assert all(torch.equal(x.grad, before[name]) for name, x in model.named_parameters())
    assert float(shared) > 0 and float(sinks) > 0


def test_a_norm_that_is_nan_is_refused():
    with pytest.raises(ConfigError, match="nan; give a number, or 0"):
        clipped(math.nan)


def test_norms_are_reported_apart_and_clipped_apart():
    model, before, shared, sinks = clipped(1e-3)
    assert float(shared) == pytest.approx(norm([grad for name, grad in before.items() if not is_sink(name)]))
    assert float(sinks) == pytest.approx(norm([grad for name, grad in before.items() if is_sink(name)]))
    assert shared > 0.1
    assert sinks > 0.01
    for parameters in (shared_parameters(model), sink_parameters(model)):
        assert norm([x.grad for x in parameters]) == pytest.approx(1e-3, rel=1e-2)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad / parameter.grad.norm(), before[name] / before[name].norm())


def test_clipping_one_part_leaves_the_other_alone():
    _, _, shared, sinks = clipped(1e9)
    assert sinks < shared
    between = float(sinks + shared) / 2
    model, before, *_ = clipped(between)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.grad, before[name]) == is_sink(name)


# The lazy AdamW


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
@pytest.mark.parametrize(
    "settings", [{}, {"weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-4}], ids=["default", "other"]
)
def test_lazy_equals_torch_when_every_block_has_a_gradient(settings, dtype, tolerance):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(5, 3, 4, generator=generator, dtype=dtype)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    lazy = AdamW([{"params": [ours], "lazy": True}], lr=1e-2, **({"weight_decay": 0.0} | settings))
    stock = torch.optim.AdamW([theirs], lr=1e-2, **({"weight_decay": 0.0} | settings))
    for step in range(20):
        ours.grad = torch.randn(start.shape, generator=generator, dtype=dtype) * 10.0 ** (step % 5 - 3)
        theirs.grad = ours.grad.clone()
        lazy.param_groups[0]["lr"] = stock.param_groups[0]["lr"] = 1e-2 / (step + 1)
        lazy.step(), stock.step()
        assert float((ours - theirs).detach().abs().max()) <= tolerance
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(lazy.state[ours][name], stock.state[theirs][name])
    assert lazy.state[ours]["step"].tolist() == [20.0] * 5
    assert float((ours - start).detach().abs().max()) > 1e-2


def test_a_block_moves_as_if_only_its_own_steps_had_been():
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start[1:].clone())
    lazy = AdamW([{"params": [ours], "lazy": True}], lr=1e-2, weight_decay=0.1)
    stock = torch.optim.AdamW([theirs], lr=1e-2, weight_decay=0.1)
    for step in range(12):
        ours.grad = torch.randn(start.shape, generator=generator, dtype=torch.float64)
        if step % 4:
            ours.grad[1] = 0
        else:
            theirs.grad = ours.grad[1:].clone()
            stock.step()
        lazy.step()
        assert float((ours[1:] - theirs).detach().abs().max()) < 1e-12
    assert lazy.state[ours]["step"].tolist() == [12.0, 3.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["grouped", "masked"])
def test_closed_blocks_and_their_moments_stand_still_while_torch_moves_them(dtype):
    moved = {}
    for cls in (AdamW, torch.optim.AdamW):
        model = sink_llama(dtype)
        optimizer = cls(param_groups(model, lr=1e-2, weight_decay=0.1))
        train(model, optimizer, 3, A)
        sinks, moments = sinks_of(model), moments_of(model, optimizer)
        shared = model.model.embed_tokens.weight.detach().clone()
        train(model, optimizer, 20, B, exposure=1)
        assert not torch.equal(model.model.embed_tokens.weight, shared)
        after = sinks_of(model)
        moved[cls] = max(float((after[name] - sinks[name]).abs().max()) for name in sinks)
        same = [torch.equal(x, y) for x, y in zip(moments, moments_of(model, optimizer), strict=True)]
        assert all(same) if cls is AdamW else not any(same)
    assert moved[AdamW] == 0.0
    assert moved[torch.optim.AdamW] > 1e-2


def test_only_the_open_blocks_of_another_document_move():
    model = sink_llama(torch.float32)
    optimizer = AdamW(param_groups(model, lr=1e-2))
    train(model, optimizer, 3, A)
    before = sinks_of(model)
    states = [{name: value.clone() for name, value in optimizer.state[x].items()} for x in sink_parameters(model)]
    train(model, optimizer, 20, B)
    for (name, after), old, parameter, opens in zip(
        sinks_of(model).items(), states, sink_parameters(model), is_open(model, B), strict=True
    ):
        changed = (after != before[name]).flatten(1).any(1)
        assert torch.equal(changed, opens), name
        for key, value in optimizer.state[parameter].items():
            assert torch.equal((value != old[key]).reshape(len(opens), -1).any(1), opens), (name, key)


def test_shared_weights_are_updated_as_by_torch():
    ours, theirs = sink_llama(), sink_llama()
    train(ours, AdamW(param_groups(ours, lr=1e-2, weight_decay=0.1)), 5, A, exposure=1)
    train(theirs, torch.optim.AdamW(param_groups(theirs, lr=1e-2, weight_decay=0.1)), 5, A, exposure=1)
    for one, other in zip(shared_parameters(ours), shared_parameters(theirs), strict=True):
        assert torch.equal(one, other)


def test_gradients_are_still_there_after_a_step():
    model = sink_llama()
    optimizer = AdamW(param_groups(model, lr=1e-2))
    train(model, optimizer, 1, A)
    assert any(grad.ne(0).any() for name, grad in gradients(model).items() if is_sink(name))
    optimizer.zero_grad()
    before = sinks_of(model)
    optimizer.step()
    assert all(torch.equal(value, before[name]) for name, value in sinks_of(model).items())


def test_closure_and_schedule():
    weight = nn.Parameter(torch.ones(2, 3))
    optimizer = AdamW([{"params": [weight], "lazy": True}], lr=0.5, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = weight.sum()
        loss.backward()
        return loss

    sizes = []
    for _ in range(3):
        before = weight.detach().clone()
        assert float(optimizer.step(closure).detach()) == float(before.sum())
        schedule.step()
        sizes.append(float((before - weight.detach()).mean()))
    assert sizes == pytest.approx([0.5, 0.25, 0.125], rel=1e-4)


def test_step_hooks_run_once():
    parameters = [nn.Parameter(torch.ones(2, 3)) for _ in range(2)]
    torch.optim.AdamW(parameters).step()
    optimizer = AdamW([{"params": parameters[:1], "lazy": True}, {"params": parameters[1:]}], lr=0.1)
    calls: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    for parameter in parameters:
        parameter.grad = torch.ones(2, 3)
    optimizer.step()
    assert calls == ["before", "after"]
    assert all(parameter.detach().lt(0.95).all() for parameter in parameters)


@pytest.mark.parametrize("option", ["amsgrad", "maximize"])
def test_options_that_lazy_groups_lack_are_refused(option):
    weight = nn.Parameter(torch.ones(2, 3))
    optimizer = AdamW([{"params": [weight], "lazy": True}], lr=0.1, **{option: True})
    weight.grad = torch.ones(2, 3)
    with pytest.raises(ConfigError, match="neither amsgrad nor maximize"):
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_saved_state_resumes_bit_for_bit(dtype):
    model = sink_llama(dtype)
    optimizer = AdamW(param_groups(model, lr=1e-2, weight_decay=0.1, sink_lr_factor=3))
    train(model, optimizer, 3, A)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)

    resumed = sink_llama(dtype)
    other = AdamW(param_groups(resumed, lr=1.0))
    saved = torch.load(io.BytesIO(file.getvalue()))
    resumed.load_state_dict(saved["model"])
    other.load_state_dict(copy.deepcopy(saved["optimizer"]))
    assert [(group["name"], group.get("lazy")) for group in other.param_groups][2] == ("sinks", True)

    for document in (A, B, A):
        assert train(model, optimizer, 1, document) == train(resumed, other, 1, document)
    for (name, one), other_one in zip(model.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other_one), name
    for one, other_one in zip(moments_of(model, optimizer), moments_of(resumed, other), strict=True):
        assert one.dtype == other_one.dtype
        assert torch.equal(one, other_one)


@pytest.mark.parametrize("make", [
    lambda model: torch.optim.AdamW(model.parameters(), lr=1e-2),
    lambda model: torch.optim.AdamW(param_groups(model, lr=1e-2)),
    lambda model: AdamW(param_groups(model, lr=1e-2)),
    lambda model: AdamW(model.parameters(), lr=1e-2),
], ids=["plain torch", "torch on groups", "lazy", "ours without groups"])  # fmt: skip
def test_every_way_trains(make):
    model = sink_llama(torch.float32)
    before = sinks_of(model)
    losses = train(model, make(model), 30, A)
    assert losses[-1] < 0.2 * losses[0]
    assert any(not torch.equal(value, before[name]) for name, value in sinks_of(model).items())
