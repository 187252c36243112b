"""mig-kit: multi-image visual grounding by RL, stage by stage (arXiv 2507.00748)."""

import logging
import warnings

__version__ = "0.1.0"

# bitsandbytes complains at import that it could not fetch an optional kernel; the kit fetches none
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
# of libraries about each other; versions are pinned
warnings.filterwarnings("ignore", category=FutureWarning, module="(transformers|trl|peft|torch)")
