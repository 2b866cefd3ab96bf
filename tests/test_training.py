"""Training on the Hugging Face Trainer: the callback, a stock Trainer, resuming, accumulation, the logged loss."""

from __future__ import annotations

import copy
import math
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trainers import (
    BATCH,
    CONFIG,
    LR,
    arguments,
    build,
    equal,
    groups_of,
    loop,
    losses,
    separate,
    some_rows,
    stock,
    trainer_of,
    weights,
)
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from memsinks.batch import FIELDS, collate
from memsinks.data.identity import exposures
from memsinks.data.packing import Rows, pack
from memsinks.errors import CheckpointError, ConfigError, DataError
from memsinks.removal.export import export
from memsinks.sinks.attach import remove_sinks
from memsinks.sinks.checkpoint import load
from memsinks.sinks.config import SinkConfig
from memsinks.training.trainer import SinkCallback, SinkTrainer


@pytest.fixture(scope="module")
def rows() -> Rows:
    return some_rows()


@pytest.mark.parametrize("own", [True, False], ids=["our AdamW", "the Trainer's optimizer"])
@pytest.mark.parametrize("kind", ["rows", "dataset"])
def test_default_arguments_train_as_the_plain_loop_does(tiny_llama, rows, tmp_path, own, kind) -> None:
    """Ids are kept, the loss is the model's own, shared weights and sinks are clipped apart, the norm is put back."""
    data = rows if kind == "rows" else Dataset.from_dict({name: getattr(rows, name) for name in (*FIELDS, "used")})
    model = build(tiny_llama)
    reference = copy.deepcopy(model)
    args = arguments(tmp_path)
    assert args.remove_unused_columns
    trainer = trainer_of(model, args, data, SinkCallback(), own=own)
    trainer.train()
    optimizer = groups_of(reference)
    if not own:
        decayed = trainer.get_decay_parameter_names(reference)
        named = list(reference.named_parameters())
        optimizer = torch.optim.AdamW(
            [{"params": [p for name, p in named if name in decayed], "weight_decay": args.weight_decay},
             {"params": [p for name, p in named if name not in decayed], "weight_decay": 0.0}], lr=LR,
        )  # fmt: skip
    expected = loop(reference, rows, optimizer, clip=separate)
    assert losses(trainer) == pytest.approx(expected, rel=1e-5)
    for name, value in weights(reference).items():
        torch.testing.assert_close(model.get_parameter(name), value, rtol=1e-4, atol=1e-5)
    assert args.max_grad_norm == 1.0
    assert float(model.model.layers[0].mlp.sinks.down.detach().abs().max()) > 0


@pytest.mark.parametrize("micro", [1, 2])
def test_sinks_learn_first_in_a_sink_trainer(tiny_llama, rows, tmp_path, micro) -> None:
    model = build(tiny_llama)
    reference, plain = copy.deepcopy(model), copy.deepcopy(model)
    args = arguments(
        tmp_path, per_device_train_batch_size=BATCH // micro, gradient_accumulation_steps=micro, save_strategy="no"
    )
    trainer = trainer_of(model, args, rows, SinkCallback(), own=True, kind=SinkTrainer)
    trainer.train()
    expected = loop(reference, rows, groups_of(reference), clip=separate, micro=micro, first=True)
    assert losses(trainer) == pytest.approx(expected, rel=1e-4)
    assert loop(plain, rows, groups_of(plain), clip=separate, micro=micro)[-1] > expected[-1] + 0.01
    for name, value in weights(reference).items():
        torch.testing.assert_close(model.get_parameter(name), value, rtol=1e-3, atol=1e-4)


def test_clipping_together_would_give_other_weights(tiny_llama, rows, tmp_path) -> None:
    """The gradients are large enough for the test above to see how they are clipped."""
    models = [build(tiny_llama) for _ in range(2)]
    clips = [separate, lambda model: torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)]
    for model, clip in zip(models, clips, strict=True):
        loop(model, rows, torch.optim.SGD(model.parameters(), lr=0.1), clip=clip)
    assert not equal(*(weights(model) for model in models))
    trained = build(tiny_llama)
    trainer = Trainer(
        trained, arguments(tmp_path, learning_rate=0.1, optim="sgd", save_strategy="no"), train_dataset=rows,
        data_collator=collate, callbacks=[SinkCallback()],
    )  # fmt: skip
    trainer.train()
    for name, value in weights(models[0]).items():
        torch.testing.assert_close(trained.get_parameter(name), value, rtol=1e-4, atol=1e-6)


class Interrupt(TrainerCallback):
    """Ctrl-C after the second step."""

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step == 2:
            raise KeyboardInterrupt


