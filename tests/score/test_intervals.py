"""Intervals over lists of images: by hand, their properties, and how often they cover the truth."""

import numpy as np
import pytest
from mig_bench_records import prediction_lines, run_score, write_lines
from scipy.stats import binomtest
from scipy.stats import t as student_t

from mig_kit.score.result import Scored, compare_scores, summarize
from mig_kit.stats import gap_interval_by_list, share_interval, share_interval_by_list


def share_of(values, lists):
    return share_interval_by_list([(values, lists)])


def gap_of(gaps, lists):
    return gap_interval_by_list([(gaps, lists)])


def test_share_interval_by_hand():
    """Few questions get the exact interval, of a hundred the bootstrap is nearly Wald's."""
    exact = binomtest(6, 15).proportion_ci(0.95, "exact")
    low, high = share_of(np.r_[np.ones(6), np.zeros(9)], np.arange(15))
    assert low == pytest.approx(exact.low, abs=0.03) and high == pytest.approx(exact.high, abs=0.03)
    half = student_t.ppf(0.975, 99) * 0.5 / 99 ** 0.5
    bounds = share_of(np.tile([0.0, 1.0], 50), np.arange(100))
    assert bounds == pytest.approx([0.5 - half, 0.5 + half], abs=0.015)
    alike = share_of(np.repeat(np.tile([0.0, 1.0], 50), 4), np.repeat(np.arange(100), 4))
    assert alike == pytest.approx(bounds, abs=0.015), "copies of a question tell nothing"


def test_all_or_none_correct_gets_the_exact_interval_over_lists():
    lists = np.repeat(np.arange(10), 3)
    assert share_of(np.ones(30), lists) == share_interval(10, 10)
    assert share_of(np.zeros(30), lists)[1] == pytest.approx(1 - 0.025 ** 0.1)
    assert share_interval_by_list([(np.zeros(2), lists[:2]), (np.zeros(28), lists[2:])]) == \
        share_interval(0, 10)
    assert share_of(np.array([1.0, 0.0]), np.zeros(2)) == [0, 1]


def test_gap_interval_by_hand():
    gaps, lists = np.tile([1.0, 0, 0, 1], 25), np.arange(100)
    half = student_t.ppf(0.975, 99) * np.std(gaps, ddof=1) / 10
    assert gap_of(gaps, lists) == pytest.approx([0.5 - half, 0.5 + half], abs=0.015)
    unseen = 1 - 0.025 ** (1 / 200)
    tasks = [(np.zeros(20), np.arange(20) + 20 * task) for task in range(10)]
    assert gap_of(np.zeros(200), np.arange(200)) == pytest.approx([-unseen, unseen])
    assert gap_interval_by_list(tasks) == pytest.approx([-unseen, unseen])
    low, high = gap_of(np.r_[1.0, np.zeros(199)], np.arange(200))
    won, lost = share_interval(1, 200), share_interval(0, 200)
    assert [low, high] == pytest.approx([won[0] - lost[1], won[1]])
    assert gap_of(np.zeros(4), np.zeros(4)) == [-1, 1]


def test_tasks_about_the_same_images_do_not_narrow_the_average():
    values = np.random.default_rng(1).integers(0, 2, 80).astype(float)
    lists = np.repeat(np.arange(20), 4)
    for interval, rel in ((share_interval_by_list, 0.1), (gap_interval_by_list, 0.15)):
        widths = [np.diff(interval([(values, lists + shift) for shift in shifts]))[0]
                  for shifts in ((0,), (0, 0), (0, 20))]
        assert widths[1] == pytest.approx(widths[0], rel=rel)
        assert widths[2] == pytest.approx(widths[0] / 2 ** 0.5, rel=rel)


