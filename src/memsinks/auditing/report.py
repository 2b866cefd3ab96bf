"""The report: one HTML page that opens offline, without scripts."""

from __future__ import annotations

import base64
from collections import defaultdict
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np

from memsinks.auditing.attacks import ATTACKS
from memsinks.auditing.pictures import drawn, keys
from memsinks.auditing.probes import PROBES
from memsinks.auditing.result import CAVEAT, Audit, Example, outcome, recited, verdict
from memsinks.auditing.uncertainty import Estimate

SURE = (0, 114, 178)
"""Color of a token the model was certain of; less certain ones fade to white."""


def write_report(audit: Audit, path: Path) -> None:
    """Write the page. It holds the text of `AuditSettings.shown` documents, and loads nothing from anywhere."""
    import jinja2  # and not above: an audit without a report does not need it

    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"number": _number, "interval": _interval, "share": _share}
    template = environment.from_string((files("memsinks.auditing") / "report.html.j2").read_text(encoding="utf-8"))
    words = verdict(audit)
    pictures = [(title, text, base64.b64encode(svg).decode()) for title, text, svg in drawn(audit, legends=False)]
    html = template.render(
        audit=audit,
        audited=audit.audited,
        headline=words[0],
        outcome=outcome(audit).replace(" ", "-"),
        tiles=_tiles(audit),
        findings=words[1:-1],
        caveat=CAVEAT,
        pictures=pictures,
        keys=[(name, state, base64.b64encode(svg).decode()) for name, state, svg in keys(audit)],
        examples=[_shaded(example) for example in audit.examples],
        attacks=_by_name(audit, "attacks"),
        looks_at=defaultdict(str, ATTACKS),
        probes=_by_name(audit, "probes"),
        probed=PROBES,
        supervised=max(x.labeled for x in audit.audited.attacks),
        grid=_grid(audit),
        contents=_contents(audit),
        sure=SURE,
    )
    path.write_text(html, encoding="utf-8")


def _contents(audit: Audit) -> list[tuple[str, str]]:
    """The sections that this page has: (anchor, title)."""
    model = audit.audited
    sections = (
        ("findings", "Findings", True),
        ("limits", "What limits these figures", audit.notes),
        ("models", "Models", True),
        ("pictures", "Pictures", True),
        ("copies", "By number of copies", True),
        ("attacks", "Membership attacks", True),
        ("changed", "Changed copies", any(x.probes for x in audit.models)),
        ("equivalence", "As if never seen?", model.equivalences),
        ("extraction", "Extraction by prefix length", model.extraction),
        ("sinks", "Sinks", model.sinks),
        ("examples", "The most remembered documents", audit.examples),
        ("settings", "Settings, versions, hashes", True),
    )
    return [(anchor, title) for anchor, title, there in sections if there]


def _tiles(audit: Audit) -> list[tuple[str, str, str]]:
    """What is read in ten seconds: (question, figure, what it stands beside)."""
    model, before = audit.audited, audit.model("against")

    def beside(text: str, reading: str) -> str:
        return f"{text} in {before.name}; {reading}" if before else reading

    hits, asked = recited(audit, model)
    earlier = recited(audit, before)[0] if before else 0
    strongest = before.strongest.auc.value if before else 0.0
    tiles = [
        ("Recited word for word?", f"{hits} of {asked}" if asked else "not asked",
         beside(str(earlier), "none is best") if asked else "documents are too short"),
        ("Better known than unseen text?", f"{model.gap.value:+.2f} nats",
         beside(f"{before.gap.value:+.2f}" if before else "", "0 = no")),
        ("Told apart by the best attack?", f"AUC {model.strongest.auc.value:.2f}",
         beside(f"{strongest:.2f}", "0.5 = chance, 1 = always")),
    ]  # fmt: skip
    if model.forgetting:
        price = model.forgetting.price.value
        tiles.append(("What did it cost?", f"{price:+.2f} nats", "loss on unseen text above the ordinary model's"))
    elif model.widest:
        tiles.append(
            ("After rounding, training on?", f"{model.widest.gap.value:+.2f} nats", f"gap, {model.widest.name}")
        )
    return tiles


def _interval(value: Estimate | None, form: str = ".3f") -> str:
    """The interval in brackets; nothing where there is none."""
    return "" if value is None or np.isnan(value.value) else f"[{value.low:{form}}, {value.high:{form}}]"


def _share(value: Estimate) -> str:
    """A share and its interval on one line."""
    if np.isnan(value.value):
        return "not asked"
    return f"{value.value:.0%} [{value.low:.1%}, {value.high:.1%}]"


def _number(value: float | None, form: str = ".1%") -> str:
    return "–" if value is None or np.isnan(value) else f"{value:{form}}"


def _by_name(audit: Audit, kind: Literal["attacks", "probes"]) -> list[tuple[str, list[Any]]]:
    """Rows of a table with a column a model: name, and what each model has under it (None = not made)."""
    found = [{one.name: one for one in getattr(model, kind)} for model in audit.models]
    names = dict.fromkeys(name for model in found for name in model)
    return [(name, [model.get(name) for model in found]) for name in names]


def _grid(audit: Audit) -> dict[str, Any]:
    """Extraction of the audited model: columns (prefix, offset), a row for each number of copies."""
    lines = audit.audited.extraction
    columns = list(dict.fromkeys((line.prefix, line.offset) for line in lines))
    rows: dict[int, list[Estimate]] = {}
    for line in lines:
        rows.setdefault(line.copies, []).append(line.extracted)
    return {"columns": columns, "rows": rows}


def _shaded(example: Example) -> dict[str, Any]:
    """Each model's view of a document: (piece, background, tooltip) for each token."""
    views = {}
    for name, probabilities in example.probabilities.items():
        tokens = []
        for piece, p in zip(example.pieces, probabilities, strict=True):
            known = not np.isnan(p)
            tokens.append((piece, f"{0.65 * p:.2f}" if known else "0", f"p = {p:.3f}" if known else "given"))
        views[name] = tokens
    return {"copies": example.copies, "key": example.key, "index": example.index, "views": views}