@pytest.mark.parametrize("kind", [Trainer, SinkTrainer])
def test_arguments_are_the_users_during_and_after_a_run(tiny_llama, rows, tmp_path, kind) -> None:
    """Also those in checkpoints, and after an interrupt, when the same arguments train again: still clipped."""
    args = arguments(tmp_path, save_steps=1, optim="sgd" if kind is Trainer else "adamw_torch", learning_rate=0.1)
    before = args.to_dict()
    trainer = trainer_of(build(tiny_llama), args, rows, SinkCallback(), Interrupt(), kind=kind)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert args.to_dict() == before
    saved = torch.load(tmp_path / "checkpoint-1" / "training_args.bin", weights_only=False)
    assert type(saved) is TrainingArguments and saved.max_grad_norm == 1.0
    if kind is Trainer:
        model, reference = build(tiny_llama), build(tiny_llama)
        trainer_of(model, args, rows, SinkCallback()).train()
        loop(reference, rows, torch.optim.SGD(reference.parameters(), lr=0.1), clip=separate)
        for name, value in weights(reference).items():
            torch.testing.assert_close(model.get_parameter(name), value, rtol=1e-4, atol=1e-6)
    assert args.to_dict() == before


@pytest.mark.parametrize("norm", [0.0, -1.0, math.inf])
def test_no_clipping_whatever_says_so(tiny_llama, rows, tmp_path, norm) -> None:
    args = arguments(tmp_path, max_grad_norm=norm, save_strategy="no", optim="sgd", learning_rate=0.1)
    model, reference = build(tiny_llama), build(tiny_llama)
    trainer_of(model, args, rows, SinkCallback()).train()
    loop(reference, rows, torch.optim.SGD(reference.parameters(), lr=0.1), clip=lambda _: None)
    for name, value in weights(reference).items():
        torch.testing.assert_close(model.get_parameter(name), value, rtol=1e-4, atol=1e-6)
    assert args.max_grad_norm == norm


@pytest.mark.parametrize(("norm", "part"), [(math.nan, "nan"), (None, "0 turns clipping off")])
def test_a_norm_that_is_no_number_is_refused(tiny_llama, rows, tmp_path, norm, part) -> None:
    args = arguments(tmp_path, max_grad_norm=norm)
    with pytest.raises(ConfigError, match=part):
        trainer_of(build(tiny_llama), args, rows, SinkCallback()).train()
    with pytest.raises(ConfigError, match=part):
        SinkTrainer(build(tiny_llama), args, train_dataset=rows)


def test_the_first_logged_loss_is_the_stock_loss(tiny_llama, rows, tmp_path) -> None:
    """Before the first step sinks change nothing, so both Trainers must log the same number."""
    first = []
    for config in (CONFIG, None):
        model = build(tiny_llama, config)
        callbacks = [SinkCallback()] if config else []
        trainer = Trainer(
            model, arguments(tmp_path, max_steps=1, save_strategy="no"), train_dataset=rows if config else stock(rows),
            data_collator=collate if config else None, callbacks=callbacks,
        )  # fmt: skip
        trainer.train()
        first += losses(trainer)
    assert first[0] == pytest.approx(first[1], rel=1e-6)


def test_a_stock_trainer_without_our_callback(tiny_llama, rows, tmp_path) -> None:
    model = build(tiny_llama)
    before = weights(model)
    with pytest.raises(DataError, match="of the training order is met after row"):
        trainer_of(build(tiny_llama), arguments(tmp_path / "shuffled", train_sampling_strategy="random"), rows).train()
    trainer = trainer_of(model, arguments(tmp_path), rows)
    trainer.train()
    assert all(np.isfinite(losses(trainer)))
    after = weights(model)
    assert not torch.equal(after["model.layers.0.mlp.sinks.down"], before["model.layers.0.mlp.sinks.down"])
    assert not torch.equal(after["model.embed_tokens.weight"], before["model.embed_tokens.weight"])
    saved = load(tmp_path / "checkpoint-6")
    assert equal(weights(saved), after)


def test_evaluation_is_of_the_closed_model(tiny_llama, rows, tmp_path) -> None:
    """The Trainer's own evaluation gives the loss of the export under a stock Trainer."""
    model = build(tiny_llama)
    evaluated = rows.select(slice(0, 8))
    trainer = trainer_of(
        model, arguments(tmp_path, save_strategy="no"), rows, SinkCallback(), own=True, eval_dataset=evaluated
    )
    trainer.train()
    found = trainer.evaluate()["eval_loss"]
    exported = AutoModelForCausalLM.from_pretrained(export(model, tmp_path / "clean", verify=False))
    plain = Trainer(exported, arguments(tmp_path / "plain"), eval_dataset=stock(evaluated))
    assert found == pytest.approx(plain.evaluate()["eval_loss"], rel=1e-6)
    model.train()
    batch = collate([evaluated[index] for index in range(8)])
    opened = model(**{name: batch[name] for name in FIELDS}).loss.item()
    assert abs(found - opened) > 1e-3


