"""The rooms look only up: each module imports only its own room and those before it, at the top of the file."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import memsinks

SOURCE = Path(memsinks.__file__).parent
ORDER = ("_version", "errors", "checks", "provenance", "files", "batch", "data", "sinks", "training", "removal", "auditing",
         "runs", "viewer", "research", "cli")  # fmt: skip
LAZY = {"__init__", "cli"}
"""Rooms that import inside functions: what is not asked for is not loaded."""


def imported(node: ast.AST) -> list[str]:
    names = [node.module] if isinstance(node, ast.ImportFrom) else [x.name for x in node.names]
    return [name.split(".")[1] for name in names if name.startswith("memsinks.")]


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: path.relative_to(SOURCE).as_posix())
def test_a_module_imports_only_its_own_room_and_those_before(path: Path) -> None:
    room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert not getattr(node, "level", 0), f"line {node.lineno} imports relatively"
            if room == "__init__":
                continue
            for name in imported(node):
                assert ORDER.index(name) <= ORDER.index(room), f"line {node.lineno} imports {name} from {room}"
                assert room in LAZY or node in tree.body, f"line {node.lineno} imports memsinks inside a function"


def test_every_room_has_a_place() -> None:
    rooms = {
        path.name.removesuffix(".py")
        for path in SOURCE.iterdir()
        if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    assert rooms - {"__init__"} <= set(ORDER)


def test_there_is_no_circle() -> None:
    graph = {}
    for path in SOURCE.rglob("*.py"):
        if path.name != "__init__.py":
            nodes = [x for x in ast.walk(ast.parse(path.read_text())) if isinstance(x, ast.ImportFrom)]
            name = ".".join(("memsinks", *path.relative_to(SOURCE).with_suffix("").parts))
            graph[name] = {x.module for x in nodes if x.module and x.module.startswith("memsinks.")}
    while graph:
        floor = {name for name, wanted in graph.items() if not wanted & graph.keys()}
        assert floor, f"modules that import each other in a circle are among {sorted(graph)}"
        graph = {name: wanted for name, wanted in graph.items() if name not in floor}
