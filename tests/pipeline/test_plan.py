"""Runs that start from another run's stages, and what `mig-kit run` refuses before a kernel."""

import hashlib
import json
import shutil

import pytest
from click.testing import CliRunner
from command_line import describe_files, error_of, output_of

from mig_kit.commands.main import cli
from mig_kit.common import PROJECT_ROOT, UserError, digest_json, write_json
from mig_kit.evaluation import evaluated_runs
from mig_kit.pipeline import execute, plan, runs, stage_keys, store
from mig_kit.pipeline.run_folders import RECIPE
from mig_kit.pipeline.runs import Run


@pytest.fixture
def root(root, leave):
    """A folder of runs with 01 to 04 of run "a" finished."""
    for stage in RECIPE[1:5]:
        leave(stage)
    return root


def finish_stage(run_id, stage, product):
    begun, _ = store.begin_stage(stage, {"run_id": run_id})
    (begun.folder / "x").write_text(product)
    begun.finish({"product": product})
    return begun


@pytest.fixture
def no_kernels(monkeypatch):
    """Instead of notebooks, stages whose product is one of their parameters."""
    executed = []

    def execute_notebook(stage, run_id, values):
        executed.append((run_id, stage, values.get("seed")))
        begun, p = store.begin_stage(stage, values)
        (begun.folder / "x").write_text(str(getattr(p, "max_steps", "x")))
        begun.finish({"systems": {"grpo": {"blink": {"score": 1.0, "n": 9}}}})
        write_json(begun.final_folder / "run.json",
                   {**Run(run_id).record(stage), "seconds": 90.0})

    monkeypatch.setattr(execute, "_execute_notebook", execute_notebook)
    monkeypatch.setattr(evaluated_runs, "check_margins", lambda run_id: ("", False))
    return executed


def test_a_branch_takes_earlier_stages_by_reference_and_changes_none(root):
    before = describe_files(root / "a")
    runs.start_branch("a", "b", "05_grpo", "06_evaluate")
    branch = {"from": "a", "stages": list(RECIPE[1:5])}
    assert Run("b").branch == branch
    stage = finish_stage("b", "05_grpo", "b")
    assert stage.final_folder == root / "b" / "05_grpo"
    assert stage.input_path("03_merge", "x") == root / "a" / "03_merge" / "x"
    record = Run("b").record("05_grpo")
    assert record["branch"] == branch
    digest = digest_json({"x": hashlib.sha256(b"1").hexdigest()})
    assert record["facts"]["input"] == {"03_merge": digest, "04_rejection_sampling": digest}
    assert Run("b").run_params("05_grpo")["base_model"] == "tiny"
    assert describe_files(root / "a") == before, "neither changed nor locked"
    with pytest.raises(UserError, match="03_merge of run 'b' is that of run 'a'; run it there"):
        store.begin_stage("03_merge", {"run_id": "b"})
    assert not (root / "b" / "03_merge").exists()
    finish_stage("b", "06_evaluate", "b")
    assert store.is_done(Run("b"), "05_grpo", stage.params)


def test_a_branch_of_a_branch(root):
    runs.start_branch("a", "b", "05_grpo")
    finish_stage("b", "05_grpo", "b")
    runs.start_branch("b", "c", "06_evaluate")
    assert Run("c").stage_folder("02_sft") == root / "a" / "02_sft"
    assert Run("c").stage_folder("05_grpo") == root / "b" / "05_grpo"
    outputs = Run("b").record("05_grpo")["outputs"]
    assert finish_stage("c", "06_evaluate", "c").facts["input"]["05_grpo"] == digest_json(
        {"x": outputs["x"]})
    runs.start_branch("c", "d", "03_merge")
    assert [run for run in "abcd" if Run(run).owner("02_sft").id != "a"] == []
    assert Run("d").owner("04_rejection_sampling").id == "d"


def test_going_on_needs_no_source_and_runs_what_is_the_branchs(root):
    runs.start_branch("a", "b", "05_grpo")
    for run_id, stages in (("a", list(RECIPE)),
                           ("b", ["00_preflight", "05_grpo", "06_evaluate", "07_report"])):
        assert list(plan.plan_run([], "", run_id, "", ()).params) == stages
    assert runs.check_branch("a", "b", ["06_evaluate"]) == [], "naming it again is no error"
    planned = plan.plan_run(["06_evaluate"], "", "b", "", ())
    assert (planned.source, list(planned.params)) == ("", ["06_evaluate"])


