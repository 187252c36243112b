"""Where a stage of a run lies, and who writes a run.

A branch has a branch.json, {"from": source, "stages": [stage]}: these stages are the source's, by
reference. A source may be a branch itself.
"""

import json
import os
import re
from pathlib import Path

from filelock import FileLock, Timeout

from mig_kit.common import PROJECT_ROOT, UserError, suggest_word, write_json

BRANCH_FILE = "branch.json"
PROFILE_FILE = "profile.txt"
STAGES = {
    "00_preflight": (), "01_synthesize": (), "02_sft": ("01_synthesize",), "03_merge": ("02_sft",),
    "04_rejection_sampling": ("01_synthesize", "03_merge"),
    "05_grpo": ("03_merge", "04_rejection_sampling"),
    "06_evaluate": ("01_synthesize", "03_merge", "05_grpo"),
    "07_report": ("01_synthesize", "02_sft", "03_merge", "04_rejection_sampling", "05_grpo",
                  "06_evaluate"),
    "08_benchmark": (), "90_tiny_base": (),
}
RECIPE = tuple(stage for stage in STAGES if stage < "08")
COLD_START = ("02_sft", "03_merge")
RUN_ID = re.compile(r"[\w-]([\w.-]*[\w-])?")
_LOCKS: dict[Path, FileLock] = {}  # of the runs that this process writes


def runs_root() -> Path:
    """The folder of all runs: $MIG_KIT_RUNS, else runs/ of the project; UserError if it is none."""
    root = PROJECT_ROOT / (os.environ.get("MIG_KIT_RUNS") or "runs")
    if not next(path for path in (root, *root.parents) if path.exists()).is_dir():
        raise UserError(f"MIG_KIT_RUNS is {root}, which is no folder and cannot be one; set it to "
                        "a folder for runs, or unset it")
    return root


def validate_run_id(run_id: str) -> str:
    """`run_id`, or UserError if it is no plain name of a folder."""
    if not RUN_ID.fullmatch(run_id):
        raise UserError(f"run_id is '{run_id}'; use letters, digits, '-', '_' and, inside, '.'")
    return run_id


def list_runs() -> set[str]:
    """The names of all runs."""
    return {path.name for path in runs_root().glob("*") if path.is_dir()}


def require_runs(*run_ids: str) -> None:
    """UserError, with the nearest name, unless all these runs exist."""
    names = list_runs()
    for run_id in run_ids:
        if run_id not in names:
            hint = suggest_word(run_id, names, 0.5) or "mig-kit status lists the runs"
            raise UserError(f"no run '{run_id}' in {runs_root()}; {hint}")


def format_run_command(stage: str, run_id: str, options: str = "") -> str:
    """The command that makes this stage of a run, for error messages."""
    return f"mig-kit run {stage[:2]} --run-id {run_id}{options}, with every -p of that run"


def load_profile(run_id: str) -> str:
    """The profile of a run's commands, that of its source if it has none; "" if unknown."""
    for name in list_sources(run_id):
        if (path := runs_root() / name / PROFILE_FILE).is_file():
            return path.read_text().strip()
    return ""


def load_branch(run_id: str) -> dict:
    """The branch.json of a run, {} if it has none."""
    path = runs_root() / run_id / BRANCH_FILE
    return json.loads(path.read_text()) if path.is_file() else {}


def list_sources(run_id: str) -> list[str]:
    """The run, the run that it is a branch of, and so on."""
    runs = [run_id]
    while branch := load_branch(runs[-1]):
        runs.append(branch["from"])
    return runs


def find_owner(stage: str, run_id: str) -> str:
    """The run whose folder holds the stage: itself, or its source."""
    return next(run for run in list_sources(run_id)
                if stage not in load_branch(run).get("stages", ()))


def stage_folder(stage: str, run_id: str) -> Path:
    """Where the stage of a run lies."""
    return runs_root() / find_owner(stage, run_id) / stage


def require_own_stage(stage: str, run_id: str) -> None:
    """UserError with the commands if the run takes the stage from its source."""
    branch = load_branch(run_id)
    if stage in branch.get("stages", ()):
        raise UserError(
            f"{stage} of run '{run_id}' is that of run '{branch['from']}'; run it there, or start "
            f"another branch: mig-kit run {stage[:2]} --from {branch['from']} --run-id NAME")


def has_cold_start(run_id: str) -> bool:
    """False if the run's 01 had no teacher."""
    return finished_params("01_synthesize", run_id).get("teacher") != "none"


def input_stages(stage: str, run_id: str) -> tuple[str, ...]:
    """The stages that this one reads. A run without a cold start has no 02 and 03."""
    if stage <= COLD_START[-1] or has_cold_start(run_id):
        return STAGES[stage]
    return tuple(name for name in STAGES[stage] if name not in COLD_START)


