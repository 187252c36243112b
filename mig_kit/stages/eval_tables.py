"""What `mig-kit eval` prints: scores of one or several models, and their paired differences."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from mig_kit.plots import HELD_OUT_NAMES, suite_name
from mig_kit.stats import paired_gap_by_list

BOX_FIGURES = {"precision": "precision, IoU 0.5", "recall": "recall, IoU 0.5", "f1": "F1, IoU 0.5",
               "rejection": "rejection rate", "wrong_rejection": "wrongly none"}
MANY_UNREAD = 0.1  # share of replies without a box or letter from which on a sentence says so


def read_result(folder: Path) -> dict:
    """eval.json of a finished evaluation; FileNotFoundError with one sentence where there is none.
    """
    path = folder / "eval.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no eval.json; finish that mig-kit eval first")
    return json.loads(path.read_text())


def result_tables(results: Mapping[str, dict]) -> list[str]:
    """What a terminal shows of results by name: scores, differences between the first and each
    other one, and a sentence where many replies of the first could not be read.
    """
    texts = [_to_text(score_rows(results))]
    if len(results) > 1:
        rows = difference_rows(results)
        for row in rows:
            row["points"] = _with_interval(row["points"], row.pop("ci95"))
        texts.append(_to_text(rows))
    first = next(iter(results.values()))
    count = sum(map(len, next(iter(first["items"].values())).values()))
    if first["unread"] > MANY_UNREAD * count:
        texts.append(f"{first['unread']} of {count} replies name no box or letter that can be read;"
                     " look at the gallery, and if they are cut, raise --max-new-tokens "
                     f"({first['max_new_tokens']})\n")
    return texts


def _to_text(rows: list[dict]) -> str:
    table = pd.DataFrame(rows).fillna("-")
    width = table.iloc[:, 0].str.len().max()
    table.iloc[:, 0] = table.iloc[:, 0].str.ljust(width)
    return table.to_string(index=False) + "\n"


def score_rows(results: Mapping[str, dict]) -> list[dict]:
    """Rows {"percent, greedy": suite or part of it, "protocol", model -> its score and interval} of
    results by name.
    """
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for name, result in results.items():
        for protocol, by_suite in result["scores"].items():
            for suite, summary in by_suite.items():
                texts = _suite_cells(_name_suite(result, suite), summary)
                for part, text in texts.items():
                    cells.setdefault((part, protocol), {})[name] = text
    return [{"percent, greedy": part, "protocol": protocol, **by_model}
            for (part, protocol), by_model in cells.items()]


def _name_suite(result: dict, suite: str) -> str:
    """What tables call a suite: a drawn one by its name of a drawn one."""
    if result["questions"]["suite"] == "drawn":
        return suite_name(suite)
    return "own data" if suite in HELD_OUT_NAMES else suite


def _suite_cells(name: str, summary: dict) -> dict[str, str]:
    """Part of the suite -> its score; that of the whole with its 95 % interval."""
    if "score" in summary:
        cells = {name: _with_interval(summary["score"], summary["ci95"])}
        if boxes := summary.get("boxes"):
            cells |= {f"  {label}": _percent(boxes[key]) for key, label in BOX_FIGURES.items()}
        return cells
    average = summary["avg"]
    metric = next(key for key in average if key != "ci95")
    tasks = {f"  {task}": _percent(values[metric]) for task, values in summary["tasks"].items()}
    return {f"{name}, {metric}": _with_interval(average[metric], average["ci95"]), **tasks}


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _with_interval(value: float | None, interval: Sequence[float] | None) -> str:
    if interval is None:
        return _percent(value)
    return f"{_percent(value)} ({interval[0]:.1f} to {interval[1]:.1f})"


def difference_rows(results: Mapping[str, dict]) -> list[dict]:
    """Rows {compared, protocol, suite, points, ci95}: the first result less each other, paired by
    question; of own data and real benchmarks the interval is over lists of images.

    ValueError where they did not answer the same questions.
    """
    (name, first), *others = results.items()
    rows = []
    for other_name, other in others:
        if first["questions"] != other["questions"]:
            raise ValueError(f"{name} and {other_name} did not answer the same questions; ask both "
                             "with the same --suite, --limit and files (of drawn ones a run's "
                             "model gets as many as its 06: compare it with RUN/base)")
        for protocol, by_suite in first["items"].items():
            for suite, items in by_suite.items():
                gap = _paired_gap(items, other["items"][protocol][suite],
                                  first.get("lists", {}).get(suite))
                rows.append({"compared": f"{name} - {other_name}", "protocol": protocol,
                             "suite": _name_suite(first, suite), "points": gap["value"],
                             "ci95": gap["ci95"]})
    return rows


def _paired_gap(items: list[list], others: list[list], lists: list[int] | None) -> dict:
    """{"value", "ci95"} in points of value less value by question, groups weighed alike.

    items, others: (question, group, value) each. lists: the number of each question's list of
    images, None where no two questions share one.
    """
    before = {name: value for name, _, value in others}
    groups: dict[str, list[tuple[float, int]]] = {}
    for place, (name, group, value) in enumerate(items):
        number = lists[place] if lists else place
        groups.setdefault(group, []).append((value - before[name], number))
    return paired_gap_by_list([tuple(map(np.array, zip(*rows))) for rows in groups.values()])
