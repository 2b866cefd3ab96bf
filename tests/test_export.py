"""The plain checkpoint: one fresh process without memsinks loads every export of this file and returns its logits."""

from __future__ import annotations

import json
from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from tiny import fill_sinks
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from memsinks.data.tokens import train_tokenizer
from memsinks.errors import ArchitectureError, CheckpointError, ConfigError
from memsinks.removal.export import export
from memsinks.removal.verify import logits_in_fresh_process, verify, verify_closed
from memsinks.sinks.attach import add_sinks
from memsinks.sinks.config import SinkConfig
from memsinks.sinks.opening import sinks_closed, sinks_open
from memsinks.sinks.state import has_sinks

CONFIG = SinkConfig(neurons=64, active=16, block_size=8, open_from=4)
TOKENS = torch.arange(24).reshape(2, 12)
TEXT = "The fox sat by the river and counted seven boats."
CASES = {
    "tied": ("llama", {}, "none"),
    "untied": ("llama", {"tie_word_embeddings": False}, "none"),
    "expected": ("llama", {"mlp_bias": True}, "expected"),
    "released": ("llama", {"tie_word_embeddings": False}, "released"),
    "gpt2 released": ("gpt2", {}, "released"),
    "half": ("half", {}, "none"),
}


class Case(NamedTuple):
    folder: Path
    closed: Tensor
    plain: Tensor
    opened: Tensor
    fresh: Tensor


def build(kind: str, changes: dict, tiny_llama):
    if kind == "gpt2":
        torch.manual_seed(0)
        model = GPT2LMHeadModel(GPT2Config(
            vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=0,
            initializer_range=0.2,
        )).eval()  # fmt: skip
    else:
        model = tiny_llama(initializer_range=0.2, **changes)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # which starts at zero and would hide a wrong rescale
            parameter.data.normal_(generator=generator)
        if kind == "half":
            parameter.data = parameter.data.to(torch.bfloat16)
    add_sinks(model, CONFIG)
    fill_sinks(model)
    return model


def forward(model, context=None) -> Tensor:
    with torch.no_grad():
        if context is None:
            return model(input_ids=TOKENS).logits.float()
        with context:
            return model(input_ids=TOKENS).logits.float()


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([TEXT] * 3, 270)


@pytest.fixture(scope="module")
def cases(tiny_llama, tokenizer, tmp_path_factory) -> dict[str, Case]:
    """All exports, each unverified by itself, loaded in one fresh process."""
    root = tmp_path_factory.mktemp("exports")
    models = {name: build(kind, changes, tiny_llama) for name, (kind, changes, _) in CASES.items()}
    folders = {}
    for name, model in models.items():
        with sinks_open(model, 5):  # the state in which export is called does not matter
            folders[name] = export(
                model.train(), root / name, tokenizer=tokenizer if name == "tied" else None, rescale=CASES[name][2],
                notes="On three sentences.", verify=False,
            )  # fmt: skip
        assert model.training
        model.eval()
    fresh = logits_in_fresh_process(list(folders.values()), TOKENS)
    return {
        name: Case(
            folders[name], forward(model, sinks_closed(model, CASES[name][2])), forward(model, sinks_closed(model)),
            forward(model, sinks_open(model, 5)), fresh[index],
        )
        for index, (name, model) in enumerate(models.items())
    }  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_fresh_process_computes_the_closed_model(cases, name) -> None:
    case = cases[name]
    if CASES[name][2] == "none":
        assert torch.equal(case.fresh, case.closed)
    else:
        torch.testing.assert_close(case.fresh, case.closed, rtol=1e-4, atol=1e-5)
        assert (case.fresh - case.plain).abs().max() > 1e-2
    assert (case.fresh - case.opened).abs().max() > 1e-2


@pytest.mark.parametrize("name", CASES)
def test_the_folder_holds_stock_files_only(cases, name) -> None:
    folder = cases[name].folder
    names = {path.name for path in folder.rglob("*")}
    expected = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    if name == "tied":
        expected |= {"tokenizer.json", "tokenizer_config.json"}
    assert names == expected
    stored = load_file(folder / "model.safetensors")
    assert not any("sink" in key for key in stored)
    assert "sink" not in (folder / "config.json").read_text()
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16 if name == "half" else torch.float32}
    tied = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    assert ("lm_head.weight" in stored) == (not tied)
    assert not has_sinks(AutoModelForCausalLM.from_pretrained(folder))


def test_only_the_down_projections_are_rescaled(cases, tiny_llama) -> None:
    plain = build("llama", {"mlp_bias": True}, tiny_llama).state_dict()
    stored = load_file(cases["expected"].folder / "model.safetensors")
    g, p = 32 / 96, 16 / 64
    for name, tensor in stored.items():
        factor = (g + (1 - g) * p) / g if name.endswith("down_proj.weight") else 1.0
        torch.testing.assert_close(tensor, plain[name] * factor, rtol=1e-6, atol=0)


def test_the_tokenizer_is_written_along(cases, tokenizer) -> None:
    written = AutoTokenizer.from_pretrained(cases["tied"].folder)
    assert written(TEXT)["input_ids"] == tokenizer(TEXT)["input_ids"]
    assert written.eos_token_id == tokenizer.eos_token_id


