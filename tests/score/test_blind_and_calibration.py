"""What needs no image, and what a shift of boxes costs: by brute force and planted shifts."""

import itertools
import json

import numpy as np
import pytest
from mig_bench_records import mig_records, run_score

from mig_kit.score import blind, calibration
from mig_kit.stats import gap_interval_by_list


def random_boxes(rng, n):
    corners = rng.uniform(0, 0.6, (n, 2))
    return np.hstack([corners, corners + rng.uniform(0.15, 0.4, (n, 2))])


def test_the_constant_box_is_nearly_the_best_of_a_grid_of_all():
    boxes = random_boxes(np.random.default_rng(3), 10)
    grid = [box for box in itertools.product(np.linspace(0, 1, 13), repeat=4)
            if box[0] < box[2] and box[1] < box[3]]
    best = max((blind.pairwise_iou(np.array(box), boxes) >= 0.5).sum() for box in grid)
    reached = (blind.pairwise_iou(blind.fit_constant_box(boxes), boxes) >= 0.5).sum()
    assert reached >= best - 1


def records_about(answers):
    return [{**mig_records()[4], "images": [f"{row}.png"] * 3, "answer": list(box)}
            for row, box in enumerate(answers)]


def score(tmp_path, answers, replies, *words):
    result = run_score(tmp_path, "mig_bench", "--json", tmp_path / "o.json", *words,
                       records=records_about(answers), replies=replies)
    assert result.exit_code == 0, result.exception
    return json.loads((tmp_path / "o.json").read_text()), result.output


def test_blind_rows_where_every_answer_is_the_same(tmp_path):
    """A model that is right everywhere gains nothing over a constant box; `--no-blind` hides it."""
    answers, replies = [[0.1, 0.1, 0.4, 0.4]] * 30, ["(100,100),(400,400)"] * 30
    result, output = score(tmp_path, answers, replies)
    assert result["blind"]["rows"]["constant box"]["avg"] == 100
    assert result["blind"]["rows"]["whole image"]["avg"] == 0
    assert result["blind"]["over"]["avg"]["value"] == 0 and "points over blind" in output
    result, output = score(tmp_path, answers, replies, "--no-blind")
    assert "blind" not in result and "blind" not in output


def test_an_items_own_list_is_never_in_its_fit(tmp_path):
    """One answer apart from all others, and another in every fold: no constant finds it."""
    answers = [[0.1, 0.1, 0.4, 0.4]] * 29 + [[0.7, 0.7, 0.9, 0.9]]
    result, _ = score(tmp_path, answers, ["(700,700),(900,900)"] * 30)
    assert result["blind"]["rows"]["constant box"]["avg"] == pytest.approx(100 * 29 / 30)


PLANTED = {"shift": [[1, 0.03]] * 4, "scale": [[0.9, 0]] * 4,
           "padded square": [[1, 0], [0.7, 0.15], [1, 0], [0.7, 0.15]],
           "y2 short": [[1, 0], [1, 0], [1, 0], [0.91, 0]]}


@pytest.mark.parametrize("edges", PLANTED.values(), ids=PLANTED.keys())
def test_planted_maps_come_back_within_a_thousandth(edges):
    rng = np.random.default_rng(1)
    answers = random_boxes(rng, 400)
    boxes = calibration.apply_map(np.array(edges, float), answers)
    boxes[rng.random(400) < 0.2] = random_boxes(rng, 1)  # one in five is somewhere else
    result = calibration.apply_map(calibration.fit_map(boxes, answers), boxes)
    right = np.abs(result - answers).max(1) < 0.001
    assert right.mean() > 0.75


def test_a_model_without_a_shift_gains_nothing():
    """Of twenty such models at most two have an interval that leaves out 0."""
    alarms = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        answers = random_boxes(rng, 200)
        boxes = answers + rng.normal(0, 0.04, (200, 4))
        changed = calibration.refit(boxes, answers, np.arange(200))
        gaps = (blind.pairwise_iou(changed, answers) >= 0.5).astype(float) - (
            blind.pairwise_iou(boxes, answers) >= 0.5)
        alarms += gap_interval_by_list([(gaps, np.arange(200))])[0] > 0
    assert alarms <= 2


def test_a_shift_is_called_one(tmp_path):
    answers = random_boxes(np.random.default_rng(2), 120).round(3)
    replies = ["({},{}),({},{})".format(*(round(1000 * value + 60) for value in box))
               for box in answers]
    result, output = score(tmp_path, answers.tolist(), replies, "--calibrate")
    part = result["calibration"]["acc"]["0.5"]
    assert part["value"] > 10 and part["ci95"][0] > 0 and part["after"] > 95
    assert "a systematic shift of boxes: frame, resize or padding" in output
    refused = run_score(tmp_path, "blink", "--calibrate", records=[
        {"idx": "val_T_1", "task": "T", "answer": "(A)"}], replies=["A"])
    assert "--calibrate is for mig_bench, lisa, revos" in str(refused.exception) or "idx" in str(
        refused.exception)
