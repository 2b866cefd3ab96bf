"""Bytes that training on two processes sends each step: they should follow the blocks that were opened, not the pool.

    python benchmarks/communication.py             # writes communication.json beside this file; about a minute

Two processes (gloo) train a small model with pools of several sizes, of which a document opens 64 neurons a layer, on rows that
are all new, and on rows half of which were met before. Counted is what collectives are given, as c10d is called, times what a
ring sends of it: an all-reduce of n bytes sends 2 (p - 1) / p n in each of p processes, a gather, a scatter or an all-to-all half
of that. `moments_mb` is what the optimizer of one process holds. No times: two processes on one machine have no network to save.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

import memsinks as ms
from memsinks.sinks.state import sink_parameters

HERE = Path(__file__).parent
WIDTH, LAYERS, ROWS, LENGTH, STEPS = 128, 2, 4, 64, 2
POOLS = (1024, 4096, 16384)
WAYS = ("DDP, whole pool", "DDP, open blocks", "FSDP2")


class Sent(TorchDispatchMode):
    """Bytes that this process sends."""

    total = 0.0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        if name.startswith("c10d."):
            most = max((x.nbytes for x in tree_leaves(args) if isinstance(x, torch.Tensor)), default=0)
            lists = [sum(y.nbytes for y in tree_leaves(x)) for x in args if isinstance(x, list)]
            share = (dist.get_world_size() - 1) / dist.get_world_size()
            self.total += (2 if "allreduce" in name else 1) * share * max([most, *lists])
        return func(*args, **(kwargs or {}))


def batch(step: int, rank: int, repeated: bool) -> dict[str, torch.Tensor]:
    text = torch.randint(0, 512, (ROWS, LENGTH), generator=torch.Generator().manual_seed(2 * step + rank))
    exposures = torch.tensor([1, 2] * (ROWS // 2)) if repeated else torch.ones(ROWS, dtype=torch.int64)
    ids = torch.arange(ROWS) + (2 * step + rank) * ROWS
    return {"input_ids": text, "labels": text, "document_ids": ids, "exposures": exposures}


def measured(way: str, pool: int, repeated: bool) -> dict[str, float | int | str | bool]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=512, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=4, tie_word_embeddings=True,
    ))  # fmt: skip
    ms.add_sinks(model, ms.SinkConfig(neurons=pool, active=64, block_size=16, shared="decay"))
    sinks = sum(x.nbytes for x in sink_parameters(model))
    shared = sum(x.nbytes for x in model.parameters()) - sinks
    wrapped = model
    if way == "FSDP2":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    else:
        wrapped = DistributedDataParallel(model)
        if way == "DDP, open blocks":
            ms.send_open_blocks(wrapped)
    model.train()
    optimizer, sent = ms.AdamW(ms.param_groups(model, 1e-3)), 0.0
    for step in range(STEPS):
        part = batch(step, dist.get_rank(), repeated)
        dist.barrier()
        with Sent() as counted:
            wrapped(**part).loss.backward()
            ms.clip_grad_norm_(model, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        sent = counted.total
    state = sum(x.nbytes if not hasattr(x, "to_local") else x.to_local().nbytes
                for values in optimizer.state.values() for x in values.values() if isinstance(x, torch.Tensor))  # fmt: skip
    return {
        "way": way, "neurons": pool, "repeated_rows": repeated, "shared_mb": round(shared / 1e6, 2),
        "sinks_mb": round(sinks / 1e6, 2), "sent_mb": round(sent / 1e6, 2), "moments_mb": round(state / 1e6, 2),
    }  # fmt: skip


def work(rank: int, port: int, path: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    lines = []
    for pool in POOLS:
        for repeated in (False, True):
            for way in WAYS:
                lines.append(measured(way, pool, repeated))
                if rank == 0:
                    print(json.dumps(lines[-1]), flush=True)
    if rank == 0:
        Path(path).write_text(json.dumps(lines))
    dist.destroy_process_group()


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.NamedTemporaryFile() as file:
        mp.spawn(work, (port, file.name), nprocs=2)
        lines = json.loads(Path(file.name).read_text())
    result = {
        "settings": {"hidden_size": WIDTH, "layers": LAYERS, "rows_per_process": ROWS, "length": LENGTH, "open_neurons": 64,
                     "block_size": 16, "processes": 2},
        "lines": lines, "processor": platform.processor() or platform.machine(),
        "versions": {"memsinks": ms.__version__, "torch": torch.__version__},
    }  # fmt: skip
    (HERE / "communication.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
