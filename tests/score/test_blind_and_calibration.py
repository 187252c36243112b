"""What needs no image, and what a shift of boxes costs: by brute force and planted shifts."""

import itertools
import json
import re
from dataclasses import replace

import numpy as np
import pytest
from mig_bench_records import (
    BLINK_FILES,
    MIG_FILE,
    mig_records,
    needs_data,
    prediction_lines,
    run_score,
    save_image,
    score_predictions,
)

from mig_kit.boxes import iou
from mig_kit.common import PROJECT_ROOT
from mig_kit.score import blind, calibration
from mig_kit.score.benchmarks import read_benchmark
from mig_kit.score.records import read_records
from mig_kit.score.result import averaged_groups, number_lists


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


def shapes():
    """Benchmark -> records of two lists of images a question or more, boxes of the same shares."""
    shares = random_boxes(np.random.default_rng(5), 60)
    width, height = 640, 480
    pixels = (shares * [width, height, width, height]).tolist()
    names = [f"{row // 2}.png" for row in range(60)]
    yield "lisa", [{"image_path": name, "instruction": "", "boxes": [box]}
                   for name, box in zip(names, pixels)]
    yield "ref_l4", [{"id": str(row), "file_name": name, "width": width, "height": height,
                      "bbox": [x1, y1, x2 - x1, y2 - y1]}
                     for row, (name, (x1, y1, x2, y2)) in enumerate(zip(names, pixels))]
    yield "own", [{"images": [name], "question": "q", "image": 1, "box": (1000 * share).tolist(),
                   "coordinates": "normalized_1000"} for name, share in zip(names, shares)]
    yield "mig_bench", [{**mig_records()[4], "images": [name] * 3, "answer": share.tolist()}
                        for name, share in zip(names, shares)]


@pytest.mark.parametrize("name,records", shapes(), ids=lambda value: str(value)[:9])
def test_rows_by_brute_force(tmp_path, name, records):
    """The constant of each question is refitted here one question at a time."""
    for number in range(30):
        save_image(tmp_path / f"{number}.png", (640, 480))
    scored = score_predictions(read_benchmark(name, records), [
        {"index": row, "id": str(row), "response": "x", "pred_bbox": [0, 0, 1, 1],
         "format": "xyxy"} if name != "own" else {"index": row, "response": "x"}
        for row in range(60)], "free_text" if name == "own" else "official", images=str(tmp_path))
    values, lists = blind.blind_values(scored), number_lists(scored)
    boxes = blind.shares_of_image([item for item, _ in scored.judged])
    for row, task in enumerate(scored.tasks):
        rest = [other for other, its_task in enumerate(scored.tasks)
                if its_task == task and lists[other] % 5 != lists[row] % 5]
        constant = blind.fit_constant_box(boxes[rest])
        assert values[blind.CONSTANT][row] == (iou(tuple(constant), tuple(boxes[row])) >= 0.5)
        assert values[blind.WHOLE][row] == (iou((0, 0, 1, 1), tuple(boxes[row])) >= 0.5)


@needs_data
def test_letters_of_blink_by_brute_force():
    records = read_records(BLINK_FILES[0])
    scored = score_predictions(read_benchmark("blink", records), records)
    letters = [item.letter for item, _ in scored.judged]
    values, lists = blind.blind_values(scored)[blind.LETTER], number_lists(scored)
    for row in range(0, len(letters), 37):
        rest = [letter for letter, task, number in zip(letters, scored.tasks, lists)
                if task == scored.tasks[row] and number % 5 != lists[row] % 5]
        assert values[row] == (letters[row] == max(dict.fromkeys(rest), key=rest.count))


@needs_data
@pytest.mark.parametrize("name,constant", [("revised_MIG_bench", 56.2), ("MIG_data", 48.8)])
def test_a_constant_box_on_common_object(name, constant):
    benchmark = read_benchmark("mig_bench", read_records(MIG_FILE.with_name(f"{name}.json")))
    items = tuple(item for item in benchmark.items if item.task == "common_object")
    scored = score_predictions(replace(benchmark, items=items), [
        {"index": item.index, "response": ""} for item in items])
    assert 100 * blind.blind_values(scored)[blind.CONSTANT].mean() == pytest.approx(constant,
                                                                                   abs=0.1)


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


@pytest.mark.parametrize("scale, is_said", [(0.9, False), (0.05, True)])
def test_a_fit_that_ends_at_the_bound_of_its_slope_says_so(scale, is_said):
    answers = random_boxes(np.random.default_rng(1), 100)
    edges = calibration.fit_map(scale * answers, answers)
    gain = {"before": 0, "after": 0, "value": 0, "ci95": [0, 0]}
    notes = calibration.calibration_notes({
        "boxes": 100, "map": dict(zip(calibration.EDGES, edges)), "acc": {"0.5": gain},
        "median_error": {}}, "m")
    assert any("is shown, as the interval holds 0" in note for note in notes)
    assert any("has not converged" in note for note in notes) == is_said


AUTHORS = np.array([[1, 0], [1.05, 0], [1, 0], [1.10, 0]])  # what Migician's script applies


