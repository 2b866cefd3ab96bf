"""The whole suite: `make test-faults`, or ``PYTHONPATH=tests python -m faults [PART ...]`` for parts of it.

Prints the counts, writes each line of them into `results.json` as it comes, and the table of all into `docs/limits.md`; ends with
status 1 if anything went wrong.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from faults.commands import COMMANDS, make_base
from faults.damage import KINDS, SCENES, damage_each, make_bases
from faults.disks import fill_disks, why_not
from faults.inputs import make_places, readers, shares, try_inputs
from faults.kills import kill_often
from memsinks._version import versions
from memsinks.files import write_json

RESULTS = Path(__file__).with_name("results.json")
PAGE = Path(__file__).parents[2] / "docs" / "limits.md"
BEGIN, END = "<!-- faults: of tests/faults/results.json -->", "<!-- /faults -->"
KILLS, AT_CHANGES, INPUTS, SEED = 50, 10, 100_000, 0
PACKAGES = ("torch", "transformers", "safetensors", "numpy", "pyarrow", "hypothesis", "pyyaml", "datatrove")


Rows = Iterator[tuple[dict[str, Any], list[str]]]
"""A line of counts, and the faults that it counts in words."""


def kills(scratch: Path) -> Rows:
    """SIGKILL, spread over the time of each command, then before changes of files."""
    base = make_base(scratch / "base")
    for command in COMMANDS.values():
        for by, times in (("time", KILLS), ("change", AT_CHANGES)):
            found = kill_often(command, base, scratch / "kills", times, by=by, seed=SEED)
            row = {"command": command.name, "by": by, "seconds": found.seconds, "killed": found.killed}
            row |= {"ended before": found.late, "killed twice": found.twice, "phases": dict(found.phases.most_common())}
            yield row | {"quarters of the duration": _quarters(found.moments)}, found.faults


def _quarters(moments: list[float]) -> list[int]:
    counts = Counter(min(3, int(4 * x)) for x in moments)
    return [counts[quarter] for quarter in range(4)]


def disks(scratch: Path) -> Rows:
    """Full disks and read-only folders."""
    if reason := why_not(scratch / "may"):
        print(f"  left out: {reason}")
        return
    base = make_base(scratch / "base")
    for command in COMMANDS.values():
        found = fill_disks(command, base, scratch / "disk")
        yield {"command": command.name, "how": found.how, **found.counts}, found.faults


def damage(scratch: Path) -> Rows:
    """Files that are cut, empty, garbage, missing, or of another run."""
    bases = make_bases(scratch)
    for scene in SCENES.values():
        found = damage_each(scene, bases, scratch / "scene")
        yield {"command": scene.name, "files": found.files, **found.by_kind()}, found.faults


def inputs(scratch: Path) -> Rows:
    """Generated inputs for all readers."""
    logging.getLogger("memsinks").setLevel(logging.ERROR)
    folder = make_places(make_base(scratch / "base"), scratch / "places")
    all_readers = readers()
    for reader, count in zip(all_readers, shares(all_readers, INPUTS), strict=True):
        found = try_inputs(reader, folder, count)
        counts = {kind: found.counts[kind] for kind in ("read", "refused")}
        faults = [f"{reader.name}: {kind}, e.g. {example}" for kind, example in found.faults.items()]
        yield {"reader": reader.name, "inputs": found.counts.total(), **counts}, faults


PARTS: dict[str, Callable[[Path], Rows]] = {part.__name__: part for part in (kills, disks, damage, inputs)}


def table(results: Mapping[str, Any]) -> str:
    """The counts for a page, in Markdown."""
    lines = ["| what | on what | how often | what came of it | faults |", "|---|---|---|---|---|"]

    def row(what: str, on: str, often: str, came: str, rows: Sequence[Mapping[str, Any]]) -> None:
        lines.append(f"| {what} | {on} | {often} | {came} | {sum(x['faults'] for x in rows)} |")

    rows = results["kills"]["rows"]
    for command in dict.fromkeys(x["command"] for x in rows):
        own = [x for x in rows if x["command"] == command]
        killed, twice = sum(x["killed"] for x in own), sum(x["killed twice"] for x in own)
        row("SIGKILL", command, f"{killed} times", f"the same bytes in the end; {twice} runs were killed twice", own)
    rows = results["disks"]["rows"]
    full, read_only = (sum(x.get(kind, 0) for x in rows) for kind in ("full", "read-only"))
    row("full disk", f"{len(rows)} commands", f"{full} times", "one error, then the same bytes", rows)
    row("read-only folder", f"{len(rows)} commands", f"{read_only} times", "one error, then the same bytes", [])
    rows = results["damage"]["rows"]
    total, refused = (sum(x[y] for x in rows for y in kinds) for kinds in (KINDS, ("refused",)))
    other = total - refused - sum(x["same outcome"] for x in rows)
    came = f"{refused:,} one error, {total - refused - other:,} the same outcome, {other} said or other input"
    row("damaged file", f"{len(rows)} scenes, {sum(x['files'] for x in rows)} files", f"{total:,} times", came, rows)
    rows = results["inputs"]["rows"]
    count, read, refused = (sum(x[name] for x in rows) for name in ("inputs", "read", "refused"))
    row(
        "generated input",
        f"{len(rows)} readers",
        f"{count:,}",
        f"{read:,} read, {refused:,} an error of ours, {count - read - refused:,} a fault",
        rows,
    )
    return "\n".join(lines)


def write_table(results: Mapping[str, Any]) -> None:
    """Put the table into `PAGE`."""
    before, after = (PAGE.read_text().partition(BEGIN)[0], PAGE.read_text().partition(END)[2])
    PAGE.write_text(f"{before}{BEGIN}\n\n{table(results)}\n\n{END}{after}")


def main(names: list[str]) -> int:
    """Run parts of the suite, all without names; returns the exit status."""
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    wrong = 0
    for name in names or PARTS:
        print(f"{name}: {PARTS[name].__doc__}", flush=True)
        started, rows, faults = time.monotonic(), [], []
        with tempfile.TemporaryDirectory(prefix="memsinks-faults-") as scratch:
            for row, found in PARTS[name](Path(scratch)):
                rows.append(row | {"faults": len(found)})
                faults += found
                seconds = round(time.monotonic() - started)
                facts = {"seconds": seconds, "seed": SEED, "versions": versions(*PACKAGES)}
                results[name] = facts | {"rows": rows, "faults": faults}
                write_json(RESULTS, results)
                print(
                    "  " + ", ".join(f"{key}: {value}" for key, value in rows[-1].items()),
                    *found,
                    sep="\n    ",
                    flush=True,
                )
        wrong += len(faults)
        print(f"{name}: {len(faults)} faults in {round(time.monotonic() - started)} s", flush=True)
    if results.keys() >= PARTS.keys():
        write_table(results)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
