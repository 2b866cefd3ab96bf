"""The pictures of a report, as SVG. Colors are those of Okabe and Ito, told apart by color-blind readers; each line also
has a marker or a dash of its own."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from memsinks.auditing.membership import roc
from memsinks.auditing.result import Audit
from memsinks.errors import ConfigError

STYLES = {
    "audited": ("#009E73", "D", "-"),
    "against": ("#D55E00", "o", "-"),
    "twin": ("#0072B2", "s", "--"),
    "seen once": ("#CC79A7", "^", "-."),
}
MORE = [("#56B4E9", "v", ":"), ("#E69F00", "P", "--"), ("#666666", "X", "-."), ("#000000", "*", ":")]
CONTROL = "#999999"


LOOK: dict[Any, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e2e2e2",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "font.size": 10,
    "svg.hashsalt": "memsinks",
}


def require_matplotlib() -> None:
    """ConfigError where matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("this draws pictures and needs matplotlib: pip install 'memsinks[plot]'")


def styles(audit: Audit) -> dict[str, tuple[str, str, str]]:
    """Color, marker and dash of each model by name."""
    more = iter(MORE * len(audit.models))
    return {model.name: STYLES[model.role] if model.role in STYLES else next(more) for model in audit.models}


def extraction(audit: Audit, axes: Any) -> None:
    """Share recited against copies."""
    look = styles(audit)
    levels = [line.copies for line in audit.lines]
    for place, model in enumerate(audit.models):
        color, marker, dash = look[model.name]
        asked = [(x, line.extracted) for x, line in enumerate(model.lines) if line.asked]
        shift = (place - (len(audit.models) - 1) / 2) * 0.05
        value = np.array([100 * share.value for _, share in asked])
        low, high = (np.array([100 * getattr(share, side) for _, share in asked]) for side in ("low", "high"))
        axes.errorbar(
            [x + shift for x, _ in asked],
            value,
            [value - low, high - value],
            color=color,
            marker=marker,
            ls=dash,
            label=model.name,
            capsize=2,
            elinewidth=1,
            lw=1.8,
            clip_on=False,
        )
    axes.set_xticks(range(len(levels)), ["never\nseen" if level == 0 else str(level) for level in levels])
    axes.set(xlabel="copies in training", ylabel="documents recited (%)", ylim=(0, 100))
    axes.legend()


def losses(audit: Audit, figure: Any) -> None:
    """Loss of target documents and controls, one panel a model."""
    shown = [one for one in audit.measured if one.role != "other"]
    target, control = sides(audit)
    axes = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    every = np.concatenate([one.loss for one in shown])
    least, most = np.quantile(every, [0.002, 0.998])
    bins = np.linspace(least, max(most, least + 0.1), 48)
    look = styles(audit)
    for axis, one in zip(axes, shown, strict=True):
        for chosen, color, label, fill in (
            (control, CONTROL, "controls", True),
            (target, look[one.name][0], "documents", False),
        ):
            values = np.clip(one.loss[chosen], bins[0], bins[-1])
            axis.hist(
                values,
                bins,
                density=True,
                histtype="stepfilled" if fill else "step",
                color=color,
                lw=2,
                label=label,
                alpha=0.45 if fill else 1,
            )
        axis.set_yticks([])
        axis.grid(False)
        axis.spines["left"].set_visible(False)
        axis.set_title(one.name, fontsize=10, loc="left")
        axis.legend(fontsize=9, loc="upper left" if one is shown[0] else "best")
    axes[-1].set_xlabel("loss (nats per token)")


def receiver(audit: Audit, axes: Any) -> None:
    """ROC of the loss attack."""
    target, control = sides(audit)
    look = styles(audit)
    axes.plot([0, 100], [0, 100], color=CONTROL, lw=1, label="chance")
    for one in audit.measured:
        color, _, dash = look[one.name]
        false, true = roc(one.attacks["loss"][target], one.attacks["loss"][control])
        axes.plot(100 * false, 100 * true, color=color, ls=dash, lw=1.8, label=one.name)
    axes.set(
        xlabel="controls taken for members (%)",
        ylabel="members found (%)",
        xlim=(0, 100),
        ylim=(0, 100),
    )
    axes.legend(loc="lower right")


def queries(audit: Audit, axes: Any) -> None:
    """(n, p)-extraction: share recited at least once by n samples, most repeated documents."""
    look = styles(audit)
    most = str(max(line.copies for line in audit.lines))
    for model in audit.models:
        color, marker, dash = look[model.name]
        curve = model.queries[most]
        axes.plot(
            list(curve),
            [100 * x for x in curve.values()],
            color=color,
            marker=marker,
            ls=dash,
            lw=1.8,
            label=model.name,
            clip_on=False,
        )
    axes.set_xscale("log")
    axes.set(xlabel="samples", ylabel=f"documents with {most} copies (%)", ylim=(0, 100))
    axes.legend()


