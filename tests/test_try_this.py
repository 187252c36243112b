"""What the notebooks tell the reader to try runs on the smoke run.

Here the commands; the blocks of Python run behind their notebook in test_notebooks.py.
"""

import ast
import shutil

import pytest
from command_line import run_mig_kit
from try_this import BLOCK, COMMANDS, python_blocks

from mig_kit.pipeline import store

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("stage", "command"), COMMANDS)
def test_commands_run(stage, command, smoke_runs, tmp_path):
    root = shutil.copytree(smoke_runs, tmp_path / "runs")
    words = command.split("#")[0].split()
    assert words[:2] == ["mig-kit", "run"]
    words = ["smoke" if word == "default" else word for word in words[1:]]
    if "num_train_epochs" in words:
        words += ["-p", "max_samples", "8"]
    result = run_mig_kit(*words, "--profile", "smoke", MIG_KIT_RUNS=str(root))
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout[-1000:]


@pytest.mark.parametrize("stage", store.STAGES)
def test_every_block_ends_with_what_it_shows(stage):
    for text in python_blocks(stage):
        last = ast.parse(text).body[-1]
        assert isinstance(last, ast.Expr) or "print(" in ast.unparse(last), text


def test_blocks_are_found():
    text = "## Try this\n\n```python\na = 1\n```\nExpect: 1\n```sh\nmig-kit run 03\n```\n"
    assert BLOCK.findall(text) == [("python", "a = 1\n"), ("sh", "mig-kit run 03\n")]
    assert COMMANDS and sum(bool(python_blocks(stage)) for stage in store.STAGES) >= 8
