"""mig-kit: multi-image visual grounding by RL, stage by stage (arXiv 2507.00748).

.github/CONTRIBUTING.md lists the folders, and where each thing is computed and changed.
"""

__version__ = "0.6.0"
