"""A loop of one's own on several processes, the model sharded (FSDP2), resumed by any number of them from a DCP checkpoint.

    torchrun --nproc-per-node 2 examples/fsdp.py out/            # trains; started again, it goes on
    torchrun --nproc-per-node 1 examples/fsdp.py out/            # so does another number of processes

Every rank runs the same collectives: each takes as many micro-batches, and one that has run out of rows gives blank ones.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

import memsinks as ms

ROWS, STEPS, SAVE_EVERY = 8, 12, 4  # rows of a step, over all processes


def corpus() -> ms.Rows:
    """Four texts that come again and again among others that are met once."""
    texts = [torch.randint(1, 64, (24,), generator=torch.Generator().manual_seed(i)).numpy() for i in range(80)]
    order = [number for i in range(4, 80) for number in (i, i % 4)][: ROWS * STEPS - 3]
    ids = torch.tensor(order).numpy() + 100
    return ms.pack([texts[i] for i in order], ids, ms.exposures(ids), length=24, pad_id=0, one_document_per_row=True)


def main(folder: Path) -> None:
    gpu = torch.cuda.is_available()
    dist.init_process_group("nccl" if gpu else "gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    device = torch.device("cuda", rank % torch.cuda.device_count()) if gpu else torch.device("cpu")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                         num_attention_heads=2, num_key_value_heads=2))  # fmt: skip
    ms.add_sinks(model, ms.SinkConfig(neurons=256, active=32, block_size=8, shared="decay"))  # before sharding
    mesh = init_device_mesh(device.type, (world,))
    for layer in model.to(device).model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = ms.AdamW(ms.param_groups(model, lr=3e-3))  # after sharding

    saved = sorted(folder.glob("step-*"))  # a killed save left its folder under another name
    done = int(saved[-1].name.removeprefix("step-")) if saved else 0
    if saved:
        states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
        dcp.load(states, checkpoint_id=saved[-1])
        set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])

    rows = corpus()
    model.train()
    for step in range(done, STEPS):
        whole = ms.collate([rows[i] for i in range(step * ROWS, min(len(rows), (step + 1) * ROWS))])
        divisor = torch.tensor(ms.target_count(whole["labels"]), device=device)
        mine = {name: x[rank::world].to(device) for name, x in whole.items()}
        batches = [mine] if len(mine["labels"]) else []
        ms.sinks_first(model, optimizer, batches, num_items_in_batch=divisor)
        batch = mine if batches else ms.blank_batch({name: x[:1].to(device) for name, x in whole.items()})
        loss = model(**batch, num_items_in_batch=divisor).loss * world  # FSDP takes the mean of the gradients
        loss.backward()
        ms.clip_grad_norm_(model, 1.0)  # the norm over all shards
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach() / world
        dist.all_reduce(total)
        if rank == 0:
            print(f"step {step + 1} loss {total:.5f}", flush=True)
        if (step + 1) % SAVE_EVERY == 0 and step + 1 < STEPS:
            states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
            part, target = folder / "part", folder / f"step-{step + 1:06d}"
            dcp.save(states, checkpoint_id=part)  # each rank its shards
            if rank == 0:
                shutil.rmtree(target, ignore_errors=True)
                part.rename(target)
            dist.barrier()
    model.save_pretrained(folder / "model")  # gathered; the first rank writes
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
