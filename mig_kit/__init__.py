"""mig-kit: multi-image visual grounding by RL, stage by stage (arXiv 2507.00748)."""

import logging
import os
import warnings

__version__ = "0.6.0"

# For every process that the kit runs in or starts, unless the user has set it; before torch loads.
# glibc returns freed memory at once and faults it in again for every tensor: 9 % of a step (it
# heeds these from the start of a process only). A waiting thread of OpenMP turns on its core and
# keeps it from the one that it waits for: one busy process beside a training made that fourteen
# times slower. After so few turns it sleeps, and alone it is as fast. oneDNN compiles a kernel for
# every shape and keeps 1,024 of them: rows have more lengths than that.
PROCESS_ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592", "MALLOC_TRIM_THRESHOLD_": "17179869184",
    "MALLOC_TOP_PAD_": "268435456", "GOMP_SPINCOUNT": "1000",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "8192",
    "HF_HUB_DISABLE_TELEMETRY": "1", "TOKENIZERS_PARALLELISM": "false"}
LATE = PROCESS_ENVIRONMENT.keys() - os.environ.keys()  # not set when this process started
if "OMP_WAIT_POLICY" in os.environ:  # the user's, which the number of turns would overrule
    LATE -= {"GOMP_SPINCOUNT"}
os.environ.update({name: PROCESS_ENVIRONMENT[name] for name in LATE})

# bitsandbytes complains at import that it could not fetch an optional kernel; the kit fetches none
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# of libraries about each other; versions are pinned
warnings.filterwarnings("ignore", category=FutureWarning, module="(transformers|trl|peft|torch)")
# what the kit does on purpose: 03 compares wrong ways to merge, adapters name their base by a
# relative path, and checkpoints of small models are written within a second
warnings.filterwarnings("ignore", message="Merge lora module to 4-bit linear")
warnings.filterwarnings("ignore", message="Could not find a config file in")
for name in ("transformers.integrations.bitsandbytes", "transformers.trainer_utils"):
    logging.getLogger(name).setLevel(logging.ERROR)
