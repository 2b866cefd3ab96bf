"""Fig. 7: learning and forgetting. A story met every so many steps: its loss between the meetings.

Eight stories are met at staggered phases; each is shifted to its own phase, and the mean over them is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from memsinks.research.reproduce import arms
from memsinks.research.reproduce.pictures import COLORS, canvas, label_ends, save
from memsinks.research.reproduce.setting import Setting
from memsinks.research.reproduce.study import Run, Study


def runs(setting: Setting) -> list[Run]:
    seed = setting.seeds[0]
    return [arm(setting, seed, corpus="spaced") for arm in (arms.standard, arms.published, arms.ours)]


def aligned(tracked: Mapping[str, Any], state: str, every: int) -> tuple[list[int], list[float]]:
    """(steps since a story's first meeting, mean loss over the stories); every second step, as far as all are known."""
    steps, phases = np.array(tracked["steps"]), tracked["phases"]
    times = np.arange(-every // 2, steps[-1] - max(phases), 2)
    values = np.array(tracked[state])
    mean = np.mean([np.interp(times + phase, steps, values[:, k]) for k, phase in enumerate(phases)], axis=0)
    return times.tolist(), [round(float(x), 4) for x in mean]


def teeth(times: list[int], values: list[float], every: int) -> list[tuple[float, float]]:
    """(lowest loss after a meeting, loss just before the next) of each round."""
    found = []
    for start in range(0, times[-1] - every, every):
        inside = [value for time, value in zip(times, values, strict=True) if start < time <= start + every]
        found.append((min(inside), inside[-1]))
    return found


def _mean(values: list[float]) -> float | None:
    """None where the run is too short to have any."""
    return round(float(np.mean(values)), 4) if values else None


def make(study: Study) -> dict[str, Any]:
    """For each model and state the aligned curve and the height of the teeth in the last quarter."""
    every = study.setting.every
    result: dict[str, Any] = {"every": every, "curves": {}}
    for name, run in zip(("standard", "MemSinks", "ours"), runs(study.setting), strict=True):
        tracked = study.run(run)["tracked"]
        for state in ("closed", "opened"):
            if not tracked[state]:
                continue
            times, values = aligned(tracked, state, every)
            found = teeth(times, values, every)
            last = found[-max(1, len(found) // 4) :]
            result["curves"][f"{name}, {state}" if name != "standard" else name] = {
                "times": times,
                "values": values,
                "tooth": _mean([y - x for x, y in last]),
                "end": _mean([x for x, _ in last]),
            }
    return result


def draw(result: dict[str, Any], path: Path) -> None:
    figure, axes = canvas(1, 2, 12.5, 4.2)
    every = result["every"]
    for panel, other in zip(axes[0], ("MemSinks", "ours"), strict=True):
        ends, highest, start, end = [], 0.0, 0, 0
        for name, curve in result["curves"].items():
            base = name.split(",")[0]
            if base not in ("standard", other):
                continue
            start = 2 * every if 2 * every in curve["times"] else 0
            shown = [(x, y) for x, y in zip(curve["times"], curve["values"], strict=True) if x >= start]
            panel.plot(
                *zip(*shown, strict=True), color=COLORS[base], ls="--" if name.endswith("closed") else "-", lw=1.5
            )
            text = name.replace(", opened", ",\nown sinks open").replace(", closed", ",\nsinks closed")
            ends.append((shown[-1][1], text, COLORS[base]))
            highest, end = max(highest, shown[0][1]), curve["times"][-1]
        panel.set(
            xlabel="steps since the first meeting",
            ylabel="loss of the story (nats)",
            xlim=(start, end),
            ylim=(0, highest + 0.1),
        )
        for meeting in range(start, end + 1, every):
            panel.axvline(meeting, color="#bbbbbb", lw=0.7, ls=":")
        panel.text(0.02, 0.04, "dotted lines: the story is met", transform=panel.transAxes, fontsize=9, color="#666666")
        label_ends(panel, ends, apart=0.12)
    save(figure, path)
