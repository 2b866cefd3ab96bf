"""Every supported architecture, on a tiny random model; and the unsupported ones, refused by name."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, SINKS, VOCABULARY, randomise_sinks, randomised, some_tokens, tiny, with_sinks
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BitNetConfig,
    BitNetForCausalLM,
    FalconConfig,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    XGLMConfig,
    XGLMForCausalLM,
)
from transformers.activations import ACT2FN

from memsinks.errors import ArchitectureError, DataError
from memsinks.sinks.attach import add_sinks, remove_sinks
from memsinks.sinks.families import ISOLATES_PACKED, decoder_layers
from memsinks.sinks.layer import Sinks
from memsinks.sinks.opening import sinks_closed, sinks_open
from memsinks.sinks.state import has_sinks, sink_parameters
from memsinks.sinks.table import open_mask

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")

LEAKY = ("bloom", "falcon", "mpt", "gpt_oss", "qwen2_vl")
OF_IMAGES = ("model.vision", "model.visual", "model.multi_modal")
IDS = torch.tensor([[5] * 5 + [9] * 7, [11] * 12, [-1] * 4 + [5] * 8])
"""Documents of `some_tokens`, [3, 12]: two in one row, one alone, one after text that opens nothing."""


@pytest.fixture(params=FAMILIES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def reference_sinks(name: str, x: Tensor, sinks: nn.Module, ids: Tensor, layer: int) -> Tensor:
    """sum over open blocks b of down_b^T (act(gate_b x) * (up_b x)), document by document and block by block."""
    act, gated = ACT2FN[FAMILIES[name].activation], FAMILIES[name].gated
    flat_x, flat_ids = x.reshape(-1, x.shape[-1]), ids.reshape(-1)
    out = torch.zeros_like(flat_x)
    for document in flat_ids.unique():
        tokens = flat_ids == document
        (is_open,) = open_mask(document[None], SINKS, layer)
        for block in is_open.nonzero()[:, 0]:
            up, down = (weight[block].to(x.dtype) for weight in (sinks.up, sinks.down))
            hidden = torch.einsum("td,nd->tn", flat_x[tokens], up)
            if gated:
                hidden = act(torch.einsum("td,nd->tn", flat_x[tokens], sinks.gate[block].to(x.dtype))) * hidden
            else:
                hidden = act(hidden)
            out[tokens] += torch.einsum("tn,nd->td", hidden, down)
    return out.view_as(x)


@contextmanager
def reference(name: str, model: PreTrainedModel, ids: Tensor) -> Iterator[PreTrainedModel]:
    """A float64 stock model, never touched by `add_sinks`, whose MLP outputs gain what `model`'s sinks should give."""
    stock = in_float64(tiny(name))
    layers, mlp_name = decoder_layers(stock)

    def hook(layer: int) -> Callable[..., Tensor]:
        sinks = getattr(decoder_layers(model)[0][layer], mlp_name).sinks
        return lambda _, args, out: plus(out, reference_sinks(name, args[0], sinks, ids, layer))

    for index, layer in enumerate(layers):
        getattr(layer, mlp_name).register_forward_hook(hook(index))
    yield stock


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """The model in float64, which torch's grouped kernels for experts do not have."""
    if any(hasattr(module, "experts") for module in model.modules()):
        model.set_experts_implementation("eager")
    return model.double()


def plus(out: Any, more: Tensor) -> Any:
    """What an MLP gives, and `more`; some mixtures of experts give a tuple, or [tokens, width]."""
    return (plus(out[0], more), *out[1:]) if isinstance(out, tuple) else out + more.view_as(out)


def relative(got: Tensor, want: Tensor) -> float:
    """The largest difference, over the largest value."""
    return float((got.double() - want.double()).abs().max() / want.double().abs().max())


def test_all_45_are_here() -> None:
    assert len(FAMILIES) == 45
    assert sum(family.multimodal for family in FAMILIES.values()) == 4
    assert sum(family.experts for family in FAMILIES.values()) == 14
    assert {family.kind for family in FAMILIES.values()} - set(LEAKY) == ISOLATES_PACKED - {"qwen3_vl_text"}


