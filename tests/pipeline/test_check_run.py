"""What stages make for each other decides: runs without a cold start, and too few prompts."""

from functools import partial

import pytest
from command_line import error_of

from mig_kit.common import PROJECT_ROOT, UserError
from mig_kit.pipeline import plan, run_folders, store
from mig_kit.pipeline.run_folders import RECIPE

refuse = partial(error_of, "run", "--run-id", "a")
OWN = (("data", "README.md"), ("teacher", "none"), ("start_from", "base"))


@pytest.fixture
def root(root, monkeypatch):
    """An empty folder of runs; paths are relative to the project."""
    monkeypatch.chdir(PROJECT_ROOT)
    return root


def planned_stages(names, overrides, run_id="a"):
    planned = plan.plan_run(names, "tiny", run_id, "", overrides)
    return [stage[:2] for stage in planned.params]


def test_without_a_teacher_02_and_03_are_left_out(root, leave):
    assert planned_stages([], OWN) == ["00", "01", "04", "05", "06", "07"]
    assert planned_stages([], ()) == [f"0{n}" for n in range(8)]
    assert planned_stages(["01_synthesize"], OWN[:2]) == ["01"]
    leave("01_synthesize", teacher="none")
    assert planned_stages(["05_grpo", "06_evaluate"], OWN[2:]) == ["05", "06"]
    with pytest.raises(UserError, match="'none', so there is no cold-start set to learn from"):
        planned_stages(["02_sft"], ())


def test_rl_without_a_cold_start_starts_from_the_base(root, leave):
    with pytest.raises(UserError, match="set start_from to base, for RL alone, or teacher to own"):
        planned_stages([], OWN[:2])
    leave("01_synthesize", teacher="none")
    with pytest.raises(UserError, match="set start_from to base"):
        planned_stages(["05_grpo"], ())
    with pytest.raises(UserError, match="set start_from to base"):
        store.begin_stage("05_grpo", {"run_id": "a"})
    assert planned_stages(["05_grpo"], OWN[2:]) == ["05"]


def test_paths_are_relative_to_where_the_command_is_given(tmp_path, monkeypatch):
    for folder in ("model", "merged"):  # the second is a word of start_from all the same
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path)
    hub_name = "Qwen/Qwen2.5-VL-3B-Instruct"
    for name, value, path in (
            ("data", "own.jsonl", f"{tmp_path}/own.jsonl"), ("data", "/x/a.jsonl", "/x/a.jsonl"),
            ("data", "scenes", "scenes"), ("image_root", "../images", f"{tmp_path.parent}/images"),
            ("image_root", "", ""), ("base_model", "model", f"{tmp_path}/model"),
            ("base_model", hub_name, hub_name), ("start_from", "merged", "merged")):
        assert plan.locate_paths(name, value) == path
    monkeypatch.chdir(PROJECT_ROOT / "tests")
    words = (("data", "x.jsonl"), ("rewards", "[box, mine.py:center]"))
    assert plan.parse_overrides(words, ["01_synthesize", "05_grpo"]) == {
        "data": "tests/x.jsonl", "rewards": ["box", "tests/mine.py:center"]}


def test_a_branch_of_a_run_without_a_cold_start(root, leave):
    leave("01_synthesize", teacher="none")
    with pytest.raises(UserError, match="run 'b' needs 04_rejection_sampling of run 'a'"):
        run_folders.check_branch("a", "b", ["05_grpo"])
    leave("04_rejection_sampling")
    run_folders.start_branch("a", "b", "05_grpo")
    for run_id in ("a", "b"):
        assert not run_folders.has_cold_start(run_id)
        assert [run_folders.input_stages(stage, run_id) for stage in RECIPE[3:7]] == [
            ("02_sft",), ("01_synthesize",), ("04_rejection_sampling",),
            ("01_synthesize", "05_grpo")]
    assert planned_stages([], OWN[2:], run_id="b") == ["00", "05", "06", "07"]


def test_too_few_prompts_are_known_after_04(root, leave):
    for stage in RECIPE[1:5]:
        folder = leave(stage)
    (folder / "metrics.json").write_text('{"kept": 15}')
    sentence = "04 keeps 15; lower gradient_accumulation_steps"
    assert sentence in refuse("05")
    with pytest.raises(UserError, match=sentence):
        store.begin_stage("05_grpo", {"run_id": "a"})
    assert not (root / "a" / "05_grpo").exists()
    run_folders.start_branch("a", "b", "05_grpo")
    with pytest.raises(UserError, match=sentence):
        planned_stages(["05_grpo"], (), "b")


def test_other_stages_of_the_run_decide(root, leave):
    leave("01_synthesize")
    sizes = "{mig_bench: 0, ood_grounding: 0, blink: 0, mmiu: 0}"
    assert "all suites are 0, so there is nothing to score" in refuse("06", "-p", "suites", sizes)
