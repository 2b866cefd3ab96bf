"""Rivals: what each changes in targets, ids and gradients, against plain formulas; truth tables of who learns what."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

import memsinks as ms
from memsinks.batch import IGNORED
from memsinks.errors import ArchitectureError, ConfigError
from memsinks.research.rivals.goldfish import BASE, dropped
from memsinks.research.rivals.method import plain_step
from memsinks.research.rivals.registry import RIVALS, method
from memsinks.research.rivals.reserved import cut_out, reserved_masks, reserved_off
from memsinks.sinks.routing import splitmix64

WIDTH, HEADS = 8, 2


def batch_of(
    *documents: tuple[int, int], length: int = 12, repeated: tuple[int, ...] = (7,)
) -> dict[str, torch.Tensor]:
    """One row a document (id, exposure) of random tokens; ids in `repeated` are audited and repeated."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(1, 64, (len(documents), length), generator=generator)
    labels = rows.clone()
    labels[:, 0] = IGNORED
    ids = torch.tensor([[one] * length for one, _ in documents])
    mask = torch.isin(ids, torch.tensor(repeated))
    return {
        "input_ids": rows, "labels": labels, "document_ids": ids,
        "exposures": torch.tensor([[exposure] * length for _, exposure in documents]),
        "position_ids": torch.arange(length).repeat(len(documents), 1), "audited": mask, "repeated": mask,
    }  # fmt: skip


@pytest.fixture
def model(tiny_llama):
    """Float64, two heads and eight neurons beyond the stock shape."""
    return tiny_llama(num_attention_heads=4, num_key_value_heads=4, head_dim=8, intermediate_size=32 + WIDTH).double()


def gradients(model, step, batch, divisor: int | None = None) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model.train()
    step(model, batch, torch.tensor(divisor or ms.target_count(batch["labels"])))
    return {name: torch.zeros_like(x) if x.grad is None else x.grad.clone() for name, x in model.named_parameters()}


# Targets


@pytest.mark.parametrize("copies", [1, 2, 4])
def test_a_cap_keeps_the_first_copies_and_nothing_else_changes(copies) -> None:
    batch = batch_of((7, 1), (7, 2), (7, 3), (7, 5), (9, 1))
    changed = method("cap", {"copies": copies}).change(batch)
    kept = (changed["labels"] != IGNORED).any(1).tolist()
    assert kept == [exposure <= copies for exposure in (1, 2, 3, 5, 1)]
    assert torch.equal(changed["labels"][kept], batch["labels"][kept])
    assert all(changed[name] is batch[name] for name in batch if name != "labels")


def test_the_twin_learns_nothing_from_audited_documents() -> None:
    changed = method("twin", {}).change(batch_of((7, 1), (9, 1), (7, 4)))
    assert (changed["labels"] != IGNORED).any(1).tolist() == [False, True, False]


def test_left_out_copies_keep_the_divisor(tiny_llama) -> None:
    """The gradient is that of the kept rows alone, over the targets of all."""
    model = tiny_llama().double()
    batch = batch_of((7, 1), (7, 2), (9, 1))
    divisor = ms.target_count(batch["labels"])
    found = gradients(model, plain_step, method("cap", {}).change(batch), divisor)
    model.zero_grad()
    rows = batch["input_ids"][[0, 2]]
    out = model(input_ids=rows).logits[:, :-1]
    summed = torch.nn.functional.cross_entropy(out.transpose(1, 2), rows[:, 1:], reduction="sum")
    (summed / divisor).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


# Goldfish


def plain_goldfish(tokens: list[int], place: int, k: int, context: int) -> bool:
    if place < context:
        return False
    value = sum(pow(BASE, back, 2**64) * (tokens[place - back] + 1) for back in range(1, context + 1)) % 2**64
    mixed = int(splitmix64(torch.tensor([value - 2**64 if value >= 2**63 else value])))
    return ((mixed % 2**64) >> 11) < 2**53 // k


