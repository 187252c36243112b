"""What the notebooks tell their reader to try."""

import json
import re

import nbformat
from nbformat.v4 import new_code_cell

from mig_kit.common import NOTEBOOKS

BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def read_blocks(stage: str, language: str) -> list[str]:
    """The blocks in a language below a notebook's heading "Try this"."""
    cells = json.loads((NOTEBOOKS / f"{stage}.ipynb").read_text())["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    return [block for text in texts if text.startswith("## Try this")
            for found_language, block in BLOCK.findall(text) if found_language == language]


def write_with_blocks(folder, *stages: str) -> None:
    """Copies of notebooks that end with their blocks of Python to try."""
    for stage in stages:
        notebook = nbformat.read(NOTEBOOKS / f"{stage}.ipynb", 4)
        notebook.cells += map(new_code_cell, read_blocks(stage, "python"))
        nbformat.write(notebook, folder / f"{stage}.ipynb")