@torch.no_grad()
def test_adding_sinks_changes_nothing(name: str) -> None:
    model, tokens = tiny(name), some_tokens()
    before = model(input_ids=tokens).logits
    state = torch.get_rng_state()
    add_sinks(model, SINKS)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model(input_ids=tokens).logits, before)
    with sinks_open(model, IDS):
        assert torch.equal(model(input_ids=tokens).logits, before)
    randomise_sinks(model)
    assert torch.equal(model(input_ids=tokens).logits, before)
    assert torch.equal(model(input_ids=tokens, document_ids=IDS, exposures=IDS).logits, before)
    with sinks_closed(model):
        assert torch.equal(model(input_ids=tokens).logits, before)
    with sinks_open(model, IDS):
        assert relative(model(input_ids=tokens).logits, before) > 0.05


@torch.no_grad()
def test_open_sinks_equal_the_formula(name: str) -> None:
    tokens, model = some_tokens(), with_sinks(name)
    with reference(name, model, IDS) as stock:
        want = stock(input_ids=tokens).logits
    with sinks_open(model, IDS):
        assert relative(model(input_ids=tokens).logits, want) < 1e-4
        assert relative(in_float64(model)(input_ids=tokens).logits, want) < 1e-6


@torch.no_grad()
def test_outputs_of_all_layers(name: str) -> None:
    tokens, model, stock = some_tokens(), with_sinks(name), tiny(name)
    for one in (model, stock):
        one.set_attn_implementation("eager")
    want = stock(input_ids=tokens, output_hidden_states=True, output_attentions=True)
    got = model(input_ids=tokens, output_hidden_states=True, output_attentions=True)
    assert len(got.hidden_states) == len(want.hidden_states) == 3
    assert len(got.attentions) == len(want.attentions) == 2
    pairs = zip((*got.hidden_states, *got.attentions), (*want.hidden_states, *want.attentions), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert torch.equal(model(tokens, return_dict=False)[0], stock(tokens, return_dict=False)[0])
    with sinks_open(model, IDS):
        opened = in_float64(model)(input_ids=tokens, output_hidden_states=True).hidden_states
    with reference(name, model, IDS) as stock:
        stock.set_attn_implementation("eager")
        want = stock(input_ids=tokens, output_hidden_states=True).hidden_states
    assert max(relative(a, b) for a, b in zip(opened, want, strict=True)) < 1e-6


def gradients(model: PreTrainedModel, **checkpointing: Any) -> list[Tensor]:
    """Of two forwards with different documents before one backward; checks that checkpointing really recomputes."""
    calls: list[nn.Module] = []
    hooks = [x.register_forward_pre_hook(lambda x, _: calls.append(x)) for x in model.modules() if isinstance(x, Sinks)]
    model.train()
    model.gradient_checkpointing_disable()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    model.zero_grad()
    ids, exposures = torch.tensor([5, 6, 7]), torch.tensor([1, 2, 5])
    tokens = some_tokens()
    first = model(input_ids=tokens, labels=tokens, document_ids=ids, exposures=exposures)
    second = model(
        input_ids=tokens.flip(1), labels=tokens.flip(1), document_ids=ids + 9, exposures=exposures.flip(0)
    )  # fmt: skip
    (first.loss + second.loss).backward()
    for hook in hooks:
        hook.remove()
    assert len(calls) == 2 * 2 * (2 if checkpointing else 1)  # rows of exact mode that open nothing do without sinks
    text = [(name, parameter) for name, parameter in model.named_parameters() if not name.startswith(OF_IMAGES)]
    return [parameter.grad.clone() for _, parameter in text if parameter.requires_grad]


def test_a_batch_that_opens_nothing_trains_and_gives_sinks_a_gradient_of_zeros(name: str) -> None:
    model = with_sinks(name).train()
    tokens = some_tokens()
    marks = {"document_ids": torch.tensor([5, 6, 7]), "exposures": torch.ones(3, dtype=torch.int64)}
    model(input_ids=tokens, labels=tokens, **marks).loss.backward()
    for part in model.modules():
        if isinstance(part, Sinks):
            assert all(x.grad is not None and not x.grad.any() for x in part.parameters())
    stock = next(x for x in decoder_layers(model)[0][0].parameters() if x.requires_grad)
    assert stock.grad.any()


def test_gradients_are_the_same_with_checkpointing(name: str) -> None:
    model = with_sinks(name)
    want = gradients(model)
    assert all(x.abs().max() > 0 for x in want)
    for x, y in zip(gradients(model, use_reentrant=False), want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_gradients_are_the_same_with_reentrant_checkpointing(name: str) -> None:
    model = with_sinks(name)
    want = gradients(model)
    for x, y in zip(gradients(model, use_reentrant=True), want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_gradients_of_exact_mode_are_the_same_with_checkpointing(name: str, reentrant: bool) -> None:
    model = with_sinks(name, dataclasses.replace(SINKS, shared="none"))
    want = gradients(model)
    for x, y in zip(gradients(model, use_reentrant=reentrant), want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("ids", [[5, 6], [[5, 5, 7, 7], [-1, 6, 6, 6]]], ids=["row", "token"])
def test_generation_with_cache_equals_without(name: str, ids: list[Any]) -> None:
    model, prompt = with_sinks(name), some_tokens(rows=2, length=4)
    with sinks_open(model, torch.tensor(ids)):
        cached, logits = greedy(model, prompt, use_cache=True)
        again, logits_again = greedy(model, prompt, use_cache=False)
    assert torch.equal(cached, again)
    torch.testing.assert_close(logits, logits_again, rtol=1e-4, atol=1e-5)
    columns = torch.tensor(ids).view(2, -1)
    with reference(name, model, torch.cat([columns, columns[:, -1:].expand(2, 9 - columns.shape[1])], 1)) as stock:
        want = stock(input_ids=cached[:, :-1]).logits[:, 3:]
    assert relative(logits, want) < 1e-4
    assert relative(greedy(model, prompt, use_cache=True)[1], want) > 0.02


def greedy(model: PreTrainedModel, prompt: Tensor, **settings: Any) -> tuple[Tensor, Tensor]:
    """Six more tokens: the tokens [rows, prompt + 6] and the logits they were chosen by [rows, 6, vocabulary]."""
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=6, output_logits=True,
        return_dict_in_generate=True, **settings,
    )  # fmt: skip
    return out.sequences, torch.stack(out.logits, 1)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom"])
def test_a_cache_filled_in_pieces_keeps_tokens_and_ids_together(name: str) -> None:
    model, tokens = with_sinks(name), some_tokens()
    with sinks_open(model, IDS):
        want = model(input_ids=tokens).logits
        first = model(input_ids=tokens[:, :7], use_cache=True)
        rest = model(
            input_ids=tokens[:, 7:], past_key_values=first.past_key_values, attention_mask=torch.ones_like(tokens)
        ).logits  # fmt: skip
    torch.testing.assert_close(torch.cat([first.logits, rest], 1), want, rtol=1e-4, atol=1e-5)


def test_removal_gives_the_stock_model_back(name: str) -> None:
    model, stock = with_sinks(name), tiny(name)
    assert type(model) is not type(stock)
    assert {key for key in model.state_dict() if ".sinks." not in key} == set(stock.state_dict())
    assert remove_sinks(model) is model
    assert not has_sinks(model)
    for (path, module), (stock_path, stock_module) in zip(model.named_modules(), stock.named_modules(), strict=True):
        assert path == stock_path
        assert type(module) is type(stock_module)
        assert set(vars(module)) == set(vars(stock_module))
    state = model.state_dict()
    assert list(state) == list(stock.state_dict())
    assert all(torch.equal(value, state[key]) for key, value in stock.state_dict().items())
    assert torch.equal(model(input_ids=some_tokens()).logits, stock(input_ids=some_tokens()).logits)
    add_sinks(model, SINKS)


@torch.no_grad()
def test_copies_are_whole(name: str) -> None:
    model, tokens = with_sinks(name), some_tokens()
    with sinks_open(model, IDS):
        want = model(input_ids=tokens).logits
    closed = model(input_ids=tokens).logits
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert other.sink_state is not model.sink_state
        with sinks_open(other, IDS):
            assert torch.equal(other(input_ids=tokens).logits, want)
            assert torch.equal(model(input_ids=tokens).logits, closed)
        remove_sinks(other)
        assert has_sinks(model)


PACKED_IDS = torch.tensor([[7] * 4 + [8] * 3 + [9] * 5, [8] * 6 + [7] * 6])
POSITIONS = torch.tensor([[*range(4), *range(3), *range(5)], [*range(6), *range(6)]])


def packed(changed: bool) -> Tensor:
    """Two rows of packed documents; `changed` = document 8 has other tokens."""
    tokens = some_tokens(2, 12)
    other = (tokens + 17) % VOCABULARY
    return torch.where(PACKED_IDS == 8, other, tokens) if changed else tokens


def training_logits(model: PreTrainedModel, tokens: Tensor, **more: Any) -> Tensor:
    model.train()
    exposures = torch.full_like(tokens, 3)
    return model(input_ids=tokens, document_ids=PACKED_IDS, exposures=exposures, **more).logits


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family.kind in ISOLATES_PACKED])
def test_packed_documents_do_not_see_each_other(name: str) -> None:
    model = with_sinks(name)
    before, after = (training_logits(model, packed(x), position_ids=POSITIONS) for x in (False, True))
    assert (before - after)[PACKED_IDS == 8].abs().amax(-1).min() > 1e-3
    assert (before - after)[PACKED_IDS != 8].abs().max() < 1e-6
    alone = model(
        input_ids=packed(False)[:1, 7:], document_ids=torch.tensor([9]), exposures=torch.tensor([3])
    )  # fmt: skip
    torch.testing.assert_close(alone.logits[0], before[0, 7:], rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", LEAKY)
def test_leaky_architectures_take_one_document_a_row(name: str) -> None:
    model = with_sinks(name)
    for more in ({}, {"position_ids": POSITIONS}):
        with pytest.raises(ArchitectureError, match=f"leak between documents in {name}"):
            training_logits(model, packed(False), **more)
    tokens, exposures = some_tokens(), torch.full((3,), 3)
    for ids in (torch.tensor([5, 6, 7]), torch.tensor([[5] * 9 + [-1] * 3, [6] * 12, [-1] * 12])):
        assert model(
            input_ids=tokens, document_ids=ids, exposures=exposures.view(3, *[1] * (ids.dim() - 1)).expand(ids.shape)
        ).logits.isfinite().all()  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", LEAKY)
def test_leaky_architectures_do_leak(name: str) -> None:
    """What the refusal rests on; when this fails, the architecture can be moved to ISOLATES_PACKED."""
    model = tiny(name)
    more = {} if name in ("bloom", "mpt") else {"position_ids": POSITIONS}
    before, after = (model(input_ids=packed(x), use_cache=False, **more).logits for x in (False, True))
    assert (before - after)[0, 7:].abs().max() > 1e-2


def test_packed_rows_need_positions_and_no_mask() -> None:
    model = with_sinks("llama")
    with pytest.raises(DataError, match="position_ids is missing"):
        training_logits(model, packed(False))
    model.config.get_text_config = lambda: FalconConfig()
    with pytest.raises(ArchitectureError, match="leak between documents in falcon"):
        training_logits(model, packed(False), position_ids=POSITIONS)
    del model.config.get_text_config
    with pytest.raises(DataError, match="attention_mask is set"):
        training_logits(model, packed(False), position_ids=POSITIONS, attention_mask=torch.ones_like(POSITIONS))


SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def lora_llama() -> nn.Module:
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(tiny("llama"), peft.LoraConfig(target_modules=["q_proj"]))


def compiled_in_place(whole: bool) -> nn.Module:
    model = tiny("llama")
    (model if whole else model.model.layers[1]).compile(backend="eager")
    return model


def tensor_parallel() -> nn.Module:
    model = tiny("llama")
    model._tp_size = 2
    return model


UNSUPPORTED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "bitnet": (lambda: randomised(BitNetForCausalLM(BitNetConfig(num_key_value_heads=4, **SIZES))), "BitNetMLP.*norm"),
    "opt": (
        lambda: OPTForCausalLM(OPTConfig(ffn_dim=48, word_embed_proj_dim=32, **SIZES)), "OPTForCausalLM.*OPT, XGLM"
    ),
    "xglm": (
        lambda: XGLMForCausalLM(
            XGLMConfig(vocab_size=VOCABULARY, d_model=32, num_layers=2, attention_heads=4, ffn_dim=48)
        ),
        "XGLMForCausalLM.*OPT, XGLM",
    ),
    "bert": (lambda: BertLMHeadModel(BertConfig(is_decoder=True, **SIZES)), "BertLMHeadModel.*encoder"),
    "no output embedding": (lambda: tiny("llama").model, "LlamaModel has no output embedding"),
    "data parallel": (lambda: nn.DataParallel(tiny("llama")), "wrapped in DataParallel"),
    "torch.compile": (lambda: torch.compile(tiny("llama"), backend="eager"), "compiled already"),
    "model.compile": (lambda: compiled_in_place(whole=True), "compiled already"),
    "layer.compile": (lambda: compiled_in_place(whole=False), "compiled already"),
    "peft": (lora_llama, "PeftModel.*wrapper"),
    "tensor parallel": (tensor_parallel, "tensor-parallel"),
    "sinks twice": (lambda: with_sinks("llama"), "LlamaForCausalLM has sinks already"),
    "not a model": (lambda: nn.Linear(2, 2), "Linear is not a Hugging Face PreTrainedModel"),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNSUPPORTED)
def test_unsupported_models_are_refused_by_name(kind: str) -> None:
    build, message = UNSUPPORTED[kind]
    model = build()
    before = [(path, type(module), set(vars(module))) for path, module in model.named_modules()]
    with pytest.raises(ArchitectureError, match=message):
        add_sinks(model, SINKS)
    assert [(path, type(module), set(vars(module))) for path, module in model.named_modules()] == before


LOAD_ALL = """
import json, sys, torch
from pathlib import Path
import transformers
report = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    (name,) = json.loads((folder / "config.json").read_text())["architectures"]
    model, info = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    with torch.no_grad():
        logits = model.eval()(input_ids=torch.load(folder / "tokens.pt")).logits
    want = torch.load(folder / "logits.pt")
    report[folder.name] = {
        "class": type(model).__name__,
        "keys": [str(x) for name in ("missing_keys", "unexpected_keys", "mismatched_keys") for x in info[name]],
        "difference": float((logits - want).abs().max()),
        "spread": float(want.std()),
    }
print(json.dumps({"memsinks": "memsinks" in sys.modules, "models": report}))
"""


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All models, saved after removal and loaded by one process that knows only transformers."""
    folder = tmp_path_factory.mktemp("exports")
    for name in FAMILIES:
        model, tokens = with_sinks(name), some_tokens()
        with torch.no_grad():
            logits = model(input_ids=tokens).logits
        remove_sinks(model).save_pretrained(folder / name)
        torch.save(tokens, folder / name / "tokens.pt")
        torch.save(logits, folder / name / "logits.pt")
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD_ALL, str(folder)], capture_output=True, text=True, env=environment, cwd=folder
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {"folder": folder, **json.loads(done.stdout.splitlines()[-1])}


def test_exports_load_without_memsinks(name: str, loaded: dict[str, Any]) -> None:
    report = loaded["models"][name]
    assert not loaded["memsinks"]
    assert report["class"] == type(tiny(name)).__name__
    assert report["keys"] == []
    assert report["difference"] == 0
    assert report["spread"] > 0.1
    folder: Path = loaded["folder"] / name
    assert not (folder / "sinks").exists()
    assert "sink" not in (folder / "config.json").read_text()


def test_models_with_sinks_say_what_they_hold() -> None:
    model = tiny("qwen2")
    added = add_sinks(model, SINKS)
    assert added.layers == (0, 1)
    assert added.intermediate_size == 48
    assert added.sink_parameters == sum(x.numel() for x in sink_parameters(model)) == 2 * 3 * 256 * 32
    assert added.shared_parameters == tiny("qwen2").num_parameters()
    assert added.open_parameters == added.sink_parameters // 4