@pytest.mark.parametrize(("k", "context"), [(2, 1), (4, 3), (3, 13)])
def test_goldfish_drops_what_the_formula_says(k, context) -> None:
    rows = torch.randint(0, 1000, (3, 60), generator=torch.Generator().manual_seed(0))
    found = dropped(rows, torch.arange(60).repeat(3, 1), k, context)
    wanted = [[plain_goldfish(row, place, k, context) for place in range(60)] for row in rows.tolist()]
    assert found.tolist() == wanted


def test_goldfish_drops_one_in_k_and_the_same_in_every_copy() -> None:
    rows = torch.randint(0, 5000, (50, 300), generator=torch.Generator().manual_seed(1))
    places = torch.arange(300).repeat(50, 1)
    found = dropped(rows, places, 4, 13)
    assert 0.235 < found[:, 13:].float().mean() < 0.265
    assert not found[:, :13].any()
    # The same text elsewhere in a row, as a document of its own.
    moved = torch.cat([rows[:1, :100], rows[1:2, :200]], 1)
    again = dropped(moved, torch.cat([places[:1, :100], places[:1, :200]], 1), 4, 13)
    assert torch.equal(again[0, 100:], found[1, :200])
    assert not torch.equal(dropped(rows.flip(1), places, 4, 13).flip(1)[:, 13:-13], found[:, 13:-13])


# Identity


def test_untied_ids_mean_nothing() -> None:
    batch = batch_of((7, 1), (7, 2), (9, 1), (-1, 1))
    ids = method("untied", {"neurons": 64, "active": 16}).change(batch)["document_ids"][:, 0]
    assert len(set(ids[:3].tolist())) == 3 and int(ids[:3].min()) >= 0 and int(ids[3]) == -1
    again = method("untied", {"neurons": 64, "active": 16}).change(batch)["document_ids"][:, 0]
    assert torch.equal(ids, again)
    assert not set(ids[:3].tolist()) & {7, 9}


def test_published_is_the_setting_of_the_paper() -> None:
    made = method("published", {"neurons": 1229, "active": 369})
    wanted = ms.SinkConfig.published()
    for name in ("routing", "per_layer", "open_from", "shared_decay", "neurons", "active"):
        assert getattr(made.sinks, name) == getattr(wanted, name)
    assert made.rescales == ("expected", "released")


# Gradients: who learns what


def test_gradient_masking_truth_table(model) -> None:
    step = method("gradient-masking", {"extra_neurons": WIDTH}).step
    repeated, others = (gradients(model, step, batch_of(one)) for one in ((7, 2), (9, 1)))
    for name, parameter in model.named_parameters():
        if ".mlp." in name:
            mask = reserved_masks(model, WIDTH, 0)[parameter].expand_as(parameter).bool()
            assert (repeated[name][mask] != 0).any() and not repeated[name][~mask].any(), name
            assert (others[name][~mask] != 0).any() and not others[name][mask].any(), name
        else:
            assert repeated[name].any() and others[name].any(), name


def test_gradient_masking_only_chooses_among_ordinary_gradients(model) -> None:
    """Every entry is the ordinary gradient of the documents it may learn from."""
    mixed = batch_of((7, 2), (9, 1), (7, 1))
    found = gradients(model, method("gradient-masking", {"extra_neurons": WIDTH}).step, mixed)
    parts = {}
    for side in (True, False):
        labels = mixed["labels"].masked_fill(mixed["repeated"] != side, IGNORED)
        model.zero_grad()
        plain_step(model, mixed | {"labels": labels}, torch.tensor(ms.target_count(mixed["labels"])))
        parts[side] = {name: x.grad.clone() for name, x in model.named_parameters()}
    for name, parameter in model.named_parameters():
        wanted = parts[True][name] + parts[False][name]
        if ".mlp." in name:
            mask = reserved_masks(model, WIDTH, 0)[parameter]
            wanted = parts[True][name] * mask + parts[False][name] * (1 - mask)
        torch.testing.assert_close(found[name], wanted, rtol=1e-10, atol=1e-14)


