"""Every numbered notebook runs on smoke parameters: papermill injects them, then nbval runs what was injected."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from PIL import Image

from mig_kit.pipeline import store

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def smoke(smoke_runs, tmp_path_factory):
    """The folder of runs with the whole smoke run, a copy: nbval runs the stages anew, in place."""
    return shutil.copytree(smoke_runs, tmp_path_factory.mktemp("notebooks") / "runs")


def test_every_stage_left_what_it_should(smoke):
    for stage in store.STAGES:
        folder = smoke / "smoke" / stage
        assert {"metrics.json", "run.json", f"{stage}.ipynb"} <= {p.name for p in folder.iterdir()}
        record = json.loads((folder / "run.json").read_text())
        assert record["versions"]["trl"] and record["hardware" if stage not in ("01_synthesize", "07_report") else "machine"]
    metrics = json.loads((smoke / "smoke" / "06_evaluate" / "metrics.json").read_text())
    for system in ("base", "sft", "grpo"):
        for suite in ("mig_bench", "ood_grounding", "blink", "mmiu"):
            assert {"n", "score", "ci95", "sampled", "tasks"} <= set(metrics["systems"][system][suite])
    assert {"value", "ci95", "sampled"} <= set(metrics["deltas"]["grpo-sft"]["mig_bench"])
    assert {"value", "ci95", "sampled"} <= set(metrics["deltas"]["grpo-base"]["mmiu"])


def test_a_second_run_redoes_nothing(smoke):
    result = subprocess.run([sys.executable, "-c", "from mig_kit.cli import main; main()", "run", "--profile", "smoke", "--run-id",
                             "smoke"], env={**os.environ, "MIG_KIT_RUNS": str(smoke)}, capture_output=True, text=True)
    assert result.stdout.count("up to date") == len(store.RECIPE) and "report:" in result.stdout


@pytest.mark.parametrize("stage", store.STAGES)
def test_nbval_runs_the_executed_notebook(stage, smoke):
    """nbval runs the notebook that papermill left, parameters injected; its cells' asserts are the test."""
    notebook = smoke / "smoke" / stage / f"{stage}.ipynb"
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "-q", "-p", "no:cacheprovider", "--nbval-cell-timeout=600"]
    result = subprocess.run([*command, str(notebook)], env={**os.environ, "MIG_KIT_RUNS": str(smoke)}, capture_output=True,
                            text=True, cwd=notebook.parent)
    assert result.returncode == 0, result.stdout[-3000:]


def test_evaluate_runs_a_real_benchmark(smoke):
    """A made MIG-Bench file through 06 and 07, by parameter."""
    shutil.copytree(smoke / "smoke", smoke / "real")
    Image.new("RGB", (90, 70), "white").save(smoke / "one.png")
    question = {"task": "reasoning", "images": ["one.png", "one.png"], "question": "Find it.", "answer": [0.1, 0.2, 0.6, 0.7]}
    (smoke / "made.json").write_text(json.dumps([question] * 3))
    result = subprocess.run([sys.executable, "-c", "from mig_kit.cli import main; main()", "run", "06", "07", "--profile", "smoke",
                             "--run-id", "real", "-p", "benchmark", "mig_bench", "-p", "annotations_file", str(smoke / "made.json"),
                             "-p", "image_root", str(smoke), "-p", "benchmark_limit", "2"],
                            env={**os.environ, "MIG_KIT_RUNS": str(smoke)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    found = json.loads((smoke / "real" / "06_evaluate" / "metrics.json").read_text())["benchmark"]
    assert found["version"] == "original" and found["systems"]["grpo"]["strict"]["n"] == 2
    lines = (smoke / "real" / "06_evaluate" / "predictions_grpo.jsonl").read_text().splitlines()
    assert [json.loads(line)["index"] for line in lines] == [0, 1]
    assert "mig_bench original" in (smoke / "real" / "07_report" / "report.html").read_text()
