"""The command line's sentences."""

import errno
import json
import os
from pathlib import Path
from unittest.mock import Mock

import pytest
from click.testing import CliRunner
from command_line import output_of, run_mig_kit
from filelock import FileLock

from mig_kit.commands.main import cli
from mig_kit.pipeline import run_folders
from mig_kit.world.tasks import make_sample


@pytest.mark.parametrize("words,sentence", [
    (("run", "05", "-p", "num_generation", "4"), "did you mean 'num_generations'"),
    (("run", "05", "-p", "zzz", "4"), "05_grpo has no parameter 'zzz'; its parameters are"),
    (("run", "02", "-p", "min_pixels", "1"), "'min_pixels' is set once per run, in 01_synthesize"),
    (("run", "01", "-p", "data_shares", "[0.4,1"), "is '[0.4,1': Input should be a valid list"),
    (("run", "01", "-p", "run_id", "b"), "use --run-id"),
    (("run", "05", "-p", "top_p", "0.9"), 'is written as -p trl "{NAME: VALUE}"'),
    (("run", "05", "-p", "reward_weights", "{box:2}"), "reward_weights.box:2 is None: Input"),
    (("run", "05", "-p", "beta=0.1"), "Option '-p' requires 2 arguments"),
    (("run", "99"), "no stage '99'"),
    (("eval", "--model", "tiny", "--out", "x", "--suite", "blnk"), "is not one of 'drawn', 'own'"),
    (("run", "--profile", "huge"), "the profiles are tiny, "),
])
def test_bad_input_is_one_sentence(words, sentence, tmp_path, monkeypatch):
    monkeypatch.setenv("MIG_KIT_RUNS", str(tmp_path))
    result = CliRunner().invoke(cli, words)
    assert result.exit_code
    assert sentence in f"{result.output} {result.exception}"
    assert not any(tmp_path.rglob("*.ipynb")), "nothing is written before all is checked"


def test_a_sentence_is_all_that_a_process_says_and_a_bug_its_traceback(tmp_path, monkeypatch):
    result = run_mig_kit("status", "nowhere", MIG_KIT_RUNS=str(tmp_path))
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("mig-kit: no run 'nowhere'")
    monkeypatch.setattr(run_folders, "list_runs", lambda: [][0])
    with pytest.raises(IndexError):
        run_mig_kit("status", MIG_KIT_RUNS=str(tmp_path))


@pytest.mark.parametrize("runs", ["{tmp}/file", "{tmp}/file/below"])
@pytest.mark.parametrize("words", [("status",), ("run", "00"), ("rm", "default")])
def test_a_place_that_can_hold_no_runs_is_one_sentence(runs, words, tmp_path):
    (tmp_path / "file").touch()
    result = run_mig_kit(*words, MIG_KIT_RUNS=runs.format(tmp=tmp_path))
    assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
    assert "which is no folder and cannot be one; set it to a folder for runs" in result.stderr


@pytest.mark.parametrize("words", [
    ("table", "mine", "--figure", "nodir/x.png"), ("data", "check", __file__, "--out", "nodir/x"),
    ("eval", "--model", "tiny", "--out", "file/x")])
def test_where_to_write_is_tried_before_all_else(words, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(cli, words)
    assert "is no folder that can be written in" in result.output and result.exit_code == 2


def test_an_error_of_the_disk_is_a_sentence_with_its_path(tmp_path, monkeypatch):
    for name, words in (("a.json", "'a.json'"), (None, f"runs are in {tmp_path}")):
        error = OSError(errno.ENOSPC, "No space left on device", name)
        monkeypatch.setattr(run_folders, "list_runs", Mock(side_effect=error))
        result = run_mig_kit("status", MIG_KIT_RUNS=str(tmp_path))
        assert result.returncode == 1 and len(result.stderr.splitlines()) == 1
        assert "No space left on device" in result.stderr and words in result.stderr


def test_a_lock_is_read_without_the_right_to_write(tmp_path, monkeypatch):
    """As of another user; on a mount to read only none is taken."""
    (tmp_path / "lock").touch()
    modes = []

    def note(path, mode="r"):
        modes.append(mode)
        return open(path, mode)

    monkeypatch.setattr(Path, "open", note)
    assert not run_folders.is_locked(tmp_path)
    with FileLock(tmp_path / "lock"):
        assert run_folders.is_locked(tmp_path)
    assert modes == ["r", "r"]
    with FileLock(tmp_path / "lock"):
        monkeypatch.setattr("os.statvfs", lambda path: Mock(f_flag=os.ST_RDONLY))
        assert not run_folders.is_locked(tmp_path)
    assert modes == ["r", "r"]


def test_an_interrupt_prints_the_command_that_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folders, "list_runs", Mock(side_effect=KeyboardInterrupt))
    result = run_mig_kit("status", "my run", MIG_KIT_RUNS=str(tmp_path))
    assert "this goes on where it stopped: mig-kit status 'my run'" in result.stderr