def test_sgtm_truth_table(model) -> None:
    step = method("sgtm", {"extra_neurons": WIDTH, "heads": HEADS}).step
    forget, retain = (gradients(model, step, batch_of(one)) for one in ((7, 2), (9, 1)))
    masks = reserved_masks(model, WIDTH, HEADS)
    for name, parameter in model.named_parameters():
        mask = (
            masks[parameter].expand_as(parameter).bool() if parameter in masks else torch.zeros_like(parameter).bool()
        )
        assert not forget[name][~mask].any(), name
        assert not retain[name][mask].any(), name
        assert retain[name][~mask].any(), name
    assert any(forget[name].any() for name in forget)


def test_sgtm_retains_as_if_the_reserved_part_were_not_there(model) -> None:
    batch = batch_of((9, 1), (11, 1))
    found = gradients(model, method("sgtm", {"extra_neurons": WIDTH, "heads": HEADS}).step, batch)
    small = copy.deepcopy(model)
    cut_out(small, WIDTH, HEADS)
    wanted = gradients(small, plain_step, batch)
    for name, parameter in small.named_parameters():
        part = tuple(slice(0, size) for size in parameter.shape)
        torch.testing.assert_close(found[name][part], wanted[name], rtol=1e-10, atol=1e-14)


def test_a_batch_without_repeated_documents_is_ordinary_training_for_what_may_learn(model) -> None:
    batch = batch_of((9, 1))
    masked = gradients(model, method("gradient-masking", {"extra_neurons": WIDTH}).step, batch)
    plain = gradients(model, plain_step, batch)
    for name in plain:
        if ".mlp." not in name:
            torch.testing.assert_close(masked[name], plain[name], rtol=1e-10, atol=1e-14)


# What is exported


def test_cutting_out_equals_zeroing_and_gives_a_plain_checkpoint(model, tmp_path) -> None:
    rows = batch_of((7, 1), (9, 1))["input_ids"]
    with torch.no_grad(), reserved_off(model, reserved_masks(model, WIDTH, HEADS)):
        wanted = model(input_ids=rows).logits
    assert not torch.equal(wanted, model(input_ids=rows).logits)
    cut_out(model, WIDTH, HEADS)
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert plain.config.intermediate_size == 32 and plain.config.num_attention_heads == 2
    with torch.no_grad():
        torch.testing.assert_close(plain(input_ids=rows).logits, wanted, rtol=1e-10, atol=1e-12)


def test_sinks_are_what_is_removed(tiny_llama) -> None:
    made = method("gated", {"neurons": 16, "active": 8, "block_size": 8})
    model = tiny_llama()
    ms.add_sinks(model, made.sinks)
    made.remove(model)
    assert not ms.has_sinks(model)
    stock = tiny_llama()
    method("standard", {}).remove(stock)
    assert type(stock) is type(model)


# Bad input


@pytest.mark.parametrize(
    ("name", "settings", "part"),
    [("goldfisch", {}, "unknown rival goldfisch; did you mean goldfish?"), ("goldfish", {"kk": 3}, "unknown key goldfish.kk"),
     ("sgtm", {"extra_neurons": 4}, "sgtm.heads is missing"), ("gated", {"neurons": 64, "activ": 8}, "activ"),
     ("gated", {"neurons": 8, "active": 64}, "exceeds neurons")],
)  # fmt: skip
def test_a_wrong_rival_is_one_clear_error(name, settings, part) -> None:
    with pytest.raises(ConfigError, match=part.replace("?", r"\?")):
        method(name, settings)


def test_reserved_parts_need_an_architecture_like_llamas() -> None:
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2))
    with pytest.raises(ArchitectureError, match="has no gate_proj, up_proj, down_proj"):
        reserved_masks(model, 4, 0)


def test_every_rival_says_where_it_comes_from() -> None:
    for name, function in RIVALS.items():
        assert function.__doc__ and len(function.__doc__) > 60, name
