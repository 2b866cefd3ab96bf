"""The commands that write, on tiny inputs: what each starts from, how it is asked, what of its outcome must be the same.

A command runs in a fork of this process, with its folder as the current one, so that no path in what it writes differs.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import yaml
from conftest import TINY_RECIPE
from forks import Ended, forked

import memsinks as ms
from memsinks import files
from memsinks.cli import _failed, main
from memsinks.errors import MemsinksError
from memsinks.removal import verify

KEY = "record-8-001"
"""Who is taken out."""
OWNERS = {
    "data": TINY_RECIPE["data"] | {"by": "key"},
    "sinks": {"neurons": 256, "active": 16, "block_size": 8, "reserved_blocks": 16},
    "own": {"from_copies": 8},
    "training": TINY_RECIPE["training"] | {"sinks_last": 3},
}
SETTLED = {"sinks": TINY_RECIPE["sinks"] | {"shared": "decay"}, "settle": {"passes": 2}}


@dataclass(frozen=True)
class Command:
    """A command that writes.

    Args:
        name: for the counts.
        needs: what it starts from, of the folder that `make_base` made.
        argv: what is asked for. again: the same, after it was killed, in its folder.
        writes: the paths that it makes or changes; all others are its sources.
        phase: how far it has come, from its folder.
    """

    name: str
    needs: tuple[str, ...]
    argv: tuple[str, ...]
    writes: str
    phase: Callable[[Path], str]
    again: Callable[[Path], tuple[str, ...]] | None = None

    def start(self, base: Path, folder: Path) -> None:
        """A folder with all that the command needs, and nothing else."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in self.needs:
            (shutil.copytree if (base / name).is_dir() else shutil.copy)(base / name, folder / name)

    def asked_again(self, folder: Path) -> tuple[str, ...]:
        return self.argv if self.again is None else self.again(folder)


def run(
    folder: Path,
    asked: tuple[str, ...] | Callable[[], Any],
    *,
    fresh: bool = False,
    before: Callable[[], None] | None = None,
    **kill: Any,
) -> Ended:
    """Run a command, or a function as one, in a folder.

    Args:
        fresh: an export is checked in a fresh process, else in a fork, without its imports.
        before: is called first, in the fork. kill: see `forked`.
    """

    def command() -> int:
        os.chdir(folder)
        if before is not None:
            before()
        files.JUST_MADE = -1.0  # what a killed write left is removed at once, not after a minute
        if not fresh:
            verify.subprocess = SimpleNamespace(run=_in_a_fork)  # type: ignore[assignment]
        if not callable(asked):
            return main([*asked, "-q"])
        try:
            asked()
        except MemsinksError as error:
            return _failed(str(error))
        return 0

    return forked(command, below=folder, **kill)


def _in_a_fork(arguments: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
    """Run ``python -c PROGRAM ...`` in a fork of this process."""

    def program() -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.argv = ["-c", *arguments[3:]]
        exec(arguments[2], {"__name__": "__main__"})

    done = forked(program)
    return subprocess.CompletedProcess(arguments, done.code if done.code is not None else -9, "", done.said)


def make_base(folder: Path, seed: int = 0) -> Path:
    """What the commands start from: recipes, documents, a tokenizer, a finished run with owners."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, sections in (("owners", OWNERS), ("settled", SETTLED)):
        recipe = copy.deepcopy(TINY_RECIPE | sections | {"output": "run"})
        recipe["data"]["synthetic"]["seed"] = recipe["training"]["seed"] = seed
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    done = run(folder, ("train", "owners.yaml"))
    assert done.code == 0, done.said
    shutil.copy(folder / "run/members.jsonl", folder / "documents.jsonl")
    (folder / "tokenizer").mkdir()
    for path in (folder / "run/model").glob("tokenizer*"):
        shutil.copy(path, folder / "tokenizer")
    return folder


# How far a command has come


def _prepared(folder: Path) -> str:
    corpus = folder / "corpus"
    if (corpus / "manifest.json").is_file():
        return "finished"
    if (corpus / "shards").is_dir():
        return "shards"
    return "near copies" if (corpus / ".work/shingles").is_dir() else "begun"


def _trained(folder: Path) -> str:
    if not (folder / "run/recipe.yaml").is_file():
        return "begun"
    facts = folder / "run/run.json"
    if facts.is_file() and "seconds" in json.loads(facts.read_text()):
        return "finished"
    if (folder / "run/model").is_dir():
        return "saving the model"
    last = max([int(x.name.split("-")[1]) for x in folder.glob("run/checkpoints/checkpoint-*")], default=0)
    return "after the last step" if last == 12 else "training"


def _taken_down(folder: Path) -> str:
    if (folder / "run/.takedown.bound/plan.json").is_file():
        return "bound"
    if any(folder.glob("run/takedowns/*")):
        return "finished"
    return "staged" if (folder / "run/.takedown.begun").is_dir() else "begun"


def _exported(folder: Path) -> str:
    if (folder / "clean").is_dir():
        return "finished"
    return "writing and checking" if list(folder.glob(".clean.part-*")) else "begun"


def _resumed(recipe: str) -> Callable[[Path], tuple[str, ...]]:
    return lambda folder: ("train", recipe, *(["--resume"] if (folder / "run/recipe.yaml").is_file() else []))


COMMANDS = {
    command.name: command
    for command in (
        Command(
            "prepare",
            ("documents.jsonl", "tokenizer"),
            ("prepare", "documents.jsonl", "--tokenizer", "tokenizer", "--near-copies", "--workers", "1", "--out", "corpus",
             "--shard-characters", "3000", "--key-field", "key", "--copies-field", "copies"),
            "corpus",
            _prepared,
        ),
        Command("train", ("owners.yaml",), ("train", "owners.yaml"), "run", _trained, _resumed("owners.yaml")),
        Command("settle and save", ("settled.yaml",), ("train", "settled.yaml"), "run", _trained, _resumed("settled.yaml")),
        Command("takedown", ("run",), ("takedown", "run", "--key", KEY), "run", _taken_down),
        Command("export", ("run",), ("export", "run/model", "clean"), "clean", _exported),
    )
}  # fmt: skip


# What must be the same


def outcome(folder: Path) -> dict[str, str]:
    """Hashes of all files below a folder, but for what differs between two runs: times, the salt and the date of a record."""
    return {x.relative_to(folder).as_posix(): _hash(x) for x in sorted(folder.rglob("*")) if x.is_file() and _lasts(x)}


def _lasts(path: Path) -> bool:
    return "takedowns" not in path.parts


def _hash(path: Path) -> str:
    content = path.read_bytes()
    if path.name in ("run.json", "metrics.jsonl"):
        content = re.sub(rb'"(seconds|tokens_per_second)": [0-9.]+', b"", content)
    return hashlib.sha256(content).hexdigest()


def leftovers(folder: Path) -> list[str]:
    """What a command should have removed: files and folders that were written beside their place."""
    return sorted(
        x.relative_to(folder).as_posix() for x in folder.rglob(".*")
        if any(mark in x.name for mark in (".part-", ".old-", ".takedown.", ".work"))
    )  # fmt: skip


def record_holds(folder: Path) -> bool:
    """Whether each record of a take-down agrees with its run."""
    checks = [ms.verify_record(x, run=folder / "run") for x in folder.glob("run/takedowns/*")]
    return all(check.ok is not False for found in checks for check in found)


torch.set_num_threads(1)
