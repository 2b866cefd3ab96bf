"""Generation: each row keeps its own sinks, and a key-value cache is not read while others are open than those that filled it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import A, B, sink_llama, tiny_llama, tokens
from torch import Tensor
from transformers import DynamicCache, StaticCache

import memsinks as ms
from memsinks.sinks import caches

PROMPTS = tokens(4, 5)
PAD = 1
OWNERS: list[set[int]] = [{A}, {B}, set(), {A, B}]


@pytest.fixture(scope="module")
def model():
    return sink_llama().eval()


def generate(model: Any, prompts: Tensor, **settings: Any) -> Tensor:
    settings = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": PAD} | settings
    return model.generate(prompts, attention_mask=torch.ones_like(prompts), **settings)


def row_by_row(model: Any, **settings: Any) -> list[Tensor]:
    """What each prompt gives alone, its owners' sinks open for all rows."""
    found = []
    for row, owners in enumerate(OWNERS):
        with ms.sinks_open(model, owners or -1):
            found.append(generate(model, PROMPTS[row : row + 1], **settings))
    return found


SEARCHES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "several sequences": {"num_beams": 4, "num_return_sequences": 2},
    "static": {"cache_implementation": "static"},
    "static beams": {"cache_implementation": "static", "num_beams": 3},
    "prompt in pieces": {"prefill_chunk_size": 2},
}


@pytest.mark.parametrize("search", SEARCHES)
def test_rows_keep_their_own_sinks(model, search) -> None:
    settings = SEARCHES[search]
    alone = row_by_row(model, **settings)
    with ms.sinks_open(model, OWNERS):
        together = generate(model, PROMPTS, **settings)
    assert torch.equal(together, torch.cat(alone))
    closed = generate(model, PROMPTS, **settings)
    count = len(closed) // 4
    differs = (together != closed).view(4, count, -1).any(-1).any(-1)
    assert differs.tolist() == [True, True, False, True]
    assert not torch.equal(together[:count, 5:], together[-count:, 5:])


@pytest.mark.parametrize("search", ["greedy", "beams"])
def test_rows_that_end_early_leave_the_others_as_they_are(model, search) -> None:
    settings = SEARCHES[search]
    end = int(row_by_row(model, **settings)[0][0, 7])
    alone = row_by_row(model, eos_token_id=end, **settings)
    lengths = {len(row[0]) for row in alone}
    assert len(lengths) > 1
    with ms.sinks_open(model, OWNERS):
        together = generate(model, PROMPTS, eos_token_id=end, **settings)
    for got, want in zip(together, alone, strict=True):
        assert torch.equal(got[: want.shape[1]], want[0])
        assert (got[want.shape[1] :] == PAD).all()


def test_sampled_sequences_of_a_row_have_its_sinks(model) -> None:
    torch.manual_seed(1)
    with ms.sinks_open(model, OWNERS):
        sampled = generate(model, PROMPTS, do_sample=True, num_return_sequences=3, top_k=1)
        greedy = generate(model, PROMPTS)
    assert torch.equal(sampled, greedy.repeat_interleave(3, 0))


@pytest.mark.parametrize("owners", OWNERS, ids=["A", "B", "none", "A and B"])
@pytest.mark.parametrize("way", ["prompt lookup", "itself", "stock", "early exit"])
def test_assisted_decoding_gives_the_greedy_text(model, way, owners) -> None:
    settings: dict[str, Any] = {
        "prompt lookup": {"prompt_lookup_num_tokens": 3},
        "itself": {"assistant_model": model},
        "stock": {"assistant_model": tiny_llama().eval()},
        "early exit": {"assistant_early_exit": 1},
    }[way]
    prompt = PROMPTS[:1].repeat(1, 2)
    with ms.sinks_open(model, owners or -1):
        assert torch.equal(generate(model, prompt, **settings), generate(model, prompt))


def test_beams_without_a_cache_are_refused_with_a_hint(model) -> None:
    with ms.sinks_open(model, OWNERS), pytest.raises(ms.DataError, match="need use_cache=True"):
        generate(model, PROMPTS, num_beams=2, use_cache=False)


def test_there_is_a_prompt_for_each_id(model) -> None:
    """Twice as many prompts as ids are no beams: each other row would have a neighbor's sinks."""
    ids = torch.tensor([A, B])
    for prompts in (PROMPTS, PROMPTS[:1]):
        with ms.sinks_open(model, ids), pytest.raises(ms.DataError, match=f"2 rows, there are {len(prompts)} prompts"):
            generate(model, prompts)
    with ms.sinks_open(model, ids), pytest.raises(ms.DataError, match="2 rows, there are 4 prompts"):
        model.generate(inputs_embeds=model.get_input_embeddings()(PROMPTS), max_new_tokens=2)
    with ms.sinks_open(model, ids):
        assert len(generate(model, PROMPTS[:2], num_beams=2, num_return_sequences=2)) == 4


def test_continuous_batching_is_refused_while_sinks_are_open(model) -> None:
    with ms.sinks_open(model, A), pytest.raises(ms.ArchitectureError, match="continuous batching"):
        model.generate_batch([[1, 2, 3]])


