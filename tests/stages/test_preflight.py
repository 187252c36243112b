"""Stage 00."""

import pytest
from own_questions import write_questions

from mig_kit.common import write_json
from mig_kit.engine import models
from mig_kit.pipeline.params import profile_params
from mig_kit.pipeline.plan import start_branch
from mig_kit.pipeline.run_folders import RECIPE
from mig_kit.stages import preflight


def test_too_small_a_machine_is_one_sentence():
    machine = {"available_gib": 1.5, "disk_free_gib": 0.2}
    with pytest.raises(MemoryError, match="needs 4 GiB of memory and 1.5 GiB are free"):
        preflight.require_resources(machine, 4.0, 0.1)
    with pytest.raises(OSError, match="MIG_KIT_RUNS"):
        preflight.require_resources(machine, 1.0, 1.0)
    preflight.require_resources(machine, 1.0, 0.1)
    with pytest.raises(RuntimeError, match="needs a GPU, and PyTorch .* sees none"):
        preflight.require_resources({"gpu": "none", **machine}, 1.0, 0.1, needs_gpu=True)
    preflight.require_resources({"gpu": "A100", **machine}, 1.0, 0.1, needs_gpu=True)


def predict(root, scale=1.0, plan=None, run_id="new"):
    """Minutes by stage, on a machine so many times as slow as the one that was timed."""
    name = ""
    if plan is not None:
        name = str(root / "plan.json")
        write_json(root / "plan.json", plan)
    stages, values = preflight.read_plan(name, run_id, "tiny")
    rows = preflight.predict_minutes(scale * preflight.REFERENCE_SECONDS, stages,
                                     preflight.relative_work("tiny", values))
    return {row["stage"]: row["minutes"] for row in rows}


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MIG_KIT_RUNS", str(tmp_path))
    return tmp_path


def test_expected_minutes_scale_with_the_machine(root):
    costs = {stage: minutes for stage, (minutes, _) in preflight.TINY_COST.items()}
    assert predict(root) == costs
    assert predict(root, 3.0) == {stage: round(3 * cost, 1) for stage, cost in costs.items()}
    assert 0 < preflight.time_reference_step(models.choose_hardware("float32"), 1) < 60


def test_expected_minutes_scale_with_the_work(root):
    """Of what `-p` sets, of the stages that a command names, of a branch, of own data."""
    plan = {"05_grpo": profile_params("05_grpo") | {"max_steps": 25}}
    assert predict(root, plan=plan) == {"05_grpo": round(0.2 + 7.1 / 5, 1)}
    for stage in RECIPE[1:5]:
        (root / "a" / stage).mkdir(parents=True)
        write_json(root / "a" / stage / "run.json", {"params": profile_params(stage)})
    start_branch("a", "b", "05_grpo")
    assert list(predict(root, run_id="b")) == ["05_grpo", "06_evaluate", "07_report"]
    own = write_questions(root / "own", 40)
    values = {"01_synthesize": {"data": str(own), "teacher": "none"},
              "05_grpo": {"max_steps": 20}}
    plan = {stage: profile_params(stage) | values.get(stage, {})
            for stage in ("01_synthesize", "04_rejection_sampling", "05_grpo", "06_evaluate")}
    minutes = predict(root, plan=plan)
    assert minutes["04_rejection_sampling"] < 1 < minutes["05_grpo"] and sum(minutes.values()) < 15


def test_the_machine_is_described_even_where_no_run_exists_yet(tmp_path, monkeypatch):
    monkeypatch.setenv("MIG_KIT_RUNS", str(tmp_path / "none" / "yet"))
    machine = preflight.describe_machine()
    assert machine["cpus"] > 0 and machine["memory_gib"] > 0 and machine["disk_free_gib"] > 0


def share(**changes):
    """Stage -> work of the tiny profile with changed parameters."""
    return preflight.relative_work("tiny", {
        stage: {name: value for name, value in changes.items() if name in profile_params(stage)}
        for stage in RECIPE})


def test_work_by_hand():
    assert set(share().values()) == {1.0}
    assert share(max_steps=250)["05_grpo"] == 2.0
    traces = 10 * 360 + 7 * 160
    more = share(cot_per_task=370)
    assert more["01_synthesize"] == more["02_sft"] == pytest.approx((traces + 100) / traces)
    greedy = (10 + 4) * 100 + 4 * 60 + 3 * 80
    drawn = 8 * 20 * (10 + 4 + 4 + 3)
    without = share(replies=0)
    assert without["04_rejection_sampling"] == 0
    assert without["06_evaluate"] == pytest.approx(greedy / (greedy + drawn))
    without = share(teacher="none")
    assert without["02_sft"] == 0 and without["06_evaluate"] == pytest.approx(2 / 3)


def test_the_summary_says_what_a_gpu_needs():
    assert preflight.summary("tiny", 24.4, []) == "about 24 minutes in all"
    assert preflight.summary("tiny", 24.4, [], 55.0) == (
        "about 24 minutes in all; this machine is too busy to be timed: other programs take 55 % "
        "of its cores")
    memory = [{"stage": "02_sft", "GiB": 21.6}, {"stage": "05_grpo", "GiB": 28.4}]
    assert preflight.summary("large", 24.4, memory) == (
        "profile large: predicted 28.4 GiB of a GPU (05_grpo)")
