"""`python -m mig_kit.training.guard COMMAND ...` runs COMMAND and returns its exit status.

The caller holds the guard's standard input open. When COMMAND ends, or the caller closes that input
or is killed, the guard ends every process that COMMAND has started, in whatever session.
"""

import ctypes
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

import psutil

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # of linux/prctl.h
GRACE = 3  # seconds between SIGTERM, which srun and torchrun pass on, and SIGKILL


def run_guarded(command: list[str]) -> int:
    """Run `command`, then end what it has started; its exit status, 128 + n after signal n."""
    # 1. if a process of the command dies, its children become children of this process
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    # 2. if this process is killed itself, the command gets SIGTERM
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL,
        preexec_fn=lambda: _prctl(PR_SET_PDEATHSIG, signal.SIGTERM))
    # 3. a thread waits for the end of the caller, this one for the end of the command
    caller_ended = threading.Event()
    threading.Thread(target=_end_with_caller, args=(caller_ended,), daemon=True).start()
    status = process.wait()
    end_descendants()
    if caller_ended.is_set():  # that thread has ended the command, and may have read its status
        return 1
    return status if status >= 0 else 128 - status


def end_with_parent() -> None:
    """End this process when its parent ends: other nodes' launchers have no guard."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def end_descendants() -> None:
    """End all processes below this one: SIGTERM, then SIGKILL after GRACE seconds."""
    while processes := psutil.Process().children(recursive=True):
        for number in (signal.SIGTERM, signal.SIGKILL):
            for process in processes:
                with suppress(psutil.NoSuchProcess):  # it has ended meanwhile
                    process.send_signal(number)
            _, processes = psutil.wait_procs(processes, timeout=GRACE)


def _end_with_caller(caller_ended: threading.Event) -> None:
    while os.read(0, 1024):  # b"" when nobody holds the input open
        pass
    caller_ended.set()
    end_descendants()
    os._exit(1)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


if __name__ == "__main__":
    sys.exit(run_guarded(sys.argv[1:]))
