"""What the notebooks tell the reader to try runs, on the smoke run: blocks of Python behind the
notebook's last cell, and commands.
"""

import json
import re
import shutil

import nbformat
import papermill
import pytest
from command_line import run_mig_kit

from mig_kit.common import PROJECT_ROOT
from mig_kit.pipeline import store
from mig_kit.pipeline.execute import choose_params

pytestmark = pytest.mark.slow
BLOCK = re.compile(r"^```(python|sh)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def read_items(stage: str) -> list[tuple[str, str]]:
    """(language, text) of every block below a notebook's heading "Try this"."""
    path = PROJECT_ROOT / "notebooks" / f"{stage}.ipynb"
    cells = ("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"]
             if cell["cell_type"] == "markdown")
    return [block for text in cells if text.startswith("## Try this")
            for block in BLOCK.findall(text)]


ITEMS = {stage: read_items(stage) for stage in store.STAGES}
COMMANDS = [(stage, line) for stage, items in ITEMS.items() for language, text in items
            if language == "sh" for line in text.splitlines() if line.strip()]


@pytest.fixture
def runs(smoke_runs, tmp_path, monkeypatch):
    """A folder of runs with a copy of the smoke run."""
    root = shutil.copytree(smoke_runs, tmp_path / "runs")
    monkeypatch.setenv("MIG_KIT_RUNS", str(root))
    return root


@pytest.mark.parametrize("stage", [
    stage for stage, items in ITEMS.items() if any(kind == "python" for kind, _ in items)])
def test_blocks_run_behind_the_notebook(stage, runs, tmp_path):
    notebook = nbformat.read(PROJECT_ROOT / "notebooks" / f"{stage}.ipynb", 4)
    blocks = [text for language, text in ITEMS[stage] if language == "python"]
    notebook.cells += [nbformat.v4.new_code_cell(text) for text in blocks]
    path = tmp_path / f"{stage}.ipynb"
    nbformat.write(notebook, path)
    papermill.execute_notebook(path, path, choose_params(stage, "smoke", "smoke", {}),
                               cwd=PROJECT_ROOT / "notebooks", progress_bar=False)
    executed = nbformat.read(path, 4).cells[-len(blocks):]
    assert all(cell.outputs for cell in executed), "a block that shows nothing"


@pytest.mark.parametrize(("stage", "command"), COMMANDS)
def test_commands_run(stage, command, runs):
    words = command.split("#")[0].split()
    assert words[:2] == ["mig-kit", "run"]
    words = ["smoke" if word == "default" else word for word in words[1:]]
    result = run_mig_kit(*words, "--profile", "smoke", MIG_KIT_RUNS=str(runs))
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout[-1000:]


def test_blocks_are_found():
    text = "## Try this\n\n```python\na = 1\n```\nExpect: 1\n```sh\nmig-kit run 03\n```\n"
    assert BLOCK.findall(text) == [("python", "a = 1\n"), ("sh", "mig-kit run 03\n")]