SIZES = "{mig_bench: 0, ood_grounding: 0, blink: 0, mmiu: 0}"


@pytest.mark.parametrize(("words", "sentence"), [
    (("run", "06", "--run-id", "a", "-p", "suites", SIZES), "all suites are 0, so there is"),
    (("run", "05", "--from", "a", "--run-id", "a"), "'a' is 'a' or starts from it; use another"),
    (("run", "05", "--from", "z", "--run-id", "new"), "no run 'z' in "),
    (("run", "05", "--from", "../a", "--run-id", "new"), "run_id is '../a'; use letters"),
    (("run", "06", "--from", "a", "--run-id", "new"),
     "run 'new' needs 05_grpo of run 'a', which has not finished; run: mig-kit run 05 --run-id a"),
    (("run", "01", "--from", "a", "--run-id", "new"), "so name stages from 02 to 07"),
    (("run", "--from", "a", "--run-id", "new"), "so name stages from 02 to 07"),
    (("run", "05", "--from", "b", "--run-id", "a"), "run 'b' is 'a' or starts from it"),
    (("run", "05", "--from", "c", "--run-id", "b"),
     "run 'b' starts from 'a' already, not from 'c'"),
    (("run", "05", "--from", "a", "--run-id", "c"), "run 'c' has its own 02_sft, so it is no bran"),
    (("run", "04", "05", "--run-id", "b"),
     "04_rejection_sampling of run 'b' is that of run 'a'; run it there, or start another branch: "
     "mig-kit run 04 --from a --run-id NAME")])
def test_what_a_command_refuses_writes_nothing(root, leave, words, sentence):
    runs.start_branch("a", "b", "05_grpo")
    leave("02_sft", "c")
    before = describe_files(root)
    assert sentence in error_of(*words)
    assert describe_files(root) == before and not (root / "new").exists()


def test_a_source_that_is_gone_is_one_sentence(root):
    runs.start_branch("a", "b", "05_grpo")
    finish_stage("b", "05_grpo", "b")
    shutil.rmtree(root / "a" / "03_merge")
    assert "05_grpo: stale (05_grpo: 05_grpo needs 03_merge of run 'a', which has not finished; " \
        "run: mig-kit run 03 --run-id a, with every" in output_of("run", "05", "--run-id", "b")
    (root / "a").rename(root / "other")
    for text in (error_of("run", "05", "--run-id", "b"), output_of("status", "b")):
        assert "needs 01_synthesize of run 'a', and there is no such run in " in text
        assert "(to make it: mig-kit run 01 " in text
    assert output_of("status").startswith("b (by hand); from a; 05 done; 05 stale\n")


def test_runs_are_a_line_each(root, leave):
    leave("05_grpo", "a")
    runs.start_branch("a", "z", "05_grpo")
    finish_stage("z", "05_grpo", "z")
    runs.start_branch("a", "b", "06_evaluate")
    runs.start_branch("z", "c", "06_evaluate")
    leave("01_synthesize", "aa")
    assert output_of("status").splitlines() == [
        "a (by hand); 01 02 03 04 05 done", "aa (by hand); 01 done",
        "b (by hand); from a; nothing done", "c (by hand); from z; nothing done",
        "z (by hand); from a; 05 done"]


def test_a_runs_name_makes_nothing_stale(root):
    stage = finish_stage("a", "05_grpo", "x")
    (root / "a").rename(root / "renamed")
    shutil.copytree(root / "renamed", root / "copied")
    for run_id in ("renamed", "copied"):
        assert store.is_done(Run(run_id), "05_grpo", {**stage.params, "run_id": run_id})


