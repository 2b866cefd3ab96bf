"""SIGKILL at random times: the same command then ends with the same bytes, and nothing is left beside them."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from forks import Ended

from faults.commands import Command, leftovers, outcome, record_holds, run

FRESH = 10
"""Every so manieth export is checked in a fresh process, as it is for users; 5 s each."""


@dataclass
class Kills:
    """What came of killing a command.

    Args:
        seconds: of the uninterrupted command. killed: how often it was. late: how often it had ended before.
        phases: kills by how far the command had come. twice: runs that were killed twice.
        faults: what went wrong, in words.
    """

    command: str
    seconds: float = 0.0
    killed: int = 0
    late: int = 0
    twice: int = 0
    phases: Counter[str] = field(default_factory=Counter)
    moments: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def kill_often(command: Command, base: Path, scratch: Path, times: int, *, by: str = "time", seed: int = 0) -> Kills:
    """Kill a command until it was killed so many times, and let it go on after each or each second kill.

    Args:
        base: that `make_base` made. scratch: a folder for this alone.
        by: "time", spread over the duration of the uninterrupted command, or "change", before a change of a file.
    """
    rng, found, whole = random.Random(f"{command.name} {by} {seed}"), Kills(command.name), scratch / "whole"
    command.start(base, whole)
    source = outcome(whole)
    done = run(whole, command.argv)
    assert done.code == 0, done.said
    found.seconds, changes = round(done.seconds, 2), done.changes
    wanted, number = outcome(whole), 0
    while found.killed < times and number < 3 * times:
        folder = scratch / f"run-{number}"
        command.start(base, folder)
        for again in range(1 + (number % 3 == 2)):
            share = rng.uniform(0, 0.6 if again else 1)
            moment = {"kill_after": share * done.seconds} if by == "time" else {"kill_at": 1 + int(share * changes)}
            before = command.phase(folder)
            ended = run(folder, command.asked_again(folder) if again else command.argv, **moment)
            if not ended.killed:
                found.late += 1
                _expect(found, _ended_well(command, before, ended), number, f"it ended with {ended.code}: {ended.said}")
                break
            found.killed += 1
            found.twice += again
            found.moments.append(share)
            found.phases[command.phase(folder)] += 1
        _go_on(command, folder, number, found, source, wanted)
        shutil.rmtree(folder)
        number += 1
    return found


def _go_on(
    command: Command, folder: Path, number: int, found: Kills, source: dict[str, str], wanted: dict[str, str]
) -> None:
    """Run a command to its end in a folder where it was killed, and compare."""
    state = command.phase(folder)
    again = run(folder, command.asked_again(folder), fresh=command.name == "export" and number % FRESH == 0)
    good = _ended_well(command, state, again)
    _expect(found, good, number, f"killed in '{state}', then it ended with {again.code}: {again.said}")
    now = outcome(folder)
    differ = sorted(x for x in now.keys() | wanted.keys() if now.get(x) != wanted.get(x))
    _expect(found, not differ, number, f"killed in '{state}', then {', '.join(differ[:4])} differ")
    _expect(found, not leftovers(folder), number, f"killed in '{state}', {', '.join(leftovers(folder))} are left")
    hurt = [x for x, digest in source.items() if not x.startswith(f"{command.writes}/") and now.get(x) != digest]
    _expect(found, not hurt, number, f"its sources {', '.join(hurt)} were changed")
    _expect(found, record_holds(folder), number, "the record of the take-down does not hold")


def _ended_well(command: Command, phase: str, ended: Ended) -> bool:
    """Whether a command came to its end; one that was finished before may say that there is nothing left to do."""
    said = {"export": "is not an empty folder", "takedown": "was taken out already"}.get(command.name)
    done = phase == "finished" and said is not None
    return ended.code == 2 and said in ended.said if done else ended.code == 0


def _expect(found: Kills, good: bool, number: int, says: str) -> None:
    if not good:
        found.faults.append(f"{found.command}, run {number}: {says.strip()[-600:]}")
