"""Groups of runs side by side, such as a variant's seeds beside the recipe's.

Scores of greedy replies have 95 % intervals over samples, of own data over lists of images, and
over the runs of a group that has several (`stats.joint_interval`). Two groups are compared sample
by sample, and run by run if their runs share seeds (`pair_runs`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from mig_kit import stats
from mig_kit.common import UserError
from mig_kit.drawing.palette import SYSTEM_LABELS
from mig_kit.pipeline.run_folders import require_runs
from mig_kit.pipeline.stage_params import NEEDS_SFT
from mig_kit.sample import Sample
from mig_kit.stages import evaluate
from mig_kit.stages.evaluated_runs import SYSTEMS, EvaluatedRun, list_notes, load_groups, pair_runs
from mig_kit.stages.tables import CLAIMS
from mig_kit.world.suites import OUT_OF_DOMAIN, OWN, suite_title, task_title

METHOD = ("Intervals: Student's t over samples, over runs too where a group has several; of one "
          "run's score a bootstrap over lists, exact where few differ.")
REASONING = ("truth", "grounded")  # of `evaluate.summarize_reasoning`


class _Scope(NamedTuple):
    """The samples that a figure averages."""

    suite: str
    rows: list[np.ndarray]  # indices of samples, of each task
    # as in stats.Groups; None for synthetic suites, whose questions share no images
    clusters: list[np.ndarray] | None = None


def parse_groups(words: Sequence[str]) -> dict[str, list[str]]:
    """Name -> runs of words "name=run,run"; a run alone is a group of its own name.

    Raises UserError for a name or run that occurs twice, a group without runs, or an unknown run.
    """
    groups: dict[str, list[str]] = {}
    for word in words:
        name, is_named, runs = word.partition("=")
        members = [run.strip() for run in (runs if is_named else name).split(",") if run.strip()]
        if not name.strip() or not members:
            raise UserError(f"'{word}' is no group; write name=run or name=run,run")
        if name.strip() in groups:
            raise UserError(f"two groups are called '{name.strip()}'; give each its own name")
        groups[name.strip()] = members
    everyone = [run for members in groups.values() for run in members]
    if repeated := [run for run in everyone if everyone.count(run) > 1]:
        raise UserError(f"run '{repeated[0]}' is named twice; a run counts once, in one group")
    if of_table := groups.keys() & {"suite", "compared"}:
        raise UserError(f"a group cannot be called '{min(of_table)}', as a column of the table is; "
                        "give it another name")
    if not groups:
        raise UserError("there is nothing to compare; name runs, or groups as name=run,run")
    require_runs(*(run for run in everyone if not run.endswith(".json")))
    return groups


def compare_groups(groups: dict[str, list[str]], reference: str = "", system: str = "grpo") -> dict:
    """Scores of groups of runs, differences within runs, and differences between groups.

    Args:
        groups: name -> run ids or files of recorded runs.
        reference: the group that the others are compared with, "" for the first.
        system: one of SYSTEMS, whose scores are compared between groups.
    Returns: {"reference", "system", "rows", "runs", "notes"}. A row has group, suite, figure (a
        score "grpo", a gap "grpo-sft", a difference "vs NAME", or one of these with a
        name of REASONING), value, low and high (percent or points, unrounded), runs, over (what the
        interval is over), improvement (probability, of "vs NAME" with several runs a side), by_run.
    Raises: UserError if a run has no such model; as `load_groups`.
    """
    reference = reference or next(iter(groups))
    if reference not in groups:
        raise UserError(f"there is no group '{reference}' to compare with; the groups are "
                        f"{', '.join(groups)}")
    samples, runs = load_groups(groups)
    if without := [run.run_id for members in runs.values() for run in members
                   if system not in run.correct]:
        raise UserError(f"these runs have no {SYSTEM_LABELS[system]} model; leave them out, or "
                        f"compare the GRPO models: {', '.join(without)}")
    scopes, rows, facts = _scopes(samples), [], []
    for name, members in runs.items():
        for suite, scope in scopes.items():
            rows += _group_rows(name, members, suite, scope)
            if name != reference:
                rows.append(_difference_row(system, (name, members), (reference, runs[reference]),
                                            suite, scope))
        others = None if name == reference else (reference, runs[reference])
        rows += [row for suite in samples for row in _reasoning_rows(name, members, suite, others)]
        facts += [{"group": name, "run": run.run_id, "data_seed": run.data_seed, "seed": run.seed,
                   "tokens": run.tokens, "minutes": run.minutes, "git": run.git,
                   "machine": run.machine} for run in members]
    return {"reference": reference, "system": system, "rows": rows, "runs": facts,
            "notes": list_notes(runs, reference, system)}


def _scopes(samples: dict[str, list[Sample]]) -> dict[str, _Scope]:
    """Suite, or "suite/task" out of domain -> the samples that its figures average."""
    scopes = {}
    for suite, suite_samples in samples.items():
        rows = np.arange(len(suite_samples))
        clusters = evaluate.split_for_score(
            suite_samples, evaluate.number_image_lists(suite_samples)) if suite == OWN else None
        scopes[suite] = _Scope(suite, evaluate.split_for_score(suite_samples, rows), clusters)
        if suite == OUT_OF_DOMAIN:
            by_task = evaluate.split_by_task(suite_samples, rows)
            scopes |= {f"{suite}/{task}": _Scope(suite, [rows]) for task, rows in by_task.items()}
    return scopes


def _values(runs: Sequence[EvaluatedRun], system: str, scope: _Scope) -> list[np.ndarray]:
    """(runs, samples) correctness of each task, in percent."""
    correct = 100 * np.array([list(run.correct[system][scope.suite]) for run in runs], dtype=float)
    return [correct[:, rows] for rows in scope.rows]


def _group_rows(group: str, runs: list[EvaluatedRun], suite: str, scope: _Scope) -> list[dict]:
    figures = {system: _values(runs, system, scope) for system in SYSTEMS
               if all(system in run.correct for run in runs)}
    from_sft = all(run.start_from in NEEDS_SFT for run in runs)
    for after, before in evaluate.list_pairs(figures):
        if from_sft or (after, before) != ("grpo", "sft"):  # else RL knew nothing of the SFT model
            figures[f"{after}-{before}"] = [a - b for a, b in zip(figures[after], figures[before])]
    return [{"group": group, "suite": suite, "figure": figure,
             **_estimate(values, scope.clusters, is_gap=figure not in SYSTEMS), "runs": len(runs),
             "improvement": None, "by_run": _by_run(values)} for figure, values in figures.items()]


def _reasoning_rows(group: str, runs: list[EvaluatedRun], suite: str,
                    reference: tuple[str, list[EvaluatedRun]] | None) -> list[dict]:
    """How true the reasoning is, by model; differences within runs, and to a group with its seeds.

    Intervals are Student's t over runs; of a single run's figure that of 06.
    """
    rows = []
    for name in REASONING:
        def read(members: Sequence[EvaluatedRun], system: str, name=name) -> np.ndarray:
            figures = [run.reasoning.get(system, {}).get(suite, {}) for run in members]
            return np.array([part.get(name) for part in figures], dtype=float)

        sft, grpo = read(runs, "sft"), read(runs, "grpo")
        figures = {"sft": sft, "grpo": grpo, "grpo-sft": grpo - sft}
        if reference and (pairs := pair_runs(runs, reference[1])):
            paired, partners = zip(*pairs)
            figures[f"vs {reference[0]}"] = read(paired, "grpo") - read(partners, "grpo")
        for figure, values in figures.items():
            low, high = stats.mean_interval(values)
            if len(values) == 1 and figure in SYSTEMS:
                own = runs[0].reasoning.get(figure, {}).get(suite, {})
                low, high = own.get(f"{name}_ci95") or (np.nan, np.nan)
            if not np.isnan([low, high]).any():
                low, high = np.clip([low, high], 0 if figure in SYSTEMS else -100, 100).tolist()
                rows.append({"group": group, "suite": suite, "figure": f"{figure} {name}",
                             "value": values.mean(), "low": low, "high": high, "over": "runs",
                             "runs": len(values), "improvement": None, "by_run": values.tolist()})
    return rows


def _by_run(values: list[np.ndarray]) -> list[float]:
    """Each run's mean over the tasks; values: (runs, samples) of each task."""
    return np.mean([task.mean(1) for task in values], axis=0).tolist()


