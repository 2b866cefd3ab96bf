"""How long does it take to take one of 10,000 owners out of the sinks of a model of 1.7B parameters?

    python benchmarks/takedown.py [--owners 10000]     # writes takedown.json beside this file; 3 GB of disk, 6 GB of memory

A synthetic sinks file: 24 layers of width 2,048 with a gate, as SmolLM2-1.7B has, one own neuron for each owner in every layer,
in bfloat16. Reading and writing the file are timed apart from what is done between: finding the owner's blocks, giving them
their start values, striking his ids out of the table. Median of five owners.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from memsinks._version import versions
from memsinks.files import file_hash
from memsinks.removal.erase_files import SinksFile
from memsinks.sinks.config import SinkConfig
from memsinks.sinks.routing import HASH_VERSION
from memsinks.sinks.storage import FOLDER, SETTINGS, TABLE, TENSORS
from memsinks.sinks.table import AssignmentTable

LAYERS, WIDTH = 24, 2048


def write_synthetic(folder: Path, owners: int) -> None:
    """A sinks folder with an own block for each of the ids 0 to owners - 1."""
    config = SinkConfig(neurons=owners, active=1, block_size=1, reserved_blocks=owners)
    sinks = folder / FOLDER
    sinks.mkdir(parents=True)
    tensors = {
        f"model.layers.{layer}.mlp.sinks.{part}": torch.empty(owners, 1, WIDTH, dtype=torch.bfloat16).uniform_(-1, 1)
        for layer in range(LAYERS)
        for part in ("up", "gate", "down")
    }
    table = AssignmentTable.from_dict({owner: [owner] for owner in range(owners)}, config)
    save_file({**tensors, **{f"table.{name}": getattr(table, name) for name in TABLE}}, sinks / TENSORS)
    settings = {
        "format_version": 2, "hash_version": HASH_VERSION, "fingerprint": "synthetic", "config": config.to_dict(),
        "model_type": "llama", "layers": list(range(LAYERS)), "intermediate_size": 8192, "alone": True, "taken": {},
        "start_std": {str(layer): 0.02 for layer in range(LAYERS)},
        "sha256": {f"{FOLDER}/{TENSORS}": file_hash(sinks / TENSORS)},
    }  # fmt: skip
    (sinks / SETTINGS).write_text(json.dumps(settings))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--owners", type=int, default=10_000)
    owners = parser.parse_args().owners
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        write_synthetic(folder, owners)
        size = (folder / FOLDER / TENSORS).stat().st_size
        started = time.perf_counter()
        sinks = SinksFile(folder)
        read = time.perf_counter() - started
        erasing = []
        for owner in range(0, owners, max(1, owners // 5)):
            started = time.perf_counter()
            sinks.erase([owner], "benchmark")
            erasing.append(time.perf_counter() - started)
        started = time.perf_counter()
        sinks.write(Path(scratch) / "new")
        write = time.perf_counter() - started
    result = {
        "owners": owners, "layers": LAYERS, "width": WIDTH, "bytes": size, "seconds to read, hash included": round(read, 2),
        "seconds to erase one owner": round(statistics.median(erasing), 3),
        "seconds to write, hash included": round(write, 2),
        "machine": f"{platform.machine()}, one thread", "versions": versions("torch", "safetensors"),
    }  # fmt: skip
    (Path(__file__).parent / "takedown.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
