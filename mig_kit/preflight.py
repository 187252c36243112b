"""Stage 00: what this machine has, and what the chosen profile will need, before anything is computed."""

import os
import shutil

import psutil
import torch

from mig_kit.models import Hardware
from mig_kit.runs import runs_root

# Measured on two cores of an AMD EPYC (Zen 5) with avx512_bf16: minutes of each stage of the tiny profile,
# and GiB that it stayed within (04: drawn 1,920 candidates in 1.6, scaled to 2,550).
TINY_COST = {"01_synthesize": (0.3, 4.0), "02_sft": (6.3, 5.7), "03_merge": (0.1, 4.9), "04_rejection_sampling": (2.1, 4.9),
             "05_grpo": (7.1, 4.9), "06_evaluate": (5.8, 4.0), "07_report": (0.1, 4.0)}
REFERENCE_GFLOPS = 1060.0  # what `matrix_rate` gives on that machine


def matrix_rate(hw: Hardware, seconds: float = 0.5) -> float:
    """GFLOP/s of matrix products of the size the tiny model does, in the dtype it will use."""
    import time

    dtype = torch.bfloat16 if hw.autocast or hw.dtype == torch.bfloat16 else torch.float32
    a = torch.ones(4096, 256, dtype=dtype, device=hw.device)
    b = torch.ones(704, 256, dtype=dtype, device=hw.device)
    torch.nn.functional.linear(a, b)
    rounds, start = 0, time.perf_counter()
    while time.perf_counter() - start < seconds:
        torch.nn.functional.linear(a, b)
        rounds += 1
    return 2 * a.shape[0] * a.shape[1] * b.shape[0] * rounds / (time.perf_counter() - start) / 1e9


def expected(rate: float) -> list[dict]:
    """Rows {stage, minutes, memory_gib}: the measured cost, with time scaled by half to this machine's matrix rate.

    Half, because about half of a stage's time is matrix products.
    """
    factor = 0.5 + 0.5 * REFERENCE_GFLOPS / max(rate, 1.0)
    return [{"stage": s, "minutes": round(m * factor, 1), "memory_gib": g} for s, (m, g) in TINY_COST.items()]


def machine() -> dict:
    """Cores, memory and free disk (GiB), and the GPU if there is one."""
    memory, disk = psutil.virtual_memory(), shutil.disk_usage(runs_root().parent)
    return {"cpus": os.cpu_count(), "threads": torch.get_num_threads(), "memory_gib": round(memory.total / 2**30, 1),
            "available_gib": round(memory.available / 2**30, 1), "disk_free_gib": round(disk.free / 2**30, 1),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none"}


def check(found: dict, memory_gib: float, disk_gib: float) -> None:
    """MemoryError or OSError with one sentence when the machine is too small for the profile."""
    if found["available_gib"] < memory_gib:
        raise MemoryError(f"this profile needs {memory_gib:g} GiB of memory and {found['available_gib']:g} GiB are free; "
                          "close other programs or use the smoke profile")
    if found["disk_free_gib"] < disk_gib:
        raise OSError(f"this profile writes up to {disk_gib:g} GiB and {found['disk_free_gib']:g} GiB are free; "
                      "free some disk or set MIG_KIT_RUNS to a larger one")
