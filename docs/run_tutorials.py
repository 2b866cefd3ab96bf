"""The notebooks of docs/tutorials, executed, with their outputs and nothing of the machine that made them.

python docs/run_tutorials.py [NAME ...]     # a quarter of an hour on two cores

MEMSINKS_TUTORIAL_MODEL: a folder with SmolLM2-135M-Instruct; without it the model comes from the Hugging Face hub.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
import papermill

FOLDER = Path(__file__).parent / "tutorials"
TEXTS = ("*.jsonl",)
"""What the notebooks read."""


def run(notebook: Path, parameters: Mapping[str, Any], folder: Path) -> nbformat.NotebookNode:
    """Execute a notebook in an empty folder with `parameters` in place of its own.

    Raises:
        papermill.PapermillExecutionError: a cell failed.
    """
    for pattern in TEXTS:
        for path in FOLDER.glob(pattern):
            shutil.copy(path, folder)
    environment = {"PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    os.environ |= environment
    return papermill.execute_notebook(
        str(notebook), None, parameters=dict(parameters), cwd=str(folder), progress_bar=False, kernel_name="python3"
    )


def cleaned(executed: nbformat.NotebookNode, source: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The notebook as it was, with the outputs of its run: no logs, no times, no metadata of the run."""
    outputs = {cell.id: cell.outputs for cell in executed.cells if cell.cell_type == "code"}
    for number, cell in enumerate((x for x in source.cells if x.cell_type == "code"), 1):
        cell.execution_count = number
        cell.outputs = []
        for output in outputs[cell.id]:
            before = cell.outputs[-1] if cell.outputs else None
            if output.output_type == "stream":
                if output.name == "stdout" and before is not None and before.output_type == "stream":
                    before.text += output.text
                elif output.name == "stdout":
                    cell.outputs.append(nbformat.v4.new_output("stream", name="stdout", text=output.text))
            else:
                count = {"execution_count": number} if output.output_type == "execute_result" else {}
                cell.outputs.append(nbformat.v4.new_output(output.output_type, output.data, **count))
    return source


def main(names: list[str]) -> None:
    for notebook in sorted(FOLDER.glob("*.ipynb")):
        if names and notebook.stem not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            executed = run(notebook, {}, Path(folder))
        nbformat.write(cleaned(executed, nbformat.read(notebook, 4)), notebook)
        print(notebook.stem)


if __name__ == "__main__":
    main(sys.argv[1:])
