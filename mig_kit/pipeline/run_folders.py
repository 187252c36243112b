"""Where runs lie, what their stages are, and who may write one."""

import os
import re
from pathlib import Path

from filelock import FileLock, Timeout

from mig_kit.common import PROJECT_ROOT, UserError, suggest_word

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


def is_locked_elsewhere(run: Path) -> bool:
    """Whether another process writes the run."""
    return run not in _LOCKS and is_locked(run)


def is_locked(run: Path) -> bool:
    """Whether a process writes the run."""
    import fcntl  # of Unix; scoring, which looks at no run, does without

    if not (run / "lock").is_file() or os.statvfs(run).f_flag & os.ST_RDONLY:
        return False  # on a mount to read only nobody writes
    try:
        with (run / "lock").open() as file:  # to read: it may be another user's
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