def gains_over_known_map(edges, boxes, answers, lists, groups):
    """IoU threshold -> `measure_gain` of a held-out refit over a map of the same family."""
    known, refitted = (np.clip(part, 0, 1) for part in (
        calibration.apply_map(edges, boxes), calibration.refit(boxes, answers, lists)))
    return {threshold: calibration.measure_gain(*(
        (blind.pairwise_iou(part, answers) >= threshold).astype(float)
        for part in (known, refitted)), lists, groups) for threshold in calibration.THRESHOLDS}


def test_a_held_out_refit_comes_within_a_point_of_the_map_that_was_planted():
    """As many questions as MIG-Bench has; two of five boxes are somewhere else."""
    rng, lists = np.random.default_rng(2), np.arange(4000)
    answers = random_boxes(rng, 4000)
    boxes = (answers + rng.laplace(0, 0.03, (4000, 4))) / AUTHORS[:, 0]
    boxes[rng.random(4000) < 0.4] = random_boxes(rng, 1)
    gains = gains_over_known_map(AUTHORS, boxes, answers, lists, [lists])
    assert all(gain["value"] > -1 for gain in gains.values())


def test_models_without_a_shift_gain_nothing():
    """Of 200 such models at most ten have an interval that leaves out 0."""
    alarms, lists = 0, np.arange(100)
    for seed in range(200):
        rng = np.random.default_rng(seed)
        answers = random_boxes(rng, 100)
        boxes = answers + rng.normal(0, 0.04, (100, 4))
        alarms += calibration.measure_refit(boxes, answers, lists, [lists])["ci95"][0] > 0
    assert alarms <= 10


@needs_data
@pytest.mark.slow
def test_the_figures_of_the_page_are_what_the_code_measures():
    """Scores, points over blind and refits of three models' released replies, row by row."""
    folder = MIG_FILE.parent
    benchmark = read_benchmark("mig_bench", read_records(folder / "revised_MIG_bench.json"))
    scored = {name: score_predictions(benchmark, read_records(
        folder / f"revised_replies_{name}.jsonl")) for name in ("migician", "univg-r1", "qwen2_vl")}
    boxes, answers = calibration.boxes_as_read(scored["migician"])
    lists, groups = number_lists(scored["migician"]), averaged_groups(scored["migician"])
    gains = gains_over_known_map(AUTHORS, boxes, answers, lists, groups)
    assert all(gain["ci95"][1] >= 0 for gain in gains.values()), gains
    scaled = np.minimum(1000 * calibration.apply_map(AUTHORS, boxes), [1000, 999, 1000, 999])
    scored["scaled"] = score_predictions(benchmark, prediction_lines(
        ["({:.0f},{:.0f}),({:.0f},{:.0f})".format(*box) for box in scaled]))
    page, readme = ((PROJECT_ROOT / name).read_text() for name in (
        "notebooks/guide/what_is_a_point.md", "README.md"))
    rows = {"Migician 7B (SFT)": "migician", "UniVG-R1 7B (RL)": "univg-r1",
            "Qwen2-VL-7B": "qwen2_vl", "the same, scaled by its authors' script": "scaled"}
    for label, name in rows.items():
        result = calibration.calibrate(scored[name])
        cells = [as_cell(gap) for gap in result["acc"].values()]
        marked = [f"**{cell}**" if gap["ci95"][0] > 0.05 else cell
                  for cell, gap in zip(cells, result["acc"].values())]
        before, after = (f"{result['acc']['0.5'][part]:.2f}" for part in ("before", "after"))
        over = as_cell(blind.blind_summary(scored[name])["over"]["avg"])[1:]
        assert f"| {label} | {before} | {over} | {after} | {' | '.join(marked)} |" in page
        if name != "scaled":
            assert re.search(rf"\| {re.escape(label)} \| {before} \|[^|]*\| "
                             rf"{re.escape(cells[0])} \|", readme)
    figures = [f"{float(value):.1f}" for value in re.findall(
        r"[+-](\d+\.\d+)", calibration.split_difference(scored["univg-r1"], scored["migician"]))]
    difference, low, high, part, part_low, part_high, rest, rest_low, rest_high = figures
    text = page.replace("\n", " ")
    assert f"{difference} points ({low} to {high})" in text
    assert f"**{part} ({part_low} to {part_high}) are calibration**" in text
    assert f"and {rest} ({rest_low} to {rest_high}) are not" in text


def as_cell(gap):
    value, low, high = (round(number, 1) + 0.0 for number in (gap["value"], *gap["ci95"]))
    return f"{value:+.1f} ({low:.1f} to {high:.1f})"


def test_a_shift_is_called_one(tmp_path):
    answers = random_boxes(np.random.default_rng(2), 120).round(3)
    replies = ["({},{}),({},{})".format(*(round(1000 * value + 60) for value in box))
               for box in answers]
    result, output = score(tmp_path, answers.tolist(), replies, "--calibrate")
    part = result["calibration"]["acc"]["0.5"]
    assert part["value"] > 10 and part["ci95"][0] > 0 and part["after"] > 95
    assert "a systematic shift of boxes: frame, resize or padding" in output
