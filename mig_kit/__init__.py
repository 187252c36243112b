"""mig-kit: multi-image visual grounding by RL, stage by stage (arXiv 2507.00748)."""

__version__ = "0.6.0"
