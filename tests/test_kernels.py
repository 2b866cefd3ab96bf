"""Every compute path is the plain formula, in outputs and in every gradient."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import gelu, silu

from memsinks.sinks import tiled as tiled_module
from memsinks.sinks.config import SinkConfig
from memsinks.sinks.grouped import grouped_linear, grouped_linear_backward
from memsinks.sinks.kernels import choose_path, sink_forward
from memsinks.sinks.plan import LayerPlan, plan
from memsinks.sinks.table import EMPTY_TABLE, AssignmentTable, open_mask
from memsinks.sinks.tiled import tiled_into, tiled_into_backward, tiled_out, tiled_out_backward

PATHS = ("masked", "grouped", "tiled by document", "tiled by block")

CONFIG = SinkConfig(neurons=96, active=16, block_size=8, reserved_blocks=3)
TABLE = AssignmentTable.from_dict({50: [0, 1, 2, 3, 11], 51: []}, CONFIG)
WIDTH = 10

IDS = {
    "no open token": [-1] * 7,
    "one token": [5],
    "one closed token": [-1],
    "one open among closed": [-1, -1, 5, -1],
    "a document per token": list(range(23)),
    "one document": [5] * 13,
    "mixed": [5, 5, 7, 7, 7, -1, 5, 2**63 - 1, 0],
    "ragged": [50, 5, 51, 50, -1, 6, 50],
    "union": [[5, 7, -1], [5, 5, 5], [-1, -1, -1], [8, 50, 5], [-1, -1, 2]],
}


@pytest.fixture(autouse=True)
def _tiles_as_before(monkeypatch) -> None:
    monkeypatch.setattr(tiled_module, "LONG", tiled_module.LONG)


@dataclass
class Case:
    """One layer of sinks, a batch, and the gradient that comes back to its output."""

    x: torch.Tensor
    up: torch.Tensor
    gate: torch.Tensor | None
    down: torch.Tensor
    grad: torch.Tensor
    ids: torch.Tensor
    scale: torch.Tensor | None
    act: object

    @classmethod
    def make(
        cls, ids: list, gated: bool = True, scaled: bool = False, config: SinkConfig = CONFIG, width: int = WIDTH
    ) -> Case:
        generator = torch.Generator().manual_seed(len(ids))
        shape = (config.blocks, config.block_size, width)
        x, grad = torch.randn(2, len(ids), width, generator=generator, dtype=torch.float64)
        up, gate, down = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
        scale = torch.rand(len(ids), generator=generator, dtype=torch.float64) * 9 + 1 if scaled else None
        return cls(x, up, gate if gated else None, down, grad, torch.tensor(ids), scale, silu if gated else gelu)

    def plan(self, path: str, config: SinkConfig = CONFIG, table: AssignmentTable = TABLE) -> LayerPlan:
        path, _, tiles = path.partition(" by ")
        tiled_module.LONG = {"document": 0, "block": float("inf")}.get(tiles, tiled_module.LONG)
        return plan(self.ids, (2,), config, table, path=path).layers[0]

    def run(self, dtype: torch.dtype, made: LayerPlan) -> dict[str, torch.Tensor]:
        """Output and gradients by name."""
        inputs = {"x": self.x, "up": self.up, "gate": self.gate, "down": self.down}
        inputs = {n: None if t is None else t.detach().to(dtype, copy=True).requires_grad_() for n, t in inputs.items()}
        out = sink_forward(*inputs.values(), self.act, made, self.scale)
        out.backward(self.grad.to(dtype))
        return {"out": out.detach()} | {name: tensor.grad for name, tensor in inputs.items() if tensor is not None}

    def formula(self, opens: list[list[int]]) -> dict[str, torch.Tensor]:
        """Output and gradients, token by token and block by block."""
        weights = [w for w in (self.up, self.gate, self.down) if w is not None]
        out = torch.zeros_like(self.x)
        result = {"x": torch.zeros_like(self.x), "up": torch.zeros_like(self.up)}
        result |= {"gate": torch.zeros_like(self.up)} if self.gate is not None else {}
        result |= {"down": torch.zeros_like(self.down)}
        for token, blocks in enumerate(opens):
            x, *leaves = (t.clone().requires_grad_() for t in (self.x[token], *weights))
            up, down = leaves[0], leaves[-1]
            total = x * 0
            for block in blocks:
                inner = up[block] @ x
                inner = self.act(inner) if self.gate is None else self.act(leaves[1][block] @ x) * inner
                total = total + inner @ down[block]
            out[token] = total.detach()
            into_x, *into_weights = torch.autograd.grad(
                total, [x, *leaves], self.grad[token], allow_unused=True, materialize_grads=True
            )
            result["x"][token] = into_x
            for name, gradient in zip(list(result)[1:], into_weights, strict=True):
                result[name] += gradient * (1 if self.scale is None else self.scale[token])
        return {"out": out} | result


def opened(ids: torch.Tensor, config: SinkConfig = CONFIG, table: AssignmentTable = TABLE) -> list[list[int]]:
    columns = ids.view(len(ids), -1)
    masks = [open_mask(column.contiguous(), config, 2, table) for column in columns.unbind(1)]
    return [row.nonzero()[:, 0].tolist() for row in torch.stack(masks).any(0)]


def assert_close(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor], tolerance: float) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        error = (got[name].double() - value).abs().max()
        assert error <= tolerance * value.abs().max().clamp(min=1e-3), f"{name}: {error:.2g}"


@pytest.mark.parametrize("scaled", [False, True], ids=["plain sum", "weight scale"])
@pytest.mark.parametrize("gated", [False, True], ids=["no gate", "gate"])
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_every_path_equals_the_formula(ids, gated, scaled):
    case = Case.make(ids, gated, scaled)
    want = case.formula(opened(case.ids))
    assert_close(case.run(torch.float64, case.plan("masked")), want, 1e-13)
    assert_close(case.run(torch.float64, case.plan("tiled by document")), want, 1e-13)
    assert_close(case.run(torch.float64, case.plan("tiled by block")), want, 1e-13)
    for path in PATHS:
        assert_close(case.run(torch.float32, case.plan(path)), want, 1e-5)


@pytest.mark.parametrize(
    "config",
    [
        SinkConfig(neurons=7, active=3, routing="exact"),
        SinkConfig(neurons=30, active=9, routing="bernoulli", per_layer=False),
        SinkConfig(neurons=16, active=16, block_size=16),
    ],
    ids=["exact", "bernoulli", "whole pool"],
)
def test_other_routings_equal_the_formula(config):
    case = Case.make([3, 3, 9, -1, 4], scaled=True, config=config)
    mask = open_mask(case.ids, config, 2)
    want = case.formula([row.nonzero()[:, 0].tolist() for row in mask])
    for path in PATHS if config.routing == "blocks" else ["masked"]:
        assert_close(case.run(torch.float32, case.plan(path, config, EMPTY_TABLE)), want, 1e-5)


@pytest.mark.parametrize("path", PATHS[1:])
def test_plan_of_fixed_size_equals_the_formula(path):
    """A compiled plan has pairs past the last block, or runs that are empty or closed; they open nothing."""
    for ids in ([5, -1, 7, 5, -1], [5, 5, -1, 5], [-1, -1]):
        case = Case.make(ids, scaled=True)
        case.plan(path)
        torch.compiler.reset()
        make = torch.compile(
            lambda ids: plan(ids, (2,), CONFIG, path=path.partition(" ")[0]), backend="aot_eager", fullgraph=True
        )
        made = make(case.ids).layers[0]
        if path == "grouped":
            assert int(made.ends[-1]) < len(made.token) == 2 * len(ids)
        else:
            assert len(made.spans) == made.tokens == len(ids)
        assert_close(case.run(torch.float32, made), case.formula(opened(case.ids)), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("path", PATHS)
def test_compiled_with_its_plan_every_path_equals_the_formula(path, dtype):
    """Also the grouped path, which no CPU model takes; one compilation serves every length after the second."""
    torch.compiler.reset()

    def layer(x, up, gate, down, ids, scale):
        return sink_forward(
            x, up, gate, down, silu, plan(ids, (2,), CONFIG, path=path.partition(" ")[0]).layers[0], scale
        )

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for turn, ids in enumerate(([5, 5, -1, 7, 9, 9], [5, 7, -1], IDS["mixed"], [-1] * 5)):
        case = Case.make(ids, scaled=True)
        case.plan(path)
        x, up, gate, down = (t.to(dtype).requires_grad_() for t in (case.x, case.up, case.gate, case.down))
        with torch.compiler.set_stance("fail_on_recompile" if turn > 1 else "default"):
            out = compiled(x, up, gate, down, case.ids, case.scale)
            out.backward(case.grad.to(dtype))
        got = {"out": out.detach(), "x": x.grad, "up": up.grad, "gate": gate.grad, "down": down.grad}
        want = case.formula(opened(case.ids, table=EMPTY_TABLE))
        assert_close(got, want, 1e-5 if dtype == torch.float32 else 4e-2)


@given(
    ids=st.lists(st.tuples(st.sampled_from([-1, 5, 6, 7, 50, 51]), st.integers(1, 4)), min_size=1, max_size=8),
    gated=st.booleans(), scaled=st.booleans(), path=st.sampled_from(PATHS),
    shape=st.sampled_from([(96, 16, 8, 3), (8, 8, 8, 0), (64, 48, 16, 0), (40, 8, 8, 1)]),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_any_layout_equals_the_formula(ids, gated, scaled, path, shape):
    """Runs of any length, ids that come again, blocks nobody opens, pools of one block, tables."""
    neurons, active, size, reserved = shape
    config = SinkConfig(neurons=neurons, active=active, block_size=size, reserved_blocks=reserved)
    table = TABLE if config == CONFIG else EMPTY_TABLE
    case = Case.make([id_ for id_, length in ids for _ in range(length)], gated, scaled, config)
    want = case.formula(opened(case.ids, config, table))
    assert_close(case.run(torch.float32, case.plan(path, config, table)), want, 1e-5)


@pytest.mark.parametrize("most", [1, 2, 5])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain sum", "weight scale"])
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_a_block_that_many_tokens_open_is_several_tiles(monkeypatch, ids, scaled, most):
    monkeypatch.setattr(tiled_module, "MOST", most)
    case = Case.make(ids, scaled=scaled)
    assert_close(case.run(torch.float64, case.plan("tiled by block")), case.formula(opened(case.ids)), 1e-13)


def test_bf16_is_near_the_formula():
    case = Case.make(IDS["mixed"], scaled=True)
    want = case.formula(opened(case.ids))
    for path in PATHS:
        got = case.run(torch.bfloat16, case.plan(path))
        assert {x.dtype for x in got.values()} == {torch.bfloat16}
        assert_close(got, want, 3e-2)


@pytest.mark.parametrize("path", PATHS)
def test_bf16_autocast(path):
    case = Case.make(IDS["mixed"])
    with torch.autocast("cpu", torch.bfloat16):
        x, up, gate, down = (t.float().requires_grad_() for t in (case.x, case.up, case.gate, case.down))
        out = sink_forward(x, up, gate, down, silu, case.plan(path), None)
    assert out.dtype == torch.bfloat16
    out.backward(case.grad.bfloat16())
    got = {"out": out.detach(), "x": x.grad, "up": up.grad, "gate": gate.grad, "down": down.grad}
    assert {got[name].dtype for name in ("x", "up", "gate", "down")} == {torch.float32}
    assert_close(got, case.formula(opened(case.ids)), 3e-2)


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
@pytest.mark.parametrize("path", PATHS)
def test_closed_blocks_get_exactly_zero_gradient_and_open_ones_do_not(path, ids):
    case = Case.make(ids)
    got = case.run(torch.float32, case.plan(path))
    is_open = torch.zeros(CONFIG.blocks, dtype=torch.bool)
    is_open[sorted({block for blocks in opened(case.ids) for block in blocks})] = True
    for name in ("up", "gate", "down"):
        moved = got[name].flatten(1)
        assert (moved[~is_open] == 0).all()
        assert moved[is_open].ne(0).any(1).all()


@pytest.mark.parametrize("path", PATHS)
def test_closed_tokens_get_nothing_and_send_nothing(path):
    case = Case.make([5, -1, 51, 7])
    got = case.run(torch.float32, case.plan(path))
    assert got["out"][[1, 2]].eq(0).all()
    assert got["x"][[1, 2]].eq(0).all()
    assert got["out"][[0, 3]].ne(0).all()


@pytest.mark.parametrize("path", PATHS)
def test_documents_do_not_touch_each_other(path):
    case = Case.make(IDS["mixed"])
    before = case.run(torch.float32, case.plan(path))["out"]
    case.x[2:5] = 100.0
    after = case.run(torch.float32, case.plan(path))["out"]
    others = [0, 1, 5, 6, 7, 8]
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before, after)


@pytest.mark.parametrize("path", PATHS)
def test_repeated_runs_give_the_same_bits(path):
    case = Case.make(IDS["a document per token"] * 5, scaled=True)
    first, second = (case.run(torch.float32, case.plan(path)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("path", PATHS)
def test_weight_scale_leaves_output_and_input_gradient_alone(path):
    case = Case.make(IDS["mixed"], scaled=True)
    scaled = case.run(torch.float32, case.plan(path))
    case.scale = None
    plain = case.run(torch.float32, case.plan(path))
    assert torch.equal(scaled["out"], plain["out"])
    assert torch.equal(scaled["x"], plain["x"])
    assert not torch.allclose(scaled["up"], plain["up"])


@pytest.mark.parametrize("path", PATHS)
def test_frozen_sinks_and_frozen_input_get_no_gradient(path):
    case = Case.make(IDS["mixed"])
    want = case.run(torch.float32, case.plan(path))
    x, up, gate, down = (t.float() for t in (case.x, case.up, case.gate, case.down))
    x.requires_grad_()
    sink_forward(x, up, gate, down, silu, case.plan(path), None).backward(case.grad.float())
    assert torch.equal(x.grad, want["x"])
    x = x.detach()
    up.requires_grad_()
    sink_forward(x, up, gate, down, silu, case.plan(path), None).backward(case.grad.float())
    assert torch.equal(up.grad, want["up"])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_custom_op_is_well_formed(transposed, scaled):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 12, generator=generator, requires_grad=True)
    weight = torch.randn((3, 4, 12) if transposed else (3, 12, 4), generator=generator, requires_grad=True)
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    scale = torch.rand(7, generator=generator, dtype=torch.float64) if scaled else None
    torch.library.opcheck(grouped_linear, (x, weight, ends, scale, transposed))
    grad = torch.randn(7, 4, generator=generator)
    torch.library.opcheck(grouped_linear_backward, (grad, x.detach(), weight.detach(), ends, scale, transposed))


def test_custom_op_without_rows():
    weight = torch.randn(3, 4, 6, requires_grad=True)
    out = grouped_linear(torch.zeros(0, 6), weight, torch.zeros(3, dtype=torch.int32), None, True)
    assert out.shape == (0, 4)
    out.sum().backward()
    assert weight.grad.shape == weight.shape
    assert weight.grad.eq(0).all()


def test_rows_past_the_last_block_give_zero_whatever_they_hold():
    x = torch.full((5, 8), float("nan"))
    x[:2] = 1.0
    x.requires_grad_()
    weight = torch.ones(2, 4, 8, requires_grad=True)
    out = grouped_linear(x, weight, torch.tensor([1, 2], dtype=torch.int32), None, True)
    assert out[:2].eq(8).all()
    assert out[2:].eq(0).all()
    out.sum().backward()
    assert x.grad[:2].eq(4).all()
    assert x.grad[2:].eq(0).all()
    assert weight.grad.eq(1).all()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("path", PATHS[2:])
def test_tiled_ops_are_well_formed(path, gated):
    case = Case.make(IDS["mixed"], gated, scaled=True)
    spans, blocks, tokens = case.plan(path)
    x, up, gate, down = (
        None if t is None else t.float().requires_grad_() for t in (case.x, case.up, case.gate, case.down)
    )
    torch.library.opcheck(tiled_into, (x, up, gate, spans, blocks, tokens, case.scale))
    hidden = torch.randn(tokens * blocks.shape[1], CONFIG.block_size, requires_grad=True)
    torch.library.opcheck(tiled_out, (hidden, down, spans, blocks, len(x), case.scale))
    bare = [None if t is None else t.detach() for t in (x, up, gate, down, hidden)]
    x, up, gate, down, hidden = bare
    grad_gate = hidden if gated else hidden.new_zeros(0)
    torch.library.opcheck(tiled_into_backward, (hidden, grad_gate, x, up, gate, spans, blocks, case.scale))
    torch.library.opcheck(tiled_out_backward, (x, hidden, down, spans, blocks, case.scale))


@pytest.mark.parametrize("path", ["grouped", "tiled by document", "tiled by block"])
def test_saved_activations_grow_with_the_open_width_and_not_with_the_pool(path):
    def saved(pool: int, ids: list[int]) -> int:
        config = SinkConfig(neurons=pool, active=16, block_size=8)
        case, sizes = Case.make(ids, config=config, width=16), {}
        weights = [t.float().requires_grad_() for t in (case.up, case.gate, case.down)]
        own = {x.data_ptr() for x in weights}

        def pack(x: torch.Tensor) -> torch.Tensor:
            storage = x.untyped_storage()
            if x.is_floating_point() and storage.data_ptr() not in own:
                sizes[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = sink_forward(
                case.x.float().requires_grad_(), *weights, silu, case.plan(path, config, EMPTY_TABLE), None
            )
        assert out.shape == case.x.shape
        return sum(sizes.values())

    ids = [i // 4 for i in range(64)]
    assert saved(64, ids) == saved(1024, ids)
    assert saved(1024, ids[:32] + [-1] * 32) < 0.75 * saved(1024, ids)


@pytest.mark.parametrize(
    ("config", "dtype", "path"),
    [
        ({"neurons": 256, "active": 32}, torch.float32, "open"),
        ({"neurons": 256, "active": 32}, torch.bfloat16, "open"),
        ({"neurons": 256, "active": 32}, torch.float64, "masked"),
        ({"neurons": 256, "active": 128}, torch.float32, "masked"),
        ({"neurons": 256, "active": 96}, torch.float32, "open"),
        ({"neurons": 256, "active": 32, "block_size": 8}, torch.bfloat16, "open"),
        ({"neurons": 256, "active": 32, "block_size": 4}, torch.float32, "masked"),
        ({"neurons": 256, "active": 32, "routing": "exact"}, torch.float32, "masked"),
        ({"neurons": 256, "active": 32, "routing": "bernoulli"}, torch.float32, "masked"),
    ],
)
def test_which_path_serves_a_config(config, dtype, path):
    for device, name in (("cpu", "tiled"), ("cuda", "grouped")):
        want = name if path == "open" else "masked"
        assert choose_path(SinkConfig(**config), dtype, torch.device(device)) == want
