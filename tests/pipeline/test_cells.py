"""What a kernel ran is what the record of its stage says."""

import nbformat
import papermill
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from mig_kit.pipeline import status
from mig_kit.pipeline.execute import ThisPython
from mig_kit.pipeline.runs import Run

BEGIN = "stage, p = store.begin_stage('00_preflight', globals())"
CELLS = ["# parameters\nmemory_gib: float = 8.0", "from mig_kit.pipeline import store", BEGIN,
         "%matplotlib inline\nchosen = [1, 2, 3, 4]", "kept = chosen  # all",
         "stage.finish({'kept': len(kept)})"]
USE = ("from mig_kit.pipeline import cells, stage_keys; from pathlib import Path; "
       "cells.NOTEBOOKS = stage_keys.NOTEBOOKS = Path({!r})")


def changed(**by_number):
    """CELLS with some of them changed, run again (a list) or left out (None)."""
    cells = [by_number.get(f"cell_{number}", cell) for number, cell in enumerate(CELLS)]
    return [text for cell in cells if cell for text in (cell if isinstance(cell, list) else [cell])]


RUNS = {  # in the order in which one kernel runs them -> what its record says
    "as-saved": (CELLS, ""),
    "other-words": (changed(cell_4="# a remark\n\nkept = (chosen)"), ""),
    "again": (changed(cell_2=[BEGIN, BEGIN], cell_3=[CELLS[3], CELLS[3]]), ""),
    "left-out": (changed(cell_3=None), "it did not run \"get_ipython().run_line_magic('matp"),
    "earlier": (changed(cell_2=None, cell_3=[CELLS[3], BEGIN]), "it did not run \"get_ipython()"),
    "patched": (["# parameters\nprint('patched')", *CELLS],
                "it ran \"print('patched')\", which the saved notebook does not have"),
    "halved": (changed(cell_4="kept = chosen[:len(chosen) // 2]"),
               "it ran 'kept = chosen[:len(chosen) // 2]', which the saved notebook does not have")}


@pytest.fixture
def run_cells(tmp_path, monkeypatch):
    """Call it with cells: a kernel runs them beside a 00 that is saved with CELLS."""
    monkeypatch.setenv("MIG_KIT_RUNS", str(tmp_path / "runs"))

    def save(name, cells):
        metadata = {"kernelspec": {"name": "python3", "display_name": "3", "language": "python"}}
        nbformat.write(new_notebook(cells=list(map(new_code_cell, cells)), metadata=metadata),
                       tmp_path / name)
        return tmp_path / name

    save("00_preflight.ipynb", CELLS)

    def run(cells):
        papermill.execute_notebook(
            save("copy.ipynb", cells), tmp_path / "out.ipynb", kernel_manager_class=ThisPython,
            progress_bar=False, extra_arguments=[
                f"--IPKernelApp.exec_lines={USE.format(str(tmp_path))}"])

    return run


def test_a_cell_that_is_not_the_saved_one_is_in_the_record_and_in_status(run_cells):
    cells = []
    for run_id, (of_run, _) in RUNS.items():
        cells += [f"# Parameters\nrun_id = '{run_id}'", *of_run]
    run_cells(cells)
    for run_id, (_, edited) in RUNS.items():
        record = Run(run_id).record("00_preflight")
        assert record["edited"].startswith(edited) and bool(record["edited"]) == bool(edited)
        assert ("00 edited" in status.run_line(run_id)) == bool(edited)
    assert "; edited, 00_preflight: it ran 'kept" in status.run_lines("halved")[1]

