"""Groups of runs side by side, such as a variant's seeds beside the recipe's.

Intervals of 95 % are Student's t over runs; where no group has two, or runs do not differ, a
bootstrap over lists of images, as in 06, and the cell says so. Two groups are compared run by run
if their runs share seeds (`pair_runs`).
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from mig_kit import stats
from mig_kit.common import UserError
from mig_kit.drawing.palette import SYSTEM_LABELS
from mig_kit.evaluation.evaluate import list_pairs
from mig_kit.evaluation.evaluated_runs import (
    SYSTEMS,
    EvaluatedRun,
    list_notes,
    load_groups,
    pair_runs,
)
from mig_kit.evaluation.items import to_groups
from mig_kit.evaluation.tables import CLAIMS
from mig_kit.pipeline.run_folders import require_runs
from mig_kit.world.suites import OUT_OF_DOMAIN, suite_title, task_title

METHOD = ("Intervals: Student's t over runs, of one run beside several a prediction interval for "
          "one more of these; 'questions only': a bootstrap over lists of images, exact where few "
          "differ, which says nothing about another seed. Of two runs both values are shown.")
QUESTIONS_ONLY = ", questions only"
REASONING = ("truth", "grounded")  # of `items.summarize_reasoning`


def parse_groups(words: Sequence[str]) -> dict[str, list[str]]:
    """Name -> runs of words "name=run,run"; a run alone is a group of its own name.

    Raises UserError for no group, a name or run that occurs twice, and an unknown run.
    """
    groups: dict[str, list[str]] = {}
    for word in words:
        name, is_named, runs = map(str.strip, word.partition("="))
        members = [run.strip() for run in (runs if is_named else name).split(",") if run.strip()]
        if not name or not members or name in {*groups, "title", "compared"}:
            raise UserError(f"'{word}' is no group with a name of its own; write name=run or "
                            "name=run,run")
        groups[name] = members
    everyone = sum(groups.values(), [])
    if not everyone or len({*everyone}) < len(everyone):
        raise UserError("name runs to compare, each once: a run counts once, in one group")
    require_runs(*(run for run in everyone if not run.endswith(".json")))
    return groups


def compare_groups(groups: dict[str, list[str]], reference: str = "", system: str = "grpo") -> dict:
    """Scores of groups of runs, differences within runs, and differences between groups.

    Args:
        groups: name -> run ids or files of recorded runs.
        reference: the group that the others are compared with, "" for the first.
        system: one of SYSTEMS, whose scores are compared between groups.
    Returns: {"reference", "system", "rows", "runs", "notes"}. A row has group, suite, figure (a
        score "grpo", a gap "grpo-sft", a difference "vs NAME", or one of these with a name of
        REASONING), value, low and high (percent or points, unrounded), runs, over ("seeds" or
        "questions") and by_run.
    Raises: UserError if a run has no such model; as `load_groups`.
    """
    reference = reference or next(iter(groups))
    if reference not in groups:
        raise UserError(f"there is no group '{reference}' to compare with; the groups are "
                        f"{', '.join(groups)}")
    questions, runs = load_groups(groups)
    if without := [run.run_id for members in runs.values() for run in members
                   if system not in run.correct]:
        raise UserError(f"these runs have no {SYSTEM_LABELS[system]} model; leave them out, or "
                        f"compare the GRPO models: {', '.join(without)}")
    rows, facts = [], []
    for name, members in runs.items():
        others = None if name == reference else runs[reference]
        figures = _list_figures(members, questions)
        if others:
            figures[f"vs {reference}"] = _sides(system, members, others, questions)
        for suite, scope in _list_scopes(questions).items():
            rows += [{"group": name, "suite": suite, **_question_row(figure, scope, *sides)}
                     for figure, sides in figures.items()]
        rows += [{"group": name, "suite": suite, **row} for suite in questions.unique("suite")
                 for row in _reasoning_rows(members, suite, system, others, reference)]
        facts += [{"group": name, "tokens": run.tokens, "minutes": run.minutes} for run in members]
    return {"reference": reference, "system": system, "rows": rows, "runs": facts,
            "notes": list_notes(runs, reference, system)}


def _list_scopes(questions: pd.MultiIndex) -> dict[str, np.ndarray]:
    """Suite, or "suite/task" out of domain -> the questions that its figures average."""
    suites, tasks = (questions.get_level_values(level) for level in ("suite", "task"))
    scopes = {}
    for suite in suites.unique():
        scopes[suite] = suites == suite
        if suite == OUT_OF_DOMAIN:
            scopes |= {f"{suite}/{task}": scopes[suite] & (tasks == task)
                       for task in tasks[scopes[suite]].unique()}
    return scopes


def _values(runs: Sequence[EvaluatedRun], system: str, questions: pd.MultiIndex) -> pd.DataFrame:
    """(questions, runs) 0 or 1 of correct answers."""
    suites = questions.unique("suite")
    bits = ["".join(run.correct[system][suite] for suite in suites) for run in runs]
    return pd.DataFrame(np.array([[*map(int, text)] for text in bits], dtype=float).T, questions)


def _list_figures(runs: list[EvaluatedRun], questions: pd.MultiIndex) -> dict[str, tuple]:
    """Figure -> (its values,): scores of all models, and differences within runs."""
    figures = {system: _values(runs, system, questions) for system in SYSTEMS
               if all(system in run.correct for run in runs)}
    from_sft = all(run.start_from == "merged" for run in runs)
    for after, before in list_pairs(figures):
        if from_sft or (after, before) != ("grpo", "sft"):  # else RL knew nothing of the SFT model
            figures[f"{after}-{before}"] = figures[after] - figures[before]
    return {figure: (values,) for figure, values in figures.items()}


def _sides(system: str, runs: list[EvaluatedRun], others: list[EvaluatedRun],
           questions: pd.MultiIndex) -> tuple[pd.DataFrame, ...]:
    """The differences of pairs of runs where there are any, else the values of both groups."""
    pairs = pair_runs(runs, others)
    sides = [_values(side, system, questions) for side in (zip(*pairs) if pairs
                                                           else (runs, others))]
    return (sides[0] - sides[1],) if pairs else tuple(sides)


def _question_row(figure: str, scope: np.ndarray, *sides: pd.DataFrame) -> dict:
    """A row without group and suite; sides: (questions, runs), of the group and of the other."""
    sides = [values[scope] for values in sides]
    by_run, *others = (100 * values.groupby(level="part", sort=False).mean().mean().to_numpy()
                       for values in sides)
    value = by_run.mean() - sum(other.mean() for other in others)
    if over_seeds := stats.mean_interval(by_run, *others):
        return _row(figure, value, over_seeds, "seeds", by_run, has_by_run=not others)
    groups = to_groups(sides[0].mean(axis=1) - sum(other.mean(axis=1) for other in sides[1:]))
    interval = (stats.share_interval_by_list if figure in SYSTEMS
                else stats.gap_interval_by_list)(groups)
    return _row(figure, value, [100 * bound for bound in interval], "questions", by_run,
                has_by_run=not others)


def _row(figure: str, value: float, interval: Sequence[float], over: str, by_run: np.ndarray,
         has_by_run: bool = True) -> dict:
    low, high = np.clip(interval, 0 if figure.split()[0] in SYSTEMS else -100, 100).tolist()
    return {"figure": figure, "value": float(value), "low": low, "high": high,
            "runs": len(by_run), "over": over, "by_run": by_run.tolist() if has_by_run else []}


def _reasoning_rows(runs: list[EvaluatedRun], suite: str, system: str,
                    others: list[EvaluatedRun] | None, reference: str) -> list[dict]:
    """How true the reasoning is; a single run has the interval of its 06, its differences none."""
    def read(members: Sequence[EvaluatedRun], system: str, name: str) -> np.ndarray:
        return np.array([run.reasoning.get(system, {}).get(suite, {}).get(name)
                         for run in members], dtype=float)

    rows = []
    for name in REASONING:
        sft, grpo = read(runs, "sft", name), read(runs, "grpo", name)
        figures = {"sft": sft, "grpo": grpo, "grpo-sft": grpo - sft}
        if others and (pairs := pair_runs(runs, others)):
            paired, partners = zip(*pairs)
            figures[f"vs {reference}"] = read(paired, system, name) - read(partners, system, name)
        for figure, by_run in figures.items():
            over_seeds = stats.mean_interval(by_run)
            of_06 = runs[0].reasoning.get(figure, {}).get(suite, {}).get(f"{name}_ci95")
            if not np.isnan(by_run).any() and (interval := over_seeds or of_06):
                rows.append(_row(f"{figure} {name}", by_run.mean(), interval,
                                 "seeds" if over_seeds else "questions", by_run))
    return rows


def scope_title(suite: str) -> str:
    """The name of a suite, or of a task out of domain, in tables."""
    _, is_task, task = suite.partition("/")
    return task_title(task) if is_task else suite_title(suite)


def table_frames(result: dict) -> dict[str, pd.DataFrame]:
    """Title -> table of words, rounded to one decimal; result: of `compare_groups`."""
    table, system = pd.DataFrame(result["rows"]), result["system"]
    table["cell"] = [_cell(row) for row in result["rows"]]
    table["title"] = table["suite"].map(scope_title)
    table[["model", "_", "name"]] = table["figure"].str.rpartition(" ")
    by_figure = {figure: _widen(part, ["group", "runs"])
                 for figure, part in table.groupby("figure", sort=False)}
    if system == "grpo":
        facts = pd.DataFrame(result["runs"]).groupby("group")[["tokens", "minutes"]].mean()
        by_figure["grpo"] = by_figure["grpo"].join(facts.map("{:.0f}".format), on="group")
    reasoning = table[table["name"].isin(REASONING)].replace(
        {"model": {"sft": "SFT", "grpo": "GRPO", "grpo-sft": "GRPO - SFT"}})
    frames = {
        f"{SYSTEM_LABELS[system]} model, percent (95 %)": by_figure[system],
        f"Difference to {result['reference']}, points (95 %)":
            by_figure.get(f"vs {result['reference']}", ()),
        "How true the reasoning is, percent or points (95 %)": _widen(
            reasoning, ["group", "name", "model", "runs"]).rename(columns={"name": "figure"}),
        "The paper's claims, points (95 %)": _claims_frame(table) if system == "grpo" else ()}
    return {title: frame for title, frame in frames.items() if len(frame)}


def _widen(table: pd.DataFrame, index: list[str], columns: str = "title") -> pd.DataFrame:
    """A line per value of `index`, with the cells by `columns`, both in order of appearance."""
    wide = table.pivot_table("cell", index, columns, aggfunc="first", sort=False)
    return wide.reset_index().rename_axis(columns=None).fillna("-")


def _cell(row: dict) -> str:
    """A row's value with its interval; of two runs, which tell little of their spread, both."""
    sign = "" if row["figure"].split()[0] in SYSTEMS else "+"
    if row["over"] == "seeds" and len(row["by_run"]) == 2:
        return "{} ({} and {})".format(*(stats.number_text(value, sign)
                                         for value in (row["value"], *row["by_run"])))
    text = stats.interval_text(row["value"], (row["low"], row["high"]), sign)
    is_trained = row["figure"].split()[0] != "base"
    return text.replace(")", f"{QUESTIONS_ONLY})") if (
        row["over"] == "questions" and row["runs"] == 1 and is_trained) else text


def _claims_frame(table: pd.DataFrame) -> pd.DataFrame:
    """The paper's claims, a column per group; a run without a cold start has no SFT model."""
    paper = "paper v2 (real benchmark, 7B)"
    claims = pd.DataFrame(CLAIMS, columns=["suite", "compared", "figure", paper])
    claims[paper] = claims[paper].map("{:+.2f}".format)
    wide = _widen(claims.merge(table), ["title", "compared", paper], "group")
    groups = [name for name in table["group"].unique() if name in wide]
    return wide[["title", "compared", *groups, paper]].rename(columns={"title": "suite"})


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
