"""What `mig-kit status` and `mig-kit diff` show: runs as a tree, their stages and scores, and what
differs between two of them.
"""

from mig_kit.pipeline import store
from mig_kit.pipeline.attempts import (
    find_damaged,
    list_attempts,
    seconds_spent,
)
from mig_kit.pipeline.run_facts import name_column
from mig_kit.pipeline.run_folders import (
    find_writer,
    list_sources,
    load_branch,
    load_record,
    require_runs,
)
from mig_kit.world.suites import suite_title

WIDEST = 44  # characters of a column of differences; a longer word moves the rest of its line
MANY = 40  # a mapping with more entries holds one value per sample, so it is no metric


def run_tree() -> list[tuple[str, int]]:
    """(run, depth) of all runs: a branch follows the run that it starts from, one deeper.

    A branch whose source is gone stands at depth 0.
    """
    root = store.runs_root()
    names = {path.name for path in root.iterdir() if path.is_dir()} if root.is_dir() else set()
    paths = [[name for name in reversed(list_sources(run_id)) if name in names]
             for run_id in names]
    return [(path[-1], len(path) - 1) for path in sorted(paths)]


def run_lines(run_id: str, with_reasons: bool = False) -> list[str]:
    """The run's name, then its own stages and its greedy scores (percent), indented.

    A branch has one line for the stages of the run that it starts from. with_reasons: below each
    stale stage a line that says why.
    """
    branch = load_branch(run_id)
    lines = [f"  {_inherited_state(run_id, branch)}"] if branch else []
    for stage in store.STAGES:
        state = _stage_state(stage, run_id)
        is_unused = state == "-" and stage not in store.RECIPE[1:]
        if stage not in branch.get("stages", ()) and not (branch and is_unused):
            stale = _describe_staleness(stage, run_id)
            lines.append(f"  {stage:<24}{state}{', stale' if stale else ''}")
            lines += [f"    it is stale: {stale}"] if stale and with_reasons else []
    folder = store.runs_root() / run_id / "06_evaluate"
    if (folder / "run.json").is_file():
        lines += _score_lines(store.read_metrics(folder)["systems"])
        records = {stage: load_record(stage, run_id) for stage in store.RECIPE}
        records = {stage: record for stage, record in records.items() if record}
        lines += [f"  {name_column(records)}"] if "05_grpo" in records else []
    return [run_id, *lines]


def _inherited_state(run_id: str, branch: dict) -> str:
    """Which stages are the source's, and whether one of them is stale there."""
    stages, source = list(branch["stages"]), branch["from"]
    numbers = " to ".join(dict.fromkeys((stages[0][:2], stages[-1][:2])))
    text = f"{numbers} of {source}"
    if missing := _missing_source(run_id):
        return f"{text}; run '{missing}' is gone"
    if unfinished := [stage for stage in stages if store.load_record(stage, source) is None]:
        return f"{text}; {unfinished[0]} is not finished"
    stale = [stage for stage in stages if _describe_staleness(stage, source)]
    return f"{text}; {stale[0]} is stale" if stale else text


def _stage_state(stage: str, run_id: str) -> str:
    run = store.runs_root() / run_id
    record = load_record(stage, run_id) if (run / stage).is_dir() else None
    attempts = list_attempts(stage, run_id)
    process, _, written = (find_writer(run) if attempts else "").partition(" in ")
    if record is None:
        return (f"running ({process})" if written == stage else "not finished" if attempts
                else "-")
    state = f"done in {record['seconds'] / 60:.1f} min"
    if written == stage:
        state += f", open in {process}"
    elif any(seconds_spent(folder) for folder in attempts):
        state += ", another attempt was stopped"
    return state


def _describe_staleness(stage: str, run_id: str) -> str:
    """Why `mig-kit run` would make a finished stage again with its own parameters, or ""."""
    record = load_record(stage, run_id)
    try:
        return record and store.describe_staleness(stage, run_id,
                                                   store.recorded_params(stage, record))
    except (FileNotFoundError, ValueError) as error:  # what it was made from is gone or damaged
        return str(error)