def test_a_sampler_that_shuffles_is_refused(tiny_llama, rows, tmp_path) -> None:
    for strategy in ("random", "group_by_length"):
        trainer = trainer_of(
            build(tiny_llama), arguments(tmp_path, train_sampling_strategy=strategy), rows, SinkCallback()
        )
        with pytest.raises(DataError, match="Sampler changes the order.*sequential"):
            trainer.train()


@pytest.mark.parametrize(
    "changes", [{"max_steps": -1, "num_train_epochs": 2}, {"max_steps": 7}], ids=["epochs", "steps"]
)
def test_epochs_that_are_not_unrolled_are_refused(tiny_llama, rows, tmp_path, changes) -> None:
    trainer = trainer_of(build(tiny_llama), arguments(tmp_path, **changes), rows, SinkCallback())
    with pytest.raises(DataError, match="2 epochs.*unroll"):
        trainer.train()


def test_order_and_epochs_are_free_without_exposures(tiny_llama, rows, tmp_path) -> None:
    config = SinkConfig(neurons=64, active=16, block_size=8, open_from=1, shared_decay=0)
    args = arguments(tmp_path, max_steps=-1, num_train_epochs=2, train_sampling_strategy="random", save_strategy="no")
    trainer = trainer_of(build(tiny_llama, config), args, rows, SinkCallback())
    trainer.train()
    assert len(losses(trainer)) == 12


@pytest.mark.parametrize("own", [True, False], ids=["our AdamW", "the Trainer's optimizer"])
@pytest.mark.parametrize("changes", [{}, {"max_shard_size": "8KB"}], ids=["one file", "shards"])
def test_resuming_gives_the_identical_curve_and_weights(tiny_llama, rows, tmp_path, monkeypatch, own, changes) -> None:
    """The second run starts from another seed: everything must come from the checkpoint."""
    whole = build(tiny_llama)
    if changes:  # the Trainer has no argument for it
        save = type(whole).save_pretrained
        monkeypatch.setattr(
            type(whole), "save_pretrained", lambda self, *x, **kwargs: save(self, *x, **kwargs, **changes)
        )
    first = trainer_of(whole, arguments(tmp_path, save_steps=2), rows, SinkCallback(), own=own)
    first.train()
    assert bool(changes) == (len(list((tmp_path / "checkpoint-2").glob("model-*.safetensors"))) > 1)
    resumed = build(tiny_llama, seed=1)
    second = trainer_of(resumed, arguments(tmp_path, save_strategy="no"), rows, SinkCallback(), own=own)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(set(losses(first))) == 6
    assert losses(second) == losses(first)
    assert equal(weights(resumed), weights(whole))


def test_resuming_refuses_sinks_of_other_settings(tiny_llama, rows, tmp_path) -> None:
    trainer_of(build(tiny_llama), arguments(tmp_path, max_steps=2), rows, SinkCallback()).train()
    other = build(tiny_llama, SinkConfig(neurons=64, active=16, block_size=8, seed=3))
    trainer = trainer_of(other, arguments(tmp_path), rows, SinkCallback())
    with pytest.raises(CheckpointError, match="seed is 0 there and 3 here"):
        trainer.train(resume_from_checkpoint=True)


def test_resuming_without_the_sinks_is_refused(tiny_llama, rows, tmp_path) -> None:
    trainer_of(build(tiny_llama), arguments(tmp_path, max_steps=2), rows, SinkCallback()).train()
    with pytest.raises(CheckpointError, match="without sinks was loaded.*SinkTrainer"):
        trainer_of(build(tiny_llama), arguments(tmp_path), rows).train(resume_from_checkpoint=True)
    shutil.rmtree(tmp_path / "checkpoint-2" / "sinks")
    with pytest.raises(CheckpointError, match="in none of .*checkpoint-2"):
        trainer_of(build(tiny_llama), arguments(tmp_path), rows, SinkCallback()).train(resume_from_checkpoint=True)


