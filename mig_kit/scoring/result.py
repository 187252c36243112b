"""What scoring gives: values per item, with summaries, intervals and paired differences."""

from dataclasses import dataclass, field

import numpy as np

from mig_kit.stats import group_by_task, macro_mean, paired_gap, percent_interval, to_percent


@dataclass(frozen=True)
class Scored:
    """Predictions, judged.

    tasks: (n,) task of each item. metrics: name -> (n,) shares in 0..1, the first is the headline.
    is_macro: whether the average is over tasks. values: (n,) IoU, or 1 for a correct item. indices:
    (n,) places in the annotation file. problems: why replies scored nothing, and how many.
    aggregates: "avg" or task -> metric -> percent, for what is no mean over items (AP). notes:
    annotation defects.
    """

    tasks: tuple[str, ...]
    metrics: dict[str, np.ndarray]
    is_macro: bool
    values: np.ndarray
    indices: tuple[int, ...] = ()
    problems: dict[str, int] = field(default_factory=dict)
    aggregates: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: dict[str, list] = field(default_factory=dict)


def item_lines(scored: Scored) -> list[dict]:
    """{"index", "task", "value"} of every item in order; value: its IoU, or 1 if it is correct."""
    return [{"index": int(index), "task": task, "value": float(value)}
            for index, task, value in zip(scored.indices, scored.tasks, scored.values, strict=True)]


def task_indices(scored: Scored) -> dict[str, np.ndarray]:
    """task -> places of its items, tasks in order of appearance."""
    return group_by_task(scored.tasks, np.arange(len(scored.tasks)))


def averaged_groups(scored: Scored) -> list[np.ndarray]:
    """Places of the items of every task, which the average weighs the same; else of all items."""
    if scored.is_macro:
        return list(task_indices(scored).values())
    return [np.arange(len(scored.tasks))]


def summarize(scored: Scored) -> dict:
    """{"n", "tasks", "avg", "problems", "notes"}, in percent.

    tasks: task -> {"n", metrics, "ci95"}; avg: {metrics, "ci95"}. ci95: 95 % bootstrap interval of
    the first metric, over the items of each task.
    """
    headline = next(iter(scored.metrics.values()), None)
    tasks = {}
    for task, places in task_indices(scored).items():
        means = {name: to_percent(values[places].mean()) for name, values in scored.metrics.items()}
        tasks[task] = {"n": len(places), **means}
        if headline is not None:
            tasks[task]["ci95"] = percent_interval([headline[places]])
        tasks[task] |= scored.aggregates.get(task, {})
    groups = averaged_groups(scored)
    average = {}
    for name, values in scored.metrics.items():
        average[name] = to_percent(macro_mean([values[places] for places in groups]))
    if headline is not None:
        average["ci95"] = percent_interval([headline[places] for places in groups])
    average |= scored.aggregates.get("avg", {})
    return {"n": len(scored.tasks), "tasks": tasks, "avg": average, "problems": scored.problems,
            "notes": scored.notes}


def paired_difference(first: Scored, second: Scored) -> dict:
    """Paired difference first - second of every metric, in points: {metric: {"value", "ci95"}}.

    Intervals as in summarize. Metrics that are not means over items (AP) have a value and no
    interval.
    """
    groups = averaged_groups(first)
    differences = {}
    for name, values in first.metrics.items():
        gap = values - second.metrics[name]
        differences[name] = paired_gap([gap[places].astype(float) for places in groups])
    for name, value in first.aggregates.get("avg", {}).items():
        gap = round(value - second.aggregates["avg"][name], 2)
        differences[name] = {"value": gap, "ci95": None}
    return differences