def finished_params(stage: str, run_id: str) -> dict:
    """The parameters that a stage has finished with, {} if it has not."""
    return (load_record(stage, run_id) or {}).get("params", {})


def load_record(stage: str, run_id: str) -> dict | None:
    """The run.json of a finished stage, or None."""
    path = stage_folder(stage, run_id) / "run.json"
    return json.loads(path.read_text()) if path.is_file() else None


def require_record(stage: str, run_id: str, by: str) -> dict:
    """The run.json of a stage that `by` needs; UserError if it has not finished."""
    record = load_record(stage, run_id)
    if record is None:
        owner = find_owner(stage, run_id)
        folder, need = runs_root() / owner, f"{by} needs {stage} of run '{owner}'"
        if not folder.is_dir():
            hint = suggest_word(owner, list_runs(), 0.5) or "mig-kit status lists the runs"
            raise UserError(f"{need}, and there is no such run in {runs_root()}; {hint} (to make "
                            f"it: {format_run_command(stage, owner)})")
        if folder not in _LOCKS and is_locked(folder):
            raise UserError(f"{need}, which has not finished, and a process is running in that "
                            "run; wait until it has ended")
        raise UserError(f"{need}, which has not finished; run: {format_run_command(stage, owner)}")
    return record


def lock_run(run: Path, patience: float = 5.0) -> None:
    """Keep other processes from writing this run until `unlock_run` or this process ends.

    patience: seconds; a notebook whose caller was killed ends within one. Raises UserError if
    another process holds the run.
    """
    if run in _LOCKS:
        return
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"the folder of run '{run.name}' cannot be made ({error}); set "
                        "MIG_KIT_RUNS to a folder that can be written") from error
    lock = FileLock(run / "lock", thread_local=False)
    try:
        lock.acquire(timeout=patience)
    except Timeout:
        raise UserError(f"run '{run.name}' is being written by another process; wait for it, shut "
                        "its notebook down, or use another --run-id") from None
    _LOCKS[run] = lock


def unlock_run(run: Path) -> None:
    """Let others write the run again."""
    if run in _LOCKS:
        _LOCKS.pop(run).release(force=True)


def require_no_branches(run_id: str) -> None:
    """UserError, with their names, if other runs start from this one."""
    require_runs(validate_run_id(run_id))
    branches = [name for name in sorted(list_runs()) if load_branch(name).get("from") == run_id]
    if branches:
        raise UserError(f"run '{run_id}' stays: {', '.join(branches)} start from it; remove these "
                        f"first, as mig-kit rm {branches[0]}")


def is_locked(run: Path) -> bool:
    """Whether a process writes the run."""
    import fcntl  # of Unix; scoring, which looks at no run, does without

    if not (run / "lock").is_file():
        return False
    try:
        with (run / "lock").open() as file:  # to read: the folder may be on a read-only mount
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def check_branch(source: str, run_id: str, stages: list[str]) -> list[str]:
    """The stages before `stages` that a branch takes from `source`; [] if it has them already.

    Raises UserError if the run cannot be that branch.
    """
    validate_run_id(source)
    require_runs(source)
    if run_id in list_sources(source):
        raise UserError(f"run '{source}' is '{run_id}' or starts from it; use another --run-id")
    if branch := load_branch(run_id):
        if branch["from"] != source:
            raise UserError(f"run '{run_id}' starts from '{branch['from']}' already, not from "
                            f"'{source}'; use another --run-id")
        return []
    first = min((stage for stage in stages if stage in RECIPE[1:]), default="")
    if first <= "02":
        raise UserError("--from gives the stages before those that you run, so name stages from "
                        "02 to 07, such as: mig-kit run 05 06 07 --from default --run-id NAME")
    inherited = [stage for stage in RECIPE[1:] if stage < first
                 and (stage not in COLD_START or has_cold_start(source))]
    if own := [stage for stage in RECIPE[1:] if (runs_root() / run_id / stage).is_dir()]:
        raise UserError(f"run '{run_id}' has its own {own[0]}, so it is no branch; use another "
                        "--run-id")
    for stage in inherited:
        require_record(stage, source, f"run '{run_id}'")
    return inherited


def start_branch(source: str, run_id: str, *stages: str) -> list[str]:
    """Make the run a branch, if it is not yet; what it takes and raises is as in `check_branch`."""
    if inherited := check_branch(source, run_id, list(stages)):
        folder = runs_root() / run_id
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / BRANCH_FILE, {"from": source, "stages": inherited})
    return inherited
