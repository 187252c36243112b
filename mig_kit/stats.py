"""Statistics of every score: means over tasks, intervals over samples and seeds, and pass@k.

Intervals of scores are a bootstrap over lists of images or, where few lists differ, exact.
"""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from scipy.stats import beta, norm
from scipy.stats import t as student_t

RESAMPLES = 1000
FEW, FEW_LISTS = 10, 20  # of the rarer outcome, and of lists, below which an interval is exact

# (values, clusters) of each task, (n,) each; a cluster's number says which images a question shows,
# so that questions about the same images have the same
Groups = list[tuple[np.ndarray, np.ndarray]]


def group_by_task(tasks: Iterable[str], values: np.ndarray) -> dict[str, np.ndarray]:
    """task -> its rows of values (n, ...), tasks in order of appearance; tasks: (n,)."""
    rows = defaultdict(list)
    for row, task in enumerate(tasks):
        rows[task].append(row)
    return {task: values[task_rows] for task, task_rows in rows.items()}


def ratio_interval(parts: np.ndarray, totals: np.ndarray) -> list[float]:
    """95 % interval [low, high] of sum(parts) / sum(totals), (n,) float each.

    Percentile bootstrap over the n cases, in which totals that are all 0 count as 0. If all cases
    have the same ratio: `share_interval_by_list`.
    """
    ratios = parts[totals > 0] / totals[totals > 0]
    if not len(ratios):
        return share_interval(0, 0)
    if len(set(ratios)) == 1:
        return share_interval_by_list([(ratios, np.arange(len(ratios)))])
    draws = np.random.default_rng(0).integers(0, len(parts), (RESAMPLES, len(parts)))
    sums = totals[draws].sum(1)
    ratios = np.divide(parts[draws].sum(1), sums, out=np.zeros(RESAMPLES), where=sums != 0)
    return [float(value) for value in np.percentile(ratios, [2.5, 97.5])]


def share_interval(count: float, total: float) -> list[float]:
    """Exact 95 % interval [low, high] of count / total (Clopper, Pearson); [0, 1] for total 0.

    They need not be whole: `share_interval_by_list` gives what correlated answers are worth.
    """
    low = beta.ppf(0.025, count, total - count + 1) if count > 0 else 0.0
    high = beta.ppf(0.975, count + 1, total - count) if count < total else 1.0
    return [float(low), float(high)]


def mean_interval(values: np.ndarray) -> list[float]:
    """95 % interval [low, high] of the mean of independent values (n,), Student's t; else NaN."""
    if len(values) < 2:
        return [float("nan")] * 2
    half = float(student_t.ppf(0.975, len(values) - 1)) * values.std(ddof=1) / len(values) ** 0.5
    return [values.mean() - half, values.mean() + half]


def macro_mean(groups: list[np.ndarray]) -> float:
    """Unweighted mean of the groups' means."""
    return float(np.mean([values.mean() for values in groups]))


def to_percent(value: float) -> float:
    """A share as percent, to the precision that a float's own errors leave; never -0.0."""
    return round(100 * float(value), 10) + 0.0


def _cluster_errors(values: np.ndarray, clusters: np.ndarray) -> np.ndarray:
    """(k,) the part of each of k >= 2 clusters in the mean's error; their squares add up to its
    variance. With the leverage correction CR2 (Bell and McCaffrey 2002).
    """
    _, places = np.unique(clusters, return_inverse=True)
    sums, counts = np.bincount(places, weights=values), np.bincount(places)
    residuals = (sums - values.mean() * counts) / len(values)
    return residuals / np.sqrt(1 - counts / len(values))


def _clusters_of_variance(clusters: np.ndarray) -> float:
    """How many clusters of equal size would estimate the variance as well (Satterthwaite 1946)."""
    squares = np.unique(clusters, return_counts=True)[1].astype(float) ** 2
    return float(squares.sum() ** 2 / np.sum(squares ** 2))


