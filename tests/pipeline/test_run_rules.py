"""What stages make for each other decides: runs without a cold start, and too few prompts."""

import json
from functools import partial

import pyarrow.parquet
import pytest
from command_line import error_of

from mig_kit.common import PROJECT_ROOT
from mig_kit.pipeline import execute, plan, run_folders, store
from mig_kit.pipeline.joint_rules import validate_params
from mig_kit.pipeline.run_folders import RECIPE

refuse = partial(error_of, "run", "--run-id", "a")
OWN = (("data", "README.md"), ("teacher", "none"), ("start_from", "base"))


@pytest.fixture
def root(tmp_path, monkeypatch):
    """An empty folder of runs; paths are relative to the project."""
    monkeypatch.chdir(PROJECT_ROOT)
    monkeypatch.setenv("MIG_KIT_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs"


def leave_record(root, stage, **values):
    folder = root / "a" / stage
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(
        {"params": validate_params(values, stage), "key": "k", "outputs": {"x": "1"},
         "summary": ""}))


def planned_stages(names, overrides, run_id="a"):
    (planned,) = plan.plan_runs(names, "tiny", run_id, "", [], overrides)
    return [stage[:2] for stage in planned.params]


def test_without_a_teacher_02_and_03_are_left_out(root):
    assert planned_stages([], OWN) == ["00", "01", "04", "05", "06", "07"]
    assert planned_stages([], ()) == [f"0{n}" for n in range(8)]
    assert planned_stages(["01_synthesize"], OWN[:2]) == ["01"]
    leave_record(root, "01_synthesize", teacher="none")
    assert planned_stages(["05_grpo", "06_evaluate"], OWN[2:]) == ["05", "06"]
    with pytest.raises(ValueError, match="'none', but there is no cold-start set to learn from"):
        planned_stages(["02_sft"], ())


def test_rl_without_a_cold_start_starts_from_the_base(root):
    with pytest.raises(ValueError, match="set start_from to base, for RL alone, or teacher to own"):
        planned_stages([], OWN[:2])
    with pytest.raises(ValueError, match="start_from is 'adapter', .*; set start_from to base"):
        planned_stages([], (*OWN[:2], ("start_from", "adapter")))
    leave_record(root, "01_synthesize", teacher="none")
    with pytest.raises(ValueError, match="set start_from to base"):
        planned_stages(["05_grpo"], ())
    with pytest.raises(ValueError, match="set start_from to base"):
        store.begin_stage("05_grpo", {"run_id": "a"})
    assert planned_stages(["05_grpo"], OWN[2:]) == ["05"]


def test_what_a_stage_builds_on(root):
    assert store.input_stages("06_evaluate", "a", {}) == ("01_synthesize", "03_merge", "05_grpo")
    leave_record(root, "01_synthesize", teacher="none")
    assert not store.has_cold_start("a")
    assert store.input_stages("04_rejection_sampling", "a", {}) == ("01_synthesize",)
    assert store.input_stages("05_grpo", "a", {}) == ("04_rejection_sampling",)
    assert store.input_stages("06_evaluate", "a", {}) == ("01_synthesize", "05_grpo")
    assert store.input_stages("03_merge", "a", {}) == ("02_sft",)


def test_paths_are_relative_to_where_the_command_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "merged").mkdir()
    here = str(tmp_path)
    assert plan.locate_paths("data", "own.jsonl") == f"{here}/own.jsonl"
    assert plan.locate_paths("image_root", "../images") == str(tmp_path.parent / "images")
    assert plan.locate_paths("data", "/x/own.jsonl") == "/x/own.jsonl"
    assert plan.locate_paths("base_model", "model") == f"{here}/model"
    assert plan.locate_paths("start_from", "merged") == "merged", "a word, not the folder"
    assert plan.locate_paths("base_model", "Qwen/Qwen2.5-VL-3B-Instruct") == (
        "Qwen/Qwen2.5-VL-3B-Instruct")
    assert plan.locate_paths("data", "scenes") == "scenes"
    assert plan.locate_paths("annotations_file", "") == ""
    monkeypatch.chdir(PROJECT_ROOT / "tests")
    assert plan.locate_paths("data", "a/b.json") == "tests/a/b.json"
    assert plan.parse_overrides((("data", "x.jsonl"),), ["01_synthesize"]) == {
        "data": "tests/x.jsonl"}
    assert plan.locate_paths("rewards", ["box", "mine.py:center"]) == [
        "box", "tests/mine.py:center"]


