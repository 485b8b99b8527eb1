"""The notebooks of the examples: they are run, compared with what is stored, and stored anew.

    python -m tests.notebooks quickstart kd_lora     # runs notebooks (all without a name), and stores their outputs

A cell with the tag `varies` shows times, or texts that depend on the machine; its outputs are not compared.
"""

import os
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
import pytest
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
WIDGET = "application/vnd.jupyter.widget-view+json"  # a progress bar, which is nothing without its kernel
# One thread, so that numbers are the same; no message of DeepSpeed, which the tests have installed.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}


def read(name: str) -> NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def executed(name: str) -> NotebookNode:
    """A notebook with the outputs of a run in an empty folder; an error of a cell is raised."""
    notebook = read(name)
    with TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        client = NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources, record_timing=False)
        client.execute(env={**os.environ, **ENVIRONMENT})
    for cell in code_cells(notebook):
        cell.outputs = [output for output in cell.outputs if WIDGET not in output.get("data", {})]
    python = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    notebook.metadata = nbformat.from_dict({**python, "language_info": {"name": "python"}})
    return notebook


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text_of(cell: NotebookNode) -> str:
    """The outputs of a cell as text, without pictures, progress bars and warnings."""
    shown = []
    for output in cell.outputs:
        data = output.get("data", {})
        if output.output_type == "stream":
            shown.append(output.text if output.name == "stdout" else "")
        elif "text/markdown" in data:
            shown.append(data["text/markdown"])
        elif not data.get("text/plain", "<").startswith("<"):
            shown.append(data["text/plain"])
    return "".join(shown)


def differences(stored: NotebookNode, found: NotebookNode) -> list[str]:
    """The cells whose texts have other words, or numbers that differ by more than 5 % and 0.02."""
    number = r"(\d[\d,]*\.?\d*(?:e-?\d+)?)"
    differing = []
    for before, after in zip(code_cells(stored), code_cells(found), strict=True):
        if "varies" in before.metadata.get("tags", []):
            continue
        pieces = [re.split(number, text_of(cell)) for cell in (before, after)]
        words = [[piece.split() for piece in parts[::2]] for parts in pieces]
        numbers = [[float(piece.replace(",", "")) for piece in parts[1::2]] for parts in pieces]
        if words[0] != words[1] or numbers[1] != pytest.approx(numbers[0], rel=0.05, abs=0.02):
            differing.append(f"{before.source}\n\nstored:\n{text_of(before)}\nfound:\n{text_of(after)}")
    return differing


if __name__ == "__main__":
    for name in sys.argv[1:] or NAMES:
        nbformat.write(executed(name), FOLDER / f"{name}.ipynb")
