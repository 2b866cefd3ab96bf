"""The picture of a comparison: gap closed against price, every arm named beside its point."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

DEAREST = 0.4
"""Price, nats, beyond which an arm is named beside the picture and not drawn."""


class Mark(NamedTuple):
    """A point of the picture: its name and color, the mean over seeds, the least and greatest corner."""

    name: str
    color: str
    point: tuple[float, float]
    corners: tuple[tuple[float, float], tuple[float, float]]


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Gap closed against price, a point an arm, bars: least and greatest over seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.axhline(100, color="#999999", lw=1, ls=":")
    axes.axvline(0, color="#999999", lw=1)
    marks, dear = [], []
    for row in result["rows"]:
        known = all(x is not None and not math.isnan(x) for x in row["price"] + row["gap_closed"])
        if not known or ", rescale" in row["name"]:
            continue
        x, y = row["price"], [100 * value for value in row["gap_closed"]]
        point = sum(x) / len(x), sum(y) / len(y)
        if point[0] > DEAREST:
            dear.append(f"{row['name']} ({point[0]:+.2f}, {point[1]:.0f}%)")
            continue
        ours = row["name"] == result["roles"]["audited"]
        marks.append(
            Mark(
                row["name"],
                "#D55E00" if ours else "#0072B2" if row["own"][0] is not None else "#555555",
                point,
                ((min(x), min(y)), (max(x), max(y))),
            )
        )
    for mark in marks:
        (left, low), (right, high) = mark.corners
        x, y = mark.point
        axes.errorbar(
            x,
            y,
            xerr=[[x - left], [right - x]],
            yerr=[[y - low], [high - y]],
            marker="o",
            ls="",
            capsize=2,
            color=mark.color,
            markersize=7,
            elinewidth=1,
            zorder=3,
        )
    axes.set(
        xlabel="price: loss on held-out text against ordinary training (nats)    ← better",
        ylabel="gap closed (%)    better →",
        title="blue, orange: with sinks, removed.  gray: without sinks"
        + (f".  Not drawn: {', '.join(dear)}" if dear else ""),
    )
    axes.title.set(fontsize=9, color="#444444")
    axes.margins(0.12)
    axes.grid(color="#e2e2e2", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    _label(axes, marks)
    figure.savefig(path, dpi=130)


def _label(axes: Any, marks: Sequence[Mark]) -> None:
    """Write each name beside its point where it covers no mark and no name, the nearest such place first."""
    from matplotlib.transforms import Bbox

    figure = axes.figure
    figure.draw_without_rendering()
    renderer, scale = figure.canvas.get_renderer(), figure.dpi / 72
    taken: list[Any] = []
    for mark in marks:
        (left, low), (right, high) = axes.transData.transform(mark.corners)
        x, y = axes.transData.transform(mark.point)
        taken += [
            Bbox([[left - 2, y - 3], [right + 2, y + 3]]),
            Bbox([[x - 3, low - 2], [x + 3, high + 2]]),
            Bbox([[x - 5 * scale, y - 5 * scale], [x + 5 * scale, y + 5 * scale]]),
        ]
    sides = ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1))
    for mark in marks:
        best: tuple[float, Any] | None = None
        for distance in (12, 20, 30, 42, 56):
            for right, up in sides:
                text = axes.annotate(
                    mark.name,
                    mark.point,
                    (right * distance, up * distance),
                    textcoords="offset points",
                    fontsize=9,
                    color=mark.color,
                    ha=("right", "center", "left")[right + 1],
                    va="center",
                    arrowprops={"arrowstyle": "-", "color": "#aaaaaa", "lw": 0.6, "shrinkB": 4}
                    if distance > 12
                    else None,
                )
                box = _text_box(text, renderer)
                inside = axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1
                cost = 1000 * sum(box.overlaps(other) for other in taken) + 300 * (not inside) + distance
                if best is not None and best[0] <= cost:
                    text.remove()
                    continue
                if best is not None:
                    best[1].remove()
                best = cost, text
        assert best is not None
        taken.append(_text_box(best[1], renderer))


def _text_box(text: Any, renderer: Any) -> Any:
    """The box of an annotation's text alone, pixels."""
    from matplotlib.text import Text

    text.update_positions(renderer)
    return Text.get_window_extent(text, renderer)
