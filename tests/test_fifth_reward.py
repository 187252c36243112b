"""A reward of one's own takes a file of ten lines and one parameter: 05 trains with it, curves,
gallery and table show it, and nothing before 05 is repeated.
"""

import json
import shutil

import pytest
from command_line import run_mig_kit

from mig_kit.pipeline.params import profile_params

pytestmark = pytest.mark.slow
CENTER = '''\
from mig_kit.prompts import parse_reply, reply_box_in_original


def center(reply, sample, box_format):
    """1 where the middle of the reply's box lies in a target of the image that it names."""
    answer = parse_reply(reply)
    box = reply_box_in_original(sample, answer, box_format) or (0, 0, 0, 0)
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return None if sample.options else float(any(
        image == answer.image and x1 < x < x2 and y1 < y < y2
        for image, (x1, y1, x2, y2) in sample.targets))
'''


@pytest.fixture(scope="module")
def runs(smoke_runs, tmp_path_factory):
    """A folder of runs with a copy of the smoke run, and beside it the file of the reward."""
    root = tmp_path_factory.mktemp("own") / "runs"
    shutil.copytree(smoke_runs / "smoke", root / "smoke")
    (root.parent / "my_rewards.py").write_text(CENTER)
    return root


def run_variant(runs, *words):
    file = runs.parent / "my_rewards.py"
    return run_mig_kit("run", *words, "--profile", "smoke", "-p", "rewards",
                       f"[format, image, box, choice, {file}:center]", "-p", "reward_weights",
                       "{center: 0.5}", MIG_KIT_RUNS=str(runs))


def test_a_reward_of_ones_own_is_a_file_and_a_parameter(runs):
    result = run_variant(runs, "05", "06", "07", "--from", "smoke", "--run-id", "own")
    assert result.returncode == 0, result.stderr[-3000:] + result.stdout[-1000:]
    folder = runs / "own" / "05_grpo"
    record = json.loads((folder / "run.json").read_text())
    weights = profile_params("05_grpo")["reward_weights"]
    assert record["params"]["reward_weights"] == {**weights, "center": 0.5}
    assert "rewards/my_rewards.py" in record["outputs"]
    assert (folder / "rewards" / "my_rewards.py").read_text() == CENTER
    curves = json.loads((folder / "metrics.json").read_text())["curves"]
    assert len(curves) == 2 and all(0 <= row["center"] <= 1 for row in curves)
    assert "center " in result.stdout, "its mean is printed while it trains"
    rollouts = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    assert {row["step"] for row in rollouts} == {0, 2}
    assert any(row["rewards"]["center"] is not None for row in rollouts)
    page = (runs / "own" / "07_report" / "report.html").read_text()
    assert f"<td>{runs.parent}/my_rewards.py:center</td><td>0.50</td>" in page, "not in the table"
    assert "center 0" in page or "center 1" in page, "not in the gallery"
    assert "What the replies become" in page and "<figcaption>" in page
    see_that_another_text_makes_05_stale(runs)


def see_that_another_text_makes_05_stale(runs):
    words = ("05", "--from", "smoke", "--run-id", "own")
    assert "05_grpo: up to date" in run_variant(runs, *words).stdout
    file = runs.parent / "my_rewards.py"
    file.write_text(CENTER.replace("return None if", "1 / 0\n    return None if"))
    result = run_variant(runs, *words)
    assert result.returncode != 0
    assert f"the reward 'center' failed in {file}, line 9: ZeroDivisionError" in result.stderr
    file.write_text(CENTER)
    assert "05_grpo: up to date" in run_variant(runs, *words).stdout, "its result was kept"
