"""mechanism-light.png and mechanism-dark.png beside this file: what the README shows first.

python docs/draw_mechanism.py
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch

HERE = Path(__file__).parent
WIDTH, HEIGHT = 100.0, 52.0
"""Of the picture, in the units of all coordinates below."""
BLOCKS = 8
OPEN = {"A": (1, 4), "B": (3, 6)}
"""The sink blocks that each document opens."""


@dataclass(frozen=True)
class Theme:
    """Colors that color-blind readers can tell apart (Okabe and Ito); A and B also stand on what they open."""

    name: str
    background: str
    text: str
    faint: str
    general: str
    a: str
    b: str


THEMES = (
    Theme("light", "#ffffff", "#1f2328", "#8c959f", "#57606a", "#D55E00", "#0072B2"),
    Theme("dark", "#0d1117", "#e6edf3", "#7d8590", "#adbac7", "#E69F00", "#56B4E9"),
)
MLP_BOTTOM, MLP_TOP = 15.0, 30.0
GENERAL = (2.0, 25.0)
SINKS = (31.0, 67.0)
CUT = 28.0


def box(axes: Axes, left: float, bottom: float, right: float, top: float, color: str, **style: object) -> None:
    """A box with round corners."""
    settings = {"edgecolor": color, "facecolor": "none", "linewidth": 1.4} | style
    shape = "round,pad=0,rounding_size=0.8"
    axes.add_patch(FancyBboxPatch((left, bottom), right - left, top - bottom, boxstyle=shape, **settings))


def neurons(axes: Axes, left: float, bottom: float, columns: int, rows: int, color: str, filled: bool = True) -> None:
    """A grid of circles, 2.6 apart."""
    for column in range(columns):
        for row in range(rows):
            center = (left + 2.6 * column, bottom + 2.6 * row)
            axes.add_patch(Circle(center, 0.85, facecolor=color if filled else "none", edgecolor=color, linewidth=1.0))


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], color: str, width: float = 1.6) -> None:
    """A straight arrow."""
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=color, linewidth=width,
                                   shrinkA=0, shrinkB=0))  # fmt: skip


def card(axes: Axes, center: float, title: str, detail: str, color: str) -> None:
    """A document above the MLP."""
    box(axes, center - 8, 41.5, center + 8, 49.5, color)
    axes.text(center, 46.9, title, color=color, ha="center", va="center", fontsize=12, weight="bold")
    axes.text(center, 43.8, detail, color=color, ha="center", va="center", fontsize=10)


def captions(axes: Axes, center: float, top: float, lines: Sequence[str], color: str) -> None:
    """Centered lines of text; the first one bold."""
    for place, line in enumerate(lines):
        weight = "normal" if place else "bold"
        axes.text(center, top - 2.7 * place, line, color=color, ha="center", va="top", fontsize=10.5, weight=weight)


def block_center(place: int) -> float:
    """The middle of a sink block."""
    return SINKS[0] + (SINKS[1] - SINKS[0]) * (place + 0.5) / BLOCKS


def training(axes: Axes, theme: Theme) -> None:
    """Left: the MLP with its sinks, and what opens them."""
    box(axes, GENERAL[0], MLP_BOTTOM, GENERAL[1], MLP_TOP, theme.general)
    neurons(axes, 4.5, MLP_BOTTOM + 2.4, 8, 5, theme.general)
    owner = {place: name for name, places in OPEN.items() for place in places}
    colors = {"A": theme.a, "B": theme.b}
    for place in range(BLOCKS):
        middle, name = block_center(place), owner.get(place)
        color = colors[name] if name else theme.faint
        box(axes, middle - 2, MLP_BOTTOM, middle + 2, MLP_TOP, color, linestyle="-" if name else ":")
        neurons(axes, middle, MLP_BOTTOM + 2.4, 1, 4, color, filled=name is not None)
        if name:
            axes.text(middle, MLP_TOP - 1.9, name, color=color, ha="center", va="center", fontsize=10.5, weight="bold")
    card(axes, 13.5, "any text", "met the first time", theme.general)
    card(axes, 38.0, "document A", "met again", theme.a)
    card(axes, 60.0, "document B", "met again", theme.b)
    arrow(axes, (13.5, 41.5), (13.5, MLP_TOP + 0.4), theme.general)
    for center, name in ((38.0, "A"), (60.0, "B")):
        for place in OPEN[name]:
            arrow(axes, (center, 41.5), (block_center(place), MLP_TOP + 0.4), colors[name])


def cut(axes: Axes, theme: Theme) -> None:
    """The line along which sinks are cut off."""
    axes.plot([CUT, CUT], [5.2, 34.0], color=theme.text, linewidth=1.6, linestyle=(0, (5, 3)))
    axes.text(
        CUT + 0.35, 3.0, "\N{BLACK SCISSORS}", color=theme.text, ha="center", va="center", fontsize=28, rotation=90
    )


def exported(axes: Axes, theme: Theme) -> None:
    """Right: what is left."""
    arrow(axes, (69.5, 22.5), (75.0, 22.5), theme.text, 2.2)
    axes.text(72.2, 25.0, "export", color=theme.text, ha="center", va="center", fontsize=11)
    box(axes, 76.5, MLP_BOTTOM, 98.5, MLP_TOP, theme.general)
    neurons(axes, 78.4, MLP_BOTTOM + 2.4, 8, 5, theme.general)


def draw(theme: Theme) -> Figure:
    """The picture in the colors of a theme."""
    figure = Figure(figsize=(10, 10 * HEIGHT / WIDTH), facecolor=theme.background)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")
    training(axes, theme)
    cut(axes, theme)
    exported(axes, theme)
    left, right = sum(GENERAL) / 2, sum(SINKS) / 2
    lines = ("general neurons", "the model's own MLP:", "a text trains it once,", "its copies do not")
    captions(axes, left, 13.2, lines, theme.general)
    lines = ("sink neurons", "an id opens a fixed few blocks;", "what only that text teaches gathers there")
    captions(axes, right, 13.2, lines, theme.text)
    captions(axes, 87.5, 13.2, ("a plain checkpoint", "no sinks, no new code,", "the original's shape"), theme.general)
    axes.text(right, 3.2, "Not attention sinks: these are neurons of the MLP.", color=theme.general, ha="center",
              va="center", fontsize=10.5, style="italic")  # fmt: skip
    return figure


def main() -> None:
    for theme in THEMES:
        draw(theme).savefig(HERE / f"mechanism-{theme.name}.png", dpi=180, facecolor=theme.background)


if __name__ == "__main__":
    main()
