"""One writer per run: a lock file that ends with the process that holds it."""

import errno
import fcntl
import os
import time
from pathlib import Path

_LOCKS: dict[Path, object] = {}  # open lock files of the runs that this process writes
# what a disk without locks answers, such as NFS without its lock daemon
NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL}


def lock_run(run: Path, stage: str = "", patience: float = 5.0) -> None:
    """Keep other processes from writing this run until `unlock_run` or the end of this process.

    stage: what is written there. Raises RuntimeError if another process holds it for longer than
    `patience` seconds. A notebook whose caller was killed ends within one second. On a disk without
    locks a line says that nobody is kept out.
    """
    run.mkdir(parents=True, exist_ok=True)
    file = _LOCKS.get(run) or (run / "lock").open("a+")
    until = time.monotonic() + patience
    while run not in _LOCKS and not _try_lock(file):
        if time.monotonic() > until:
            file.close()
            raise RuntimeError(f"run '{run.name}' is being written by {find_writer(run)}; wait for "
                               "it, shut its notebook down, or use another --run-id")
        time.sleep(0.1)
    file.truncate(0)
    file.write(f"process {os.getpid()}" + (f" in {stage}" if stage else ""))
    file.flush()
    _LOCKS[run] = file


def _try_lock(file) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(f"warning: the disk of {file.name} has no file locks ({error.strerror}): see to it "
              "yourself that no other process writes this run")
    return True


def unlock_run(run: Path) -> None:
    """Let others write the run again."""
    if run in _LOCKS:
        _LOCKS.pop(run).close()


def find_writer(run: Path) -> str:
    """"process N in STAGE" where one writes the run, or ""."""
    path = run / "lock"
    if not path.is_file():
        return ""
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return ""
        except BlockingIOError:
            return file.read().strip() or "another process"
        except OSError:  # no locks on this disk
            return ""
