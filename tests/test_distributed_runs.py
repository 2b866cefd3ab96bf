"""What trains by itself, on two processes: recipes (DDP, sharded) and SinkTrainer (DDP, FSDP2); and what a loop must know."""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from conftest import TINY_RECIPE
from pages import ROOT
from ranks import Outcomes, on_ranks, shard
from test_run import metrics, weights
from tiny import sink_llama
from tiny import tokens as some_tokens
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import TrainingArguments

import memsinks as ms
from memsinks.sinks.sharding import full_state_dict, is_sharded
from memsinks.sinks.state import is_sink, sink_parameters
from memsinks.training.loop import Training

LENGTH = 12


# Recipes


def recipe(folder: str, name: str, **training) -> ms.Recipe:
    values = copy.deepcopy(TINY_RECIPE) | {"output": f"{folder}/{name}", "settle": {"passes": 1}}
    values["sinks"] |= {"shared": "decay"}
    values["training"] |= {"accumulate": 2, "sinks_last": 1, "save_every": 2, "keep": 9, "batch_rows": 4} | training
    return ms.parse_recipe(values)


def run(folder: str, name: str, stop: int | None = None, resume: bool = False, **training) -> str:
    """A run; cut off before step `stop` if that is given."""
    update = Training.update

    def cut_off(self, parts) -> float:
        if self.step == stop:
            raise InterruptedError
        return update(self, parts)

    try:
        Training.update = cut_off
        ms.train(recipe(folder, name, **training), resume=resume)
    except InterruptedError:
        return "cut off"
    finally:
        Training.update = update
    return "finished"


# SinkTrainer


