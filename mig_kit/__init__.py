"""mig-kit: multi-image visual grounding by RL, stage by stage (arXiv 2507.00748)."""

import logging
import warnings

__version__ = "0.1.0"

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
