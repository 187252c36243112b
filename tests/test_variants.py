"""A variant of 05 from a finished run, with a reward of one's own: one command, ten lines."""

import json
import shutil

import pytest
from command_line import describe_files, notebooks_in_this_process, output_of

from mig_kit.pipeline.params import profile_params
from mig_kit.pipeline.run_folders import RECIPE

pytestmark = pytest.mark.slow
CENTER = '''\
def center(answer, sample):
    """1 where the middle of the answer's box lies in a target of the image that it names."""
    if sample.options or not answer.box:
        return None if sample.options else 0.0
    left, top, right, bottom = answer.box
    return float(any(
        answer.image == image and x1 < (left + right) / 2 < x2 and y1 < (top + bottom) / 2 < y2
        for image, (x1, y1, x2, y2) in sample.targets))
'''
RUN = ("run", "--profile", "smoke", "--run-id", "variant")
FROM_SMOKE = (*RUN, "05", "06", "07", "--from", "smoke")


def variant_options(root):
    return ("-p", "loss_type", "dr_grpo", "-p", "reward_weights", "{center: 0.5}",
            "-p", "rewards", f"[format, image, box, choice, {root / 'my_rewards.py'}:center]")


@pytest.fixture(scope="session")
def shared_runs(smoke_runs, make_once):
    """A folder of runs with a copy of the smoke run and the variant of it."""
    def run(root):
        shutil.copytree(smoke_runs / "smoke", root / "smoke")
        before = describe_files(root / "smoke", "*/**/*")
        (root / "my_rewards.py").write_text(CENTER)
        with notebooks_in_this_process():
            output = output_of(*FROM_SMOKE, *variant_options(root), MIG_KIT_RUNS=str(root))
        assert "center " in output, "its mean is printed while it trains"
        assert describe_files(root / "smoke", "*/**/*") == before, "a variant changed its source"

    return make_once("variants", run)


def read_record(runs, run_id, stage):
    return json.loads((runs / run_id / stage / "run.json").read_text())


def test_a_variant_is_one_command_and_has_its_own_stages_alone(shared_runs):
    runs, variant = shared_runs, shared_runs / "variant"
    folders = {path.name for path in variant.iterdir() if path.is_dir()}
    assert folders == {"05_grpo", "06_evaluate", "07_report"}
    branch = {"from": "smoke", "stages": list(RECIPE[1:5])}
    for stage in folders:
        assert read_record(runs, "variant", stage)["branch"] == branch
    inputs = read_record(runs, "variant", "06_evaluate")["facts"]["input"]
    assert inputs.keys() == {"01_synthesize", "03_merge", "05_grpo"}
    first, second = (read_record(runs, run, "05_grpo") for run in ("smoke", "variant"))
    assert first["params"]["loss_type"] == "dapo" and second["params"]["loss_type"] == "dr_grpo"
    assert first["facts"]["input"]["03_merge"] == second["facts"]["input"]["03_merge"]
    drawn, again = (runs / run / "06_evaluate" / "replies" for run in ("smoke", "variant"))
    for name in ("base_mig_bench_greedy.jsonl", "sft_mmiu_drawn.jsonl"):
        assert (again / name).read_bytes() == (drawn / name).read_bytes()
    adapter = json.loads((variant / "05_grpo/adapter/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == "../../../smoke/03_merge/merged"


def test_a_reward_of_ones_own_is_a_file_and_a_parameter(shared_runs):
    folder = shared_runs / "variant" / "05_grpo"
    record = read_record(shared_runs, "variant", "05_grpo")
    weights = profile_params("05_grpo")["reward_weights"]
    assert record["params"]["reward_weights"] == {**weights, "center": 0.5}
    assert "rewards/my_rewards.py" in record["outputs"]
    assert (folder / "rewards" / "my_rewards.py").read_text() == CENTER
    curves = json.loads((folder / "metrics.json").read_text())["curves"]
    assert len(curves) == 2 and all(0 <= row["center"] <= 1 for row in curves)
    rollouts = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rollouts} == {0, 2}
    assert any(row["rewards"]["center"] is not None for row in rollouts)
    page = (shared_runs / "variant" / "07_report" / "report.html").read_text()
    assert "center 0" in page or "center 1" in page, "not in the gallery"
    assert "What the replies become" in page


def test_a_variant_goes_on_without_its_sources_name(shared_runs):
    """What is up to date is skipped; table and differences take earlier stages from there."""
    environment = {"MIG_KIT_RUNS": str(shared_runs)}
    options = variant_options(shared_runs)
    again = output_of(*RUN, "05", "06", "07", *options, **environment)
    assert again.count("up to date") == 3
    assert "\n| variant | 1 | " in output_of("table", "smoke", "variant", **environment)
    lines = output_of("status", **environment).splitlines()
    assert any(line.startswith("variant (smoke); from smoke; 05 06 07 done") for line in lines)
