"""The training loop: one divisor, sinks first once a step, what a step changes about the model and takes back, processes."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from test_run import metrics, weights
from tiny import VOCABULARY, sink_llama, tiny_llama, tokens
from torch import Tensor

import memsinks as ms
from memsinks.errors import CheckpointError, ConfigError
from memsinks.sinks.state import is_sink
from memsinks.training.checkpoint import last_checkpoint, save_checkpoint
from memsinks.training.config import TrainingConfig
from memsinks.training.loop import Training, steps

ROWS, LENGTH, TOTAL = 4, 12, 5


def batch(step: int) -> dict[str, Tensor]:
    """Four rows, two of them met before, of different numbers of targets."""
    text = tokens(ROWS, LENGTH, step)
    labels = text.masked_fill(torch.arange(LENGTH) > 4 + 2 * torch.arange(ROWS)[:, None], -100)
    ids, exposures = torch.arange(ROWS) + 10, torch.tensor([1, 2, 1, 5])
    wide = {"document_ids": ids, "exposures": exposures}
    return {
        "input_ids": text, "labels": labels, "position_ids": torch.arange(LENGTH).expand(ROWS, -1),
        **{name: x[:, None].expand(-1, LENGTH) for name, x in wide.items()},
    }  # fmt: skip


def parts(accumulate: int):
    return lambda step: [
        {name: x.chunk(accumulate)[part] for name, x in batch(step).items()} for part in range(accumulate)
    ]


def config(**changes) -> TrainingConfig:
    return TrainingConfig(**({"length": LENGTH, "batch_rows": ROWS, "lr": 1e-2, "save_every": 0} | changes))


@pytest.mark.parametrize("first", [True, False])
def test_micro_batches_make_the_step_of_one_batch(first) -> None:
    """Sinks learn first once a step, from all micro-batches, so their number changes nothing."""
    models, losses = [], []
    for accumulate in (1, 2, 4):
        model = sink_llama()
        training = Training(model, config(accumulate=accumulate, sinks_first=first), TOTAL)
        losses.append([done.loss for done in steps(training, parts(accumulate))])
        models.append(dict(model.named_parameters()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6) and losses[2] == pytest.approx(losses[0], rel=1e-6)
    for other in models[1:]:
        for name, value in models[0].items():
            torch.testing.assert_close(other[name], value, rtol=0, atol=1e-5, msg=name)


def test_a_step_is_that_of_a_plain_loop() -> None:
    model = sink_llama()
    reference = copy.deepcopy(model)
    training = Training(model, config(), TOTAL)
    optimizer = ms.AdamW(ms.param_groups(reference, 1e-2, 0.1), betas=(0.9, 0.95))
    for done in steps(training, parts(1)):
        whole = batch(done.step - 1)
        for group, base in zip(optimizer.param_groups, (1, 1, 3), strict=True):
            group["lr"] = base * done.learning_rate
        ms.sinks_first(reference, optimizer, [whole])
        loss = reference(**whole).loss
        loss.backward()
        ms.clip_grad_norm_(reference, 1.0)
        optimizer.step(), optimizer.zero_grad()
        assert done.loss == pytest.approx(loss.item(), abs=1e-9)
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-8)


def test_targets_that_are_taken_out_leave_the_divisor() -> None:
    """The divisor is counted before the change: half the targets, half the loss."""
    losses = []
    for weight in (1, 2):
        model = tiny_llama()
        training = Training(model, config(), 1, change=lambda x, w=weight: {n: y[: len(y) // w] for n, y in x.items()})
        losses += [done.loss for done in steps(training, parts(1))]
    kept, whole = ms.target_count(batch(0)["labels"][:2]), ms.target_count(batch(0)["labels"])
    mean = tiny_llama()(**{name: batch(0)[name][:2] for name in ("input_ids", "labels")}).loss.item()
    assert losses[1] == pytest.approx(mean * kept / whole, rel=1e-6)


def flagged(step: int) -> dict[str, Tensor]:
    """The batch; in the first step one text is private and one gated, in the second all were met before."""
    made = batch(step)
    if step == 1:
        made["exposures"] = torch.full_like(made["exposures"], 2)
    if step == 0:
        made["isolation"] = torch.tensor([3, 1, 0, 0])[:, None].expand(-1, LENGTH)
    return made


def test_rows_that_train_their_sinks_alone_are_left_out_where_sinks_learn_last() -> None:
    """Shared weights end on the same bits, only sinks of the gated text move, and the loss is that of the rows that are left."""
    found = []
    for last in (False, True):
        model = sink_llama(shared="none", reserved_blocks=2)
        ms.assign(model, [11], blocks=2)  # a gated text in exact mode needs blocks of its own
        start, rows = copy.deepcopy(model.state_dict()), []
        model.model.embed_tokens.register_forward_hook(lambda module, args, out, rows=rows: rows.append(len(args[0])))
        training = Training(model, config(), TOTAL, sinks_last=last)
        losses = [done.loss for done in steps(training, lambda step: [flagged(step)])]
        found.append((model.state_dict(), start, rows, losses))
    (along, *_), (left, start, rows, losses) = found
    assert rows == [2, 1, 2, 2, 2]  # a gated one and a first meeting; one without effect; first meetings
    assert [math.isnan(x) for x in losses] == [False, True, False, False, False]
    for name, values in left.items():
        assert torch.equal(values, along[name]) != is_sink(name), name
        if is_sink(name):
            moved = (values != start[name]).flatten(1).any(1).nonzero()[:, 0].tolist()
            assert moved == [6, 7], name
    model = sink_llama(shared="none")
    mean = model(**{name: x[[0, 2]] for name, x in batch(0).items()}).loss.item()
    assert Training(model, config(), TOTAL, sinks_last=True).update([batch(0)]) == pytest.approx(mean, rel=1e-6)


def test_between_steps_the_model_is_as_it_was() -> None:
    """Autocast and the missing cache are there in a step only, so an evaluation on the way is in full precision."""
    model = sink_llama(torch.float32)
    model.config.use_cache = True
    names, seen = set(vars(model)), []
    model.register_forward_hook(lambda module, args, out: seen.append((out.logits.dtype, module.config.use_cache)))
    training = Training(model, config(precision="bf16", sinks_first=False), 2)
    for _ in steps(training, parts(1)):
        assert set(vars(model)) == names and model.config.use_cache
        model.eval()(input_ids=tokens(1, 4))
        assert model.training is False
    assert seen == [(torch.bfloat16, False), (torch.float32, True)] * 2


def test_after_an_error_the_model_is_as_it_was() -> None:
    model = sink_llama(torch.float32)
    model.config.use_cache, names = True, set(vars(model))
    training = Training(model, config(precision="bf16"), 1)
    with pytest.raises(IndexError):
        training.update([batch(0) | {"input_ids": batch(0)["input_ids"] + VOCABULARY}])
    assert set(vars(model)) == names and model.config.use_cache


def test_the_loop_can_stop_early_and_go_on() -> None:
    whole, halves = sink_llama(), sink_llama()
    expected = [done.loss for done in steps(Training(whole, config(), TOTAL), parts(1))]
    training = Training(halves, config(), TOTAL)
    losses = [done.loss for until in (2, 2, 99) for done in steps(training, parts(1), until=until)]
    assert losses == expected and training.step == TOTAL


def test_notes_and_facts_come_back_with_a_checkpoint(tmp_path) -> None:
    training = Training(sink_llama(), config(save_every=2, log_every=1, keep=1), TOTAL)
    for done in steps(training, parts(1), checkpoints=tmp_path, facts={"who": "me"}):
        training.notes.setdefault("losses", []).append(done.loss)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]  # one is kept, and none of the last step made
    checkpoint = last_checkpoint(tmp_path)
    assert checkpoint is not None and checkpoint.step == 4 and checkpoint.facts["who"] == "me"
    resumed = Training(sink_llama(), config(), TOTAL)
    resumed.resume(checkpoint)
    assert resumed.notes["losses"] == training.notes["losses"][:4]
    assert [done.loss for done in steps(resumed, parts(1))] == training.notes["losses"][4:]
    for one, other in zip(resumed.model.parameters(), training.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_another_number_of_processes_does_not_resume(tmp_path) -> None:
    save_checkpoint(tmp_path, 2, {}, keep=1, facts={"processes": 4})
    checkpoint = last_checkpoint(tmp_path)
    assert checkpoint is not None
    with pytest.raises(
        CheckpointError,
        match="4 processes whose steps held 16.*-node 4, or set training.batch_rows to 16",
    ):
        Training(sink_llama(), config(), TOTAL).resume(checkpoint)


def test_old_checkpoints_go_and_so_do_those_of_steps_that_are_made_again(tmp_path) -> None:
    for step in (2, 4, 6):
        save_checkpoint(tmp_path, step, {}, keep=9)
    (tmp_path / "checkpoint-6" / "checkpoint.json").write_text("")
    (tmp_path / "checkpoint-other").mkdir()
    save_checkpoint(tmp_path, 5, {}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-4", "checkpoint-5", "checkpoint-other"]


def test_settings_out_of_range_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        TrainingConfig(lr=0, accumulate=3, batch_rows=4, max_grad_norm=float("inf"), betas=(0.9,), precision="fp8")
    for part in ("invalid TrainingConfig: ", "lr must be positive and finite, got 0",
                 "accumulate (3) must divide batch_rows (4)", "max_grad_norm must be a finite number of at least 0, got inf",
                 "betas must be two numbers", "precision must be one of"):  # fmt: skip
        assert part in str(caught.value)


@pytest.mark.long
def test_two_processes_train_as_one_with_twice_the_rows(tiny_recipe, tmp_path) -> None:
    """torchrun: rows are dealt out, one divisor, one folder; a run that was cut off goes on."""
    settings = {"save_every": 4, "log_every": 2, "accumulate": 2}
    for name, rows in (("one", 8), ("two", 4)):
        values = tiny_recipe(tmp_path / name, training=settings | {"batch_rows": rows})
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
    ms.train(ms.read_recipe(tmp_path / "one.yaml"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "memsinks.cli",
               "train", str(tmp_path / "two.yaml")]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, env=environment, timeout=300)
    for turn in range(2):
        first, second = metrics(tmp_path / "one"), metrics(tmp_path / "two")
        assert [line["step"] for line in first] == [line["step"] for line in second]
        assert [line["loss"] for line in first] == pytest.approx([line["loss"] for line in second], rel=1e-4)
        for name, value in weights(tmp_path / "one").items():
            torch.testing.assert_close(weights(tmp_path / "two")[name], value, rtol=0, atol=2e-3)
        if turn == 0:
            (tmp_path / "two" / "run.json").write_text(_unfinished(tmp_path / "two" / "run.json"))
            subprocess.run([*command, "--resume"], check=True, env=environment, timeout=300)


def _unfinished(path: Path) -> str:
    facts = yaml.safe_load(path.read_text())
    return "{" + ", ".join(f'"{name}": "{value}"' for name, value in facts.items() if name == "corpus_sha256") + "}"
