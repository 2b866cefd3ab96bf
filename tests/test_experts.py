"""Sinks beside mixtures of experts and in multimodal models: what they teach, what is kept, what is refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, SINKS, VOCABULARY, randomise_sinks, randomised, some_tokens, tiny, with_sinks
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedModel

import memsinks as ms
from memsinks.batch import BLANK, ISOLATIONS
from memsinks.removal.verify import logits_in_fresh_process
from memsinks.runs.estimate import estimate
from memsinks.runs.recipe import parse_recipe
from memsinks.sinks.checkpoint import describe
from memsinks.sinks.experts import Experts, read_host
from memsinks.sinks.state import is_sink, named_sinks

MIXTURES = [name for name, family in FAMILIES.items() if family.experts]
MULTIMODAL = [name for name, family in FAMILIES.items() if family.multimodal]
EXACT = ms.SinkConfig(neurons=96, active=16, block_size=8, reserved_blocks=4, shared="none")
DECAY = ms.SinkConfig(neurons=96, active=16, block_size=8, reserved_blocks=4, shared_decay=1.0)
OWNERS = (12, 13)


def owned(name: str, config: ms.SinkConfig, **changes: Any) -> PreTrainedModel:
    model = tiny(name)
    for field, value in changes.items():
        setattr(model.config, field, value)
    ms.add_sinks(model, config)
    randomise_sinks(model)
    ms.assign(model, OWNERS)
    return model.train()


def step(seed: int, blank: bool = False) -> dict[str, Tensor]:
    """Four rows: two of documents met once, two of private owners, or blank in their place."""
    ids = some_tokens(rows=4, seed=seed)
    flags = torch.tensor([0, ISOLATIONS["private"], 0, ISOLATIONS["private"]])
    return {
        "input_ids": ids,
        "labels": ids,
        "document_ids": torch.tensor([100 + seed, OWNERS[0], 200 + seed, OWNERS[1]]),
        "exposures": torch.tensor([1, seed, 1, seed]),
        "isolation": torch.where(flags > 0, BLANK, 0) if blank else flags,
    }


def targets(batch: dict[str, Tensor]) -> int:
    return ms.target_count(batch["labels"])


def trained(model: PreTrainedModel, blank: bool) -> PreTrainedModel:
    optimizer = ms.AdamW(ms.param_groups(model, lr=1e-2, weight_decay=0.1))
    for number in (1, 2, 3):
        batch = step(number, blank)
        model(**batch, num_items_in_batch=targets(batch)).loss.backward()
        ms.clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model


# What private text teaches


@pytest.mark.parametrize("config", [EXACT, DECAY], ids=["exact", "decay"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gemma3_images"])
def test_shared_weights_do_not_see_private_rows(name: str, config: ms.SinkConfig) -> None:
    model, shadow = (trained(owned(name, config), blank) for blank in (False, True))
    assert ms.shared_hash(model) == ms.shared_hash(shadow) != ms.shared_hash(owned(name, config))
    moved = [
        not torch.equal(x, y) for x, y in zip(named_sinks(model).values(), named_sinks(shadow).values(), strict=True)
    ]
    assert all(moved)


def test_a_text_teaches_the_shared_weights_by_its_weight_and_the_sinks_in_full() -> None:
    """Document by document: w(c) = 1, 1/2, 1/4 in every shared weight, router and experts included; 1 in the sinks."""
    model = with_sinks("mixtral").train()
    ids, exposures, weights = torch.tensor([5, 6, 7]), torch.tensor([1, 2, 4]), (1, 1 / 2, 1 / 4)
    tokens = some_tokens()

    def learned(rows: slice) -> dict[str, Tensor]:
        model.zero_grad()
        batch = {"input_ids": tokens[rows], "labels": tokens[rows], "document_ids": ids[rows]}
        model(**batch, exposures=exposures[rows], num_items_in_batch=33).loss.backward()
        return {name: x.grad.clone() for name, x in model.named_parameters()}

    whole = learned(slice(None))
    model.sink_state.weight_rule = lambda *_: None
    alone = [learned(slice(row, row + 1)) for row in range(3)]
    for name, got in whole.items():
        factors = (1, 1, 1) if is_sink(name) else weights
        want = sum(factor * one[name] for factor, one in zip(factors, alone, strict=True))
        assert float((got - want).abs().max()) < 1e-5 * float(want.abs().max()), name


# Router losses


def test_decay_refuses_a_router_loss() -> None:
    with pytest.raises(ms.ConfigError, match="router loss"):
        owned("mixtral", DECAY, output_router_logits=True)
    batch = {"input_ids": some_tokens(), "labels": some_tokens(), "document_ids": torch.tensor([5, 6, 7])}
    with pytest.raises(ms.ConfigError, match="couples the batch"):
        owned("mixtral", DECAY)(**batch, exposures=torch.tensor([1, 2, 2]), output_router_logits=True)


def test_in_exact_mode_a_router_loss_is_of_the_rows_that_teach() -> None:
    model = owned("mixtral", EXACT, output_router_logits=True)
    found = []
    for blank in (False, True):
        model.zero_grad()
        batch = step(3, blank)
        out = model(**batch, num_items_in_batch=targets(batch))
        out.loss.backward()
        found.append((out.aux_loss, [x.grad for name, x in model.named_parameters() if not is_sink(name)]))
    assert torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(x, y) for x, y in zip(found[0][1], found[1][1], strict=True))

    batch = {name: value[[0, 2]] for name, value in step(3).items()}
    model.zero_grad()
    out = model(**batch, num_items_in_batch=targets(step(3)))
    out.loss.backward()
    assert torch.equal(out.aux_loss, found[0][0]) and out.aux_loss.item() > 0
    together = [x.grad for name, x in model.named_parameters() if not is_sink(name)]
    for x, y in zip(together, found[0][1], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-8)

    batch = {name: value[[1, 3]] for name, value in step(3).items()}
    out = model(**batch, num_items_in_batch=targets(batch))
    assert getattr(out, "aux_loss", None) is None


# What is written


def test_checkpoints_and_exports(tmp_path: Path) -> None:
    """Saved, loaded and exported: sinks, stock weights, fingerprint; then all exports in one fresh process."""
    want, exports = [], []
    for name in ("mixtral", "qwen3_moe", "gpt_oss", *MULTIMODAL):
        model, tokens = with_sinks(name), some_tokens(2, 8)
        model.save_pretrained(tmp_path / name)
        again = ms.load(tmp_path / name)
        assert type(again) is type(model) and ms.fingerprint(again) == ms.fingerprint(model)
        assert ms.shared_hash(again) == ms.shared_hash(model)
        with torch.no_grad(), ms.sinks_open(model, 5), ms.sinks_open(again, 5):
            assert torch.equal(again(input_ids=tokens).logits, model(input_ids=tokens).logits)
        assert f"{model.config.model_type} with sinks in layers" in describe(tmp_path / name)
        exports.append(ms.export(model, tmp_path / f"{name}-clean", verify=False))
        want.append(model(input_ids=tokens).logits)
    for got, logits in zip(logits_in_fresh_process(exports, tokens), want, strict=True):
        torch.testing.assert_close(got, logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MIXTURES)
def test_open_sinks_cannot_become_neurons_of_experts(name: str, tmp_path: Path) -> None:
    with pytest.raises(ms.ArchitectureError, match=r"has mixtures of experts.*memsinks\.load"):
        ms.export(with_sinks(name), tmp_path / "out", open=5)
    assert not list(tmp_path.iterdir())


def test_experts_have_no_rescale(tmp_path: Path) -> None:
    model = with_sinks("olmoe")
    with pytest.raises(ms.ArchitectureError, match="no share of general neurons"), ms.sinks_closed(model, "expected"):
        pass
    with pytest.raises(ms.ArchitectureError, match="no share of general neurons"):
        ms.export(model, tmp_path / "out", rescale="expected", verify=False)
    with ms.sinks_closed(model):
        model(input_ids=some_tokens())


# What is read, and what is refused


def test_what_is_read_of_a_mixture() -> None:
    model: Any = tiny("qwen2_moe")
    host = read_host(model.model.layers[1].mlp, model.config)
    assert isinstance(host, Experts)
    assert (host.intermediate_size, host.hidden_size, host.gated) == (24, 32, True)
    assert host.std == pytest.approx(0.15, rel=0.1)
    with torch.device("meta"):
        empty: Any = type(model)(model.config)
    assert read_host(empty.model.layers[1].mlp, model.config).intermediate_size == 24


class Crowded(nn.Module):
    """Experts of limited capacity: a token is dropped where six come before it."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.experts, self.block = block.experts, block

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.block(x[:, :6]), torch.zeros_like(x[:, 6:])], 1)


