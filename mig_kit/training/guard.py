"""`python -m mig_kit.training.guard COMMAND ...` runs COMMAND and returns its exit status.

It ends all that COMMAND has started, in whatever session, once COMMAND ends or the guard's standard
input closes because its caller has closed it or was killed.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading

import psutil

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # of linux/prctl.h
GRACE = 3  # seconds between SIGTERM, which srun and torchrun pass on, and SIGKILL


def run_guarded(command: list[str]) -> int:
    """Run `command` and end what it leaves behind; its exit status, 128 + n after signal n."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans of the command become children of this process
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL,
        preexec_fn=lambda: _prctl(PR_SET_PDEATHSIG, signal.SIGTERM))
    is_left = threading.Event()
    threading.Thread(target=_end_with_caller, args=(is_left,), daemon=True).start()
    status = process.wait()
    end_descendants()
    if is_left.is_set():  # the other thread has ended the command and may have taken its status
        return 1
    return status if status >= 0 else 128 - status


def end_with_parent() -> None:
    """End this process when its parent ends: a launcher may be killed on a node without a guard."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def end_descendants() -> None:
    """End all processes below this one: SIGTERM first, after GRACE seconds SIGKILL."""
    while processes := psutil.Process().children(recursive=True):
        for process in processes:
            _send(process, signal.SIGTERM)
        _, alive = psutil.wait_procs(processes, timeout=GRACE)
        for process in alive:
            _send(process, signal.SIGKILL)
        psutil.wait_procs(alive, timeout=GRACE)


def _send(process: psutil.Process, number: signal.Signals) -> None:
    try:
        process.send_signal(number)
    except psutil.NoSuchProcess:  # it has ended meanwhile
        pass


def _end_with_caller(is_left: threading.Event) -> None:
    while os.read(0, 1024):
        pass
    is_left.set()
    end_descendants()
    os._exit(1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(run_guarded(sys.argv[1:]))
