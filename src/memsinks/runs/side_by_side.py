"""Recipes that are trained at the same time, each in a process of its own with its share of the threads.

A small model gains next to nothing from a second thread, so two runs one after the other take nearly twice as long.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Mapping
from logging.handlers import QueueHandler, QueueListener
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

import memsinks.runs.quiet  # noqa: F401
from memsinks.errors import CheckpointError
from memsinks.runs.forked import run_context
from memsinks.runs.recipe import parse_recipe
from memsinks.runs.run import train


def train_side_by_side(recipes: Mapping[str, Mapping[str, Any]], after: float = 0.0) -> list[Path]:
    """Train some recipes; what each says is handed on to the loggers of this process.

    Args:
        recipes: label -> recipe, as for `parse_recipe`. The label stands before each line of progress.
        after: see `train`.

    Returns:
        The folder of each final model, as `train` does.

    Raises:
        ConfigError: of a recipe, before anything starts; otherwise as `train`, and the other runs are cut off.
        CheckpointError: a process was killed.
        KeyboardInterrupt: all runs are cut off.
    """
    for recipe in recipes.values():
        parse_recipe(recipe)
    threads = max(1, torch.get_num_threads() // len(recipes))
    level = logging.getLogger("memsinks").getEffectiveLevel()
    context = run_context()
    said = context.Queue()
    listener = QueueListener(said, _HandOn())
    listener.start()
    runs = []
    try:
        for label, recipe in recipes.items():
            here, there = context.Pipe(duplex=False)
            process = context.Process(target=_train, args=(there, said, level, threads, recipe, label, after))
            process.start()
            there.close()
            runs.append((process, here))
        models: dict[Connection, Path] = {}
        while waiting := [here for _, here in runs if here not in models]:
            models |= {here: _result(here) for here in wait(waiting) if isinstance(here, Connection)}
        return [models[here] for _, here in runs]
    except BaseException:
        for process, _ in runs:
            process.terminate()
        raise
    finally:
        for process, _ in runs:
            process.join()
        listener.stop()


class _HandOn(logging.Handler):
    """To the logger that a message of another process was meant for."""

    def emit(self, record: logging.LogRecord) -> None:
        logging.getLogger(record.name).handle(record)


def _train(there: Connection, said: Any, level: int, threads: int, recipe: Any, label: str, after: float) -> None:
    """In a process of its own: train, and send the folder or what went wrong."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    logger = logging.getLogger("memsinks")
    logger.addHandler(QueueHandler(said))
    logger.setLevel(level)
    torch.set_num_threads(threads)
    try:
        there.send(train(parse_recipe(recipe), label=label, after=after))
    except (Exception, KeyboardInterrupt) as error:
        there.send(error)


def _result(here: Connection) -> Path:
    try:
        result = here.recv()
    except EOFError as error:
        raise CheckpointError(
            "a process was killed while it trained, perhaps for want of memory; run it again"
        ) from error
    if isinstance(result, BaseException):
        raise result
    return result
