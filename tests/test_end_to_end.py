"""experiments/end-to-end: what it says, and the whole journey at its smallest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT

HERE = ROOT / "experiments/end-to-end"


def test_without_data_it_says_what_it_needs() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "MEMSINKS_DATA"}
    ended = subprocess.run(
        [sys.executable, str(HERE / "run.py"), "--tiny"], env=environment, capture_output=True, text=True, timeout=120
    )
    assert ended.returncode == 1 and "set MEMSINKS_DATA to the folder" in ended.stderr


def test_the_page_has_the_figures_of_the_results() -> None:
    ended = subprocess.run([sys.executable, str(HERE / "table.py")], check=True, capture_output=True, text=True)
    page = (ROOT / "docs/scale.md").read_text()
    assert [line for line in ended.stdout.splitlines() if line not in page] == []


@pytest.mark.long
@pytest.mark.skipif(not os.environ.get("MEMSINKS_DATA"), reason="needs MEMSINKS_DATA")
def test_everything_is_killed_on_the_way_and_ends_the_same(tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / "run.py"), "--tiny", "--work", str(tmp_path)]
    subprocess.run(command, check=True, timeout=1200, env=os.environ | {"OMP_NUM_THREADS": "1"})
    found = json.loads((tmp_path / "results.json").read_text())["tiny"]
    assert found["prepared, killed"]["same_bytes"] and found["prepared, killed"]["kills"] == 2
    assert found["trained, killed"]["kills"] == len(found["trained, killed"]["went_on"]) >= 1
    assert found["compared"]["same_weights"] and found["compared"]["same_losses"]
    audit = found["audited"]["found"]
    assert audit["gap"]["exported"] == audit["gap"]["closed"]
    assert audit["gap"]["open"]["value"] > audit["gap"]["closed"]["high"]