def test_resuming_from_another_folder_takes_its_sinks(tiny_llama, rows, tmp_path) -> None:
    whole = build(tiny_llama)
    trainer_of(whole, arguments(tmp_path / "a", save_steps=2), rows, SinkCallback()).train()
    folder = str(tmp_path / "a" / "checkpoint-2")
    for told in ({}, {"resume_from_checkpoint": folder}):
        resumed = build(tiny_llama, seed=1)
        args = arguments(tmp_path / "b", save_strategy="no", **told)
        trainer_of(resumed, args, rows, SinkCallback()).train(resume_from_checkpoint=folder)
        assert equal(weights(resumed), weights(whole))
    shutil.rmtree(tmp_path / "a" / "checkpoint-2" / "sinks")
    with pytest.raises(CheckpointError):
        trainer_of(build(tiny_llama), arguments(tmp_path / "b"), rows, SinkCallback()).train(
            resume_from_checkpoint=folder
        )


def test_sinks_of_another_checkpoint_are_never_taken(tiny_llama, rows, tmp_path) -> None:
    """args names one checkpoint, train() is given another: its stock weights with the sinks of the first would be wrong."""
    trainer_of(build(tiny_llama), arguments(tmp_path, save_steps=2), rows, SinkCallback()).train()
    args = arguments(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-4"), save_strategy="no")
    model = build(tiny_llama, seed=1)
    trainer = trainer_of(model, args, rows, SinkCallback())
    found = {}

    class Look(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs) -> None:
            found.setdefault(state.global_step, weights(model))

    trainer.add_callback(Look())
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert equal(found[2], weights(load(tmp_path / "checkpoint-2")))


@pytest.mark.parametrize("own", [True, False], ids=["our AdamW", "the Trainer's optimizer"])
def test_accumulation_equals_one_batch(tiny_llama, rows, tmp_path, own) -> None:
    """The rows have different numbers of targets; the divisor is that of the whole step."""
    models = []
    for accumulate in (1, 2):
        model = build(tiny_llama).double()
        args = arguments(
            tmp_path, per_device_train_batch_size=BATCH // accumulate, gradient_accumulation_steps=accumulate,
            save_strategy="no",
        )  # fmt: skip
        trainer = trainer_of(model, args, rows, SinkCallback(), own=own)
        trainer.train()
        models.append((weights(model), losses(trainer)))
    assert models[0][1] == pytest.approx(models[1][1], rel=1e-6)
    for name, value in models[0][0].items():
        torch.testing.assert_close(models[1][0][name], value, rtol=0, atol=1e-6)


def test_the_best_model_comes_with_its_sinks(tiny_llama, rows, tmp_path) -> None:
    """Told that a great loss is good, the Trainer goes back to the first checkpoint."""
    model = build(tiny_llama)
    args = arguments(
        tmp_path, eval_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True,
        metric_for_best_model="eval_loss", greater_is_better=True,
    )  # fmt: skip
    trainer = trainer_of(model, args, rows, SinkCallback(), eval_dataset=rows.select(slice(0, 8)))
    saved: dict[int, dict[str, Tensor]] = {}

    class Keep(TrainerCallback):
        def on_save(self, args, state, control, **kwargs) -> None:
            saved[state.global_step] = weights(model)

    trainer.add_callback(Keep())
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
    assert equal(weights(model), saved[2])
    for name, value in saved[2].items():
        assert not torch.equal(value, saved[6][name]), name
    model.train()
    batch = collate([rows[0]])
    assert torch.isfinite(model(**{name: batch[name] for name in FIELDS}).loss)


def test_exact_mode_trains_on_the_trainer(tiny_llama, tmp_path) -> None:
    rng = np.random.default_rng(0)
    documents = [rng.integers(1, 64, 9) for _ in range(4)]
    order = np.tile(np.arange(4), 6)
    ids = np.arange(4)[order]
    config = SinkConfig(neurons=64, active=16, block_size=8, shared="none")
    packed = pack([documents[i] for i in order], ids, exposures(ids), length=18, pad_id=0, apart_from=config.open_from)
    model = build(tiny_llama, config)
    args = arguments(tmp_path, max_steps=len(packed) // BATCH, save_strategy="no")
    trainer = trainer_of(model, args, packed, SinkCallback(), own=True)
    trainer.train()
    curve = losses(trainer)
    assert curve[-1] < curve[0]


def test_after_a_bf16_trainer_the_model_exports_and_sheds_its_sinks(tiny_llama, rows, tmp_path) -> None:
    model = build(tiny_llama)
    args = arguments(tmp_path / "run", bf16=True, use_cpu=True, max_steps=2, save_strategy="no")
    trainer_of(model, args, rows, SinkCallback(), own=True).train()
    plain = AutoModelForCausalLM.from_pretrained(export(model, tmp_path / "clean"))
    tokens = rows[0]["input_ids"][None]
    remove_sinks(model).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tokens).logits, plain(input_ids=tokens).logits, rtol=0, atol=1e-5)
