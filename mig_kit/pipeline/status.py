"""What `mig-kit status` shows: runs as a tree, their stages and their scores."""

from mig_kit.pipeline import store
from mig_kit.pipeline.attempts import (
    find_damaged,
    find_damaged_image,
    list_attempts,
    seconds_spent,
)
from mig_kit.pipeline.run_folders import list_sources, load_branch, load_record
from mig_kit.pipeline.run_lock import find_writer
from mig_kit.plots import suite_name


def run_tree() -> list[tuple[str, int]]:
    """(run, depth) of all runs: a branch follows the run that it starts from, one deeper.

    A branch whose source is gone stands at depth 0.
    """
    root = store.runs_root()
    names = {path.name for path in root.iterdir() if path.is_dir()} if root.is_dir() else set()
    paths = [[name for name in reversed(list_sources(run_id)) if name in names]
             for run_id in names]
    return [(path[-1], len(path) - 1) for path in sorted(paths)]


def run_lines(run_id: str) -> list[str]:
    """The run's name, then its own stages and its greedy scores (percent), indented.

    A branch has one line for the stages of the run that it starts from.
    """
    branch = load_branch(run_id)
    lines = [f"  {_inherited_state(run_id, branch)}"] if branch else []
    for stage in store.STAGES:
        state = _stage_state(stage, run_id)
        is_unused = state == "-" and stage not in store.RECIPE[1:]
        if stage not in branch.get("stages", ()) and not (branch and is_unused):
            lines.append(f"  {stage:<24}{state}")
    folder = store.runs_root() / run_id / "06_evaluate"
    if (folder / "run.json").is_file():
        lines += _score_lines(store.read_metrics(folder)["systems"])
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
    stale = [stage for stage in stages if store.find_stale_input(stage, source)]
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
    stale_input = "" if _missing_source(run_id) else store.find_stale_input(stage, run_id)
    if not stale_input:
        return state
    owner = store.find_owner(stale_input, run_id)
    of_run = "" if owner == run_id else f" of {owner}"
    return f"{state}, stale: {stale_input}{of_run} was run again since"


def damaged_files(run_id: str) -> list[str]:
    """A line for every stage of the run, its source's included, one of whose files is not what the
    stage wrote.
    """
    lines = []
    for stage in store.STAGES:
        record = store.load_record(stage, run_id)
        folder = record and store.stage_folder(stage, run_id)
        if path := record and (find_damaged(folder, record, is_thorough=True)
                               or find_damaged_image(folder, record)):
            command = store.run_command(stage, store.find_owner(stage, run_id), "--force")
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
        lines.append(f"  {suite_name(suite):<24}{scores}")
    return lines
