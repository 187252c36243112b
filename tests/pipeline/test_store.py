"""Run folders and parameters."""

import json
import os
import subprocess
import sys
import tomllib

import pytest
import yaml
from click.testing import CliRunner

from mig_kit.cli import cli
from mig_kit.common import PROJECT_ROOT, write_json
from mig_kit.pipeline import params, store


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MIG_KIT_RUNS", str(tmp_path))
    return tmp_path


def notebook_defaults(stage):
    import ast

    cells = json.loads((PROJECT_ROOT / "notebooks" / f"{stage}.ipynb").read_text())["cells"]
    source = next("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", ()))
    return {node.target.id: ast.literal_eval(node.value) for node in ast.parse(source).body}


@pytest.mark.parametrize("stage", store.STAGES)
def test_one_number_one_notebook_one_module_one_file(stage):
    assert (PROJECT_ROOT / "mig_kit" / f"{stage[3:]}.py").is_file()
    assert (PROJECT_ROOT / "tests" / f"test_{stage[3:]}.py").is_file()
    assert notebook_defaults(stage) == params.read_params_file(params.params_file(stage))
    profiles = ("tiny", "smoke") if stage.startswith("90") else ("tiny", "smoke", "qwen2_5_vl_3b", "qwen2_5_vl_7b")
    for profile in profiles:
        given = params.read_params_file(params.params_file(stage, profile))
        assert set(params.validate_params(given, stage)) == set(notebook_defaults(stage))


def test_unknown_and_mistyped_parameters():
    with pytest.raises(KeyError, match="did you mean 'num_generations'"):
        params.validate_params({"num_generation": 4}, "05_grpo")
    with pytest.raises(TypeError, match="must be a int"):
        params.validate_params({"num_generations": "many"}, "05_grpo")
    with pytest.raises(TypeError, match="must be a bool"):
        params.validate_params({"share_prefix": 1}, "05_grpo")
    assert type(params.validate_params({"beta": 1}, "05_grpo")["beta"]) is float
    with pytest.raises(FileNotFoundError, match="the profiles are"):
        params.params_file("05_grpo", "huge")


def test_hostile_parameter_files(tmp_path):
    bomb = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"{b}: &{b} [{', '.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi"))
    for text in (bomb, "a: {b: 1}", "- 1", "a: [", "a: !!python/object/apply:os.system ['true']", "a: \x00", "a: [[1]]"):
        (tmp_path / "x.yaml").write_text(text)
        with pytest.raises(ValueError, match="must be a flat mapping|is no YAML"):
            params.read_params_file(tmp_path / "x.yaml")


def test_what_the_injected_cell_assigns_is_checked(root):
    cells = ["", "# parameters\nseed: int = 0", "# Parameters\nsede = 3\n"]
    with pytest.raises(KeyError, match="did you mean 'seed'"):
        store.begin_stage("01_synthesize", {"In": cells, "sede": 3, "seed": 0, "other": 1})


def test_finished_skipped_and_redone(root):
    stage = store.begin_stage("00_preflight", {"run_id": "a", "memory_gib": 1.0})
    assert not store.is_up_to_date("00_preflight", "a", stage.params)
    (stage.folder / "out.txt").write_text("x")
    stage.finish({"n": 1}, hardware="test")
    assert store.is_up_to_date("00_preflight", "a", stage.params)
    assert not store.is_up_to_date("00_preflight", "a", {**stage.params, "memory_gib": 2.0})
    record = store.load_record("00_preflight", "a")
    assert record["hardware"] == "test" and "out.txt" in record["outputs"] and record["versions"]["torch"]


def test_a_killed_stage_looks_unfinished_and_keeps_what_can_be_resumed(root):
    stage = store.begin_stage("00_preflight", {"run_id": "a"})
    (stage.folder / "replies.jsonl").write_text("half")
    assert store.load_record("00_preflight", "a") is None
    assert (store.begin_stage("00_preflight", {"run_id": "a"}).folder / "replies.jsonl").is_file()
    assert not (store.begin_stage("00_preflight", {"run_id": "a", "disk_gib": 0.5}).folder / "replies.jsonl").exists()


