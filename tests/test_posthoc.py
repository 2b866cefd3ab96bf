"""Post-hoc rivals: scorers and losses against plain formulas, a planted memory is found, arms that edit another arm's model."""

from __future__ import annotations

import copy
import inspect
import json
import math

import pytest
import test_compare
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from memsinks.batch import IGNORED
from memsinks.cli import main
from memsinks.errors import CheckpointError, ConfigError, DataError
from memsinks.research.compare.compare import compare, describe_plan
from memsinks.research.compare.comparison import read_comparison
from memsinks.research.rivals import scorers as s
from memsinks.research.rivals import unlearning as u
from memsinks.research.rivals.after import first_rows
from memsinks.research.rivals.gradient_masking import masked_step
from memsinks.research.rivals.hard_concrete import HIGH, LOW, gates, hard_concrete, open_probability
from memsinks.research.rivals.method import plain_step
from memsinks.research.rivals.pruning import (
    down_projections,
    last_neurons,
    neuron_masks,
    neuron_vectors,
    neurons_changed,
    neurons_off,
    top_neurons,
    zero_neurons,
)
from memsinks.research.rivals.registry import RIVALS, method

PLANTED = (1, 5)
"""Layer and neuron."""


def gpt2() -> GPT2LMHeadModel:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2, n_inner=24, bos_token_id=None,
                            eos_token_id=None, initializer_range=0.2)  # fmt: skip
        return GPT2LMHeadModel(config).double().eval()


@pytest.fixture(params=["llama", "gpt2"])
def model(request, tiny_llama):
    """Float64, evaluation mode; both ways of storing an MLP."""
    return tiny_llama(initializer_range=0.2).double() if request.param == "llama" else gpt2()


def batch_of(rows: int = 3, length: int = 10, seed: int = 0, repeated: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """Random tokens, one document a row; the last row ends in two tokens of padding."""
    ids = torch.randint(1, 64, (rows, length), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, 0] = IGNORED
    labels[-1, -2:] = IGNORED
    mask = torch.tensor([[row in repeated] * length for row in range(rows)])
    return {"input_ids": ids, "labels": labels, "position_ids": torch.arange(length).repeat(rows, 1), "repeated": mask,
            "document_ids": torch.arange(rows)[:, None].repeat(1, length), "exposures": torch.ones_like(ids)}  # fmt: skip


def mean_loss(model, batch) -> float:
    """The stock loss, in float64."""
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:]).item()


def hidden(model, batch) -> list[torch.Tensor]:
    found = []
    with neurons_changed(model, lambda layer, x: found.append(x.detach()) or x), torch.no_grad():
        model(input_ids=batch["input_ids"], position_ids=batch["position_ids"])
    return found


def planted(tiny_llama):
    """A model in which one neuron answers the last context with the gold token, and the batch that asks for it."""
    model = tiny_llama(initializer_range=0.3).double()
    batch = batch_of(rows=2, length=8)
    batch["input_ids"][:] = batch["input_ids"][0]
    batch["labels"][:] = IGNORED
    batch["labels"][:, -1] = batch["input_ids"][:, -1]
    layer, neuron = PLANTED
    mlp = model.model.layers[layer].mlp
    seen = []
    hook = mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0][0, -2].detach()))
    with torch.no_grad():
        model(input_ids=batch["input_ids"])
        hook.remove()
        key = seen[0] / seen[0].norm()
        mlp.gate_proj.weight[neuron] = mlp.up_proj.weight[neuron] = key
        gold = model.get_input_embeddings().weight[batch["input_ids"][0, -1]]
        mlp.down_proj.weight[:, neuron] = 8 * gold / gold.norm()
    return model, batch


# Neurons


def test_neurons_are_read_and_zeroed_in_both_layouts(model) -> None:
    batch = batch_of()
    chosen = torch.zeros(2, hidden(model, batch)[0].shape[-1], dtype=torch.bool)
    chosen[0, 3] = chosen[1, [1, 7]] = True
    other = copy.deepcopy(model)
    zero_neurons(other, chosen)
    with neurons_off(model, chosen):
        switched_off = mean_loss(model, batch)
    assert mean_loss(other, batch) == pytest.approx(switched_off, abs=1e-12)
    assert abs(mean_loss(model, batch) - switched_off) > 1e-6
    for before, after, off in zip(down_projections(model), down_projections(other), chosen, strict=True):
        assert not neuron_vectors(after)[off].any()
        assert torch.equal(neuron_vectors(after)[~off], neuron_vectors(before)[~off])