def _resample_means(groups: Groups) -> np.ndarray:
    """(RESAMPLES,) unweighted means of the tasks' means, of clusters drawn with replacement.

    Clusters are drawn among those that the same tasks have, so that no task is ever empty.
    """
    names, places = np.unique(np.concatenate([clusters for _, clusters in groups]),
                              return_inverse=True)
    sums, counts, start = *np.zeros((2, len(names), len(groups))), 0
    for task, (values, _) in enumerate(groups):
        rows = places[start:start + len(values)]
        sums[:, task] = np.bincount(rows, values, len(names))
        counts[:, task] = np.bincount(rows, minlength=len(names))
        start += len(values)
    _, kinds = np.unique(counts > 0, axis=0, return_inverse=True)
    parts = [np.flatnonzero(kinds.ravel() == kind) for kind in range(kinds.max() + 1)]
    rng, means, size = np.random.default_rng(0), [], max(1, (1 << 18) // len(names))
    for first in range(0, RESAMPLES, size):
        repeats = min(size, RESAMPLES - first)
        drawn = np.hstack([part[rng.integers(0, len(part), (repeats, len(part)))]
                           for part in parts]) + len(names) * np.arange(repeats)[:, None]
        times = np.bincount(drawn.ravel(), minlength=repeats * len(names)).reshape(repeats, -1)
        means.append(np.mean(times @ sums / (times @ counts), axis=1))
    return np.concatenate(means)


def _degrees(groups: Groups) -> float:
    """The degrees of freedom of the variance between clusters."""
    return max(1.0, sum(_clusters_of_variance(clusters) for _, clusters in groups) - len(groups))


def _bootstrap_interval(groups: Groups) -> list[float]:
    """Percentile bootstrap over clusters, widened as Student's t is, which few clusters need."""
    mean, degrees = macro_mean([values for values, _ in groups]), _degrees(groups)
    wider = student_t.ppf(0.975, degrees) / norm.ppf(0.975) * (1 + 1 / degrees) ** 0.5
    bounds = np.percentile(_resample_means(groups), [2.5, 97.5])
    return [float(mean + wider * (bound - mean)) for bound in bounds]


def share_interval_by_list(groups: Groups) -> list[float]:
    """95 % interval [low, high] of the unweighted mean of the tasks' shares of correct answers.

    Bootstrap over clusters. With few clusters, few correct or few wrong it is the exact interval
    (Clopper, Pearson) of as many independent answers as have the bootstrap's variance (Korn and
    Graubard 1998), and of all clusters if all are alike. [0, 1] for one cluster of mixed outcomes.

    Args:
        groups: (values in 0..1, clusters) of each task.
    """
    mean = macro_mean([values for values, _ in groups])
    count = len(np.unique(np.concatenate([clusters for _, clusters in groups])))
    if mean in (0, 1):
        return share_interval(mean * count, count)
    if count == 1:
        return [0.0, 1.0]
    total, degrees = sum(len(values) for values, _ in groups), _degrees(groups)
    variance = float(_resample_means(groups).var()) * (1 + 1 / degrees)
    size = min(total, mean * (1 - mean) / variance) if variance else total
    if size * min(mean, 1 - mean) < FEW or count < FEW_LISTS:
        ratio = student_t.ppf(0.975, total - 1) / student_t.ppf(0.975, degrees)
        return share_interval(mean * size * ratio ** 2, size * ratio ** 2)
    return [min(max(bound, 0.0), 1.0) for bound in _bootstrap_interval(groups)]


def gap_interval_by_list(groups: Groups) -> list[float]:
    """95 % interval [low, high] of the unweighted mean of the tasks' differences (-1..1).

    Bootstrap over clusters; if few clusters differ at all, from the exact intervals of the shares
    that are won and lost. [-1, 1] for one cluster.

    Args:
        groups: (differences, clusters) of each task.
    """
    values, clusters = (np.concatenate(part) for part in zip(*groups))
    names, places = np.unique(clusters, return_inverse=True)
    if len(names) == 1:
        return [-1.0, 1.0]
    if np.sum(np.bincount(places, np.abs(values)) > 0) >= FEW:
        low, high = _bootstrap_interval(groups)
        return [max(-1.0, low), min(1.0, high)]
    won, lost = (macro_mean([np.maximum(sign * part, 0) for part, _ in groups]) for sign in (1, -1))
    (won_low, won_high), (lost_low, lost_high) = (share_interval(share * len(names), len(names))
                                                  for share in (won, lost))
    return [won_low - lost_high, won_high - lost_low]


def paired_gap_by_list(groups: Groups, is_same: bool = False) -> dict:
    """{"value", "ci95"} of paired differences, in points.

    Args:
        groups: as in `gap_interval_by_list`.
        is_same: whether the replies are the same, so that the difference is 0 without doubt.
    """
    interval = [0.0, 0.0] if is_same else gap_interval_by_list(groups)
    return {"value": to_percent(macro_mean([gaps for gaps, _ in groups])),
            "ci95": [to_percent(bound) for bound in interval]}


def pass_at_k(correct: int, total: int, k: int) -> float:
    """Chance that k of `total` replies hold one of the `correct` (arXiv 2107.03374, eq. 1)."""
    if total - correct < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(total - correct + 1, total + 1)))


