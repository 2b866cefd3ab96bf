"""Table and picture of experiments/regimes, from compare.json of each regime.

    python experiments/regimes/table.py tinystories     # TEXT.md, TEXT.png and TEXT.json beside this file, from runs/regimes

The *strongest* attack on an arm has the greatest AUC, its mean over the seeds. *Most above*, *farthest from seen once*: the
attack that finds most more in it than in the model that met each text once, and the gap that differs most; means over the seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from memsinks.research.compare.table import spread

HERE = Path(__file__).parent
RUNS = Path("runs") / "regimes"
SHARES = (5, 20, 60)
COLORS = {5: "#0072B2", 20: "#D55E00", 60: "#009E73"}
NAMES = {
    "standard": "ordinary training",
    "twin": "never seen (twin)",
    "dedup": "seen once (deduplication)",
    "dedup, fresh text": "seen once, fresh text",
}
ORDER = (
    "standard", "decay", "decay, settled", "decay 1, until 0.3", "exact", "exact, fresh text", "dedup, fresh text",
    "dedup", "twin",
)  # fmt: skip
GAPS = {
    "60 harmless steps": "after 60 harmless steps",
    "half relearned": "other half, after relearning one",
    "rounded to 4 bits": "at 4 bits",
}
"""Changed copies that have a column, and its title."""


class Line(NamedTuple):
    """An arm in one regime: its figures by seed, nats and AUC. `auc`, `gaps`: by attack and by changed copy."""

    price: list[float]
    auc: dict[str, list[float]]
    gaps: dict[str, list[float]]
    recited: dict[int, list[float]]


def by_name(items: list[Mapping[str, Any]], key: str) -> dict[str, float]:
    return {x["name"]: x[key]["value"] for x in items}


def lines(result: Mapping[str, Any]) -> dict[str, Line]:
    """Every arm of a comparison."""
    found: dict[str, Line] = {}
    for audit in result["audits"].values():
        standard = next(x for x in audit["models"] if x["role"] == "against")["controls"]["value"]
        for model in audit["models"]:
            line = found.setdefault(model["name"], Line([], {}, {}, {}))
            line.price.append(model["controls"]["value"] - standard)
            for name, value in by_name(model["attacks"], "auc").items():
                line.auc.setdefault(name, []).append(value)
            for name, value in {"as it is": model["gap"]["value"], **by_name(model["probes"], "gap")}.items():
                line.gaps.setdefault(name, []).append(value)
            for sink in model["sinks"] or ():
                if sink["copies"] > 1:
                    line.recited.setdefault(sink["copies"], []).append(sink["recited"]["value"])
    return found


def strongest(line: Line, *, twin: bool) -> tuple[str, float]:
    """Name and mean AUC of the strongest attack that does, or does not, need the twin; "" where there is none."""
    means = {name: statistics.mean(x) for name, x in line.auc.items() if name.startswith("reference") == twin}
    return max(means.items(), key=lambda item: item[1], default=("", float("nan")))


def strongest_of_all(line: Line) -> float:
    """Mean AUC of the strongest attack, whatever it needs."""
    return max(statistics.mean(x) for x in line.auc.values())


def apart(mine: dict[str, list[float]], its: dict[str, list[float]]) -> dict[str, float]:
    """Mean over the seeds that both have of the difference between two arms, by attack or changed copy."""
    return {
        name: statistics.mean(a - b for a, b in zip(mine[name], its[name], strict=False))
        for name in mine
        if name in its
    }


def above(mine: dict[str, list[float]], its: dict[str, list[float]]) -> tuple[str, float]:
    """The attack that finds most more in one arm than in another, and how much more."""
    return max(apart(mine, its).items(), key=lambda item: item[1], default=("", float("nan")))


def farthest(mine: dict[str, list[float]], its: dict[str, list[float]]) -> tuple[str, float]:
    """The changed copy in which two arms differ most, in either direction, and by how much."""
    return max(apart(mine, its).items(), key=lambda item: abs(item[1]), default=("", float("nan")))


def recited(line: Line) -> str:
    """Share recited with own sinks, mean over the numbers of copies from 16 on; "-" without sinks."""
    values = [line.recited[copies] for copies in line.recited if copies >= 16]
    return spread([statistics.mean(x) for x in zip(*values, strict=True)], ".0%") if values else "-"


def met_once(name: str, arms: Mapping[str, Line]) -> Line | None:
    """The model that met each text once and the same other text as an arm; None: it was not trained, or is the arm itself."""
    if name.startswith("dedup"):
        return None
    return arms.get("dedup, fresh text" if name == "exact, fresh text" else "dedup")


def row(name: str, arms: Mapping[str, Line]) -> str:
    line, once = arms[name], met_once(name, arms)
    alone, beside = strongest(line, twin=False), strongest(line, twin=True)
    auc, nats = ("", 0.0), ("", 0.0)
    if once is not None:
        auc, nats = above(line.auc, once.auc), farthest(line.gaps, once.gaps)
    cells = [
        NAMES.get(name, name),
        str(len(line.price)),
        spread(line.price, "+.3f"),
        f"{alone[1]:.2f} ({alone[0]})",
        f"{beside[1]:.2f} ({short(beside[0])})" if beside[0] else "-",
        "-" if once is None else f"{auc[1]:+.2f} ({short(auc[0])})",
        *(spread(line.gaps[name], "+.3f") for name in ("as it is", *GAPS)),
        "-" if once is None else f"{nats[1]:+.3f} ({nats[0]})",
        recited(line),
    ]
    return "| " + " | ".join(cells) + " |"


def short(attack: str) -> str:
    """An attack with the twin without saying so."""
    return attack.removeprefix("reference, ").replace("reference", "one-sided")


def table(found: dict[int, dict[str, Line]]) -> str:
    """Markdown: a table a regime, an arm a line."""
    head = [
        "arm", "seeds", "price (nats)", "strongest attack alone, AUC", "with the twin, AUC", "most above seen once, AUC",
        "gap (nats)", *GAPS.values(), "farthest from seen once, nats", "recited with own sinks, 16 copies and more",
    ]  # fmt: skip
    parts = []
    for share, arms in found.items():
        parts.append(f"**{share}% of the rows are repeats**\n")
        parts.append("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
        parts += [row(name, arms) for name in ORDER if name in arms]
        parts.append("")
    return "\n".join(parts)


def brief(found: dict[int, dict[str, Line]]) -> str:
    """Markdown for the README: some figures, all regimes in one line an arm."""
    titles = ("price", "strongest attack", "left after 60 steps")
    head = ["", *(f"{share}%: {title}" for share in found for title in titles), "recited"]
    parts = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for name in ORDER:
        cells = [NAMES.get(name, name)]
        for arms in found.values():
            if name not in arms:
                cells += ["-"] * len(titles)
                continue
            line, left = arms[name], apart(arms[name].gaps, arms["dedup"].gaps)["60 harmless steps"]
            cells += [
                spread(line.price, "+.3f"),
                f"{strongest_of_all(line):.2f}",
                "0" if name == "dedup" else f"{left:+.3f}",
            ]
        last = [arms[name] for arms in found.values() if name in arms]
        if not last:
            continue
        cells.append(recited(last[-1]))
        parts.append("| " + " | ".join(cells) + " |")
    return "\n".join(parts)


def draw(found: dict[int, dict[str, Line]], path: Path) -> None:
    """Strongest attack of all against price, a line a regime."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, 5.2), layout="constrained")
    axes = figure.subplots()
    marks = {
        "standard": "o",
        "decay": "s",
        "decay, settled": "D",
        "decay 1, until 0.3": "X",
        "exact": "^",
        "exact, fresh text": "P",
        "dedup": "v",
    }
    for share, arms in found.items():
        points = {
            name: (statistics.mean(line.price), strongest_of_all(line)) for name, line in arms.items() if name in marks
        }
        ordered = [points[name] for name in ORDER if name in points and name != "dedup"]
        axes.plot(
            *zip(*ordered, strict=True),
            color=COLORS[share],
            lw=1.2,
            alpha=0.5,
            label=f"{share}% of the rows are repeats",
        )
        for name, (x, y) in points.items():
            axes.plot([x], [y], marker=marks[name], color=COLORS[share], ls="", ms=8)
    for name, mark in marks.items():
        if any(name in arms for arms in found.values()):
            axes.plot([], [], marker=mark, color="#555555", ls="", ms=8, label=NAMES.get(name, name))
    axes.axhline(0.5, color="#999999", lw=1, ls=":")
    axes.axvline(0, color="#999999", lw=1)
    axes.set(
        xlabel="price: loss on held-out text against ordinary training (nats)    ← better",
        ylabel="strongest membership attack, AUC    ← better (0.5 = chance)",
        ylim=(0.45, 1.02),
    )
    axes.grid(color="#e2e2e2", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    text = parser.parse_args().text
    results = {
        share: json.loads(path.read_text())
        for share in SHARES
        if (path := RUNS / f"{text}-{share}" / "compare.json").is_file()
    }
    found = {share: lines(result) for share, result in results.items()}
    (HERE / f"{text}.md").write_text(table(found))
    (HERE / f"{text}.json").write_text(json.dumps(results, indent=1) + "\n")
    draw(found, HERE / f"{text}.png")
    print(table(found), brief(found), sep="\n")


if __name__ == "__main__":
    main()
