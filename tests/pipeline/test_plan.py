"""Runs that start from another run's stages: what is whose, what is stale, what is refused."""

import hashlib
import shutil

import pytest
from click.testing import CliRunner
from command_line import describe_files, error_of, output_of

from mig_kit.commands.main import cli
from mig_kit.common import write_json
from mig_kit.pipeline import execute, plan, run_facts, run_folders, stage_keys, status, store
from mig_kit.pipeline.joint_rules import validate_params
from mig_kit.pipeline.run_folders import RECIPE


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


def test_a_branch_takes_earlier_stages_by_reference_and_changes_none(root):
    before = describe_files(root / "a")
    run_folders.start_branch("a", "b", "05_grpo", "06_evaluate")
    branch = {"from": "a", "stages": list(RECIPE[1:5])}
    assert run_folders.load_branch("b") == branch
    stage = finish_stage("b", "05_grpo", "b")
    assert stage.final_folder == root / "b" / "05_grpo"
    assert stage.input_path("03_merge", "x") == root / "a" / "03_merge" / "x"
    record = store.load_record("05_grpo", "b")
    assert record["branch"] == branch
    digest = hashlib.sha256(b"1").hexdigest()
    assert {name: files["x"] for name, files in record["inputs"].items()} == {
        "03_merge": digest, "04_rejection_sampling": digest}
    assert run_facts.run_params("b", "05_grpo")["base_model"] == "tiny"
    assert describe_files(root / "a") == before, "neither changed nor locked"
    with pytest.raises(ValueError, match="03_merge of run 'b' is that of run 'a'; run it there"):
        store.begin_stage("03_merge", {"run_id": "b"})
    assert not (root / "b" / "03_merge").exists()
    finish_stage("b", "06_evaluate", "b")
    assert store.is_up_to_date("05_grpo", "b", stage.params)


def test_a_branch_of_a_branch(root):
    run_folders.start_branch("a", "b", "05_grpo")
    finish_stage("b", "05_grpo", "b")
    run_folders.start_branch("b", "c", "06_evaluate")
    assert store.stage_folder("02_sft", "c") == root / "a" / "02_sft"
    assert store.stage_folder("05_grpo", "c") == root / "b" / "05_grpo"
    assert store.stage_folder("06_evaluate", "c") == root / "c" / "06_evaluate"
    inputs = finish_stage("c", "06_evaluate", "c").inputs
    assert inputs["05_grpo"]["x"] == store.load_record("05_grpo", "b")["outputs"]["x"]
    run_folders.start_branch("c", "d", "03_merge")
    assert [run for run in "abcd" if store.find_owner("02_sft", run) != "a"] == []
    assert store.find_owner("04_rejection_sampling", "d") == "d"


def test_going_on_needs_no_source_and_runs_what_is_the_branchs(root):
    run_folders.start_branch("a", "b", "05_grpo")
    own = ["00_preflight", "05_grpo", "06_evaluate", "07_report"]
    assert plan.plan_stages([], "b") == own
    assert plan.plan_stages([], "a") == list(RECIPE)
    assert run_folders.check_branch("a", "b", ["06_evaluate"]) == [], "naming it again is no error"
    planned, = plan.plan_runs(["06_evaluate"], "smoke", "b", "", [], ())
    assert (planned.source, list(planned.params)) == ("", ["06_evaluate"])


@pytest.mark.parametrize(("words", "sentence"), [
    (("run", "05", "--from", "a", "--run-id", "a"), "are both 'a'; use another --run-id"),
    (("run", "05", "--from", "z", "--run-id", "new"), "no run 'z' in "),
    (("run", "05", "--from", "../a", "--run-id", "new"), "run_id is '../a'; use letters"),
    (("run", "06", "--from", "a", "--run-id", "new"),
     "run 'a' has no finished 05_grpo to start from; run: mig-kit run 05 --run-id a"),
    (("run", "01", "--from", "a", "--run-id", "new"), "so name stages from 02 to 07"),
    (("run", "--from", "a", "--run-id", "new"), "so name stages from 02 to 07"),
    (("run", "08", "--from", "a", "--run-id", "new"), "so name stages from 02 to 07"),
    (("run", "05", "--from", "b", "--run-id", "a"), "run 'b' starts from 'a' itself"),
    (("run", "05", "--from", "c", "--run-id", "b"),
     "run 'b' starts from 'a' already, not from 'c'"),
    (("run", "05", "--from", "a", "--run-id", "c"), "run 'c' has its own 02_sft, so it is no bran"),
    (("run", "04", "05", "--run-id", "b"),
     "04_rejection_sampling of run 'b' is that of run 'a'; run it there, or start another branch: "
     "mig-kit run 04 --from a --run-id NAME"),
    (("run", "05", "--run-id", "x-{seed}"), "'x-{seed}' has {seed}, but there are no seeds"),
    (("run", "05", "--run-id", "x", "--seeds", "0,1"), "2 seeds cannot share the run 'x'; put"),
    (("run", "05", "--run-id", "x", "--seeds", "0,one"), "--seeds is '0,one'; write whole numbers"),
    (("run", "05", "--run-id", "x-{seed}", "--seeds", "1,01"), "names a seed twice"),
    (("run", "05", "--seeds", "1", "-p", "seed", "2"), "-p seed and --seeds both set the seed"),
    (("run", "03", "--seeds", "1", "--run-id", "a"), "03_merge has no parameter 'seed'"),
    (("run", "05", "--from", "a", "--run-id", "new", "--profile", "qwen2_5_vl_7b", "-p", "device",
      "cpu"), "run 'a' has the base_model tiny, and profile 'qwen2_5_vl_7b'"),
])
def test_what_cannot_be_a_branch_is_refused_and_nothing_written(root, leave, words, sentence):
    run_folders.start_branch("a", "b", "05_grpo")
    leave("02_sft", "c")
    before = describe_files(root)
    assert sentence in error_of(*words)
    assert describe_files(root) == before and not (root / "new").exists()


