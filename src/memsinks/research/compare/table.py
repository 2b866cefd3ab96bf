"""The table of a comparison, from the audits of its seeds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from memsinks.auditing.attacks import uses_reference
from memsinks.auditing.model_result import ModelResult
from memsinks.auditing.probes import HALF
from memsinks.auditing.result import Audit
from memsinks.research.compare.arm import Arm

COLUMNS = {
    "gap_closed": ("gap closed", ".1%"),
    "closure": ("closure to the twin", ".2f"),
    "price": ("price (nats)", "+.3f"),
    "recited": ("recited, most copies", ".0%"),
    "attack_alone": ("strongest attack, AUC", ".2f"),
    "attack_with_twin": ("strongest attack with the twin, AUC", ".2f"),
    "harmless": ("gap after 60 harmless steps (nats)", "+.3f"),
    "half": ("gap of the other half after relearning one", "+.3f"),
    "own_recited": ("recited with own sinks, most copies", ".0%"),
    "own": ("loss with own sinks", ".2f"),
    "placebo": ("placebo", ".2f"),
}
"""Columns of the table by their name in compare.json: title and form."""


def rows(
    arms: Sequence[Arm],
    audits: Mapping[int, Audit],
    runs: Sequence[Mapping[str, Any]],
    kept: Sequence[Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """For each model its figures by seed, and its parameters.

    Args:
        audits: by seed.
        runs: facts of all runs.
        kept: rows made earlier; what `audits` says of the same model and seed replaces them, but for
            what was not asked again. A column that they lack is None.
    """
    found: dict[str, dict[int, dict[str, float | None]]] = {}
    for row in kept:
        for place, seed in enumerate(row["seeds"]):
            found.setdefault(row["name"], {})[seed] = {
                column: row[column][place] if column in row else None for column in COLUMNS
            }
    for seed, audit in audits.items():
        for model in audit.models:
            row = found.setdefault(model.name, {})
            before = row.get(seed, {})
            row[seed] = {
                column: before.get(column) if value is None else value
                for column, value in _figures(model, audit).items()
            }
    parameters = {run["arm"]: run["parameters"] for run in runs}
    order = [name for arm in arms for name in (arm.name, *arm.models.values()) if name in found]
    return [
        {
            "name": name,
            "seeds": sorted(found[name]),
            "parameters": parameters.get(name),
            **{column: [found[name][seed][column] for seed in sorted(found[name])] for column in COLUMNS},
        }
        for name in order
    ]


def _figures(model: ModelResult, audit: Audit) -> dict[str, float | None]:
    """By column; None for what was not measured, or is no number (documents too short to be asked for)."""
    most = max(model.lines, key=lambda line: line.copies)
    alone, with_twin = (
        [attack.auc.value for attack in model.attacks if uses_reference(attack.name) == wanted]
        for wanted in (False, True)
    )
    standard = model.role == "against"
    sinks = [line for line in model.sinks or () if line.copies == most.copies]
    found, probes = model.forgetting, {probe.name: probe.gap.value for probe in model.probes}
    values = {
        "gap_closed": 0.0 if standard else found and found.gap_closed.value,
        "closure": 0.0 if standard else found and found.closure and found.closure.value,
        "price": 0.0 if standard else found and found.price.value,
        "recited": most.extracted.value,
        "attack_alone": max(alone),
        "attack_with_twin": max(with_twin, default=None),
        "harmless": probes.get("60 harmless steps"),
        "half": probes.get(HALF),
        "own_recited": sinks[0].recited.value if sinks else None,
        "own": sinks[0].own if sinks else None,
        "placebo": sinks[0].placebo if sinks else None,
    }
    return {name: None if value is None or math.isnan(value) else value for name, value in values.items()}


def spread(values: list[float | None], form: str) -> str:
    """Mean, and half the range over seeds where there are several; "-" where nothing is known."""
    known = [x for x in values if x is not None and not math.isnan(x)]
    if not known:
        return "-"
    text = f"{sum(known) / len(known):{form}}"
    return text if len(known) == 1 else f"{text} ± {(max(known) - min(known)) / 2:{form.replace('+', '')}}"


def table(result: Mapping[str, Any]) -> str:
    """Markdown: an arm a line; mean ± half the range over seeds. Step times are relative to ordinary training."""
    head = [
        "arm",
        "seeds",
        *(title for title, _ in COLUMNS.values()),
        "parameters: training / open / exported",
        "step time",
    ]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    times = (result.get("step_times") or {}).get("ratios", {})
    for row in result["rows"]:
        cells = [row["name"], str(len(row["seeds"])), *(spread(row[x], form) for x, (_, form) in COLUMNS.items())]
        sizes = row["parameters"]
        cells.append(" / ".join(f"{sizes[x] / 1e6:.2f}M" for x in ("training", "open", "exported")) if sizes else "")
        cells.append(f"{times[row['name']]:.2f}x" if row["name"] in times else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
