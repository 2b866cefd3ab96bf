"""The table and the picture of a comparison, from the audits of its seeds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .audit import Audit
from .audit.result import ModelResult

if TYPE_CHECKING:
    from .compare import Comparison

COLUMNS = {
    "gap_closed": ("gap closed", ".1%"), "closure": ("closure to the twin", ".2f"), "price": ("price (nats)", "+.3f"),
    "recited": ("recited, most copies", ".0%"), "attack": ("best attack, AUC", ".2f"),
    "reference": ("reference attack, AUC", ".2f"), "own": ("loss with own sinks", ".2f"), "placebo": ("placebo", ".2f"),
}  # fmt: skip

DEAREST = 0.4
"""Price, nats, beyond which an arm is named beside the picture and not drawn."""


def rows(comparison: Comparison, audits: Mapping[int, Audit]) -> list[dict[str, Any]]:
    """For each model of the audits its figures by seed, and what it costs."""
    found: dict[str, dict[str, Any]] = {}
    for seed, audit in audits.items():
        for model in audit.models:
            row = found.setdefault(model.name, {"name": model.name, "seeds": [], **{column: [] for column in COLUMNS}})
            row["seeds"].append(seed)
            for column, value in _figures(model, audit).items():
                row[column].append(value)
    by_name = {arm.name: arm for arm in comparison.arms}
    for row in found.values():
        arm = by_name.get(row["name"])
        runs = [facts for seed in audits if arm and (facts := comparison.finished(arm, seed))]
        row["parameters"] = runs[0]["parameters"] if runs else None
        row["seconds_per_step"] = [x["seconds_per_step"] for x in runs]
    order = [
        name for arm in comparison.arms for name in found if name == arm.name or name.startswith(f"{arm.name}, rescale")
    ]
    return [found[name] for name in order]


def _figures(model: ModelResult, audit: Audit) -> dict[str, float | None]:
    most = max(model.lines, key=lambda line: line.copies)
    attacks = {attack.name: attack.auc.value for attack in model.attacks}
    reference = attacks.pop("reference", None)
    standard = model.role == "against"
    sinks = [line for line in model.sinks or () if line.copies == most.copies]
    found = model.forgetting
    return {
        "gap_closed": 0.0 if standard else found and found.gap_closed.value,
        "closure": 0.0 if standard else found and found.closure and found.closure.value,
        "price": 0.0 if standard else found and found.price.value, "recited": most.extracted.value,
        "attack": max(attacks.values()), "reference": reference, "own": sinks[0].own if sinks else None,
        "placebo": sinks[0].placebo if sinks else None,
    }  # fmt: skip


def spread(values: list[float | None], form: str) -> str:
    """Mean, and half the range over seeds where there are several."""
    known = [x for x in values if x is not None]
    if not known:
        return "-"
    text = f"{sum(known) / len(known):{form}}"
    return text if len(known) == 1 else f"{text} ± {(max(known) - min(known)) / 2:{form.replace('+', '')}}"


def table(result: Mapping[str, Any]) -> str:
    """Markdown: an arm a line; mean ± half the range over seeds."""
    standard = next(row for row in result["rows"] if row["name"] == result["roles"]["against"])
    step = sum(standard["seconds_per_step"]) / len(standard["seconds_per_step"])
    head = [
        "arm",
        "seeds",
        *(title for title, _ in COLUMNS.values()),
        "parameters: training / open / exported",
        "step time",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in result["rows"]:
        cells = [row["name"], str(len(row["seeds"])), *(spread(row[x], form) for x, (_, form) in COLUMNS.items())]
        if row["parameters"]:
            cells.append(" / ".join(f"{row['parameters'][x] / 1e6:.2f}M" for x in ("training", "open", "exported")))
            cells.append(f"{sum(row['seconds_per_step']) / len(row['seconds_per_step']) / step:.2f}x")
        else:
            cells += ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Gap closed against price, a point an arm, bars: least and greatest over seeds."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 5.2), layout="constrained")
    axes = figure.subplots()
    colours = ["#000000", "#E69F00", "#56B4E9", "#009E73", "#D55E00", "#0072B2", "#CC79A7", "#666666"]
    markers = "osD^vPX*<>hpd8"
    for place, row in enumerate(row for row in result["rows"] if None not in row["price"] + row["gap_closed"]):
        x, y = row["price"], [100 * value for value in row["gap_closed"]]
        middle = [sum(values) / len(values) for values in (x, y)]
        if middle[0] > DEAREST:
            axes.plot([], [], " ", label=f"{row['name']}: off the picture, price {middle[0]:+.2f}")
            continue
        ours = row["name"] == result["roles"]["audited"]
        axes.errorbar(
            middle[0], middle[1], xerr=[[middle[0] - min(x)], [max(x) - middle[0]]],
            yerr=[[middle[1] - min(y)], [max(y) - middle[1]]], marker=markers[place % len(markers)], ls="", capsize=2,
            color=colours[place % len(colours)], markersize=11 if ours else 7, label=row["name"], elinewidth=1,
            zorder=3,
        )  # fmt: skip
    axes.axhline(100, color="#999999", lw=1, ls=":")
    axes.axvline(0, color="#999999", lw=1)
    axes.set(
        xlabel="price: loss on held-out text against ordinary training (nats)    ← better",
        ylabel="gap closed (%)    better →",
    )
    axes.grid(color="#e2e2e2", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=150)