def test_a_source_stage_that_was_run_again_makes_the_branch_stale(root, leave):
    run_folders.start_branch("a", "b", "05_grpo")
    stage = finish_stage("b", "05_grpo", "b")
    leave("03_merge", "a")
    assert store.find_replaced_input("05_grpo", "b") == "", "the same products again"
    leave("03_merge", "a", "2")
    assert store.find_replaced_input("05_grpo", "b") == "03_merge"
    assert "it is stale: the input 03_merge has changed" in (
        "\n".join(status.run_lines("b", with_reasons=True)))
    assert not store.is_up_to_date("05_grpo", "b", stage.params), "it is run again"
    begun, _ = store.begin_stage("05_grpo", {"run_id": "b"})
    begun.finish({})
    assert store.find_replaced_input("05_grpo", "b") == ""
    begun, _ = store.begin_stage("05_grpo", {"run_id": "b", "beta": 0.1})
    leave("03_merge", "a", "3")  # while 05 runs
    begun.finish({})
    assert store.find_replaced_input("05_grpo", "b") == "03_merge"


def test_a_source_that_is_gone_is_one_sentence(root):
    run_folders.start_branch("a", "b", "05_grpo")
    finish_stage("b", "05_grpo", "b")
    shutil.rmtree(root / "a" / "03_merge")
    sentence = error_of("run", "05", "--run-id", "b")
    assert "05_grpo needs 03_merge of run 'a', which has not finished; run: mig-kit run 03 " \
        "--run-id a, with the --profile and every -p of that run" in sentence
    assert "  01 to 04 of a; 03_merge is not finished" in status.run_lines("b")
    (root / "a").rename(root / "other")
    sentence = error_of("run", "05", "--run-id", "b")
    assert "run 'b' starts from run 'a', which is not in " in sentence and "bring it" in sentence
    lines = output_of("status", "b").splitlines()
    assert lines[1] == "  01 to 04 of a; run 'a' is gone" and "stale, made in 0.0 min" in lines[2]


@pytest.mark.parametrize("text", ["{", "[]", '{"from": "a"}', '{"from": "../a", "stages": {}}',
                                  '{"from": 3, "stages": {}}'])
def test_a_broken_branch_file_is_one_sentence(root, text):
    run_folders.start_branch("a", "b", "05_grpo")
    (root / "b" / "branch.json").write_text(text)
    with pytest.raises(ValueError, match="branch.json is broken; delete the run 'b'"):
        store.load_record("05_grpo", "b")


def test_branch_files_of_earlier_versions_and_circles(root):
    stages = dict.fromkeys(RECIPE[1:5], "key")
    (root / "b").mkdir()
    write_json(root / "b" / "branch.json", {"from": "a", "stages": stages})
    assert store.stage_folder("03_merge", "b") == root / "a" / "03_merge"
    assert status.run_lines("b")[1].startswith("  01 to 04 of a")
    write_json(root / "a" / "branch.json", {"from": "b", "stages": stages})
    with pytest.raises(ValueError, match="run '[ab]' starts from itself, through '[ab]'"):
        store.load_record("01_synthesize", "a")