def test_what_was_finished_is_kept_until_another_has_finished(root):
    """Another parameter that fails, or a change of mind, costs nothing."""
    stage = store.begin_stage("00_preflight", {"run_id": "a", "memory_gib": 1.0})
    (stage.folder / "out.txt").write_text("x")
    stage.finish({"n": 1}, hardware="test")
    other = store.begin_stage("00_preflight", {"run_id": "a", "memory_gib": 2.0})
    assert not (other.folder / "out.txt").exists() and (root / "a" / "00_preflight.before" / "out.txt").read_text() == "x"
    store.unlock_run(root / "a")
    assert not store.restore_outputs("00_preflight", "a", other.params)
    assert store.restore_outputs("00_preflight", "a", stage.params) and store.is_up_to_date("00_preflight", "a", stage.params)
    assert (stage.folder / "out.txt").read_text() == "x" and not (root / "a" / "00_preflight.before").exists()
    store.begin_stage("00_preflight", {"run_id": "a", "memory_gib": 2.0}).finish({"n": 2}, hardware="test")
    assert not (root / "a" / "00_preflight.before").exists() and not store.restore_outputs("00_preflight", "a", stage.params)


def test_what_was_made_and_is_gone_is_made_again(root):
    stage = store.begin_stage("00_preflight", {"run_id": "a"})
    (stage.folder / "out.txt").write_text("x")
    stage.finish({"n": 1}, hardware="test")
    (stage.folder / "out.txt").unlink()
    assert not store.is_up_to_date("00_preflight", "a", stage.params)


def test_another_model_or_control_run_is_another_stage(root):
    (root / "model").mkdir()
    (root / "model" / "model.safetensors").write_bytes(b"one")
    made = {}
    for run_id, stage in (("a", "03_merge"), ("a", "05_grpo"), ("b", "03_merge")):
        (root / run_id / stage).mkdir(parents=True, exist_ok=True)
        made[run_id, stage] = root / run_id / stage / "run.json"
        made[run_id, stage].write_text(json.dumps({"outputs": {"x": "1"}}))
    given = params.validate_params({"control_run": "b", "base_model": str(root / "model")}, "06_evaluate")
    keys = [store.stage_key("06_evaluate", "a", given)]
    (root / "model" / "model.safetensors").write_bytes(b"two")
    keys.append(store.stage_key("06_evaluate", "a", given))
    made["b", "03_merge"].write_text(json.dumps({"outputs": {"x": "2"}}))
    keys.append(store.stage_key("06_evaluate", "a", given))
    assert len(set(keys)) == 3
    made["b", "03_merge"].unlink()
    with pytest.raises(FileNotFoundError, match="06_evaluate needs 03_merge of run 'b'"):
        store.stage_key("06_evaluate", "a", given)
    assert store.model_fingerprint("Qwen/Qwen2.5-VL-7B-Instruct") == {} and "model.safetensors" in store.model_fingerprint("tiny")


def test_results_of_what_was_run_anew_since_are_known(root):
    inputs = {"03_merge": {"m": "1", "metrics.json": "b"}, "04_rejection_sampling": {"k": "0"}}
    for stage, record in (("03_merge", {"outputs": {"m": "1", "metrics.json": "a"}}),
                          ("04_rejection_sampling", {"outputs": {"k": "1"}}), ("05_grpo", {"inputs": inputs})):
        (root / "a" / stage).mkdir(parents=True)
        (root / "a" / stage / "run.json").write_text(json.dumps(record))
    assert store.find_stale_input("05_grpo", "a") == "04_rejection_sampling" and store.find_stale_input("04_rejection_sampling", "a") == ""


def test_a_slow_git_is_none(root, monkeypatch):
    def slow(*given, **more):
        raise subprocess.TimeoutExpired("git", 20)

    monkeypatch.setattr(subprocess, "run", slow)
    assert store.git_revision() == ""


def test_a_relative_folder_of_runs_is_the_projects(monkeypatch):
    monkeypatch.setenv("MIG_KIT_RUNS", "mine")
    assert store.runs_root() == PROJECT_ROOT / "mine"


def test_a_number_without_a_point_is_a_number():
    assert params.validate_params({"learning_rate": "1e-5"}, "05_grpo")["learning_rate"] == 1e-5
    with pytest.raises(TypeError, match="must be a float"):
        params.validate_params({"learning_rate": "small"}, "05_grpo")