def _estimate(values: list[np.ndarray], clusters: list[np.ndarray] | None, is_gap: bool = True,
              others: list[np.ndarray] | None = None) -> dict:
    """`joint_interval` of percents or points, cut to their range; of a single run 06's interval."""
    estimate = stats.joint_interval(values, clusters, others)
    answers = np.concatenate([part.ravel() for part in values])
    is_one_cluster = np.isnan(estimate["low"]) and (is_gap or answers.min() < answers.max())
    has_spread = len(values[0]) > 1 and estimate["low"] < estimate["high"]
    if is_one_cluster or has_spread or others is not None:
        bounds = np.clip([estimate["low"], estimate["high"]], -100 if is_gap else 0, 100)
    else:
        first = np.cumsum([0, *(part.shape[1] for part in values)])
        clusters = clusters or [start + np.arange(part.shape[1])
                                for start, part in zip(first, values)]
        interval = stats.gap_interval_by_list if is_gap else stats.share_interval_by_list
        bounds = 100 * np.array(interval([(part.mean(0) / 100, numbers)
                                          for part, numbers in zip(values, clusters)]))
    return estimate | dict(zip(("low", "high"), bounds.tolist()))


def _difference_row(system: str, group: tuple[str, list[EvaluatedRun]],
                    reference: tuple[str, list[EvaluatedRun]], suite: str, scope: _Scope) -> dict:
    (name, runs), (other_name, others) = group, reference
    values, other_values = (_values(members, system, scope) for members in (runs, others))
    improvement = None  # of one run a side it says 1.00 for an unsure gain
    if len(runs) > 1 or len(others) > 1:
        improvement = stats.probability_of_improvement(values, other_values)
    pairs = pair_runs(runs, others)
    if pairs:
        paired, partners = (_values(members, system, scope) for members in zip(*pairs))
        gaps = [a - b for a, b in zip(paired, partners)]
        estimate, by_run = _estimate(gaps, scope.clusters), _by_run(gaps)
    else:
        estimate, by_run = _estimate(values, scope.clusters, others=other_values), []
    return {"group": name, "suite": suite, "figure": f"vs {other_name}", **estimate,
            "runs": len(pairs) or len(runs), "improvement": improvement, "by_run": by_run}


