"""Fig. 4: MemSinks against ordinary training with and without the repeats, over training, and the trade-off with Fig. 2.

All with sinks closed; ours is drawn too, and what MemSinks and ours remember with the stories' own sinks open.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from memsinks.research.reproduce import arms, fig2
from memsinks.research.reproduce.pictures import COLORS, canvas, label_ends, over_seeds, save
from memsinks.research.reproduce.setting import Setting
from memsinks.research.reproduce.study import NothingToDraw, Run, Study

ARMS: dict[str, Callable[[Setting, int], Run]] = {
    "standard": lambda setting, seed: arms.standard(setting, seed, keep=True),
    "without repeats": arms.without_repeats,
    "MemSinks": arms.published,
    "ours": arms.ours,
}


def runs(setting: Setting) -> list[Run]:
    return [arm(setting, seed) for seed in setting.seeds for arm in ARMS.values()]


def make(study: Study) -> dict[str, Any]:
    """Curves and final figures of each arm and seed; Fig. 2's curves on stories."""
    setting = study.setting
    seeds = [seed for seed in setting.seeds if study.ready(arm(setting, seed) for arm in ARMS.values())]
    if not seeds:
        raise NothingToDraw("there is no seed of which all runs are there")
    result: dict[str, Any] = {"seeds": seeds, "arms": {}}
    for name, arm in ARMS.items():
        found = [study.run(arm(setting, seed)) for seed in seeds]
        result["steps"] = found[0]["curves"]["steps"]
        result["arms"][name] = {
            x: [y["curves"][x] for y in found] for x in ("validation", "repeated", "opened") if x in found[0]["curves"]
        }
    last = {name: {x: np.array(y)[:, -1] for x, y in curves.items()} for name, curves in result["arms"].items()}
    base = last["standard"]
    gap = base["validation"] - base["repeated"]
    for name, final in last.items():
        result["arms"][name]["final"] = {
            "validation": final["validation"].tolist(),
            "repeated": final["repeated"].tolist(),
            "degradation": (base["validation"] - final["validation"]).round(4).tolist(),
            "forgetting": (final["repeated"] - base["repeated"]).round(4).tolist(),
            "gap_closed": (1 - (final["validation"] - final["repeated"]) / gap).round(4).tolist(),
        }
    result["after"] = fig2.make(study, ["stories"]).get("stories", {})
    return result


def draw(result: dict[str, Any], path: Path) -> None:
    figure, axes = canvas(1, 3, 13.5, 4.2)
    titles = {"validation": "validation loss (nats)", "repeated": "loss of repeated stories (nats)"}
    for panel, (what, title) in zip(axes[0], titles.items(), strict=False):
        ends = []
        for name in ARMS:
            mean = over_seeds(panel, result["steps"], result["arms"][name][what], COLORS[name])
            ends.append((mean[-1], name, COLORS[name]))
        panel.set(xlabel="step", ylabel=title, xlim=(0, result["steps"][-1]))
        if what == "validation":
            final = max(height for height, *_ in ends)
            panel.set_ylim(min(height for height, *_ in ends) - 0.1, final + 1.2)
        label_ends(panel, ends)
    panel = axes[0, 2]
    highest = max(max(result["arms"][name]["final"]["forgetting"]) for name in ARMS) or 1.0
    for name, entry in result["after"].items():
        mean = np.array(entry["curves"]).mean(0)
        panel.plot(*mean.T, color=COLORS[name], lw=1.4, marker="o", ms=2.5, label=name)
    for name in list(ARMS)[1:]:
        x, y = (np.array(result["arms"][name]["final"][what]) for what in ("degradation", "forgetting"))
        panel.errorbar(
            x.mean(),
            y.mean(),
            xerr=[[x.mean() - x.min()], [x.max() - x.mean()]],
            yerr=[[y.mean() - y.min()], [y.max() - y.mean()]],
            color=COLORS[name],
            marker="D",
            ms=8,
            capsize=2,
            label=name,
            ls="",
        )
    panel.axvline(0, color="#999999", lw=0.8)
    panel.set(
        xlabel="degradation (nats; left = worse)",
        ylabel="forgetting (nats)",
        xlim=(-0.8, 0.15),
        ylim=(-0.1, 1.25 * highest),
    )
    panel.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    save(figure, path)
