"""The kit's trainer and stock TRL's measured in turns: questions of one size, time and memory.

Both sides have the same weights, data and tokens per reply. Stock trainers read a prompt once per
reply, the kit once per group. No rollout reuses the images of another.
"""

import random
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import torch
from transformers import AutoModelForImageTextToText
from trl import GRPOTrainer

from mig_kit.boxes import BoxFormat
from mig_kit.common import release_memory
from mig_kit.models.loading import Hardware, Policy, load_model
from mig_kit.models.processors import load_processor
from mig_kit.pipeline.params import profile_params
from mig_kit.sample import Sample, Target
from mig_kit.stages.grpo import grpo_trainer
from mig_kit.world.scenes import PLAIN, render_scene

BOX_FORMAT = BoxFormat(max_pixels=4_000_000)  # no image is made smaller


@dataclass(frozen=True)
class Workload:
    """What is measured: the size of a GRPO step."""

    images: int = 6  # of a prompt
    group: int = 8  # replies to a prompt
    tokens: int = 64  # of a reply
    side: int = 392  # of an image, pixels
    prompts: int = 4  # of a step, as many as stage 05 learns from at a time


def make_questions(load: Workload) -> list[Sample]:
    """`load.prompts` questions, each about `load.images` drawn images of its own."""
    rng = random.Random("benchmark/0")
    samples = []
    for index in range(load.prompts):
        scenes = [PLAIN.arrange_scene(rng, PLAIN.pick_appearances(rng, 4), (84, 84))
                  for _ in range(load.images)]
        images = tuple(render_scene(scene).resize((load.side, load.side)) for scene in scenes)
        target = Target(1, (0, 0, load.side, load.side))
        samples.append(Sample(f"benchmark/{index}", "benchmark", "benchmark", "val", images,
                              f"Find the {scenes[0].objects[0].name}.", (target,)))
    return samples


def time_call(call: Callable[[], object], hardware: Hardware) -> float:
    """Wall time of a call, seconds."""
    wait_for_device = torch.cuda.synchronize if hardware.device == "cuda" else lambda: None
    wait_for_device()
    start = time.perf_counter()
    call()
    wait_for_device()
    return time.perf_counter() - start


def compare_times(stock: Callable[[], object], kit: Callable[[], object], repeats: int,
                  hardware: Hardware, name: str) -> dict:
    """Times the two calls in turns, after one warm-up each, and prints the figures by `name`.

    Returns: {"stock_s", "kit_s": medians; "ratio"; "stock_spread", "kit_spread": extremes}.
    """
    stock()
    kit()
    pairs = [(time_call(stock, hardware), time_call(kit, hardware)) for _ in range(repeats)]
    stock_seconds, kit_seconds = zip(*pairs)
    stock_median, kit_median = statistics.median(stock_seconds), statistics.median(kit_seconds)
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


@dataclass(frozen=True)
class Side:
    """One of the two trainers. is_kit: it reads every prompt once per group."""

    trainer: GRPOTrainer
    load: Workload
    is_kit: bool

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the first prompt of the last rollout; of the kit's trainer only."""
        return len(self.trainer._prompts_of([0])[0].ids)

    def roll_out(self) -> dict:
        """Replies and rewards of a step, from an empty cache, and advantages that are not all 0."""
        if self.is_kit:
            self.trainer.cache.clear()
        data = self.trainer.train_dataset
        rows = [data[index] for index in range(self.load.prompts) for _ in range(self.load.group)]
        batch = self.trainer._generate_and_score_completions(rows)
        advantages = torch.linspace(-1, 1, self.load.group, device=batch["completion_ids"].device)
        return {**batch, "advantages": advantages.repeat(self.load.prompts)}

    def learn(self, batch: dict) -> None:
        """Log-probabilities, loss and gradients of a batch."""
        trainer = self.trainer
        trainer.model.zero_grad()
        with trainer.compute_loss_context_manager():
            loss = trainer._compute_loss(trainer.model, batch)
        loss.backward()

    def step(self) -> None:
        """A whole GRPO step."""
        self.learn(self.roll_out())
        self.trainer.optimizer.step()

    def gradients(self) -> torch.Tensor:
        """Those of all adapters, as one vector."""
        return torch.cat([parameter.grad.flatten().float()
                          for parameter in self.trainer.model.parameters()
                          if parameter.grad is not None])


def make_sides(model: str | Path, hardware: Hardware, load: Workload,
               folder: Path) -> tuple[Side, Side]:
    """(stock, kit)."""
    return tuple(make_side(model, hardware, load, folder, is_kit) for is_kit in (False, True))


