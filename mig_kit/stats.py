"""Means over tasks with their intervals, over samples and over seeds, and pass@k: the statistics of
every score of the kit.
"""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from scipy.stats import binomtest
from scipy.stats import t as student_t

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


def ratio_interval(parts: np.ndarray, totals: np.ndarray, seed: int = 0,
                   resamples: int = RESAMPLES) -> list[float]:
    """95 % interval [low, high] of sum(parts) / sum(totals); both (n,) float, drawn in pairs.

    Percentile bootstrap over the n cases; a resample whose totals are all 0 counts as 0.
    """
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, len(parts), (resamples, len(parts)))
    sums = totals[draws].sum(1)
    ratios = np.divide(parts[draws].sum(1), sums, out=np.zeros(resamples), where=sums != 0)
    return [float(value) for value in np.percentile(ratios, [2.5, 97.5])]


def share_interval(count: int, total: int) -> list[float]:
    """Exact 95 % interval [low, high] of a share, count of total (Clopper and Pearson); [0, 1] for
    a total of 0.
    """
    if not total:
        return [0.0, 1.0]
    interval = binomtest(int(count), int(total)).proportion_ci(0.95, "exact")
    return [float(interval.low), float(interval.high)]


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


def joint_interval(groups: list[np.ndarray]) -> dict:
    """{"value", "low", "high", "over"} of a score of several runs on the same samples.

    groups: (runs, samples) values of each task. value: the mean over tasks of the mean over runs
    and samples. low, high: its 95 % interval over samples and, with several runs, over "seeds and
    samples": the half widths of the two t intervals, of the sampled tasks and of the runs' scores,
    added in quadrature. It covers the truth in 95 % of cases or more, whatever the share of either;
    a bootstrap over three runs would be too narrow.
    """
    return _estimate([groups], [values.mean(0) for values in groups])


def joint_difference(groups: list[np.ndarray], others: list[np.ndarray]) -> dict:
    """As `joint_interval`, of one set of runs less another's: paired by sample, not by seed.

    groups, others: (runs, samples) values of each task, in the same order of samples.
    """
    effects = [values.mean(0) - other.mean(0)
               for values, other in zip(groups, others, strict=True)]
    return _estimate([groups, others], effects)


def _estimate(sets: list[list[np.ndarray]], effects: list[np.ndarray]) -> dict:
    """sets: the runs of one or two sides; effects: (samples,) mean over runs, of each task."""
    tasks = len(effects)
    samples = sum(effect.var(ddof=min(1, len(effect) - 1)) / len(effect)
                  for effect in effects) / tasks ** 2
    parts = [(samples, max(1, sum(map(len, effects)) - tasks))]
    for groups in sets:
        scores = np.mean([values.mean(1) for values in groups], axis=0)  # (runs,)
        if len(scores) > 1:
            parts.append((scores.var(ddof=1) / len(scores), len(scores) - 1))
    half = sum(float(student_t.ppf(0.975, degrees)) ** 2 * part
               for part, degrees in parts) ** 0.5
    value = macro_mean(effects)
    over = "seeds and samples" if len(parts) > 1 else "samples"
    return {"value": value, "low": value - half, "high": value + half, "over": over}


def probability_of_improvement(groups: list[np.ndarray], others: list[np.ndarray]) -> float:
    """The chance that a run scores higher than one of the others on a task, ties counted half.

    Mean over tasks and over all pairs of runs (rliable, arXiv 2108.13264). groups, others: as of
    `joint_difference`.
    """
    chances = []
    for values, other in zip(groups, others, strict=True):
        gaps = values.mean(1)[:, None] - other.mean(1)[None]
        chances.append(np.mean((gaps > 0) + 0.5 * (gaps == 0)))
    return float(np.mean(chances))
