"""Processes that work on tasks with a tokenizer, in bounded memory, and end with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from memsinks.data.tokens import load_tokenizer
from memsinks.errors import CheckpointError, MemsinksError


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """`count` processes that work on tasks; of one, this process itself.

    Args:
        tokenizer: the folder of the tokenizer that each loads.
    """

    def __init__(self, count: int, tokenizer: Path) -> None:
        self.count, self.tokenizer = count, tokenizer
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        if self.count > 1:
            kind = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
            context = multiprocessing.get_context(kind)
            if kind == "forkserver":
                multiprocessing.set_forkserver_preload([__name__])
            self._pool = ProcessPoolExecutor(self.count, context, _start, (self.tokenizer,))
        else:
            _LOCAL["tokenizer"] = load_tokenizer(self.tokenizer)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def run(self, function: Callable[..., Any], tasks: Iterable[Any]) -> Iterator[Any]:
        """What `function` makes of each task, in their order; of those ahead at most `count` + 1 wait.

        Raises:
            CheckpointError: a worker was killed. What `function` raises.
        """
        if self._pool is None:
            for task in tasks:
                yield _call(function, task)
            return
        waiting: deque[Future[Any]] = deque()
        tasks = iter(tasks)
        try:
            for task in tasks:
                waiting.append(self._pool.submit(_call, function, task))
                if len(waiting) > self.count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise CheckpointError(
                "a worker was killed, perhaps for want of memory; the same command goes on, with fewer workers or smaller shards "
                "it needs less"
            ) from error


_LOCAL: dict[str, Any] = {}
"""The tokenizer of this process, loaded once."""


def _start(tokenizer: Path) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent is told too
    _LOCAL["tokenizer"] = load_tokenizer(tokenizer)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(function: Callable[..., Any], task: Any) -> Any:
    try:
        return function(task, _LOCAL["tokenizer"])
    except OSError as error:
        if isinstance(error, MemsinksError):
            raise
        raise CheckpointError(f"cannot write the corpus: {error}; free space, or choose another folder") from error
