"""results.json -> the tables of docs/scale.md: `python experiments/end-to-end/table.py` prints them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
STAGES = {
    "prepared, one worker": "`prepare`, one worker, undisturbed",
    "prepared, killed": "`prepare --workers 2`, killed",
    "trained, undisturbed": "`train`, two processes, undisturbed, to step {compared}",
    "trained, killed": "`train`, two processes, killed, to the end",
    "exported": "`export`",
    "audited": "`audit`",
}


def read() -> dict[str, Any]:
    return json.loads((HERE / "results.json").read_text())


def journey(found: dict[str, Any]) -> list[str]:
    """A line for each stage of the whole journey."""
    lines = [
        "| stage | seconds | of the processors | most memory, MB | written, MB | kills |",
        "|---|---|---|---|---|---|",
    ]
    whole = found["whole"]
    for name, title in STAGES.items():
        stage = whole[name]
        written = f"{stage['bytes'] / 1e6:.1f}" if "bytes" in stage else ""
        lines.append(
            f"| {title.format(**whole['journey'])} | {stage['seconds']:,.0f} | {stage['cpu_seconds']:,.0f} | "
            f"{stage['peak_mb']:,} | {written} | {stage.get('kills', 0)} |"
        )
    return lines


def growth(found: dict[str, Any]) -> str:
    """The line of 100 MB in the table of growth."""
    made = found["whole"]["prepared, one worker"]
    near = made["near_copies"]
    cells = [f"{made[name]:,}" for name in ("characters", "documents", "tokens", "cpu_seconds", "peak_mb")]
    cells += [f"{made['bytes_a_token']:.1f}", f"{near['clustered']:,} of {made['documents']:,}"]
    return f"| {' | '.join(cells)} | {near['candidate_pairs']:,} |"


def audit(found: dict[str, Any]) -> list[str]:
    """A line for each number of copies: loss closed and open, recited closed and open."""
    audited = found["whole"]["audited"]["found"]
    lines = [
        "| copies | texts | loss closed, nats | recited closed | loss open, nats | recited open |",
        "|---|---|---|---|---|---|",
    ]
    for closed, opened in zip(audited["lines"]["closed"], audited["lines"]["open"], strict=True):
        name = "0 (held out)" if closed["copies"] == 0 else closed["copies"]
        cells = (f"{x['loss']['value']:.2f} | {x['extracted']['value']:.0%}" for x in (closed, opened))
        lines.append(f"| {name} | {closed['documents']} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    everything = read()
    print("\n".join([growth(everything), "", *journey(everything), "", *audit(everything)]))