def scope_title(suite: str) -> str:
    """The name of a suite, or of a task out of domain, in tables."""
    _, is_task, task = suite.partition("/")
    return task_title(task) if is_task else suite_title(suite)


def table_frames(result: dict) -> dict[str, pd.DataFrame]:
    """Title -> table of words, rounded to one decimal; result: of `compare_groups`."""
    rows = result["rows"]
    system = result["system"]
    frames = {f"{SYSTEM_LABELS[system]} model, percent (95 %)":
              _wide_frame(rows, system, result["runs"])}
    figure = f"vs {result['reference']}"
    if differences := [row for row in rows if row["figure"] == figure]:
        has_chance = any(row["improvement"] is not None for row in differences)
        title = f"Difference to {result['reference']}, points (95 %"
        title += "; probability of improvement)" if has_chance else ")"
        frames[title] = _wide_frame(differences, figure)
    if system == "sft_long":  # what the control run is for
        frames["GRPO over control SFT, points (95 %)"] = _wide_frame(rows, "grpo-sft_long")
    reasoning = _reasoning_frame(rows)
    if len(reasoning):
        frames["How true the reasoning is, percent or points (95 %)"] = reasoning
    claims = _claims_frame(rows)
    if len(claims) and system == "grpo":  # none for runs that were scored on own data alone
        frames["The paper's claims, points (95 %)"] = claims
    return frames


