"""Files that are cut, empty, garbage, missing, or of another run: each command that reads them says so in one error of ours.

Which files there are is not listed: a scene is a folder as commands have left it, and each file there that its command reads is
damaged in turn. What is harmless gives the outcome of undamaged files. Input may be exchanged for other whole input (a `free`
file): then its outcome is that of the other input.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from conftest import TINY_RECIPE
from forks import Ended

import memsinks as ms
from faults.commands import COMMANDS, KEY, leftovers, make_base, outcome, run
from memsinks.viewer.view import open_view

DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "cut": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "garbage": lambda content: b"\x80\x02\xff{[" + bytes(range(256)),
}
TOLD = 600
"""Characters of what a command said that a fault quotes."""
OTHER, MISSING = "of another", "missing"
KINDS = ("refused", "same outcome", "other input", "said")
Step = tuple[str, ...] | Callable[[], Any]


@dataclass(frozen=True)
class Scene:
    """A command and the folder that it reads.

    Args:
        steps: what is run in a copy of a base before; the last one is the command that reads.
        files: globs of what it reads, which is damaged. free: of input, for which there may be other input.
        says: globs of what the outcome may lack, because the command says so.
        kill_once: the step before the last one is killed when this is there.
    """

    name: str
    steps: tuple[Step, ...]
    files: tuple[str, ...]
    free: tuple[str, ...] = ()
    says: tuple[str, ...] = ()
    kill_once: str | None = None

    def make(self, base: Path, folder: Path) -> Path:
        shutil.copytree(base, folder)
        for number, step in enumerate(self.steps[:-1], start=2):
            kill = {"kill_once": folder / self.kill_once} if number == len(self.steps) and self.kill_once else {}
            done = run(folder, step, **kill)
            assert done.killed if kill else done.code == 0, f"{self.name}, {step}: {done.said}"
        return folder

    def files_of(self, folder: Path) -> list[str]:
        found = {x for pattern in self.files for x in folder.glob(pattern) if x.is_file()}
        return sorted(x.relative_to(folder).as_posix() for x in found)


@dataclass
class Damage:
    """Counts of what came of it, by damage, and what should not have."""

    scene: str
    files: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def by_kind(self) -> dict[str, int]:
        """How often each of `KINDS` came of it."""
        return {kind: sum(n for x, n in self.counts.items() if x.endswith(f": {kind}")) for kind in KINDS}


def _recipe(name: str, **sections: Any) -> Callable[[], None]:
    values = {name: x for name, x in (TINY_RECIPE | {"output": "run2"} | sections).items() if x is not None}
    return lambda: Path(name).write_text(yaml.safe_dump(values)) and None


_ON_CORPUS = _recipe("corpus.yaml", data={"path": "corpus"}, tokenizer=None)
_BACKGROUND = _recipe(
    "background.yaml",
    data={"path": "documents.jsonl", "copies_field": "copies", "held_out": 4, "one_document_per_row": False, "long": "fill",
          "background": {"path": "documents.jsonl", "tokens": 20_000}},
)  # fmt: skip
_PRETRAINED = _recipe(
    "pretrained.yaml", model={"pretrained": "clean"}, tokenizer={"path": "clean"}, sinks={"neurons": 64, "active": 16,
                                                                                      "block_size": 8}
)  # fmt: skip
_AUDIT = ("audit", "run/model", "--documents", "run/members.jsonl", "--controls", "run/controls.jsonl", "--state", "closed",
          "--out", "report", "--copies-field", "copies")  # fmt: skip
_ID = ms.document_id(KEY, "key")


def _view() -> None:
    view = open_view("run")
    Path("seen.txt").write_text(f"{len(view.documents)} {sorted(view.owners)} {sorted(view.taken)} {view.notes}")


def _save_owners() -> None:
    ms.save_sinks(ms.load("run/model"), "alice", owners=[_ID])


def _load_owners() -> None:
    model = ms.load_any("clean")
    ms.load_sinks(model, "alice")
    Path("seen.txt").write_text(f"{ms.fingerprint(model)} {ms.shared_hash(model)}")


def _assign_alone() -> None:
    ms.save_sinks(ms.load("run/model"), "alone")


def _load_alone() -> None:
    model = ms.load("run/model")
    ms.load_sinks(model, "alone")
    Path("seen.txt").write_text(ms.fingerprint(model))


PREPARE, EXPORT, TAKEDOWN = (COMMANDS[name].argv for name in ("prepare", "export", "takedown"))
RECORD = "run/takedowns/key-198c7003f937"
_SHARDS = ("corpus/shards/00000/*", "corpus/shards/00001/*")
SCENES = {
    scene.name: scene
    for scene in (
        Scene("prepare", (PREPARE,), ("documents.jsonl", "tokenizer/*"), ("documents.jsonl", "tokenizer/*")),
        Scene("prepare, near copies in part", (PREPARE, PREPARE), ("corpus/.work/**/*", "corpus/tokenizer/*"),
              kill_once="corpus/.work/shingles/00001"),
        Scene("prepare, shards in part", (PREPARE, PREPARE), ("corpus/.work/*", *_SHARDS, "corpus/tokenizer/*"),
              kill_once="corpus/shards/00002"),
        Scene("prepare, finished", (PREPARE, PREPARE), ("corpus/*", *_SHARDS, "corpus/tokenizer/*")),
        Scene("train on a corpus", (PREPARE, _ON_CORPUS, ("train", "corpus.yaml")),
              ("corpus.yaml", "corpus/*", *_SHARDS, "corpus/tokenizer/*"), ("corpus.yaml",)),
        Scene("train with a background, again",
              (_BACKGROUND, ("train", "background.yaml"), ("train", "background.yaml", "--resume")),
              ("run2/data/**/*", "background.yaml"), ("background.yaml",), kill_once="run2/checkpoints/checkpoint-4"),
        Scene("train a pretrained model", (EXPORT, _PRETRAINED, ("train", "pretrained.yaml")), ("clean/*",), ("clean/*",)),
        Scene("train, resumed", (lambda: shutil.rmtree("run"), ("train", "owners.yaml"), ("train", "owners.yaml", "--resume")),
              ("owners.yaml", "run/**/*"), ("owners.yaml", "run/metrics.jsonl"), ("run/metrics.jsonl",),
              kill_once="run/checkpoints/checkpoint-6"),
        Scene("takedown", (TAKEDOWN,), ("run/*", "run/model/**/*", "run/checkpoints/checkpoint-8/*",
              "run/checkpoints/checkpoint-2/*")),
        Scene("takedown, bound", (TAKEDOWN, TAKEDOWN), ("run/.takedown.bound/**/*",), kill_once="run/.takedown.bound"),
        Scene("verify", (TAKEDOWN, ("verify", RECORD, "--run", "run")), (f"{RECORD}/*", "run/model/*", "run/members.jsonl")),
        Scene("export", (EXPORT,), ("run/model/**/*",), ("run/model/tokenizer*", "run/model/generation_config.json")),
        Scene("info", (("info", "run/model"),), ("run/model/**/*",)),
        Scene("audit", (_AUDIT,), ("run/members.jsonl", "run/controls.jsonl", "run/model/**/*"),
              ("run/*.jsonl", "run/model/tokenizer*")),
        Scene("view", (TAKEDOWN, _view), ("run/*", "run/model/**/*"), ("run/controls.jsonl",),
              ("run/model/tokenizer*", "run/controls.jsonl", "run/model/sinks/sinks.json")),
        Scene("sinks of owners", (EXPORT, _save_owners, _load_owners),
              ("alice/**/*", "clean/*.safetensors", "clean/config.json")),
        Scene("sinks alone", (_assign_alone, _load_alone), ("alone/**/*",)),
    )
}  # fmt: skip


def make_bases(folder: Path) -> tuple[Path, Path]:
    """Two folders as of `make_base`, of different seeds."""
    return make_base(folder / "base"), make_base(folder / "other", seed=1)


def damage_each(scene: Scene, bases: tuple[Path, Path], scratch: Path, only: Iterable[str] | None = None) -> Damage:
    """Damage each file of a scene in each way, in a copy of its folder, and run its command.

    Args:
        only: damages; None = all.
    """
    shutil.rmtree(scratch, ignore_errors=True)
    folder, other = (scene.make(base, scratch / name) for base, name in zip(bases, ("whole", "other"), strict=True))
    done = run(Path(shutil.copytree(folder, scratch / "done")), scene.steps[-1])
    assert done.code == 0, f"{scene.name}: {done.said}"
    wanted, found = outcome(scratch / "done"), Damage(scene.name)
    names = scene.files_of(folder)
    found.files = len(names)
    assert names, scene.name
    for name in names:
        for damage in (*DAMAGES, OTHER, MISSING) if only is None else only:
            place = Path(shutil.copytree(folder, scratch / "place"))
            if _damaged(place / name, other / name, damage):
                before = outcome(place)
                kind = _judged(scene, name, damage, place, run(place, scene.steps[-1], timeout=60), before, wanted)
                if kind.startswith("FAULT"):
                    found.faults.append(f"{scene.name}, {name} {damage}: {kind}")
                found.counts[f"{damage}: {kind.partition(':')[0]}"] += 1
            shutil.rmtree(place)
    return found


def _damaged(path: Path, other: Path, damage: str) -> bool:
    """Damage a file; whether it is another now."""
    content = path.read_bytes()
    path.unlink()
    if damage == MISSING:
        return True
    if damage == OTHER and not other.is_file():
        return False
    new = other.read_bytes() if damage == OTHER else DAMAGES[damage](content)
    path.write_bytes(new)
    return new != content


def _judged(
    scene: Scene, name: str, damage: str, place: Path, done: Ended, before: dict[str, str], wanted: dict[str, str]
) -> str:
    """ "refused", "same outcome", "other input", or what is wrong."""
    now = outcome(place)
    if done.code == 2:
        lines = [x for x in done.said.splitlines() if x.startswith("memsinks: ")]
        if "Traceback" in done.said or len(lines) != 1:
            return f"FAULT: not one error in a line: {done.said[-TOLD:]}"
        hurt = [x for x, digest in before.items() if now.get(x) != digest and "/." not in x]
        return f"FAULT: refused, but {', '.join(hurt)} changed" if hurt else "refused"
    if done.code != 0:
        return f"FAULT: ended with {done.code}: {done.said[-TOLD:]}"
    apart = [x for x in now.keys() | wanted.keys() if now.get(x) != wanted.get(x)]
    apart = [x for x in apart if x != name or now.get(x) != before.get(x)]  # what was not read stays as it is
    if not apart:
        return f"FAULT: {', '.join(leftovers(place))} are left" if leftovers(place) else "same outcome"
    if damage in (OTHER, MISSING) and any(Path(name).match(x) for x in scene.free):
        return "other input"
    if any(Path(name).match(x) for x in scene.says):
        return "said"
    return f"FAULT: ended well, but {', '.join(sorted(apart)[:5])} differ"
