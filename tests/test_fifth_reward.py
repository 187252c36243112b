"""A fifth reward takes three edits: the function, its line in the table of rewards, its weight."""

import json
import os
import shutil
import subprocess

import pytest
from command_line import CLI

from mig_kit.common import PROJECT_ROOT
from mig_kit.pipeline.params import profile_params

pytestmark = pytest.mark.slow
WEIGHTS = profile_params("05_grpo")["reward_weights"]
EARLIER_STAGES = ("01_synthesize", "02_sft", "03_merge", "04_rejection_sampling")

# file, what stands there, what replaces it
EDITS = (
    ("mig_kit/rewards.py", "def cites_only_existing_images(", '''\
def brevity_reward(reply: str, sample: Sample) -> float:
    """1 for an empty reply, falling to 0 at 400 characters."""
    return max(0.0, 1 - len(reply) / 400)


def cites_only_existing_images('''),
    ("mig_kit/stages/grpo.py",
     '        "choice": (rewards.choice_reward, _asks_for_a_letter),\n',
     '        "choice": (rewards.choice_reward, _asks_for_a_letter),\n'
     '        "brevity": (rewards.brevity_reward, _is_any),\n'),
    ("notebooks/05_grpo.ipynb", f"reward_weights: list = {WEIGHTS}",
     f"reward_weights: list = {[*WEIGHTS, 0.5]}"),
)


@pytest.fixture
def project(tmp_path, smoke_runs):
    """A copy of the project in which the smoke run has finished."""
    unneeded = shutil.ignore_patterns(".*", "runs", "tests", "*.egg-info", "__pycache__", "guide")
    project = shutil.copytree(PROJECT_ROOT, tmp_path / "project", ignore=unneeded)
    shutil.copytree(smoke_runs / "smoke", project / "runs" / "smoke")
    return project


def test_a_fifth_reward_takes_three_edits(project):
    for name, old, new in EDITS:
        text = (project / name).read_text()
        assert text.count(old) == 1, f"{name} has changed; change this test and the README's list"
        (project / name).write_text(text.replace(old, new))
    environment = {name: value for name, value in os.environ.items() if name != "MIG_KIT_RUNS"}
    result = subprocess.run(
        [*CLI, "run", *EARLIER_STAGES, "05_grpo", "--profile", "smoke", "--run-id", "smoke",
         "-p", "launcher", ""],
        cwd=project, env={**environment, "PYTHONPATH": str(project)}, capture_output=True,
        text=True)
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout[-1000:]
    for stage in EARLIER_STAGES:
        assert f"{stage}: up to date" in result.stdout, "a reward concerns stage 05 alone"
    folder = project / "runs" / "smoke" / "05_grpo"
    params = json.loads((folder / "run.json").read_text())["params"]
    assert params["reward_weights"] == [*WEIGHTS, 0.5]
    curves = json.loads((folder / "metrics.json").read_text())["curves"]
    assert len(curves) == 2 and all(0 < row["brevity"] < 1 for row in curves)
    assert "brevity " in result.stdout, "its mean is printed while it trains"