def test_positions_alone_leave_the_cache_as_it_is(model) -> None:
    """Only where they restart does a row hold several documents, which a cache would let see each other."""
    places = torch.arange(5)[None].expand(4, 5)
    stock = tiny_llama().eval()
    for one in (model, stock):
        assert one(input_ids=PROMPTS, position_ids=places).past_key_values.get_seq_length() == 5
    assert torch.equal(
        model(input_ids=PROMPTS, position_ids=places).logits, stock(input_ids=PROMPTS, position_ids=places).logits
    )
    packed = torch.tensor([[0, 1, 2, 0, 1]]).expand(4, 5)
    assert model(input_ids=PROMPTS, position_ids=packed).past_key_values is None


# Caches


@torch.no_grad()
def filled(model: Any, ids: Any, kind: str = "returned") -> Any:
    """A cache with the first four tokens of the first two prompts in it, `ids` open (None = closed)."""
    cache = {"returned": None, "given": DynamicCache(), "static": StaticCache(model.config, max_cache_len=32)}.get(kind)
    settings = {"use_cache": True, "past_key_values": cache, "return_dict": kind != "tuple"}
    if kind == "generated":
        with opened(model, ids):
            return generate(
                model, PROMPTS[:2, :2], max_new_tokens=3, past_key_values=DynamicCache(), return_dict_in_generate=True
            ).past_key_values
    with opened(model, ids):
        out = model(input_ids=PROMPTS[:2, :4], **settings)
    return out.past_key_values if kind != "tuple" else out[1]


def opened(model: Any, ids: Any) -> Any:
    return ms.sinks_closed(model) if ids is None else ms.sinks_open(model, ids)


@torch.no_grad()
def follow(model: Any, cache: Any, ids: Any) -> Tensor:
    with opened(model, ids):
        return model(input_ids=PROMPTS[:2, 4:], past_key_values=cache).logits


ROWS = torch.tensor([A, B])
OTHERS: dict[str, tuple[Any, Any, str]] = {
    "A, then B": (A, B, f"filled with the sinks of {A} open and is now used with the sinks of {B} open"),
    "closed, then A": (None, A, f"filled with sinks closed and is now used with the sinks of {A} open"),
    "A, then closed": (A, None, f"filled with the sinks of {A} open and is now used with sinks closed"),
    "none, then A": (-1, A, "filled with sinks closed"),
    "A, then more": (A, [A, B], f"used with the sinks of {A}, {B} open"),
    "rows turned": (ROWS, ROWS.flip(0), "the same ones open for other rows or tokens"),
    "rows, then all": (ROWS, A, "start with a fresh cache, or open the same sinks"),
    "tokens": ([[A]], torch.tensor([[A, A, B], [A, A, A]]), "filled with"),
}


@pytest.mark.parametrize("kind", ["returned", "tuple", "given", "static", "generated"])
@pytest.mark.parametrize("name", OTHERS)
def test_a_cache_of_other_sinks_is_refused(model, name, kind) -> None:
    before, now, message = OTHERS[name]
    cache = filled(model, before, kind)
    length = int(cache.get_seq_length())
    with pytest.raises(ms.DataError, match=message):
        follow(model, cache, now)
    with pytest.raises(ms.DataError, match=message), opened(model, now):
        generate(model, PROMPTS[:2].repeat(1, 2), past_key_values=copy.deepcopy(cache))
    assert int(cache.get_seq_length()) == length
    assert follow(model, cache, before).isfinite().all()


SAME: dict[str, tuple[Any, Any]] = {
    "A twice": (A, A),
    "closed twice": (None, None),
    "closed and none": (None, torch.tensor([-1, -1])),
    "none and closed": (-1, None),
    "for all, by row": (A, torch.tensor([A, A])),
    "sets in any order": ([{A, B}, {B}], [[B, A, B], [B]]),
    "the first tokens the same": (A, torch.tensor([[A, A, A, A, B]])),
    "the last column goes on": (torch.tensor([[A, B], [-1, A]]), torch.tensor([[A, B, B, B, B], [-1, A, A, A, B]])),
}


@pytest.mark.parametrize("kind", ["returned", "given", "static"])
@pytest.mark.parametrize("name", SAME)
def test_a_cache_of_the_same_sinks_goes_on(model, name, kind) -> None:
    before, now = SAME[name]
    with opened(model, now), torch.no_grad():
        want = model(input_ids=PROMPTS[:2]).logits[:, 4:]
    torch.testing.assert_close(follow(model, filled(model, before, kind), now), want)
    torch.testing.assert_close(follow(model, copy.deepcopy(filled(model, before, kind)), now), want)


@torch.no_grad()
def test_an_emptied_cache_is_fresh(model) -> None:
    cache = filled(model, A)
    cache.reset()
    for ids in (B, None, A):
        with opened(model, ids):
            got = model(input_ids=PROMPTS[:2], past_key_values=cache).logits
            assert torch.equal(got, model(input_ids=PROMPTS[:2]).logits)
        cache.reset()


def test_a_nested_block_does_not_read_the_cache_of_the_outer(model) -> None:
    with ms.sinks_open(model, A):
        cache = filled(model, A)
        with pytest.raises(ms.DataError, match="key-value cache"):
            follow(model, cache, B)
        assert follow(model, cache, A).isfinite().all()


def test_values_are_compared_once_for_a_generation(model, monkeypatch) -> None:
    calls = []
    same = caches._same
    monkeypatch.setattr(caches, "_same", lambda *x: calls.append(x) or same(*x))
    with ms.sinks_open(model, A):
        generate(model, PROMPTS)
    assert not calls
    cache = filled(model, A)
    with ms.sinks_open(model, A):
        generate(model, PROMPTS[:2], past_key_values=cache)
    assert len(calls) == 1
