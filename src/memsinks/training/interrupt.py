"""Ctrl-C that loses nothing: the step is finished and saved first."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)


@contextmanager
def finishing_the_step(wanted: bool = True) -> Iterator[Callable[[], bool]]:
    """Within the block the first Ctrl-C only makes the given function True; the second raises KeyboardInterrupt at once.

    Nothing changes where it is not `wanted`, outside the main thread, or where somebody else handles the signal.
    """
    asked = False

    def handle(*_: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        logger.info("interrupted: this step is finished and saved; Ctrl-C again stops at once")

    ours = threading.current_thread() is threading.main_thread() and (
        signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )
    if not (wanted and ours):
        yield lambda: False
        return
    signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
