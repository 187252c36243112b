"""`mig-kit run`: what it refuses before any kernel starts, what it prints, why a stage failed."""

import logging
import shutil

import nbformat
import papermill
import pytest
import torch
from command_line import error_of, output_of
from papermill.exceptions import PapermillExecutionError

from mig_kit.commands import main as cli_module
from mig_kit.common import PROJECT_ROOT, UserError, progress_bar
from mig_kit.pipeline import execute, params


def test_a_single_digit_names_a_stage():
    assert [cli_module.stage_name(text) for text in ("5", "05", "grpo", "05_grpo", "90")] == [
        "05_grpo", "05_grpo", "05_grpo", "05_grpo", "90_tiny_base"]


def test_a_copied_profile_is_the_one_that_is_looked_at(tmp_path, monkeypatch):
    shutil.copytree(PROJECT_ROOT / "params", tmp_path / "params")
    shutil.copytree(PROJECT_ROOT / "params" / "qwen2_5_vl_7b", tmp_path / "params" / "mine")
    monkeypatch.setattr(params, "PROFILES", tmp_path / "params")
    assert params.choose_params("00_preflight", "mine", "a", {})["profile"] == "mine"
    values = params.choose_params("05_grpo", "mine", "a", {"learning_rate": "1e-5"})
    assert "profile" not in values and values["learning_rate"] == 1e-5
    assert values["num_generations"] == 8 and values["beta"] == 0.04


SAY_SCENES = "say -p data scenes to train on them"
SCENES = ("-p", "data", "scenes")


@pytest.mark.parametrize(("words", "has_gpu", "sentence"), [
    ((), True, "would train a full model on synthetic scenes; name the file of your data (-p"),
    (("01",), True, SAY_SCENES), (("-p", "device", "cpu"), True, SAY_SCENES),
    (("01", "02"), True, SAY_SCENES), (("01", "02", *SCENES), True, ""),
    (("01", "02", *SCENES, "-p", "device", "cpu"), False, ""), (("01", *SCENES), False, ""),
    (("00", "--run-id", "default"), False, "")])
def test_the_command_starts_a_full_profile_where_data_and_gpu_are_there(
        root, leave, monkeypatch, words, has_gpu, sentence):
    """00 needs neither, and no run of the same profile."""
    started, words = [], (*words, "--profile", "qwen2_5_vl_7b")
    monkeypatch.setattr(execute, "run_plan", lambda plan, *more: started.extend(plan.params))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    if sentence:
        assert sentence in error_of("run", *words)
        assert not started and not any(root.iterdir())
        return
    leave("01_synthesize", "default")
    output_of("run", *words)
    assert [stage[:2] for stage in started] == [word for word in words if word.isdigit()]


@pytest.fixture
def write_stage(tmp_path, monkeypatch):
    """Call it with cells for the folder of a run whose 00 has them; braces are in its path."""
    folder = tmp_path / "my runs"
    (folder / "runs" / "a").mkdir(parents=True)
    monkeypatch.setattr(execute, "NOTEBOOKS", folder)
    monkeypatch.setenv("MIG_KIT_RUNS", str(folder / "runs"))

    def write(*cells: str):
        nbformat.write(nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(cell) for cell in cells],
            metadata={"kernelspec": {"name": "python3", "language": "python",
                                     "display_name": "3"}}), folder / "00_preflight.ipynb")
        return folder

    return write


def test_a_notebook_whose_parameters_lost_their_tag_does_not_start(write_stage):
    """Its own cell would win over the command's values, the run id among them."""
    folder = write_stage("run_id = 'default'")
    sentence = error_of("run", "00", "--run-id", "mine")
    assert "00_preflight.ipynb must have one cell with the tag 'parameters'" in sentence
    assert [path.name for path in (folder / "runs").iterdir()] == ["a"]


def run_stage():
    execute._execute_notebook("00_preflight", "a", {"seed": 1})


