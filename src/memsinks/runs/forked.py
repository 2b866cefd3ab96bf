"""How processes of runs start: on Linux they are forked from one that has imported what a run needs, which takes seconds.

This module imports nothing that is slow, so a command can have that process started while it imports the rest itself.
"""

from __future__ import annotations

import multiprocessing
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext

NEEDED = ["memsinks.runs.side_by_side"]
"""The module that such a process begins in."""
ACCELERATORS = ("nvidiactl", "dxg", "kfd", "dri", "accel")
"""Below /dev where there are some: to ask for one, as libraries do when they are imported, makes it useless to forks."""


def run_context() -> ForkServerContext | SpawnContext:
    """The context that makes processes of runs: forks on Linux without accelerators, where that is safe, otherwise new ones.

    Forks have the environment, and the state of global random numbers, that this process had when the first was made.
    """
    if sys.platform != "linux" or any((Path("/dev") / name).exists() for name in ACCELERATORS):
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(NEEDED)
    return context


def start_importing() -> None:
    """Let the process that runs are forked from import what they need, while this one does other things. In the main thread."""
    if run_context().get_start_method() == "forkserver":
        from multiprocessing import forkserver

        before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # it has nothing to say when it is interrupted
        try:
            forkserver.ensure_running()
        finally:
            signal.signal(signal.SIGINT, before)
