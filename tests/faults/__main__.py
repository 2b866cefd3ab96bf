"""The whole suite: `make test-faults`, or ``PYTHONPATH=tests python -m faults [PART ...]`` for parts of it.

Prints the counts and writes them into `results.json`, each part with its seconds; ends with status 1 if anything went wrong.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults.commands import COMMANDS, make_base
from faults.damage import SCENES, damage_each, make_bases
from faults.disks import fill_disks
from faults.inputs import make_places, readers, shares, try_inputs
from faults.kills import kill_often
from memsinks._version import versions
from memsinks.files import write_json

RESULTS = Path(__file__).with_name("results.json")
KILLS, AT_CHANGES, INPUTS, SEED = 50, 10, 100_000, 0
PACKAGES = ("torch", "transformers", "safetensors", "numpy", "pyarrow", "hypothesis", "pyyaml", "datatrove")


def kills(scratch: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """SIGKILL, spread over the time of each command, then before changes of files."""
    base, rows, faults = make_base(scratch / "base"), [], []
    for command in COMMANDS.values():
        for by, times in (("time", KILLS), ("change", AT_CHANGES)):
            found = kill_often(command, base, scratch / "kills", times, by=by, seed=SEED)
            row = {"command": command.name, "by": by, "seconds": found.seconds, "killed": found.killed}
            row |= {"ended before": found.late, "killed twice": found.twice, "phases": dict(found.phases.most_common())}
            row["quarters of the duration"] = _quarters(found.moments)
            rows.append(row | {"faults": len(found.faults)})
            faults += found.faults
            _say(row)
    return rows, faults


def _quarters(moments: list[float]) -> list[int]:
    counts = Counter(min(3, int(4 * x)) for x in moments)
    return [counts[quarter] for quarter in range(4)]


def disks(scratch: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Full disks and read-only folders."""
    base, rows, faults = make_base(scratch / "base"), [], []
    for command in COMMANDS.values():
        found = fill_disks(command, base, scratch / "disk")
        rows.append({"command": command.name, **found.counts, "faults": len(found.faults)})
        faults += found.faults
        _say(rows[-1])
    return rows, faults


def damage(scratch: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Files that are cut, empty, garbage, missing, or of another run."""
    bases, rows, faults = make_bases(scratch), [], []
    for scene in SCENES.values():
        found = damage_each(scene, bases, scratch / "scene")
        rows.append({"command": scene.name, "files": found.files, **found.by_kind(), "faults": len(found.faults)})
        faults += found.faults
        _say(rows[-1])
    return rows, faults


def inputs(scratch: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """Generated inputs for all readers."""
    rows, faults = [], []
    folder = make_places(make_base(scratch / "base"), scratch / "places")
    all_readers = readers()
    for reader, count in zip(all_readers, shares(all_readers, INPUTS), strict=True):
        found = try_inputs(reader, folder, count)
        rows.append({"reader": reader.name, "inputs": found.counts.total(), **found.counts})
        faults += [f"{reader.name}: {kind}, e.g. {example}" for kind, example in found.faults.items()]
        _say(rows[-1])
    return rows, faults


PARTS: dict[str, Callable[[Path], tuple[list[dict[str, Any]], list[str]]]] = {
    part.__name__: part for part in (kills, disks, damage, inputs)
}


def _say(row: dict[str, Any]) -> None:
    print("  " + ", ".join(f"{name}: {value}" for name, value in row.items()), flush=True)


def main(names: list[str]) -> int:
    """Run parts of the suite, all without names; returns the exit status."""
    results = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    wrong = 0
    for name in names or PARTS:
        print(f"{name}: {PARTS[name].__doc__}", flush=True)
        started = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="memsinks-faults-") as scratch:
            rows, faults = PARTS[name](Path(scratch))
        seconds = round(time.monotonic() - started)
        results[name] = {
            "seconds": seconds,
            "seed": SEED,
            "versions": versions(*PACKAGES),
            "rows": rows,
            "faults": faults,
        }
        write_json(RESULTS, results)
        print(f"{name}: {seconds} s, {len(faults)} faults", *faults, sep="\n  ", flush=True)
        wrong += len(faults)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
