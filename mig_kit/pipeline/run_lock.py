"""One writer per run: a lock file that ends with the process that holds it."""

import fcntl
import os
import time
from pathlib import Path

_LOCKS: dict[Path, object] = {}  # open lock files of the runs that this process writes


def lock_run(run: Path, patience: float = 5.0) -> None:
    """Keep other processes from writing this run until `unlock_run` or the end of this process.

    Raises RuntimeError if another process holds it for longer than `patience` seconds. A notebook
    whose caller was killed ends within one second.
    """
    if run in _LOCKS:
        return
    run.mkdir(parents=True, exist_ok=True)
    file = (run / "lock").open("a+")
    until = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError:
            if time.monotonic() > until:
                file.seek(0)
                holder = file.read().strip() or "another process"
                file.close()
                raise RuntimeError(f"run '{run.name}' is being written by {holder}; wait for it, "
                                   "shut its notebook down, or use another --run-id") from None
            time.sleep(0.1)
    file.truncate(0)
    file.write(f"process {os.getpid()}")
    file.flush()
    _LOCKS[run] = file


def unlock_run(run: Path) -> None:
    """Let others write the run again."""
    if run in _LOCKS:
        _LOCKS.pop(run).close()
