"""The README: short, its tree is the tree, its examples run; what holds for every page is in test_docs.py."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT

import memsinks as ms
from memsinks.research.compare.comparison import read_comparison

README = (ROOT / "README.md").read_text()
SHARED = {"_version", "errors", "checks", "provenance", "files", "batch"}
"""What all rooms share; the tree has only rooms."""


def test_the_tree_names_every_room() -> None:
    source = ROOT / "src/memsinks"
    rooms = {path.name.removesuffix(".py") for path in source.iterdir()
             if path.suffix == ".py" or (path / "__init__.py").exists()} - {"__init__"} - SHARED  # fmt: skip
    tree = README.split("## The tree")[1].split("\n## ")[0]
    assert set(re.findall(r"^  (\w+)/?  ", tree, re.M)) == rooms


def test_the_tree_has_the_order_in_which_rooms_import_each_other() -> None:
    tree = README.split("## The tree")[1].split("\n## ")[0]
    map_of_rooms = re.findall(r"^(\w+) {2,}", ms.__doc__ or "", re.M)
    listed = re.findall(r"^  (\w+)/?  ", tree, re.M)
    assert listed == [room for room in map_of_rooms if room in listed]


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 190


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.yaml")), ids=lambda path: path.name)
def test_recipes_are_read(path: Path) -> None:
    compared = path.name.startswith(("compare-", "regimes")) or path.parent.name == "paper"
    read = read_comparison if compared else ms.read_recipe
    read(path)


def test_the_results_that_the_readme_shows_are_those_of_the_page() -> None:
    """Figures stand in two places; they may not part."""
    page = (ROOT / "docs/results.md").read_text()
    for figures in re.findall(r"[\d.]+ ± [\d.]+%|[+-]\d\.\d{3} ± \d\.\d{3}", README):
        number, spread = figures.rstrip("%").split(" ± ")
        percent = "%" if figures.endswith("%") else ""
        known = (f"{number}{percent} ± {spread}{percent}", f"{number} ± {spread}{percent}")
        assert any(x in page for x in known), figures


@pytest.mark.long
@pytest.mark.parametrize("script", ["torch_loop.py", "hf_trainer.py", "trl_sft.py"])
def test_examples_run(script: str, tmp_path: Path) -> None:
    if script.startswith("trl"):
        pytest.importorskip("trl")
    command = [sys.executable, str(ROOT / "examples" / script), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "exported to" in done.stdout
