"""How the kit's processes are prepared, and how launchers, such as `torchrun`, start them."""

import logging
import os
import re
import shlex
import shutil
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from mig_kit.common import PROJECT_ROOT, UserError

MODULE = "mig_kit.stages.launched_worker"  # a launcher starts it, with the stage folder
# torchrun's and accelerate's
OPTIONS = re.compile(r"--(nproc[-_]per[-_]node|nnodes|num[-_]machines|num[-_]processes)[ =]+(\S+)")

# For a process that the kit runs in, and for those that it starts. glibc returns freed memory at
# once and faults it in again for every tensor: 9 % of a step (it heeds these from the start of a
# process only). A waiting thread of OpenMP turns on its core and keeps it from the one that it
# waits for: one busy process beside a training made that fourteen times slower. After so few turns
# it sleeps, and alone it is as fast. oneDNN compiles a kernel for every shape and keeps 1,024 of
# them: rows have more lengths than that.
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592", "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456", "GOMP_SPINCOUNT": "1000",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8192",
    "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false",
    "MIG_KIT_PROJECT": str(PROJECT_ROOT)}
# bitsandbytes complains at import that it could not fetch an optional kernel; the kit fetches none.
# Checkpoints of small models are written within a second.
QUIET = ("bitsandbytes.backends.cpu.ops", "transformers.integrations.bitsandbytes",
         "transformers.trainer_utils")


def prepare_process() -> None:
    """Set what the kit's own processes need, unless the user has set it, and hide warnings that are
    no news to the user; to be called before torch is imported.
    """
    for name, value in ENVIRONMENT.items():
        # the user's OMP_WAIT_POLICY would be overruled by a number of turns
        if name != "GOMP_SPINCOUNT" or "OMP_WAIT_POLICY" not in os.environ:
            os.environ.setdefault(name, value)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.ERROR)
    # of libraries about each other; versions are pinned
    warnings.filterwarnings("ignore", category=FutureWarning,
                            module="(transformers|trl|peft|torch)")
    # 03 compares wrong ways to merge; adapters name their base by a relative path
    for message in ("Merge lora module to 4-bit linear", "Could not find a config file in"):
        warnings.filterwarnings("ignore", message=message)
    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # by MAX_PIXELS


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
