"""SinkTrainer by itself: what it takes where nothing is given, what it learns first, and what it and the callback refuse."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import IterableDataset, SequentialSampler
from trainers import BATCH, CONFIG, LR, arguments, build, equal, groups_of, loop, losses, separate, some_rows, weights
from transformers import Trainer, TrainerCallback

import memsinks as ms
from memsinks.batch import FIELDS, collate
from memsinks.data.packing import Rows
from memsinks.errors import ArchitectureError, ConfigError, DataError
from memsinks.sinks.config import SinkConfig
from memsinks.sinks.state import is_sink, sink_parameters
from memsinks.training.trainer import SinkCallback, SinkTrainer


@pytest.fixture(scope="module")
def rows() -> Rows:
    return some_rows()


def shuffled(folder, **changes):
    """Arguments in which the order of the rows is left at its default, which shuffles."""
    return arguments(folder, **({"train_sampling_strategy": "random", "save_strategy": "no"} | changes))


# Right by itself


@pytest.mark.parametrize("kind", ["rows", "dataset"])
def test_it_needs_a_model_arguments_and_rows(tiny_llama, rows, tmp_path, kind) -> None:
    model = build(tiny_llama)
    reference = copy.deepcopy(model)
    data = rows if kind == "rows" else Dataset.from_dict({name: getattr(rows, name) for name in (*FIELDS, "used")})
    args = shuffled(tmp_path, weight_decay=0.1, adam_beta2=0.99)
    trainer = SinkTrainer(model, args, train_dataset=data)
    trainer.train()
    optimizer = ms.AdamW(ms.param_groups(reference, LR, weight_decay=0.1), betas=(0.9, 0.99))
    assert losses(trainer) == pytest.approx(loop(reference, rows, optimizer, clip=separate, first=True), rel=1e-4)
    for name, value in weights(reference).items():
        torch.testing.assert_close(model.get_parameter(name), value, rtol=1e-3, atol=1e-4)
    assert args.train_sampling_strategy == "random"
    assert [type(x) for x in trainer.callback_handler.callbacks].count(SinkCallback) == 1


def test_it_resumes_by_itself_to_the_same_bits(tiny_llama, rows, tmp_path) -> None:
    args = {"save_strategy": "steps", "save_steps": 2}
    first = SinkTrainer(build(tiny_llama), shuffled(tmp_path / "a", **args), train_dataset=rows)
    first.train()
    second = SinkTrainer(build(tiny_llama, seed=1), shuffled(tmp_path / "b"), train_dataset=rows)
    second.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert losses(second) == losses(first)
    assert equal(weights(second.model), weights(first.model))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_rows_that_train_their_sinks_alone_can_be_left_out(tiny_llama, tmp_path, accumulate) -> None:
    """Shared weights end on the same bits, and the sinks stay as they start."""
    made = []
    for last in (False, True):
        model = build(tiny_llama, dataclasses.replace(CONFIG, shared="none"))
        before = {name: x.clone() for name, x in weights(model).items() if is_sink(name)}
        args = shuffled(tmp_path, gradient_accumulation_steps=accumulate, max_steps=6 // accumulate)
        SinkTrainer(model, args, train_dataset=some_rows(apart_from=2), sinks_last=last).train()
        moved = any(not torch.equal(weights(model)[name], x) for name, x in before.items())
        assert moved != last
        made.append({name: x for name, x in weights(model).items() if not is_sink(name)})
    assert equal(*made)


@pytest.mark.parametrize(
    ("config", "changes", "part"),
    [
        ({"open_from": 1}, {}, "all rows would be left out"),
        ({}, {"label_smoothing_factor": 0.1}, "label smoothing takes the mean"),
    ],
)
def test_where_rows_cannot_be_left_out_it_is_said(tiny_llama, rows, tmp_path, config, changes, part) -> None:
    model = build(tiny_llama, dataclasses.replace(CONFIG, shared="none", **config))
    with pytest.raises(ConfigError, match=part):
        SinkTrainer(model, shuffled(tmp_path, **changes), train_dataset=rows, sinks_last=True)


def test_what_is_given_wins(tiny_llama, rows, tmp_path) -> None:
    callback, model = SinkCallback(), build(tiny_llama)
    optimizer, seen = groups_of(model), []

    def own_collate(chosen):
        seen.append(len(chosen))
        return collate(chosen)

    trainer = SinkTrainer(
        model,
        shuffled(tmp_path),
        own_collate,
        rows,
        callbacks=[callback],
        optimizers=(optimizer, None),
        sink_lr_factor=9.0,
    )
    trainer.train()
    assert seen == [BATCH] * 6
    assert [x for x in trainer.callback_handler.callbacks if isinstance(x, SinkCallback)] == [callback]
    assert trainer.optimizer.optimizer is optimizer
    other = SinkTrainer(build(tiny_llama), shuffled(tmp_path), train_dataset=rows, sink_lr_factor=9.0)
    assert [group["lr"] for group in other.create_optimizer().param_groups] == pytest.approx([LR, LR, 9 * LR])


def test_order_is_kept_only_where_exposures_count(tiny_llama, rows, tmp_path) -> None:
    published = SinkConfig(neurons=64, active=16, block_size=8, open_from=1, shared_decay=0)
    kinds = [type(SinkTrainer(build(tiny_llama, config), shuffled(tmp_path), train_dataset=rows)._get_train_sampler())
             for config in (CONFIG, published)]  # fmt: skip
    assert kinds[0] is SequentialSampler and kinds[1] is not SequentialSampler


def test_what_it_cannot_do_is_said(tiny_llama, rows, tmp_path) -> None:
    with pytest.raises(ArchitectureError, match="no sinks"):
        SinkTrainer(build(tiny_llama, None), shuffled(tmp_path), train_dataset=rows)
    trainer = SinkTrainer(build(tiny_llama), shuffled(tmp_path, optim="sgd"), train_dataset=rows)
    with pytest.raises(ConfigError, match="optim is sgd; give optimizers="):
        trainer.train()


# Sinks first learns the loss of the step


def first_and_step(tiny_llama, rows, tmp_path, *, micro: int = 1, loss_arguments: bool = True, **settings):
    """Gradients of the sinks in sinks_first and in the step, which holds open rows and others; nothing is clipped."""
    taken: list[list[Tensor]] = []

    class Keeping(torch.optim.SGD):
        def step(self, closure=None) -> None:
            taken.append([x.grad.clone() for x in sink_parameters(model)])

    model = build(tiny_llama, dataclasses.replace(CONFIG, shared_decay=0.0))
    if not loss_arguments:
        model.accepts_loss_kwargs = False
    args = {name: settings.pop(name) for name in list(settings) if name == "label_smoothing_factor"}
    trainer = SinkTrainer(
        model,
        shuffled(
            tmp_path, max_steps=1, max_grad_norm=0.0, per_device_train_batch_size=BATCH // micro,
            gradient_accumulation_steps=micro, **args,
        ),
        train_dataset=rows.select(slice(12, 16)), optimizers=(Keeping(ms.param_groups(model, LR)), None), **settings,
    )  # fmt: skip
    trainer.train()
    assert len(taken) == 2
    return taken


def ten_times(outputs, labels, num_items_in_batch=None) -> Tensor:
    logits, labels = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    return (
        10 * torch.nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum") / num_items_in_batch
    )


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize(
    "settings", [{}, {"compute_loss_func": ten_times}, {"label_smoothing_factor": 0.2}, {"loss_arguments": False}],
    ids=["model", "compute_loss_func", "label smoothing", "no loss arguments"],
)  # fmt: skip
def test_the_sinks_first_gradient_is_that_of_the_step(tiny_llama, rows, tmp_path, settings, micro) -> None:
    """The optimizer moves nothing, and only open rows reach the sinks, so both see the same gradient."""
    before, step = first_and_step(tiny_llama, rows, tmp_path, micro=micro, **settings)
    assert max(float(x.abs().max()) for x in before) > 1e-4
    for one, other in zip(before, step, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_the_loss_of_the_user_is_what_the_sinks_learn(tiny_llama, rows, tmp_path) -> None:
    plain, _ = first_and_step(tiny_llama, rows, tmp_path)
    ten, _ = first_and_step(tiny_llama, rows, tmp_path, compute_loss_func=ten_times)
    for one, other in zip(plain, ten, strict=True):
        torch.testing.assert_close(10 * one, other, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("changes", [{"label_smoothing_factor": 0.1}, {"compute_loss_func": ten_times}])
def test_texts_that_are_known_are_left_out_under_any_loss(tiny_llama, rows, tmp_path, changes) -> None:
    args = {name: changes[name] for name in changes if name == "label_smoothing_factor"}
    more = {name: changes[name] for name in changes if name not in args}
    trainer = SinkTrainer(build(tiny_llama), shuffled(tmp_path, max_steps=6, **args), train_dataset=rows,
                          sinks_first_until=0.5, **more)  # fmt: skip
    assert trainer.train().global_step == 6


def test_it_is_one_update_a_step(tiny_llama, rows, tmp_path, monkeypatch) -> None:
    steps = []
    step = ms.AdamW.step
    monkeypatch.setattr(ms.AdamW, "step", lambda self, closure=None: steps.append(None) or step(self, closure))
    args = shuffled(tmp_path, per_device_train_batch_size=1, gradient_accumulation_steps=BATCH)
    SinkTrainer(build(tiny_llama), args, train_dataset=rows).train()
    opens = (rows.exposures >= 2).reshape(6, -1).any(1)
    assert opens.any() and len(steps) == 6 + opens.sum()


# Rows that would be met twice, or in another order


def refused(trainer: Trainer, part: str, **settings) -> None:
    with pytest.raises(DataError, match=part):
        trainer.train(**settings)


@pytest.fixture(params=["SinkTrainer", "Trainer"])
def make(request, tiny_llama, rows):
    """A factory of both kinds of Trainer."""

    def trainer(args, data=rows, model=None, callbacks=()):
        model = build(tiny_llama) if model is None else model
        if request.param == "SinkTrainer":
            return SinkTrainer(model, args, train_dataset=data, callbacks=list(callbacks))
        return Trainer(model, args, collate, data, callbacks=[SinkCallback(), *callbacks])

    return trainer


def test_the_search_for_a_batch_size_is_refused(make, tmp_path) -> None:
    refused(make(arguments(tmp_path, auto_find_batch_size=True)), "auto_find_batch_size starts again")


def test_epochs_and_another_order_are_refused(make, tmp_path) -> None:
    refused(make(arguments(tmp_path, max_steps=7)), "2 epochs.*unroll")
    refused(make(arguments(tmp_path, train_sampling_strategy="group_by_length")), "Sampler changes the order")


def test_a_second_training_on_the_same_rows_is_refused(make, tmp_path) -> None:
    trainer = make(arguments(tmp_path, max_steps=2))
    trainer.train()
    before = weights(trainer.model)
    refused(trainer, "train\\(\\) was called before on this model")
    assert equal(before, weights(trainer.model))
    trainer.args.max_steps = 4
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert trainer.state.global_step == 4


def test_resuming_into_rows_of_before_is_refused(make, tmp_path) -> None:
    make(arguments(tmp_path, max_steps=2, save_steps=2)).train()
    folder = str(tmp_path / "checkpoint-2")
    refused(make(arguments(tmp_path, ignore_data_skip=True)), "ignore_data_skip", resume_from_checkpoint=folder)
    other = arguments(tmp_path, gradient_accumulation_steps=2, max_steps=3)
    refused(make(other), "4 rows a step, this resumes with 8", resume_from_checkpoint=folder)
    halves = arguments(tmp_path, gradient_accumulation_steps=2, per_device_train_batch_size=2)
    trainer = make(halves)
    trainer.train(resume_from_checkpoint=folder)
    assert trainer.state.global_step == 6


def test_a_stream_past_its_end_is_refused(make, rows, tmp_path) -> None:
    class Stream(IterableDataset):
        def __iter__(self):
            return iter([rows[index] for index in range(2 * BATCH)])

    trainer = make(arguments(tmp_path, max_steps=4, save_strategy="no"), Stream())
    refused(trainer, "rows ended after 2 steps of 4")
    assert trainer.state.global_step == 2
    make(arguments(tmp_path, max_steps=2, save_strategy="no"), Stream()).train()


def test_rows_that_were_shuffled_before_are_refused_where_they_are_met(make, rows, tmp_path) -> None:
    """A sampler looks right then; the places of the rows in their order do not."""
    backwards = [rows[index] for index in range(len(rows) - 1, -1, -1)]
    refused(
        make(arguments(tmp_path, save_strategy="no"), backwards), r"row \d+ of the training order is met after row \d+"
    )


def test_several_problems_are_said_at_once(make, tmp_path) -> None:
    refused(make(arguments(tmp_path, max_steps=7, auto_find_batch_size=True)), "2 epochs.*; auto_find_batch_size")


def test_evaluation_between_steps_changes_nothing(tiny_llama, rows, tmp_path) -> None:
    """The Trainer puts the model back into training mode, for sinks first too."""
    curves = []
    for changes in ({}, {"eval_strategy": "steps", "eval_steps": 1}):
        trainer = SinkTrainer(
            build(tiny_llama), shuffled(tmp_path, **changes), train_dataset=rows, eval_dataset=rows.select(slice(0, 4))
        )
        trainer.train()
        curves.append(losses(trainer))
    assert curves[0] == curves[1]


def test_a_compiled_model_is_saved_whole_under_its_own_names(tiny_llama, rows, tmp_path) -> None:
    model = build(tiny_llama)
    with torch.compiler.set_stance("force_eager"):
        SinkTrainer(torch.compile(model), arguments(tmp_path, max_steps=1), train_dataset=rows).train()
    assert equal(weights(ms.load(tmp_path / "checkpoint-1")), weights(model))


def test_an_adapter_is_trained_with_its_sinks(tiny_llama, rows, tmp_path) -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        build(tiny_llama), peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["sinks"])
    )
    before = {name: x.detach().clone() for name, x in model.named_parameters()}
    SinkTrainer(model, shuffled(tmp_path), train_dataset=rows).train()
    moved = {name for name, x in model.named_parameters() if not torch.equal(x, before[name])}
    assert any("lora_" in name for name in moved) and any("sinks.modules_to_save" in name for name in moved)
    assert all("lora_" in name or "sinks.modules_to_save" in name for name in moved)


def test_label_smoothing_in_the_exact_mode(tiny_llama, tmp_path) -> None:
    """The Trainer takes the labels out of the batch, so padding has to be told from text without them."""
    exact = dataclasses.replace(CONFIG, shared="none")
    trainer = SinkTrainer(build(tiny_llama, exact), shuffled(tmp_path, label_smoothing_factor=0.1, max_steps=5),
                          train_dataset=some_rows(apart_from=2).select(slice(0, 20)))  # fmt: skip
    trainer.train()
    assert len(losses(trainer)) == 5


class Count(TrainerCallback):
    """Steps begun."""

    steps = 0

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self.steps += 1


def test_rows_of_another_corpus_can_follow_in_a_new_trainer(make, rows, tmp_path) -> None:
    first = make(arguments(tmp_path, max_steps=2, save_strategy="no"))
    first.train()
    count = Count()
    make(arguments(tmp_path, max_steps=2, save_strategy="no"), rows.select(slice(8, 16)), first.model, [count]).train()
    assert count.steps == 2