class Scores(Crowded):
    """A block that gives something else than the sum of its experts."""

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x)[..., :1]


def with_block(build: type[Crowded]) -> PreTrainedModel:
    model: Any = tiny("mixtral")
    model.model.layers[1].mlp = build(model.model.layers[1].mlp)
    return model


def with_experts(experts: nn.Module) -> PreTrainedModel:
    model: Any = tiny("mixtral")
    model.model.layers[1].mlp.experts = experts
    return model


def uninitialized() -> PreTrainedModel:
    model: Any = tiny("mixtral")
    nn.init.constant_(model.model.layers[0].mlp.experts.gate_up_proj, 0.5)
    return model


def blip2() -> PreTrainedModel:
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    tower = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "blip-2",
        text_config={"model_type": "opt", "word_embed_proj_dim": 32, **text},
        vision_config=tower | {"image_size": 16, "patch_size": 8},
        qformer_config=tower | {"encoder_hidden_size": 16, "vocab_size": 8},
    )
    return randomised(AutoModelForImageTextToText.from_config(config))


REFUSED = {
    "capacity": (lambda: with_block(Crowded), "what Crowded gives for a token depends on the other tokens"),
    "another shape": (lambda: with_block(Scores), "Scores does not return a tensor of the shape of its input"),
    "a list of MLPs": (lambda: with_experts(nn.ModuleList([nn.Linear(32, 32)])), "is not a mixture of experts that is known"),
    "not initialized": (uninitialized, "the weights of MixtralSparseMoeBlock are all equal"),
    "a language model without MLPs": (blip2, "Blip2ForConditionalGeneration has no list of decoder layers.*OPT, XGLM"),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_a_host_is_refused_by_name(kind: str) -> None:
    build, message = REFUSED[kind]
    model = build()
    with pytest.raises(ms.ArchitectureError, match=message):
        ms.add_sinks(model, SINKS)
    assert not ms.has_sinks(model)


def test_images_are_for_evaluation() -> None:
    model, tokens = with_sinks("llava"), some_tokens(2, 8)
    tokens[tokens == 90] = 91
    tokens[:, :4] = 90
    model.config.image_token_id = 90
    pixels = torch.rand(2, 3, 16, 16)
    closed = model(input_ids=tokens, pixel_values=pixels).logits
    with ms.sinks_open(model, 5):
        assert (model(input_ids=tokens, pixel_values=pixels).logits - closed).abs().max() > 0.05
    marks = {"document_ids": torch.tensor([5, 6]), "exposures": torch.tensor([1, 2])}
    with pytest.raises(ms.ArchitectureError, match=r"trained on text alone, got \['pixel_values'\]"):
        model.train()(input_ids=tokens, pixel_values=pixels, labels=tokens, **marks)


def test_sinks_of_a_multimodal_model_stand_in_its_language_model() -> None:
    for name in MULTIMODAL:
        places = {name.rsplit(".layers", 1)[0] for name in named_sinks(with_sinks(name))}
        assert places == {"model.language_model"}, list(itertools.islice(places, 3))


def test_no_estimate_is_made_of_experts() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = {"config": sizes | {"model_type": "mixtral", "num_key_value_heads": 2, "vocab_size": 96}}
    with pytest.raises(ms.ConfigError, match="mixtures of experts, of which no estimate is made yet"):
        estimate(parse_recipe({"output": "x", "model": model}))
