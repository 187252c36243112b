"""Stock TRL and the shared-prefix trainer on your own table: whole steps, five of each.

    python -m mig_kit.shared_prefix.compare questions.jsonl --model Qwen/Qwen2.5-VL-3B-Instruct

Stock TRL draws as many tokens, but learns from the shared trainer's completions.
"""

import resource
import sys
from argparse import ArgumentParser, Namespace
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter, process_time
from zlib import crc32

import numpy as np
import torch
from datasets import load_dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer

from mig_kit.shared_prefix.obstacles import LANGUAGE_LAYERS
from mig_kit.shared_prefix.prompt_cache import load_image_prompts
from mig_kit.shared_prefix.trainer import SharedPrefixGRPOTrainer

STEPS = 5
STEADY = (1, 3, 4)  # without the shared trainer's self-check, which steps 1 and 3 of a run include


def arbitrary_reward(completions: list, **columns) -> list[float]:
    """A number from 0 to 1 for each text, so that a group's rewards differ."""
    return [crc32(str(completion).encode()) / 2**32 for completion in completions]


def peak_mib() -> float:
    """The most memory that this process has held so far, on a GPU the GPU's."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    in_kib = torch.cuda.max_memory_allocated() / 2**10 or (
        resident * (sys.platform != "darwin" or 2**-10))
    return in_kib / 2**10


def measure_training(is_shared: bool, options: Namespace, folder: str, completions: list) -> tuple:
    """Train one side. completions: of each step, for stock TRL to learn from.

    Returns completions and gradients of each step, why prompts are not shared, or "", and a side of
    what `main` returns.
    """
    args = GRPOConfig(
        folder, num_generations=options.group, per_device_train_batch_size=options.group,
        max_completion_length=options.tokens, generation_kwargs={"min_new_tokens": options.tokens},
        max_steps=STEPS, learning_rate=1e-4, logging_strategy="no", save_strategy="no",
        report_to="none", bf16=torch.cuda.is_available() and not options.float32)
    args._n_gpu = min(1, args.n_gpu)  # TRL refuses several in one process
    trainer = (SharedPrefixGRPOTrainer if is_shared else GRPOTrainer)(
        options.model, arbitrary_reward, args,
        load_dataset("json", data_files=options.table, split="train"),
        processing_class=load_image_prompts(options.model, args),
        peft_config=LoraConfig(r=16, target_modules=options.target_modules))
    draw, train = trainer._generate_single_turn, trainer.training_step
    learned, gradients, side = [], [], {"wall_s": [], "cpu_s": []}

    def draw_and_replace(*arguments):
        drawn = draw(*arguments)[0]
        learned.append(drawn if is_shared else completions[len(learned)])
        return learned[-1], None

    def train_and_record(*arguments):
        start, cpu_start = perf_counter(), process_time()
        loss = train(*arguments)
        gradients.append(np.concatenate([
            parameter.grad.flatten().float().cpu().numpy() for parameter
            in trainer.model.parameters() if parameter.grad is not None]))
        side["wall_s"].append(perf_counter() - start)
        side["cpu_s"].append(process_time() - cpu_start)
        return loss

    trainer._generate_single_turn, trainer.training_step = draw_and_replace, train_and_record
    before = peak_mib()
    trainer.train()
    side["peak_mib"] = peak_mib()
    side["added_mib"] = side["peak_mib"] - before
    return learned, gradients, getattr(trainer, "unshared", ""), side


def main(words: list[str] | None = None) -> dict:
    """Train both sides, each in a process of its own, and print a table.

    Returns: {"stock TRL", "shared prompts": {"wall_s", "cpu_s": of each step, "peak_mib",
        "added_mib": by the steps, to the loaded model},
        "times_as_fast": by the median of STEADY steps, "gradient_gap", "unshared": why, or ""}.
    """
    parser = ArgumentParser("python -m mig_kit.shared_prefix.compare", description=__doc__)
    parser.add_argument("table", help="JSON lines with `prompt`, and `images` or `image` if any")
    parser.add_argument("--model", required=True, help="name or folder, as TRL takes it")
    parser.add_argument("--group", type=int, default=8, help="completions to the step's one prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of every completion")
    parser.add_argument("--target-modules", default=LANGUAGE_LAYERS, help="of LoRA, a pattern")
    parser.add_argument("--float32", action="store_true", help="on a GPU, too, for exact gradients")
    options = parser.parse_args(words)
    if not Path(options.table).is_file():
        parser.error(f"{options.table} is no file; give one of JSON lines")
    sides, completions = [], []
    for is_shared in (True, False):
        with (TemporaryDirectory() as folder,
              ProcessPoolExecutor(1, get_context("spawn")) as process):
            completions, *side = process.submit(measure_training, is_shared, options, folder,
                                                completions).result()
            sides.append(side)
    (own_gradients, unshared, shared), (gradients, _, stock) = sides
    gap = max(float(np.linalg.norm(own - right) / (np.linalg.norm(right) or 1))
              for own, right in zip(own_gradients, gradients))
    result = {"stock TRL": stock, "shared prompts": shared}
    stock, shared = (median(side["wall_s"][step] for step in STEADY) for side in result.values())
    result |= {"times_as_fast": stock / shared, "gradient_gap": gap, "unshared": unshared}
    print_table(result)
    return result


def print_table(result: dict) -> None:
    """Print what `main` returns."""
    print("whole steps, wall (CPU) seconds" + "".join(
        f"{f'step {step + 1}':>18}" for step in range(STEPS)) + "   peak memory (of it the steps')")
    for name in ("stock TRL", "shared prompts"):
        side = result[name]
        print(f"{name:31}" + "".join(f"{wall:8.2f} ({cpu:6.2f})" for wall, cpu in zip(
            side["wall_s"], side["cpu_s"]))
            + f"{side['peak_mib']:10.0f} ({side['added_mib']:.0f}) MiB")
    if result["unshared"]:
        print(f"prompts were NOT shared, both sides are stock TRL: {result['unshared']}")
    print(f"{result['times_as_fast']:.1f} times as fast, by the median of steps 2, 4 and 5 (1 and "
          "3 of shared prompts include its self-check); largest difference of gradients: "
          f"{result['gradient_gap']:.1e} of their norm")


if __name__ == "__main__":
    main()
