"""Run folders and parameters."""

import json
import tomllib

import pytest
import yaml

from mig_kit import runs


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MIG_KIT_RUNS", str(tmp_path))
    return tmp_path


def notebook_defaults(stage):
    import ast

    cells = json.loads((runs.ROOT / "notebooks" / f"{stage}.ipynb").read_text())["cells"]
    source = next("".join(c["source"]) for c in cells if "parameters" in c["metadata"].get("tags", ()))
    return {node.target.id: ast.literal_eval(node.value) for node in ast.parse(source).body}


@pytest.mark.parametrize("stage", runs.STAGES)
def test_one_number_one_notebook_one_module_one_file(stage):
    assert (runs.ROOT / "mig_kit" / f"{stage[3:]}.py").is_file()
    assert (runs.ROOT / "tests" / f"test_{stage[3:]}.py").is_file()
    assert notebook_defaults(stage) == runs.read_params(runs.params_file(stage))
    profiles = ("tiny", "smoke") if stage.startswith("90") else ("tiny", "smoke", "qwen2_5_vl_3b", "qwen2_5_vl_7b")
    for profile in profiles:
        given = runs.read_params(runs.params_file(stage, profile))
        assert set(runs.checked(given, stage)) == set(notebook_defaults(stage))


def test_unknown_and_mistyped_parameters():
    with pytest.raises(KeyError, match="did you mean 'num_generations'"):
        runs.checked({"num_generation": 4}, "05_grpo")
    with pytest.raises(TypeError, match="must be a int"):
        runs.checked({"num_generations": "many"}, "05_grpo")
    with pytest.raises(TypeError, match="must be a bool"):
        runs.checked({"share_prefix": 1}, "05_grpo")
    assert type(runs.checked({"beta": 1}, "05_grpo")["beta"]) is float
    with pytest.raises(FileNotFoundError, match="the profiles are"):
        runs.params_file("05_grpo", "huge")


def test_what_the_injected_cell_assigns_is_checked(root):
    cells = ["", "# parameters\nseed: int = 0", "# Parameters\nsede = 3\n"]
    with pytest.raises(KeyError, match="did you mean 'seed'"):
        runs.begin("01_synthesize", {"In": cells, "sede": 3, "seed": 0, "other": 1})


def test_finished_skipped_and_redone(root):
    stage = runs.begin("00_preflight", {"run_id": "a", "memory_gib": 1.0})
    assert not runs.up_to_date("00_preflight", "a", stage.params)
    (stage.folder / "out.txt").write_text("x")
    stage.finish({"n": 1}, hardware="test")
    assert runs.up_to_date("00_preflight", "a", stage.params)
    assert not runs.up_to_date("00_preflight", "a", {**stage.params, "memory_gib": 2.0})
    record = runs.finished("00_preflight", "a")
    assert record["hardware"] == "test" and "out.txt" in record["outputs"] and record["versions"]["torch"]


def test_a_killed_stage_looks_unfinished_and_keeps_what_can_be_resumed(root):
    stage = runs.begin("00_preflight", {"run_id": "a"})
    (stage.folder / "replies.jsonl").write_text("half")
    assert runs.finished("00_preflight", "a") is None
    assert (runs.begin("00_preflight", {"run_id": "a"}).folder / "replies.jsonl").is_file()
    assert not (runs.begin("00_preflight", {"run_id": "a", "disk_gib": 0.5}).folder / "replies.jsonl").exists()


def test_a_missing_stage_names_the_command(root):
    with pytest.raises(FileNotFoundError, match="mig-kit run 01_synthesize --run-id a"):
        runs.begin("02_sft", {"run_id": "a"})
    with pytest.raises(ValueError, match="run_id"):
        runs.begin("00_preflight", {"run_id": "../a"})


def test_code_is_part_of_the_key():
    files = {path.name for path in runs.code_files("05_grpo")}
    assert {"grpo.py", "rewards.py", "generation.py", "prompts.py"} <= files and "report.py" not in files


def test_environment_and_pins_agree():
    pins = tomllib.loads((runs.ROOT / "pyproject.toml").read_text())["project"]
    torch = next(p for p in pins["dependencies"] if p.startswith("torch=="))
    assert all("==" in p for p in pins["dependencies"] + pins["optional-dependencies"]["test"])
    environment = yaml.safe_load((runs.ROOT / "environment.yml").read_text())
    assert environment["dependencies"][-1]["pip"] == [torch, "-e .[test]"]
    assert torch in (runs.ROOT / "Makefile").read_text()
    assert "python=3.11" in environment["dependencies"] and pins["requires-python"].startswith(">=3.11")
