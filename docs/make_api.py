"""api.md beside this file, from the public names and their docstrings; a test checks that it is up to date.

python docs/make_api.py
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import memsinks

ROOMS = ("errors", "batch", "data", "sinks", "training", "removal", "auditing", "runs")
"""The rooms with public names, in the order of the journey; `_version` is named at the top of the page."""
HEAD = """\
# API

Every public name, room by room, as `import memsinks as ms` gives it. Made by `python docs/make_api.py` from the docstrings: do
not edit. Shapes are in brackets, losses in nats per token. What is wrong raises one of the [errors](#errors), which says what was
given and what to do, all problems at once.
"""
SECTION = re.compile(r"^(Args|Warns|Attributes[^:\n]*|Returns|Raises|Yields):$", re.M)
WIDE = 110
"""Characters of a signature on one line, at most."""


def signature(name: str, target: Callable[..., Any]) -> str:
    """A signature as it is written in the source, one parameter a line where it is long."""
    found = inspect.signature(target)
    parts: list[str] = []
    kind = None
    for parameter in found.parameters.values():
        if parameter.name in ("self", "cls"):
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and kind not in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL):
            parts.append("*")
        kind = parameter.kind
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(kind, "")
        parts.append(stars + parameter.name + _annotation(": ", parameter.annotation) + _default(parameter))
    result = _annotation(" -> ", found.return_annotation)
    line = f"{name}({', '.join(parts)}){result}"
    return line if len(line) <= WIDE else f"{name}(\n" + "".join(f"    {part},\n" for part in parts) + f"){result}"


def _annotation(before: str, annotation: Any) -> str:
    if annotation is inspect.Signature.empty or annotation is None:
        return ""
    return before + str(getattr(annotation, "__forward_arg__", annotation))


def _default(parameter: inspect.Parameter) -> str:
    if parameter.default is parameter.empty:
        return ""
    text = repr(parameter.default)
    return " = ..." if text.startswith("<") else f" = {text}"


def call(name: str, target: Callable[..., Any]) -> str:
    """How a public name is called; of a class that leaves its arguments to one of another library, that it does."""
    if isinstance(target, type) and not {"__init__", "__new__"} & vars(target).keys():
        base = target.__mro__[1]
        return f"{name}(...)  # takes what {base.__name__} of {base.__module__.split('.')[0]} takes"
    return signature(name, target)


def prose(docstring: str | None) -> str:
    """A docstring as Markdown: its sections as lists, its code as code."""
    text = inspect.cleandoc(docstring or "").replace("``", "`")
    parts = SECTION.split(text)
    blocks = [parts[0].strip()]
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        lines, _, rest = body.strip("\n").partition("\n\n")
        items = [entry(x) for x in _entries(lines)] if title not in ("Returns", "Yields") else [f"- {_joined(lines)}"]
        blocks.append(f"**{title}**\n\n" + "\n".join(items))
        blocks.append(inspect.cleandoc(rest).strip())
    return "\n\n".join(block for block in blocks if block)


def _entries(body: str) -> list[str]:
    """The entries of a section: each begins at the least indentation."""
    lines = body.split("\n")
    least = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    entries: list[str] = []
    for line in lines:
        if len(line) - len(line.lstrip()) == least or not entries:
            entries.append(line.strip())
        else:
            entries[-1] += " " + line.strip()
    return entries


def entry(text: str) -> str:
    """One argument or error as a list item."""
    name, colon, rest = text.partition(": ")
    names = [x.strip(" *") for x in name.split(",")]
    return f"- `{'`, `'.join(names)}`: {rest}" if colon and all(x.isidentifier() for x in names) else f"- {text}"


def _joined(body: str) -> str:
    return " ".join(line.strip() for line in body.split("\n"))


def fenced(code: str) -> str:
    """A block of Python."""
    return f"```python\n{code}\n```"


def constant_text(home: str, name: str) -> str:
    """What stands below the assignment of a constant."""
    body = ast.parse(inspect.getsource(import_module(home))).body
    for node, after in pairwise(body):
        targets = node.targets if isinstance(node, ast.Assign) else []
        if any(isinstance(x, ast.Name) and x.id == name for x in targets) and isinstance(after, ast.Expr):
            return prose(ast.literal_eval(after.value))
    return ""


def members(kind: type) -> Iterator[str]:
    """The public methods and properties that a class itself defines, each with its docstring."""
    for name, value in vars(kind).items():
        target = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if name.startswith("_") or not target.__doc__:
            continue
        title = f"#### {kind.__name__}.{name}\n\n"
        if inspect.isfunction(target):
            yield f"{title}{fenced(signature(name, target))}\n\n{prose(target.__doc__)}\n"
        elif isinstance(target, property | functools.cached_property):
            yield f"{title}{prose(target.__doc__)}\n"


def describe(name: str, home: str) -> str:
    """The section of one public name."""
    value = getattr(memsinks, name)
    title = f"### {name}\n\n"
    if not callable(value):
        return f"{title}`{value!r}`: {constant_text(home, name)}\n"
    if value.__name__ != name:
        return f"{title}The name that [{value.__name__}](#{value.__name__.lower()}) had before.\n"
    if isinstance(value, type) and issubclass(value, Exception):
        return f"{title}{prose(value.__doc__)}\n"
    inside = "\n".join(members(value)) if isinstance(value, type) else ""
    return "\n".join(x for x in (f"{title}{fenced(call(name, value))}\n\n{prose(value.__doc__)}\n", inside) if x)


def page() -> str:
    """The text of api.md."""
    homes = {name: memsinks._HOME[name] for name in memsinks.__all__ if name in memsinks._HOME}
    sections = [HEAD]
    for room in ROOMS:
        names = [name for name, home in homes.items() if home.split(".")[1] == room]
        if names:
            summary = inspect.getdoc(import_module(f"memsinks.{room}")) or ""
            sections.append(f"## {room.title()}\n\n{summary}\n")
            sections += [describe(name, homes[name]) for name in names]
    return "\n".join(sections)


def main() -> None:
    (Path(__file__).parent / "api.md").write_text(page())


if __name__ == "__main__":
    main()