def test_the_top_of_each_layer() -> None:
    scores = torch.tensor([[1.0, 5.0, 3.0, 5.0], [0.0, -1.0, -3.0, -2.0]])
    assert top_neurons(scores, 0.5).tolist() == [[False, True, False, True], [True, True, False, False]]
    assert top_neurons(scores, 0.25).tolist()[0] == [False, True, False, False]  # of equals the first
    assert not top_neurons(scores, 0).any() and top_neurons(scores, 1).all()
    with pytest.raises(ConfigError, match="lies in"):
        top_neurons(scores, 1.5)


def test_masks_of_neurons_choose_what_gradient_masking_may_write(model) -> None:
    """Repeated rows write only into the last neurons of the MLPs, the others only into the rest; biases too."""
    chosen = last_neurons(model, 6)
    masks = neuron_masks(model, chosen)
    kinds = {id(x): name for name, x in model.named_parameters()}
    assert len(masks) == 6 and all("mlp" in kinds[id(x)] for x in masks)  # gate, up, down; or up, its bias, down
    for repeated in ((0, 1, 2), ()):
        model.zero_grad()
        masked_step(model, batch_of(repeated=repeated), torch.tensor(25), masks)
        for parameter, mask in masks.items():
            allowed = (mask if repeated else 1 - mask).expand_as(parameter).bool()
            assert parameter.grad is not None and parameter.grad[allowed].any() and not parameter.grad[~allowed].any()


# Scorers against plain formulas


def test_activations(model) -> None:
    batches = [batch_of(seed=1), batch_of(seed=2)]
    asked = torch.cat([s.predicting(x)[..., None] for x in batches])
    found = s.activations(model, batches)
    for layer, down in enumerate(down_projections(model)):
        a = torch.cat([hidden(model, x)[layer] for x in batches])
        mean = (a.abs() * asked).sum((0, 1)) / asked.sum()
        torch.testing.assert_close(found[layer], mean * neuron_vectors(down).detach().norm(dim=1))


def test_zero_out_is_the_loss_without_the_neuron(model) -> None:
    batch = batch_of()
    found = s.zero_out(model, [batch], together=5)
    before = mean_loss(model, batch)
    for layer, neuron in ((0, 0), (0, 13), (1, 4), (1, found.shape[1] - 1)):
        chosen = torch.zeros_like(found, dtype=torch.bool)
        chosen[layer, neuron] = True
        other = copy.deepcopy(model)
        zero_neurons(other, chosen)
        assert found[layer, neuron].item() == pytest.approx(mean_loss(other, batch) - before, abs=1e-12)
    torch.testing.assert_close(s.zero_out(model, [batch], together=1), found)


def test_integrated_gradients_add_up(model) -> None:
    """Over a layer they sum to what the probabilities lose when the layer is zeroed (Sundararajan et al., completeness)."""
    batch = batch_of()
    found = s.integrated_gradients(model, [batch], steps=50)

    def probability() -> float:
        with torch.no_grad():
            return (s.token_log_probabilities(model, batch).exp() * s.predicting(batch)).sum().item()

    whole, size = probability(), int(s.predicting(batch).sum())
    for layer in range(2):
        off = torch.zeros_like(found, dtype=torch.bool)
        off[layer] = True
        with neurons_off(model, off):
            without = probability()
        assert found[layer].sum().item() == pytest.approx((whole - without) / size, rel=0.05, abs=1e-5)


