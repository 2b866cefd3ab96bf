"""frontier.png beside this file: gap closed against price of the arms that say something, from results/.

python experiments/removal/picture.py
"""

from __future__ import annotations

from typing import Any

import screen
from matplotlib.figure import Figure

SHOWN = {
    "standard": ("ordinary training", "rival"),
    "dedup": ("deduplication", "rival"),
    "twin": ("never seen (twin)", "rival"),
    "cap-8": ("at most 8 copies", "rival"),
    "cap-8, settled": ("at most 8 copies, settled", "rival"),
    "pool 4096": ("decay 1", "sinks"),
    "pool 4096, a=.5": ("decay 0.5", "sinks"),
    "pool 4096, a=0": ("no decay", "sinks"),
    "pool 4096, a=0, settled, unseen": ("no decay, settled", "settled"),
    "pool 4096, a=.5, settled, unseen": ("decay 0.5, settled", "settled"),
    "pool 4096, a=.25, sinks first": ("decay 0.25, sinks first", "sinks"),
    "pool 4096, a=.25, sinks first, settled, unseen": ("ours: sinks first, settled", "ours"),
}
STYLE = {
    "rival": ("#777777", "o", 40), "sinks": ("#0072B2", "s", 40), "settled": ("#009E73", "D", 40), "ours": ("#D55E00", "*", 190),
}  # fmt: skip
TEXTS = {"tinystories": "TinyStories", "wikitext2": "WikiText-2"}
LEFT = ("dedup", "twin")
LIFTED = {
    "cap-8": -8, "dedup": -17, "twin": 9, "pool 4096, a=0": 6, "pool 4096": -9, "cap-8, settled": 4,
    "pool 4096, a=.5, settled, unseen": -8,
}  # fmt: skip
"""Labels that stand left of their point, and those moved up or down by so many points so as not to touch."""


def points(text: str) -> dict[str, tuple[float, float]]:
    """Mean price and gap closed of each arm over the seeds that have its references."""
    found: dict[str, list[dict[str, Any]]] = {}
    for seed in range(9):
        runs = screen.read(text, seed)
        if "standard" in runs:
            for name in SHOWN:
                if name in runs:
                    found.setdefault(name, []).append(screen.summary(runs[name], runs))
    return {
        name: (sum(x["price"] for x in each) / len(each), 100 * sum(x["closed"] for x in each) / len(each))
        for name, each in found.items()
    }


def main() -> None:
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    for axes, (text, title) in zip(figure.subplots(1, 2), TEXTS.items(), strict=True):
        axes.axvline(0, color="#cccccc", linewidth=1, zorder=0)
        axes.axhline(100, color="#cccccc", linewidth=1, zorder=0)
        for name, (price, closed) in points(text).items():
            if name == "standard":
                continue
            label, kind = SHOWN[name]
            color, marker, size = STYLE[kind]
            axes.scatter(price, closed, s=size, color=color, marker=marker, zorder=3, clip_on=False)
            side = -1 if name in LEFT else 1
            axes.annotate(
                label, (price, closed), xytext=((11 if kind == "ours" else 8) * side, LIFTED.get(name, 0)),
                textcoords="offset points", fontsize=9, color=color, va="center", ha="left" if side > 0 else "right",
            )  # fmt: skip
        axes.margins(x=0.12, y=0.08)
        axes.set(
            title=title, xlabel="price: loss on held-out text against ordinary training (nats)", ylabel="gap closed (%)"
        )
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(screen.HERE / "frontier.png", dpi=150)


if __name__ == "__main__":
    main()