def test_a_killed_kernel_leaves_its_figures(write_stage, monkeypatch):
    """Under another backend than notebooks'."""
    folder = write_stage("import os, matplotlib.pyplot as plt", "plt.plot([1, 2]);",
                         "os.kill(os.getpid(), 9)")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    with pytest.raises(UserError, match="the kernel of 00_preflight died, often because memory"):
        run_stage()
    assert '"image/png"' in (folder / "runs" / "a" / "00_preflight.failed.ipynb").read_text()


def test_what_the_user_has_to_change_is_a_sentence_and_a_bug_its_traceback(write_stage, capsys):
    write_stage("from mig_kit.common import UserError", "raise UserError('too few; give more')")
    with pytest.raises(UserError, match="^00_preflight: too few; give more$"):
        run_stage()
    write_stage("def reward(reply):\n    return 1 / len(reply)", "reward('')")
    with pytest.raises(SystemExit) as end:
        run_stage()
    lines = str(end.value).splitlines()
    assert any("return 1 / len(reply)" in line for line in lines)
    assert lines[-1] == "ZeroDivisionError: division by zero"
    assert "00_preflight: failed; the notebook is " in capsys.readouterr().out


def emit(capsys, *messages: str) -> list[str]:
    lines = execute.StageLines()
    for message in messages:
        lines.emit(logging.LogRecord("x", logging.INFO, "", 0, message, None, None))
    return capsys.readouterr().out.splitlines()


def test_a_slow_bar_tells_of_its_quarters(capsys, monkeypatch):
    """A second for a hundredth, and nothing else was printed for a while."""
    lines, now = execute.StageLines(), execute.time.monotonic()
    for percent in range(101):
        monkeypatch.setattr(execute.time, "monotonic", lambda now=now + percent: now)
        bar = f"\rrollouts: {percent:3}%|==  | {percent}/100"
        lines.emit(logging.LogRecord("x", logging.INFO, "", 0, bar, None, None))
    assert [line.split("|")[0] for line in capsys.readouterr().out.splitlines()] == [
        f"  rollouts: {percent:3}%" for percent in (25, 50, 75, 100)]


def test_a_stage_tells_of_warnings_and_of_a_bars_end_alone(capsys):
    """Not of what libraries print for their own sake."""
    warning = "warning: none of the first 128 replies earned anything for box"
    bar = "\rrollouts:  40%|==    | 4/10 [00:02<00:03]"
    step = "step 5/100: loss 1.0; 1.0 min left"
    assert emit(
        capsys, "Executing Cell 7---", "a/b.py:1: FutureWarning: deprecated", "UserWarning: old",
        "Loading weights: 100%|====| 4/4 [00:01<00:00]", warning, bar, step) == [
            f"  {warning}", f"  {step}"]
    for _ in progress_bar(range(4), "replies"):
        pass
    (line,) = emit(capsys, capsys.readouterr().out)
    assert line.startswith("  replies: 100%|") and "4/4 [00:0" in line


def test_an_interrupt_that_reaches_the_kernel_first_is_an_interrupt(write_stage):
    """So that the command says how to go on."""
    write_stage("raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        run_stage()


@pytest.mark.parametrize("evalue", ["[Errno 28] No space left on device: 'a.parquet'",
                                    "Error while serializing: I/O error: No space (os error 28)"])
def test_a_full_disk_in_a_stage_is_a_sentence(evalue, tmp_path, monkeypatch):
    def fail(notebook, output, *_, **__):
        output.touch()
        raise PapermillExecutionError(1, 1, "", "OSError", evalue, ["Traceback"])

    monkeypatch.setenv("MIG_KIT_RUNS", str(tmp_path))
    monkeypatch.setattr(papermill, "execute_notebook", fail)
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError) as error:
        execute._execute_notebook("00_preflight", "mine", {})
    assert str(error.value) == f"00_preflight: {evalue}"
