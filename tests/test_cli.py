"""The command line's sentences."""

import json

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
    (("run", "01", "--run-id", "a/b"), "run_id is 'a/b'; use letters"),
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
