"""`mig-kit run`: what it refuses before any kernel starts, what it prints, why a stage failed."""

import errno
import logging
import shutil

import nbformat
import pytest
import torch
from command_line import error_of, output_of
from IPython.core.ultratb import AutoFormattedTB
from papermill.exceptions import PapermillExecutionError

from mig_kit.commands import main as cli_module
from mig_kit.common import PROJECT_ROOT, progress_bar
from mig_kit.pipeline import execute, joint_rules, params, plan
from mig_kit.pipeline.processes import describe_exit, describe_os_error
from mig_kit.stages.evaluated_runs import read_recorded


def test_a_single_digit_names_a_stage():
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


def start_run(leave, profile, **changes):
    values = params.profile_params(params.RUN_PARAMS_STAGE, profile)
    leave(params.RUN_PARAMS_STAGE, "default",
          **{name: values[name] for name in params.RUN_PARAMS} | changes)


NEXT = "05_grpo needs 03_merge"  # what else keeps 05 from going on


@pytest.mark.parametrize(("first", "changes", "then", "sentence"), [
    ("qwen2_5_vl_3b", {}, "qwen2_5_vl_7b", "Qwen2.5-VL-3B-Instruct, and profile 'qwen2_5_vl_7b'"),
    ("qwen2_5_vl_3b", {}, "tiny", "Qwen/Qwen2.5-VL-3B-Instruct, and profile 'tiny' tiny"),
    ("tiny", {}, "qwen2_5_vl_7b", "'default' has the base_model tiny, and profile 'qwen2_5_vl_7b'"),
    ("smoke", {}, "smoke", NEXT), ("qwen2_5_vl_3b", {}, "qwen2_5_vl_3b", NEXT),
    ("smoke", {"coordinates": "normalized_1000"}, "smoke", NEXT),
    ("tiny", {"max_pixels": 99999}, "tiny", NEXT)])
def test_a_run_goes_on_with_its_own_profile_alone(root, leave, first, changes, then, sentence):
    start_run(leave, first, **changes)
    refusal = error_of("run", "05", "--profile", then, "--run-id", "default", "-p", "device", "cpu")
    assert sentence in refusal and "--run-id" in refusal
    assert not (root / "default" / "05_grpo").exists()


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
    ((), "would train a full model on synthetic scenes; name the file of your data (-p"),
    (("-p", "data", "scenes"), "'qwen2_5_vl_7b' needs a GPU, and PyTorch"),
    (("02",), "'qwen2_5_vl_7b' needs a GPU, and PyTorch"),
    (("01",), "say -p data scenes to train on them"),
    (("-p", "device", "cpu"), "say -p data scenes to train on them"),
    (("01", "02"), "say -p data scenes to train on them")])
