"""Why a command failed, in one sentence that says what helps."""

import re
import shutil
import signal
from pathlib import Path

# How Python and the libraries say that a disk is full; the last is torch.save.
FULL = re.compile(r"\[Errno (?:28|122)\]|\(os error (?:28|122)\)|inline_container\.cc")


def failure_sentence(error: Exception, notebook: Path) -> str:
    """What went wrong in a cell, as "ValueError: message"; error: PapermillExecutionError."""
    sentence = f"{error.ename}: {error.evalue}"
    if not error.evalue.strip():
        plain = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(error.traceback))
        lines = re.findall(r"^-+> *\d+ +(.+)$", plain, re.M)  # the line that failed, of each frame
        sentence = (f"{error.ename} at: {lines[-1]}" if lines else
                    f"cell {error.exec_count} ended without a word; look at it")
    return describe_disk(sentence, notebook.parent) or sentence


def describe_exit(status: int | None) -> str:
    """How a process ended; status: of `subprocess`, or 128 + n after signal n, None if unknown."""
    number = -status if status and status < 0 else (status or 0) - 128
    if not 0 < number < signal.NSIG:
        return f"ended with status {'unknown' if status is None else status}"
    hint = ("; the system ends so what takes too much memory: free some, or ask for more"
            if number == signal.SIGKILL else "")
    return f"was ended by signal {number} ({signal.strsignal(number)}){hint}"


def describe_os_error(error: OSError) -> str:
    """What went wrong with a file or a disk."""
    return describe_disk(str(error), Path(error.filename or ".")) or str(error)


def describe_disk(text: str, path: Path) -> str:
    """What helps where an error's text says that a disk is full, else ""; path: on that disk."""
    if not FULL.search(text):
        return ""
    place = next(folder for folder in (path, *path.resolve().parents) if folder.is_dir())
    free = shutil.disk_usage(place).free / 2**20
    return (f"the disk of {place} is full, {free:.0f} MB are free; make room and give the same "
            f"command, which goes on from what is finished ({text})")
