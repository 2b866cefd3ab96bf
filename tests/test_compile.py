"""What torch.compile can do with a model that has sinks: this file is the support table.

| | full graph | with gradient checkpointing |
|---|---|---|
| training, any routing, packed or not | yes | yes |
| evaluation, sinks closed or open | yes | - |
| exact mode, ``shared="none"`` | no: refused; without `fullgraph` it runs eagerly | no |
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from families import SINKS, some_tokens, tiny, with_sinks
from torch import Tensor, nn

from memsinks.sinks.config import SinkConfig
from memsinks.sinks.opening import sinks_open

ROUTINGS = {
    "bernoulli": SinkConfig(neurons=64, active=16, routing="bernoulli", per_layer=False, shared="decay"),
    "exact": SinkConfig(neurons=64, active=16, routing="exact", shared="decay"),
    "masked blocks": SinkConfig(neurons=64, active=32, block_size=16, shared="decay"),
    "no decay": dataclasses.replace(SINKS, shared_decay=0.0),
}
PACKED = {
    "position_ids": torch.tensor([[*range(5), *range(7)], [*range(12)], [*range(12)]]),
    "document_ids": torch.tensor([[5] * 5 + [9] * 7, [11] * 12, [-1] * 4 + [5] * 8]),
    "exposures": torch.tensor([[1] * 5 + [3] * 7, [2] * 12, [1] * 4 + [8] * 8]),
}
PLAIN = {"document_ids": torch.tensor([5, 6, 7]), "exposures": torch.tensor([1, 2, 5])}
ARCHITECTURES = {"llama": PLAIN, "gpt2": PLAIN, "gemma3": PACKED, "gpt_neox": PACKED}
SOME_LONG = [pytest.param(x, marks=pytest.mark.long) if x != "bernoulli" else x for x in ROUTINGS]

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def loss_of(logits: Tensor, tokens: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def gradients(
    model: nn.Module, call: Callable[..., Any], inputs: list[dict[str, Tensor]], stock_loss: bool = False
) -> list[Tensor]:
    """Of one backward after as many forwards as `inputs`."""
    model.zero_grad()
    losses = []
    for seed, more in enumerate(inputs):
        tokens = some_tokens(seed=seed)
        if stock_loss:
            losses.append(call(input_ids=tokens, labels=tokens, **more).loss)
        else:
            losses.append(loss_of(call(input_ids=tokens, **more).logits, tokens))
    sum(losses).backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def other(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same inputs with other documents."""
    ids = inputs["document_ids"]
    return inputs | {"document_ids": torch.where(ids == -1, ids, ids + 40), "exposures": inputs["exposures"].flip(0)}


def same(got: list[Tensor], want: list[Tensor]) -> None:
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


def check_training(
    model: nn.Module, inputs: dict[str, Tensor], *, checkpointing: bool = False, stock_loss: bool = False,
    backend: str = "aot_eager",
) -> None:  # fmt: skip
    """Compiled gradients equal the eager ones, for two forwards before one backward, without compiling twice."""
    model.train()
    both = [inputs, other(inputs)]
    want = gradients(model, model, both, stock_loss)
    assert all(x.abs().max() > 0 for x in want)
    if checkpointing:
        model.gradient_checkpointing_enable()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    gradients(model, compiled, [inputs], stock_loss)
    with torch.compiler.set_stance("fail_on_recompile"):
        same(gradients(model, compiled, both, stock_loss), want)


@pytest.mark.parametrize(
    "checkpointing", [pytest.param(False, marks=pytest.mark.long), True], ids=["plain", "checkpointing"]
)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training(name: str, checkpointing: bool) -> None:
    check_training(
        with_sinks(name), ARCHITECTURES[name], checkpointing=checkpointing, stock_loss=name in ("llama", "gemma3")
    )  # fmt: skip


@pytest.mark.parametrize("name", SOME_LONG)
def test_training_with_other_routings(name: str) -> None:
    check_training(with_sinks("llama", ROUTINGS[name]), PLAIN)


@pytest.mark.parametrize("whose", ["stock", "with sinks"])
@pytest.mark.xfail(raises=torch._dynamo.exc.Unsupported, strict=True, reason="the stock GPT-2 loss logs a warning")
def test_the_loss_inside_gpt2_does_not_trace(whose: str) -> None:
    model = tiny("gpt2") if whose == "stock" else with_sinks("gpt2")
    compiled = torch.compile(model.train(), backend="aot_eager", fullgraph=True)
    tokens = some_tokens()
    compiled(input_ids=tokens, labels=tokens, use_cache=False, **({} if whose == "stock" else PLAIN))