def _wide_frame(rows: list[dict], figure: str, runs: list[dict] | None = None) -> pd.DataFrame:
    """A line per group, a column per suite; with runs also the tokens and minutes of GRPO."""
    lines: dict[str, dict] = {}
    for row in rows:
        if row["figure"] != figure:
            continue
        line = lines.setdefault(row["group"], {"group": row["group"], "runs": row["runs"]})
        line[scope_title(row["suite"])] = _cell(row)
    table = pd.DataFrame(list(lines.values()))
    if runs and figure == "grpo":
        facts = pd.DataFrame(runs).groupby("group")[["tokens", "minutes"]].mean()
        return table.join(facts.map("{:.0f}".format), on="group")
    return table


def _cell(row: dict) -> str:
    sign = "" if row["figure"].split()[0] in SYSTEMS else "+"
    value, low, high = (f"{round(row[name], 1) + 0.0:{sign}.1f}"  # + 0.0: never -0.0
                        for name in ("value", "low", "high"))
    if np.isnan(row["low"]):
        return f"{value} (one list of images)"
    chance = "" if row["improvement"] is None else f"; {row['improvement']:.2f}"
    return f"{value} ({low} to {high}{chance})"


def _reasoning_frame(rows: list[dict]) -> pd.DataFrame:
    """A line per group, figure and model or difference, a column per suite."""
    lines: dict[tuple, dict] = {}
    for row in rows:
        model, _, name = row["figure"].rpartition(" ")
        if name in REASONING:
            words = {"sft": "SFT", "grpo": "GRPO", "grpo-sft": "GRPO - SFT"}.get(model, model)
            line = lines.setdefault((row["group"], name, words), {
                "group": row["group"], "figure": name, "model": words, "runs": row["runs"]})
            line[suite_title(row["suite"])] = _cell(row)
    return pd.DataFrame(list(lines.values())).fillna("-")


def _claims_frame(rows: list[dict]) -> pd.DataFrame:
    cells = {(row["suite"], row["figure"], row["group"]): _cell(row) for row in rows}
    groups = dict.fromkeys(row["group"] for row in rows)
    # a run without a cold start has no SFT model
    lines = [{"suite": suite_title(suite), "compared": comparison,
              **{group: cells.get((suite, delta, group), "-") for group in groups},
              "paper v2 (real benchmark, 7B)": f"{paper:+.2f}"}
             for suite, comparison, delta, paper in CLAIMS
             if any((suite, delta, group) in cells for group in groups)]
    return pd.DataFrame(lines)


def figure_rows(result: dict, differences: bool = False) -> list[dict]:
    """Rows for `plots.plot_groups`; UserError for differences of a single group."""
    figure = f"vs {result['reference']}" if differences else result["system"]
    rows = [row | {"suite": scope_title(row["suite"]),
                   "is_reference": row["group"] == result["reference"]}
            for row in result["rows"] if row["figure"] == figure]
    if not rows:
        raise UserError("one group has no differences; name another one")
    return rows


def render_table(result: dict, form: str = "md") -> str:
    """The comparison as Markdown, or all rows unrounded as CSV."""
    if form == "csv":
        table = pd.DataFrame(result["rows"])
        table["by_run"] = table["by_run"].map(lambda values: "; ".join(map(repr, values)))
        return table.to_csv(index=False)
    parts = [f"{title}\n\n{_markdown(frame)}\n" for title, frame in table_frames(result).items()]
    return "\n".join([*parts, METHOD, *result["notes"]]).strip()


def _markdown(frame: pd.DataFrame) -> str:
    lines = [list(frame.columns), ["---"] * len(frame.columns), *frame.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', chr(92) + '|') for cell in line)} |"
                     for line in lines)
