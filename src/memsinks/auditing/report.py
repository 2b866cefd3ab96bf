"""The report: one HTML page that opens offline, without scripts."""

from __future__ import annotations

import base64
from collections import defaultdict
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import numpy as np

from memsinks.auditing.attacks import ATTACKS
from memsinks.auditing.pictures import drawn
from memsinks.auditing.probes import PROBES
from memsinks.auditing.result import CAVEAT, Audit, Example, outcome, verdict
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
    pictures = [(title, text, base64.b64encode(svg).decode()) for title, text, svg in drawn(audit)]
    html = template.render(
        audit=audit,
        audited=audit.audited,
        headline=words[0],
        outcome=outcome(audit).replace(" ", "-"),
        findings=words[1:-1],
        caveat=CAVEAT,
        pictures=pictures,
        examples=[_shaded(example) for example in audit.examples],
        attacks=_by_name(audit, "attacks"),
        looks_at=defaultdict(str, ATTACKS),
        probes=_by_name(audit, "probes"),
        probed=PROBES,
        supervised=max(x.labeled for x in audit.audited.attacks),
        grid=_grid(audit),
        sure=SURE,
    )
    path.write_text(html, encoding="utf-8")


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