@pytest.mark.parametrize(("model", "sentence"), [
    ("mine/sfft", "run 'mine' has no model 'sfft'; its models are mine/base, mine/sft, mine/grpo"),
    ("{tmp}/empty", "config.json of"), ("{tmp}/adapter", "holds an adapter (adapter_config.json)")])
def test_what_is_no_model_is_one_sentence_without_the_hub(model, sentence, tmp_path, monkeypatch):
    for name in ("runs/mine", "empty", "adapter"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    result = run_mig_kit("eval", "--model", model.format(tmp=tmp_path), "--out",
                         str(tmp_path / "out"), MIG_KIT_RUNS=str(tmp_path / "runs"))
    assert sentence in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_run_that_is_being_written_is_not_asked_about(tmp_path, monkeypatch):
    """Nor is the stage that runs called unfinished without a word of it."""
    monkeypatch.setattr(run_folders.lock_run, "__defaults__", (0.2,))
    (tmp_path / "mine" / "01_synthesize").mkdir(parents=True)
    (tmp_path / "mine" / "01_synthesize" / "run.json").write_text('{"params": {}, "outputs": {}}')
    with FileLock(tmp_path / "mine" / "lock"):
        result = run_mig_kit("rm", "mine", MIG_KIT_RUNS=str(tmp_path))
        assert "is being written by another process" in result.stderr and not result.stdout
        result = run_mig_kit("run", "06", "--run-id", "mine", MIG_KIT_RUNS=str(tmp_path))
    assert "which has not finished, and a process is running in that run" in result.stderr


def test_status_without_a_run_says_what_to_type(tmp_path):
    output = output_of("status", MIG_KIT_RUNS=str(tmp_path))
    assert f"no run in {tmp_path} yet; mig-kit run makes one" in output


def test_status_shows_stages_and_scores(tmp_path, monkeypatch):
    monkeypatch.setenv("MIG_KIT_RUNS", str(tmp_path))
    for stage, seconds in (("05_grpo", 90.0), ("06_evaluate", 90.0), ("07_report", 6.0)):
        (tmp_path / "run" / stage).mkdir(parents=True)
        record = {"seconds": seconds, "params": {}, "facts": {}}
        (tmp_path / "run" / stage / "run.json").write_text(json.dumps(record))
    systems = {name: {"mig_bench": {"score": score, "n": 40}}
               for name, score in (("base", 1.0), ("sft", 40.0), ("grpo", 55.5))}
    (tmp_path / "run" / "06_evaluate" / "metrics.json").write_text(json.dumps({"systems": systems}))
    line, = output_of("status").splitlines()
    assert line == ("run (by hand); 05 06 07 done; 05 06 07 stale; MIG-Bench-like (drawn) 1.0 / "
                    "40.0 / 55.5 (base / sft / grpo; n = 40)")
    output = output_of("status", "run")
    lines = {line.split()[0]: line for line in output.splitlines()[1:]}
    assert "done in 1.5 min" in lines["05_grpo"] and "02_sft" not in lines
    assert "base 1.0, sft 40.0, grpo 55.5 (n = 40)" in output
    assert "stale, 07_report: 07_report needs 01_synthesize of run 'run'" in lines["07_report"]


def test_ground_names_a_broken_image(tmp_path):
    (tmp_path / "a.png").write_bytes(b"no picture")
    result = CliRunner().invoke(cli, ["ground", "--model", str(tmp_path), "--image",
                                      str(tmp_path / "a.png"), "Where?"])
    assert result.exit_code and "cannot identify image" in str(result.exception)


@pytest.mark.slow
def test_ground_answers(tmp_path):
    sample = make_sample("refer_grounding", "val", 0)
    options = ["--model", "tiny", "--out", str(tmp_path / "out.png")]
    for number, image in enumerate(sample.images):
        image.save(tmp_path / f"{number}.png")
        options += ["--image", str(tmp_path / f"{number}.png")]
    output = output_of("ground", *options, "Find the red star in image 2.")
    assert "reasoning:" in output and ("image:" in output or "the model said" in output)
