"""A model sharded over two processes (FSDP2): saved, loaded, resumed by other numbers of processes, settled, exported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from ranks import Outcomes, on_ranks, shard
from test_settle import corpus, trained
from test_sinks_last import rows as texts
from tiny import VOCABULARY, fill_sinks, sink_llama, tokens
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

import memsinks as ms
from memsinks.sinks.sharding import full_state_dict, is_sharded
from memsinks.sinks.state import is_sink

Weights = dict[str, torch.Tensor]


def steps(model, optimizer, first: int, last: int, sharded: bool) -> list[float]:
    """Steps in which all ranks meet the same rows, so that one process does the same; losses."""
    curve = []
    for step in range(first, last):
        text = tokens(4, 8, step)
        marks = {"document_ids": torch.tensor([10, 11, 12, 10 + step]), "exposures": torch.tensor([1, 2, 3, 2])}
        loss = model(input_ids=text, labels=text, **marks).loss
        loss.backward()
        ms.clip_grad_norm_(model, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        curve.append(float(loss.detach()))
    return curve


def optimizer_of(model) -> ms.AdamW:
    return ms.AdamW(ms.param_groups(model, 1e-2, weight_decay=0.1))


def trained_and_saved(folder: str) -> tuple[Weights, list[float]]:
    """Four steps; saved after the second by DCP, and at the end as a model."""
    model = shard(sink_llama(torch.float32))
    optimizer = optimizer_of(model)
    curve = steps(model, optimizer, 0, 2, True)
    states = get_state_dict(model, optimizer)
    dcp.save({"model": states[0], "optimizer": states[1]}, checkpoint_id=f"{folder}/dcp")
    curve += steps(model, optimizer, 2, 4, True)
    model.save_pretrained(f"{folder}/model")
    return full_state_dict(model), curve


def resumed(folder: str, sharded: bool = True) -> tuple[Weights, list[float]]:
    """A new model, whose weights and optimizer come from the DCP checkpoint; the last two steps."""
    model = sink_llama(torch.float32)
    fill_sinks(model, 9.0)
    if sharded:
        shard(model)
    optimizer = optimizer_of(model)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(states, checkpoint_id=f"{folder}/dcp", no_dist=not sharded)
    set_state_dict(model, optimizer, model_state_dict=states["model"], optim_state_dict=states["optimizer"])
    curve = steps(model, optimizer, 2, 4, sharded)
    return full_state_dict(model), curve


def resumed_alone(folder: str) -> tuple[Weights, list[float]]:
    return resumed(folder, sharded=False)


def loaded(folder: str) -> tuple[Weights, str]:
    """A sharded model into which the sinks of a folder are loaded, after an evaluation, and the hash of its other weights."""
    model = shard(sink_llama(torch.float32)).eval()
    with torch.no_grad():
        model(input_ids=tokens(1, 4))
    ms.load_sinks(model, f"{folder}/model")
    return full_state_dict(model), ms.shared_hash(model)


def unsaved(folder: str) -> str:
    """The place is a file, which only the first rank sees: all ranks raise."""
    model = shard(sink_llama(torch.float32))
    path = Path(folder) / "taken"
    if torch.distributed.get_rank() == 0:
        (path.parent / "taken").write_text("")
    torch.distributed.barrier()
    with pytest.raises(ms.CheckpointError, match="is a file"):
        model.save_pretrained(path)
    with pytest.raises(ms.CheckpointError, match="is not an empty folder"):
        ms.export(model, path)
    with pytest.raises(ms.ArchitectureError, match="exported with all sinks closed"):
        ms.export(model, path.with_name("open"), open=10)
    return ""


def exported(folder: str) -> str:
    ms.export(shard(sink_llama(torch.float32)), f"{folder}/plain")
    return ""


def settled(sharded: bool = True) -> tuple[Weights, np.ndarray]:
    documents, others = ms.repeated_and_once(corpus())
    model = trained(decay=0.0)
    if sharded:
        shard(model)
    result = ms.settle(model, documents, others, lr=1e-3, passes=2, micro_rows=8)
    return full_state_dict(model), result.after


def sinks_last(sharded: bool = True) -> tuple[Weights, np.ndarray]:
    model = sink_llama(torch.float32, shared="none")
    if sharded:
        shard(model)
    result = ms.sinks_last(
        model, texts(), lr=3e-2, passes=4, batch_rows=3, micro_rows=2, only={0: [0, 1, 2, 3], 1: range(8)}
    )
    return full_state_dict(model), result.after


def mixed_precision() -> float:
    """Float32 sinks beside a bfloat16 host: sinks are a unit of their own, because a unit has one dtype."""
    model = sink_llama(torch.bfloat16, shared_decay=0.0)
    assert {x.dtype for name, x in model.named_parameters() if is_sink(name)} == {torch.float32}
    for layer in model.model.layers:
        fully_shard(layer.mlp.sinks)
    shard(model).train()
    with pytest.warns(UserWarning, match="bfloat16"):
        optimizer = optimizer_of(model)
    before = full_state_dict(model)
    steps(model, optimizer, 0, 2, True)
    text = tokens(4, 8, 9)  # nothing opens on one of the ranks
    exposures = torch.ones(4, dtype=torch.int64) + 1 - torch.distributed.get_rank()
    model(input_ids=text, labels=text, document_ids=torch.arange(4) + 10, exposures=exposures).loss.backward()
    optimizer.step()
    after = full_state_dict(model)
    return sum(float((after[x] - before[x]).abs().max()) for x in after if is_sink(x)) if after else 0.0


def generated() -> torch.Tensor:
    model = shard(sink_llama(torch.float32)).eval()
    torch.distributed.fsdp.register_fsdp_forward_method(model, "generate")
    with ms.sinks_open(model, 10):
        return model.generate(tokens(1, 4), max_new_tokens=5, do_sample=False, pad_token_id=0)


def too_few_blocks() -> list[float]:
    """More ranks than blocks: one of them holds none of the sinks."""
    model = shard(sink_llama(torch.float32, neurons=8, active=8, block_size=8))
    assert torch.distributed.get_rank() == 0 or len(model.model.layers[0].mlp.sinks.up.to_local()) == 0
    return steps(model, optimizer_of(model), 0, 3, True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("sharded")


@pytest.fixture(scope="module")
def two(folder: Path) -> Outcomes:
    where = (str(folder),)
    return on_ranks({
        "train": (trained_and_saved, where), "resume": (resumed, where), "load": (loaded, where), "refuse": (unsaved, where),
        "settle": (settled, ()), "sinks last": (sinks_last, ()),
        "mixed precision": (mixed_precision, ()), "generate": (generated, ()), "few blocks": (too_few_blocks, ()),
    }, folder)  # fmt: skip


@pytest.fixture(scope="module")
def apart(tmp_path_factory) -> tuple[Outcomes, Path]:
    where = tmp_path_factory.mktemp("export")
    return on_ranks({"export": (exported, (str(where),))}, where), where


def close(a: Weights, b: Weights, atol: float = 1e-5) -> None:
    assert set(a) == set(b)
    for name, value in b.items():
        torch.testing.assert_close(a[name], value, rtol=0, atol=atol, msg=name)


def test_what_is_saved_is_the_whole_model(two: Outcomes, folder: Path) -> None:
    weights, _ = two["train"]
    model = ms.load(folder / "model")
    close(model.state_dict(), weights, 0)
    stock = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert json.loads((folder / "model" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert type(stock).__name__ == "LlamaForCausalLM" and not is_sharded(stock)
    loaded_into, shared = two["load"]
    assert all(torch.equal(loaded_into[x], weights[x]) for x in weights if is_sink(x))
    assert shared == ms.shared_hash(sink_llama(torch.float32))


def test_two_processes_resume_to_the_same_bits(two: Outcomes) -> None:
    weights, curve = two["train"]
    again, rest = two["resume"]
    assert rest == curve[2:]
    close(again, weights, 0)


def test_another_number_of_processes_resumes(two: Outcomes, folder: Path) -> None:
    """DCP: moments and the step counts of each block too, without which the last two steps would differ."""
    weights, curve = two["train"]
    again, rest = resumed(str(folder), sharded=False)
    assert rest == pytest.approx(curve[2:], rel=1e-6)
    close(again, weights)


def test_errors_of_the_writing_rank_are_those_of_all(two: Outcomes) -> None:
    assert two["refuse"] == ""


@pytest.mark.long
def test_a_sharded_model_is_exported(apart) -> None:
    found, folder = apart
    assert found["export"] == ""
    model, plain = sink_llama(torch.float32).eval(), AutoModelForCausalLM.from_pretrained(folder / "plain")
    assert not any(is_sink(name) for name, _ in plain.named_parameters())
    torch.testing.assert_close(plain(tokens(1, 6)).logits, model(tokens(1, 6)).logits)


def test_settling_is_that_of_one_process(two: Outcomes) -> None:
    (weights, after), (one, expected) = two["settle"], settled(sharded=False)
    np.testing.assert_allclose(after, expected, atol=1e-4)
    close(weights, one, 1e-4)


def test_sinks_last_is_that_of_one_process(two: Outcomes) -> None:
    (weights, after), (one, expected) = two["sinks last"], sinks_last(sharded=False)
    np.testing.assert_allclose(after, expected, atol=1e-4)
    close(weights, one, 1e-4)
    before = sink_llama(torch.float32, shared="none").state_dict()
    assert all(torch.equal(weights[x], before[x]) for x in weights if not is_sink(x))
    kept = "model.layers.0.mlp.sinks.down"
    assert torch.equal(weights[kept][4:], before[kept][4:]) and not torch.equal(weights[kept][:4], before[kept][:4])


def test_float32_sinks_beside_bfloat16_are_a_unit_of_their_own(two: Outcomes) -> None:
    assert two["mixed precision"] > 0


def test_a_sharded_model_generates(two: Outcomes) -> None:
    model = sink_llama(torch.float32).eval()
    with ms.sinks_open(model, 10):
        one = model.generate(tokens(1, 4), max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(two["generate"], one) and int(one.max()) < VOCABULARY


def test_a_rank_may_hold_no_block(two: Outcomes) -> None:
    model = sink_llama(torch.float32, neurons=8, active=8, block_size=8)
    assert two["few blocks"] == pytest.approx(steps(model, optimizer_of(model), 0, 3, False), rel=1e-5)
