"""Fig. 2: taking repeated stories, and canaries, out of an ordinarily trained model afterwards.

Degradation is validation loss before minus after (negative = worse); forgetting is the loss of what was to be forgotten after
minus before: of the whole story, or of the canary's random tokens.
"""

from __future__ import annotations

import copy
import itertools
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memsinks.research.reproduce import arms
from memsinks.research.reproduce.corpus import Kind
from memsinks.research.reproduce.pictures import COLORS, canvas, save
from memsinks.research.reproduce.setting import WHICH, Setting
from memsinks.research.reproduce.study import Run, Study, device, mean_loss
from memsinks.research.rivals.registry import editing_method
from memsinks.sinks.checkpoint import load_stock
from memsinks.training.evaluate import batches

logger = logging.getLogger(__name__)

METHODS = {
    "hard concrete": "hard-concrete",
    "integrated gradients": "integrated-gradients",
    "zero-out": "zero-out",
    "activations": "activations",
    "gradient ascent": "gradient-ascent",
    "NPO": "npo",
    "random neurons": "random-neurons",
}
TEXTS: dict[str, Kind] = {"stories": "repetition", "canaries": "canary"}


def runs(setting: Setting) -> list[Run]:
    return [run for text in TEXTS for run in runs_of(setting, text)]


def runs_of(setting: Setting, text: str) -> list[Run]:
    """The models from which one of `TEXTS` is taken out."""
    return [arms.standard(setting, seed, corpus=TEXTS[text], keep=True) for seed in setting.seeds]


def file_of(run: Run, name: str) -> str:
    """What the sweep of one of `METHODS` is called."""
    return f"{run.file}-after-{METHODS[name]}"


def method_settings(setting: Setting, name: str) -> dict[str, Any]:
    """The settings of one of `METHODS` as a rival."""
    if name in ("gradient ascent", "NPO"):
        return {"steps": list(setting.unlearning), "lr": setting.unlearning_lr}
    settings: dict[str, Any] = {"fractions": list(setting.fractions)}
    if name == "hard concrete":
        settings |= {
            "iterations": setting.gate_steps,
            "lr": setting.gate_lr,
            "penalty": setting.gate_penalty,
            "start": setting.gate_start,
        }
    if name == "zero-out":
        settings["documents"] = setting.zero_out_stories
    return settings


def sweep(study: Study, run: Run, name: str) -> dict[str, Any]:
    """One method on one model, kept like a run: the losses before, and after each value of the sweep."""
    setting = study.setting
    file = file_of(run, name)
    found = study.found(file, ignored=WHICH)
    if found is not None:
        return found
    started = time.perf_counter()
    corpus = study.corpus(run.corpus, run.seed)
    model = load_stock(study.weights(run)).to(device()).eval()  # type: ignore[arg-type]
    forget = corpus.repeated if corpus.canaries is None else corpus.canaries
    settings = method_settings(setting, name)
    made = editing_method(METHODS[name], {"after": run.name} | settings)
    asked = {"validation": corpus.validation, "repeated": corpus.repeated, "forgotten": forget}

    def measured(model: Any) -> dict[str, float]:
        return {what: mean_loss(model, rows) for what, rows in asked.items()}

    before = measured(model)
    points = []
    edited = made.edit(
        copy.deepcopy(model),
        list(batches(forget, setting.batch, model.device)),
        list(batches(corpus.once, setting.batch, model.device)),
        run.seed,
    )
    for value, other in zip(made.sweep, edited, strict=True):
        points.append({"value": value, **measured(other)})
        logger.info(
            "%s: %s  validation %.3f  forgotten %.3f", file, value, points[-1]["validation"], points[-1]["forgotten"]
        )
    return study.write(
        file,
        {
            "after": run.file,
            "method": name,
            "settings": settings,
            "seed": run.seed,
            "before": before,
            "points": points,
            "seconds": round(time.perf_counter() - started, 1),
        },
    )


def curve(result: Mapping[str, Any]) -> list[tuple[float, float]]:
    """(degradation, forgetting), nats, before the edit and at each value of the sweep."""
    before = result["before"]
    return [(0.0, 0.0)] + [
        (before["validation"] - x["validation"], x["forgotten"] - before["forgotten"]) for x in result["points"]
    ]


def unseen_loss(result: Mapping[str, Any], text: str, vocabulary: int) -> float:
    """What is to be forgotten would have this loss had it never been seen: as held-out stories, or as random tokens."""
    return result["before"]["validation"] if text == "stories" else math.log(vocabulary)


def price_of_half(points: Sequence[tuple[float, float]], whole: float) -> float | None:
    """Validation loss paid, nats, when half of `whole` is forgotten, on straight lines between points; None if never."""
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if y0 <= whole / 2 <= y1:
            return -(x0 + (x1 - x0) * (whole / 2 - y0) / (y1 - y0 or 1.0))
    return None


def make(study: Study, texts: Sequence[str] = tuple(TEXTS)) -> dict[str, Any]:
    """Per text and method: the curve of each seed, and the price of forgetting half."""
    result: dict[str, Any] = {}
    for text in texts:
        for run in runs_of(study.setting, text):
            vocabulary = study.corpus(run.corpus, run.seed).vocabulary
            for name in METHODS:
                if not study.training and study.found(file_of(run, name), WHICH) is None:
                    continue
                found = sweep(study, run, name)
                entry = result.setdefault(text, {}).setdefault(name, {"curves": [], "half": [], "whole": []})
                whole = unseen_loss(found, text, vocabulary) - found["before"]["forgotten"]
                entry["curves"].append([[round(x, 5) for x in point] for point in curve(found)])
                half = price_of_half(curve(found), whole)
                entry["half"].append(None if half is None else round(half, 4))
                entry["whole"].append(round(whole, 4))
    return result


def draw(result: dict[str, Any], path: Path) -> None:
    """A panel a method: share forgotten against degradation, natural stories and canaries; random neurons in each."""
    names = [name for name in METHODS if name != "random neurons"]
    figure, axes = canvas(2, 3, 10.5, 6.2)
    for panel, name in zip(axes.flat, names, strict=True):
        for text, color in (("stories", COLORS["standard"]), ("canaries", COLORS["without repeats"])):
            for kind, dash in ((name, "-"), ("random neurons", ":")):
                entry = result.get(text, {}).get(kind)
                if entry is None or (kind != name and name in ("gradient ascent", "NPO")):
                    continue
                shares = np.array(entry["curves"])
                shares[..., 1] *= 100 / np.array(entry["whole"])[:, None]
                for one in shares if dash == "-" else []:
                    panel.plot(*one.T, color=color, lw=0.6, alpha=0.5)
                panel.plot(
                    *shares.mean(0).T,
                    color=color,
                    lw=1.8 if dash == "-" else 1.0,
                    ls=dash,
                    marker="o" if dash == "-" else "",
                    ms=3,
                )
        panel.set(title=name, xlim=(-0.8, 0.05), ylim=(-12, 125))
        panel.axhline(100, color="#999999", lw=0.8)
        panel.axvline(0, color="#999999", lw=0.8)
    for panel in axes[:, 0]:
        panel.set_ylabel("memory gone (%)")
    for panel in axes[-1]:
        panel.set_xlabel("degradation (nats; left = worse)")
    first = axes[0, 0]
    for height, text, color in (
        (0.32, "natural stories", COLORS["standard"]),
        (0.22, "canaries", COLORS["without repeats"]),
        (0.12, "dotted: random neurons", "#666666"),
    ):
        first.text(0.03, height, text, color=color, transform=first.transAxes, fontsize=9)
    save(figure, path)
