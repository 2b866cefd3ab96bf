"""Commands, measured: time, memory and processor of all their processes; killed when something asks for it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

EVERY = 0.25
"""Seconds between two looks at the processes."""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
KEEP_BLOCKS = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**32)}
"""In training: glibc gives large blocks back at once and takes them again, half of the time of such small models."""


@dataclass
class Measured:
    """One command: wall and processor seconds; the most memory of all its processes together, MB (pages that they share counted
    once, Linux's PSS); how it ended, "finished" or "killed"."""

    seconds: float
    cpu_seconds: float
    peak_mb: int
    ended: str
    said: str

    def facts(self) -> dict:
        return {name: value for name, value in asdict(self).items() if name != "said"}


def command(*arguments: object, processes: int = 0) -> list[str]:
    """`memsinks` with these arguments; under torchrun if there are several processes."""
    start = [sys.executable, "-m"]
    if processes:
        settings = [f"{name}={value}" for name, value in KEEP_BLOCKS.items()]
        start = ["env", *settings, *start, "torch.distributed.run", "--standalone"]
        start += ["--nproc-per-node", str(processes), "-m"]
    return [*start, "memsinks.cli", *map(str, arguments)]


def run(
    arguments: Sequence[str], log: Path, kill_when: Callable[[float], bool] | None = None, pause: float = 0.05
) -> Measured:
    """Run a command; what it says is added to `log`.

    Args:
        kill_when: seconds since the start -> whether all its processes are killed (SIGKILL) now; asked every `pause` seconds.

    Raises:
        SystemExit: it failed.
    """
    started, looked, peak = time.monotonic(), -EVERY, 0
    used: dict[tuple[int, float], float] = {}
    with log.open("ab") as file:
        begin = file.tell()
        root = psutil.Popen(arguments, stdout=file, stderr=subprocess.STDOUT, env=os.environ | ENVIRONMENT)
        killed = False
        while root.poll() is None:
            now = time.monotonic() - started
            if kill_when is not None and kill_when(now):
                _kill(root)
                killed = True
                break
            if now - looked >= EVERY:
                looked = now
                peak = max(peak, _look(root, used))
            time.sleep(pause)
        code = root.wait()
    seconds = time.monotonic() - started
    said = log.read_bytes()[begin:].decode(errors="replace")
    if code and not killed:
        raise SystemExit(f"{' '.join(arguments)} failed ({code}); see {log}\n{said[-3000:]}")
    return Measured(
        round(seconds, 1), round(sum(used.values()), 1), round(peak / 1e6), "killed" if killed else "finished", said
    )


def _family(root: psutil.Process) -> list[psutil.Process]:
    try:
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _look(root: psutil.Process, used: dict[tuple[int, float], float]) -> int:
    """Bytes of all processes together; their processor seconds are noted in `used`."""
    total = 0
    for process in _family(root):
        try:
            times = process.cpu_times()
            used[process.pid, process.create_time()] = times.user + times.system
            rollup = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            total += 1024 * sum(int(x.split()[1]) for x in rollup.splitlines() if x.startswith("Pss:"))
        except (psutil.NoSuchProcess, OSError):
            continue
    return total


def _kill(root: psutil.Process) -> None:
    """SIGKILL for the command and all below it, none of which may start others between."""
    family = _family(root)
    for process in family:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(family, timeout=30)


def stored(*paths: Path) -> int:
    """Bytes of files and of all files below folders."""
    files = [x for path in paths for x in ([path] if path.is_file() else path.rglob("*")) if x.is_file()]
    return sum(x.stat().st_size for x in files)
