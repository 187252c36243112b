"""Runs without a cold start: which stages they have, and what they may start RL from."""

import json

import pytest

from mig_kit.common import PROJECT_ROOT
from mig_kit.pipeline import branches, cold_start, execute, store
from mig_kit.pipeline.params import validate_params

OWN = (("data", "own"), ("data_file", "x.jsonl"), ("teacher", "none"), ("start_from", "base"))


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty folder of runs."""
    monkeypatch.setenv("MIG_KIT_RUNS", str(tmp_path))
    return tmp_path


def leave_record(root, stage, **values):
    folder = root / "a" / stage
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(
        {"params": validate_params(values, stage), "key": "k", "outputs": {"x": "1"}}))


def planned_stages(names, overrides, run_id="a"):
    (plan,) = execute.plan_runs(names, "tiny", run_id, "", [], overrides)
    return [stage[:2] for stage in plan.params]


def test_without_a_teacher_02_and_03_are_left_out(root):
    assert planned_stages([], OWN) == ["00", "01", "04", "05", "06", "07"]
    assert planned_stages([], (*OWN, ("traces_file", "x"))) == [f"0{n}" for n in range(8)]
    assert planned_stages([], ()) == [f"0{n}" for n in range(8)]
    assert planned_stages(["01_synthesize"], OWN[:3]) == ["01"]
    leave_record(root, "01_synthesize", teacher="none")
    assert planned_stages(["05_grpo", "06_evaluate"], OWN[3:]) == ["05", "06"]
    assert planned_stages(["02_sft"], ()) == ["02"], "named, it runs and says why not"


def test_rl_without_a_cold_start_starts_from_the_base(root):
    with pytest.raises(ValueError, match="set start_from to base, for RL alone, or teacher to own"):
        planned_stages([], OWN[:3])
    with pytest.raises(ValueError, match="start_from is 'adapter'; set start_from to base"):
        planned_stages([], (*OWN[:3], ("start_from", "adapter")))
    leave_record(root, "01_synthesize", teacher="none")
    with pytest.raises(ValueError, match="set start_from to base"):
        planned_stages(["05_grpo"], ())
    cold_start.check_start("base", has_sft=False)
    cold_start.check_start("merged", has_sft=True)


def test_what_a_stage_builds_on(root):
    assert store.input_stages("06_evaluate", "a", {}) == ("01_synthesize", "03_merge", "05_grpo")
    leave_record(root, "01_synthesize", teacher="none")
    assert not store.has_cold_start("a")
    assert store.input_stages("04_rejection_sampling", "a", {}) == ("01_synthesize",)
    assert store.input_stages("05_grpo", "a", {}) == ("04_rejection_sampling",)
    assert store.input_stages("06_evaluate", "a", {}) == ("01_synthesize", "05_grpo")
    assert store.input_stages("03_merge", "a", {}) == ("02_sft",)
    leave_record(root, "03_merge")
    assert store.has_cold_start("a"), "02 learnt from a traces_file"
    assert store.input_stages("05_grpo", "a", {}) == ("03_merge", "04_rejection_sampling")


def test_a_run_of_an_older_version_has_the_default_orientation(root):
    leave_record(root, "01_synthesize", orientation="refuse")
    assert store.run_params("a", "05_grpo")["orientation"] == "refuse"
    path = root / "a" / "01_synthesize" / "run.json"
    record = json.loads(path.read_text())
    del record["params"]["orientation"]
    path.write_text(json.dumps(record))
    assert store.run_params("a", "05_grpo")["orientation"] == "upright"


def test_paths_are_relative_to_where_the_command_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "merged").mkdir()
    here = str(tmp_path)
    assert execute.locate_path("data_file", "own.jsonl") == f"{here}/own.jsonl"
    assert execute.locate_path("image_root", "../images") == str(tmp_path.parent / "images")
    assert execute.locate_path("data_file", "/x/own.jsonl") == "/x/own.jsonl"
    assert execute.locate_path("base_model", "model") == f"{here}/model"
    assert execute.locate_path("start_from", "merged") == "merged", "a word, not the folder"
    assert execute.locate_path("base_model", "Qwen/Qwen2.5-VL-3B-Instruct") == (
        "Qwen/Qwen2.5-VL-3B-Instruct")
    assert execute.locate_path("data_file", "") == "" and execute.locate_path("curate", "x") == "x"
    monkeypatch.chdir(PROJECT_ROOT / "tests")
    assert execute.locate_path("traces_file", "a/b.parquet") == "tests/a/b.parquet"
    assert execute.parse_overrides((("data_file", "x.jsonl"),), ["01_synthesize"]) == {
        "data_file": "tests/x.jsonl"}


def test_a_branch_of_a_run_without_a_cold_start(root):
    leave_record(root, "01_synthesize", teacher="none")
    with pytest.raises(FileNotFoundError, match="run 'a' has no finished 04_rejection_sampling"):
        branches.check_branch("a", "b", ["05_grpo"])
    leave_record(root, "04_rejection_sampling")
    branches.start_branch("a", "b", "05_grpo")
    assert not store.has_cold_start("b")
    assert store.input_stages("05_grpo", "b", {}) == ("04_rejection_sampling",)
    assert planned_stages([], OWN[3:], run_id="b") == ["00", "05", "06", "07"]
