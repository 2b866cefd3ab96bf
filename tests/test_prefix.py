"""What lies below the sinks of a frozen model is computed once: the same training, and nothing left on disk."""

from __future__ import annotations

import resource

import pytest
import torch
from families import FAMILIES, randomise_sinks, some_tokens, tiny
from tiny import tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

import memsinks as ms

OWNERS = ("acme", "bolt")


def rows(seed: int, length: int = 24):
    """Six rows, packed of two texts each; the last two are nobody's."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 64, (6, length), generator=generator)
    ids = torch.tensor([ms.document_id(OWNERS[x % 2], by="source") if x < 4 else -1 for x in range(6)])
    positions = torch.arange(length).remainder(length // 2).expand(6, length).clone()
    return {"input_ids": tokens, "labels": tokens, "document_ids": ids, "position_ids": positions}


def model_of(kind: str, layers=(1, 2), **changes):
    if kind == "llama":
        model = tiny_llama(torch.float32, num_hidden_layers=3, vocab_size=64, **changes)
    else:
        config = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=3, n_head=2,
                            resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
        torch.manual_seed(0)
        model = GPT2LMHeadModel(config)
    ms.add_owners(model, OWNERS, config=ms.SinkConfig.for_finetuning(model, 2, neurons=8, layers=layers))
    return model.train()


def trained(model, epochs: int = 3):
    """Losses of shuffled epochs of two rows a step."""
    optimizer = ms.AdamW(ms.param_groups(model, lr=1e-2))
    data, losses = rows(0), []
    for epoch in range(epochs):
        for chosen in torch.randperm(6, generator=torch.Generator().manual_seed(epoch)).split(2):
            loss = model(**{name: x[chosen] for name, x in data.items()}).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    return torch.tensor(losses)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_layers_below_are_run_once_and_training_is_the_same(kind, tmp_path) -> None:
    plain, kept = model_of(kind), model_of(kind)
    losses = trained(plain)
    with ms.prefix_kept(kept, tmp_path) as done:
        assert torch.allclose(trained(kept), losses, atol=1e-5)
        assert not list(tmp_path.iterdir())
    assert done.rows == 6 and done.bytes == 6 * 24 * 16 * 4
    assert done.hits > 0 and done.hits + done.misses >= 9
    for name, x in kept.named_parameters():
        assert torch.allclose(x, plain.get_parameter(name), atol=1e-5), name
    assert not any("forward" in vars(x) for x in kept.modules())


def test_half_the_space_rounds(tmp_path) -> None:
    exact, model = trained(model_of("llama")), model_of("llama")
    with ms.prefix_kept(model, dtype="bfloat16") as done:
        losses = trained(model)
    assert done.bytes == 6 * 24 * 16 * 2
    assert torch.allclose(losses, exact, atol=2e-2) and not torch.equal(losses, exact)


def test_other_positions_are_another_row() -> None:
    model, data = model_of("llama"), rows(0)
    with ms.prefix_kept(model) as done:
        model(**data)
        whole = data | {"position_ids": torch.arange(24).expand(6, 24)}
        with_kept = model(**whole).loss
        assert done.hits == 0
        model(**data)
        assert done.hits > 0
    assert torch.allclose(model(**whole).loss, with_kept)


def test_evaluation_goes_through_all_layers() -> None:
    model, tokens = model_of("llama"), rows(0)["input_ids"]
    wanted = model.eval()(input_ids=tokens).logits
    with ms.prefix_kept(model) as done:
        assert torch.equal(model(input_ids=tokens).logits, wanted)
    assert (done.hits, done.misses) == (0, 0)


def test_what_cannot_be_kept_is_refused(tmp_path) -> None:
    model = model_of("llama")
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    with pytest.raises(ms.ConfigError, match="layer 0 learns; freeze it"):
        with ms.prefix_kept(model, dtype="int8"):
            pass
    with pytest.raises(ms.ConfigError, match="the first layer has sinks"):
        with ms.prefix_kept(model_of("llama", layers=(0, 1))):
            pass
    model = model_of("llama", attention_dropout=0.1)
    with pytest.raises(ms.ConfigError, match="attention_dropout=0.1"):
        with ms.prefix_kept(model):
            pass
    model = model_of("gpt2")
    model.transformer.drop.p = 0.1
    with (
        pytest.raises(ms.ConfigError, match=r"dropout or noise is on below the sinks \(p=0.1\)"),
        ms.prefix_kept(model),
    ):
        pass
    model.transformer.drop.p, model.transformer.h[0].mlp.jitter_noise = 0.0, 0.2
    with pytest.raises(ms.ConfigError, match="jitter_noise=0.2"), ms.prefix_kept(model):
        pass
    with pytest.raises(ms.CheckpointError, match="cannot write a temporary file"):
        with ms.prefix_kept(model_of("llama"), tmp_path / "none"):
            pass
    model = model_of("llama")
    with ms.prefix_kept(model), pytest.raises(ms.ArchitectureError, match="forward of its own"):
        with ms.prefix_kept(model):
            pass
    model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(ms.ArchitectureError, match="re-entrant checkpointing does not go with a kept prefix"):
        with ms.prefix_kept(model):
            pass
    with pytest.raises(ms.ArchitectureError, match="has no sinks"):
        with ms.prefix_kept(tiny_llama(torch.float32)):
            pass


def test_a_full_disk_is_one_error(tmp_path) -> None:
    model, before = model_of("llama"), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with ms.prefix_kept(model, tmp_path), pytest.raises(ms.CheckpointError, match='dtype="bfloat16"'):
            model(**rows(0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("name", FAMILIES)
def test_in_all_architectures(name) -> None:
    model = tiny(name)
    ms.add_owners(model, OWNERS, config=ms.SinkConfig.for_finetuning(model, 2, neurons=16, layers=(1,)))
    randomise_sinks(model)
    ids = torch.tensor([ms.document_id(x, by="source") for x in (*OWNERS, "acme")])
    batch = {"input_ids": some_tokens(), "labels": some_tokens(), "document_ids": ids}
    wanted = model.train()(**batch).loss
    with ms.prefix_kept(model) as done:
        first, again = model(**batch).loss, model(**batch).loss
    assert (done.misses, done.hits, done.rows) == (1, 1, 3)
    assert torch.equal(first, wanted) and torch.allclose(again, wanted, atol=1e-6)
