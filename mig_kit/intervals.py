"""Means over tasks and their bootstrap intervals, as every score of the kit has them."""

import numpy as np

RESAMPLES = 2000


def bootstrap(groups: list[np.ndarray], seed: int = 0, resamples: int = RESAMPLES) -> list[float]:
    """95 % interval [low, high] of the unweighted mean of the groups' means; groups: (n,) float each.

    Percentile bootstrap, stratified: every group is drawn again within itself.
    """
    rng = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for values in groups:
        rows = max(1, 4_000_000 // len(values))  # at a time: a benchmark of 45,000 items would need gigabytes
        for start in range(0, resamples, rows):
            part = means[start:start + rows]
            part += values[rng.integers(0, len(values), (len(part), len(values)))].mean(1) / len(groups)
    return [float(v) for v in np.percentile(means, [2.5, 97.5])]


def macro(groups: list[np.ndarray]) -> float:
    """Unweighted mean of the groups' means."""
    return float(np.mean([values.mean() for values in groups]))


def percent(value: float) -> float:
    """A share as percent, two decimals; never -0.0."""
    return round(100 * float(value), 2) + 0.0