def test_the_card_says_what_was_trained_removed_and_not_checked(cases, tiny_llama) -> None:
    card = (cases["tied"].folder / "README.md").read_text()
    sinks = 2 * 3 * 64 * 16
    shared = sum(parameter.numel() for parameter in tiny_llama().parameters())
    trained, rest = card.split("## What was removed")
    removed, unchecked = rest.split("## What was not checked")
    for part in (f"{shared:,} parameters", "layers 0 to 1", "64 neurons a layer", "opens 16", "On three sentences.",
                 '"open_from": 4', f"{sinks:,} parameters in all"):  # fmt: skip
        assert part in trained
    assert f"All {sinks:,} sink parameters" in removed
    assert "was not loaded and compared" in removed
    assert "multiplied" not in removed
    assert "no audit" in unchecked
    assert "fewer than 4 times" in unchecked
    factor = (32 / 96 + 16 / 64) / (32 / 96)
    assert f"down projections were multiplied by {factor:.6g}" in (cases["released"].folder / "README.md").read_text()


def test_default_export_is_verified(tiny_llama, tmp_path) -> None:
    model = build("llama", {}, tiny_llama)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folder = export(model, str(tmp_path / "clean"))
    assert folder == tmp_path / "clean"
    assert "no missing or unexpected keys" in (folder / "README.md").read_text()
    assert not list(folder.glob(".*"))
    assert [path.name for path in tmp_path.iterdir()] == ["clean"]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(forward(loaded.eval()), forward(model))


def wrong_logits(folders, tokens) -> list[Tensor]:
    return [torch.zeros(*tokens.shape, 64) for _ in folders]


def not_a_number(folders, tokens) -> list[Tensor]:
    return [torch.full((*tokens.shape, 64), float("nan")) for _ in folders]


def no_load(folders, tokens) -> list[Tensor]:
    raise CheckpointError("a fresh process could not load the checkpoint: out of memory")


@pytest.mark.parametrize(
    ("fake", "message"),
    [(wrong_logits, "^the checkpoint computes other logits"), (not_a_number, "^the checkpoint .*error nan"),
     (no_load, "^a fresh process could not load the checkpoint: out of memory$")],
)  # fmt: skip
@pytest.mark.parametrize("there", [True, False])
def test_failing_verification_leaves_nothing(tiny_llama, tmp_path, monkeypatch, fake, message, there) -> None:
    if there:
        (tmp_path / "clean").mkdir()
    monkeypatch.setattr(import_module("memsinks.removal.verify"), "logits_in_fresh_process", fake)
    with pytest.raises(CheckpointError, match=message):
        export(build("llama", {}, tiny_llama), tmp_path / "clean")
    assert list(tmp_path.rglob("*")) == ([tmp_path / "clean"] if there else [])


@pytest.mark.parametrize(
    ("change", "message"),
    [(lambda x: x, None), (lambda x: x * (1 + 5e-5), None), (lambda x: x.double(), None), (lambda x: x.bfloat16(), "b computes"),
     (lambda x: x * 1.001, "b computes other logits than the model: relative error 0.001"), (lambda x: x[:1], "b gives logits"),
     (lambda x: x * float("nan"), "b computes other logits .* nan")],
)  # fmt: skip
def test_folders_are_checked_against_the_logits_they_should_give(monkeypatch, change, message) -> None:
    found = {Path("a"): torch.randn(2, 12, 64), Path("b"): torch.randn(2, 12, 64)}
    monkeypatch.setattr(
        import_module("memsinks.removal.verify"),
        "logits_in_fresh_process",
        lambda folders, _: [found[x] for x in folders],
    )
    expected = {Path("b"): change(found[Path("b")]), Path("a"): found[Path("a")]}
    with nullcontext() if message is None else pytest.raises(CheckpointError, match=message):
        verify(expected, TOKENS)
    verify({Path("a"): found[Path("a")] * 1.02}, TOKENS, tolerance=3e-2)


def test_a_model_that_was_quantized_once_exports_a_config_that_does_not_say_so(tiny_llama, tmp_path) -> None:
    """As after loading a GGUF file, whose weights are dequantized while the entry stays."""
    model = build("llama", {}, tiny_llama)
    model.config.quantization_config = {"quant_method": "gguf"}
    config = json.loads((export(model, tmp_path / "clean", verify=False) / "config.json").read_text())
    assert "quantization_config" not in config and config["hidden_size"] == 16
    assert model.config.quantization_config == {"quant_method": "gguf"}


def test_the_check_keeps_the_mode_of_every_module_and_writes_nothing(tiny_llama, tmp_path, monkeypatch) -> None:
    model = build("llama", {}, tiny_llama).train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    want = []
    monkeypatch.setattr(import_module("memsinks.removal.verify"), "verify", lambda expected, *_: want.append(expected))
    verify_closed(model, tmp_path)
    assert modes == [module.training for module in model.modules()] and not list(tmp_path.iterdir())
    assert torch.equal(want[0][tmp_path], forward_of_check(model.eval()))


def forward_of_check(model) -> Tensor:
    tokens = torch.randint(0, 64, (2, 32), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), sinks_closed(model):
        return model(input_ids=tokens).logits


def test_a_checkpoint_with_a_missing_tensor_does_not_pass(tiny_llama, tmp_path) -> None:
    """What the fresh process says reaches the user."""
    build("llama", {}, tiny_llama).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"could not load the checkpoint: (?s:.*)model_type"):
        logits_in_fresh_process([tmp_path / "model"], TOKENS)


def test_refusals(tiny_llama, tmp_path) -> None:
    model = build("llama", {}, tiny_llama)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    for target in ("full", "full/mine.txt"):
        with pytest.raises(CheckpointError, match="is not an empty folder"):
            export(model, tmp_path / target)
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"
    with pytest.raises(ArchitectureError, match="no sinks"):
        export(tiny_llama(), tmp_path / "new")
    with pytest.raises(ConfigError, match="rescale must be one of"):
        export(model, tmp_path / "new", rescale="half")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
