"""The table that `memsinks estimate` prints."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memsinks.errors import ConfigError
from memsinks.runs.estimate import RunEstimate, Size, estimate, size_of
from memsinks.runs.recipe import Recipe


@dataclass(frozen=True)
class Gpu:
    """Memory, bytes, and dense peak, FLOPs a second, as the vendor's data sheets give them for the SXM form."""

    memory: float
    bf16: float
    fp32: float


GPUS = {
    "A100": Gpu(80e9, 312e12, 19.5e12),
    "H100": Gpu(80e9, 989e12, 67e12),
    "H200": Gpu(141e9, 989e12, 67e12),
}
SPARE = 0.1
"""Share of the memory for the CUDA context, fragments and work space of kernels."""

HEADS = (
    "",
    "shared",
    "sinks",
    "open",
    "FLOPs",
    "time",
    "weights",
    "grads",
    "moments",
    "activations",
    "checkpointed",
    "temp.",
    "peak",
    "to resume",
    "model",
    "exported",
)


def format_estimate(
    recipe: Recipe,
    arms: Mapping[str, Recipe] | None = None,
    seeds: int = 1,
    *,
    gpu: str = "H100",
    gpus: int = 1,
    mfu: float = 0.4,
) -> str:
    """A table in text: a line a model, then what does not fit and what serving tools dislike.

    Args:
        arms: the recipe of each arm of a comparison by its name; they run one a GPU. Without any the recipe itself, its rows
            over all GPUs (DDP).
        seeds: how often each arm runs.
        gpu: a name in `GPUS`.
        mfu: share of the peak that training reaches, in (0, 1].

    Raises:
        ConfigError: an unknown GPU, a share out of range, settings that give no model.
    """
    if gpu not in GPUS:
        raise ConfigError(f"unknown GPU {gpu!r}; known are {', '.join(GPUS)}")
    if not 0 < mfu <= 1:
        raise ConfigError(f"the share of the peak must lie in (0, 1], got {mfu}")
    training = recipe.training
    peak = GPUS[gpu].bf16 if training.precision == "bf16" else GPUS[gpu].fp32
    size = size_of(recipe, one_document_per_row=bool(arms))
    steps = size.steps if arms else max(1, size.steps // gpus)
    figures = _estimates(arms or {"model": recipe})
    seconds = [steps * x.step_flops / (mfu * peak) for x in figures.values()]
    small = max(x.peak for x in figures.values()) < 1e9
    lines = [
        _line(name, x, steps, each, training.gradient_checkpointing, 1e6 if small else 1e9)
        for (name, x), each in zip(figures.items(), seconds, strict=True)
    ]
    runs = len(figures) * seeds
    where = f"{gpus} {gpu}" + (", a run on each" if arms and gpus > 1 else "")
    rate = f"{mfu:.0%} of {peak / 1e12:.0f} TFLOPS {training.precision}"
    whole = _time(_span(seconds * seeds, gpus if arms else 1))
    return "\n".join(
        [
            _corpus(size, recipe, steps),
            f"{where} at {rate}; memory and files in {'MB' if small else 'GB'}",
            "",
            *_aligned([HEADS, *lines]),
            "",
            f"in all {whole}, {runs} run{'s' if runs > 1 else ''}, audits not counted",
            *_notes(figures, gpu),
        ]
    )


def _estimates(models: Mapping[str, Recipe]) -> dict[str, RunEstimate]:
    """The estimate of each recipe; recipes that differ in their output alone are estimated once."""
    made: dict[str, RunEstimate] = {}
    figures = {}
    for name, recipe in models.items():
        key = repr(dataclasses.replace(recipe, output=""))
        made[key] = made.get(key) or estimate(recipe)
        figures[name] = made[key]
    return figures


def _notes(figures: Mapping[str, RunEstimate], gpu: str) -> list[str]:
    """What serving tools dislike, and what does not fit."""
    memory = GPUS[gpu].memory
    notes = [f"{name}: {warning}" for name, x in figures.items() for warning in x.warnings]
    return notes + [
        f"{name} DOES NOT FIT: {x.peak / 1e9:.0f} GB at the peak, {gpu} has {memory / 1e9:.0f} of which a tenth should stay "
        "free; raise training.accumulate, or set training.gradient_checkpointing"
        for name, x in figures.items()
        if x.peak > (1 - SPARE) * memory
    ]


def _corpus(size: Size, recipe: Recipe, steps: int) -> str:
    training = recipe.training
    about = "" if size.exact else f" (filled to {size.tokens / size.rows / training.length:.0%}, assumed)"
    return (
        f"{size.tokens / 1e6:,.1f}M tokens in {size.rows:,} rows of {training.length}{about}; {steps:,} steps of "
        f"{training.batch_rows:,} rows, {training.micro_rows} at a time; tokens on disk up to "
        f"{4 * size.tokens / 1e9:.2f} GB"
    )


def _line(name: str, x: RunEstimate, steps: int, seconds: float, checkpointed: bool, unit: float) -> tuple[str, ...]:
    """What the recipe does not use stands in brackets."""
    kept, less = (f"{number / unit:.1f}" for number in (x.activations, x.activations_checkpointed + x.recomputed))
    activations = (f"[{kept}]", less) if checkpointed else (kept, f"[{less}]")
    sizes = [f"{number / unit:.1f}" for number in (x.weights, x.gradients, x.moments)]
    more = [f"{number / unit:.1f}" for number in (x.temporaries, x.peak, x.checkpoint, x.model, x.exported)]
    counts = [f"{number / 1e6:,.1f}M" for number in (x.shared, x.sinks, x.open)]
    return name, *counts, f"{steps * x.step_flops:.1e}", _time(seconds), *sizes, *activations, *more


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return [
        "  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))])
        for first, *cells in lines
    ]


def _time(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _span(seconds: Sequence[float], gpus: int) -> float:
    """How long runs take that start in order, each on the GPU that is free first."""
    busy = [0.0] * gpus
    for one in seconds:
        busy[busy.index(min(busy))] += one
    return max(busy)
