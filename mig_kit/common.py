"""What every module may use: folders, atomic writes, lines, progress."""

import ctypes
import difflib
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

PACKAGE = Path(__file__).resolve().parent
IS_CLONE = (PACKAGE.parent / "pyproject.toml").is_file()
# Relative paths start here, and runs/ lies here: the clone or, if a wheel is installed, the folder
# in which the command was given. Processes that it starts inherit it by the environment.
PROJECT_ROOT = PACKAGE.parent if IS_CLONE else Path(os.environ.get("MIG_KIT_PROJECT") or Path.cwd())
# a wheel has them inside the package
NOTEBOOKS, PROFILES = ((PACKAGE.parent if IS_CLONE else PACKAGE) / name
                       for name in ("notebooks", "params"))
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
SHIPPED = ("tiny", "tiny/sft", "tiny/grpo")  # models that come with the kit


class UserError(ValueError):
    """Something that the user has to change; its one sentence names the fix, with no traceback."""

    def _render_traceback_(self) -> list[str]:  # what IPython shows in place of the traceback
        return [f"mig-kit: {self}"]


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file, then rename it: `path` is either old or complete."""
    temporary = path.with_name(path.name + ".tmp")
    write(temporary)
    temporary.replace(path)


def write_json(path: Path, data) -> None:
    """Write `data` as JSON, atomically."""
    text = json.dumps(data, indent=1, default=str) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text))


def write_json_lines(path: Path, records: Iterable[dict]) -> None:
    """Write each record as a line of JSON, atomically."""
    text = "".join(json.dumps(record) + "\n" for record in records)
    write_atomically(path, lambda temporary: temporary.write_text(text, "utf-8"))


def append_json_lines(file: TextIO, records: Iterable[dict]) -> None:
    """Append each record as a line of JSON, and see that all are on the disk."""
    file.writelines(json.dumps(record) + "\n" for record in records)
    file.flush()
    os.fsync(file.fileno())


def load_json_lines(path: Path) -> list[dict]:
    """The records of a file that `append_json_lines` fills; [] without one.

    A last line that a kill has cut is dropped, also from the file; another broken one: UserError.
    """
    content, records = path.read_bytes() if path.is_file() else b"", []
    *lines, cut = content.split(b"\n")
    if cut:
        os.truncate(path, len(content) - len(cut))
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path} line {number} is broken; delete that line, and what it held "
                            "is asked again") from error
    return records


def apply_umask(folder: Path) -> None:
    """Give a folder's *.safetensors, which only their owner reads, the rights of its JSON files."""
    rights = next(folder.glob("*.json")).stat().st_mode & 0o777
    for path in folder.glob("*.safetensors"):
        path.chmod(rights)


def model_folder(model: str) -> Path:
    """Where a model's files are: in the package for SHIPPED, else relative to the project.

    Of "tiny/sft" and "tiny/grpo" they are an adapter, which `loading.resolve_model` merges.
    """
    if model in SHIPPED:
        return PACKAGE / model.replace("tiny", "tiny_base")
    return PROJECT_ROOT / model


def split_function_name(text: str) -> tuple[Path, str]:
    """(file, function) of "file.py:function"; a relative path starts at the project."""
    file, _, function = text.rpartition(":")
    return PROJECT_ROOT / file, function


def suggest_word(word: str, words: Iterable[str], cutoff: float = 0.6) -> str:
    """"did you mean 'NAME'?" for the word nearest by letters or that holds it, or ""."""
    words = sorted(words)
    near = difflib.get_close_matches(word, words, 1, cutoff) or [
        name for name in words if len(word) > 3 and word in name]
    return f"did you mean '{near[0]}'?" if near else ""


def file_sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest_json(facts) -> str:
    """SHA-256 of what JSON can hold; the order of keys does not count."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def iter_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file, without their ends."""
    with path.open("rb") as file:
        for line in file:
            yield line.rstrip(b"\r\n")


def progress_bar(steps: Iterable, label: str, **more) -> tqdm:
    """A bar with the time left, as text on standard output; more: further arguments of tqdm."""
    # tqdm's own choice in a notebook is a widget, of which papermill and a terminal show nothing
    return tqdm(steps, desc=label, file=sys.stdout, mininterval=5, ascii=" =", **more)


def end_with_parent() -> None:
    """Have this process get SIGTERM when its parent ends, on Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


def release_memory() -> None:
    """Give memory that glibc and CUDA's allocator keep for later back to the system."""
    # With rows of many lengths the heap grows to several times what is in use. Memory that is given
    # back has to be faulted in again, so a training step pads its rows to few lengths instead.
    torch = sys.modules.get("torch")  # who has not imported it has no CUDA memory
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        except (OSError, AttributeError):  # another C library
            pass
