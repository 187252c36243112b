"""Intervals over lists of images: by hand, their properties, and how often they cover the truth."""

import numpy as np
import pytest
from scipy.stats import t as student_t

from mig_kit.score.result import Scored, paired_difference, summarize
from mig_kit.stats import (
    average_interval_by_list,
    gap_interval_by_list,
    share_interval,
    share_interval_by_list,
)


def test_share_interval_by_hand():
    """Three lists of two questions: 2, 1 and 0 of them correct."""
    values, lists = np.array([1, 1, 1, 0, 0, 0.0]), np.array([4, 4, 7, 7, 9, 9])
    # Sums less the mean: 1, 0, -1; over 6 questions, and 1 - 2/6 for the leverage.
    variance = (1 + 1) / 36 / (2 / 3)
    size = 0.25 / variance
    z = student_t.ppf(0.975, 2)
    half = z * np.sqrt(0.25 / size + z ** 2 / (4 * size ** 2)) / (1 + z ** 2 / size)
    assert size == pytest.approx(3)
    assert share_interval_by_list(values, lists) == pytest.approx([0.5 - half, 0.5 + half])


def test_all_or_none_correct_gets_the_exact_interval_over_lists():
    lists = np.repeat(np.arange(10), 3)
    assert share_interval_by_list(np.ones(30), lists) == share_interval(10, 10)
    assert share_interval_by_list(np.zeros(30), lists)[1] == pytest.approx(1 - 0.025 ** 0.1)
    assert share_interval_by_list(np.array([1.0, 0.0]), np.zeros(2)) == [0, 1]


def test_questions_asked_again_about_the_same_images_tell_nothing_new():
    values = np.random.default_rng(0).integers(0, 2, 60).astype(float)
    once = share_interval_by_list(values, np.arange(60))
    five = share_interval_by_list(np.repeat(values, 5), np.repeat(np.arange(60), 5))
    assert five == pytest.approx(once)
    as_if_new = share_interval_by_list(np.repeat(values, 5), np.arange(300))
    assert as_if_new[1] - as_if_new[0] < 0.5 * (once[1] - once[0])


def test_gap_interval_by_hand():
    gaps, lists = np.array([1.0, 0, 0, 1]), np.arange(4)
    half = student_t.ppf(0.975, 3) * np.std(gaps, ddof=1) / 2
    assert gap_interval_by_list(gaps, lists) == pytest.approx([0.5 - half, min(1, 0.5 + half)])
    unseen = 1 - 0.025 ** 0.25
    assert gap_interval_by_list(np.zeros(4), lists) == pytest.approx([-unseen, unseen])
    assert gap_interval_by_list(np.ones(4), lists) == pytest.approx([1 - 2 * unseen, 1])


def test_tasks_about_the_same_images_do_not_narrow_the_average():
    values = np.random.default_rng(1).integers(0, 2, 80).astype(float)
    lists = np.repeat(np.arange(20), 4)
    alone = share_interval_by_list(values, lists)
    twice = average_interval_by_list([(values, lists)] * 2, share_interval_by_list)
    assert twice == pytest.approx(alone)
    apart = average_interval_by_list([(values, lists), (values, lists + 20)],
                                     share_interval_by_list)
    width = (alone[1] - alone[0]) / 2 ** 0.5
    assert apart[1] - apart[0] == pytest.approx(width, rel=0.05)


def test_scores_take_their_intervals_over_lists_and_are_not_rounded():
    values = np.array([1.0, 1, 0, 0, 1, 0, 1])
    scored = Scored(("a",) * 7, {"acc": values}, True, values, lists=tuple("xxyyzzz"))
    result = summarize(scored)
    assert result["lists"] == result["tasks"]["a"]["lists"] == 3
    assert result["avg"]["acc"] == pytest.approx(100 * 4 / 7, abs=1e-12)
    expected = share_interval_by_list(values, np.array([0, 0, 1, 1, 2, 2, 2]))
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
    """92 to 97 % for every task and for the average, at correlation 0.5; over questions, as if they
    were independent, far less.
    """
    rng, structure, repeats = np.random.default_rng(5), list_structure(), 200
    hits = dict.fromkeys([*structure, "average", "difference", "by question"], 0)
    largest = max(structure, key=lambda task: len(structure[task]) / len(set(structure[task])))
    accuracies = (0.2, 0.5, 0.8)
    for accuracy in accuracies * repeats:
        groups = []
        for task, lists in structure.items():
            values = draw_outcomes(rng, lists, accuracy)
            low, high = share_interval_by_list(values, lists)
            hits[task] += low <= accuracy <= high
            groups.append((values, lists))
        low, high = average_interval_by_list(groups, share_interval_by_list)
        hits["average"] += low <= accuracy <= high
        values, lists = groups[list(structure).index(largest)]
        low, high = share_interval_by_list(values, np.arange(len(values)))
        hits["by question"] += low <= accuracy <= high
        low, high = gap_interval_by_list(values - draw_outcomes(rng, lists, accuracy), lists)
        hits["difference"] += low <= 0 <= high
    coverage = {name: count / repeats / len(accuracies) for name, count in hits.items()}
    assert coverage.pop("by question") < 0.8
    assert all(0.92 <= share <= 0.97 for share in coverage.values()), coverage
