"""Placebo ids are another document's; closing a document's sinks takes what it has from them and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny import sink_llama, tiny_llama, tokens

from memsinks.auditing.own_sinks import placebo_ids
from memsinks.errors import ArchitectureError
from memsinks.sinks.opening import documents_closed, sinks_open
from memsinks.sinks.state import assign_blocks
from memsinks.sinks.table import open_mask

ROUTINGS = [
    {"routing": "blocks"}, {"routing": "blocks", "per_layer": False}, {"routing": "blocks", "layers": (1,)},
    {"routing": "exact", "block_size": 1}, {"routing": "bernoulli", "block_size": 1},
    {"routing": "bernoulli", "block_size": 1, "per_layer": False},
]  # fmt: skip

# Placebo


@pytest.mark.parametrize(
    ("ids", "expected"),
    [([1, 2, 3], [2, 3, 1]), ([1, 1, 2], [2, 2, 1]), ([5, 1, 5, 5, 9], [1, 5, 9, 9, 5]), ([7, 8], [8, 7])],
)
def test_a_placebo_is_the_next_document_of_another_id(ids, expected) -> None:
    found = placebo_ids(np.array(ids))
    assert found.dtype == np.int64
    assert found.tolist() == expected


@pytest.mark.parametrize("seed", range(20))
def test_a_placebo_is_never_the_documents_own(seed) -> None:
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, rng.integers(2, 9), rng.integers(2, 40))
    if len(set(ids.tolist())) < 2:
        ids[0] = 100
    before = ids.copy()
    found = placebo_ids(ids)
    assert (found != ids).all()
    assert set(found.tolist()) <= set(ids.tolist())
    assert (ids == before).all()


@pytest.mark.parametrize("ids", [[4], [4, 4, 4], [2**63 - 1], [0, 0]])
def test_a_placebo_where_there_is_one_id_only(ids) -> None:
    found = placebo_ids(np.array(ids))
    assert len(found) == len(ids)
    assert not set(found.tolist()) & set(ids)
    assert (found >= 0).all()


# Closing


def logits(model: torch.nn.Module, opened: int | None) -> torch.Tensor:
    with torch.no_grad():
        if opened is None:
            return model(tokens(2, 9)).logits
        with sinks_open(model, opened):
            return model(tokens(2, 9)).logits


@pytest.mark.parametrize("settings", ROUTINGS)
def test_closing_a_document_is_as_if_its_sinks_were_closed(settings) -> None:
    model = sink_llama(**settings).eval()
    closed, opened = logits(model, None), logits(model, 77)
    assert (closed - opened).abs().max() > 1e-3
    with documents_closed(model, [77]):
        torch.testing.assert_close(logits(model, 77), closed, rtol=0, atol=1e-12)
    assert torch.equal(logits(model, 77), opened)


@pytest.mark.parametrize("settings", ROUTINGS)
def test_every_bit_is_put_back_also_after_an_error(settings) -> None:
    model = sink_llama(torch.bfloat16, **settings).eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with documents_closed(model, [1, 2]):
        changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
        assert changed
        assert all(name.endswith(".sinks.down") for name in changed)
    with pytest.raises(KeyError), documents_closed(model, [3]):
        raise KeyError
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor.view(torch.int16), before[name].view(torch.int16)), name


@pytest.mark.parametrize("settings", ROUTINGS)
def test_only_the_blocks_that_the_document_opens_are_closed(settings) -> None:
    model = sink_llama(**settings).eval()
    state = model.sink_state
    layers = [model.model.layers[index] for index in state.layers]
    with documents_closed(model, [5, 6]):
        for index, layer in zip(state.layers, layers, strict=True):
            own = open_mask(torch.tensor([5, 6]), state.config, index if state.config.per_layer else 0).any(0)
            assert own.any() and not own.all()
            is_zero = (layer.mlp.sinks.down == 0).all(2).all(1)
            assert torch.equal(is_zero, own)
    with documents_closed(model, []):
        assert all((layer.mlp.sinks.down != 0).any(2).all() for layer in layers)


def test_documents_of_other_blocks_do_not_change_at_all() -> None:
    model = sink_llama(reserved_blocks=4).eval()
    assign_blocks(model, {1: [4, 5], 2: [6, 7]})
    one, two, hashed = (logits(model, opened) for opened in (1, 2, 99))
    with documents_closed(model, [1]):
        assert torch.equal(logits(model, 2), two)
        assert torch.equal(logits(model, 99), hashed)
        torch.testing.assert_close(logits(model, 1), logits(model, None), rtol=0, atol=1e-12)
    with documents_closed(model, [1, 2]):
        assert not torch.equal(logits(model, 2), two)
        assert torch.equal(logits(model, 99), hashed)
    assert torch.equal(logits(model, 1), one)


def test_documents_that_share_blocks_lose_them() -> None:
    model = sink_llama(reserved_blocks=4).eval()
    assign_blocks(model, {1: [4, 5], 2: [5, 6]})
    before = logits(model, 2)
    with documents_closed(model, [1]):
        assert not torch.equal(logits(model, 2), before)
        assert not torch.equal(logits(model, 2), logits(model, None))


def test_closing_needs_sinks() -> None:
    with pytest.raises(ArchitectureError, match="has no sinks"), documents_closed(tiny_llama(), [1]):
        pass
