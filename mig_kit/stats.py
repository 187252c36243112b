"""Statistics of every score: means over tasks, intervals over samples and seeds, and pass@k."""

from collections import defaultdict
from collections.abc import Iterable

import numpy as np
from scipy.optimize import brentq
from scipy.special import betainc, betaln, logsumexp, softmax
from scipy.stats import binomtest
from scipy.stats import t as student_t

# of two outcomes within a list of images, as `share_interval_by_list` considers them
CORRELATIONS = np.r_[1e-6, (np.arange(16) + 0.5) / 16]

Groups = list[tuple[np.ndarray, np.ndarray]]  # (values, lists of images), (n,) each, of each task


def group_by_task(tasks: Iterable[str], values: np.ndarray) -> dict[str, np.ndarray]:
    """task -> its rows of values (n, ...), tasks in order of appearance; tasks: (n,)."""
    rows = defaultdict(list)
    for row, task in enumerate(tasks):
        rows[task].append(row)
    return {task: values[task_rows] for task, task_rows in rows.items()}


def ratio_interval(parts: np.ndarray, totals: np.ndarray, resamples: int = 2000) -> list[float]:
    """95 % interval [low, high] of sum(parts) / sum(totals), (n,) float each.

    Percentile bootstrap over the n cases; if all have the same ratio, `share_interval_by_list`. A
    resample whose totals are all 0 counts as 0.
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


def macro_mean(groups: list[np.ndarray]) -> float:
    """Unweighted mean of the groups' means."""
    return float(np.mean([values.mean() for values in groups]))


def to_percent(value: float) -> float:
    """A share as percent, to the precision that a float's own errors leave; never -0.0."""
    return round(100 * float(value), 10) + 0.0


def _list_errors(values: np.ndarray, lists: np.ndarray) -> np.ndarray:
    """(k,) what each list of images adds to the mean's error; their sum of squares is its variance.

    values, lists: (n,) of the questions; lists: a number for the images that a question shows. With
    the leverage correction CR2 (Bell and McCaffrey 2002). Needs two lists.
    """
    _, places = np.unique(lists, return_inverse=True)
    sums, counts = np.bincount(places, weights=values), np.bincount(places)
    residuals = (sums - values.mean() * counts) / len(values)
    return residuals / np.sqrt(1 - counts / len(values))


def _count_effective_lists(lists: np.ndarray) -> float:
    """How many lists of equal size would hold as many questions together."""
    return len(lists) ** 2 / np.sum(np.unique(lists, return_counts=True)[1].astype(float) ** 2)


def _lists_of_variance(lists: np.ndarray) -> float:
    """How many lists of equal size would tell the variance as well (Satterthwaite 1946)."""
    squares = np.unique(lists, return_counts=True)[1].astype(float) ** 2
    return float(squares.sum() ** 2 / np.sum(squares ** 2))


def _weigh_correlations(groups: Groups) -> np.ndarray:
    """(17,) how likely each of CORRELATIONS is after these outcomes, beta-binomial in the lists."""
    spreads = (1 / CORRELATIONS - 1)[:, None]
    logs = np.log(np.where(CORRELATIONS < 0.01, 0.2, 0.05))  # independent: one chance in five
    means = (np.arange(40)[:, None, None] + 0.5) / 40
    for values, lists in groups:
        _, places = np.unique(lists, return_inverse=True)
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
    are correct, Clopper and Pearson's over the lists. [0, 1] for one list of mixed outcomes.
    groups: (values in 0..1, lists of images) of each task.
    """
    all_lists = np.concatenate([lists for _, lists in groups])
    mean, count = macro_mean([values for values, _ in groups]), len(np.unique(all_lists))
    if mean in (0, 1):
        return share_interval(int(mean) * count, count)
    if count == 1:
        return [0.0, 1.0]
    variances = np.zeros(len(CORRELATIONS))
    for values, lists in groups:
        share = (values.sum() + mean) / (len(values) + 1)  # a small task may have all correct
        size = len(values) / (1 + (len(values) / _count_effective_lists(lists) - 1) * CORRELATIONS)
        variances += share * (1 - share) / size
    sizes = mean * (1 - mean) * (len(groups) / _shared_list_factor(groups)) ** 2 / variances
    # averaged over how much outcomes may correlate within a list of images
    chances = _weigh_correlations(groups) if count < len(all_lists) else CORRELATIONS < 0.01

    def excess(bound: float, tail: float) -> float:
        return float(chances @ betainc(sizes * mean + 0.5, sizes * (1 - mean) + 0.5, bound)) - tail

    return [brentq(excess, 0, 1, tail) for tail in (0.025, 0.975)]


def gap_interval_by_list(groups: Groups) -> list[float]:
    """95 % interval [low, high] of the unweighted mean of the tasks' differences (-1..1).

    Student's t over the lists of images. If the differences do not vary, the largest share of other
    lists, and the largest difference, that the sample leaves possible. [-1, 1] for one list.
    groups: (differences, lists) of each task.
    """
    all_lists = np.concatenate([lists for _, lists in groups])
    if len(np.unique(all_lists)) == 1:
        return [-1.0, 1.0]
    mean = macro_mean([values for values, _ in groups])
    variance = sum(float(np.sum(_list_errors(values, lists) ** 2)) for values, lists in groups
                   if len(np.unique(lists)) > 1)
    if not variance:
        unseen = share_interval(0, len(np.unique(all_lists)))[1]
        return [mean - unseen * (mean + 1), mean + unseen * (1 - mean)]
    size = len(groups) ** 2 / sum(1 / len(values) for values, _ in groups)
    # where almost nothing differs, as if four questions did (one in five of few)
    least = min(4, size / 5) * (len(groups) / size) ** 2
    degrees = sum(_count_effective_lists(lists) for _, lists in groups) - len(groups)
    error = max(variance, least) ** 0.5 * _shared_list_factor(groups) / len(groups)
    half = float(student_t.ppf(0.975, max(1, degrees))) * error
    return [max(-1.0, mean - half), min(1.0, mean + half)]


def paired_gap_by_list(groups: Groups, is_same: bool = False) -> dict:
    """{"value", "ci95"} of paired differences, in points; groups: as of `gap_interval_by_list`.

    is_same: whether the replies are the same, so that the difference is 0 without doubt.
    """
    interval = [0.0, 0.0] if is_same else gap_interval_by_list(groups)
    return {"value": to_percent(macro_mean([gaps for gaps, _ in groups])),
            "ci95": [to_percent(bound) for bound in interval]}


def _shared_list_factor(groups: Groups) -> float:
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
    """Chance that k of `total` replies hold one of the `correct` (arXiv 2107.03374, eq. 1)."""
    if total - correct < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(total - correct + 1, total + 1)))


def joint_interval(groups: list[np.ndarray], lists: list[np.ndarray] | None = None,
                   others: list[np.ndarray] | None = None) -> dict:
    """{"value", "low", "high", "over"} of several runs' score, or of its difference to `others`.

    low, high: 95 % interval, over samples or "seeds and samples": half widths of the t intervals,
    added in quadrature. It covers the truth in 95 % of cases or more, in 90 % with few lists of
    very unequal sizes. NaN for samples of one list. A single run beside several varies as they do.

    Args:
        groups, others: (runs, samples) values of each task, paired by sample, not by seed.
        lists: of each task, if samples share images.
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
    half = sum(float(student_t.ppf(0.975, degrees)) ** 2 * part for part, degrees in parts) ** 0.5
    half = float("nan") if is_one_list else half
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
