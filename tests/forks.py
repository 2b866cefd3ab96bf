"""Processes that a test forks and kills with SIGKILL, after some seconds or at a change of a file."""

from __future__ import annotations

import os
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

WRITES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")
CRASHED = 70
"""Exit code of a process that ended with a traceback."""


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Args:
        code: its exit code; None = it was killed as asked, -1 = it had not ended after the time limit.
        said: stdout and stderr. seconds: that it ran. changes: of files, as `forked` counts them, of one that came to its end.
    """

    code: int | None
    said: str
    seconds: float
    changes: int

    @property
    def killed(self) -> bool:
        return self.code is None


def forked(
    run: Callable[[], object],
    *,
    kill_after: float | None = None,
    kill_at: int | None = None,
    kill_once: Path | None = None,
    below: Path | None = None,
    timeout: float = 120.0,
) -> Ended:
    """Run something in a fork of this process, which has imported all that it needs.

    Args:
        run: gives the exit code, or anything else for 0.
        kill_after: seconds. kill_at: just before its so manieth change of a file `below`: it opens one for writing, makes,
            renames or removes one. kill_once: before the first such change when this is there.
        timeout: seconds, after which it is ended.
    """
    started, (reader, writer) = time.monotonic(), os.pipe()
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if not child:
            os.dup2(said.fileno(), 1)
            os.dup2(said.fileno(), 2)
            sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
            _ended(_counted(run, kill_at, kill_once, below, writer))
        os.close(writer)
        limit = timeout if kill_after is None else kill_after
        late = not _waited(child, limit)
        if late:
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        seconds = time.monotonic() - started
        with os.fdopen(reader) as pipe:
            changes = int(pipe.read() or 0)
        said.seek(0)
        text = said.read().decode(errors="replace")
    if code == -signal.SIGKILL:
        return Ended(-1 if late and kill_after is None else None, text, seconds, changes)
    return Ended(code, text, seconds, changes)


def _waited(child: int, seconds: float) -> bool:
    """Whether a process ended within some seconds."""
    descriptor = os.pidfd_open(child)
    try:
        return bool(select.select([descriptor], [], [], seconds)[0])
    finally:
        os.close(descriptor)


def _counted(
    run: Callable[[], object], kill_at: int | None, kill_once: Path | None, below: Path | None, writer: int
) -> int:
    count, place = 0, "" if below is None else str(below)

    def counting(event: str, given: tuple) -> None:
        nonlocal count
        writing = event in WRITES or (event == "open" and bool(given[2] & (os.O_WRONLY | os.O_RDWR)))
        if writing and str(Path(str(given[0])).absolute()).startswith(place):
            count += 1
            if count == kill_at or (kill_once is not None and kill_once.exists()):
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(counting)
    try:
        code = run()
    except BaseException:
        traceback.print_exc()
        code = CRASHED
    os.write(writer, str(count).encode())
    return code if isinstance(code, int) else 0


def _ended(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
