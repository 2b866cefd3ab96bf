"""Two processes (gloo) for tests: one start serves many checks, and none may hang."""

from __future__ import annotations

import contextlib
import datetime
import os
import signal
import socket
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

LIMIT = 60
"""Seconds that one check may take, hanging collectives included."""


class Outcomes:
    """What each check gave on rank 0; asking for one that failed on any rank fails."""

    def __init__(self, folder: Path, world: int) -> None:
        files = [folder / f"{rank}.pt" for rank in range(world)]
        self.found = [torch.load(x, weights_only=False) for x in files if x.is_file()]

    def __getitem__(self, name: str) -> Any:
        for rank, found in enumerate(self.found):
            if name in found["errors"] or name not in found["values"]:
                pytest.fail(
                    f"{name} on rank {rank}: {found['errors'] or 'was not run'}".replace("\\n", "\n"), pytrace=False
                )
        return self.found[0]["values"][name]


def on_ranks(checks: Mapping[str, tuple], folder: Path, world: int = 2) -> Outcomes:
    """Run checks, (function, arguments[, named arguments]), one after the other in `world` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with contextlib.suppress(mp.ProcessExitedException):  # what failed before is in the files
        mp.spawn(_work, (world, port, dict(checks), str(folder)), nprocs=world)
    return Outcomes(folder, world)


def _work(rank: int, world: int, port: int, checks: dict, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
                   "WORLD_SIZE": str(world), "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}  # fmt: skip
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _too_long)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=LIMIT))
    found: dict[str, dict] = {"values": {}, "errors": {}}
    for name, (check, arguments, *settings) in checks.items():
        signal.alarm(LIMIT)
        torch.manual_seed(0)
        started = time.perf_counter()
        try:
            found["values"][name] = check(*arguments, **(settings[0] if settings else {}))
        except BaseException:
            found["errors"][name] = traceback.format_exc()[-3000:]
        signal.alarm(0)
        if rank == 0 and os.environ.get("RANKS_TIMES"):
            print(f"{name}: {time.perf_counter() - started:.1f} s", flush=True)
        torch.save(found, Path(folder) / f"{rank}.pt")
        states = [None] * world
        dist.all_gather_object(states, name in found["errors"])
        if any(states):  # its collectives may be out of step
            break
    dist.destroy_process_group()


def _too_long(*_: object) -> None:
    raise TimeoutError(f"it took more than {LIMIT} s")


def shard(model: torch.nn.Module, **settings: Any) -> torch.nn.Module:
    """The model, each layer and the rest sharded over all processes."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, **settings)
    return fully_shard(model, mesh=mesh, **settings)