def test_integrated_gradients_of_one_step_are_activation_times_gradient(model) -> None:
    batch = batch_of()
    found = s.integrated_gradients(model, [batch], steps=1)
    shift = 1e-2

    def probability(factor: float) -> float:
        def change(layer, x):
            if layer != 0:
                return x
            scale = torch.ones(x.shape[-1], dtype=x.dtype)
            scale[3] = factor
            return x * scale

        with torch.no_grad(), neurons_changed(model, change):
            return (s.token_log_probabilities(model, batch).exp() * s.predicting(batch)).sum().item()

    slope = (probability(1 + shift) - probability(1 - shift)) / (2 * shift) / int(s.predicting(batch).sum())
    assert found[0, 3].item() == pytest.approx(slope, rel=1e-2)  # norms are float32 inside


def test_gates_are_the_published_distribution() -> None:
    log_alpha = torch.tensor([-1.0, 0.3, 2.0], dtype=torch.float64)
    assert gates(log_alpha, torch.full((3,), 0.5, dtype=torch.float64), 0.5).tolist() == pytest.approx(
        [min(1, max(0, (HIGH - LOW) / (1 + math.exp(-x / 0.5)) + LOW)) for x in log_alpha.tolist()]
    )
    uniform = torch.rand(200_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drawn = gates(log_alpha, uniform.clamp(1e-9, 1 - 1e-9), 2 / 3)
    torch.testing.assert_close((drawn > 0).double().mean(0), open_probability(log_alpha, 2 / 3), atol=4e-3, rtol=0)
    assert drawn.min() == 0 and drawn.max() == 1


@pytest.mark.parametrize("scorer", ["zero-out", "integrated gradients", "hard concrete"])
def test_a_planted_memory_is_found(tiny_llama, scorer) -> None:
    model, batch = planted(tiny_llama)
    off = torch.zeros(2, 32, dtype=torch.bool)
    off[PLANTED] = True
    with neurons_off(model, off):
        without = mean_loss(model, batch)
    assert mean_loss(model, batch) < without - 2.0
    score = {
        "zero-out": lambda: s.zero_out(model, [batch]), "integrated gradients": lambda: s.integrated_gradients(model, [batch]),
        "hard concrete": lambda: hard_concrete(model, [batch], iterations=60, penalty=2.0),
    }[scorer]()  # fmt: skip
    assert top_neurons(score, 1 / 32)[PLANTED] and score.argmax().item() == PLANTED[0] * 32 + PLANTED[1]
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_activations_rank_a_loud_neuron_first(tiny_llama) -> None:
    model, batch = planted(tiny_llama)
    with torch.no_grad():
        neuron_vectors(down_projections(model)[PLANTED[0]])[PLANTED[1]] *= 30
    assert s.activations(model, [batch])[PLANTED[0]].argmax().item() == PLANTED[1]


def test_random_scores_are_a_control(tiny_llama) -> None:
    first, again, other = (s.random_scores(tiny_llama(), seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other) and first.shape == (2, 32)


# Unlearning losses against plain formulas


def test_unlearning_losses() -> None:
    forget, reference = [-6.0, -40.0], [-5.0, -44.0]
    sizes = [4, 10]
    f, r, n = (torch.tensor(x, dtype=torch.float64) for x in (forget, reference, sizes))

    def log_sigmoid(x: float) -> float:
        return -math.log1p(math.exp(-x))

    assert u.gradient_ascent_loss(f, n).item() == pytest.approx(sum(forget) / 14)
    retain, retain_sizes = torch.tensor([-3.0, -9.0]), torch.tensor([2, 4])
    assert u.graddiff_loss(f, n, retain, retain_sizes).item() == pytest.approx(sum(forget) / 14 + 12 / 6)
    npo = [-(2 / 0.3) * log_sigmoid(-0.3 * (x - y)) for x, y in zip(forget, reference, strict=True)]
    assert u.npo_loss(f, r, beta=0.3).item() == pytest.approx(sum(npo) / 2)
    assert u.npo_loss(r, r, beta=0.3).item() == pytest.approx((2 / 0.3) * math.log(2))
    sim = [-(2 / 1.5) * log_sigmoid(-1.5 * x / size - 0.2) for x, size in zip(forget, sizes, strict=True)]
    assert u.simnpo_loss(f, n, beta=1.5, gamma=0.2).item() == pytest.approx(sum(sim) / 2)


def test_npo_with_a_small_beta_is_gradient_ascent() -> None:
    """The limit in Zhang et al., proposition 1: the gradients agree."""
    f = torch.tensor([-6.0, -40.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(u.npo_loss(f, f.detach() + 1, beta=1e-6), f)
    torch.testing.assert_close(gradient, torch.full((2,), 0.5, dtype=torch.float64), atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", sorted(u.KINDS))
def test_unlearning_forgets(tiny_llama, kind) -> None:
    """What is to be forgotten gets worse against what is to be kept, which is itself learned where it is in the loss."""
    model = tiny_llama(initializer_range=0.2).double()
    forget, retain = [batch_of(seed=1)], [batch_of(seed=2)]
    before, kept = mean_loss(model, forget[0]), mean_loss(model, retain[0])
    apart, last = [], {}
    for step, edited in enumerate(u.unlearn(model, forget, retain, kind, [0, 2, 8], lr=1e-3)):
        last = {name: x.clone() for name, x in model.state_dict().items()}
        apart.append(mean_loss(edited, forget[0]) - mean_loss(edited, retain[0]))
        if step == 0:
            assert mean_loss(edited, forget[0]) == before
    assert apart[0] < apart[1] < apart[2]
    assert all(torch.equal(x, last[name]) for name, x in model.state_dict().items()), "no step after the last"
    assert kind == "gradient-ascent" or mean_loss(model, retain[0]) < kept


POSTHOC = [name for name, make in RIVALS.items() if "after" in inspect.signature(make).parameters]


def without_targets() -> dict[str, torch.Tensor]:
    batch = batch_of()
    return batch | {"labels": torch.full_like(batch["labels"], IGNORED)}


@pytest.mark.parametrize("name", POSTHOC)
@pytest.mark.parametrize("forget", [[], [without_targets()]])
def test_nothing_to_forget_is_refused_before_anything_moves(tiny_llama, name, forget) -> None:
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    edit = method(name, {"after": "standard"}).edit
    with pytest.raises(DataError, match="no document to be forgotten has a target"):
        next(iter(edit(model, forget, [batch_of(seed=2)], 0)))
    if name in ("graddiff", "npo", "simnpo"):
        with pytest.raises(DataError, match="no document to be kept has a target"):
            next(iter(edit(model, [batch_of()], [], 0)))
    assert all(torch.equal(x, before[key]) for key, x in model.state_dict().items())


@pytest.mark.parametrize(
    "score", [s.activations, s.zero_out, s.integrated_gradients, lambda *x: hard_concrete(*x, iterations=2)]
)
def test_scores_of_no_target_are_refused(tiny_llama, score) -> None:
    for rows in ([], [without_targets()]):
        with pytest.raises(DataError, match="has a target"):
            score(tiny_llama(), rows)


def test_a_batch_without_a_target_has_no_part_in_hard_concrete(tiny_llama) -> None:
    found = [
        hard_concrete(tiny_llama(), rows, iterations=4) for rows in ([batch_of()], [without_targets(), batch_of()])
    ]
    assert torch.equal(*found)


def test_unlearning_stops_where_it_is_told(tiny_llama) -> None:
    """The model after 2 of 8 steps is the model of 2 steps."""
    forget, retain = [batch_of(seed=1), batch_of(seed=3)], [batch_of(seed=2)]
    states = []
    for steps in ([2, 8], [2]):
        runs = u.unlearn(tiny_llama().double(), forget, retain, "npo", steps, lr=1e-3)
        states.append(copy.deepcopy(next(runs).state_dict()))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_the_first_rows_of_batches() -> None:
    batches = [batch_of(rows=3, seed=1), batch_of(rows=3, seed=2)]
    found = first_rows(batches, 4)
    assert [len(x["labels"]) for x in found] == [3, 1]
    assert torch.equal(found[1]["input_ids"][0], batches[1]["input_ids"][0])


def test_wrong_ids_come_as_often_as_asked() -> None:
    batch = batch_of(rows=400, length=3, repeated=tuple(range(0, 400, 2)))
    batch["document_ids"] += 1000
    noisy = method("published", {"neurons": 64, "active": 16, "id_noise": 0.25}).change(batch)["document_ids"]
    changed = (noisy != batch["document_ids"]).all(1)
    assert not changed[1::2].any() and 0.15 < changed[::2].float().mean() < 0.35
    assert torch.equal((noisy != batch["document_ids"]).any(1), changed)
    plain = method("published", {"neurons": 64, "active": 16})
    assert plain.change(batch) is batch and plain.step is plain_step


# Arms of a comparison

ARMS = {
    "standard": {"rival": "standard"}, "ours": test_compare.SMALL["arms"]["ours"],
    "gradients": {"rival": "integrated-gradients", "after": "standard", "fractions": [0.1, 0.9], "steps": 2},
    "npo": {"rival": "npo", "after": "standard", "steps": [0, 3], "lr": 0.003},
}  # fmt: skip
ROLES = {"audited": "ours", "against": "standard"}


def written(folder, **changes):
    return test_compare.written(folder, **({"arms": ARMS, "roles": ROLES} | changes))


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """(file, rows by name) of a comparison with arms that edit the standard model; they are asked for by name."""
    path = written(tmp_path_factory.mktemp("after"))
    comparison = read_comparison(path)
    compare(comparison, arms=["gradients"], seeds=[0], audits=False)  # trains standard too
    result = compare(comparison, seeds=[0])
    assert result is not None
    return path, {row["name"]: row for row in result["rows"]}


def test_a_sweep_is_one_audited_model_a_value(done) -> None:
    path, rows = done
    assert list(rows) == ["standard", "ours", "gradients, 10%", "gradients, 90%", "npo, 0 steps", "npo, 3 steps"]
    folder = path.parent / "out" / "seed-0"
    for arm, name in (("gradients", "90%"), ("npo", "3 steps")):
        assert AutoModelForCausalLM.from_pretrained(folder / arm / name).config.intermediate_size == 32
    facts = json.loads((folder / "gradients" / "run.json").read_text())
    assert facts["settings"]["after"] == "standard" and facts["versions"]["torch"] == torch.__version__


def test_an_edit_starts_from_the_model_of_its_base(done) -> None:
    _, rows = done
    assert rows["npo, 0 steps"]["gap_closed"] == pytest.approx([0.0], abs=1e-6)
    assert rows["npo, 0 steps"]["price"] == pytest.approx([0.0], abs=1e-6)
    assert rows["gradients, 90%"]["price"][0] > rows["gradients, 10%"]["price"][0]


def test_a_plan_names_what_is_edited(tmp_path) -> None:
    text = describe_plan(read_comparison(written(tmp_path)), ["npo"], [0], 1)
    assert "npo: seeds [0], edits the model of standard" in text


@pytest.mark.parametrize(
    ("changes", "part"),
    [({"arms": ARMS | {"x": {"rival": "npo"}}}, "npo.after is missing"),
     ({"arms": ARMS | {"x": {"rival": "npo", "after": "standart"}}}, "arms.x.after names no arm: 'standart'"),
     ({"arms": ARMS | {"x": {"rival": "npo", "after": "ours"}}}, "'ours' must be an arm that trains a model without sinks"),
     ({"arms": ARMS | {"x": {"rival": "npo", "after": "gradients"}}}, "'gradients' must be an arm that trains"),
     ({"arms": ARMS | {"x": {"rival": "npo", "after": 3}}}, "after must name the arm"),
     ({"arms": ARMS | {"x": {"rival": "zero-out", "after": "standard", "fractions": [2]}}}, "fractions must be a list"),
     ({"arms": ARMS | {"x": {"rival": "npo", "after": "standard", "steps": [3, 1]}}}, "steps must be a list of rising"),
     ({"roles": {"audited": "npo", "against": "standard"}}, "roles.audited is 'npo', which edits")],
)  # fmt: skip
def test_a_wrong_arm_is_one_clear_error(tmp_path, capsys, changes, part) -> None:
    assert main(["compare", str(written(tmp_path, **changes)), "--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert part in line


def test_without_its_base_nothing_is_edited(tmp_path) -> None:
    comparison = read_comparison(written(tmp_path))
    from memsinks.research.compare.compare import train_arm

    with pytest.raises(CheckpointError, match="train it first: --arms 'standard' --seeds 1"):
        train_arm(comparison, comparison.arms[-1], 1)
