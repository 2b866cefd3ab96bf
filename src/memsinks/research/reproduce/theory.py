"""The paper's three theorems as small experiments in float64, on linear models where everything can be computed.

`entanglement` (Theorem 3.1): gradient descent on a two-layer linear net ends at the interpolator of least norm, which writes
part of a memorized output into the directions that carry meaning, and not at the disentangled one.
`co_adaptation` (Theorem 4.1): under gradient masking the general weights come to lean on the memorization weights.
`separation` (appendix H): a logit that is memorized in sinks outlives its copy in the shared weights while others open the
sinks seldom enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from memsinks.research.reproduce.pictures import canvas, label_ends, save
from memsinks.research.reproduce.setting import Setting
from memsinks.research.reproduce.study import Run, Study


def runs(setting: Setting) -> list[Run]:
    return []


def entanglement(
    examples: int = 20,
    semantic: int = 40,
    outputs: int = 10,
    size: float = 3.0,
    steps: int = 1500,
    rate: float = 0.05,
    spread: float = 0.5,
    seed: int = 0,
) -> dict[str, Any]:
    """Train f(x) = W_proj W_fc x on inputs x = (meaning, own direction), the first with an offset in its output.

    The meaning of an example is a random unit vector, its own direction (the memorization feature) a unit vector that no other
    example has. Outputs are W* meaning, W* small; the first also gets Delta, of length `size`. W_fc starts at
    sqrt(2 gamma) times the identity, W_proj at 0 (appendix D).

    Returns:
        By step: relative distance of W = W_proj W_fc to the interpolator of least Frobenius norm and to the disentangled
        W = (W*, Delta in the first own direction); and the share of Delta that is gone when the own directions are cut off.
    """
    rng = np.random.default_rng(seed)
    meaning = rng.standard_normal((examples, semantic))
    meaning /= np.linalg.norm(meaning, axis=1, keepdims=True)
    x = np.concatenate([meaning, np.eye(examples)], 1)
    true = rng.standard_normal((outputs, semantic))
    true *= 0.05 / np.linalg.norm(true, 2)
    delta = rng.standard_normal(outputs)
    delta *= size / np.linalg.norm(delta)
    y = meaning @ true.T
    y[0] += delta
    disentangled = np.zeros((outputs, semantic + examples))
    disentangled[:, :semantic] = true
    disentangled[:, semantic] = delta
    least = y.T @ np.linalg.pinv(x).T
    first, second = np.sqrt(2 * spread) * np.eye(semantic + examples), np.zeros((outputs, semantic + examples))
    looks = {0, *np.geomspace(1, steps, 80).round().astype(int).tolist()}
    found: dict[str, Any] = {"steps": [], "loss": [], "to_least_norm": [], "to_disentangled": [], "removed": []}
    for step in range(steps + 1):
        whole = second @ first
        error = x @ whole.T - y
        if step in looks:
            only_meaning = meaning[0] @ (whole[:, :semantic] - true).T
            found["steps"].append(step)
            found["loss"].append(float((error**2).sum()))
            for name, target in (("to_least_norm", least), ("to_disentangled", disentangled)):
                found[name].append(float(np.linalg.norm(whole - target) / np.linalg.norm(target)))
            found["removed"].append(float(1 - only_meaning @ delta / (delta @ delta)))
        gradient = error.T @ x
        first, second = first - rate * second.T @ gradient, second - rate * gradient @ first.T
    norms = {"least": least, "disentangled": disentangled, "trained": second @ first}
    return found | {
        "norms": {name: float((value**2).sum()) for name, value in norms.items()},
        "entangled_share": float(meaning[0] @ (least[:, :semantic] - true).T @ delta / (delta @ delta)),
    }


def co_adaptation(
    rate: float = 0.05, steps: int = 400, others: int = 6, features: int = 24, overlap: float = 0.3, seed: int = 0
) -> dict[str, Any]:
    """Train the general weights on other examples, N steps after the memorization weights were last updated.

    Feature vectors s_i are of unit length with inner products of at least about `overlap` (c). f(x) = W_gen s + W_mem s; only
    W_gen is trained, a random example a step, squared loss, with the memorization weights in the forward. Compared with the
    general weights trained without them.

    Returns:
        N, the mean squared difference of the two general models on their examples (what dropping the memorization weights
        costs), and the printed bound N gamma (1-gamma)^N c^2, both over the squared norm of W_mem on them.
    """
    rng = np.random.default_rng(seed)
    apart = rng.standard_normal((others + 1, features))
    apart[:, 0] = 0
    apart /= np.linalg.norm(apart, axis=1, keepdims=True)
    s = np.sqrt(1 - overlap) * apart
    s[:, 0] = np.sqrt(overlap)
    products = s @ s.T
    c = max(0.0, float(products[~np.eye(others + 1, dtype=bool)].min()))
    target = rng.standard_normal(others)
    memory = s[0] * 1.0
    with_memory, without = np.zeros(features), np.zeros(features)
    scale = float(((s[1:] @ memory) ** 2).mean())
    numbers, measured = [], []
    for step in range(steps + 1):
        numbers.append(step)
        measured.append(float(((s[1:] @ (with_memory - without)) ** 2).mean()) / scale)
        pick = rng.integers(others)
        example = s[1 + pick]
        with_memory = with_memory - rate * (example @ (with_memory + memory) - target[pick]) * example
        without = without - rate * (example @ without - target[pick]) * example
    bound = [n * rate * (1 - rate) ** n * c**2 for n in numbers]
    return {"N": numbers, "measured": measured, "bound": bound, "gamma": rate, "c": c}


def separation(
    shares: Sequence[float] = tuple(x / 20 for x in range(21)),
    repeats: int = 20,
    steps: int = 2000,
    rate: float = 0.02,
    similarity: float = 0.1,
    prior: float = -2.0,
    seed: int = 0,
) -> dict[str, Any]:
    """A token's logit of one text, kept half in shared weights and half in sinks, while other texts go by.

    z = `prior` + shared + sink. In `repeats` of `steps` steps the text itself is met and both parts move by
    rate x (1 - sigmoid(z)); in the others another text, of inner product `similarity`, pushes its own copy of the logit down:
    the shared part by rate x similarity x sigmoid(prior + shared + sink if open), and the sink part by as much if that text
    opens it, which it does with probability rho.

    Returns:
        For each rho both parts in the end (the mean of 10 orders); c_min and c_max, the least and greatest probability seen; the
        printed condition rho < c_min/c_max - k/((N-k)(c_max-c_min)), and the one that follows from the two bounds,
        rho < c_min/c_max - k(c_max-c_min)/((N-k) similarity c_max).
    """
    shared_end, sink_end, low, high = [], [], 1.0, 0.0
    for rho in shares:
        ends = []
        for trial in range(10):
            rng = np.random.default_rng([seed, trial])
            met = np.zeros(steps, bool)
            met[rng.choice(steps, repeats, replace=False)] = True
            opened = rng.random(steps) < rho
            shared = sink = 0.0
            for own, is_open in zip(met.tolist(), opened.tolist(), strict=True):
                z = prior + shared + (sink if own or is_open else 0.0)
                probability = 1 / (1 + np.exp(-z))
                low, high = min(low, probability), max(high, probability)
                change = rate * (1 - probability) if own else -rate * similarity * probability
                shared += change
                sink += change if own or is_open else 0.0
            ends.append((shared, sink))
        mean = np.mean(ends, axis=0)
        shared_end.append(float(mean[0]))
        sink_end.append(float(mean[1]))
    rest = steps - repeats
    return {
        "rho": list(shares),
        "shared": shared_end,
        "sink": sink_end,
        "c_min": float(low),
        "c_max": float(high),
        "printed": float(low / high - repeats / (rest * (high - low))),
        "derived": float(low / high - repeats * (high - low) / (rest * similarity * high)),
    }


def make(study: Study) -> dict[str, Any]:
    """All three, and entanglement by the size of the start (gamma) and by how far meanings overlap."""
    return {
        "entanglement": entanglement(),
        "by_spread": {f"{gamma:g}": entanglement(spread=gamma)["to_least_norm"][-1] for gamma in (0.005, 0.05, 0.5)},
        "by_meanings": {str(size): entanglement(semantic=size)["removed"][-1] for size in (10, 20, 40, 80, 160)},
        "co_adaptation": {f"{rate:g}": co_adaptation(rate=rate) for rate in (0.02, 0.05, 0.2)},
        "separation": separation(),
    }


def draw(result: dict[str, Any], path: Path) -> None:
    figure, axes = canvas(1, 3, 13.5, 4.0)
    _draw_entanglement(axes[0, 0], result["entanglement"])
    _draw_co_adaptation(axes[0, 1], result["co_adaptation"])
    _draw_separation(axes[0, 2], result["separation"])
    save(figure, path)


def _draw_entanglement(panel: Any, found: dict[str, Any]) -> None:
    ends = []
    for name, text, color in (
        ("to_least_norm", "to least norm", "#332288"),
        ("to_disentangled", "to disentangled", "#D55E00"),
        ("removed", "memory gone when\nits direction is cut", "#009E73"),
    ):
        panel.plot(found["steps"], found[name], color=color, lw=1.8)
        ends.append((found[name][-1], text, color))
    panel.set_xscale("log")
    panel.set(
        title="Theorem 3.1: entanglement",
        xlabel="step",
        ylabel="relative distance; share",
        xlim=(1, found["steps"][-1]),
        ylim=(-0.03, 1.05),
    )
    label_ends(panel, ends, apart=0.12)


def _draw_co_adaptation(panel: Any, found: dict[str, Any]) -> None:
    ends = []
    for place, (rate, entry) in enumerate(found.items()):
        color = ("#88CCEE", "#0072B2", "#332288")[place % 3]
        panel.plot(entry["N"][1:], entry["measured"][1:], color=color, lw=1.8)
        panel.plot(entry["N"][1:], entry["bound"][1:], color=color, lw=1.2, ls=":")
        panel.plot(1 / entry["gamma"], max(entry["bound"]), "o", color=color, ms=4)
        ends.append((entry["measured"][-1], f"γ = {rate}", color))
    panel.set_yscale("log")
    panel.set(
        title="Theorem 4.1: co-adaptation",
        xlabel="N, steps since the memory was written",
        ylim=(1e-7, 3),
        ylabel="cost of dropping it (relative)",
        xlim=(0, 400),
    )
    where = {"transform": panel.transAxes, "fontsize": 9, "color": "#444444"}
    panel.text(0.4, 0.66, "dotted: printed bound,\npoint: N = 1/γ", **where)
    label_ends(panel, ends, apart=0.08)


def _draw_separation(panel: Any, found: dict[str, Any]) -> None:
    panel.plot(found["rho"], found["sink"], color="#009E73", lw=1.8)
    panel.plot(found["rho"], found["shared"], color="#D55E00", lw=1.8)
    panel.axhline(0, color="#999999", lw=0.8)
    for name, place in (("printed", 0.95), ("derived", 0.85)):
        if 0 <= found[name] <= 1:
            panel.axvline(found[name], color="#444444", lw=1, ls=":" if name == "printed" else "--")
            panel.text(
                found[name], place, f" {name}", transform=panel.get_xaxis_transform(), fontsize=9, color="#444444"
            )
    panel.set(
        title="Appendix H: what is left where",
        xlabel="ρ, share of other texts that open the sinks",
        ylabel="logit of the memory in the end",
        xlim=(0, 1),
    )
    label_ends(
        panel,
        [(found["sink"][-1], "in the sinks", "#009E73"), (found["shared"][-1], "in the\nshared weights", "#D55E00")],
        apart=0.12,
    )
