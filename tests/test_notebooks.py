"""Every numbered notebook runs on smoke parameters: papermill injects them, then nbval runs what
was injected, and behind each notebook what it tells its reader to try.
"""

import ast
import json
import os
import re
import shutil
import subprocess
import sys

import nbformat
import pytest
from command_line import run_mig_kit
from nbformat.v4 import new_code_cell, new_notebook

from mig_kit.common import PROJECT_ROOT
from mig_kit.pipeline import execute, store

pytestmark = pytest.mark.slow
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def read_blocks(stage: str, language: str) -> list[str]:
    """The blocks in a language below a notebook's heading "Try this"."""
    cells = json.loads((PROJECT_ROOT / "notebooks" / f"{stage}.ipynb").read_text())["cells"]
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown"]
    return [block for text in texts if text.startswith("## Try this")
            for found_language, block in BLOCK.findall(text) if found_language == language]


COMMANDS = [line for stage in store.STAGES for block in read_blocks(stage, "sh")
            for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def runs(smoke_runs, tmp_path_factory):
    """A copy of the folder of runs with the smoke run: nbval runs the stages again, in place."""
    return shutil.copytree(smoke_runs, tmp_path_factory.mktemp("notebooks") / "runs")


def test_every_stage_left_what_it_should_and_no_notebook_shows_a_warning(smoke_runs):
    for stage in store.STAGES:
        folder = smoke_runs / "smoke" / stage
        names = {path.name for path in folder.iterdir()}
        assert {"metrics.json", "run.json", f"{stage}.ipynb"} <= names
        record = json.loads((folder / "run.json").read_text())
        assert record["versions"]["trl"]
        assert re.search(r"\w.* \d+ of \d+ cores$", record["machine"])
        assert stage in ("01_synthesize", "07_report", "09_compare") or record["hardware"]
        notebook = nbformat.read(folder / f"{stage}.ipynb", 4)
        texts = [output["text"] for cell in notebook.cells for output in cell.get("outputs", ())
                 if output.get("name") == "stderr"]
        assert [text for text in texts if re.search(r"warning|\[transformers\]", text, re.I)] == []
    metrics = json.loads((smoke_runs / "smoke" / "06_evaluate" / "metrics.json").read_text())
    for system in ("base", "sft", "grpo"):
        for suite in ("mig_bench", "ood_grounding", "blink", "mmiu"):
            figures = metrics["systems"][system][suite]
            assert {"n", "score", "ci95", "sampled", "tasks"} <= figures.keys()
    for delta, suite in (("grpo-sft", "mig_bench"), ("grpo-base", "mmiu")):
        assert {"value", "ci95", "sampled"} <= metrics["deltas"][delta][suite].keys()


def test_a_second_run_repeats_nothing(runs):
    result = run_mig_kit("run", "--profile", "smoke", "--run-id", "smoke",
                         MIG_KIT_RUNS=str(runs))
    assert result.stdout.count("up to date") == len(store.RECIPE) and "report:" in result.stdout


def describe_files(folder):
    """Content and time of every file of the stages; beside them stands who wrote last."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns)
            for path in sorted(folder.glob("*/**/*")) if path.is_file()}


def test_nbval_runs_the_executed_notebooks_and_what_they_tell_to_try(runs, tmp_path):
    """nbval runs the notebooks that papermill left, parameters injected, one after the other in one
    kernel; their cells' asserts are the test. What has finished stays as it is.
    """
    cells = []
    for stage in store.STAGES:
        notebook = nbformat.read(runs / "smoke" / stage / f"{stage}.ipynb", 4)
        blocks = read_blocks(stage, "python")
        for block in blocks:
            last = ast.parse(block).body[-1]
            assert isinstance(last, ast.Expr) or "print(" in block, f"{block} shows nothing"
        cells += [cell for cell in notebook.cells if cell.cell_type == "code"]
        cells += map(new_code_cell, [*blocks, f"%reset -f\n# {stage} has run"])
    for number, cell in enumerate(cells):
        cell.id = str(number)
    path, before = tmp_path / "again.ipynb", describe_files(runs / "smoke")
    nbformat.write(new_notebook(cells=cells, metadata=notebook.metadata), path)
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "-q", "-x", "-p", "no:cacheprovider",
               "--nbval-cell-timeout=600", str(path)]
    result = subprocess.run(command, env={**os.environ, "MIG_KIT_RUNS": str(runs)},
                            capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-3000:]
    assert describe_files(runs / "smoke") == before, "files changed, or an attempt was left"


def test_commands_to_try_are_planned(smoke_runs, monkeypatch):
    plans = []
    monkeypatch.setattr(execute, "run_plans", lambda made, *_: plans.extend(made))
    for command in COMMANDS:
        result = run_command(command, smoke_runs)
        assert result.returncode == 0, result.stderr
    assert len(plans) == len(COMMANDS) >= 2 and all(made.source == "smoke" for made in plans)


@pytest.mark.nightly
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_to_try_run(command, smoke_runs, tmp_path):
    root = shutil.copytree(smoke_runs, tmp_path / "runs")
    more = ("-p", "max_samples", "8") if "num_train_epochs" in command else ()
    result = run_command(command, root, *more)
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout[-1000:]


def run_command(command, root, *more):
    """Run a command of a notebook, which names the run "default", on the smoke run."""
    words = command.split("#")[0].split()
    assert words[:2] == ["mig-kit", "run"]
    words = ["smoke" if word == "default" else word for word in words[1:]]
    return run_mig_kit(*words, "--profile", "smoke", *more, MIG_KIT_RUNS=str(root))