def test_scores_take_their_intervals_over_lists_and_are_not_rounded():
    values = np.array([1.0, 1, 0, 0, 1, 0, 1])
    scored = Scored(("a",) * 7, {"acc": values}, True, lists=tuple("xxyyzzz"))
    result = summarize(scored)
    assert result["lists"] == result["tasks"]["a"]["lists"] == 3
    assert result["avg"]["acc"] == pytest.approx(100 * 4 / 7, abs=1e-9)
    expected = share_of(values, np.array([0, 0, 1, 1, 2, 2, 2]))
    assert result["avg"]["ci95"] == pytest.approx([100 * bound for bound in expected], abs=1e-9)
    other = Scored(("a",) * 7, {"acc": np.zeros(7)}, True, lists=scored.lists,
                   detections=("another",))
    gap = compare_scores(scored, other)["acc"]
    assert gap["value"] == pytest.approx(400 / 7, abs=1e-9)
    assert gap["ci95"][0] < gap["value"] < gap["ci95"][1]


def list_structure():
    """Task -> (n,) list of each question, of the kinds that MIG-Bench has."""
    sizes = {"sixes": [5] * 110, "mixed": [3] * 46 + [4] * 97 + [5] * 58, "single": [1] * 99,
             "views": [3] * 58 + [2] * 24 + [4] * 10 + [6, 6, 5, 8]}
    return {task: np.repeat(np.arange(len(counts)), counts) for task, counts in sizes.items()}


def draw_outcomes(rng, lists, accuracy, correlation=0.5):
    """(n,) 0 or 1, beta-binomial within a list of images."""
    weight = (1 - correlation) / correlation
    names, places = np.unique(lists, return_inverse=True)
    chances = rng.beta(accuracy * weight, (1 - accuracy) * weight, len(names))
    return (rng.random(len(lists)) < chances[places]).astype(float)


def test_intervals_cover_the_truth_where_outcomes_in_a_list_correlate():
    """At correlation 0.5, of tasks and average; by question, as if independent, far less."""
    rng, structure, repeats = np.random.default_rng(5), list_structure(), 60
    hits = dict.fromkeys([*structure, "average", "difference", "by question"], 0)
    largest = max(structure, key=lambda task: len(structure[task]) / len(set(structure[task])))
    accuracies = (0.2, 0.5, 0.8)
    for accuracy in accuracies * repeats:
        groups = {task: (draw_outcomes(rng, lists, accuracy), lists)
                  for task, lists in structure.items()}
        values, lists = groups[largest]
        gaps = values - draw_outcomes(rng, lists, accuracy)
        intervals = {task: share_of(*group) for task, group in groups.items()}
        intervals |= {"average": share_interval_by_list(list(groups.values())),
                      "by question": share_of(values, np.arange(len(values)))}
        for name, (low, high) in intervals.items():
            hits[name] += low <= accuracy <= high
        low, high = gap_of(gaps, lists)
        hits["difference"] += low <= 0 <= high
    coverage = {name: count / repeats / len(accuracies) for name, count in hits.items()}
    assert coverage.pop("by question") < 0.8
    assert all(0.92 <= share <= 0.985 for share in coverage.values()), coverage


def test_equal_replies_differ_by_exactly_0(tmp_path):
    """Whatever their order in the file; other replies with the same questions correct do not."""
    records = [{"images": [f"{row}.png"], "question": "Where?", "image": 1,
                "box": [0, 0, 500, 500], "coordinates": "normalized_1000"} for row in range(20)]
    same, other = ([f"In image 1: [{start}, {start}, 500, {500 - row}]" for row in range(20)]
                   for start in (0, 1))
    for replies, interval in ((same, "+0.00 to +0.00"), (other, "-16.84 to +16.84")):
        write_lines(tmp_path / "b.jsonl", [line | {"response": f"{line['response']} "}
                                           for line in prediction_lines(replies)[::-1]])
        output = run_score(tmp_path, "own", "--compare", tmp_path / "b.jsonl", records=records,
                           replies=same).output
        assert f"+0.00 points ({interval}), paired" in output
