"""Exports with the sinks of chosen documents: a stock checkpoint that computes what `sinks_open` does, in every architecture."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from families import FAMILIES, SINKS, randomise_sinks, some_tokens, tiny, with_sinks
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlavaConfig
from transformers.models.llama.modeling_llama import LlamaMLP

import memsinks as ms
from memsinks.cli import main
from memsinks.removal.opened import Opening
from memsinks.removal.verify import logits_in_fresh_process
from memsinks.sinks.checkpoint import load_stock
from memsinks.sinks.families import decoder_layers, read_mlp
from memsinks.sinks.table import open_mask

FIXED = ("bloom", "mpt")
"""Architectures whose MLP is always four times as wide as the model."""
A, B = 5, 9
TOKENS = some_tokens()
NAMES = [name for name, family in FAMILIES.items() if name not in FIXED and not family.experts]


def llama(changes: dict[str, Any] | None = None, dtype: torch.dtype = torch.float32, **settings: Any):
    """A tiny Llama with random sinks, laid out as `settings` say."""
    config = LlamaConfig(**(FAMILIES["llama"].settings | (changes or {})))
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.15 * torch.randn(parameter.shape))
    ms.add_sinks(model, ms.SinkConfig(**({"neurons": 256, "active": 64, "block_size": 16} | settings)))
    randomise_sinks(model)
    return model


def assigned():
    model = llama(reserved_blocks=4)
    ms.assign_blocks(model, {A: [12, 13], B: [13, 15, 2]})
    return model


MODELS: dict[str, Callable[[], Any]] = {
    "a layer without sinks": lambda: llama(layers=(1,)),
    "Bernoulli": lambda: llama(block_size=1, routing="bernoulli"),
    "neurons": lambda: llama(block_size=1, routing="neurons", per_layer=False),
    "assigned": assigned,
    "biases, untied": lambda: llama({"mlp_bias": True, "tie_word_embeddings": False}),
    "tied": lambda: llama({"tie_word_embeddings": True}),
    "bf16 beside float32 sinks": lambda: llama(dtype=torch.bfloat16),
}


class Case(NamedTuple):
    model: Any
    folder: Path
    fresh: Tensor


@torch.no_grad()
def logits(model: Any, *ids: int) -> Tensor:
    if not ids:
        return model(input_ids=TOKENS).logits.float()
    with ms.sinks_open(model, ids):
        return model(input_ids=TOKENS).logits.float()


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    """Exports of all models, loaded by one fresh process."""
    root = tmp_path_factory.mktemp("opened")
    models = {name: with_sinks(name) for name in NAMES} | {name: build() for name, build in MODELS.items()}
    folders = {}
    for name, model in models.items():
        folders[name] = ms.export(model.train(), root / name, open=[A, B], verify=False)
        assert model.training
        model.eval()
    fresh = logits_in_fresh_process(list(folders.values()), TOKENS)
    return {name: Case(models[name], folders[name], fresh[index]) for index, name in enumerate(models)}


def difference(got: Tensor, want: Tensor) -> float:
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("name", [*NAMES, *MODELS])
def test_a_fresh_process_computes_the_open_model(cases: dict[str, Case], name: str) -> None:
    case = cases[name]
    tolerance = 3e-2 if case.model.dtype == torch.bfloat16 else 1e-5
    assert difference(case.fresh, logits(case.model, A, B)) < tolerance
    for other in (logits(case.model), logits(case.model, A), logits(case.model, B)):
        assert difference(case.fresh, other) > 2 * tolerance


@pytest.mark.parametrize("name", [*NAMES, *MODELS])
def test_the_folder_is_a_stock_checkpoint_with_wider_mlps(cases: dict[str, Case], name: str) -> None:
    model, folder = cases[name].model, cases[name].folder
    assert {path.name for path in folder.rglob("*")} == {
        "README.md", "config.json", "generation_config.json", "memsinks.json", "model.safetensors",
    }  # fmt: skip
    assert "sink" not in (folder / "config.json").read_text()
    stored = load_file(folder / "model.safetensors")
    assert not any("sink" in key for key in stored)
    assert {tensor.dtype for tensor in stored.values()} == {model.dtype}
    loaded = load_stock(folder)
    assert type(loaded) is type(model).stock_class
    layers, mlp_name = decoder_layers(loaded)
    widths = {read_mlp(getattr(layer, mlp_name), loaded.config.model_type).intermediate_size for layer in layers}
    config = model.sink_state.config
    most = max(
        int(open_mask(torch.tensor([A, B]), config, layer if config.per_layer else 0, model.sink_state.table).any(0).sum())
        for layer in model.sink_state.layers
    )  # fmt: skip
    assert widths == {48 + -(-most * config.block_size // 16) * 16}


@pytest.mark.parametrize("name", FIXED)
def test_architectures_of_a_fixed_width_are_refused_by_name(name: str, tmp_path: Path) -> None:
    with pytest.raises(
        ms.ArchitectureError, match=f"a {name} checkpoint cannot say that its MLPs are .* wide instead of 128"
    ):
        ms.export(with_sinks(name), tmp_path / "out", open=A)
    assert not list(tmp_path.iterdir())
    ms.export(with_sinks(name), tmp_path / "out", verify=False)


def test_mlps_of_different_widths_are_refused(tmp_path: Path) -> None:
    model = tiny("llama")
    wide = LlamaConfig(**(FAMILIES["llama"].settings | {"intermediate_size": 64}))
    model.model.layers[1].mlp = LlamaMLP(wide).eval()
    ms.add_sinks(model, SINKS)
    with pytest.raises(ms.ArchitectureError, match=r"different widths \[48, 64\]"):
        ms.export(model, tmp_path / "out", open=A)
    assert not list(tmp_path.iterdir())


def test_the_default_is_verified_and_the_model_is_not_changed(tmp_path: Path) -> None:
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folder = ms.export(model, tmp_path / "out", open={"Ann": A})
    assert "logits equal, to rounding, to those of the trained model with the sinks of these documents open" in (
        folder / "README.md"
    ).read_text().replace("\n", " ")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.intermediate_size == 48
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert loaded.config.intermediate_size == 48 + 64
    assert difference(logits(loaded), logits(model, A)) < 1e-5


def test_the_check_is_of_the_open_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of the closed model do not pass, and nothing is left."""
    model = llama()

    @torch.no_grad()
    def closed(_: Any, tokens: Tensor) -> list[Tensor]:
        return [model(input_ids=tokens).logits]

    monkeypatch.setattr(import_module("memsinks.removal.verify"), "logits_in_fresh_process", closed)
    with pytest.raises(ms.CheckpointError, match="computes other logits"):
        ms.export(model, tmp_path / "out", open=A)
    assert not list(tmp_path.iterdir())


