"""Where and in which numbers a model computes."""

from dataclasses import dataclass

import torch

# Never 4-bit. The tower needs its full path: plain "visual" is ignored and the tower quantised.
FULL_PRECISION_MODULES = ["model.visual", "lm_head"]


@dataclass(frozen=True)
class Hardware:
    """Where and in which numbers to compute; `loading.choose_hardware` decides it."""

    device: str
    dtype: torch.dtype
    attention: str
    reason: str
