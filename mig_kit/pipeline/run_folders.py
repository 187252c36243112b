"""Where a stage of a run lies: in the run's own folder or, for a branch, in the run that it starts
from.

A branch has a branch.json, {"from": source, "stages": {stage: key}}: these stages are the source's,
by reference. A source may be a branch itself.
"""

import json
import os
from pathlib import Path

from mig_kit.common import PROJECT_ROOT, write_json

BRANCH_FILE = "branch.json"


def runs_root() -> Path:
    """Where run folders are kept: $MIG_KIT_RUNS (relative to the project), else runs/ beside the
    package.
    """
    return PROJECT_ROOT / os.environ.get("MIG_KIT_RUNS", "runs")


def validate_run_id(run_id: str) -> str:
    """`run_id`, or ValueError if it is no plain name of a folder."""
    if not run_id or run_id.startswith(".") or any(c in run_id for c in "/\\"):
        raise ValueError(f"run_id is '{run_id}'; use letters, digits, '-' and '_'")
    return run_id


def run_command(stage: str, run_id: str) -> str:
    """The command that makes this stage of a run, for error messages.

    It names the stage: without one all stages of the run would be made again, with the tiny
    profile's parameters.
    """
    return (f"mig-kit run {stage[:2]} --run-id {run_id}, with the --profile and every -p of that "
            "run")


def load_branch(run_id: str) -> dict:
    """The branch.json of a run, {} where the run has none; ValueError with a remedy if it is
    broken.
    """
    path = runs_root() / run_id / BRANCH_FILE
    if not path.is_file():
        return {}
    try:
        branch = json.loads(path.read_text())
        is_broken = not isinstance(branch["stages"], dict) or not validate_run_id(branch["from"])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        is_broken = True
    if is_broken:
        raise ValueError(f"{path} is broken; delete the run '{run_id}' and start it again with "
                         "--from")
    return branch


def list_sources(run_id: str) -> list[str]:
    """The run, the run that it is a branch of, and so on; ValueError if one is its own source."""
    runs = [run_id]
    while branch := load_branch(runs[-1]):
        if branch["from"] in runs:
            raise ValueError(f"run '{branch['from']}' starts from itself, through "
                             f"'{runs[-1]}'; correct \"from\" in its {BRANCH_FILE}")
        runs.append(branch["from"])
    return runs


def find_owner(stage: str, run_id: str) -> str:
    """The run in whose folder the stage of `run_id` lies: itself, or a run that it starts from.

    FileNotFoundError with a remedy where that run is gone.
    """
    runs = list_sources(run_id)
    for branch, source in zip(runs, runs[1:]):
        if stage not in load_branch(branch)["stages"]:
            return branch
        if not (runs_root() / source).is_dir():
            raise FileNotFoundError(
                f"run '{branch}' starts from run '{source}', which is not in {runs_root()}; bring "
                f"it back, or write its new name into {runs_root() / branch / BRANCH_FILE}")
    return runs[-1]


def stage_folder(stage: str, run_id: str) -> Path:
    """Where the stage of a run lies; raises as `find_owner`."""
    return runs_root() / find_owner(stage, run_id) / stage


def require_own_stage(stage: str, run_id: str) -> None:
    """Raise ValueError with the commands where a run takes the stage from the run that it starts
    from.
    """
    branch = load_branch(run_id)
    if stage in branch.get("stages", ()):
        raise ValueError(
            f"{stage} of run '{run_id}' is that of run '{branch['from']}'; run it there, or start "
            f"another branch: mig-kit run {stage[:2]} --from {branch['from']} --run-id NAME")


def load_record(stage: str, run_id: str) -> dict | None:
    """The run.json of a finished stage, or None; ValueError with a remedy if that file is broken.
    """
    return read_record(stage_folder(stage, run_id) / "run.json")


def read_record(path: Path) -> dict | None:
    """A run.json, or None where there is none; ValueError with a remedy if it is broken."""
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict) or not record:
        raise ValueError(f"{path} is broken; delete it, and the stage counts as not finished")
    return record


def record_branch(run_id: str, source: str, stages: list[str]) -> dict:
    """Write which stages of the run are the source's, each with the key that it has now."""
    records = {stage: load_record(stage, source) or {} for stage in stages}
    branch = {"from": source,
              "stages": {stage: record.get("key", "") for stage, record in records.items()}}
    write_json(runs_root() / run_id / BRANCH_FILE, branch)
    return branch


def refresh_branch(run_id: str) -> dict:
    """The run's branch.json, with the keys that the source's stages have now; {} if it has none."""
    branch = load_branch(run_id)
    return record_branch(run_id, branch["from"], list(branch["stages"])) if branch else {}
