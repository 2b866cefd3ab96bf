"""How processes of runs start: on Linux they are forked from one that has imported what a run needs, which takes seconds.

This module imports nothing that is slow, so a command can have that process started before it imports anything itself.
"""

from __future__ import annotations

import multiprocessing
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multiprocessing.context import ForkServerContext, SpawnContext

NEEDED = ["memsinks.runs.quiet", "memsinks.runs.run"]
"""The modules that a run needs, in this order."""


def run_context() -> ForkServerContext | SpawnContext:
    """The context that makes processes of runs. Forks of a process that has imported so much are safe on Linux alone."""
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(NEEDED)
    return context


def start_importing() -> None:
    """Let the process that runs are forked from import what they need, while this one does other things."""
    if run_context().get_start_method() == "forkserver":
        from multiprocessing import forkserver

        forkserver.ensure_running()