def test_exact_mode_refuses_a_full_graph_and_runs_eagerly_otherwise() -> None:
    model = with_sinks("llama", dataclasses.replace(SINKS, shared="none")).train()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="exact mode.*cannot be compiled"):
        torch.compile(model, backend="aot_eager", fullgraph=True)(input_ids=some_tokens(), **PLAIN)
    want = gradients(model, model, [PLAIN])
    same(gradients(model, torch.compile(model, backend="aot_eager"), [PLAIN]), want)


@torch.no_grad()
def check_evaluation(name: str, opened: list[Any], backend: str = "aot_eager") -> None:
    """Compiled logits equal the eager ones, closed, open for each of `opened`, and closed again."""
    model, tokens = with_sinks(name), some_tokens()

    def run(call: Callable[..., Any]) -> list[Tensor]:
        outs = [call(input_ids=tokens, use_cache=False).logits]
        for ids in opened:
            with sinks_open(model, ids):
                outs.append(call(input_ids=tokens, use_cache=False).logits)
        return [*outs, call(input_ids=tokens, use_cache=False).logits]

    want = run(model)
    assert torch.equal(want[0], want[-1])
    assert all((x - want[0]).abs().max() > 1e-2 for x in want[1:-1])
    same(run(torch.compile(model, backend=backend, fullgraph=True)), want)


def test_evaluation() -> None:
    check_evaluation("llama", [torch.tensor([5, 6, 7])])


@pytest.mark.long
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_evaluation_with_all_forms_of_ids(name: str, backend: str) -> None:
    check_evaluation(name, [torch.tensor([5, 6, 7]), PACKED["document_ids"], 8, [5, 6], [[5, 6], [7], [-1]]], backend)


@torch.no_grad()
def test_other_ids_do_not_compile_again() -> None:
    model, tokens = with_sinks("llama"), some_tokens()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with sinks_open(model, torch.tensor([1, 2, 3])):
        compiled(input_ids=tokens, use_cache=False)
    with torch.compiler.set_stance("fail_on_recompile"), sinks_open(model, torch.tensor([5, 6, 7])):
        got = compiled(input_ids=tokens, use_cache=False).logits
        torch.testing.assert_close(got, model(input_ids=tokens).logits)


@pytest.mark.long
@torch.no_grad()
def test_decoding_with_a_compiled_forward() -> None:
    model, prompt = with_sinks("llama"), some_tokens(2, 5)
    settings = {"do_sample": False, "max_new_tokens": 4, "attention_mask": torch.ones_like(prompt), "pad_token_id": 0}
    with sinks_open(model, torch.tensor([5, 6])):
        want = model.generate(prompt, **settings)
        model.forward = torch.compile(model.forward, backend="aot_eager")
        assert torch.equal(model.generate(prompt, **settings), want)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_training_in_bf16(checkpointing: bool) -> None:
    model = with_sinks("llama").to(torch.bfloat16).train()
    want = gradients(model, model, [PLAIN])
    if checkpointing:
        model.gradient_checkpointing_enable()
    got = gradients(model, torch.compile(model, backend="aot_eager", fullgraph=True), [PLAIN])
    for x, y in zip(got, want, strict=True):
        assert x.dtype == torch.bfloat16
        assert (x - y).norm() <= 0.02 * y.norm()


def test_lengths_do_not_compile_again_and_again() -> None:
    """The second length makes the sizes symbolic; every later one reuses that."""
    model = with_sinks("llama").train()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)

    def step(call: Callable[..., Any], length: int) -> list[Tensor]:
        model.zero_grad()
        tokens = some_tokens(3, length)
        loss_of(call(input_ids=tokens, **PLAIN).logits, tokens).backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    step(compiled, 8), step(compiled, 10)
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (7, 11, 12):
            same(step(compiled, length), step(model, length))


def test_layers_compiled_one_by_one() -> None:
    model = with_sinks("llama").train()
    inputs = [PLAIN, other(PLAIN)]
    want = gradients(model, model, inputs)
    for checkpointing in (False, True):
        torch.compiler.reset()
        if checkpointing:
            model.gradient_checkpointing_enable()
        for layer in model.model.layers:
            layer.compile(backend="aot_eager", fullgraph=True)
        same(gradients(model, model, inputs), want)


def test_training_with_inductor() -> None:
    check_training(with_sinks("llama"), PLAIN, backend="inductor")


@pytest.mark.long
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_training_with_inductor_and_checkpointing(name: str) -> None:
    check_training(with_sinks(name), ARCHITECTURES[name], checkpointing=True, backend="inductor")


@pytest.mark.long
@pytest.mark.parametrize("name", ROUTINGS)
def test_training_with_other_routings_and_inductor(name: str) -> None:
    check_training(with_sinks("llama", ROUTINGS[name]), PACKED, backend="inductor")