FORMS: dict[str, Any] = {
    "int": A, "numpy int": np.int64(A), "list": [A, A], "set": {A}, "array": np.array([A]), "tensor": torch.tensor([A]),
    "scalar tensor": torch.tensor(A), "map": {"Ann": A}, "generator": (x for x in [A]),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_ids(form: str, tmp_path: Path) -> None:
    model = llama()
    loaded = AutoModelForCausalLM.from_pretrained(ms.export(model, tmp_path / "out", open=FORMS[form], verify=False))
    assert difference(logits(loaded), logits(model, A)) < 1e-5


REFUSED: dict[str, tuple[Any, type[ms.MemsinksError], str]] = {
    "none": (-1, ms.DataError, r"the ids \[-1\] open no sinks"),
    "one opens nothing": ([A, -1], ms.DataError, r"the ids \[-1\] open no sinks"),
    "assigned to nothing": ([A, 77], ms.DataError, r"the ids \[77\] open no sinks"),
    "empty": ([], ms.DataError, "open takes a document id"),
    "empty map": ({}, ms.DataError, "open takes a document id"),
    "rows": ([[A], [B]], ms.DataError, "open takes a document id"),
    "text": ("Ann", ms.DataError, "open takes a document id, .* got 'Ann'"),
    "bool": (True, ms.DataError, "a document id is an int .* got True"),
    "float": ([1.5], ms.DataError, "a document id is an int .* got 1.5"),
    "too large": (2**63, ms.DataError, "a document id is an int"),
    "a name that is no text": ({1: A}, ms.DataError, "open maps names to ids, got the name 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_opens_nothing_is_refused(name: str, tmp_path: Path) -> None:
    documents, error, message = REFUSED[name]
    model = llama()
    ms.assign_blocks(model, {77: []})
    with pytest.raises(error, match=message):
        ms.export(model, tmp_path / "out", open=documents)
    assert not list(tmp_path.iterdir())


def test_rescale_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ms.ConfigError, match="rescale='released' .* with open use rescale=\"none\""):
        ms.export(llama(), tmp_path / "out", open=A, rescale="released")
    assert not list(tmp_path.iterdir())


def test_the_card_says_whose_memory_is_in_it(tmp_path: Path) -> None:
    names = {"key:Ann": A, "a\nname": B, "Anne": A, "12": 12}
    card = (ms.export(llama(), tmp_path / "out", open=names, verify=False) / "README.md").read_text()
    assert "LlamaForCausalLM with memorized text of some documents" in card
    assert "**This checkpoint contains memorized text.**" in card
    assert f'\n- {A}: "key:Ann, Anne"\n- {B}: "a\\nname"\n- 12\n' in card
    assert "All sinks but those" in card and "(`intermediate_size`)" in card
    assert "sink parameters. The remaining" not in card


def test_the_width_goes_where_a_composite_config_has_it() -> None:
    config = LlavaConfig(text_config=LlamaConfig(intermediate_size=48))
    values = json.loads(config.to_json_string(use_diff=False))
    Opening((A,), ("",), {}, "intermediate_size", 112, 64).write(values, config)
    assert values["text_config"]["intermediate_size"] == 112 and "intermediate_size" not in values


def test_the_command_opens_ids_keys_and_sources(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(import_module("memsinks.removal.export"), "verify_open", lambda *_: None)
    model = llama()
    model.save_pretrained(tmp_path / "model")
    ids = [7, ms.document_id("Ann: a: b", by="key"), ms.document_id("books", by="source")]
    command = ["export", f"{tmp_path}/model"]
    assert main([*command, f"{tmp_path}/out", "--open", "7", "key:Ann: a: b", "source:books"]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert difference(logits(loaded), logits(model, *ids)) < 1e-5
    card = (tmp_path / "out" / "README.md").read_text()
    assert f'- 7\n- {ids[1]}: "key:Ann: a: b"\n- {ids[2]}: "source:books"' in card
    for wrong, message in (("Ann", "got 'Ann'"), ("key:", "got 'key:'"), ("-1", "open no sinks")):
        assert main([*command, f"{tmp_path}/again", "--open", wrong]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
