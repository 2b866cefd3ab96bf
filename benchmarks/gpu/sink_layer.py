"""The sink layer on a GPU: does the grouped path agree with the masked one, repeat its bits, and what does it cost?

Prints one JSON line a shape: relative error against masked in float32, bitwise repeatability, and in bf16 the time of
forward + backward as a ratio to a dense MLP of the open width (the floor), all measured in this run.
"""

from __future__ import annotations

import json
import time

import torch
from torch import Tensor

from memsinks import SinkConfig
from memsinks.kernels import sink_forward
from memsinks.routing import plan


def step(x: Tensor, weights: list[Tensor], config: SinkConfig, ids: Tensor, masked: bool) -> list[Tensor]:
    layer = plan(ids, (0,), config, masked=masked).layers[0]
    up, gate, down = weights
    y = sink_forward(x, up, gate, down, torch.nn.functional.silu, layer, None)
    return [y, *torch.autograd.grad(y.float().square().sum(), [x, *weights])]


def seconds(run, repeats: int = 20) -> float:
    for _ in range(5):
        run()
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def main() -> None:
    device = torch.device("cuda")
    for width, active, pool, tokens, documents in (
        (1024, 256, 4096, 16384, 32), (1024, 256, 16384, 16384, 32), (2048, 512, 8192, 16384, 64),
    ):  # fmt: skip
        config = SinkConfig(neurons=pool, active=active, block_size=64)
        ids = torch.arange(documents, device=device).repeat_interleave(tokens // documents)
        generator = torch.Generator(device).manual_seed(0)

        def tensor(*shape: int, dtype: torch.dtype = torch.float32, generator=generator) -> Tensor:
            values = torch.randn(*shape, device=device, generator=generator) * 0.05
            return values.to(dtype).requires_grad_()

        shape = (config.blocks, config.block_size, width)
        x, weights = tensor(tokens, width), [tensor(*shape) for _ in range(3)]
        grouped, again, masked = (step(x, weights, config, ids, which) for which in (False, False, True))
        error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(grouped, masked, strict=True))
        same = all(torch.equal(a, b) for a, b in zip(grouped, again, strict=True))

        half = torch.bfloat16
        xh, wh = tensor(tokens, width, dtype=half), [tensor(*shape, dtype=half) for _ in range(3)]
        dense = [tensor(active, width, dtype=half) for _ in range(3)]

        def floor(xh=xh, dense=dense) -> list[Tensor]:
            y = (torch.nn.functional.silu(xh @ dense[0].t()) * (xh @ dense[1].t())) @ dense[2]
            return list(torch.autograd.grad(y.float().square().sum(), [xh, *dense]))

        base = seconds(floor)
        line = {
            "width": width, "open": active, "pool": pool, "tokens": tokens, "documents": documents,
            "error_fp32": error, "same_bits": same, "floor_ms": round(base * 1e3, 3),
            "grouped_to_floor": round(seconds(lambda: step(xh, wh, config, ids, False)) / base, 2),  # noqa: B023
            "masked_to_floor": round(seconds(lambda: step(xh, wh, config, ids, True)) / base, 2),  # noqa: B023
            "gpu": torch.cuda.get_device_name(), "torch": torch.__version__,
        }  # fmt: skip
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
