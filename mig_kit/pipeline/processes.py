"""How processes are started: launchers, such as `torchrun --nproc-per-node 8`."""

import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

from mig_kit.common import UserError

MODULE = "mig_kit.stages.launched_worker"  # a launcher starts it, with the stage folder
# torchrun's and accelerate's
OPTIONS = re.compile(r"--(nproc[-_]per[-_]node|nnodes|num[-_]machines|num[-_]processes)[ =]+(\S+)")


class Launch(NamedTuple):
    """The words of a launcher's command, processes per node (local) and nodes; 0 if unknown."""

    words: tuple[str, ...]
    local: int
    nodes: int


def parse_launcher(launcher: str) -> Launch:
    """A launcher's words and processes; UserError, with the remedy, if it cannot be started."""
    try:
        words = shlex.split(launcher)
    except ValueError as error:
        raise UserError(f"launcher is \"{launcher}\": {error}; close it") from None
    program = shutil.which(words[0], path=search_path())
    if program is None:
        raise UserError(f"launcher starts with '{words[0]}', which is neither beside "
                        f"{sys.executable} nor on PATH; install it, or set launcher to \"\"")
    numbers = {name.replace("_", "-"): int(text) if text.isdecimal() else 0
               for name, text in OPTIONS.findall(launcher)}
    nodes = numbers.get("nnodes", numbers.get("num-machines", 1))
    local = numbers.get("nproc-per-node", numbers.get("num-processes", 0) // max(1, nodes))
    return Launch((program, *words[1:], "-m", MODULE), local, nodes)


def search_path() -> str:
    """PATH with the folder of this Python's own programs (torchrun, accelerate) first."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
