"""Which replies a branch's 06 takes from its source, and which it must draw itself."""

import json
from types import SimpleNamespace

import pytest

from mig_kit.common import write_json
from mig_kit.pipeline import run_folders, store
from mig_kit.pipeline.joint_rules import validate_params

FILES = [f"{system}_{rest}.jsonl" for system in ("base", "sft", "sft_long")
         for rest in ("mmiu_greedy", "mmiu_drawn")]
GREEDY = {name for name in FILES if not name.endswith("_drawn.jsonl")}


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder of runs, "a" and its branch "b", and of model folders."""
    monkeypatch.setenv("MIG_KIT_RUNS", str(tmp_path / "runs"))
    for system in ("base", "sft", "sft_long"):
        (tmp_path / system).mkdir()
        (tmp_path / system / "model.safetensors").write_text(system)
    (tmp_path / "runs" / "a" / "05_grpo").mkdir(parents=True)
    (tmp_path / "runs" / "b").mkdir()
    write_json(tmp_path / "runs" / "a" / "05_grpo" / "run.json", {"key": "5", "outputs": {}})
    write_json(tmp_path / "runs" / "b" / run_folders.BRANCH_FILE,
               {"from": "a", "stages": {"05_grpo": "5"}})
    return tmp_path


def take(root, run_id, hardware="a CPU", **params):
    """`take_replies` as 06 of the run calls it; "a" then leaves FILES and finishes."""
    folder = root / "runs" / run_id / "06_evaluate"
    stage = SimpleNamespace(
        name="06_evaluate", run_id=run_id, folder=folder,
        inputs={"01_synthesize": {"val.parquet": "1"}},
        params=validate_params({"run_id": run_id, **params}, "06_evaluate"))
    models = {system: root / system for system in ("base", "sft", "sft_long")}
    taken = store.take_replies(stage, models, hardware, ("mmiu",))
    if run_id == "a":
        for name in FILES:
            if params.get("replies", 8) or name in GREEDY:
                (folder / "replies" / name).write_text(name)
        write_json(folder / "run.json", {"outputs": {}})
    return taken


def list_copied(root):
    copied = {path.name for path in (root / "runs/b/06_evaluate/replies").glob("*.jsonl")}
    for name in copied:
        assert (root / "runs/b/06_evaluate/replies" / name).read_text() == name
    return copied


def test_all_replies_of_equal_models_are_taken(root):
    assert take(root, "a") == {}
    taken = take(root, "b")
    assert taken == {f"{system} {kind}": "a" for system in ("base", "sft", "sft_long")
                     for kind in ("greedy", "drawn")}
    assert list_copied(root) == set(FILES)


@pytest.mark.parametrize("first, then", [
    ({}, {"seed": 3}), ({}, {"sampled_per_task": 5}), ({}, {"replies": 4}), ({}, {"replies": 0}),
    ({"replies": 0}, {}), ({"replies": 0}, {"replies": 0})])
def test_greedy_replies_do_not_follow_from_what_draws_others(root, first, then):
    take(root, "a", **first)
    assert set(take(root, "b", **then)) == {"base greedy", "sft greedy", "sft_long greedy"}
    assert list_copied(root) == GREEDY


@pytest.mark.parametrize("changed", [
    {"eval_seed": 3}, {"max_new_tokens": 20}, {"mmiu_per_task": 7},
    {"hardware": "a GPU"}, {"server": "http://127.0.0.1:1"}])
def test_nothing_is_taken_where_greedy_replies_may_differ(root, changed):
    take(root, "a")
    assert take(root, "b", **changed) == {} and list_copied(root) == set()


def test_another_model_takes_nothing(root):
    take(root, "a")
    (root / "sft" / "model.safetensors").write_text("another")
    assert "sft greedy" not in take(root, "b") and not list_copied(root) & {"sft_mmiu_greedy.jsonl"}


def test_replies_of_two_servers_or_devices_go_to_no_branch(root):
    """An interrupted 06 goes on where another server stands; its first replies stay."""
    take(root, "a", server="http://127.0.0.1:1")
    (root / "runs/a/06_evaluate/run.json").unlink()
    for _ in range(2):  # once more, after another interruption
        take(root, "a")
        keys = json.loads((root / "runs/a/06_evaluate/replies" / store.REPLY_KEYS).read_text())
        assert set(keys.values()) == {store.MIXED}
    assert take(root, "b") == {}


def test_an_unfinished_source_gives_nothing(root):
    take(root, "a")
    (root / "runs/a/06_evaluate/run.json").unlink()
    assert take(root, "b") == {}