def pareto(audit: Audit, axes: Any) -> None:
    """Gap closed against price, one point a model, the ordinary model at (0, 0)."""
    look = styles(audit)
    before = audit.model("against")
    assert before is not None
    color, marker, _ = look[before.name]
    axes.plot([0], [0], marker=marker, color=color, ls="", label=before.name, markersize=8)
    for model in audit.models:
        if model.forgetting is None or model.state == "open" or np.isnan(model.forgetting.gap_closed.value):
            continue
        color, marker, _ = look[model.name]
        x, y = model.forgetting.price, model.forgetting.gap_closed
        axes.errorbar(
            [x.value],
            [100 * y.value],
            xerr=[[x.value - x.low], [x.high - x.value]],
            yerr=[[100 * (y.value - y.low)], [100 * (y.high - y.value)]],
            color=color,
            marker=marker,
            ls="",
            capsize=2,
            elinewidth=1,
            label=model.name,
            markersize=8,
        )
    axes.axvline(0, color=CONTROL, lw=1)
    axes.axhline(100, color=CONTROL, lw=1, ls=":")
    axes.set(
        xlabel="price: loss on controls against the ordinary model (nats)   ← better",
        ylabel="gap closed (%)   better →",
    )
    axes.legend()


def probes(audit: Audit, axes: Any) -> None:
    """Loss gap of each model and of its changed copies, one row a change; without the models of other roles."""
    look = styles(audit)
    shown = [model for model in audit.models if model.role != "other" and model.probes]
    names = list(dict.fromkeys(probe.name for model in shown for probe in model.probes))
    rows = ["as it is", *names]
    for place, model in enumerate(shown):
        color, marker, _ = look[model.name]
        gaps = {"as it is": model.gap} | {probe.name: probe.gap for probe in model.probes}
        known = [(row, gaps[name]) for row, name in enumerate(rows) if name in gaps]
        value = np.array([gap.value for _, gap in known])
        low, high = (np.array([getattr(gap, side) for _, gap in known]) for side in ("low", "high"))
        shift = (place - (len(shown) - 1) / 2) * 0.16
        axes.errorbar(
            value,
            [row + shift for row, _ in known],
            xerr=[value - low, high - value],
            color=color,
            marker=marker,
            ls="",
            ms=5,
            capsize=2,
            elinewidth=1,
            label=model.name,
        )
    axes.axvline(0, color=CONTROL, lw=1)
    axes.set_yticks(range(len(rows)), rows)
    axes.invert_yaxis()
    axes.set_xlabel("loss gap: controls less documents (nats)   ← better")
    axes.legend()


def sides(audit: Audit) -> tuple[np.ndarray, np.ndarray]:
    """Which entries are target documents and which are controls, bool [n] each."""
    assert audit.corpus is not None
    return audit.corpus.target, audit.corpus.control


def drawn(audit: Audit, legends: bool = True) -> list[tuple[str, str, bytes]]:
    """All pictures that this audit has: (title, what it shows, SVG).

    Args:
        legends: whether each names its models; the report has one legend for all (`keys`).
    """
    shown = sum(model.role != "other" for model in audit.models)
    settings = audit.settings
    asked = (
        "The private part recited in full"
        if settings["private_part"]
        else f"{settings['continuation']} tokens recited verbatim after {settings['prefix']}"
    )
    sampled = f"Share of documents that n samples recite at least once with probability {settings['queries_p']:g}."
    tall = max(4.4, 0.7 + 1.35 * shown)
    pictures = [
        ("Extraction", f"{asked}, by number of copies; bars: 95% Wilson intervals.", extraction, 3.6),
        ("Sampling", sampled, queries, 3.6),
        (
            "Loss",
            f"Mean loss of {audit.target} and of controls. As if never seen, the two lie on each other.",
            losses,
            tall,
        ),
    ]
    if any(model.probes for model in audit.models):
        text = "Loss gap of copies that were rounded or trained further. Right of the twin's: something was left."
        pictures.append(("Changed copies", text, probes, tall))
    text = "ROC of the loss attack. On the diagonal, members cannot be told from controls."
    pictures.append(("Membership", text, receiver, 4.2))
    if any(model.forgetting for model in audit.models):
        pictures.append(("Forgetting against price", "Top left is best. Bars: 95% over documents.", pareto, 4.2))
    return [(title, text, _svg(audit, draw, height, legends)) for title, text, draw, height in pictures]


WIDTH = 6.0
"""Of a picture, inches."""


def _svg(audit: Audit, draw: Callable[[Audit, Any], None], height: float, legends: bool) -> bytes:
    """One picture; that of the losses names documents and controls in any case."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(LOOK):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        if draw is losses:
            draw(audit, figure)
        else:
            axes: Any = figure.subplots()
            draw(audit, axes)
            if not legends:
                axes.get_legend().remove()
        return _saved(figure)


def keys(audit: Audit) -> list[tuple[str, str, bytes]]:
    """The legend of all pictures: each model's name, the state of its sinks, and its line and marker as SVG."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    found = []
    for model in audit.models:
        color, marker, dash = styles(audit)[model.name]
        figure = Figure(figsize=(0.55, 0.18))
        figure.patch.set_alpha(0)
        figure.add_artist(Line2D([0.02, 0.5, 0.98], [0.5] * 3, color=color, ls=dash, lw=1.8))
        figure.add_artist(Line2D([0.5], [0.5], color=color, marker=marker, ls="", markersize=7))
        found.append((model.name, model.state, _saved(figure)))
    return found


def _saved(figure: Any) -> bytes:
    """A figure as SVG, the same bytes each time."""
    from matplotlib import rc_context

    file = io.BytesIO()
    with rc_context(LOOK):
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def save(audit: Audit, folder: Path) -> list[Path]:
    """Write each picture as NAME.svg into a folder that exists."""
    paths = []
    for title, _, svg in drawn(audit):
        paths.append(folder / f"{title.lower().replace(' ', '-')}.svg")
        paths[-1].write_bytes(svg)
    return paths
