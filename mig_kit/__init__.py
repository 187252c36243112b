"""mig-kit: multi-image visual grounding by reinforcement learning, stage by stage (arXiv 2507.00748)."""

__version__ = "0.1.0"
