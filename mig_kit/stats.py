"""Statistics of every score: means over tasks, intervals over samples and seeds, and pass@k."""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from scipy.optimize import brentq
from scipy.special import betainc, betaln, logsumexp, softmax
from scipy.stats import binomtest
from scipy.stats import t as student_t

# of two outcomes about the same images, as `share_interval_by_list` considers them
CORRELATIONS = np.r_[1e-6, (np.arange(16) + 0.5) / 16]

# (values, clusters) of each task, (n,) each; a cluster's number says which images a question shows,
# so that questions about the same images have the same
Groups = list[tuple[np.ndarray, np.ndarray]]


def group_by_task(tasks: Iterable[str], values: np.ndarray) -> dict[str, np.ndarray]:
    """task -> its rows of values (n, ...), tasks in order of appearance; tasks: (n,)."""
    rows = defaultdict(list)
    for row, task in enumerate(tasks):
        rows[task].append(row)
    return {task: values[task_rows] for task, task_rows in rows.items()}


def ratio_interval(parts: np.ndarray, totals: np.ndarray, resamples: int = 2000) -> list[float]:
    """95 % interval [low, high] of sum(parts) / sum(totals), (n,) float each.

    Percentile bootstrap over the n cases, in which totals that are all 0 count as 0. If all cases
    have the same ratio: `share_interval_by_list`.
    """
    ratios = parts[totals > 0] / totals[totals > 0]
    if not len(ratios):
        return share_interval(0, 0)
    if len(set(ratios)) == 1:
        return share_interval_by_list([(ratios, np.arange(len(ratios)))])
    draws = np.random.default_rng(0).integers(0, len(parts), (resamples, len(parts)))
    sums = totals[draws].sum(1)
    ratios = np.divide(parts[draws].sum(1), sums, out=np.zeros(resamples), where=sums != 0)
    return [float(value) for value in np.percentile(ratios, [2.5, 97.5])]


def share_interval(count: int, total: int) -> list[float]:
    """Exact 95 % interval [low, high] of count / total (Clopper, Pearson); [0, 1] for total 0."""
    if not total:
        return [0.0, 1.0]
    interval = binomtest(int(count), int(total)).proportion_ci(0.95, "exact")
    return [float(interval.low), float(interval.high)]


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


def _count_effective_clusters(clusters: np.ndarray) -> float:
    """(sum of sizes)^2 / sum of squared sizes: the number of clusters, if they were equal."""
    sizes = np.unique(clusters, return_counts=True)[1].astype(float)
    return len(clusters) ** 2 / np.sum(sizes ** 2)


def _clusters_of_variance(clusters: np.ndarray) -> float:
    """How many clusters of equal size would estimate the variance as well (Satterthwaite 1946)."""
    squares = np.unique(clusters, return_counts=True)[1].astype(float) ** 2
    return float(squares.sum() ** 2 / np.sum(squares ** 2))


def _weigh_correlations(groups: Groups) -> np.ndarray:
    """(17,) posterior of CORRELATIONS; outcomes are beta-binomial within a cluster."""
    spreads = (1 / CORRELATIONS - 1)[:, None]
    logs = np.log(np.where(CORRELATIONS < 0.01, 0.2, 0.05))  # independent: one chance in five
    means = (np.arange(40)[:, None, None] + 0.5) / 40
    for values, clusters in groups:
        _, places = np.unique(clusters, return_inverse=True)
        counts = np.c_[np.bincount(places, weights=values), np.bincount(places)]
        (correct, total), repeats = (part.T for part in
                                     np.unique(counts, axis=0, return_counts=True))
        first, second = means * spreads, (1 - means) * spreads
        each = betaln(first + correct, second + total - correct) - betaln(first, second)
        logs += logsumexp(each @ repeats, axis=0)
    return softmax(logs)


