"""How the pictures of the study look: one color for each way of training in all of them, labels at the lines."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memsinks.auditing.pictures import LOOK, require_matplotlib

COLORS = {
    "standard": "#D55E00",
    "without repeats": "#0072B2",
    "MemSinks": "#AA4499",
    "ours": "#009E73",
    "paper": "#888888",
    "hard concrete": "#56B4E9",
    "integrated gradients": "#E69F00",
    "zero-out": "#117733",
    "activations": "#999933",
    "random neurons": "#999999",
    "gradient ascent": "#882255",
    "NPO": "#332288",
}


def canvas(rows: int, columns: int, width: float, height: float) -> tuple[Any, np.ndarray]:
    """A figure and its axes, [rows, columns]; ConfigError without matplotlib."""
    require_matplotlib()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(LOOK):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False)
    return figure, axes


def save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def over_seeds(
    axes: Any, x: Sequence[float], curves: Sequence[Sequence[float]], color: str, **style: Any
) -> np.ndarray:
    """The mean of the curves as a line, least and greatest as a band; returns the mean."""
    values = np.array(curves)
    axes.plot(x, values.mean(0), color=color, **({"lw": 1.8} | style))
    if len(values) > 1:
        axes.fill_between(x, values.min(0), values.max(0), color=color, alpha=0.18, lw=0)
    return values.mean(0)


def label_ends(axes: Any, labels: Iterable[tuple[float, str, str]], apart: float = 0.055) -> None:
    """Write (height, text, color) right of the picture, moved where they would overlap.

    Args:
        apart: least distance, as a share of the picture's height; for the limits the axes have now.
    """
    labels, right = sorted(labels), axes.get_xlim()[1]
    places = [float(axes.transAxes.inverted().transform(axes.transData.transform((right, x)))[1]) for x, *_ in labels]
    for index in range(1, len(places)):
        places[index] = max(places[index], places[index - 1] + apart)
    highest = 1.0
    for index in reversed(range(len(places))):
        places[index] = min(places[index], highest)
        highest = places[index] - apart
    for (_, text, color), place in zip(labels, places, strict=True):
        axes.annotate(text, (1.01, place), xycoords="axes fraction", color=color, va="center", fontsize=9)
