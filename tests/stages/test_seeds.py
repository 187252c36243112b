"""Several runs together: hand-made replies of two runs, right or wrong by plan."""

import json

import pytest

from mig_kit.boxes import BoxFormat, to_model_box
from mig_kit.prompts import format_answer
from mig_kit.stages import seeds
from mig_kit.world import suites

PARAMS = {
    "eval_seed": 3,
    "mig_per_task": 2,
    "ood_per_task": 2,
    "blink_per_task": 2,
    "mmiu_per_task": 2,
    "min_pixels": 3136,
    "max_pixels": 401408,
    "coordinates": "absolute",
}


def right(sample) -> str:
    if sample.options:
        return f"<think></think><answer>{sample.letter}</answer>"
    if not sample.targets:
        return "<think></think><answer>none</answer>"
    image, box = sample.targets[0]
    model_box = to_model_box(box, sample.sizes[image - 1], BoxFormat())
    return f"<think></think><answer>{format_answer(image, model_box)}</answer>"


def write_run(root, run_id, share, **changed):
    """A finished 06_evaluate: GRPO is correct on the first `share` of each task's two samples."""
    folder = root / run_id / "06_evaluate"
    (folder / "replies").mkdir(parents=True)
    gap = {"value": 50.0 * share, "ci95": [0.0, 100.0], "sampled": None}
    metrics = {"systems": {}, "deltas": {"grpo-sft": {}, "grpo-base": {}}}
    for suite in suites.SUITES:
        samples = suites.make_suite(suite, "test", 2, 3)
        for system in ("base", "sft", "grpo"):
            done, lines = {}, []
            for sample in samples:
                done[sample.task] = done.get(sample.task, 0) + 1
                good = system == "grpo" and done[sample.task] <= share
                lines.append({"id": sample.id, "replies": [right(sample) if good else "no"]})
            (folder / "replies" / f"{system}_{suite}_greedy.jsonl").write_text(
                "".join(json.dumps(li) + "\n" for li in lines)
            )
            metrics["systems"].setdefault(system, {})[suite] = {
                "score": 50.0 * share * (system == "grpo")
            }
        metrics["deltas"]["grpo-sft"][suite] = metrics["deltas"]["grpo-base"][suite] = gap
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "run.json").write_text(json.dumps({"params": PARAMS | changed}))


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("MIG_KIT_RUNS", str(tmp_path))
    return tmp_path


def test_two_runs_by_hand(root):
    write_run(root, "a", 1)
    write_run(root, "b", 2)
    mean = seeds.aggregate_runs(["a", "b"])["mmiu"]
    assert mean["value"] == 75.0 and mean["over_seeds"] == pytest.approx(
        12.706 * 25, abs=0.1
    )  # t(0.975, 1), sd 35.4, n 2
    assert 50 <= mean["ci95"][0] < 75 < mean["ci95"][1] <= 100
    alone = seeds.aggregate_runs(["b"])["mmiu"]
    assert (alone["value"], alone["ci95"], alone["over_seeds"]) == (100.0, [100.0, 100.0], None)


def test_the_table_names_every_run_and_both_intervals(root):
    write_run(root, "a", 1)
    write_run(root, "b", 2)
    lines = seeds.markdown_table(["a", "b"]).splitlines()
    assert lines[0].count("|") == 7 and "a: base" in lines[0] and "b: base" in lines[0]
    assert (
        lines[2].startswith("| MIG-Bench-like (drawn) | RL over SFT | 0.0 / 0.0 / 50.0, **+50.0**")
        and "; ± 317.7)" in lines[5]
    )


def test_runs_on_other_samples_are_not_compared(root):
    write_run(root, "a", 1)
    write_run(root, "b", 2, eval_seed=4)
    with pytest.raises(ValueError, match="eval_seed is a 3, b 4"):
        seeds.markdown_table(["a", "b"])
    with pytest.raises(FileNotFoundError, match="mig-kit run --run-id c"):
        seeds.markdown_table(["c"])
    with pytest.raises(ValueError, match="named twice"):
        seeds.markdown_table(["a", "a"])
    (root / "a" / "05_grpo").mkdir()
    (root / "a" / "05_grpo" / "run.json").write_text(
        json.dumps({"outputs": {"model/model.safetensors": "new"}})
    )
    record = json.loads((root / "a" / "06_evaluate" / "run.json").read_text())
    record["inputs"] = {"05_grpo": {"model/model.safetensors": "old"}}
    (root / "a" / "06_evaluate" / "run.json").write_text(json.dumps(record))
    with pytest.raises(
        ValueError,
        match="are of a model before 05_grpo was run again; run: mig-kit run 06 --run-id a",
    ):
        seeds.markdown_table(["a"])