def damaged_files(run_id: str) -> list[str]:
    """A line for every stage of the run, its source's included, one of whose files is not what the
    stage wrote.
    """
    lines = []
    for stage in store.STAGES:
        record = store.load_record(stage, run_id)
        folder = record and store.stage_folder(stage, run_id)
        if path := record and find_damaged(folder, record, is_thorough=True, hashes_images=True):
            command = store.format_run_command(stage, store.find_owner(stage, run_id), "--force")
            lines.append(f"{path} is not what {stage} wrote; make it again: {command}")
    return lines


def _missing_source(run_id: str) -> str:
    """The run that a branch starts from, if that is gone, or ""."""
    last = list_sources(run_id)[-1]
    return "" if (store.runs_root() / last).is_dir() else last


def _score_lines(systems: dict) -> list[str]:
    lines = []
    for suite in systems["grpo"]:
        scores = ", ".join(f"{system} {by_suite[suite]['score']:.1f}"
                           for system, by_suite in systems.items())
        lines.append(f"  {suite_title(suite):<24}{scores}")
    return lines


def list_differences(first: str, second: str) -> list[dict]:
    """Rows {stage, what, name, a, b}, in order of stage; None where a run lacks a value.

    Raises FileNotFoundError for a run that does not exist.
    """
    require_runs(first, second)
    rows = []
    for stage in store.STAGES:
        is_finished = [load_record(stage, run_id) is not None for run_id in (first, second)]
        if all(is_finished):
            rows += _stage_differences(stage, first, second)
        elif any(is_finished):
            rows.append({"stage": stage, "what": "stage", "name": "finished",
                         "a": is_finished[0], "b": is_finished[1]})
    return rows


def format_differences(rows: list[dict], first: str, second: str) -> list[str]:
    """Lines of the rows of `list_differences` in columns, under a header with the runs' names."""
    if not rows:
        return ["no difference"]
    table = [["stage", "what", "name", first, second],
             *([" ".join(str(value).split()) for value in row.values()] for row in rows)]
    widths = [min(WIDEST, max(map(len, column))) for column in zip(*table)]
    lines = ["  ".join(f"{word:<{width}}" for word, width in zip(row, widths)).rstrip()
             for row in table]
    return [*lines, f"{len(rows)} differences"]


def _stage_differences(stage: str, first: str, second: str) -> list[dict]:
    facts, other_facts = _comparable_facts(stage, first), _comparable_facts(stage, second)
    return [{"stage": stage, "what": what, "name": name, "a": values.get(name),
             "b": other_facts[what].get(name)}
            for what, values in facts.items()
            for name in {**values, **other_facts[what]}
            if values.get(name) != other_facts[what].get(name)]


def _comparable_facts(stage: str, run_id: str) -> dict[str, dict]:
    """A finished stage's facts by kind: parameter, input (hashes), version, machine, metric."""
    record = load_record(stage, run_id)
    folder = store.stage_folder(stage, run_id)
    has_metrics = (folder / "metrics.json").is_file()
    inputs = {f"{earlier}/{name}": digest[:8]
              for earlier, files in record["inputs"].items() for name, digest in files.items()
              if name not in ("metrics.json", "started.json")}  # these hold times and run names
    return {
        "parameter": {name: value for name, value in record["params"].items() if name != "run_id"},
        "input": inputs,
        "version": record["versions"],
        "machine": {name: record.get(name, "") for name in ("machine", "hardware", "git")},
        "metric": flatten(store.read_metrics(folder)) if has_metrics else {},
    }


def flatten(data: dict, prefix: str = "") -> dict[str, float | str | None]:
    """Scalars of a nested mapping under dotted names.

    Lists, and mappings of more than MANY entries, are left out.
    """
    scalars = {}
    for key, value in data.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            scalars |= flatten(value, f"{name}.") if len(value) <= MANY else {}
        elif not isinstance(value, list):
            scalars[name] = value
    return scalars