def joint_interval(groups: list[np.ndarray], clusters: list[np.ndarray] | None = None,
                   others: list[np.ndarray] | None = None) -> dict:
    """Score of several runs, or its difference to `others`, with a 95 % interval.

    The half widths of the t intervals over samples and over runs are added in quadrature. It covers
    the truth in at least 95 % of cases, in 90 % with few clusters of very unequal sizes. A single
    run that is compared with several is taken to vary as they do.

    Args:
        groups, others: (runs, samples) values of each task, paired by sample, not by seed.
        clusters: (samples,) of each task, if samples share images.
    Returns: {"value", "low", "high", "over"}; low and high are NaN for samples of one cluster; over
        is "samples", or "seeds and samples" if a side has several runs.
    """
    sets = [groups] if others is None else [groups, others]
    effects = [values.mean(0) for values in groups]
    if others is not None:
        effects = [effect - other.mean(0) for effect, other in zip(effects, others, strict=True)]
    tasks = len(effects)
    is_one_cluster = clusters is not None and len(np.unique(np.concatenate(clusters))) == 1
    clusters = clusters or [np.arange(len(effect)) for effect in effects]
    samples = sum(float(np.sum(_cluster_errors(effect, numbers) ** 2))
                  for effect, numbers in zip(effects, clusters, strict=True)
                  if len(np.unique(numbers)) > 1) / tasks ** 2
    parts = [(samples, max(1, sum(map(_clusters_of_variance, clusters)) - tasks))]
    sides = [np.mean([values.mean(1) for values in runs], axis=0) for runs in sets]  # (runs,)
    singles = sum(len(scores) == 1 for scores in sides)
    parts += [(scores.var(ddof=1) * (1 / len(scores) + singles), len(scores) - 1)
              for scores in sides if len(scores) > 1]
    half = sum(float(student_t.ppf(0.975, degrees)) ** 2 * part for part, degrees in parts) ** 0.5
    half = float("nan") if is_one_cluster else half
    value = macro_mean(effects)
    over = "seeds and samples" if len(parts) > 1 else "samples"
    return {"value": value, "low": value - half, "high": value + half, "over": over}


def probability_of_improvement(groups: list[np.ndarray], others: list[np.ndarray]) -> float:
    """Chance that a run beats one of the others on a task, ties half (rliable, arXiv 2108.13264).

    Mean over tasks and pairs of runs. groups, others: as of `joint_interval`.
    """
    chances = []
    for values, other in zip(groups, others, strict=True):
        gaps = values.mean(1)[:, None] - other.mean(1)[None]
        chances.append(np.mean((gaps > 0) + 0.5 * (gaps == 0)))
    return float(np.mean(chances))
