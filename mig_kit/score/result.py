"""What scoring gives, in percent and not rounded, and its table beside published numbers.

Intervals are over lists of images. `published.yaml` holds the published numbers.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import yaml

from mig_kit.score.annotations import MIG_BENCH_TASKS, PAPER_COUNTS, BenchmarkItem
from mig_kit.stats import group_by_task, macro_mean, paired_gap_by_list, share_interval_by_list

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
    names = scored.lists or range(len(scored.tasks))
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names])


def headline_average(scored: Scored) -> float:
    """The average of the first metric, 0..1."""
    values = next(iter(scored.metrics.values()))
    return macro_mean([values[places] for places in averaged_groups(scored)])


def unread_bound(scored: Scored) -> dict:
    """{"unread": how many replies no rule reads, "at_most": percent if all of them are right}."""
    unread = np.array([verdict.problem in NOT_READ for _, verdict in scored.judged], dtype=bool)
    if not unread.any():
        return {"unread": 0}
    values = np.where(unread, 1.0, next(iter(scored.metrics.values())))
    best = macro_mean([values[places] for places in averaged_groups(scored)])
    return {"unread": int(unread.sum()), "at_most": _percent(best)}


def _percent(value: float) -> float:
    return 100 * float(value) + 0.0  # never -0.0


def summarize(scored: Scored) -> dict:
    """The scores in percent, not rounded.

    Returns: {"n", "lists", "tasks", "avg", "problems", "remarks"} and `unread_bound`. "tasks" has
        {"n", "lists", metrics, "ci95"} for each task, "avg" the metrics and "ci95"; "lists" is the
        number of different lists of images, "ci95" of the first metric.
    """
    lists = number_lists(scored)

    def average(groups: list[np.ndarray]) -> dict:
        figures = {name: _percent(macro_mean([values[places] for places in groups]))
                   for name, values in scored.metrics.items()}
        if figures:
            headline = next(iter(scored.metrics.values()))
            interval = share_interval_by_list([(headline[rows], lists[rows]) for rows in groups])
            figures["ci95"] = [_percent(bound) for bound in interval]
        return figures

    by_task = group_by_task(scored.tasks, np.arange(len(scored.tasks)))
    tasks = {task: {"n": len(places), "lists": len(np.unique(lists[places])), **average([places]),
                    **scored.aggregates.get(task, {})} for task, places in by_task.items()}
    return {"n": len(scored.tasks), "lists": len(np.unique(lists)), "tasks": tasks,
            "avg": average(averaged_groups(scored)) | scored.aggregates.get("avg", {}),
            "problems": scored.problems, **unread_bound(scored), "remarks": list(scored.remarks)}


def paired_difference(first: Scored, second: Scored) -> dict:
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


@cache
def read_published() -> dict[str, list[dict]]:
    """The rows of `published.yaml` by benchmark and version; "tasks" are task -> percent."""
    rows = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text("utf-8"))
    return {name: [row | {"tasks": dict(zip(MIG_BENCH_TASKS, row.get("tasks", ())))}
                   for row in systems] for name, systems in rows.items()}


def score_markdown(result: dict) -> str:
    """A result of `mig-kit score` as a Markdown table beside published numbers, with notes."""
    rows = []
    if result["complete"] is not False and result["protocol"] == "official":
        name = f"{result['benchmark']} {result['version']}".strip()
        rows = read_published().get(name, [])
    published = [row for row in rows if "doubt" not in row]
    headline, *others = [name for name in result["avg"] if name != "ci95"]
    has_interval = "ci95" in result["avg"]
    blind = result.get("blind") or {}
    head = ["task", "n", headline, *["95 %"] * has_interval, *["points over blind"] * bool(blind),
            *others, *(row["system"] for row in published)]
    lines = [head, ["---"] * len(head)]
    average = {"n": result["n"], **result["avg"]}
    for name, values in [*result["tasks"].items(), ("avg", average)]:
        interval = " to ".join(f"{bound:.1f}" for bound in values.get("ci95", ()))
        known = [row["avg"] if name == "avg" else row["tasks"].get(name) for row in published]
        lines.append([name, str(values["n"]), _number(values.get(headline)),
                      *[interval] * has_interval,
                      *([_with_interval(blind["over"][name])] if blind else ()),
                      *(_number(values.get(metric)) for metric in others), *map(_number, known)])
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n".join([table, "", *table_notes(result, rows)])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _with_interval(gap: dict) -> str:
    return f"{gap['value']:+.1f} ({' to '.join(f'{bound:+.1f}' for bound in gap['ci95'])})"


def _signed(value: float) -> str:
    return f"{round(value, 2) + 0.0:+.2f}"  # never -0.00


def table_notes(result: dict, published: list[dict]) -> list[str]:
    """Sentences on what the table's numbers mean, and where the published ones come from."""
    benchmark, protocol, problems = result["benchmark"], result["protocol"], result["problems"]
    judges_letters = benchmark in ("blink", "mmiu") and protocol == "official"
    answered = result["n"] - problems.get("missing", 0)
    rule = f"{protocol} (letters by the kit's own rule)" if judges_letters else protocol
    notes = [f"{benchmark}, version {result['version'] or 'as given'}, protocol {rule}, "
             f"{result['n']} items."]
    if problems.get("missing"):
        notes.append("Replies are missing: do not set these numbers beside published ones.")
    elif not result["complete"] and benchmark != "own":
        count = PAPER_COUNTS.get(benchmark)
        known = f" (its paper counts {count:,})" if count else ""
        notes.append(f"These are not known to be all items of {benchmark}{known}: set them beside "
                     "published numbers only if they are.")
    if protocol != "official" and benchmark != "own":
        notes.append("Published figures follow the authors' own rules, so none stands beside this "
                     "protocol.")
    if "ci95" in result["avg"]:
        notes.append(f"Intervals are a bootstrap over the {result['lists']:,} lists of images, "
                     "and exact where few replies differ.")
    if result.get("unread"):
        headline, asks = next(iter(result["avg"])), judges_letters and "judge" not in result
        notes.append(f"{result['unread']:,} of {answered:,} replies unread "
                     f"({100 * result['unread'] / max(answered, 1):.1f} %): "
                     f"{result['avg'][headline]:.1f}, at most {result['at_most']:.1f}"
                     f"{' with a judge (--judge URL --judge-model NAME)' if asks else ''}.")
    if rows := (result.get("blind") or {}).get("rows"):
        figures = ", ".join(f"{name} {row['avg']:.1f}" for name, row in rows.items())
        notes.append(f"Answers that no image is needed for score: {figures}. Points over blind are "
                     "over the best of them in each task; its constants are fitted on the other "
                     "image lists, so it is a prior of the benchmark, not a model.")
    notes += result["remarks"]
    if judges_letters:
        notes.append("The authors ask another model which option a text means"
                     + (', and count an empty choice as correct and leave out "GPT error".'
                        if benchmark == "mmiu" else "."))
    notes += ["{system}: {source}.".format(**row) for row in published if "doubt" not in row]
    notes += ["Not in the table: {system} {avg:.2f} ({source}), {doubt}.".format(**row)
              for row in published if "doubt" in row]
    notes += [f"Replies, {reason}: {count}."
              for reason, count in sorted(problems.items(), key=lambda problem: -problem[1])]
    return notes + (_comparison_notes(result) if "compare" in result else [])


def _comparison_notes(result: dict) -> list[str]:
    other = result["compare"]
    notes = [f"Replies of {other['predictions']}, {reason}: {count}."
             for reason, count in sorted(other["problems"].items())]
    for metric, gap in other["difference"].items():
        interval = " to ".join(map(_signed, gap["ci95"])) if gap["ci95"] else "no interval"
        notes.append(f"{metric}, {result['predictions']} minus {other['predictions']}: "
                     f"{_signed(gap['value'])} points ({interval}), paired.")
    return notes
