"""Executed notebooks: cells are those of the notebooks, outputs those of one run."""

import importlib.util
import json
import re

import nbformat
import pytest

from mig_kit.common import NOTEBOOKS, PROJECT_ROOT
from mig_kit.pipeline.run_folders import RECIPE

FOLDER = NOTEBOOKS / "executed"
FACTS = json.loads((FOLDER / "run.json").read_text())
MACHINE_PATH = re.compile(r"(?<![\w./~-])/(?:home|root|tmp|work|Users|mnt|opt)/")


def load_tool():
    spec = importlib.util.spec_from_file_location("executed", PROJECT_ROOT / ".ci" / "executed.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    return tool


def cells_of(path):
    return [(cell.cell_type, cell.source) for cell in nbformat.read(path, 4).cells
            if "injected-parameters" not in cell.metadata.get("tags", ())]


def test_they_are_all_of_one_run():
    assert list(FACTS) == [*RECIPE, load_tool().BY_HAND]
    assert len({record["run_id"] for record in FACTS.values()}) == 1


@pytest.mark.parametrize("stage", FACTS)
def test_an_executed_notebook_is_what_a_run_left(stage):
    """Made again by make executed; a patched output or another cell fails."""
    path = FOLDER / f"{stage}.ipynb"
    assert cells_of(path) == cells_of(NOTEBOOKS / path.name), "make executed-texts"
    notebook = nbformat.read(path, 4)
    assert load_tool().outputs_digest(notebook) == FACTS[stage]["outputs"]
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            assert output.output_type != "error"
            if output.get("data", {}).get("image/png"):
                output.data["image/png"] = ""
    assert not MACHINE_PATH.search(nbformat.writes(notebook))