def rows(count: int) -> list[dict[str, torch.Tensor]]:
    """The ranks have different numbers of targets."""
    found = []
    for row in range(count):
        ids = some_tokens(1, LENGTH, row)[0]
        marks = {"document_ids": torch.full_like(ids, 10 + row % 5), "exposures": torch.full_like(ids, 1 + row // 4)}
        labels = ids.masked_fill(torch.arange(LENGTH) > 3 + row % 8, -100)
        found.append({"input_ids": ids, "labels": labels, "position_ids": torch.arange(LENGTH), **marks})
    return found


def trainer(folder: str, world: int, fsdp: bool, **changes) -> ms.SinkTrainer:
    settings = {
        "output_dir": folder, "max_steps": 4, "per_device_train_batch_size": 4 // world, "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2, "use_cpu": True, "report_to": [], "save_strategy": "no", "logging_steps": 1,
        "disable_tqdm": True, "adam_epsilon": 1e-3, "ddp_find_unused_parameters": False,
    }  # fmt: skip
    if fsdp:
        settings |= {
            "fsdp": True,
            "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
        }
    args = TrainingArguments(**(settings | changes))
    return ms.SinkTrainer(sink_llama(torch.float32), args, train_dataset=rows(32))


def sharding_on_cpus() -> None:
    """Let Accelerate, which shards on accelerators alone, take the processes of this test for some."""
    AcceleratorState._reset_state(reset_partial_state=True)
    start = AcceleratorState.__init__

    def started(self, *arguments, fsdp_plugin=None, **settings) -> None:
        start(self, *arguments, fsdp_plugin=fsdp_plugin, **settings)
        if fsdp_plugin is not None:
            self.fsdp_plugin = fsdp_plugin
        if getattr(self, "fsdp_plugin", None) is not None:
            self.distributed_type = DistributedType.FSDP

    AcceleratorState.__init__ = started


def curve(found: ms.SinkTrainer) -> list[float]:
    return [line["loss"] for line in found.state.log_history if "loss" in line]


def trained(folder: str, fsdp: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Four steps with a checkpoint after the second."""
    if fsdp:
        with pytest.raises(ms.ArchitectureError, match="Accelerate shards on GPUs"):
            trainer(folder, 2, fsdp)
        sharding_on_cpus()
    found = trainer(folder, 2, fsdp, save_strategy="steps", save_steps=2)
    found.train()
    assert is_sharded(found.model) == fsdp
    return curve(found), full_state_dict(found.model)


def trained_on(folder: str, fsdp: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The last two steps, by a second trainer whose weights come from the checkpoint."""
    found = trainer(folder, 2, fsdp)
    with torch.no_grad():
        for parameter in found.model.parameters():
            parameter.add_(1.0)
    found.train(resume_from_checkpoint=f"{folder}/checkpoint-2")
    return curve(found)[2:], full_state_dict(found.model)


def gradients_of_a_trainer(folder: str, averaged: bool) -> str:
    """The sinks' gradients in sinks_first and in the step, which the optimizer leaves as they are, both open in every row."""
    taken = []

    class Keeping(torch.optim.SGD):
        def step(self, closure=None) -> None:
            taken.append([x.grad.clone() for x in sink_parameters(model)])

    model = sink_llama(torch.float32, shared_decay=0.0)
    args = TrainingArguments(
        folder, max_steps=1, per_device_train_batch_size=2, max_grad_norm=0.0, use_cpu=True, report_to=[],
        save_strategy="no", average_tokens_across_devices=averaged, ddp_find_unused_parameters=False,
    )  # fmt: skip
    open_rows = [row | {"exposures": row["exposures"] + 1} for row in rows(4)]
    optimizer = Keeping(ms.param_groups(model, 1e-2))
    ms.SinkTrainer(model, args, train_dataset=open_rows, optimizers=(optimizer, None)).train()
    first, step = taken
    for one, other in zip(first, step, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
    return ""


# Loops of one's own


def batch(rank: int) -> dict[str, torch.Tensor]:
    text = some_tokens(3, LENGTH, rank)
    return {
        "input_ids": text,
        "labels": text,
        "document_ids": torch.tensor([1, 2, 3]),
        "exposures": torch.tensor([1, 2, 3]),
    }


def one_ends_early(wrapper: str, shared: str) -> dict[str, torch.Tensor]:
    """Two steps of the first process, the second has rows in the first step alone."""
    model = sink_llama(torch.float64, shared=shared).train()
    wrapped = DistributedDataParallel(model) if wrapper == "ddp" else shard(model)
    optimizer = ms.AdamW(ms.param_groups(model, 1e-2), eps=1e-3)
    rank = torch.distributed.get_rank()
    for step in range(2):
        ended = rank == 1 and step == 1
        part = ms.blank_batch(batch(rank)) if ended else batch(rank + 7 * step)
        divisor = torch.tensor(ms.target_count(part["labels"]))
        torch.distributed.all_reduce(divisor)
        ms.sinks_first(wrapped, optimizer, [] if ended else [part], num_items_in_batch=divisor)
        (wrapped(**part, num_items_in_batch=divisor).loss * 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    if wrapper == "ddp":
        return {name: x.detach().clone() for name, x in model.named_parameters()}
    return full_state_dict(model)


def one_process(shared: str) -> dict[str, torch.Tensor]:
    model = sink_llama(torch.float64, shared=shared).train()
    optimizer = ms.AdamW(ms.param_groups(model, 1e-2), eps=1e-3)
    for parts in ([batch(0), batch(1)], [batch(7)]):
        whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        ms.sinks_first(model, optimizer, [whole])
        model(**whole).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


def reentrant() -> str:
    """Refused before it fails in the backward; what does not run rows apart works."""
    for shared in ("none", "decay"):
        model = sink_llama(torch.float32, shared=shared).train()
        model.gradient_checkpointing_enable({"use_reentrant": True})
        wrapped = DistributedDataParallel(model)
        if shared == "none":
            with pytest.raises(ms.ArchitectureError, match='re-entrant checkpointing.*"use_reentrant": False'):
                wrapped(**batch(0))
        else:
            wrapped(**batch(0)).loss.backward()
    return ""


class Sent(TorchDispatchMode):
    """Bytes that collectives are given."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if str(func).startswith("c10d."):
            flat = torch.utils._pytree.tree_leaves(args)
            self.total += max((x.nbytes for x in flat if isinstance(x, torch.Tensor)), default=0)
        return func(*args, **(kwargs or {}))


def bytes_of_closed_sinks() -> dict[str, int]:
    """What a backward sends under DDP where every document is new."""
    found = {}
    for name in ("whole pool", "open blocks"):
        model = sink_llama(torch.float32, neurons=1024).train()
        wrapped = DistributedDataParallel(model)
        if name == "open blocks":
            ms.send_open_blocks(wrapped)
        part = batch(0) | {"exposures": torch.ones(3, dtype=torch.int64)}
        with Sent() as sent:
            wrapped(**part).loss.backward()
        found[name] = sent.total
    sinks = sum(x.nbytes for x in sink_parameters(model))
    return found | {"sinks": sinks, "shared": sum(x.nbytes for x in model.parameters()) - sinks}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def two(folder: Path) -> Outcomes:
    where = str(folder)
    return on_ranks({
        "sharded": (run, (where, "sharded", None, False), {"shard": True}),
        "cut off": (run, (where, "cut", 5, False), {"shard": True}),
        "goes on": (run, (where, "cut", None, True), {"shard": True}),
        **{f"{x} {y}": (one_ends_early, (x, y)) for x in ("ddp", "fsdp") for y in ("decay", "none")},
        "re-entrant": (reentrant, ()), "bytes": (bytes_of_closed_sinks, ()),
    }, folder)  # fmt: skip


@pytest.fixture(scope="module")
def more(tmp_path_factory) -> Outcomes:
    where = str(tmp_path_factory.mktemp("more"))
    return on_ranks({
        "ddp trainer": (trained, (where, False)), "ddp resumed": (trained_on, (where, False)),
        "gradients": (gradients_of_a_trainer, (where, False)),
        "gradients, averaged": (gradients_of_a_trainer, (where, True)),
        "fsdp trainer": (trained, (f"{where}/fsdp", True)), "fsdp resumed": (trained_on, (f"{where}/fsdp", True)),
    }, Path(where))  # fmt: skip


@pytest.fixture(scope="module")
def one(folder: Path) -> Path:
    """The run of one process with twice the rows in each micro-batch."""
    assert run(str(folder), "one", batch_rows=8) == "finished"
    return folder / "one"


def same_run(one: Path, other: Path) -> None:
    assert [x["step"] for x in metrics(one)] == [x["step"] for x in metrics(other)]
    assert [x["loss"] for x in metrics(one)] == pytest.approx([x["loss"] for x in metrics(other)], rel=1e-4)
    for name, value in weights(one).items():
        torch.testing.assert_close(weights(other)[name], value, rtol=0, atol=2e-3, msg=name)


def test_a_sharded_run_is_that_of_one_process(two: Outcomes, folder: Path, one: Path) -> None:
    """Trained, settled, sinks last, saved."""
    assert two["sharded"] == "finished"
    same_run(one, folder / "sharded")
    assert any(is_sink(name) for name in ms.load(folder / "sharded" / "model").state_dict())


def test_a_sharded_run_that_was_cut_off_goes_on_to_the_same_bits(two: Outcomes, folder: Path) -> None:
    assert two["cut off"] == "cut off" and two["goes on"] == "finished"
    assert [x["loss"] for x in metrics(folder / "cut")] == [x["loss"] for x in metrics(folder / "sharded")]
    whole, again = weights(folder / "sharded"), weights(folder / "cut")
    assert all(torch.equal(again[name], whole[name]) for name in whole)


def test_one_process_goes_on_where_two_were_cut_off(two: Outcomes, folder: Path, one: Path, caplog) -> None:
    shutil.copytree(folder / "cut", folder / "alone")
    facts = json.loads((folder / "alone" / "run.json").read_text())
    (folder / "alone" / "run.json").write_text(json.dumps({"corpus_sha256": facts["corpus_sha256"]}))
    shutil.rmtree(folder / "alone" / "model")
    saved = folder / "alone" / "recipe.yaml"
    saved.write_text(saved.read_text().replace(f"{folder}/cut", f"{folder}/alone"))
    for path in (folder / "alone" / "checkpoints").iterdir():
        if path.name not in ("checkpoint-2", "checkpoint-4"):
            shutil.rmtree(path)
    with pytest.raises(ms.CheckpointError, match="2 processes whose steps held 8 rows.*set training.batch_rows to 8"):
        run(str(folder), "alone", resume=True, shard=True)
    caplog.set_level("INFO", "memsinks")
    assert run(str(folder), "alone", resume=True, batch_rows=8) == "finished"
    assert "was written by 2 processes, this is one of 1" in caplog.text
    same_run(one, folder / "alone")


@pytest.mark.long
def test_a_sharded_trainer_is_that_of_one_process(more: Outcomes, tmp_path: Path) -> None:
    """With accumulation, sinks first and clipping; its checkpoints resume to the same bits."""
    same_training(more["fsdp trainer"], more["fsdp resumed"], tmp_path)


@pytest.mark.long
def test_a_trainer_on_two_processes_is_that_of_one(more: Outcomes, tmp_path: Path) -> None:
    same_training(more["ddp trainer"], more["ddp resumed"], tmp_path)


def same_training(found: tuple, resumed: tuple, tmp_path: Path) -> None:
    (losses, weights), (rest, again) = found, resumed
    assert rest == losses[2:] and all(torch.equal(again[name], weights[name]) for name in weights)
    AcceleratorState._reset_state(reset_partial_state=True)
    alone = trainer(str(tmp_path), 1, False)
    alone.train()
    assert losses == pytest.approx(curve(alone), rel=1e-4)
    for name, value in alone.model.named_parameters():
        torch.testing.assert_close(weights[name], value.detach(), rtol=0, atol=1e-4, msg=name)


@pytest.mark.long
@pytest.mark.parametrize("name", ["gradients", "gradients, averaged"])
def test_sinks_learn_first_what_the_step_of_a_trainer_learns(more: Outcomes, name: str) -> None:
    """Over all ranks: the divisor is that of the Trainer, whether it counts the targets of all ranks or of each."""
    assert more[name] == ""


@pytest.mark.parametrize("shared", ["decay", "none"])
@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_a_process_that_ends_early_gives_blank_batches(two: Outcomes, wrapper: str, shared: str) -> None:
    for name, value in one_process(shared).items():
        torch.testing.assert_close(two[f"{wrapper} {shared}"][name], value.detach(), rtol=0, atol=1e-6, msg=name)


def test_a_batch_without_rows_says_what_to_give() -> None:
    empty = {name: x[:0] for name, x in batch(0).items()}
    with pytest.raises(ms.DataError, match="without rows.*blank_batch"):
        sink_llama()(**empty)


def test_reentrant_checkpointing_is_refused_under_ddp(two: Outcomes) -> None:
    assert two["re-entrant"] == ""


def test_sinks_that_no_process_opened_are_not_sent(two: Outcomes) -> None:
    found = two["bytes"]
    assert found["whole pool"] >= found["shared"] + found["sinks"]
    assert found["shared"] <= found["open blocks"] <= found["shared"] + found["sinks"] // 100


@pytest.mark.long
def test_the_example_goes_on_with_another_number_of_processes(tmp_path) -> None:
    """examples/fsdp.py: two processes to the end; what one process does from the last checkpoint has the same losses."""

    def losses(processes: int) -> list[float]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        script = [str(ROOT / "examples/fsdp.py"), str(tmp_path)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        said = subprocess.run(
            [*command, *script], check=True, env=environment, timeout=120, capture_output=True, text=True
        )
        return [float(line.split()[-1]) for line in said.stdout.splitlines() if line.startswith("step ")]

    whole = losses(2)
    assert len(whole) == 12 and ms.has_sinks(ms.load(tmp_path / "model"))
    assert losses(1) == pytest.approx(whole[8:], abs=1e-4)
