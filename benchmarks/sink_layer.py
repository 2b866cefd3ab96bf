"""What a sink layer costs beside a dense MLP of the open width (the floor), and beside computing every sink.

    python benchmarks/sink_layer.py            # writes sink_layer-<device>.json and .png beside this file; minutes

Forward and backward of one layer, routing plan included, at 4,096 tokens (CPU, float32) or 16,384 (CUDA, bfloat16), over
layouts of the batch (documents x tokens), pools of 1 to 64 times the open width, with and without a gate. All ways of a
setting take turns in one process; a figure is the ratio of the least times. On CUDA it is also checked that the grouped
path agrees with the masked one and repeats its bits.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import silu

import memsinks as ms
from memsinks import SinkConfig
from memsinks.sinks.kernels import choose_path, sink_forward
from memsinks.sinks.plan import plan

HERE = Path(__file__).parent
POOLS = (1, 4, 16, 64)
SHAPES = {"cpu": ((512, 128, 64), (512, 256, 64)), "cuda": ((1024, 256, 64), (2048, 512, 64))}
"""Model width, open neurons, block size."""
LAYOUTS = {"cpu": ((16, 256), (64, 64), (256, 16)), "cuda": ((16, 1024), (64, 256), (1024, 16))}
MASKED_UP_TO = 4
"""Times the open width up to which the masked way is timed too."""

Run = Callable[[], list[Tensor]]


def ways(
    device: torch.device, width: int, active: int, size: int, pool: int, layout: tuple[int, int], gated: bool,
    dtype: torch.dtype,
) -> dict[str, Run]:  # fmt: skip
    """Forward and backward of each way; each gives the output and the gradients."""
    config = SinkConfig(neurons=pool * active, active=active, block_size=size)
    ids = torch.arange(1000, 1000 + layout[0], device=device).repeat_interleave(layout[1])
    generator = torch.Generator(device).manual_seed(0)

    def tensor(*shape: int) -> Tensor:
        return (torch.randn(*shape, device=device, generator=generator) * 0.05).to(dtype).requires_grad_()

    x = tensor(len(ids), width)
    up, gate, down = (tensor(config.blocks, size, width) for _ in range(3))
    dense = [tensor(active, width) for _ in range(3)]
    back = torch.ones_like(x).detach()

    def sinks(masked: bool) -> list[Tensor]:
        path = "masked" if masked else choose_path(config, dtype, device)
        layer = plan(ids, (0,), config, path=path).layers[0]
        y = sink_forward(x, up, gate if gated else None, down, silu, layer, None)
        weights = [x, up, down, gate] if gated else [x, up, down]
        return [y, *torch.autograd.grad(y, weights, back)]

    def floor() -> list[Tensor]:
        hidden = silu(x @ dense[0].t())
        hidden = hidden * (x @ dense[1].t()) if gated else hidden
        y = hidden @ dense[2]
        weights = [x, *dense] if gated else [x, dense[0], dense[2]]
        return [y, *torch.autograd.grad(y, weights, back)]

    found: dict[str, Run] = {"floor": floor, "ours": lambda: sinks(False)}
    return found | ({"masked": lambda: sinks(True)} if pool <= MASKED_UP_TO else {})


def least_seconds(runs: dict[str, Run], turns: int, device: torch.device) -> dict[str, float]:
    """The least time of each of `runs`, which take turns."""
    least = dict.fromkeys(runs, math.inf)
    for turn in range(turns + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first turn warms up
                least[name] = min(least[name], time.perf_counter() - start)
    return least


def draw(result: dict, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.6, 3.6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, gated in zip(panels, (False, True), strict=True):
        lines = [line for line in result["lines"] if line["gated"] is gated]
        for place, layout in enumerate(dict.fromkeys(line["layout"] for line in lines)):
            for width, active in dict.fromkeys((line["width"], line["open"]) for line in lines):
                own = [x for x in lines if (x["layout"], x["width"], x["open"]) == (layout, width, active)]
                axes.plot(
                    [x["pool"] // active for x in own], [x["ours"] for x in own], marker="o", ms=4,
                    color=("#0072B2", "#D55E00", "#009E73")[place], ls="-" if active == own[0]["open"] else "--",
                    alpha=0.55 if active != max(x["open"] for x in lines) else 1.0,
                    label=f"{layout} tokens, {active} open",
                )  # fmt: skip
        axes.axhline(1, color="#666666", lw=1, ls=":")
        axes.set(xscale="log", xlabel="pool / open width", title="gated" if gated else "not gated")
        axes.set_xticks(POOLS, [str(x) for x in POOLS])
        axes.grid(color="#e2e2e2")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set(ylabel="time / dense MLP of the open width", ylim=(0, None))
    panels[1].legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    device = torch.device(given.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    lines, checks = [], []
    for width, active, size in SHAPES[device.type]:
        for layout in LAYOUTS[device.type]:
            for gated in (False, True):
                for pool in POOLS:
                    shape = device, width, active, size, pool, layout, gated
                    seconds = least_seconds(ways(*shape, dtype), given.turns, device)
                    line = {
                        "width": width, "open": active, "block_size": size, "pool": pool * active, "gated": gated,
                        "layout": f"{layout[0]} x {layout[1]}", "floor_ms": round(1e3 * seconds["floor"], 3),
                    } | {name: round(x / seconds["floor"], 3) for name, x in seconds.items() if name != "floor"}  # fmt: skip
                    print(json.dumps(line), flush=True)
                    lines.append(line)
                if device.type == "cuda":
                    runs = ways(device, width, active, size, MASKED_UP_TO, layout, gated, torch.float32)
                    ours, again, masked = runs["ours"](), runs["ours"](), runs["masked"]()
                    error = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours, masked, strict=True))
                    same = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
                    checks.append(
                        {"width": width, "layout": layout, "gated": gated, "error_fp32": error, "same_bits": same}
                    )
    ratios, spread = [line["ours"] for line in lines], []
    for key in dict.fromkeys((x["width"], x["open"], x["layout"], x["gated"]) for x in lines):
        own = [x for x in lines if (x["width"], x["open"], x["layout"], x["gated"]) == key]
        routed = [x["ours"] for x in own if x["pool"] > x["open"]]  # a pool of the open width is computed whole
        spread.append(max(routed) / min(routed))
    result = {
        "geometric_mean": round(math.exp(sum(map(math.log, ratios)) / len(ratios)), 3), "worst": max(ratios),
        "largest_over_smallest_pool_worst": round(max(spread), 3), "checks": checks, "lines": lines,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(), "dtype": str(dtype), "turns": given.turns,
        "versions": {"memsinks": ms.__version__, "torch": torch.__version__},
    }  # fmt: skip
    (given.out / f"sink_layer-{device.type}.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result, given.out / f"sink_layer-{device.type}.png")
    print({name: value for name, value in result.items() if name != "lines"})


if __name__ == "__main__":
    main()
