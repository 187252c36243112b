"""Every numbered notebook runs on smoke parameters: papermill injects them, then nbval runs what
was injected, and what the notebook tells its reader to try.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
from command_line import run_mig_kit
from try_this import python_blocks

from mig_kit.pipeline import store

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def runs(smoke_runs, tmp_path_factory):
    """A copy of the folder of runs with the smoke run: nbval runs the stages again, in place."""
    return shutil.copytree(smoke_runs, tmp_path_factory.mktemp("notebooks") / "runs")


def test_every_stage_left_what_it_should(runs):
    for stage in store.STAGES:
        folder = runs / "smoke" / stage
        names = {path.name for path in folder.iterdir()}
        assert {"metrics.json", "run.json", f"{stage}.ipynb"} <= names
        record = json.loads((folder / "run.json").read_text())
        assert record["versions"]["trl"]
        assert re.search(r"\w.* \d+ of \d+ cores$", record["machine"])
        assert stage in ("01_synthesize", "07_report", "09_compare") or record["hardware"]
    metrics = json.loads((runs / "smoke" / "06_evaluate" / "metrics.json").read_text())
    for system in ("base", "sft", "grpo"):
        for suite in ("mig_bench", "ood_grounding", "blink", "mmiu"):
            figures = metrics["systems"][system][suite]
            assert {"n", "score", "ci95", "sampled", "tasks"} <= figures.keys()
    for delta, suite in (("grpo-sft", "mig_bench"), ("grpo-base", "mmiu")):
        assert {"value", "ci95", "sampled"} <= metrics["deltas"][delta][suite].keys()


@pytest.mark.parametrize("stage", store.STAGES)
def test_no_notebook_shows_a_warning(stage, runs):
    notebook = nbformat.read(runs / "smoke" / stage / f"{stage}.ipynb", 4)
    texts = [output["text"] for cell in notebook.cells for output in cell.get("outputs", ())
             if output.get("name") == "stderr"]
    assert [text for text in texts if re.search(r"warning|\[transformers\]", text, re.I)] == []


def test_a_second_run_repeats_nothing(runs):
    result = run_mig_kit("run", "--profile", "smoke", "--run-id", "smoke",
                             MIG_KIT_RUNS=str(runs))
    assert result.stdout.count("up to date") == len(store.RECIPE) and "report:" in result.stdout


def describe_files(folder):
    """Content and time of every file."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns)
            for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("stage", store.STAGES)
def test_nbval_runs_the_executed_notebook(stage, runs, tmp_path):
    """nbval runs the notebook that papermill left, parameters injected, and behind it what it tells
    the reader to try; its cells' asserts are the test. What has finished stays as it is.
    """
    folder = runs / "smoke" / stage
    notebook = nbformat.read(folder / f"{stage}.ipynb", 4)
    notebook.cells += [nbformat.v4.new_code_cell(text) for text in python_blocks(stage)]
    path, before = tmp_path / "again.ipynb", describe_files(folder)
    nbformat.write(notebook, path)
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "-q", "-p", "no:cacheprovider",
               "--nbval-cell-timeout=600", str(path)]
    result = subprocess.run(command, env={**os.environ, "MIG_KIT_RUNS": str(runs)},
                            capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-3000:]
    assert describe_files(folder) == before
    assert not list(folder.parent.glob("*.new-*")), "an attempt was left"
