"""What scoring gives: values per item, with summaries, intervals and paired differences."""

from dataclasses import dataclass, field

import numpy as np

from mig_kit.stats import bootstrap_interval, macro_mean, to_percent


@dataclass(frozen=True)
class Scored:
    """Predictions, judged.

    tasks: (n,) task of each item. columns: metric -> (n,) shares in 0..1, the first is the headline. macro: whether the average
    is over tasks. values: (n,) IoU or right; indices: (n,) places in the annotation file. problems: why replies scored nothing,
    and how many. whole: "avg" or task -> metric -> percent, for what is no mean over items (AP). notes: annotation defects.
    """

    tasks: tuple[str, ...]
    columns: dict[str, np.ndarray]
    macro: bool
    values: np.ndarray
    indices: tuple[int, ...] = ()
    problems: dict[str, int] = field(default_factory=dict)
    whole: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: dict[str, list] = field(default_factory=dict)


def item_lines(scored: Scored) -> list[dict]:
    """{"index", "task", "value"} of every item in order: its IoU, or 1 and 0 for right and wrong."""
    return [{"index": int(index), "task": task, "value": float(value)}
            for index, task, value in zip(scored.indices, scored.tasks, scored.values, strict=True)]


def task_indices(scored: Scored) -> dict[str, np.ndarray]:
    """task -> places of its items, in order of appearance."""
    order = dict.fromkeys(scored.tasks)
    tasks = np.array(scored.tasks)
    return {task: np.flatnonzero(tasks == task) for task in order}


def summarize(scored: Scored) -> dict:
    """{"n", "tasks": {task: {"n", metrics, "ci95"}}, "avg": {metrics, "ci95"}, "problems", "notes"}, in percent.

    ci95: 95 % bootstrap interval of the first metric, over the items of each task.
    """
    rows = task_indices(scored)
    headline = next(iter(scored.columns), None)
    tasks, average = {}, {}
    for task, places in rows.items():
        tasks[task] = {"n": len(places), **{name: to_percent(values[places].mean()) for name, values in scored.columns.items()}}
        if headline:
            tasks[task]["ci95"] = [to_percent(v) for v in bootstrap_interval([scored.columns[headline][places]])]
        tasks[task] |= scored.whole.get(task, {})
    parts = list(rows.values()) if scored.macro else [np.arange(len(scored.tasks))]
    for name, values in scored.columns.items():
        average[name] = to_percent(macro_mean([values[places] for places in parts]))
    if headline:
        average["ci95"] = [to_percent(v) for v in bootstrap_interval([scored.columns[headline][places] for places in parts])]
    return {"n": len(scored.tasks), "tasks": tasks, "avg": average | scored.whole.get("avg", {}), "problems": scored.problems,
            "notes": scored.notes}


def paired_difference(first: Scored, second: Scored) -> dict:
    """Paired difference first - second of every metric, in points: {metric: {"value", "ci95"}}; intervals as in summary.

    Metrics that are not means over items (AP) have a value and no interval.
    """
    parts = list(task_indices(first).values()) if first.macro else [np.arange(len(first.tasks))]
    result = {}
    for name, values in first.columns.items():
        gaps = [(values - second.columns[name])[places].astype(float) for places in parts]
        result[name] = {"value": to_percent(macro_mean(gaps)), "ci95": [to_percent(v) for v in bootstrap_interval(gaps)]}
    for name, value in first.whole.get("avg", {}).items():
        result[name] = {"value": round(value - second.whole["avg"][name], 2), "ci95": None}
    return result
