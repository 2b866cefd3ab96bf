"""modes-light.png and modes-dark.png beside this file: which mode do I need?

python docs/draw_modes.py
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from draw_mechanism import THEMES, Theme, arrow, box
from matplotlib.axes import Axes
from matplotlib.figure import Figure

HERE = Path(__file__).parent
WIDTH, ROW = 100.0, 15.0
"""Of the picture and of a question, in the units of all coordinates below."""
QUESTIONS = (1.0, 41.0)
ANSWERS = (53.0, 99.0)
CARD = 10.5
"""Height of a card."""


@dataclass(frozen=True)
class Step:
    """A question, the answer that leads to the right, and what stands there: title, names, one line."""

    question: tuple[str, ...]
    leads: str
    mode: str
    names: str
    what: str


STEPS = (
    Step(("Do you train the model?",), "no", "Audit only", "memsinks audit", "what does any Hugging Face model remember?"),
    Step(("Are owners' texts added to a", "model that is finished?"), "yes", "Fine-tuning for owners",
         "ms.add_owners   ms.erase", "each owner has his sinks; the base is frozen"),
    Step(("Must named people or documents", "leave one by one, even if met once?"), "yes", "Flagged text",
         "ms.isolate   ms.assign   memsinks takedown", "private from the start, in blocks of their own"),
    Step(("Must repeated text be known", "until the day it is removed?"), "yes", "Exact mode, sinks last",
         "ms.SinkConfig   ms.sinks_last   ms.export", "copies train their sinks alone; all leave together"),
)  # fmt: skip
LAST = ("Deduplicate", "no sinks", "the same is left behind, for less")
HEIGHT = ROW * (len(STEPS) + 1) - 2


def middle(row: int) -> float:
    """The height at which a row's cards are centered."""
    return HEIGHT - ROW * row - CARD / 2 - 1


def card(axes: Axes, row: int, lines: tuple[str, str, str], color: str, theme: Theme) -> None:
    """A mode: title, the names to look up, one line."""
    y = middle(row)
    box(axes, ANSWERS[0], y - CARD / 2, ANSWERS[1], y + CARD / 2, color, linewidth=1.8)
    title, names, what = lines
    axes.text(ANSWERS[0] + 2, y + 2.9, title, color=color, va="center", fontsize=13, weight="bold")
    axes.text(ANSWERS[0] + 2, y, names, color=theme.text, va="center", fontsize=10, family="monospace")
    axes.text(ANSWERS[0] + 2, y - 3.0, what, color=theme.text, va="center", fontsize=10.5)


def draw(theme: Theme) -> Figure:
    """The picture in the colors of a theme."""
    figure = Figure(figsize=(10, 10 * HEIGHT / WIDTH), facecolor=theme.background)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")
    center = sum(QUESTIONS) / 2
    for row, step in enumerate(STEPS):
        y = middle(row)
        box(axes, QUESTIONS[0], y - 4, QUESTIONS[1], y + 4, theme.general)
        axes.text(center, y, "\n".join(step.question), color=theme.text, ha="center", va="center", fontsize=11.5)
        arrow(axes, (QUESTIONS[1], y), (ANSWERS[0], y), theme.text)
        axes.text(sum((QUESTIONS[1], ANSWERS[0])) / 2, y + 1.6, step.leads, color=theme.text, ha="center", fontsize=11)
        card(axes, row, (step.mode, step.names, step.what), theme.b, theme)
        end = middle(row + 1) + 4 if row + 1 < len(STEPS) else middle(row + 1)
        other = "yes" if step.leads == "no" else "no"
        if row + 1 < len(STEPS):
            arrow(axes, (center, y - 4), (center, end), theme.text)
        else:
            axes.plot([center, center], [y - 4, end], color=theme.text, linewidth=1.6, solid_capstyle="butt")
            arrow(axes, (center, end), (ANSWERS[0], end), theme.text)
        axes.text(center + 1.2, y - 5.9, other, color=theme.text, va="center", fontsize=11)
    card(axes, len(STEPS), LAST, theme.a, theme)
    return figure


def main() -> None:
    for theme in THEMES:
        draw(theme).savefig(HERE / f"modes-{theme.name}.png", dpi=150, facecolor=theme.background)


if __name__ == "__main__":
    main()