def test_a_command_leaves_what_has_finished_unless_it_is_forced(root, no_kernels):
    output_of("run", "05", "06", "--run-id", "a")
    before = describe_files(root)
    sentence = error_of("run", "05", "06", "--run-id", "a", "-p", "max_steps", "60")
    assert "05_grpo of run 'a' has finished, and stays as it is (max_steps: 60, finished with " \
        "100); for other results use another run (mig-kit run 05 --from a --run" in sentence
    assert "05_grpo: up to date" in output_of("run", "05", "06", "--run-id", "a")
    assert describe_files(root) == before
    output_of("run", "05", "--run-id", "a", "-p", "max_steps", "60", "--force")
    assert (root / "a" / "05_grpo" / "x").read_text() == "60"
    reason = "06_evaluate: stale (06_evaluate: 05_grpo has changed)"
    assert reason in output_of("run", "06", "--run-id", "a")
    output_of("run", "06", "--run-id", "a", "--force")
    assert "stale" not in output_of("status", "a")


def test_a_run_keeps_the_profile_that_it_began_with(root, leave, no_kernels):
    leave("01_synthesize", "smoke")
    output_of("run", "02", "--profile", "smoke")
    assert (root / "smoke" / "02_sft").is_dir() and not (root / "default").exists()
    before = describe_files(root / "smoke")
    assert error_of("run", "02", "--run-id", "smoke", "--profile", "tiny") == (
        "run 'smoke' is of profile smoke; leave --profile out, or use another --run-id for a run "
        "of its own")
    assert describe_files(root / "smoke") == before
    assert "02_sft: up to date" in output_of("run", "02", "--run-id", "smoke"), "its own"
    leave("03_merge", "smoke")
    leave("04_rejection_sampling", "smoke")
    output_of("run", "05", "--from", "smoke", "--run-id", "b", "-p", "seed", "1")
    assert Run("b").record("05_grpo")["params"]["max_steps"] == 2, "that of its source"
    assert output_of("status").splitlines()[1].startswith("b (smoke); from smoke; 05 done")


def test_what_is_stale_is_built_on_and_said_wherever_it_is_read(root, no_kernels, monkeypatch,
                                                               capsys):
    output_of("run", "05", "06", "--run-id", "a")
    facts, module = stage_keys.describe_code, "mig_kit.stages.rejection_sampling"
    assert module in facts("04_rejection_sampling")["code"]

    def changed_04(stage):
        code = facts(stage)
        if stage != "04_rejection_sampling":
            return code
        return {**code, "code": {**code["code"], module: "2"}, "cells": "2"}

    monkeypatch.setattr(stage_keys, "describe_code", changed_04)
    lines = {line.split()[0]: line for line in output_of("status", "a").splitlines()[1:]}
    reason = "04_rejection_sampling: rejection_sampling has changed; a cell of its notebook has ch"
    assert f"; stale, {reason}" in lines["04_rejection_sampling"]
    assert "; stale, 04_" in lines["05_grpo"] and "; stale, 04_" in lines["06_evaluate"]
    assert "stale" not in lines["03_merge"]
    before = describe_files(root / "a")
    assert f"05_grpo: stale ({reason}" in output_of("run", "05", "--run-id", "a")
    assert f"warning: it builds on what is stale ({reason}" in output_of(
        "run", "05", "--from", "a", "--run-id", "b")
    assert describe_files(root / "a") == before
    store.begin_stage("05_grpo", {"run_id": "a"})
    assert f"warning: it is stale ({reason}" in capsys.readouterr().out
    assert f"; stale, {reason}" in output_of("status", "b")
    assert "05_grpo of run 'b' is stale (04_" in " ".join(Run("b").notes("05_grpo"))
    monkeypatch.setattr(stage_keys, "describe_code", facts)
    assert "stale" not in output_of("status", "b"), "04 is what it was"


def test_a_parameter_that_a_record_lacks_has_its_default_and_one_that_is_gone_is_ignored(root):
    """Of a run that an earlier version has made."""
    finish_stage("a", "05_grpo", "x")
    path = root / "a" / "05_grpo" / "run.json"
    record = json.loads(path.read_text())
    for params in (record["params"], record["facts"]["parameter"]):
        del params["top_entropy_quantile"], params["reward_weights"]["choice"]
        params["of_old"] = 1
    write_json(path, record)
    assert "stale" not in output_of("status", "a")
    assert store.begin_stage("05_grpo", {"run_id": "a"})[0].is_shown
    with pytest.raises(UserError, match="top_entropy_quantile: 0.2, finished with 1.0"):
        store.begin_stage("05_grpo", {"run_id": "a", "top_entropy_quantile": 0.2})


