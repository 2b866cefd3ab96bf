"""Full disks and read-only folders: one error of ours, what was there stays, and the same command succeeds afterwards.

A small tmpfs where the tests run as root and may mount; else a limit on the size of files, and folders without the right to
write. Where root may not mount, neither binds it, and that is said.
"""

from __future__ import annotations

import os
import resource
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from forks import Ended

from faults.commands import Command, leftovers, outcome, run

SHARES = (0.0, 0.2, 0.5, 0.8)
"""Of what a command writes, for which there is room."""
ROOMY = "64m"


@dataclass
class Disks:
    """What came of full disks and read-only folders.

    Args:
        how: "tmpfs" or "limits". counts: refusals. faults: what went wrong, in words.
    """

    how: str
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)


def can_mount(folder: Path) -> bool:
    """Whether this process may mount a tmpfs."""
    folder.mkdir(parents=True, exist_ok=True)
    if os.geteuid() or _mount("-t", "tmpfs", "-o", f"size={ROOMY}", "memsinks-faults", str(folder)):
        return False
    subprocess.run(["umount", str(folder)], check=True)
    return True


def why_not(folder: Path) -> str | None:
    """Why neither a disk can be filled here nor a folder made read-only; None = it can."""
    return "root without the right to mount: no limit binds it" if not os.geteuid() and not can_mount(folder) else None


def fill_disks(command: Command, base: Path, scratch: Path, shares: tuple[float, ...] = SHARES) -> Disks:
    """Run a command with too little room, and in a folder that is read-only; then with room, to its end."""
    whole = scratch / "whole"
    command.start(base, whole)
    before = _size(whole)
    done = run(whole, command.argv)
    assert done.code == 0, done.said
    written, wanted = max(_size(whole) - before, 1), outcome(whole)
    if not can_mount(scratch / "disk"):
        return _with_limits(command, base, scratch / "limited", shares, wanted)
    found = Disks("tmpfs")
    for share in (*shares, None):
        with _disk(scratch / "disk") as disk:
            place = disk / "place"
            command.start(base, place)
            source = outcome(place)
            used = sum(x.stat().st_blocks * 512 for x in disk.rglob("*"))
            room = "ro" if share is None else f"size={used + int(share * written) // 4096 * 4096}"
            assert not _mount("-o", f"remount,{room}", str(disk))
            ended = run(place, command.argv)
            assert not _mount("-o", f"remount,rw,size={ROOMY}", str(disk))
            _judge(
                found, command, place, "read-only" if share is None else f"room for {share:.0%}", ended, source, wanted
            )
    return found


def _with_limits(command: Command, base: Path, place: Path, shares: tuple[float, ...], wanted: dict[str, str]) -> Disks:
    """As `fill_disks`, for users that limits bind: no file may be larger than some bytes."""
    found = Disks("limits")
    for share in (*shares, None):
        command.start(base, place)
        source = outcome(place)
        if share is None:
            place.chmod(0o500)
            ended = run(place, command.argv)
            place.chmod(0o700)
        else:
            ended = run(place, command.argv, before=_no_larger_than(int(share * 100_000)))
        _judge(found, command, place, "read-only" if share is None else f"files of {share:.0%}", ended, source, wanted)
    return found


def _no_larger_than(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _judge(
    found: Disks, command: Command, place: Path, how: str, ended: Ended, source: dict[str, str], wanted: dict[str, str]
) -> None:
    kind = "read-only" if how == "read-only" else "full"
    lines = [x for x in ended.said.splitlines() if x.startswith("memsinks: ")]
    problems = [] if ended.code == 2 and len(lines) == 1 else [f"ended with {ended.code}: {ended.said[-600:]}"]
    if ended.code == 0 and kind == "full":  # what was written was less than the blocks that it filled
        problems, kind = [], "fitted"
    now = outcome(place)
    hurt = [x for x, digest in source.items() if now.get(x) != digest]
    problems += [f"{', '.join(hurt)} changed"] if hurt and ended.code else []
    again = run(place, command.asked_again(place)) if ended.code else ended
    problems += [] if again.code == 0 else [f"then it ended with {again.code}: {again.said[-600:]}"]
    problems += [] if outcome(place) == wanted else ["then the outcome is another"]
    problems += [f"{', '.join(leftovers(place))} are left"] if leftovers(place) else []
    found.counts[kind] += 1
    found.faults += [f"{command.name}, {how}: {x}" for x in problems]


def _size(folder: Path) -> int:
    return sum(x.stat().st_blocks * 512 for x in folder.rglob("*"))


@contextmanager
def _disk(folder: Path) -> Iterator[Path]:
    assert not _mount("-t", "tmpfs", "-o", f"size={ROOMY}", "memsinks-faults", str(folder))
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def _mount(*arguments: str) -> int:
    try:
        return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode
    except FileNotFoundError:
        return 1
