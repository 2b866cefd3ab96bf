"""Fig. 5: how MemSinks depends on the activation ratio p, the size of the model, and wrong identifiers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from memsinks.research.reproduce import arms
from memsinks.research.reproduce.pictures import COLORS, canvas, label_ends, save
from memsinks.research.reproduce.setting import Setting
from memsinks.research.reproduce.study import Run, Study

PAPER = {
    "p": {0.1: 1.85, 0.3: 1.97, 0.5: 1.92, 0.7: 1.23},
    "size": {"32M": (-0.057, 1.49), "51M": (-0.020, 1.57), "170M": (-0.005, 1.83), "344M": (0.010, 1.95)},
    "noise": {0.01: 1.85, 0.05: 1.87, 0.1: 1.77, 0.5: 0.75},
}
"""Read off the published figure, about 0.02 nats: loss of repeated stories; (degradation, forgetting); the same loss."""


def runs(setting: Setting) -> list[Run]:
    seed = setting.seeds[0]
    pairs = [run for size in setting.sizes for run in _pair(setting, seed, size)]
    return [
        *_pair(setting, seed, setting.swept_size),
        *(_published(setting, seed, setting.swept_size, active_share=p) for p in setting.active_shares),
        *pairs,
        *(_published(setting, seed, setting.swept_size, noise=d) for d in setting.noises),
    ]


def _pair(setting: Setting, seed: int, size: tuple[int, int, int]) -> tuple[Run, Run]:
    standard = arms.standard(setting, seed, size=size, keep=size == setting.size)
    return standard, _published(setting, seed, size)


def _published(setting: Setting, seed: int, size: tuple[int, int, int], **changes: Any) -> Run:
    neurons = setting.intermediate_size if size == setting.size else 4 * size[0]
    return arms.published(setting, seed, size=size, neurons=neurons, **changes)


def make(study: Study) -> dict[str, Any]:
    """Curves of the repeated loss by p and d, final losses, and (degradation, forgetting) by size; one seed."""
    setting, seed = study.setting, study.setting.seeds[0]
    result: dict[str, Any] = {"p": {}, "size": [], "noise": {}}
    for p in setting.active_shares:
        if study.ready([_published(setting, seed, setting.swept_size, active_share=p)]):
            result["p"][f"{p:g}"] = study.run(_published(setting, seed, setting.swept_size, active_share=p))["curves"]
    for size in setting.sizes:
        if not study.ready(_pair(setting, seed, size)):
            continue
        standard, sinks = (study.run(run) for run in _pair(setting, seed, size))
        last = {
            name: {x: y[-1] for x, y in run["curves"].items()}
            for name, run in (("standard", standard), ("sinks", sinks))
        }
        result["size"].append(
            {
                "size": list(size),
                "parameters": standard["parameters"],
                "degradation": round(last["standard"]["validation"] - last["sinks"]["validation"], 4),
                "forgetting": round(last["sinks"]["repeated"] - last["standard"]["repeated"], 4),
                "last": last,
            }
        )
    for d in setting.noises:
        if study.ready([_published(setting, seed, setting.swept_size, noise=d)]):
            result["noise"][f"{d:g}"] = study.run(_published(setting, seed, setting.swept_size, noise=d))["curves"]
    result["standard"] = study.run(_pair(setting, seed, setting.swept_size)[0])["curves"]
    return result


def draw(result: dict[str, Any], path: Path) -> None:
    figure, axes = canvas(1, 3, 13.5, 4.0)
    sweeps = (axes[0, 0], "p", "p", "a  open share p"), (axes[0, 2], "noise", "d", "c  wrong ids, share d")
    for panel, what, sign, title in sweeps:
        ends = []
        for place, (value, curves) in enumerate(result[what].items()):
            color = ("#E69F00", "#AA4499", "#0072B2", "#222222")[place % 4]
            panel.plot(curves["steps"], curves["repeated"], color=color, lw=1.8)
            ends.append((curves["repeated"][-1], f"{sign} = {value}", color))
        panel.plot(result["standard"]["steps"], result["standard"]["repeated"], color=COLORS["standard"], lw=1.2)
        ends.append((result["standard"]["repeated"][-1], "standard", COLORS["standard"]))
        steps = result["standard"]["steps"]
        first = len(steps) // 3  # before, all curves are one
        shown = [y for c in (*result[what].values(), result["standard"]) for y in c["repeated"][first:]]
        room = 0.05 * (max(shown) - min(shown))
        panel.set(
            xlabel="step",
            ylabel="loss of repeated stories (nats)",
            title=title,
            xlim=(steps[first], steps[-1]),
            ylim=(min(shown) - room, max(shown) + room),
        )
        label_ends(panel, ends)
    panel = axes[0, 1]
    for entry in result["size"]:
        panel.plot(entry["degradation"], entry["forgetting"], "D", color=COLORS["MemSinks"], ms=7)
        place, size = (entry["degradation"], entry["forgetting"]), entry["parameters"]
        text = f"{size / 1e6:.2g}M" if size > 1e6 else f"{size / 1e3:.0f}k"
        panel.annotate(text, place, xytext=(7, 4), textcoords="offset points", fontsize=9)
    panel.axvline(0, color="#999999", lw=0.8)
    panel.margins(0.25)
    panel.set(
        xlabel="degradation against the same size (nats)", ylabel="forgetting (nats)", title="b  size of the model"
    )
    save(figure, path)
