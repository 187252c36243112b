"""Means over tasks with their bootstrap intervals, and pass@k: the statistics of every score of the
kit.
"""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np

RESAMPLES = 2000


def group_by_task(tasks: Iterable[str], values: np.ndarray) -> dict[str, np.ndarray]:
    """task -> its rows of values (n, ...), tasks in order of appearance.

    tasks: (n,) task of each row.
    """
    rows = defaultdict(list)
    for row, task in enumerate(tasks):
        rows[task].append(row)
    return {task: values[task_rows] for task, task_rows in rows.items()}


def bootstrap_interval(groups: list[np.ndarray], seed: int = 0,
                       resamples: int = RESAMPLES) -> list[float]:
    """95 % interval [low, high] of the unweighted mean of the groups' means; groups: (n,) float
    each.

    Percentile bootstrap, stratified: every group is drawn again within itself.
    """
    rng = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for values in groups:
        # Not all resamples at a time: a benchmark of 45,000 items would need gigabytes.
        rows = max(1, 4_000_000 // len(values))
        for start in range(0, resamples, rows):
            part = means[start:start + rows]
            draws = rng.integers(0, len(values), (len(part), len(values)))
            part += values[draws].mean(1) / len(groups)
    return [float(v) for v in np.percentile(means, [2.5, 97.5])]


def macro_mean(groups: list[np.ndarray]) -> float:
    """Unweighted mean of the groups' means."""
    return float(np.mean([values.mean() for values in groups]))


def to_percent(value: float) -> float:
    """A share as percent, two decimals; never -0.0."""
    return round(100 * float(value), 2) + 0.0


def percent_interval(groups: list[np.ndarray]) -> list[float]:
    """bootstrap_interval in percent."""
    return [to_percent(bound) for bound in bootstrap_interval(groups)]


def paired_gap(groups: list[np.ndarray]) -> dict:
    """{"value", "ci95"} in points of paired differences; groups: (n,) differences of each task."""
    return {"value": to_percent(macro_mean(groups)), "ci95": percent_interval(groups)}


def pass_at_k(correct: int, total: int, k: int) -> float:
    """Chance that k of `total` replies, `correct` of them correct, hold a correct one (Chen et al.,
    arXiv 2107.03374, eq. 1).
    """
    if total - correct < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(total - correct + 1, total + 1)))