def test_the_tree_of_runs(root, leave):
    leave("05_grpo", "a")
    run_folders.start_branch("a", "z", "05_grpo")
    finish_stage("z", "05_grpo", "z")
    run_folders.start_branch("a", "b", "06_evaluate")
    run_folders.start_branch("z", "c", "06_evaluate")
    leave("01_synthesize", "aa")
    assert status.run_tree() == [("a", 0), ("b", 1), ("z", 1), ("c", 2), ("aa", 0)]
    output = output_of("status")
    assert "\n  z\n    01 to 04 of a\n    05_grpo " in output
    assert "\n    c\n      01 to 05 of z\n      06_evaluate             -\n" in output
    assert output.count("03_merge") == 2, "of a and aa alone"


def test_a_runs_name_makes_nothing_stale(root):
    stage = finish_stage("a", "05_grpo", "x")
    (root / "a").rename(root / "renamed")
    shutil.copytree(root / "renamed", root / "copied")
    for run_id in ("renamed", "copied"):
        assert store.is_up_to_date("05_grpo", run_id, {**stage.params, "run_id": run_id})
    finish_stage("copied", "06_evaluate", "x")
    keys = []
    for control in ("renamed", "copied", ""):
        values = validate_params({"control_run": control}, "06_evaluate")
        keys.append(store.stage_facts("06_evaluate", "copied", values)["key"])
    assert keys[0] == keys[1] != keys[2], "the same merged model under another name"


def test_seeds_one_after_the_other_with_the_time_left(root, monkeypatch, capsys):
    executed = []

    def execute_notebook(stage, run_id, values, table):
        executed.append((run_id, stage, values["seed"]))
        if executed == [("g-3", "05_grpo", 3), ("g-3", "06_evaluate", 3), ("g-4", "05_grpo", 4)]:
            raise RuntimeError("interrupted")
        begun, _ = store.begin_stage(stage, values)
        begun.finish({})
        record = store.load_record(stage, run_id)
        write_json(begun.final_folder / "run.json", {**record, "seconds": 90.0})

    monkeypatch.setattr(execute, "_execute_notebook", execute_notebook)
    words = ["run", "05", "06", "--from", "a", "--run-id", "g-{seed}", "--seeds", "3,4,5"]
    assert error_of(*words) == "interrupted"
    executed.clear()
    output = output_of(*words)
    assert executed == [(f"g-{seed}", stage, seed) for seed in (4, 5)
                        for stage in ("05_grpo", "06_evaluate")], "3 is up to date"
    assert "2 of 3 runs to go, about 6 min left" in output
    assert "1 of 3 runs to go, about 3 min left" in output
    assert "run 'g-5', 3 of 3" in output
    assert [store.load_record("05_grpo", f"g-{seed}")["branch"]["from"] for seed in (3, 4, 5)] == [
        "a", "a", "a"]


def test_a_seed_stands_in_source_and_values_too(root, leave):
    for seed in (0, 1):
        for stage in RECIPE[1:5]:
            leave(stage, f"s{seed}")
    plans = plan.plan_runs(["05_grpo", "06_evaluate"], "smoke", "g-{seed}", "s{seed}", [0, 1],
                              (("control_run", "s{seed}"), ("loss_type", "grpo")))
    assert [(each.run_id, each.source) for each in plans] == [("g-0", "s0"), ("g-1", "s1")]
    values = plans[1].params
    assert (values["05_grpo"]["seed"], values["05_grpo"]["loss_type"]) == (1, "grpo")
    assert (values["06_evaluate"]["seed"], values["06_evaluate"]["control_run"]) == (1, "s1")
    with pytest.raises(FileNotFoundError, match="no run 's2'"):
        plan.plan_runs(["05_grpo"], "smoke", "g-{seed}", "s{seed}", [0, 1, 2], ())
    assert sorted(path.name for path in root.iterdir()) == ["a", "s0", "s1"]


@pytest.fixture
def no_kernels(monkeypatch):
    """Instead of notebooks, stages whose product is one of their parameters."""
    def execute_notebook(stage, run_id, values, lines):
        begun, p = store.begin_stage(stage, {**values, "In": ["# Parameters"]})
        (begun.folder / "x").write_text(str(getattr(p, "max_steps", "x")))
        begun.finish({"systems": {"grpo": {}}})

    monkeypatch.setattr(execute, "_execute_notebook", execute_notebook)


