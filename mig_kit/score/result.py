"""What scoring gives, in percent and not rounded; intervals are over lists of images."""

from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np

from mig_kit.stats import gap_interval_by_list, group_by_task, macro_mean, share_interval_by_list


@dataclass(frozen=True)
class Scored:
    """Judged predictions of n items; the first metric is the headline."""

    tasks: tuple[str, ...]  # (n,)
    metrics: dict[str, np.ndarray]  # name -> (n,) shares in 0..1
    is_macro: bool  # whether the average is over tasks
    values: np.ndarray  # (n,) IoU, or 1 for a correct item
    problems: dict[str, int] = field(default_factory=dict)  # why replies scored nothing: how many
    # "avg" or task -> metric -> percent, for what is no mean over items (AP)
    aggregates: dict[str, dict[str, float]] = field(default_factory=dict)
    lists: tuple[Hashable, ...] = ()  # (n,) keys, equal for the same images; () if none are
    remarks: tuple[str, ...] = ()  # sentences on what the protocol did
    judged: tuple[tuple, ...] = ()  # (item, line as read or None, problem) each; () for AP


def averaged_groups(scored: Scored) -> list[np.ndarray]:
    """Places of the items of every task, which the average weighs the same; else of all items."""
    places = np.arange(len(scored.tasks))
    return list(group_by_task(scored.tasks, places).values()) if scored.is_macro else [places]


def number_lists(scored: Scored) -> np.ndarray:
    """(n,) a number for each item's list of images."""
    names = scored.lists or range(len(scored.tasks))
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names])


def headline_average(scored: Scored) -> float:
    """The average of the first metric, 0..1."""
    values = next(iter(scored.metrics.values()))
    return macro_mean([values[places] for places in averaged_groups(scored)])


def _percent(value: float) -> float:
    return 100 * float(value) + 0.0  # never -0.0


def summarize(scored: Scored) -> dict:
    """{"n", "lists", "tasks", "avg", "problems", "remarks"}, in percent, not rounded.

    tasks: task -> {"n", "lists", metrics, "ci95"}; avg: {metrics, "ci95"}. lists: how many lists of
    images there are. ci95: of the first metric, by `stats.share_interval_by_list`.
    """
    headline = next(iter(scored.metrics.values()), None)
    lists = number_lists(scored)
    tasks = {}
    for task, places in group_by_task(scored.tasks, np.arange(len(scored.tasks))).items():
        tasks[task] = {"n": len(places), "lists": len(np.unique(lists[places]))}
        tasks[task] |= {name: _percent(values[places].mean())
                        for name, values in scored.metrics.items()}
        if headline is not None:
            interval = share_interval_by_list([(headline[places], lists[places])])
            tasks[task]["ci95"] = [_percent(bound) for bound in interval]
        tasks[task] |= scored.aggregates.get(task, {})
    groups = averaged_groups(scored)
    average = {name: _percent(macro_mean([values[places] for places in groups]))
               for name, values in scored.metrics.items()}
    if headline is not None:
        interval = share_interval_by_list([(headline[places], lists[places]) for places in groups])
        average["ci95"] = [_percent(bound) for bound in interval]
    average |= scored.aggregates.get("avg", {})
    return {"n": len(scored.tasks), "lists": len(np.unique(lists)), "tasks": tasks, "avg": average,
            "problems": scored.problems, "remarks": list(scored.remarks)}


def paired_difference(first: Scored, second: Scored, is_same: bool = False) -> dict:
    """Paired difference first - second in points: {metric: {"value", "ci95"}}, not rounded.

    is_same: the replies are the same, so the interval is [0, 0]. AP has no interval.
    """
    lists = number_lists(first)
    differences = {}
    for name, values in first.metrics.items():
        gaps = np.subtract(values, second.metrics[name], dtype=float)
        groups = [(gaps[places], lists[places]) for places in averaged_groups(first)]
        interval = [0.0, 0.0] if is_same else gap_interval_by_list(groups)
        differences[name] = {"value": _percent(macro_mean([part for part, _ in groups])),
                             "ci95": [_percent(bound) for bound in interval]}
    for name, value in first.aggregates.get("avg", {}).items():
        differences[name] = {"value": value - second.aggregates["avg"][name], "ci95": None}
    return differences
