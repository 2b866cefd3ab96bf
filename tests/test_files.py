"""Files of ours: never half written, and what killed writes leave is removed."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

from memsinks import files
from memsinks.errors import CheckpointError
from memsinks.files import read_json, write_json, written_beside

KILLED = """
import signal, sys
from pathlib import Path
from memsinks.files import written_beside
with written_beside(Path(sys.argv[1])) as part:
    (part / "large").write_text("x")
    print("writing", flush=True)
    signal.pause()
"""


def beside(folder) -> list[str]:
    return sorted(path.name.split("-")[0] for path in folder.iterdir() if path.name.startswith("."))


def write(target) -> None:
    with written_beside(target) as part:
        (part / "file").write_text("whole")


@pytest.fixture
def at_once(monkeypatch) -> None:
    """Without the minute in which a folder counts as just made."""
    monkeypatch.setattr(files, "JUST_MADE", -1.0)


def test_what_a_killed_write_left_is_removed_when_nobody_uses_it(tmp_path, at_once) -> None:
    target = tmp_path / "model"
    with subprocess.Popen([sys.executable, "-c", KILLED, str(target)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        write(target)
        assert beside(tmp_path) == [".model.part"]  # the other process is still at work
        process.send_signal(signal.SIGKILL)
        process.wait()
    write(target)
    assert beside(tmp_path) == []
    assert (target / "file").read_text() == "whole"


def test_what_has_just_been_made_stays(tmp_path) -> None:
    for name in (".model.part-a", ".model.old-b", ".model-2.part-c", ".model.partial-d"):
        (tmp_path / name).mkdir()
    write(tmp_path / "model")
    assert len(beside(tmp_path)) == 4


def test_leftovers_of_the_same_target_alone_are_removed(tmp_path, at_once) -> None:
    for name in (".model.part-a", ".model.old-b", ".model-2.part-c", ".model.partial-d"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    write(tmp_path / "model")
    assert beside(tmp_path) == [".model", ".model.partial"]
    (tmp_path / ".facts.json.part-123").write_text("{")
    write_json(tmp_path / "facts.json", {"a": [1]})
    assert beside(tmp_path) == [".model", ".model.partial"]
    assert read_json(tmp_path / "facts.json") == {"a": [1]}


def test_what_a_write_that_was_killed_had_not_moved_back_yet_is_not_lost(tmp_path, at_once) -> None:
    write(tmp_path / "model")
    old = tmp_path / ".model.old-a"
    (old / "notes").mkdir(parents=True)
    for name in ("notes/of-mine", "file", "model-2.safetensors", "model.safetensors.index.json"):
        (old / name).write_text("before")
    write(tmp_path / "model")
    assert beside(tmp_path) == []
    assert {x.name: x.read_text() for x in (tmp_path / "model").rglob("*") if x.is_file()} == {
        "file": "whole",
        "of-mine": "before",
    }


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="(Not a directory|File exists).*choose another folder"):
        write(tmp_path / "file" / "model")
    with pytest.raises(CheckpointError, match="(Not a directory|File exists).*choose another folder"):
        write_json(tmp_path / "file" / "facts.json", {})


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe"])
def test_a_damaged_file_is_one_clear_error(tmp_path, content) -> None:
    (tmp_path / "facts.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"cannot read .*facts\.json: .*remove it"):
        read_json(tmp_path / "facts.json")


def test_a_failed_write_leaves_what_was_there(tmp_path) -> None:
    write_json(tmp_path / "facts.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "facts.json", {"a": object()})
    assert read_json(tmp_path / "facts.json") == {"a": 1}
    assert beside(tmp_path) == []