def test_a_branch_of_a_run_without_a_cold_start(root):
    leave_record(root, "01_synthesize", teacher="none")
    with pytest.raises(FileNotFoundError, match="run 'a' has no finished 04_rejection_sampling"):
        run_folders.check_branch("a", "b", ["05_grpo"])
    leave_record(root, "04_rejection_sampling")
    run_folders.start_branch("a", "b", "05_grpo")
    assert not store.has_cold_start("b")
    assert store.input_stages("05_grpo", "b", {}) == ("04_rejection_sampling",)
    assert planned_stages([], OWN[2:], run_id="b") == ["00", "05", "06", "07"]


def leave_candidates(root, counts):
    """What 01 leaves for RL: so many questions of each task."""
    leave_record(root, "01_synthesize")
    tasks = [task for task, count in counts.items() for _ in range(count)]
    pyarrow.parquet.write_table(pyarrow.table({"task": tasks}),
                                root / "a" / "01_synthesize" / "rl.parquet")


def test_too_few_prompts_are_known_from_01_on(root):
    leave_candidates(root, {"diff": 10, "region": 3})
    needed = "prompts_of_an_update is 16 and prompts_of_04 is 13, but an update cannot use more"
    assert needed in refuse("02", "03", "04", "05")
    assert "prompts_of_04 is 8, but" in refuse("04", "05", "-p", "per_task", "5")
    few = ("-p", "gradient_accumulation_steps", "2")
    assert planned_stages(["04_rejection_sampling", "05_grpo"], (few[1:],)) == ["04", "05"]


def test_too_few_prompts_are_known_after_04(root):
    leave_candidates(root, {"diff": 100})
    for stage in RECIPE[2:5]:
        leave_record(root, stage)
    (root / "a" / "04_rejection_sampling" / "metrics.json").write_text('{"kept": 15}')
    sentence = "prompts_of_an_update is 16 and prompts_of_04 is 15, but an update cannot use more"
    assert sentence in refuse("05")
    with pytest.raises(ValueError, match=sentence):
        store.begin_stage("05_grpo", {"run_id": "a"})
    assert not (root / "a" / "05_grpo").exists()
    run_folders.start_branch("a", "b", "05_grpo")
    with pytest.raises(ValueError, match=sentence):
        planned_stages(["05_grpo"], (), "b")


def test_too_few_candidates_end_a_command_after_01(root, monkeypatch):
    executed = []

    def execute_notebook(stage, *_):
        executed.append(stage)
        leave_candidates(root, {"diff": 9})

    monkeypatch.setattr(execute, "_execute_notebook", execute_notebook)
    monkeypatch.setattr(execute, "_prepare", lambda *_: None)
    assert "prompts_of_04 is 9, but" in refuse("01", "02", "03", "04", "05")
    assert executed == ["01_synthesize"]


def test_an_adapter_goes_on_as_02_made_it(root):
    leave_record(root, "01_synthesize")
    leave_record(root, "02_sft", lora_r=8)
    words = ("05", "-p", "start_from", "adapter")
    sentence = refuse(*words)
    assert "adapter_of_02 is [8, 'attention'], but RL goes on with that adapter; set" in sentence
    assert "needs 03_merge" in refuse(*words, "-p", "lora_r", "8")


def test_other_stages_of_the_run_decide(root):
    leave_record(root, "01_synthesize")
    sizes = [word for name in ("mig", "ood", "blink", "mmiu")
             for word in ("-p", f"{name}_per_task", "0")]
    assert "data_of_01 is 'scenes', mig_per_task is 0" in refuse("06", *sizes)
    assert refuse("06", "-p", "control_run", "aa").endswith("; did you mean 'a'?")
    assert refuse("09", "-p", "groups", "[x=a, y=b1]").endswith("mig-kit status lists the runs")