def test_a_missing_stage_names_the_command(root):
    with pytest.raises(FileNotFoundError, match="mig-kit run 01_synthesize --run-id a"):
        store.begin_stage("02_sft", {"run_id": "a"})
    with pytest.raises(ValueError, match="run_id"):
        store.begin_stage("00_preflight", {"run_id": "../a"})


def test_two_writers_of_one_run(root):
    """A second process is refused while the first is in a stage, and let in when it has finished or was killed."""
    code = ("import sys, time; from mig_kit import runs; stage = runs.begin('00_preflight', {'run_id': 'a'})\n"
            "print('in', flush=True)\nif sys.argv[1] == 'finish': stage.finish({})\nelse: time.sleep(60)")
    environment = {**os.environ, "MIG_KIT_RUNS": str(root)}
    first = subprocess.Popen([sys.executable, "-c", code, "stay"], env=environment, stdout=subprocess.PIPE, text=True)
    assert first.stdout.readline() == "in\n"
    with pytest.raises(RuntimeError, match=f"'a' is being written by process {first.pid}; wait for it"):
        store.lock_run(root / "a", 0.2)
    store.begin_stage("00_preflight", {"run_id": "b"})  # another run is free
    refused = CliRunner().invoke(cli, ["run", "00", "--run-id", "a"])
    assert isinstance(refused.exception, RuntimeError) and "another --run-id" in str(refused.exception)
    first.kill()
    first.wait()
    second = subprocess.run([sys.executable, "-c", code, "finish"], env=environment, capture_output=True, text=True)
    assert second.returncode == 0, second.stderr
    store.lock_run(root / "a", 0.0)
    store.unlock_run(root / "a")


def test_a_clock_that_jumps_back_gives_no_negative_time(root, monkeypatch):
    stage = store.begin_stage("00_preflight", {"run_id": "a"})
    monkeypatch.setattr(store.time, "time", lambda: 0.0)
    stage.finish({"n": 1})
    assert 0 <= store.load_record("00_preflight", "a")["seconds"] < 60
    assert store.is_up_to_date("00_preflight", "a", stage.params)


def test_a_full_disk_leaves_the_old_file_and_no_finished_stage(tmp_path, monkeypatch):
    """On a tmpfs of one MiB, where this user may mount one."""
    small = tmp_path / "small"
    small.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        monkeypatch.setenv("MIG_KIT_RUNS", str(small))
        stage = store.begin_stage("00_preflight", {"run_id": "a"})
        write_json(small / "old.json", {"kept": True})
        (small / "filler").write_bytes(b"x" * (2**20 - 40_000))
        with pytest.raises(OSError, match="No space left"):
            write_json(small / "old.json", {"data": "y" * 100_000})
        assert json.loads((small / "old.json").read_text()) == {"kept": True}
        with pytest.raises(OSError, match="No space left"):
            stage.finish({"data": "y" * 100_000})
        assert store.load_record("00_preflight", "a") is None
        (small / "filler").unlink()
        store.begin_stage("00_preflight", {"run_id": "a"}).finish({"n": 1})
        assert store.load_record("00_preflight", "a")
    finally:
        store.unlock_run(small / "a")
        subprocess.run(["umount", str(small)], check=True)


def test_code_is_part_of_the_key():
    files = {path.name for path in store.code_files("05_grpo")}
    assert {"grpo.py", "rewards.py", "generation.py", "log_probabilities.py", "prompts.py"} <= files and "report.py" not in files


def test_environment_and_pins_agree():
    pins = tomllib.loads((PROJECT_ROOT / "pyproject.toml").read_text())["project"]
    torch = next(p for p in pins["dependencies"] if p.startswith("torch=="))
    assert all("==" in p for p in pins["dependencies"] + pins["optional-dependencies"]["test"])
    environment = yaml.safe_load((PROJECT_ROOT / "environment.yml").read_text())
    assert environment["dependencies"][-1]["pip"] == [torch, "-e .[test]"]
    assert torch in (PROJECT_ROOT / "Makefile").read_text()
    assert "python=3.11" in environment["dependencies"] and pins["requires-python"].startswith(">=3.11")