def test_a_command_says_what_it_replaces_and_restore_brings_it_back(root, no_kernels):
    assert "replaces" not in output_of("run", "05", "06", "--run-id", "a")
    before = describe_files(root / "a" / "05_grpo"), describe_files(root / "a" / "06_evaluate")
    output = output_of("run", "05", "06", "--run-id", "a", "-p", "max_steps", "60")
    assert output.startswith(
        "this replaces finished stages of run 'a': 05_grpo (the parameter max_steps (125 -> 60) "
        "has changed), and 06, which build on it. What is there is kept, and mig-kit restore a "
        "puts it back; for a run beside it: mig-kit run 05 06 --from a --run-id NAME -p max_steps "
        "60\n05_grpo: running")
    after = describe_files(root / "a" / "05_grpo"), describe_files(root / "a" / "06_evaluate")
    for expected in (before, after):
        assert "05_grpo: that of 20" in output_of("restore", "a")
        assert (describe_files(root / "a" / "05_grpo"),
                describe_files(root / "a" / "06_evaluate")) == expected
    output_of("restore", "a", "6")
    assert describe_files(root / "a" / "06_evaluate") == before[1]
    assert describe_files(root / "a" / "05_grpo") == after[0]
    kept = root / "a" / "05_grpo.before"
    kept.rename(kept.with_suffix(".new-swap"))  # as a kill in the middle leaves it
    assert "05_grpo: that of 20" in output_of("restore", "a", "5")
    assert describe_files(root / "a" / "05_grpo") == before[0]
    assert "keeps nothing that 03_merge replaced" in error_of("restore", "a", "03")
    assert "no run 'aa'" in error_of("restore", "aa")


def test_restore_takes_back_the_last_command_alone(root, no_kernels):
    for words in (["05", "06"], ["05", "06", "-p", "seed", "1"], ["06", "-p", "seed", "2"]):
        output_of("run", *words, "--run-id", "a")
    for _ in "12":
        assert output_of("restore", "a").splitlines()[0].startswith("06_evaluate: ")
    assert store.load_record("06_evaluate", "a")["params"]["seed"] == 2
    assert store.load_record("05_grpo", "a")["params"]["seed"] == 1


def test_another_profile_has_a_run_of_its_own(root, leave, no_kernels):
    leave("01_synthesize", "smoke")
    output_of("run", "02", "--profile", "smoke")
    assert (root / "smoke" / "02_sft").is_dir() and not (root / "default").exists()
    output_of("run", "05", "--run-id", "a", "-p", "max_steps", "9")
    before = describe_files(root / "a")
    sentence = error_of("run", "05", "--run-id", "a", "--profile", "smoke")
    assert "--profile smoke would replace 05_grpo of run 'a', which are of profile tiny" in sentence
    assert describe_files(root / "a") == before
    output = output_of("run", "05", "--run-id", "a", "--profile", "smoke", "--force")
    assert "replaces finished stages of run 'a': 05_grpo (the parameter grad" in output


def test_a_stale_stage_is_refused_or_marked_wherever_it_is_read(root, no_kernels, monkeypatch):
    output_of("run", "05", "06", "--run-id", "a")
    facts = stage_keys.describe_code

    def changed_04(stage, rewards):
        code = facts(stage, rewards)
        return {**code, "code": "2"} if stage == "04_rejection_sampling" else code

    monkeypatch.setattr(stage_keys, "describe_code", changed_04)
    lines = {line.split()[0]: line for line in output_of("status", "a").splitlines()}
    assert "stale, made in" in lines["04_rejection_sampling"]
    assert "stale through 04, made in" in lines["05_grpo"] and "through 04" in lines["06_evaluate"]
    assert "done" in lines["03_merge"]
    words = ["run", "05", "--from", "a", "--run-id", "b"]
    sentence = error_of(*words)
    assert "05_grpo would build on a stale 04_rejection_sampling of run 'a': the " in sentence
    assert "has changed; run again what is stale (mig-kit run 04 --run-id a, with" in sentence
    assert not (root / "b").exists()
    assert "would build on" in error_of("run", "05", "--run-id", "a", "-p", "max_steps", "7")
    output_of(*words, "--force")
    mark = "05_grpo of run 'b' was made from stale stages: 04_rejection_sampling (the "
    assert mark in output_of("status", "b")
    assert mark in " ".join(store.stale_notes("05_grpo", "b"))
    monkeypatch.setattr(stage_keys, "describe_code", facts)
    assert mark in " ".join(store.stale_notes("06_evaluate", "b")), "the mark stays"


def test_rm_asks_and_keeps_what_branches_start_from(root):
    run_folders.start_branch("a", "b", "05_grpo")
    assert "run 'a' stays: b start from it" in error_of("rm", "a", "--yes")
    assert "no run 'c'" in error_of("rm", "c", "--yes")
    assert "run_id is '../a'" in error_of("rm", "../a", "--yes")
    assert "nothing removed" in CliRunner().invoke(cli, ["rm", "b"], input="n\n").output
    assert (root / "b").is_dir()
    assert "removed: run 'b'" in CliRunner().invoke(cli, ["rm", "b"], input="y\n").output
    assert not (root / "b").exists() and (root / "a").is_dir()
