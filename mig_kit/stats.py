"""Means over tasks with their intervals, over samples and over seeds, and pass@k: the statistics of
every score of the kit.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable

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
    """A share as percent, to the precision that a float's own errors leave; never -0.0."""
    return round(100 * float(value), 10) + 0.0


def _list_errors(values: np.ndarray, lists: np.ndarray) -> np.ndarray:
    """(k,) what each list of images adds to the error of the mean, with the leverage correction CR2
    (Bell and McCaffrey 2002); the sum of the squares is the mean's variance. Needs two lists.

    values, lists: (n,) of the questions; lists: a number of the images that a question shows.
    Questions about the same images stand or fall together, so the lists are the sample, not the
    questions (Miller, arXiv 2411.00640).
    """
    _, places = np.unique(lists, return_inverse=True)
    sums, counts = np.bincount(places, weights=values), np.bincount(places)
    residuals = (sums - values.mean() * counts) / len(values)
    return residuals / np.sqrt(1 - counts / len(values))


def _list_quantile(lists: np.ndarray) -> float:
    """97.5 % point of Student's t; degrees of freedom: the effective number of lists less one."""
    counts = np.unique(lists, return_counts=True)[1]
    effective = len(lists) ** 2 / np.sum(counts ** 2)
    return float(student_t.ppf(0.975, max(1, effective - 1)))


def _lists_of_variance(lists: np.ndarray) -> float:
    """How many lists of equal size would tell the variance as well as these, if all answers of a
    list were the same (Satterthwaite 1946); lists: see _list_errors.
    """
    squares = np.unique(lists, return_counts=True)[1].astype(float) ** 2
    return float(squares.sum() ** 2 / np.sum(squares ** 2))


def share_interval_by_list(values: np.ndarray, lists: np.ndarray) -> list[float]:
    """95 % interval [low, high] of the mean of shares (0..1) of questions that share images.

    Wilson's interval for as many independent questions as have the variance that the lists show;
    where all or none is correct, Clopper and Pearson's exact one over the lists. [0, 1] for one
    list of mixed outcomes, which says nothing about others. values, lists: see _list_errors.
    """
    mean, total, lists_count = float(values.mean()), len(values), len(np.unique(lists))
    if values.min() == values.max() and mean in (0, 1):
        return share_interval(int(mean) * lists_count, lists_count)
    if lists_count == 1:
        return [0.0, 1.0]
    variance = float(np.sum(_list_errors(values, lists) ** 2))
    size = min(total, mean * (1 - mean) / variance) if variance > 0 else total
    shrinkage = _list_quantile(lists) ** 2 / size
    center = (mean + shrinkage / 2) / (1 + shrinkage)
    half = (shrinkage * mean * (1 - mean) + shrinkage ** 2 / 4) ** 0.5 / (1 + shrinkage)
    return [max(0.0, center - half), min(1.0, center + half)]


def gap_interval_by_list(gaps: np.ndarray, lists: np.ndarray) -> list[float]:
    """95 % interval [low, high] of the mean of differences (-1..1) of questions that share images.

    Student's t over the lists. Where the differences do not vary, those of other lists may: the
    bounds are then those of the largest share of lists, and the largest difference, that the sample
    leaves possible. gaps, lists: see _list_errors.
    """
    mean, lists_count = float(gaps.mean()), len(np.unique(lists))
    variance = float(np.sum(_list_errors(gaps, lists) ** 2)) if lists_count > 1 else 0.0
    if variance > 0:
        half = _list_quantile(lists) * variance ** 0.5
        return [max(-1.0, mean - half), min(1.0, mean + half)]
    unseen = share_interval(0, lists_count)[1]
    return [mean - unseen * (mean + 1), mean + unseen * (1 - mean)]


def average_interval_by_list(groups: list[tuple[np.ndarray, np.ndarray]],
                             interval: Callable[[np.ndarray, np.ndarray], list[float]]
                             ) -> list[float]:
    """95 % interval [low, high] of the unweighted mean of the tasks' means.

    groups: (values, lists) of each task; interval: of one task, by which the distances to its
    bounds are known; they add up in squares (Zou and Donner 2008), and more where tasks share
    lists.
    """
    means = np.array([values.mean() for values, _ in groups])
    lows, highs = np.array([interval(*group) for group in groups]).T
    factor = _shared_list_factor(groups) / len(groups)
    low = means.mean() - factor * np.sum((means - lows) ** 2) ** 0.5
    high = means.mean() + factor * np.sum((highs - means) ** 2) ** 0.5
    return [float(max(low, lows.min())), float(min(high, highs.max()))]


