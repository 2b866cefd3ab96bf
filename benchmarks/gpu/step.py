"""Time and memory of a training step of each arm of a recipe: stock, published, ours; eager and compiled.

    PYTHONPATH=src python benchmarks/gpu/step.py recipes/paper/tinystories-344m.yaml --gpu H100

Prints one JSON line an arm: tokens a second, share of the GPU's peak (recomputation not counted), peak memory, beside what
`memsinks estimate` says. Random tokens, a document a row, in half of the rows at its second exposure or a later one. On a CPU
it runs at whatever size --scale leaves, as a check of this file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from memsinks.research.compare.arm import with_method
from memsinks.research.compare.comparison import read_comparison
from memsinks.research.rivals.method import Batch, TrainingMethod
from memsinks.runs.estimate import estimate, flops, meta_model
from memsinks.runs.estimate_table import GPUS
from memsinks.runs.recipe import Recipe
from memsinks.runs.shrink import parse_scale
from memsinks.sinks.attach import add_sinks
from memsinks.training.first import sinks_first
from memsinks.training.loop import Training
from memsinks.training.optim import clip_gradients

WARM = 3


def batches(recipe: Recipe, vocabulary: int, device: torch.device) -> list[Batch]:
    """Two batches of a micro-batch's rows."""
    rows, length = recipe.training.micro_rows, recipe.training.length
    generator = torch.Generator().manual_seed(0)
    found = []
    for first in (0, rows):
        tokens = torch.randint(0, vocabulary, (rows, length), generator=generator)
        labels = tokens.clone()
        labels[:, 0] = -100
        ids = torch.arange(first, first + rows)[:, None].expand(rows, length)
        batch = {
            "input_ids": tokens, "labels": labels, "document_ids": ids, "exposures": 1 + ids % 2,
            "position_ids": torch.arange(length).repeat(rows, 1), "audited": ids % 2 > 0, "repeated": ids % 2 > 0,
        }  # fmt: skip
        found.append({name: values.contiguous().to(device) for name, values in batch.items()})
    return found


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(recipe: Recipe, made: TrainingMethod, steps: int, peak: float) -> dict:
    """Sinks first, forward and backward of a micro-batch, and the update are timed apart; a step is `accumulate` of the first
    two and one of the last."""
    training, device = recipe.training, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    whole = dataclasses.replace(recipe, sinks=made.sinks)
    shapes = meta_model(whole)
    config = AutoConfig.for_model(**shapes.config.to_dict())
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config)
    if made.sinks is not None:
        add_sinks(model, made.sinks)
    if training.gradient_checkpointing:
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)(
            {"use_reentrant": False}
        )
    prepared = Training(model, training, 1000)
    model, optimizer = prepared.model.train(), prepared.optimizer
    data = batches(recipe, int(model.config.vocab_size), device)
    tokens = data[0]["input_ids"].numel()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    firsts, passes, updates = [], [], []

    def first(batch: Batch) -> None:
        if made.sinks_first:
            updates, until = made.sinks_first, made.sinks_first_until
            norm = training.max_grad_norm
            sinks_first(
                model, optimizer, [batch], updates=updates, until=until, max_norm=norm, num_items_in_batch=tokens
            )

    def update() -> None:
        clip_gradients(model, training.max_grad_norm)
        optimizer.step(), optimizer.zero_grad()

    for step in range(WARM + steps):
        with prepared.as_in_training():
            firsts.append(seconds(lambda step=step: first(data[step % 2])))
            passes.append(
                seconds(lambda step=step: made.step(model, made.change(data[step % 2]), torch.tensor(tokens)))
            )
        updates.append(seconds(update))
    before, micro, update = (statistics.median(found[WARM:]) for found in (firsts, passes, updates))
    each = training.accumulate * (before + micro) + update
    useful = training.accumulate * flops(shapes, len(data[0]["input_ids"]), training.length)
    figures = estimate(whole)
    return {
        "tokens_per_second": round(training.accumulate * tokens / each), "share_of_peak": float(f"{useful / each / peak:.3g}"),
        "micro_batch_tokens": tokens, "sinks_first_ms": round(1000 * before, 2), "micro_batch_ms": round(1000 * micro, 2),
        "update_ms": round(1000 * update, 2),
        "first_seconds": round(passes[0], 1),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if device.type == "cuda" else None,
        "estimated_peak_gb": round(figures.peak / 1e9, 4), "parameters": figures.shared + figures.sinks,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu", "torch": torch.__version__,
    }  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--arms", nargs="+", default=["standard", "published", "ours", "decay, settled"])
    parser.add_argument("--ways", nargs="+", default=["eager", "compiled"], choices=["eager", "compiled"])
    parser.add_argument("--gpu", default="H100", choices=sorted(GPUS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scale")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    given = parser.parse_args(argv)
    changes = dict(text.split("=", 1) for text in given.set)
    comparison = read_comparison(given.recipe, changes, parse_scale(given.scale) if given.scale else None)
    peak = getattr(GPUS[given.gpu], comparison.recipe.training.precision)
    for name in given.arms:
        made = next(arm.training for arm in comparison.arms if arm.name == name)
        for way in given.ways:
            torch.compiler.reset()
            recipe = with_method(comparison.recipe, made, 0, Path())
            recipe = dataclasses.replace(
                recipe, training=dataclasses.replace(recipe.training, compile=way == "compiled")
            )
            line = {"recipe": given.recipe.stem, "arm": name, "way": way}
            try:
                line |= measure(recipe, made, given.steps, peak)
            except torch.cuda.OutOfMemoryError as error:
                line["error"] = str(error)[:200]
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
