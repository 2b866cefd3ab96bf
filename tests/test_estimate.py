"""The estimate's figures against the real thing, at sizes where the real thing can be measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from memsinks.cli import main
from memsinks.removal.export import export
from memsinks.research.compare.arm import recipe_of_arm
from memsinks.research.compare.comparison import read_comparison
from memsinks.runs import estimate_table
from memsinks.runs.estimate import estimate, flops, meta_model, saved_bytes, size_of
from memsinks.runs.estimate_table import format_estimate
from memsinks.runs.model import build_model
from memsinks.runs.prepare import prepare
from memsinks.runs.recipe import Recipe, parse_recipe
from memsinks.sinks import run as sink_run
from memsinks.sinks.kernels import choose_path
from memsinks.sinks.state import has_sinks
from memsinks.training.optim import optimizer_and_schedule

ROOT = Path(__file__).parents[1]
ROWS, LENGTH = 4, 32
MODELS = {
    "llama": {
        "model_type": "llama", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "gpt2": {
        "model_type": "gpt2", "vocab_size": 320, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_inner": 128, "resid_pdrop": 0.0,
        "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    },
    "untied": {
        "model_type": "qwen3", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 32, "tie_word_embeddings": False,
    },
}  # fmt: skip
SINKS = {
    "none": None,
    "gated": {"neurons": 128, "active": 32, "block_size": 16, "shared": "decay"},
    "published": {
        "neurons": 64, "active": 20, "routing": "bernoulli", "per_layer": False, "open_from": 1, "shared_decay": 0.0,
    },
}  # fmt: skip


class Tokens:
    bos_token_id = eos_token_id = pad_token_id = None

    def __len__(self) -> int:
        return 320


@pytest.fixture(autouse=True)
def _paths_of_a_gpu(monkeypatch) -> None:
    """A real forward takes the path that it would take on a GPU."""
    monkeypatch.setattr(
        sink_run, "choose_path", lambda config, dtype, _: choose_path(config, dtype, torch.device("cuda"))
    )


def recipe_of(model: str, sinks: str, **training) -> Recipe:
    settings = {"length": LENGTH, "batch_rows": ROWS} | training
    return parse_recipe(
        {"output": "x", "model": {"config": MODELS[model]}, "sinks": SINKS[sinks], "training": settings}
    )


def forward(model: torch.nn.Module, bf16: bool = False) -> torch.Tensor:
    """The loss of packed rows in which every token opens its sinks."""
    tokens = torch.randint(0, 320, (ROWS, LENGTH))
    places = torch.arange(LENGTH).repeat(ROWS, 1)
    places[:, LENGTH // 2 :] -= LENGTH // 2
    more = {}
    if has_sinks(model):
        more = {"document_ids": torch.arange(5, 5 + ROWS), "exposures": torch.full((ROWS,), 2)}
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return model(input_ids=tokens, labels=tokens, position_ids=places, use_cache=False, **more).loss


@pytest.mark.parametrize("sinks", SINKS)
@pytest.mark.parametrize(("kind", "bf16", "again"), [("llama", True, False), ("llama", False, True), ("gpt2", False, False),
                                                     ("gpt2", True, True), ("untied", False, False)])  # fmt: skip
def test_saved_bytes_are_those_of_a_real_forward(kind, sinks, bf16, again) -> None:
    recipe = recipe_of(kind, sinks, precision="bf16" if bf16 else "fp32", gradient_checkpointing=again)
    model = build_model(recipe, Tokens()).train()  # type: ignore[arg-type]
    own = {x.untyped_storage()._cdata for x in model.parameters()}
    seen = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        if x.untyped_storage()._cdata not in own:
            seen[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        loss = forward(model, bf16)
    assert loss.requires_grad
    assert saved_bytes(meta_model(recipe), ROWS, LENGTH, bf16, again) == sum(x.nbytes() for x in seen.values())


@pytest.mark.parametrize("sinks", SINKS)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_states_are_those_of_a_real_step(kind, sinks, tmp_path) -> None:
    recipe = recipe_of(kind, sinks)
    model = build_model(recipe, Tokens()).train()  # type: ignore[arg-type]
    forward(model).backward()
    optimizer, _ = optimizer_and_schedule(model, recipe.training, 10)
    optimizer.step()
    found = estimate(recipe)
    assert found.weights == sum(x.numel() * x.element_size() for x in model.parameters())
    assert found.gradients == sum(
        x.grad.numel() * x.grad.element_size() for x in model.parameters() if x.grad is not None
    )
    states = [x for state in optimizer.state.values() for x in state.values() if isinstance(x, torch.Tensor)]
    assert found.moments == sum(x.numel() * x.element_size() for x in states)
    assert found.shared + found.sinks == sum(x.numel() for x in model.parameters())
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")
    headers = (tmp_path / "state.pt").stat().st_size - found.checkpoint
    assert 0 <= headers < 700 * (len(states) + len(model.state_dict()))
    if sinks != "none":
        export(model.eval(), tmp_path / "clean", verify=False)
        assert 0 <= (tmp_path / "clean" / "model.safetensors").stat().st_size - found.exported < 5_000


def grouped(x, weight, *_, out_shape=None, **__) -> int:
    return 2 * x[0] * weight[1] * weight[2]


def grouped_backward(_, x, weight, *__, out_shape=None, **___) -> int:
    return 2 * grouped(x, weight)


@pytest.mark.parametrize("sinks", SINKS)
@pytest.mark.parametrize("kind", MODELS)
def test_flops_are_those_of_the_counter(kind, sinks) -> None:
    """Eager attention, whose products the counter sees on a CPU."""
    recipe = recipe_of(kind, sinks)
    model = build_model(recipe, Tokens()).train()  # type: ignore[arg-type]
    model.set_attn_implementation("eager")
    names = {torch.ops.memsinks.grouped_linear: grouped, torch.ops.memsinks.grouped_linear_backward: grouped_backward}
    with FlopCounterMode(display=False, custom_mapping=names) as counter:
        forward(model).backward()
    found = flops(meta_model(recipe), ROWS, LENGTH)
    assert found == pytest.approx(counter.get_total_flops(), rel=0.02)
    assert 1.2 * found < flops(meta_model(recipe), ROWS, LENGTH, recompute=True) < 4 / 3 * found


def test_open_parameters_and_the_peak() -> None:
    found = estimate(recipe_of("llama", "gated"))
    assert found.open == found.shared + found.sinks // 4
    assert found.peak == found.weights + found.gradients + found.moments + found.activations + found.temporaries
    less = estimate(recipe_of("llama", "gated", gradient_checkpointing=True))
    kept = less.activations_checkpointed + less.recomputed
    assert less.peak == less.weights + less.gradients + less.moments + kept + less.temporaries
    half = estimate(recipe_of("llama", "gated", accumulate=2))
    assert half.activations < found.activations and half.weights == found.weights
    assert half.step_flops == found.step_flops < less.step_flops
    assert found.activations_checkpointed < found.activations


def test_nothing_is_allocated() -> None:
    assert {x.device.type for x in meta_model(recipe_of("llama", "gated")).parameters()} == {"meta"}


@pytest.mark.parametrize("copies", [3, [1, 4, 8]])
def test_rows_follow_from_the_recipe_where_it_says_enough(tmp_path, copies) -> None:
    path = tmp_path / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": f"story {n} " * (2 + n % 9)}) + "\n" for n in range(60)))
    recipe = parse_recipe({
        "output": "x", "model": {"config": MODELS["llama"]}, "tokenizer": {"vocab_size": 300},
        "data": {"path": str(path), "limit": 50, "held_out": 7, "repeat": {"documents": 5, "copies": copies},
                 "one_document_per_row": True, "long": "truncate"},
        "training": {"length": 16, "batch_rows": 4, "epochs": 2},
    })  # fmt: skip
    size, rows = size_of(recipe), prepare(recipe).rows
    assert (size.rows, size.steps, size.exact) == (len(rows), len(rows) // 4, True)
    path.write_text("".join(json.dumps({"text": f"story {n} " * (2 + n % 9)}) + "\n" for n in range(50)))
    values = recipe.to_dict()
    values["data"] |= {"one_document_per_row": False, "long": "split"}
    packed = parse_recipe(values)
    assert size_of(packed).rows == len(prepare(packed).rows)


# The table


def test_a_line_a_model(capsys) -> None:
    path = str(ROOT / "recipes" / "builtin.yaml")
    small = [
        "--set",
        "data.synthetic.stories=60",
        "--set",
        "data.synthetic.people_once=5",
        "--set",
        "tokenizer.vocab_size=300",
    ]
    assert main(["estimate", path, *small, "--gpu", "H200", "--gpus", "2", "--mfu", "0.3"]) == 0
    out = capsys.readouterr().out
    assert (
        "2 H200 at 30% of 67 TFLOPS fp32" in out
        and "\nmodel " in out
        and "the vocabulary 300 is not a multiple of 64" in out
    )


def test_what_does_not_fit_is_said(monkeypatch) -> None:
    comparison = read_comparison(ROOT / "recipes" / "compare-tinystories.yaml")
    arms = [arm for arm in comparison.arms if arm.name in ("standard", "dedup", "published", "sgtm")]
    monkeypatch.setitem(estimate_table.GPUS, "H100", estimate_table.Gpu(240e6, 1e12, 1e12))
    lines = format_estimate(
        comparison.recipe, {arm.name: recipe_of_arm(comparison.recipe, arm) for arm in arms}, 3, gpus=2
    ).splitlines()
    assert lines[0].startswith("0.9M tokens in 6,650 rows of 128; 415 steps of 16 rows, 16 at a time")
    assert [line.split()[0] for line in lines[4:8]] == ["standard", "dedup", "published", "sgtm"]
    assert lines[4].split()[1:] == lines[5].split()[1:]
    assert len({len(line) for line in lines[3:8]}) == 1
    assert next(line for line in lines if "DOES NOT FIT" in line).startswith("published DOES NOT FIT")
    assert any("all 512 sinks are computed" in line for line in lines)


def test_runs_share_the_gpus() -> None:
    assert estimate_table._span([3, 1, 1, 1], 2) == 3
    assert estimate_table._span([3, 1, 1, 1], 1) == 6


@pytest.mark.parametrize(
    ("argv", "part"),
    [(["--gpu", "T4"], "unknown GPU 'T4'; known are A100, H100, H200"), (["--mfu", "1.5"], "must lie in (0, 1], got 1.5"),
     (["--set", "model.config.hidden_size=wide"], "model.config gives no model"), (["--scale", "3"], "must lie in (0, 1]"),
     (["--scale", "half"], "a fraction such as 1/64, got 'half'"), (["--set", "training.lenght=3"], "did you mean length?")],
)  # fmt: skip
def test_wrong_input_is_one_line(capsys, argv, part) -> None:
    assert main(["estimate", str(ROOT / "recipes" / "compare-tinystories.yaml"), *argv]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert part in line


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "paper").glob("*.yaml")), ids=lambda path: path.name)
def test_the_recipes_of_the_paper_are_valid_and_of_its_size(path) -> None:
    comparison = read_comparison(path)
    assert {"standard", "dedup", "published", "ours"} <= {arm.name for arm in comparison.arms}
    stock = sum(x.numel() for x in meta_model(comparison.recipe).parameters())
    wanted = {"tinystories-344m": 354.3e6, "smollm-360m-1b": 361.8e6, "smollm-1.7b-2b": 1711.4e6}[path.stem]
    assert stock == pytest.approx(wanted, rel=1e-3)
    published = next(arm.training for arm in comparison.arms if arm.name == "published")
    assert published.sinks is not None and published.extra_neurons == -published.sinks.neurons
