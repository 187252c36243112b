"""The ground every wing stands on: project root, atomic writes, line-wise reading, progress,
memory.
"""

import ctypes
import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

PACKAGE = Path(__file__).resolve().parent
PROJECT_ROOT = PACKAGE.parent


# glibc gives freed memory back to the system at once and faults it in again for every tensor:
# measured 9 % of a step.
PROCESS_ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "8589934592", "MALLOC_TRIM_THRESHOLD_": "17179869184",
               "MALLOC_TOP_PAD_": "268435456", "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}


MAX_LINE = 1 << 20


def iter_lines(path: Path) -> Iterator[tuple[int, bytes | None]]:
    """(line number from 1, line without its end), None for a line over MAX_LINE bytes; never more
    than that in memory.
    """
    with path.open("rb") as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            if len(line) <= MAX_LINE or line.endswith(b"\n"):
                yield number, line.rstrip(b"\r\n")
                continue
            while (rest := file.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                pass
            yield number, None


def release_memory() -> None:
    """Give memory that glibc keeps for later back to the system; elsewhere does nothing.

    With the ENVIRONMENT above and rows of many lengths the heap grows several times over what is in
    use, within minutes. Memory that is given back has to be faulted in again: a training step pads
    its rows to few lengths instead (`shared_prompts.rounded`).
    """
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):  # another C library
            pass


def progress_bar(steps: Iterable, label: str, **more) -> tqdm:
    """A bar with the time left as text on standard output: seen in JupyterLab, under papermill and
    on a terminal.

    tqdm's own choice in a notebook is a widget, of which papermill and a terminal show nothing.
    more: as of tqdm.
    """
    return tqdm(steps, desc=label, file=sys.stdout, mininterval=5, ascii=" =", **more)


def file_sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it: `path` is either old or
    whole, never half.
    """
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    temporary.replace(path)


def write_json(path: Path, data) -> None:
    """Write `data` as JSON; the file is either old or whole."""
    text = json.dumps(data, indent=1, default=str) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))
