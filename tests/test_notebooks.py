"""Every notebook on smoke parameters, with what its reader is told to try."""

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import papermill
import pytest
import yaml
from command_line import describe_files, notebooks_in_this_process, output_of
from try_blocks import read_blocks, write_with_blocks

from mig_kit.common import NOTEBOOKS, PROJECT_ROOT, model_folder
from mig_kit.pipeline import execute, run_folders
from mig_kit.pipeline.run_folders import RECIPE
from mig_kit.pipeline.runs import Run

pytestmark = pytest.mark.slow
COMMANDS = [line for stage in run_folders.STAGES for block in read_blocks(stage, "sh")
            for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def runs(smoke_runs, tmp_path_factory):
    return shutil.copytree(smoke_runs, tmp_path_factory.mktemp("notebooks") / "runs")


def test_every_stage_left_what_it_should_and_no_notebook_shows_a_warning(smoke_runs):
    for stage in (*RECIPE, "08_benchmark"):
        folder = smoke_runs / "smoke" / stage
        names = {path.name for path in folder.iterdir()}
        assert {"metrics.json", "run.json", f"{stage}.ipynb"} <= names
        record = json.loads((folder / "run.json").read_text())
        assert record["versions"]["trl"]
        assert re.search(r"\w.* \(\w.*\), \w+, \d+ of \d+ cores$", record["machine"])
        assert stage in ("01_synthesize", "07_report") or record["hardware"]
    page = (smoke_runs / "smoke" / "07_report" / "report.html").read_text()
    figure = page.index('alt="Greedy score on every suite"')
    assert page.index("<h1>mig-kit run smoke") < page.index("Scores, greedy") < figure
    assert page.count('alt="Fine-tuning') == 1 and "<script" not in page
    texts, _, _ = (smoke_runs / "stderr.txt").read_text().partition("the end of the recipe\n")
    assert [text for text in texts.splitlines()
            if re.search(r"warning|\[transformers\]", text, re.I)] == []
    metrics = json.loads((smoke_runs / "smoke" / "06_evaluate" / "metrics.json").read_text())
    for system in ("base", "sft", "grpo"):
        for suite in ("mig_bench", "ood_grounding", "blink", "mmiu"):
            figures = metrics["systems"][system][suite]
            assert {"n", "score", "ci95", "sampled", "tasks"} <= figures.keys()
    for delta, suite in (("grpo-sft", "mig_bench"), ("grpo-base", "mmiu")):
        assert {"value", "ci95", "sampled"} <= metrics["deltas"][delta][suite].keys()


def test_a_second_run_repeats_nothing(runs):
    output = output_of("run", "--profile", "smoke", "--run-id", "smoke", MIG_KIT_RUNS=str(runs))
    assert output.count("up to date") == len(RECIPE) and "report:" in output


def test_nbval_runs_an_executed_notebook_again_and_nothing_changes(runs, tmp_path):
    """Parameters injected: its cells' asserts hold, and what has finished stays."""
    before = describe_files(runs / "smoke", "*/**/*")
    path = shutil.copy(runs / "smoke" / "05_grpo" / "05_grpo.ipynb", tmp_path / "again.ipynb")
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "-q", "-x", "-p", "no:cacheprovider",
               "--nbval-cell-timeout=600", str(path)]
    result = subprocess.run(command, env={**os.environ, "MIG_KIT_RUNS": str(runs)},
                            capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-3000:]
    assert describe_files(runs / "smoke", "*/**/*") == before, "changed, or an attempt was left"


def execute_here(path, runs, tmp_path, monkeypatch, **values):
    """Run a notebook in this process, on a folder of runs."""
    monkeypatch.setenv("MIG_KIT_RUNS", str(runs))
    with notebooks_in_this_process():
        papermill.execute_notebook(path, tmp_path / "out.ipynb", values, cwd=tmp_path)


def test_notebook_09_compares_runs(runs, tmp_path, monkeypatch, capsys):
    """With what its reader is told to try behind it."""
    write_with_blocks(tmp_path, "09_compare")
    execute_here(tmp_path / "09_compare.ipynb", runs, tmp_path, monkeypatch,
                 groups=["recipe=smoke"])
    text = capsys.readouterr().out
    assert "another seed may move a score by more: recipe." in text
    assert re.search(r"'4\.0 \(-8\.7 to \+16\.7\)'\s+Out\[\d+\]: 1\.4\s+$", text)


def test_notebook_10_puts_a_run_beside_the_records(runs, tmp_path, monkeypatch, capsys):
    """With what its reader is told to try behind it."""
    write_with_blocks(tmp_path, "10_what_makes_it_work")
    execute_here(tmp_path / "10_what_makes_it_work.ipynb", runs, tmp_path, monkeypatch,
                 run_id="smoke")
    text = capsys.readouterr().out
    records = [json.loads(path.read_text())
               for path in (NOTEBOOKS / "guide" / "evidence").glob("recipe-*.json")]
    shares = [record["evidence"]["curves"]["evidence"] for record in records]
    assert f"records of recipe ({len(records)} seeds)" in text
    assert re.search(r"run 'smoke': \d+% of the last replies list their evidence; the recorded "
                     rf"seeds beside it {min(shares):.0%} to {max(shares):.0%}", text)
    assert "pass@1" in text.rpartition("share of replies")[2] and "Warning" not in text