def make_side(model: str | Path, hardware: Hardware, load: Workload, folder: Path,
              is_kit: bool) -> Side:
    """A trainer for `load` whose adapter is not zero; scratch files go below `folder`."""
    processor = load_processor(model, BOX_FORMAT)
    if is_kit:
        weights = load_model(model, hardware)
    else:  # as transformers loads it, with its own attention and its convolution over patches
        weights = AutoModelForImageTextToText.from_pretrained(
            model, dtype=hardware.dtype, attn_implementation="sdpa", device_map=hardware.device,
            use_safetensors=True).eval()
    policy = Policy(weights, processor, hardware, BOX_FORMAT)
    torch.manual_seed(0)
    params = SimpleNamespace(**profile_params("05_grpo") | {
        "share_prefix": is_kit, "num_generations": load.group,
        "per_device_train_batch_size": load.prompts * load.group,
        "gradient_accumulation_steps": 1, "max_completion_length": load.tokens, "max_steps": 1,
        "learning_rate": 1e-4, "warmup_steps": 1, "scale_rewards": "group", "save_steps": 100,
        "seed": 0})
    trainer = grpo_trainer(policy, make_questions(load), folder / str(is_kit), params,
                           min_new_tokens=load.tokens)
    torch.manual_seed(1)
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02)
    trainer.create_optimizer()
    if hardware.device == "cuda":  # or stock TRL keeps every layer of every reply
        trainer.model.activation_checkpointing_enable({"use_reentrant": False})
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    return Side(trainer, load, is_kit)


def same_batches(stock: Side) -> tuple[dict, dict]:
    """The same replies as stock's batch and the kit's, in which a prompt is its sample's number."""
    batch = stock.roll_out()
    ids = batch["completion_ids"]
    numbers = torch.arange(stock.load.prompts, device=ids.device)
    prompt_ids = numbers.repeat_interleave(stock.load.group)[:, None]
    return batch, {**batch, "prompt_ids": prompt_ids, "prompt_mask": torch.ones_like(prompt_ids)}


def gradient_error(stock: Side, kit: Side) -> float:
    """Norm of the difference of both gradients over the norm of stock's, for the same replies."""
    kit.roll_out()  # reads the prompts
    for side, batch in zip((stock, kit), same_batches(stock)):
        side.learn(batch)
    return float((stock.gradients() - kit.gradients()).norm() / stock.gradients().norm())


def compare_training(model: str | Path, hardware: Hardware, load: Workload, folder: Path,
                     repeats: int, with_step: bool = False) -> dict:
    """Times "rollout" and "train" of a load; with_step: also a GRPO step and its memory."""
    stock, kit = make_sides(model, hardware, load, folder)
    stock_batch, kit_batch = same_batches(stock)
    kit.roll_out()
    result = {
        "prompt_tokens": kit.prompt_tokens,
        "rollout": compare_times(stock.roll_out, kit.roll_out, repeats, hardware, "rollout"),
        "train": compare_times(lambda: stock.learn(stock_batch), lambda: kit.learn(kit_batch),
                               repeats, hardware, "train")}
    if with_step:
        result["grpo_step"] = compare_times(stock.step, kit.step, repeats, hardware, "grpo_step")
        result["peak_mem_mb"] = {"stock": peak_memory(stock.step, hardware),
                                 "kit": peak_memory(kit.step, hardware)}
    return result


def run_headline(model: str | Path, hardware: Hardware, load: Workload, folder: Path,
                 repeats: int) -> dict:
    """Measures one load, prints a line for each stage, and compares gradients in float32."""
    float32 = replace(hardware, dtype=torch.float32, autocast=False, attention="sdpa")
    error = gradient_error(*make_sides(model, float32, replace(load, prompts=1), folder))
    return {
        "load": vars(load), "model": Path(model).name, "hardware": hardware.reason,
        "repeats": repeats, "grad_rel_error": error,
        **compare_training(model, hardware, load, folder, repeats, with_step=True)}


def headline_text(result: dict, load: Workload) -> str:
    """Text about the load, memory and gradients; `run_headline` prints the times."""
    memory = result["peak_mem_mb"]
    return "\n".join([
        f"{load.prompts} prompts with {load.images} images of {load.side} px "
        f"({result['prompt_tokens']} tokens), {load.group} replies of {load.tokens} tokens to "
        f"each; {result['hardware']}",
        f"memory of a step: stock {memory['stock']:.0f} MiB, kit {memory['kit']:.0f} MiB",
        f"gradients apart by {result['grad_rel_error']:.1e} (relative, float32)"])
