"""What scoring gives, in percent and not rounded; intervals are over lists of images."""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from mig_kit.score.annotations import BenchmarkItem
from mig_kit.stats import (
    group_by_task,
    macro_mean,
    number_alike,
    paired_gap_by_list,
    share_interval_by_list,
    to_percent,
)

NOT_READ = ("unread", "no <answer> block")


class Verdict(NamedTuple):
    """What becomes of a reply."""

    value: float  # IoU, or 1 for a correct item
    problem: str = ""  # why it scores nothing
    read: dict = {}  # for --items: what was read, and by which rule


@dataclass(frozen=True)
class Scored:
    """Judged predictions of n items; the first metric is the headline."""

    tasks: tuple[str, ...]  # (n,)
    metrics: dict[str, np.ndarray]  # name -> (n,) shares in 0..1
    is_macro: bool  # whether the average is over tasks
    problems: dict[str, int] = field(default_factory=dict)  # why replies scored nothing: how many
    # "avg" or task -> metric -> percent, for what is no mean over items (AP)
    aggregates: dict[str, dict[str, float]] = field(default_factory=dict)
    lists: tuple[Hashable, ...] = ()  # (n,) keys, equal for the same images; () if none are
    remarks: tuple[str, ...] = ()  # sentences on what the protocol did
    judged: tuple[tuple[BenchmarkItem, Verdict], ...] = ()  # () for AP
    detections: tuple[str, ...] = ()  # of AP: every box with its image, category and score, sorted

    @property
    def values(self) -> np.ndarray:
        """(n,) IoU, or 1 for a correct item."""
        return np.array([verdict.value for _, verdict in self.judged], dtype=float)


def averaged_groups(scored: Scored) -> list[np.ndarray]:
    """Places of each task's items, if the average is over tasks; else one group of all items."""
    places = np.arange(len(scored.tasks))
    return list(group_by_task(scored.tasks, places).values()) if scored.is_macro else [places]


def number_lists(scored: Scored) -> np.ndarray:
    """(n,) a number for each item's list of images."""
    return number_alike(scored.lists or range(len(scored.tasks)))


def describe_reach(boxes: list[tuple], frame: str) -> tuple[str, ...]:
    """A sentence: the largest number of some boxes, how many leave their image, and how many are
    inverted or empty; () without any.

    Args:
        boxes: (numbers as written, the same as corners, width and height of the image) each.
        frame: what the numbers are read as.
    """
    largest = max((number for numbers, *_ in boxes for number in numbers), default=0)
    n_outside = sum(min(corners) < 0 or any(
        side > limit for side, limit in zip(corners, [*limits, *limits]))
        for _, corners, limits in boxes)
    n_inverted = sum(x2 <= x1 or y2 <= y1 for _, (x1, y1, x2, y2), _ in boxes)
    inverted = f", {n_inverted:,} have x2 <= x1 or y2 <= y1" * bool(n_inverted)
    return (f"The largest number of the boxes is {largest:g}; {n_outside:,} of {len(boxes):,} "
            f"boxes leave their image{inverted}, read as {frame}.",) * bool(boxes)


def summarize(scored: Scored) -> dict:
    """The scores in percent, not rounded.

    Returns: {"n", "lists", "tasks", "avg", "problems", "unread", "remarks"}. "tasks" has
        {"n", "lists", "unread", metrics, "ci95"} for each task, "avg" the metrics and "ci95";
        "lists" is the number of different lists of images, "unread" of replies that no rule reads,
        "ci95" of the first metric. "at_most" is that metric if all unread ones are right.
    """
    lists, at_most = number_lists(scored), {}
    unread = np.array([verdict.problem in NOT_READ for _, verdict in scored.judged]
                      or [False] * len(scored.tasks))
    if unread.any():
        values = np.where(unread, 1.0, next(iter(scored.metrics.values())))
        best = macro_mean([values[rows] for rows in averaged_groups(scored)])
        at_most["at_most"] = to_percent(best)

    def average(groups: list[np.ndarray]) -> dict:
        figures = {name: to_percent(macro_mean([values[places] for places in groups]))
                   for name, values in scored.metrics.items()}
        if figures:
            headline = next(iter(scored.metrics.values()))
            interval = share_interval_by_list([(headline[rows], lists[rows]) for rows in groups])
            figures["ci95"] = [to_percent(bound) for bound in interval]
        return figures

    by_task = group_by_task(scored.tasks, np.arange(len(scored.tasks)))
    tasks = {task: {"n": len(places), "lists": len(np.unique(lists[places])),
                    "unread": int(unread[places].sum()), **average([places]),
                    **scored.aggregates.get(task, {})} for task, places in by_task.items()}
    return {"n": len(scored.tasks), "lists": len(np.unique(lists)), "tasks": tasks,
            "avg": average(averaged_groups(scored)) | scored.aggregates.get("avg", {}),
            "problems": scored.problems, "unread": int(unread.sum()), **at_most,
            "remarks": list(scored.remarks)}


def compare_scores(first: Scored, second: Scored) -> dict:
    """Paired difference first - second in points: {metric: {"value", "ci95"}}.

    The interval is [0, 0] if the same was read in every item; AP has none.
    """
    lists, groups = number_lists(first), averaged_groups(first)
    is_same = (first.judged, first.detections) == (second.judged, second.detections)
    differences = {}
    for name, values in first.metrics.items():
        gaps = np.subtract(values, second.metrics[name], dtype=float)
        differences[name] = paired_gap_by_list([(gaps[rows], lists[rows]) for rows in groups],
                                               is_same)
    for name, value in first.aggregates.get("avg", {}).items():
        differences[name] = {"value": value - second.aggregates["avg"][name], "ci95": None}
    return differences