def test_rm_asks_and_keeps_what_branches_start_from(root):
    runs.start_branch("a", "b", "05_grpo")
    assert "run 'a' stays: b start from it" in error_of("rm", "a")
    assert "no run 'c'" in error_of("rm", "c", "--yes")
    assert "run_id is '../a'" in error_of("rm", "../a", "--yes")
    assert "nothing removed" in CliRunner().invoke(cli, ["rm", "b"], input="n\n").output
    unanswered = CliRunner().invoke(cli, ["rm", "b"], input="").exception
    assert str(unanswered) == "nothing removed, for there was no answer; --yes does not ask"
    assert (root / "b").is_dir()
    assert "removed: run 'b'" in CliRunner().invoke(cli, ["rm", "b"], input="y\n").output
    assert not (root / "b").exists() and (root / "a").is_dir()


OWN = (("data", str(PROJECT_ROOT / "README.md")), ("teacher", "none"), ("start_from", "base"))


def planned_stages(names, overrides, run_id="new"):
    planned = plan.plan_run(names, "tiny", run_id, "", overrides)
    return [stage[:2] for stage in planned.params]


def test_without_a_teacher_02_and_03_are_left_out_and_rl_starts_from_the_base(root, leave):
    assert planned_stages([], OWN) == ["00", "01", "04", "05", "06", "07"]
    assert planned_stages([], ()) == [f"0{n}" for n in range(8)]
    assert planned_stages(["01_synthesize"], OWN[:2]) == ["01"]
    with pytest.raises(UserError, match="set start_from to base, for RL alone, or teacher to own"):
        planned_stages([], OWN[:2])
    leave("01_synthesize", "new", teacher="none")
    assert planned_stages(["05_grpo", "06_evaluate"], OWN[2:]) == ["05", "06"]
    for stage, sentence in (("02_sft", "'none', so there is no cold-start set to learn from"),
                            ("05_grpo", "set start_from to base")):
        with pytest.raises(UserError, match=sentence):
            planned_stages([stage], ())
    leave("04_rejection_sampling", "new")
    runs.start_branch("new", "branch", "05_grpo")
    for run_id in ("new", "branch"):
        assert not Run(run_id).has_cold_start
        assert [Run(run_id).inputs(stage) for stage in RECIPE[3:7]] == [
            ("02_sft",), ("01_synthesize",), ("04_rejection_sampling",),
            ("01_synthesize", "05_grpo")]
    assert planned_stages([], OWN[2:], "branch") == ["00", "05", "06", "07"]


def test_a_profile_that_would_leave_the_cold_start_unused_is_refused(root, leave):
    """02 to 04 would use the SFT model, and 05 train the base; said, it is meant."""
    with_teacher = (OWN[0], ("teacher", "own"))
    for names, run_id, overrides in (([], "new", with_teacher), (["05_grpo"], "a", ())):
        def planned(*start, names=names, run_id=run_id, overrides=overrides):
            return [*plan.plan_run(names, "tiny_own", run_id, "", overrides + start).params]

        with pytest.raises(UserError, match="starts from the base and would leave the model of 03"):
            planned()
        for start in ("merged", "base"):
            assert "05_grpo" in planned(("start_from", start))
    assert planned_stages([], OWN[:2] + OWN[2:]) == ["00", "01", "04", "05", "06", "07"]


def test_too_few_prompts_are_known_after_04(root):
    (root / "a" / "04_rejection_sampling" / "metrics.json").write_text('{"kept": 15}')
    sentence = "04 keeps 15; lower gradient_accumulation_steps"
    assert sentence in error_of("run", "05", "--run-id", "a")
    with pytest.raises(UserError, match=sentence):
        store.begin_stage("05_grpo", {"run_id": "a"})
    assert not (root / "a" / "05_grpo").exists()
    runs.start_branch("a", "b", "05_grpo")
    with pytest.raises(UserError, match=sentence):
        planned_stages(["05_grpo"], (), "b")
    again = ["04_rejection_sampling", "05_grpo"]
    assert [*plan.plan_run(again, "tiny", "a", "", (), force=True).params] == again


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
