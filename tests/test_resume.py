"""Runs that are killed, interrupted or damaged: they go on to the same figures, or say what is wrong in one error."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from forks import forked
from test_run import metrics, same_weights

from memsinks.errors import CheckpointError
from memsinks.runs.folder import RunFolder
from memsinks.runs.recipe import Recipe, parse_recipe
from memsinks.runs.run import train
from memsinks.training.loop import Training


def killed(recipe: Recipe, at: int) -> bool:
    """Run it in a process that is killed before its `at`-th change of a file; False if it has fewer."""
    return forked(lambda: train(recipe), kill_at=at, below=Path(recipe.output)).killed


@pytest.mark.parametrize("at", [1, 2, 3, 5, 7, 12, 16, 25, 60, 10_000])
def test_a_killed_run_goes_on_to_the_same_figures(tiny_run, tiny_recipe, tmp_path, at) -> None:
    """Wherever it was: what is not there yet is started again without resume, what is there is resumed."""
    recipe = parse_recipe(tiny_recipe(tmp_path / "run"))
    assert killed(recipe, at) == (at < 10_000)
    train(recipe, resume=(tmp_path / "run" / "recipe.yaml").exists())
    assert metrics(tmp_path / "run") == metrics(tiny_run)
    assert same_weights(tmp_path / "run", tiny_run)
    assert not list((tmp_path / "run").rglob(".*")), "what the killed process left is removed"


@pytest.fixture
def cut(tiny_recipe, tmp_path, monkeypatch) -> Recipe:
    """A run that ended after 5 steps, with checkpoints of 2 and 4."""
    recipe = parse_recipe(tiny_recipe(tmp_path / "run"))
    update = Training.update

    def stopping(self, parts) -> float:
        if self.step == 5:
            raise KeyboardInterrupt
        return update(self, parts)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "update", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)
    return recipe


@pytest.mark.parametrize(
    "damage", ["no state", "no marker", "empty state", "cut state", "empty marker", "other marker"]
)
def test_a_damaged_checkpoint_is_passed_over_and_said(cut, tiny_run, caplog, damage) -> None:
    last = Path(cut.output) / "checkpoints" / "checkpoint-4"
    what, name = damage.split()
    path = last / {"state": "state.pt", "marker": "checkpoint.json"}[name]
    if what == "no":
        path.unlink()
    elif what == "other":
        path.write_text('{"step": 4, "facts": {}, "sha256": "0"}')
    else:
        path.write_bytes(b"" if what == "empty" else path.read_bytes()[:500])
    caplog.set_level("INFO", "memsinks")
    train(cut, resume=True)
    assert f"passed over {last} (" in caplog.text
    assert f"going on from {last.with_name('checkpoint-2')}, step 2 of " in caplog.text
    assert metrics(Path(cut.output)) == metrics(tiny_run)
    assert same_weights(Path(cut.output), tiny_run)


def test_where_no_checkpoint_is_whole_the_run_starts_again(cut, tiny_run, caplog) -> None:
    for path in (Path(cut.output) / "checkpoints").rglob("state.pt"):
        path.write_bytes(b"")
    caplog.set_level("INFO", "memsinks")
    train(cut, resume=True)
    assert "no checkpoint is whole" in caplog.text and "starting again" in caplog.text
    assert metrics(Path(cut.output)) == metrics(tiny_run)


@pytest.mark.parametrize(
    ("name", "text"), [("recipe.yaml", ""), ("recipe.yaml", "a: [1"), ("run.json", ""), ("run.json", "{")]
)
def test_damaged_files_are_one_clear_error(cut, name, text) -> None:
    (Path(cut.output) / name).write_text(text)
    with pytest.raises(CheckpointError, match=f"{name} is damaged"):
        train(cut, resume=True)


def test_checkpoints_of_the_trainer_of_before_are_not_thrown_away(cut) -> None:
    checkpoints = Path(cut.output) / "checkpoints"
    shutil.rmtree(checkpoints / "checkpoint-2")
    (checkpoints / "checkpoint-4" / "checkpoint.json").rename(checkpoints / "checkpoint-4" / "trainer_state.json")
    with pytest.raises(CheckpointError, match="an earlier memsinks.*cannot resume"):
        train(cut, resume=True)
    assert (checkpoints / "checkpoint-4").is_dir()


@pytest.mark.parametrize("save_every", [0, 2])
def test_ctrl_c_finishes_and_saves_the_step(tiny_run, tiny_recipe, tmp_path, monkeypatch, save_every) -> None:
    recipe = parse_recipe(tiny_recipe(tmp_path / "run", training={"save_every": save_every, "log_every": 2}))
    update = Training.update

    def with_signal(self, parts) -> float:
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, parts)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "update", with_signal)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-3").is_dir()
    train(recipe, resume=True)
    pairs = zip(*[iter(line["loss"] for line in metrics(tiny_run))] * 2, strict=False)
    assert [line["loss"] for line in metrics(tmp_path / "run")] == pytest.approx([sum(x) / 2 for x in pairs], rel=1e-6)
    assert same_weights(tmp_path / "run", tiny_run)


def test_a_second_ctrl_c_stops_at_once(tiny_recipe, tmp_path, monkeypatch) -> None:
    recipe = parse_recipe(tiny_recipe(tmp_path / "run"))

    def twice(self, parts) -> float:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("went on")

    monkeypatch.setattr(Training, "update", twice)
    with pytest.raises(KeyboardInterrupt):
        train(recipe)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert not list((tmp_path / "run").glob("checkpoints/*"))


def test_a_folder_of_something_else_is_left_alone(tiny_recipe, tmp_path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("notes.txt", ".mine.part-1"):
        (tmp_path / "run" / name).write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty"):
        train(parse_recipe(tiny_recipe(tmp_path / "run")))
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".mine.part-1", "notes.txt"]
    (tmp_path / "run" / "notes.txt").unlink()


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_in_which_another_process_trains_is_left_alone(tiny_recipe, tmp_path, resume) -> None:
    recipe = parse_recipe(tiny_recipe(tmp_path / "run"))
    with RunFolder(tmp_path / "run").held(), pytest.raises(CheckpointError, match="is locked: another process trains"):
        train(recipe, resume=resume)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_made_is_said(tiny_recipe, tmp_path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="cannot write .*choose another output"):
        train(parse_recipe(tiny_recipe(tmp_path / "file" / "run")))


def test_resumed_facts_are_kept(cut) -> None:
    before = json.loads((Path(cut.output) / "run.json").read_text())
    train(cut, resume=True)
    after = json.loads((Path(cut.output) / "run.json").read_text())
    assert "loss with their own sinks" in after["sinks_last"]
    assert after == before | {name: after[name] for name in ("seconds", "sinks_last")}
