"""How processes are started: launchers, such as `torchrun --nproc-per-node 8`."""

import argparse
import os
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from mig_kit.common import UserError

MODULE = "mig_kit.stages.launched_worker"  # a launcher starts it, with the stage folder


@dataclass(frozen=True)
class Launch:
    """A launcher's words, processes per node (local) and nodes; 0 if unknown."""

    words: tuple[str, ...]
    local: int
    nodes: int

    def command(self, folder: Path) -> list[str]:
        """The whole command that trains the job of a stage folder."""
        return [*self.words, "-m", MODULE, str(folder)]


def parse_launcher(launcher: str) -> Launch:
    """A launcher's words and processes; UserError, with the remedy, if it cannot be started."""
    try:
        words = shlex.split(launcher)
    except ValueError as error:
        raise UserError(f"launcher '{launcher}' is no command ({error}); write it as in a "
                        "shell") from None
    program = shutil.which(words[0], path=search_path())
    if program is None:
        raise UserError(f"launcher starts with '{words[0]}', which is neither beside "
                        f"{sys.executable} nor on PATH; install it, or set launcher to \"\"")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--nproc-per-node", "--nproc_per_node", dest="local", default="")
    parser.add_argument("--nnodes", "--num_machines", "--num-machines", dest="nodes", default="1")
    parser.add_argument("--num_processes", "--num-processes", dest="total", default="")
    try:
        known, _ = parser.parse_known_args(words[1:])
    except argparse.ArgumentError as error:
        raise UserError(f"launcher '{launcher}' is cut ({error}); write it as in a "
                        "shell") from None
    local, nodes, total = (int(text) if re.fullmatch("[0-9]+", text) else 0
                           for text in (known.local, known.nodes, known.total))
    local = local or total // max(1, nodes)
    return Launch((program, *words[1:]), local, nodes)


def search_path() -> str:
    """PATH with the folder of this Python's own programs (torchrun, accelerate) first."""
    return os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
