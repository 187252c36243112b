"""Stage 00: what this machine has and what the profile will need, before anything is computed."""

import os
import shutil
import time
from statistics import median

import psutil
import torch

from mig_kit.engine.models import TINY_BASE, Hardware, load_model
from mig_kit.pipeline.store import runs_root

# Minutes of each stage of `make run` on two cores of an AMD EPYC (Zen 4, no AMX), and GiB of memory
# that it stayed within.
TINY_COST = {
    "01_synthesize": (0.4, 4.0), "02_sft": (10.6, 4.0), "03_merge": (0.3, 4.0),
    "04_rejection_sampling": (2.1, 4.0), "05_grpo": (7.3, 6.0), "06_evaluate": (2.9, 6.0),
    "07_report": (0.3, 4.0)}
REFERENCE_SECONDS = 0.435  # what `time_reference_step` gave in that run


def describe_machine() -> dict:
    """Cores, memory and free disk (GiB), and the GPU if there is one."""
    memory = psutil.virtual_memory()
    existing = next(path for path in (runs_root(), *runs_root().parents) if path.exists())
    return {
        "cpus": os.cpu_count(), "threads": torch.get_num_threads(),
        "memory_gib": round(memory.total / 2**30, 1),
        "available_gib": round(memory.available / 2**30, 1),
        "disk_free_gib": round(shutil.disk_usage(existing).free / 2**30, 1),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none"}


def time_reference_step(hardware: Hardware, rounds: int = 7) -> float:
    """Seconds of a fixed training step, the median of `rounds`: what else runs now slows it, too.

    The step is the shipped base on 16 rows of 200 tokens, forward and backward.
    """
    model = load_model(TINY_BASE, hardware)
    ids = torch.arange(16 * 200, device=hardware.device).view(16, 200)
    ids = ids % 500 + 100  # no special tokens
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        with torch.autocast(hardware.device, torch.bfloat16, enabled=hardware.autocast):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        model.zero_grad()
        if hardware.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def predict_minutes(seconds: float) -> list[dict]:
    """Rows {stage, minutes, memory_gib}: the measured cost, its time scaled to this machine.

    seconds: of `time_reference_step`.
    """
    scale = seconds / REFERENCE_SECONDS
    return [{"stage": stage, "minutes": round(minutes * scale, 1), "memory_gib": gib}
            for stage, (minutes, gib) in TINY_COST.items()]


def require_resources(machine: dict, memory_gib: float, disk_gib: float,
                      needs_gpu: bool = False) -> None:
    """RuntimeError, MemoryError or OSError with one sentence when the machine lacks what the
    profile needs.

    machine: of `describe_machine`.
    """
    if needs_gpu and machine["gpu"] == "none":
        raise RuntimeError(
            f"this profile needs a GPU, and PyTorch {torch.__version__} sees none; check the "
            "driver with nvidia-smi, or set device to cpu")
    if machine["available_gib"] < memory_gib:
        raise MemoryError(
            f"this profile needs {memory_gib:g} GiB of memory and {machine['available_gib']:g} GiB "
            "are free; close other programs or use the smoke profile")
    if machine["disk_free_gib"] < disk_gib:
        raise OSError(
            f"this profile writes up to {disk_gib:g} GiB and {machine['disk_free_gib']:g} GiB are "
            "free; free some disk or set MIG_KIT_RUNS to a larger one")


def summary(profile: str, minutes: float, hours: list[dict]) -> str:
    """What the profile will take, in a few words.

    minutes: of the tiny profile on this machine. hours: rows of `gpu_needs.predict`, [] where the
    profile needs no GPU.
    """
    if not hours:
        return f"about {minutes:.0f} minutes in all"
    card = next(name for name in hours[0] if name.startswith("80 GB"))
    by_kit, served = (sum(row[card] for row in hours if row["drawn by"] != other)
                      for other in ("a server", "the kit"))
    return (f"profile {profile}: predicted at most {by_kit:.0f} hours in all on an "
            f"{card.partition(':')[0]}, {served:.0f} with a server")