def percent_interval_by_list(groups: list[tuple[np.ndarray, np.ndarray]],
                             interval: Callable = share_interval_by_list) -> list[float]:
    """95 % interval in percent of the mean of the tasks' shares; groups: (values, lists) of each.

    The bootstrap over questions; over lists of images where questions share them or all outcomes of
    each task are the same, which the bootstrap would take for certain. interval: of one task, over
    its lists.
    """
    all_lists = np.concatenate([lists for _, lists in groups])
    is_varied = any(values.min() < values.max() for values, _ in groups)
    if is_varied and len(np.unique(all_lists)) == len(all_lists):
        bounds = bootstrap_interval([values for values, _ in groups])
    else:
        bounds = average_interval_by_list(groups, interval)
    return [to_percent(bound) for bound in bounds]


def paired_gap_by_list(groups: list[tuple[np.ndarray, np.ndarray]]) -> dict:
    """{"value", "ci95"} in points of paired differences, with the interval of
    `percent_interval_by_list`; groups: ((n,) differences, (n,) lists) of each task.
    """
    return {"value": to_percent(macro_mean([gaps for gaps, _ in groups])),
            "ci95": percent_interval_by_list(groups, gap_interval_by_list)}


def _shared_list_factor(groups: list[tuple[np.ndarray, np.ndarray]]) -> float:
    """By how much lists that several tasks share widen the average's standard error; else 1."""
    errors: dict = defaultdict(list)
    for values, lists in groups:
        names = np.unique(lists)
        if len(names) > 1:
            for name, error in zip(names, _list_errors(values, lists)):
                errors[name].append(error)
    separate = sum(error ** 2 for parts in errors.values() for error in parts)
    together = sum(sum(parts) ** 2 for parts in errors.values())
    return max(1.0, float(together / separate) ** 0.5) if separate else 1.0


def pass_at_k(correct: int, total: int, k: int) -> float:
    """Chance that k of `total` replies, `correct` of them correct, hold a correct one (Chen et al.,
    arXiv 2107.03374, eq. 1).
    """
    if total - correct < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(total - correct + 1, total + 1)))


def joint_interval(groups: list[np.ndarray], lists: list[np.ndarray] | None = None,
                   others: list[np.ndarray] | None = None) -> dict:
    """{"value", "low", "high", "over"} of a score of several runs on the same samples, or of its
    difference to that of others, paired by sample, not by seed.

    groups, others: (runs, samples) values of each task, in the same order of samples. lists: of
    each task, where samples share images; see _list_errors. value: the mean over tasks of the mean
    over runs and samples. low, high: its 95 % interval over samples and, with several runs, over
    "seeds and samples": the half widths of the t intervals, of the sampled tasks and of the runs'
    scores, added in quadrature; NaN for samples of one list of images, which say nothing about
    others. A single run beside several is taken to vary as they do. The interval covers the truth
    in 95 % of cases or more, whatever the share of either, 90 % with few lists of very unequal
    sizes; a bootstrap over three runs would be too narrow.
    """
    sets = [groups] if others is None else [groups, others]
    effects = [values.mean(0) for values in groups]
    if others is not None:
        effects = [effect - other.mean(0) for effect, other in zip(effects, others, strict=True)]
    tasks = len(effects)
    is_one_list = lists is not None and len(np.unique(np.concatenate(lists))) == 1
    lists = lists or [np.arange(len(effect)) for effect in effects]
    samples = sum(float(np.sum(_list_errors(effect, numbers) ** 2))
                  for effect, numbers in zip(effects, lists, strict=True)
                  if len(np.unique(numbers)) > 1) / tasks ** 2
    parts = [(samples, max(1, sum(map(_lists_of_variance, lists)) - tasks))]
    sides = [np.mean([values.mean(1) for values in runs], axis=0) for runs in sets]  # (runs,)
    singles = sum(len(scores) == 1 for scores in sides)
    parts += [(scores.var(ddof=1) * (1 / len(scores) + singles), len(scores) - 1)
              for scores in sides if len(scores) > 1]
    half = sum(float(student_t.ppf(0.975, degrees)) ** 2 * part
               for part, degrees in parts) ** 0.5
    half = float("nan") if is_one_list else half
    value = macro_mean(effects)
    over = "seeds and samples" if len(parts) > 1 else "samples"
    return {"value": value, "low": value - half, "high": value + half, "over": over}


def probability_of_improvement(groups: list[np.ndarray], others: list[np.ndarray]) -> float:
    """The chance that a run scores higher than one of the others on a task, ties counted half.

    Mean over tasks and over all pairs of runs (rliable, arXiv 2108.13264). groups, others: as of
    `joint_interval`.
    """
    chances = []
    for values, other in zip(groups, others, strict=True):
        gaps = values.mean(1)[:, None] - other.mean(1)[None]
        chances.append(np.mean((gaps > 0) + 0.5 * (gaps == 0)))
    return float(np.mean(chances))
