"""What `mig-kit status` and `mig-kit diff` show: runs, stages and scores, and their differences."""

import re

from mig_kit.pipeline import store
from mig_kit.pipeline.attempts import find_damaged, list_attempts, seconds_spent
from mig_kit.pipeline.run_folders import (
    RECIPE,
    STAGES,
    find_owner,
    find_writer,
    format_run_command,
    list_runs,
    list_sources,
    load_branch,
    load_record,
    require_runs,
    runs_root,
    stage_folder,
)
from mig_kit.pipeline.stage_keys import select_products
from mig_kit.world.suites import suite_title

SCORE = re.compile(r"metric systems\..*\.score$")  # of 06: a system's on a suite
WIDEST = 44  # characters of a column of differences; a longer word moves the rest of its line
MANY = 40  # a mapping with more entries holds one value per sample, so it is no metric


def run_tree() -> list[tuple[str, int]]:
    """(run, depth) of all runs: a branch follows its source, one deeper, if that is there."""
    names = list_runs()
    paths = [[name for name in reversed(list_sources(run_id)) if name in names] for run_id in names]
    return [(path[-1], len(path) - 1) for path in sorted(paths)]


def run_lines(run_id: str, with_reasons: bool = False) -> list[str]:
    """A run's name, own stages and greedy scores; with_reasons: also why stages are stale."""
    branch, stale = load_branch(run_id), store.find_stale(run_id)
    lines = [f"  {_inherited_state(run_id, branch, stale)}"] if branch else []
    for stage in STAGES:
        cause, reason = stale.get(stage, ("", ""))
        state = _stage_state(stage, run_id, cause)
        is_unused = state == "-" and stage not in RECIPE[1:]
        if stage not in branch.get("stages", ()) and not (branch and is_unused):
            lines.append(f"  {stage:<24}{state}")
            lines += [f"    it is stale: {reason}"] if cause == stage and with_reasons else []
    folder = runs_root() / run_id / "06_evaluate"
    if (folder / "run.json").is_file():
        systems = store.read_metrics(folder)["systems"]
        mark = " (stale)" if "06_evaluate" in stale else ""
        for suite in systems["grpo"]:
            scores = ", ".join(f"{system} {by_suite[suite]['score']:.1f}"
                               for system, by_suite in systems.items())
            lines.append(f"  {suite_title(suite):<24}{scores}{mark}")
    own = [stage for stage in RECIPE if stage not in branch.get("stages", ())]
    return [run_id, *lines, *(f"  {mark}" for mark in store.list_marks(own, run_id))]


def _inherited_state(run_id: str, branch: dict, stale: dict) -> str:
    """Which stages are the source's, and whether one of them is stale there."""
    stages, source = list(branch["stages"]), branch["from"]
    numbers = " to ".join(dict.fromkeys((stages[0][:2], stages[-1][:2])))
    text = f"{numbers} of {source}"
    if not (runs_root() / (last := list_sources(run_id)[-1])).is_dir():
        return f"{text}; run '{last}' is gone"
    if unfinished := [stage for stage in stages if load_record(stage, source) is None]:
        return f"{text}; {unfinished[0]} is not finished"
    first = next((stage for stage in stages if stage in stale), "")
    return f"{text}; {first} is stale" if first else text


def _stage_state(stage: str, run_id: str, cause: str) -> str:
    """cause: the stage that makes this one stale, "" if none does."""
    run = runs_root() / run_id
    record = load_record(stage, run_id) if (run / stage).is_dir() else None
    attempts = list_attempts(stage, run_id)
    process, _, written = (find_writer(run) if attempts else "").partition(" in ")
    if record is None:
        return (f"running ({process})" if written == stage else "not finished" if attempts else "-")
    word = f"stale through {cause[:2]}, made" if cause not in ("", stage) else (
        "stale, made" if cause else "done")
    state = f"{word} in {record['seconds'] / 60:.1f} min"
    if written == stage:
        state += f", open in {process}"
    elif any(seconds_spent(folder) for folder in attempts):
        state += ", another attempt was stopped"
    return state