def share_interval_by_list(groups: Groups) -> list[float]:
    """95 % interval [low, high] of the unweighted mean of the tasks' shares of correct answers.

    Jeffreys' interval for as many independent answers as have the mean's variance; if all or none
    are correct, Clopper and Pearson's over the clusters. [0, 1] for one cluster of mixed outcomes.

    Args:
        groups: (values in 0..1, clusters) of each task.
    """
    all_clusters = np.concatenate([clusters for _, clusters in groups])
    mean, count = macro_mean([values for values, _ in groups]), len(np.unique(all_clusters))
    if mean in (0, 1):
        return share_interval(int(mean) * count, count)
    if count == 1:
        return [0.0, 1.0]
    variances = np.zeros(len(CORRELATIONS))
    for values, clusters in groups:
        share = (values.sum() + mean) / (len(values) + 1)  # a small task may have all correct
        cluster_size = len(values) / _count_effective_clusters(clusters)
        variances += share * (1 - share) / (len(values) / (1 + (cluster_size - 1) * CORRELATIONS))
    sizes = mean * (1 - mean) * (len(groups) / _shared_cluster_factor(groups)) ** 2 / variances
    # averaged over how much outcomes may correlate within a cluster
    chances = _weigh_correlations(groups) if count < len(all_clusters) else CORRELATIONS < 0.01

    def excess(bound: float, tail: float) -> float:
        return float(chances @ betainc(sizes * mean + 0.5, sizes * (1 - mean) + 0.5, bound)) - tail

    return [brentq(excess, 0, 1, tail) for tail in (0.025, 0.975)]


def gap_interval_by_list(groups: Groups) -> list[float]:
    """95 % interval [low, high] of the unweighted mean of the tasks' differences (-1..1).

    Student's t over the clusters. If the differences do not vary, the largest share of other
    clusters, and the largest difference, that the sample leaves possible. [-1, 1] for one cluster.

    Args:
        groups: (differences, clusters) of each task.
    """
    all_clusters = np.concatenate([clusters for _, clusters in groups])
    if len(np.unique(all_clusters)) == 1:
        return [-1.0, 1.0]
    mean = macro_mean([values for values, _ in groups])
    variance = sum(float(np.sum(_cluster_errors(values, clusters) ** 2))
                   for values, clusters in groups if len(np.unique(clusters)) > 1)
    if not variance:
        unseen = share_interval(0, len(np.unique(all_clusters)))[1]
        return [mean - unseen * (mean + 1), mean + unseen * (1 - mean)]
    size = len(groups) ** 2 / sum(1 / len(values) for values, _ in groups)
    # where almost nothing differs, as if four questions did (one in five of few)
    least = min(4, size / 5) * (len(groups) / size) ** 2
    degrees = sum(_count_effective_clusters(clusters) for _, clusters in groups) - len(groups)
    error = max(variance, least) ** 0.5 * _shared_cluster_factor(groups) / len(groups)
    half = float(student_t.ppf(0.975, max(1, degrees))) * error
    return [max(-1.0, mean - half), min(1.0, mean + half)]


def paired_gap_by_list(groups: Groups, is_same: bool = False) -> dict:
    """{"value", "ci95"} of paired differences, in points.

    Args:
        groups: as in `gap_interval_by_list`.
        is_same: whether the replies are the same, so that the difference is 0 without doubt.
    """
    interval = [0.0, 0.0] if is_same else gap_interval_by_list(groups)
    return {"value": to_percent(macro_mean([gaps for gaps, _ in groups])),
            "ci95": [to_percent(bound) for bound in interval]}


def _shared_cluster_factor(groups: Groups) -> float:
    """By how much clusters that several tasks share widen the average's standard error, >= 1."""
    errors: dict = defaultdict(list)
    for values, clusters in groups:
        names = np.unique(clusters)
        if len(names) > 1:
            for name, error in zip(names, _cluster_errors(values, clusters)):
                errors[name].append(error)
    separate = sum(error ** 2 for parts in errors.values() for error in parts)
    together = sum(sum(parts) ** 2 for parts in errors.values())
    return max(1.0, float(together / separate) ** 0.5) if separate else 1.0


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
