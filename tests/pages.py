"""The pages that readers see, taken apart: code blocks, links, headings."""

from __future__ import annotations

import importlib
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/README.md"),
     *ROOT.glob("experiments/*/README.md"), ROOT / "experiments/LOG.md"]
)  # fmt: skip
GENERATED = ROOT / "docs/api.md"


def name_of(page: Path) -> str:
    """The page as tests are named after it."""
    return page.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    """A fenced block of code; `snippet` is the name in the comment above it, "" without one."""

    page: str
    line: int
    language: str
    snippet: str
    code: str


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page."""
    found = []
    pattern = r"(?:^ *<!-- snippet: ([\w -]+) -->\n)?^( *)```(\w*)\n(.*?)^ *```$"
    text = page.read_text()
    for match in re.finditer(pattern, text, re.M | re.S):
        snippet, indent, language, code = match.groups()
        line = text[: match.start()].count("\n") + 1
        code = re.sub(f"^{indent}", "", code, flags=re.M)
        found.append(Block(name_of(page), line, language, snippet or "", code))
    return found


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(), flags=re.M | re.S)


def commands(code: str) -> Iterator[list[str]]:
    """The commands of a block of shell code, as words: comments, assignments before them and what is piped out left out."""
    values: dict[str, str] = {}
    for line in code.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        while words and re.match(r"\w+=", words[0]):
            name, _, value = words.pop(0).partition("=")
            values[f"${name}"] = value
        words = [y for x in words for y in (shlex.split(values[x]) if x in values else [x])]
        if words:
            yield words[: words.index(">")] if ">" in words else words


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", x).lower()).replace(" ", "-") for x in headings}


def script(name: str) -> ModuleType:
    """A script of docs/, imported."""
    folder = str(ROOT / "docs")
    if folder not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)
