"""Intervals over lists of images: by hand, their properties, and how often they cover the truth."""

import itertools

import numpy as np
import pytest
from mig_bench_records import prediction_lines, run_score, write_lines
from scipy.stats import beta
from scipy.stats import t as student_t

from mig_kit.score.result import Scored, paired_difference, summarize
from mig_kit.stats import gap_interval_by_list, share_interval, share_interval_by_list


def share_of(values, lists):
    return share_interval_by_list([(values, lists)])


def gap_of(gaps, lists):
    return gap_interval_by_list([(gaps, lists)])


def test_share_interval_by_hand():
    """Of independent questions Jeffreys' interval, of two tasks for as many as tell the mean."""
    values = np.array([1, 1, 1, 0, 0, 0, 0, 0.0])
    jeffreys = beta(3.5, 5.5).ppf([0.025, 0.975])
    assert share_of(values, np.arange(8)) == pytest.approx(jeffreys.tolist(), abs=1e-9)
    tasks = [(values[:4], np.arange(4)), (values[4:], np.arange(4, 8))]
    first, second = (3 + 0.375) / 5, 0.375 / 5  # shrunk by one question of the mean
    size = 4 * 4 * 0.375 * 0.625 / (first * (1 - first) + second * (1 - second))
    bounds = beta(size * 0.375 + 0.5, size * 0.625 + 0.5).ppf([0.025, 0.975])
    assert share_interval_by_list(tasks) == pytest.approx(bounds.tolist(), abs=1e-9)


def test_all_or_none_correct_gets_the_exact_interval_over_lists():
    lists = np.repeat(np.arange(10), 3)
    assert share_of(np.ones(30), lists) == share_interval(10, 10)
    assert share_of(np.zeros(30), lists)[1] == pytest.approx(1 - 0.025 ** 0.1)
    assert share_interval_by_list([(np.zeros(2), lists[:2]), (np.zeros(28), lists[2:])]) == \
        share_interval(0, 10)
    assert share_of(np.array([1.0, 0.0]), np.zeros(2)) == [0, 1]


def test_gap_interval_by_hand():
    gaps, lists = np.tile([1.0, 0, 0, 1], 3), np.arange(12)
    half = student_t.ppf(0.975, 11) * np.std(gaps, ddof=1) / 12 ** 0.5
    assert gap_of(gaps, lists) == pytest.approx([0.5 - half, 0.5 + half])
    unseen = 1 - 0.025 ** (1 / 200)
    tasks = [(np.zeros(20), np.arange(20) + 20 * task) for task in range(10)]
    assert gap_of(np.zeros(200), np.arange(200)) == pytest.approx([-unseen, unseen])
    assert gap_interval_by_list(tasks) == pytest.approx([-unseen, unseen])
    assert gap_of(np.ones(4), np.arange(4)) == pytest.approx([1 - 2 * (1 - 0.025 ** 0.25), 1])
    once = np.r_[1.0, np.zeros(199)]  # as if four of the 200 differed
    half = student_t.ppf(0.975, 199) * 2 / 200
    assert gap_of(once, np.arange(200)) == pytest.approx([0.005 - half, 0.005 + half])
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
    scored = Scored(("a",) * 7, {"acc": values}, True, values, lists=tuple("xxyyzzz"))
    result = summarize(scored)
    assert result["lists"] == result["tasks"]["a"]["lists"] == 3
    assert result["avg"]["acc"] == pytest.approx(100 * 4 / 7, abs=1e-12)
    expected = share_of(values, np.array([0, 0, 1, 1, 2, 2, 2]))
    assert result["avg"]["ci95"] == pytest.approx([100 * bound for bound in expected], abs=1e-9)
    other = Scored(("a",) * 7, {"acc": np.zeros(7)}, True, values, lists=scored.lists)
    gap = paired_difference(scored, other)["acc"]
    assert gap["value"] == pytest.approx(400 / 7, abs=1e-12)
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
    rng, structure, repeats = np.random.default_rng(5), list_structure(), 100
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


@pytest.mark.parametrize("sizes", [[1] * 20, [40] + [1] * 20, [40] * 5, [1, 2, 4, 8, 16, 32]])
def test_few_and_uneven_lists(sizes):
    """At correlations of 0.2 to 0.8; Student's t covers nine in ten with five of 40."""
    rng, lists, hits = np.random.default_rng(7), np.repeat(np.arange(len(sizes)), sizes), []
    for accuracy, correlation in itertools.product((0.2, 0.5, 0.8) * 40, (0.2, 0.5, 0.8)):
        low, high = share_of(draw_outcomes(rng, lists, accuracy, correlation), lists)
        hits.append(low <= accuracy <= high)
    assert 0.93 <= np.mean(hits) <= 0.985, np.mean(hits)


def test_equal_replies_differ_by_exactly_0(tmp_path):
    """Other replies with the same questions correct do not."""
    records = [{"images": [f"{row}.png"], "question": "Where?", "image": 1,
                "box": [0, 0, 500, 500], "coordinates": "normalized_1000"} for row in range(20)]
    same, other = ([f"In image 1: [{start}, {start}, 500, {500 - row}]" for row in range(20)]
                   for start in (0, 1))
    for replies, interval in ((same, "+0.00 to +0.00"), (other, "-16.84 to +16.84")):
        write_lines(tmp_path / "b.jsonl", prediction_lines(replies))
        output = run_score(tmp_path, "own", "--compare", tmp_path / "b.jsonl", records=records,
                           replies=same).output
        assert f"+0.00 points ({interval}), paired" in output
