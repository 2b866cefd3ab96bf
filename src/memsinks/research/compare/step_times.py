"""How long a step of each arm takes, the arms in turns."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from memsinks.research.compare.arm import Arm, batches_of, rows_of_arm, training_of, with_method
from memsinks.research.rivals.method import TrainingMethod
from memsinks.runs.prepare import prepare
from memsinks.runs.recipe import Recipe


def step_seconds(recipe: Recipe, arms: Sequence[Arm], seed: int, turns: int) -> dict[str, list[float]]:
    """Seconds of single steps of untrained models, by the name of the arm; the arms take turns on the same places of their rows.

    Args:
        turns: steps timed; their batches are spread over the run. One more comes first and is not counted.
    """
    if recipe.training.threads:
        torch.set_num_threads(recipe.training.threads)
    prepared = prepare(with_method(recipe, TrainingMethod(), seed, Path(recipe.output)), one_document_per_row=True)
    ready = {}
    for arm in arms:
        training = training_of(with_method(recipe, arm.training, seed, Path()), arm.training, seed, prepared)
        ready[arm.name] = training, batches_of(prepared, rows_of_arm(arm.training, prepared), recipe)
    total = len(prepared.rows) // recipe.training.batch_rows
    seconds: dict[str, list[float]] = {arm.name: [] for arm in arms}
    for turn in range(-1, turns):
        for name, (training, batches) in ready.items():
            parts = batches(max(turn, 0) * total // turns)
            start = time.perf_counter()
            training.update(parts)
            if training.model.device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds
