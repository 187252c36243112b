"""Overrides are refused, with the fix, before any kernel starts; a run keeps its profile."""

import shutil

import nbformat
import papermill
import pytest
import torch
from click.testing import CliRunner
from command_line import error_of

from mig_kit.commands import main as cli_module
from mig_kit.commands.main import cli
from mig_kit.common import PROJECT_ROOT, write_json
from mig_kit.pipeline import execute, joint_rules, params, plan
from mig_kit.stages.evaluated_runs import read_recorded


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty folder of runs, in which no notebook is executed."""
    monkeypatch.setenv("MIG_KIT_RUNS", str(tmp_path / "runs"))
    monkeypatch.setattr(papermill, "execute_notebook",
                        lambda *arguments, **options: pytest.fail("a kernel would start"))
    return tmp_path / "runs"


def test_a_single_digit_names_a_stage(root):
    assert error_of("run", "5").startswith("05_grpo needs 01_synthesize of run 'default'")
    assert [cli_module.stage_name(text) for text in ("5", "05", "grpo", "05_grpo", "90")] == [
        "05_grpo", "05_grpo", "05_grpo", "05_grpo", "90_tiny_base"]


def test_a_copied_profile_is_the_one_that_is_looked_at(tmp_path, monkeypatch):
    shutil.copytree(PROJECT_ROOT / "params", tmp_path / "params")
    shutil.copytree(PROJECT_ROOT / "params" / "qwen2_5_vl_7b", tmp_path / "params" / "mine")
    monkeypatch.setattr(params, "PROFILES", tmp_path / "params")
    monkeypatch.setattr(joint_rules, "PROFILES", tmp_path / "params")
    assert plan.choose_params("00_preflight", "mine", "a", {})["profile"] == "mine"
    values = plan.choose_params("05_grpo", "mine", "a", {"learning_rate": "1e-5"})
    assert "profile" not in values and values["learning_rate"] == 1e-5
    assert values["num_generations"] == 8 and values["beta"] == 0.04


def start_run(root, profile, **changes):
    """What stage 01 of a run leaves for the stages after it."""
    values = {**params.profile_params(params.RUN_PARAMS_STAGE, profile), **changes}
    folder = root / "default" / params.RUN_PARAMS_STAGE
    folder.mkdir(parents=True)
    write_json(folder / "run.json", {"params": values, "outputs": {}, "key": "k"})


@pytest.mark.parametrize(("first", "then"), [
    ("qwen2_5_vl_3b", "qwen2_5_vl_7b"), ("qwen2_5_vl_3b", "tiny"), ("tiny", "qwen2_5_vl_7b")])
def test_going_on_with_another_profile_is_refused(root, first, then):
    start_run(root, first)
    words = ("--run-id", "default", "-p", "device", "cpu")
    sentence = error_of("run", "05", "--profile", then, *words)
    model = params.profile_params(params.RUN_PARAMS_STAGE, first)["base_model"]
    other = params.profile_params(params.RUN_PARAMS_STAGE, then)["base_model"]
    assert f"run 'default' has the base_model {model}, and profile '{then}' {other}" in sentence
    assert "--run-id" in sentence and not (root / "default" / "05_grpo").exists()


@pytest.mark.parametrize(("profile", "changes"), [
    ("smoke", {}), ("qwen2_5_vl_3b", {}), ("smoke", {"coordinates": "normalized_1000"}),
    ("tiny", {"max_pixels": 99999})])
def test_going_on_with_the_same_profile_is_not_refused(root, profile, changes):
    start_run(root, profile, **changes)
    sentence = error_of("run", "05", "--profile", profile, "--run-id", "default", "-p", "device",
                        "cpu")
    assert sentence.startswith("05_grpo needs 03_merge")


def test_a_stage_that_needs_no_other_runs_under_any_profile(root, monkeypatch):
    start_run(root, "tiny")
    executed = []
    monkeypatch.setattr(execute, "_execute_notebook", lambda *arguments: executed.append(arguments))
    monkeypatch.setattr(execute.store, "require_record", lambda *_: {"summary": ""})
    plans = plan.plan_runs(["00_preflight"], "qwen2_5_vl_7b", "default", "", [], ())
    execute.run_plans(plans, force=True)
    assert len(executed) == 1


def test_recorded_runs_of_a_comparison_are_looked_for_where_the_command_is_given(monkeypatch):
    monkeypatch.chdir(PROJECT_ROOT / "notebooks" / "guide")
    words = (("groups", "[a=default, 'b=seed1,ablations/0.2/default.json', "
                        "ablations/0.2/seed1.json]"),)
    groups = ["a=default", "b=seed1,notebooks/guide/ablations/0.2/default.json",
              "notebooks/guide/ablations/0.2/seed1.json"]
    assert plan.parse_overrides(words, ["09_compare"]) == {"groups": groups}
    assert read_recorded(groups[-1]).data_seed == 1, "a parameter's path is of the project"


def test_a_command_is_a_word_whatever_it_holds():
    """YAML would read the first as a mapping, and the second as a number."""
    command = "env A=1 vllm serve {model} --limit-mm-per-prompt '{\"image\": 6}'"
    for text in (command, "2"):
        assert plan.parse_overrides((("server", text),), ["04_rejection_sampling"]) == {
            "server": text}


@pytest.mark.parametrize(("words", "sentence"), [
    ((), "would train a full model on drawn scenes; name the file of your data (-p"),
    (("-p", "data", "scenes"), "'qwen2_5_vl_7b' needs a GPU, and PyTorch"),
    (("02",), "'qwen2_5_vl_7b' needs a GPU, and PyTorch"),
    (("01",), "say -p data scenes to train on them"),
    (("-p", "device", "cpu"), "say -p data scenes to train on them"),
    (("01", "02"), "say -p data scenes to train on them")])
def test_the_command_refuses_a_full_profile_before_anything_is_written(root, monkeypatch, words,
                                                                       sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sentence in error_of("run", *words, "--profile", "qwen2_5_vl_7b")
    assert not root.exists()


@pytest.mark.parametrize(("words", "has_gpu"), [
    (("01", "02", "-p", "data", "scenes"), True),
    (("01", "02", "-p", "data", "scenes", "-p", "device", "cpu"), False),
    (("00",), False), (("01", "-p", "data", "scenes"), False)])
def test_the_command_starts_a_full_profile_where_data_and_gpu_are_there(root, monkeypatch, words,
                                                                        has_gpu):
    started = []
    monkeypatch.setattr(execute, "run_stages", lambda params, *more: started.extend(params))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    assert CliRunner().invoke(cli, ["run", *words, "--profile", "qwen2_5_vl_7b"]).exit_code == 0
    assert [stage[:2] for stage in started] == [word for word in words if word.isdigit()]


def test_a_killed_kernel_is_named_and_leaves_its_figures(tmp_path, monkeypatch):
    """In a folder with braces, and under another backend than notebooks'."""
    folder = tmp_path / "{seed} {x}"
    (folder / "runs" / "a").mkdir(parents=True)
    cells = ["import os, matplotlib.pyplot as plt", "plt.plot([1, 2]);", "os.kill(os.getpid(), 9)"]
    nbformat.write(nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell) for cell in cells],
        metadata={"kernelspec": {"name": "python3", "language": "python", "display_name": "3"}}),
        folder / "00_preflight.ipynb")
    monkeypatch.setattr(execute, "NOTEBOOKS", folder)
    monkeypatch.setenv("MIG_KIT_RUNS", str(folder / "runs"))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    with pytest.raises(RuntimeError, match=r"00_preflight failed: its kernel was ended by signal 9 "
                                           r"\(Killed\); the system ends so what takes too much"):
        execute._execute_notebook("00_preflight", "a", {"seed": 1}, execute.StageLines())
    assert '"image/png"' in (folder / "runs" / "a" / "00_preflight.failed.ipynb").read_text()