def test_the_command_refuses_a_full_profile_before_anything_is_written(root, monkeypatch, words,
                                                                       sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert sentence in error_of("run", *words, "--profile", "qwen2_5_vl_7b")
    assert not any(root.iterdir())


@pytest.mark.parametrize(("words", "has_gpu"), [
    (("01", "02", "-p", "data", "scenes"), True),
    (("01", "02", "-p", "data", "scenes", "-p", "device", "cpu"), False),
    (("00", "--run-id", "default"), False), (("01", "-p", "data", "scenes"), False)])
def test_the_command_starts_a_full_profile_where_data_and_gpu_are_there(root, leave, monkeypatch,
                                                                        words, has_gpu):
    """00 needs neither, and no run of the same profile."""
    started = []
    start_run(leave, "tiny")
    monkeypatch.setattr(execute, "run_stages", lambda params, *more: started.extend(params))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    output_of("run", *words, "--profile", "qwen2_5_vl_7b")
    assert [stage[:2] for stage in started] == [word for word in words if word.isdigit()]


@pytest.fixture
def write_stage(tmp_path, monkeypatch):
    """Call it with cells for the folder of a run whose 00 has them; braces are in its path."""
    folder = tmp_path / "{seed} {x}"
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


def test_the_next_kernel_is_started_ahead_and_none_is_left(write_stage):
    """One that has died meanwhile is replaced."""
    folder = write_stage("import os, sys; os.makedirs('runs/a/00_preflight', exist_ok=True)",
                         "print(os.getpid(), '' in sys.path, 'trl' in sys.modules, "
                         "os.environ['MPLBACKEND'])")

    def run() -> list[str]:
        execute._execute_notebook("00_preflight", "a", {"seed": 1}, execute.StageLines())
        notebook = nbformat.read(folder / "runs" / "a" / "00_preflight" / "00_preflight.ipynb", 4)
        return notebook.cells[-1].outputs[0].text.split()

    kernels = execute.ThisPython
    backend = "module://matplotlib_inline.backend_inline"
    kernels.starts_next = True
    try:
        assert run()[1:] == ["True", "False", backend]
        ahead = kernels.waiting
        assert run() == [str(ahead.pid), "True", "True", backend]
        assert ahead.poll() is not None
        kernels.waiting.kill()
        kernels.waiting.wait()
        assert run()[1:] == ["True", "False", backend]
        ahead = kernels.waiting
    finally:
        kernels.starts_next = False
        kernels.stop_waiting()
    assert ahead.poll() is not None and kernels.waiting is None


def test_a_killed_kernel_is_named_and_leaves_its_figures(write_stage, monkeypatch):
    """Under another backend than notebooks'."""
    folder = write_stage("import os, matplotlib.pyplot as plt", "plt.plot([1, 2]);",
                         "os.kill(os.getpid(), 9)")
    monkeypatch.setenv("MPLBACKEND", "Agg")
    with pytest.raises(RuntimeError, match=r"00_preflight failed: its kernel was ended by signal 9 "
                                           r"\(Killed\); the system ends so what takes too much"):
        execute._execute_notebook("00_preflight", "a", {"seed": 1}, execute.StageLines())
    assert '"image/png"' in (folder / "runs" / "a" / "00_preflight.failed.ipynb").read_text()


def fail_in_cell(error: Exception, folder) -> str:
    try:
        raise error
    except type(error) as raised:
        traceback = AutoFormattedTB(mode="Context").structured_traceback(
            type(raised), raised, raised.__traceback__)
    failure = PapermillExecutionError(0, 1, "", type(error).__name__, str(error), traceback)
    return execute.failure_sentence(failure, folder / "x.ipynb")


def test_an_error_has_a_sentence_whatever_it_says(tmp_path):
    assert fail_in_cell(ValueError("too few"), tmp_path) == "ValueError: too few"
    assert fail_in_cell(AssertionError(), tmp_path) == "AssertionError at: raise error"
    # a cell whose error is not among its outputs
    silent = PapermillExecutionError(0, 7, "", "CellExecutionError", "", [])
    assert execute.failure_sentence(silent, tmp_path / "x.ipynb") == (
        "cell 7 ended without a word; look at it")


@pytest.mark.parametrize("error", [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"),
    RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")])
def test_a_full_disk_says_how_much_is_free_and_that_work_goes_on(tmp_path, error):
    sentence = fail_in_cell(error, tmp_path)
    assert sentence.startswith(f"the disk of {tmp_path} is full, ")
    assert " MB are free; make room and give the same command, which goes on" in sentence
    assert str(error) in sentence


def test_other_errors_stay_as_they_are(tmp_path):
    quoted = RuntimeError("the server ended with status 126; its log:\nPermission denied")
    assert fail_in_cell(quoted, tmp_path) == f"RuntimeError: {quoted}"
    full = OSError(errno.ENOSPC, "No space left on device", f"{tmp_path}/a")
    assert describe_os_error(full).startswith(f"the disk of {tmp_path} is full, ")
    assert describe_os_error(FileNotFoundError("no run 'a'; see status")) == (
        "no run 'a'; see status")


@pytest.mark.parametrize(("status", "sentence"), [
    (-9, "was ended by signal 9 (Killed); the system ends so what takes too much memory"),
    (137, "was ended by signal 9 (Killed); the system ends"), (-11, "was ended by signal 11 (Seg"),
    (3, "ended with status 3"), (None, "ended with status unknown"),
    (255, "ended with status 255")])
def test_a_process_that_ended_names_its_signal(status, sentence):
    assert describe_exit(status).startswith(sentence)


def emit(capsys, *messages: str) -> list[str]:
    lines = execute.StageLines()
    for message in messages:
        lines.emit(logging.LogRecord("x", logging.INFO, "", 0, message, None, None))
    return capsys.readouterr().out.splitlines()


def test_a_stage_has_its_lines(capsys):
    lines = execute.StageLines()
    for state in (("01", "up to date"), ("02", "running"), ("02", "done", "loss 2.00 -> 0.50")):
        lines.set(*state)
    assert capsys.readouterr().out.splitlines() == [
        "01: up to date", "02: running", "02: done in 0.0 min; loss 2.00 -> 0.50"]


def test_a_training_leaves_a_line_per_fifth(capsys):
    steps = [f"step {step}/100: loss 1.0; 1.0 min left" for step in range(0, 101, 5)]
    assert emit(capsys, *steps) == [f"  {steps[number]}" for number in (4, 8, 12, 16, 20)]


def test_a_stage_tells_of_news_and_of_a_bars_end_alone(capsys):
    """Not of what libraries print for their own sake."""
    news = "the server http://a:1/v1 is left out (ConnectError); 1 go on"
    warning = "warning: none of the first 128 replies earned anything for box"
    bar = "\rrollouts:  40%|==    | 4/10 [00:02<00:03]"
    assert emit(
        capsys, "Executing Cell 7---", "a/b.py:1: FutureWarning: deprecated", "UserWarning: old",
        "Loading weights: 100%|====| 4/4 [00:01<00:00]", warning, news, f"{bar}{news}", bar) == [
            f"  {warning}", f"  {news}", f"  {news}"]
    for _ in progress_bar(range(4), "replies"):
        pass
    (line,) = emit(capsys, capsys.readouterr().out)
    assert line.startswith("  replies: 100%|") and "4/4 [00:0" in line
