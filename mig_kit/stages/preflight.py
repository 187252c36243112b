"""Stage 00: what this machine has, and what the profile took where it was measured."""

import os
import shutil
import time
from statistics import median

import psutil
import torch

from mig_kit.common import UserError
from mig_kit.models.loading import TINY_BASE, Hardware, load_model
from mig_kit.pipeline.run_folders import runs_root

# Minutes of each stage of `make run` on two idle cores of an AMD EPYC (Zen 4), and GiB of memory
# that were enough.
TINY_COST = {
    "01_synthesize": (0.6, 4.0), "02_sft": (7.5, 8.0), "03_merge": (0.3, 4.0),
    "04_rejection_sampling": (1.8, 4.0), "05_grpo": (4.3, 8.0), "06_evaluate": (2.4, 6.0),
    "07_report": (0.4, 4.0)}
REFERENCE_SECONDS = 0.62  # what `time_reference_step` gave there
# GiB at the peak of each stage on one H100, version 0.3, random weights, six images of 512 tokens a
# prompt (notebooks/guide/real_run.md)
MEASURED_PEAKS = {"qwen2_5_vl_3b": {"02_sft": 11.7, "03_merge": 11.7, "04_rejection_sampling": 14.1,
                                    "05_grpo, first replies": 14.0}}


def measure_machine() -> dict:
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
    """Median seconds of a fixed training step: the shipped base on 16 rows of 200 tokens."""
    model = load_model(TINY_BASE, hardware)
    ids = torch.arange(16 * 200, device=hardware.device).view(16, 200)
    ids = ids % 500 + 100  # no special tokens
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        model.zero_grad()
        if hardware.device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return median(seconds)


def predict_minutes(seconds: float) -> list[dict]:
    """Rows {stage, minutes, memory_gib} of the tiny profile; seconds: of `time_reference_step`."""
    return [{"stage": stage, "minutes": round(seconds / REFERENCE_SECONDS * minutes, 1),
             "memory_gib": gib} for stage, (minutes, gib) in TINY_COST.items()]


def require_resources(machine: dict, memory_gib: float, disk_gib: float,
                      needs_gpu: bool = False) -> None:
    """UserError if the machine (`measure_machine`) lacks a resource."""
    if needs_gpu and machine["gpu"] == "none":
        raise UserError(
            f"this profile needs a GPU, and PyTorch {torch.__version__} sees none; check the "
            "driver with nvidia-smi, or set device to cpu")
    if machine["available_gib"] < memory_gib:
        raise UserError(
            f"this profile needs {memory_gib:g} GiB of memory and {machine['available_gib']:g} GiB "
            "are free; close other programs or use the smoke profile")
    if machine["disk_free_gib"] < disk_gib:
        raise UserError(
            f"this profile writes up to {disk_gib:g} GiB and {machine['disk_free_gib']:g} GiB are "
            "free; free some disk or set MIG_KIT_RUNS to a larger one")
