"""A Trainer that is killed (while it saves, twice in a row, in a later epoch, on a stream) goes on to the same figures."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from forks import forked
from torch.utils.data import IterableDataset
from trainers import BATCH, CONFIG, arguments, build, equal, groups_of, losses, some_rows, weights
from transformers import Trainer

import memsinks as ms
from memsinks.batch import collate
from memsinks.training.complete import MARKER

PUBLISHED = ms.SinkConfig(neurons=64, active=16, block_size=8, open_from=1, shared_decay=0)
KINDS = ("rows", "stream", "second epoch")


class Stream(IterableDataset):
    def __iter__(self):
        rows = some_rows()
        return iter([rows[index] for index in range(len(rows))])


def made(folder: Path, kind: str, seed: int = 0, **changes) -> ms.SinkTrainer:
    """Six steps, a checkpoint after each second one; in the second epoch from the fourth step on if asked."""
    if kind == "second epoch":  # three batches an epoch, shuffled anew in each
        rows, config = some_rows().select(slice(0, 3 * BATCH)), PUBLISHED
        changes |= {"train_sampling_strategy": "random"}
    else:
        rows, config = Stream() if kind == "stream" else some_rows(), CONFIG
    model = build(pytest.tiny_llama, config, seed=seed, attention_dropout=0.1)
    args = arguments(folder, save_strategy="steps", save_steps=2, **changes)
    return ms.SinkTrainer(model, args, train_dataset=rows)


@pytest.fixture(autouse=True)
def _factory(tiny_llama, monkeypatch) -> None:
    monkeypatch.setattr(pytest, "tiny_llama", tiny_llama, raising=False)


def killed(folder: Path, kind: str, at: int) -> bool:
    """Start or resume in a process that is killed before its `at`-th change of a file; False if it has fewer."""

    def run() -> None:
        trainer = made(folder, kind)
        torch.manual_seed(0)
        trainer.train(resume_from_checkpoint=complete(folder))

    return forked(run, kill_at=at, below=folder).killed


def complete(folder: Path) -> bool | None:
    return True if list(folder.glob(f"checkpoint-*/{MARKER}")) else None


@pytest.fixture(scope="module")
def uninterrupted(tiny_llama, tmp_path_factory) -> dict[str, ms.SinkTrainer]:
    pytest.tiny_llama = tiny_llama
    found = {kind: made(tmp_path_factory.mktemp("whole"), kind) for kind in KINDS}
    for trainer in found.values():
        torch.manual_seed(0)
        trainer.train()
    return found


@pytest.mark.parametrize(("kind", "at"), [("rows", 5), ("rows", 22), ("stream", 24), ("second epoch", 30)])
def test_a_trainer_killed_twice_goes_on_to_the_same_bits(uninterrupted, tmp_path, kind, at) -> None:
    """`at`: while the first or second checkpoint is written. What that leaves is passed over."""
    for _ in range(2):
        assert killed(tmp_path, kind, at)
    last = made(tmp_path, kind, seed=0 if complete(tmp_path) is None else 1)
    torch.manual_seed(0)
    last.train(resume_from_checkpoint=complete(tmp_path))
    whole = uninterrupted[kind]
    assert losses(last) == losses(whole)
    assert equal(weights(last.model), weights(whole.model))


@pytest.fixture(scope="module")
def saved(uninterrupted) -> Path:
    return Path(uninterrupted["rows"].args.output_dir)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("optimizer.pt gone", "optimizer.pt is missing"),
        ("scheduler.pt gone", "scheduler.pt is missing"),
        ("optimizer.pt empty", "optimizer.pt is damaged"),
        ("trainer_state.json of another", "trainer_state.json is damaged, or of another step"),
        ("model.safetensors of another", "model.safetensors is damaged, or of another step"),
        ("sinks/sinks.safetensors of another", "sinks/sinks.safetensors is damaged, or of another step"),
        (f"{MARKER} gone", "its save was cut off"),
        (f"{MARKER} empty", "without it nothing says whether the checkpoint is whole"),
    ],
)
def test_half_a_checkpoint_is_refused_or_passed_over(uninterrupted, saved, tmp_path, caplog, damage, said) -> None:
    folder = tmp_path / "run"
    shutil.copytree(saved, folder)
    shutil.rmtree(folder / "checkpoint-6")
    name, _, what = damage.partition(" ")
    path = folder / "checkpoint-4" / name
    if what == "gone":
        path.unlink()
    elif what == "empty":
        path.write_bytes(b"")
    else:
        shutil.copy(folder / "checkpoint-2" / name, path)
    kinds = [ms.SinkTrainer, *([Trainer] if what == "gone" else [])]  # what is damaged the stock one cannot read
    for kind in kinds:
        callbacks = [ms.SinkCallback()] if kind is Trainer else []
        model = build(pytest.tiny_llama, CONFIG, seed=1, attention_dropout=0.1)
        own = (groups_of(model) if kind is Trainer else None, None)
        trainer = kind(model, arguments(folder), collate, some_rows(), callbacks=callbacks, optimizers=own)
        with pytest.raises(ms.CheckpointError, match=f"{said}[^;]*; resume from .*checkpoint-2"):
            trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4"))
    last = made(folder, "rows", seed=1)
    last.train(resume_from_checkpoint=True)
    assert "passed over" in caplog.text and said in caplog.text
    assert losses(last) == losses(uninterrupted["rows"])
    assert equal(weights(last.model), weights(uninterrupted["rows"].model))


def test_where_no_checkpoint_is_complete_it_says_so(tmp_path) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    trainer = made(tmp_path, "rows")
    with pytest.raises(ms.CheckpointError, match="no complete checkpoint; start without"):
        trainer.train(resume_from_checkpoint=True)
    with pytest.raises(ms.CheckpointError, match="no other checkpoint beside it is complete, so start again"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_a_checkpoint_of_the_model_alone_is_refused(tmp_path) -> None:
    made(tmp_path, "rows", save_only_model=True, max_steps=2).train()
    with pytest.raises(
        ms.CheckpointError, match="holds no optimizer and no scheduler and no rng_state .save_only_model"
    ):
        made(tmp_path, "rows").train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
