"""Statistics of every score: means over tasks, intervals over questions and seeds, and pass@k.

Three intervals of 95 %: a bootstrap over lists of images (`share_interval_by_list`,
`gap_interval_by_list`, `ratio_interval`), the exact one of a share (`share_interval`), which takes
its place where few lists differ, and Student's t over seeds (`mean_interval`).
"""

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Sequence

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


def number_alike(keys: Iterable[Hashable]) -> np.ndarray:
    """(n,) a number for each key, in order of appearance, the same for equal ones."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys])


def first_rows(tasks: Sequence[str], count: int) -> list[int]:
    """Places of the first `count` of each task, in order."""
    by_task = group_by_task(tasks, np.arange(len(tasks)))
    return sorted(place for places in by_task.values() for place in places[:count].tolist())


def macro_mean(groups: list[np.ndarray]) -> float:
    """Unweighted mean of the groups' means."""
    return float(np.mean([values.mean() for values in groups]))


def to_percent(value: float) -> float:
    """A share as percent, to the precision that a float's own errors leave; never -0.0."""
    return round(100 * float(value), 10) + 0.0


def share_interval(count: float, total: float) -> list[float]:
    """Exact 95 % interval [low, high] of count / total (Clopper, Pearson); [0, 1] for total 0.

    They need not be whole: `share_interval_by_list` gives what correlated answers are worth.
    """
    low = beta.ppf(0.025, count, total - count + 1) if count > 0 else 0.0
    high = beta.ppf(0.975, count + 1, total - count) if count < total else 1.0
    return [float(low), float(high)]


def mean_interval(values: Sequence[float], others: Sequence[float] = ()) -> list[float] | None:
    """95 % interval [low, high] of the mean of independent values, Student's t.

    others: the mean's difference to theirs, with unequal variances (Welch); of a single value it is
    a prediction interval, as if that were one more of the other side's. None where no side has two
    values, and for values that do not differ.
    """
    sides = [np.asarray(side, dtype=float) for side in (values, others) if len(side)]
    several = [side for side in sides if len(side) > 1]
    if not any(map(np.ptp, several)):
        return None
    if len(several) < len(sides):
        (side,) = several
        error, degrees = side.var(ddof=1) * (1 + 1 / len(side)), len(side) - 1
    else:
        errors = [side.var(ddof=1) / len(side) for side in sides]
        error = sum(errors)
        degrees = error ** 2 / sum(part ** 2 / (len(side) - 1)
                                   for part, side in zip(errors, sides))
    half = float(student_t.ppf(0.975, degrees) * error ** 0.5)
    value = float(sides[0].mean() - sum(side.mean() for side in sides[1:]))
    return [value - half, value + half]


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


def share_interval_by_list(groups: Groups) -> list[float]:
    """95 % interval [low, high] of the unweighted mean of the tasks' shares of correct answers.

    Bootstrap over clusters. With few clusters, few correct or few wrong it is the exact interval
    (Clopper, Pearson) of as many independent answers as have the bootstrap's variance (Korn and
    Graubard 1998), and of all clusters if all are alike. [0, 1] for one cluster of mixed outcomes.

    Args:
        groups: (values in 0..1, clusters) of each task.

    >>> correct = np.tile([1.0, 1.0, 0.0, 0.0], 50)
    >>> questions, pairs = np.arange(200), np.arange(200) // 2  # a list each, and one for two
    >>> [round(bound, 2) for bound in share_interval_by_list([(correct, questions)])]
    [0.43, 0.57]
    >>> [round(bound, 2) for bound in share_interval_by_list([(correct, pairs)])]
    [0.4, 0.6]
    """
    mean = macro_mean([values for values, _ in groups])
    count = len(np.unique(np.concatenate([clusters for _, clusters in groups])))
    if mean in (0, 1):
        return share_interval(mean * count, count)
    if count == 1:
        return [0.0, 1.0]
    total, degrees = sum(len(values) for values, _ in groups), _degrees(groups)
    means = _resample_means(groups)
    variance = float(means.var()) * (1 + 1 / degrees)
    size = min(total, mean * (1 - mean) / variance) if variance else total
    if size * min(mean, 1 - mean) < FEW or count < FEW_LISTS:
        ratio = student_t.ppf(0.975, total - 1) / student_t.ppf(0.975, degrees)
        return share_interval(mean * size * ratio ** 2, size * ratio ** 2)
    return [min(max(bound, 0.0), 1.0) for bound in _bootstrap_interval(groups, means)]


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
        low, high = _bootstrap_interval(groups, _resample_means(groups))
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


def _bootstrap_interval(groups: Groups, means: np.ndarray) -> list[float]:
    """Percentile interval of `_resample_means`, widened as Student's t is, for few clusters."""
    mean, degrees = macro_mean([values for values, _ in groups]), _degrees(groups)
    wider = student_t.ppf(0.975, degrees) / norm.ppf(0.975) * (1 + 1 / degrees) ** 0.5
    bounds = np.percentile(means, [2.5, 97.5])
    return [float(mean + wider * (bound - mean)) for bound in bounds]


def _degrees(groups: Groups) -> float:
    """Degrees of freedom of the variance between clusters (Satterthwaite 1946)."""
    squares = [np.unique(clusters, return_counts=True)[1].astype(float) ** 2
               for _, clusters in groups]
    return max(1.0, sum(float(part.sum() ** 2 / np.sum(part ** 2)) for part in squares)
               - len(groups))


def _resample_means(groups: Groups) -> np.ndarray:
    """(RESAMPLES,) unweighted means of the tasks' means, of clusters drawn with replacement.

    Clusters are drawn among those that the same tasks have, so that no task is ever empty.
    """
    names, places = np.unique(np.concatenate([clusters for _, clusters in groups]),
                              return_inverse=True)
    by_task = np.split(places, np.cumsum([len(values) for values, _ in groups])[:-1])
    counts = np.stack([np.bincount(rows, minlength=len(names)) for rows in by_task], 1)
    sums = np.stack([np.bincount(rows, values, len(names))
                     for rows, (values, _) in zip(by_task, groups)], 1)
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


def number_text(value: float, sign: str = "", digits: int = 1) -> str:
    """"1.0"; sign: "+" to write it, too. No zero has a minus."""
    return f"{round(value, digits) + 0.0:{sign}.{digits}f}"


def interval_text(value: float, ci95: Sequence[float], sign: str = "", digits: int = 1) -> str:
    """"1.0 (-2.1 to 4.1)", of `number_text`."""
    value, low, high = (number_text(number, sign, digits) for number in (value, *ci95))
    return f"{value} ({low} to {high})"


def pass_at_k(correct: int, total: int, k: int) -> float:
    """Chance that k of `total` replies hold one of the `correct` (arXiv 2107.03374, eq. 1)."""
    return 1.0 - math.comb(total - correct, k) / math.comb(total, k)
