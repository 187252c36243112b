"""What the benchmark measures, and how: questions of one size, stock models, time and memory."""

import random
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel

from mig_kit.boxes import BoxFormat
from mig_kit.common import release_memory
from mig_kit.models.loading import Hardware
from mig_kit.sample import Sample, Target
from mig_kit.world.scenes import PLAIN, render_scene

BOX_FORMAT = BoxFormat(max_pixels=4_000_000)  # no image is made smaller
STOCK_ATTENTION = "sdpa"  # transformers' default
SCENE_SIDE = 84  # pixels


@dataclass(frozen=True)
class Workload:
    """What is measured: the size of a GRPO step."""

    images: int = 6  # of a prompt
    group: int = 8  # replies to a prompt
    tokens: int = 64  # of a reply
    side: int = 392  # of an image, pixels
    prompts: int = 4  # of a step, as many as stage 05 learns from at a time


def make_questions(load: Workload, count: int, alike: int = 1) -> list[Sample]:
    """`count` questions, each `alike` in sequence about the same `load.images` scenes."""
    rng = random.Random("benchmark/0")
    samples = []
    for index in range(count):
        if index % alike == 0:
            scenes = [PLAIN.arrange_scene(rng, PLAIN.pick_appearances(rng, 4),
                                          (SCENE_SIDE, SCENE_SIDE)) for _ in range(load.images)]
            images = tuple(render_scene(scene).resize((load.side, load.side)) for scene in scenes)
            objects = [obj for scene in scenes for obj in scene.objects]
        obj = objects[index % alike % len(objects)]
        box = tuple(value * load.side / SCENE_SIDE for value in obj.box)
        samples.append(Sample(f"benchmark/{index}", "benchmark", "benchmark", "val", images,
                              f"Find the {obj.name}.", (Target(1, box),)))
    return samples


def load_stock_model(model: str | Path, hardware: Hardware) -> PreTrainedModel:
    """The model as transformers loads it: its own attention, and its convolution over patches."""
    weights = AutoModelForImageTextToText.from_pretrained(
        model, dtype=hardware.dtype, attn_implementation=STOCK_ATTENTION,
        device_map=hardware.device, use_safetensors=True)
    return weights.eval()


def time_call(call: Callable[[], object], hardware: Hardware) -> float:
    """Wall time of a call, seconds."""
    _wait_for_device(hardware)
    start = time.perf_counter()
    call()
    _wait_for_device(hardware)
    return time.perf_counter() - start


def _wait_for_device(hardware: Hardware) -> None:
    if hardware.device == "cuda":
        torch.cuda.synchronize()


def compare_times(stock: Callable[[], object], kit: Callable[[], object], repeats: int,
                  hardware: Hardware, name: str = "") -> dict:
    """Both calls, warmed up, in turns: medians in seconds, their ratio, fastest and slowest.

    They are also printed under a `name`.
    """
    stock()
    kit()
    pairs = [(time_call(stock, hardware), time_call(kit, hardware)) for _ in range(repeats)]
    stock_seconds, kit_seconds = zip(*pairs)
    stock_median, kit_median = statistics.median(stock_seconds), statistics.median(kit_seconds)
    if name:
        print(f"{name:<14} stock {stock_median:8.3f} s   kit {kit_median:8.3f} s   "
              f"{stock_median / kit_median:6.1f} times as fast", flush=True)
    return {
        "stock_s": round(stock_median, 4), "kit_s": round(kit_median, 4),
        "ratio": round(stock_median / kit_median, 2),
        "stock_spread": [round(min(stock_seconds), 4), round(max(stock_seconds), 4)],
        "kit_spread": [round(min(kit_seconds), 4), round(max(kit_seconds), 4)]}


def peak_memory(call: Callable[[], object], hardware: Hardware) -> float:
    """MiB at a call's peak beyond what was in use: of the GPU, else of the process."""
    release_memory()
    if hardware.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    process, is_over = psutil.Process(), threading.Event()
    before = highest = process.memory_info().rss

    def watch() -> None:
        nonlocal highest
        while not is_over.wait(0.002):
            highest = max(highest, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    call()
    is_over.set()
    watcher.join()
    return round((highest - before) / 2**20, 1)
