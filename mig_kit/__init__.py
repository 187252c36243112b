"""mig-kit: multi-image visual grounding by reinforcement learning, stage by stage (arXiv 2507.00748)."""

import logging

__version__ = "0.1.0"

# on some CPUs bitsandbytes complains at import that an optional kernel could not be fetched over the network; the kit fetches none
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