needs_adapters = pytest.mark.skipif(
    not model_folder("tiny/sft").is_dir(), reason="no adapters yet; make executed ships them")


@pytest.mark.parametrize("run_id", ["smoke", pytest.param("none", marks=needs_adapters)])
def test_notebook_05b_learns_by_hand_what_the_trainer_computes(run_id, runs, tmp_path, monkeypatch,
                                                               capsys):
    """One step on a run's model or, without one, on a shipped one; its last cell asserts the
    trainer's gradient.
    """
    path = NOTEBOOKS / "05b_grpo_by_hand.ipynb"
    execute_here(path, runs, tmp_path, monkeypatch, run_id=run_id, n_questions=2, n_held_out=2,
                 steps=1, n_prompts=1, group_size=4, max_new_tokens=12, photo_side=56)
    text = capsys.readouterr().out
    assert re.search(r"gradients differ by \d", text)
    assert ("run 'none' has no SFT model, so the one that ships learns: tiny/sft" in text) == (
        run_id == "none")
    assert "shared_prefix" not in path.read_text()


@pytest.mark.parametrize("lesson", ["11_break_it", "12_credit"])
def test_a_lesson_runs_on_a_run(lesson, runs, tmp_path, monkeypatch, capsys):
    small = {"11_break_it": {"n_questions": 8, "n_held_out": 4, "updates": 1},
             "12_credit": {"n_questions": 4, "updates": 2}}
    execute_here(NOTEBOOKS / f"{lesson}.ipynb", runs, tmp_path, monkeypatch, run_id="smoke",
                 **small[lesson])
    text = capsys.readouterr().out
    assert "the SFT model of run 'smoke'" in text and "Error" not in text


def test_the_readmes_papermill_command_is_a_branch_of_the_finished_run(runs, tmp_path, monkeypatch):
    """As printed, with the smoke profile's smaller parameters behind it."""
    readme = (PROJECT_ROOT / "README.md").read_text()
    (command,) = re.findall(r"^papermill .*", readme, re.MULTILINE)
    words = shlex.split(command, comments=True)
    small = yaml.safe_load((PROJECT_ROOT / "params" / "smoke" / "05_grpo.yaml").read_text())
    told = dict(zip(words[4::3], map(yaml.safe_load, words[5::3]), strict=True))
    shutil.copytree(runs / "smoke", tmp_path / "default")
    small |= {"per_device_train_batch_size": 16, "max_steps": 1}  # groups of 16 divide it
    execute_here(PROJECT_ROOT / words[1], tmp_path, tmp_path, monkeypatch, **small | told)
    run = Run(told["run_id"])
    assert run.params("05_grpo")["num_generations"] == told["num_generations"]
    assert run.branch["from"] == "default"


@pytest.mark.nightly
def test_notebook_90_makes_a_tiny_base(tmp_path, monkeypatch):
    write_with_blocks(tmp_path, "90_tiny_base")
    monkeypatch.setattr(execute, "NOTEBOOKS", tmp_path)
    with notebooks_in_this_process():
        output_of("run", "90", "--profile", "smoke", MIG_KIT_RUNS=str(tmp_path / "runs"))


@pytest.mark.parametrize("stage", [*run_folders.STAGES, "09_compare",
                                   "10_what_makes_it_work"])
def test_what_a_reader_is_told_to_try_shows_something(stage):
    for block in read_blocks(stage, "python"):
        last = ast.parse(block).body[-1]
        assert isinstance(last, ast.Expr) or "print(" in block, f"{block} shows nothing"


def test_commands_to_try_are_planned(smoke_runs, monkeypatch):
    plans = []
    monkeypatch.setattr(execute, "run_plan", lambda plan, *_: plans.append(plan))
    for command in COMMANDS:
        run_command(command, smoke_runs)
    assert len(plans) == len(COMMANDS) >= 2 and all(made.source == "smoke" for made in plans)


@pytest.mark.nightly
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_to_try_run(command, smoke_runs, tmp_path):
    root = shutil.copytree(smoke_runs, tmp_path / "runs")
    more = ("-p", "max_samples", "8") if "num_train_epochs" in command else ()
    run_command(command, root, *more)


def run_command(command, root, *more):
    words = command.split("#")[0].split()
    assert words[:2] == ["mig-kit", "run"]
    words = ["smoke" if word == "default" else word for word in words[1:]]
    output_of(*words, "--profile", "smoke", *more, MIG_KIT_RUNS=str(root))


@pytest.mark.nightly
def test_a_notebook_that_jupyterlab_opens_and_saves_is_as_git_holds_it(tmp_path):
    """`make lab` starts it with this configuration."""
    from jupyter_server.services.contents.largefilemanager import LargeFileManager
    from traitlets.config.loader import PyFileConfigLoader

    stage = "05_grpo"
    config = PyFileConfigLoader(str(PROJECT_ROOT / ".ci" / "jupyter_server_config.py"))
    path = shutil.copy(NOTEBOOKS / f"{stage}.ipynb", tmp_path)
    manager = LargeFileManager(root_dir=str(tmp_path), config=config.load_config())
    model = manager.get(f"{stage}.ipynb")
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    model["content"]["metadata"] = {  # as JupyterLab sends it back
        "kernelspec": kernel, "language_info": {"name": "python", "version": "3.99"}}
    manager.save(model, f"{stage}.ipynb")
    assert Path(path).read_bytes() == (NOTEBOOKS / f"{stage}.ipynb").read_bytes()
