"""What the library says while a command runs: plain lines on stderr, between progress bars."""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm

REMEDIES = {
    errno.ENOSPC: "free space, or choose another folder",
    errno.EDQUOT: "free space, or choose another folder",
    errno.EACCES: "choose another folder, or change who may write there",
    errno.EPERM: "choose another folder, or change who may write there",
    errno.EROFS: "choose another folder",
    errno.ENOTDIR: "a part of this path is a file; choose another folder",
    errno.EEXIST: "a part of this path is a file; choose another folder",
    errno.EISDIR: "this is a folder; give a file",
}


class _Lines(logging.Handler):
    """A line a message, written above the bars that are shown."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)
        sys.stderr.flush()


@contextmanager
def messages_on_stderr(quiet: bool) -> Iterator[None]:
    """Within the block, what the library logs is seen: progress and results of steps, or only warnings if `quiet`."""
    logger, handler = logging.getLogger("memsinks"), _Lines()
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    try:
        _without_noise()
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _without_noise() -> None:
    """transformers shows a bar for each of a dozen small loads and saves, and libraries that it imports warn of each other."""
    from transformers.utils.logging import disable_progress_bar

    import memsinks.runs.quiet  # noqa: F401

    disable_progress_bar()


def explained(error: OSError) -> str:
    """What the system refused, where, and what to do."""
    where = f"{error.filename}: " if error.filename else ""
    remedy = REMEDIES.get(error.errno or 0)
    return f"{where}{error.strerror or error}" + (f"; {remedy}" if remedy else "")