def damaged_files(run_id: str) -> list[str]:
    """A line for every stage of the run or its source that has a damaged file."""
    lines = []
    for stage in STAGES:
        folder, record = stage_folder(stage, run_id), load_record(stage, run_id)
        if path := record and find_damaged(folder, record, is_thorough=True, hashes_images=True):
            command = format_run_command(stage, find_owner(stage, run_id), "--force")
            lines.append(f"{path} is not what {stage} wrote; make it again: {command}")
    return lines


def list_differences(first: str, second: str) -> list[dict]:
    """Rows {stage, name, a, b}, None for a missing value; FileNotFoundError for a missing run."""
    require_runs(first, second)
    rows = []
    for stage in STAGES:
        facts, other_facts = (_comparable_facts(stage, run_id) for run_id in (first, second))
        if not facts or not other_facts:  # what one lacks altogether is one row
            facts, other_facts = ({"finished": bool(found)} for found in (facts, other_facts))
        rows += [{"stage": stage, "name": name, "a": facts.get(name), "b": other_facts.get(name)}
                 for name in {**facts, **other_facts} if facts.get(name) != other_facts.get(name)]
    return rows


def format_differences(rows: list[dict], first: str, second: str,
                       with_metrics: bool = False) -> list[str]:
    """Lines of `list_differences` in columns, the scores last.

    with_metrics: also list the other metrics, which are otherwise only counted.
    """
    if not rows:
        return ["no difference"]
    scores = [row for row in rows if SCORE.match(row["name"])]
    metrics = [row for row in rows if row["name"].startswith("metric") and row not in scores]
    causes = [row for row in rows if row not in scores and row not in metrics]
    shown = [*causes, *(metrics if with_metrics else []), *scores]
    table = [["stage", "name", first, second], *map(_shown_values, shown)]
    widths = [min(WIDEST, max(map(len, column))) for column in zip(*table)]
    lines = ["  ".join(f"{word:<{width}}" for word, width in zip(row, widths)).rstrip()
             for row in table]
    more = f", {len(metrics)} of them other metrics (--all)" if len(shown) < len(rows) else ""
    return [*lines, f"{len(rows)} differences{more}"]


def _shown_values(row: dict) -> list[str]:
    """The row's words; numbers to four digits, or to as many as tell the two apart."""
    values = [row["a"], row["b"]]
    if all(type(value) in (int, float) for value in values):
        digits = next((digits for digits in range(4, 17)
                       if f"{values[0]:.{digits}g}" != f"{values[1]:.{digits}g}"), 17)
        values = [f"{value:.{digits}g}" for value in values]
    return [" ".join(str(value).split()) for value in (row["stage"], row["name"], *values)]


def _comparable_facts(stage: str, run_id: str) -> dict:
    """A finished stage's values by name ("metric loss.last"); {} if it has not finished."""
    record = load_record(stage, run_id)
    if record is None:
        return {}
    folder = stage_folder(stage, run_id)
    inputs = {f"{earlier}/{name}": digest[:8] for earlier, files in record["inputs"].items()
              for name, digest in select_products(files).items()}
    facts = {
        "parameter": {name: value for name, value in record["params"].items() if name != "run_id"},
        "input": inputs, "version": record["versions"],
        "machine": {name: record.get(name, "") for name in ("machine", "hardware", "git")},
        "metric": (flatten(store.read_metrics(folder)) if (folder / "metrics.json").is_file()
                   else {})}
    return {f"{kind} {name}": value for kind, values in facts.items()
            for name, value in values.items()}


def flatten(data: dict, prefix: str = "") -> dict[str, float | str | None]:
    """Scalars of a nested mapping under dotted names; lists and large mappings are left out."""
    scalars = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            scalars |= flatten(value, f"{name}.") if len(value) <= MANY else {}
        elif not isinstance(value, list):
            scalars[name] = value
    return scalars
