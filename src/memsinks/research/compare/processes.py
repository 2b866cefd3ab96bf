"""Several runs of a comparison at a time: each a process of its own, on a GPU of its own where there are any."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from memsinks.errors import CheckpointError, ConfigError
from memsinks.research.compare.arm import Arm
from memsinks.research.compare.comparison import Comparison

logger = logging.getLogger(__name__)

Key = tuple[str, int]
"""Arm and seed."""


def run_processes(comparison: Comparison, todo: Sequence[tuple[Arm, int]], jobs: int, command: Sequence[str]) -> None:
    """Train arms with seeds, `jobs` at a time; what each says is in a log file beside its folder.

    Args:
        command: the arguments of ``memsinks compare`` that say which comparison it is.

    Raises:
        ConfigError: more jobs than GPUs.
        CheckpointError: a run failed; the others have been finished.
    """
    gpus = _visible_gpus()
    if gpus and jobs > len(gpus):
        raise ConfigError(f"{jobs} jobs need as many GPUs, {len(gpus)} are visible ({', '.join(gpus)}); lower --jobs")
    free = list(gpus) or [""] * jobs
    running: dict[Key, tuple[subprocess.Popen[bytes], str]] = {}
    failed: list[Key] = []
    started = time.time()
    try:
        for place, (arm, seed) in enumerate(todo):
            _wait(running, jobs - 1, free, failed)
            gpu, log = free.pop(0), _log(comparison, arm, seed)
            logger.info(
                "run %d of %d, %.0f s: %s, seed %d: %s",
                place + 1,
                len(todo),
                time.time() - started,
                arm.name,
                seed,
                log,
            )
            running[arm.name, seed] = _start(arm, seed, command, log, gpu), gpu
        _wait(running, 0, free, failed)
    finally:
        for process, _ in running.values():
            process.terminate()
    if failed:
        logs = [str(_log(comparison, arm, seed)) for arm, seed in todo if (arm.name, seed) in failed]
        raise CheckpointError(
            f"failed: {', '.join(f'{name}, seed {seed}' for name, seed in failed)}; see {', '.join(logs)}"
        )


def _start(arm: Arm, seed: int, command: Sequence[str], log: Path, gpu: str) -> subprocess.Popen[bytes]:
    only = ["--train-only", "--arms", arm.name, "--seeds", str(seed)]
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "memsinks.cli", "compare", *command, *only],
            stdout=file,
            stderr=subprocess.STDOUT,
            env=os.environ | ({"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}),
        )


def _wait(
    running: dict[Key, tuple[subprocess.Popen[bytes], str]], until: int, free: list[str], failed: list[Key]
) -> None:
    """Wait until at most so many are `running`; GPUs become `free`, what ended badly is `failed`."""
    while len(running) > until:
        for key in [key for key, (process, _) in running.items() if process.poll() is not None]:
            process, gpu = running.pop(key)
            free.append(gpu)
            if process.returncode:
                failed.append(key)
        time.sleep(0.2)


def _log(comparison: Comparison, arm: Arm, seed: int) -> Path:
    return comparison.folder(arm, seed).with_name(f"{arm.slug}.log")


def _visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name in a process of ours; [] without a GPU."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not torch.cuda.is_available():
        return []
    return given.split(",") if given else [str(place) for place in range(torch.cuda.device_count())]
