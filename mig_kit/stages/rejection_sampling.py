"""Stage 04: rejection sampling with the merged model curates the prompts for reinforcement learning.

The paper names the step but not the rule. Ours: draw N replies per candidate at T 1, call a reply right if it names the
right image with IoU >= 0.5, and keep prompts that are neither always right nor never right (a group without spread has no
advantage to learn from), the same number from every task.
"""

import random
from collections import Counter, defaultdict

import numpy as np

from mig_kit.boxes import BoxFormat
from mig_kit.rewards import is_correct
from mig_kit.sample import Sample


def pass_rates(samples: list[Sample], replies: dict[str, list[str]], box_format: BoxFormat,
               threshold: float = 0.5) -> np.ndarray:
    """Share of right replies per sample, (samples,) float in 0..1."""
    return np.array([np.mean([is_correct(r, s, box_format, threshold) for r in replies[s.id]]) for s in samples])


def accuracy_by_detail(samples: list[Sample], replies: dict[str, list[str]], box_format: BoxFormat) -> list[dict]:
    """How often replies are right by what their reasoning says: rows {asked, detail, n, right}, right in 0..1.

    asked: "a box" or "a letter". detail: "method" (nothing of the form "name: value"), "finding" (one such statement) or
    "evidence" (several), as the tiny teacher writes them.
    """
    found = defaultdict(list)
    for sample in samples:
        for reply in replies[sample.id]:
            stated = reply.partition("</think>")[0].count(": ")
            detail = ("method", "finding", "evidence")[min(stated, 2)]
            found["a letter" if sample.options else "a box", detail].append(is_correct(reply, sample, box_format, 0.5))
    return [{"asked": asked, "detail": detail, "n": len(right), "right": float(np.mean(right))}
            for (asked, detail), right in sorted(found.items())]


def select_by_pass_rate(samples: list[Sample], rates: np.ndarray, *, lowest: float, highest: float, per_task: int,
           seed: int) -> tuple[list[Sample], dict[str, dict[str, int]]]:
    """The kept samples, and per task how many were kept or dropped and why.

    Kept: lowest <= pass rate <= highest, at most `per_task` of every task, drawn at random.
    """
    counts: dict[str, Counter] = defaultdict(Counter)
    fit = defaultdict(list)
    for sample, rate in zip(samples, rates, strict=True):
        reason = "never right" if rate < lowest else "always right" if rate > highest else ""
        if reason:
            counts[sample.task][reason] += 1
        else:
            fit[sample.task].append(sample)
    rng, kept = random.Random(f"curate/{seed}"), []
    for task, found in fit.items():
        rng.shuffle(found)
        kept += found[:per_task]
        counts[task]["kept"] = len(found[:per_task])
        counts[task]["over the task's share"] = len(found[per_task:])
    rng.shuffle(kept)
    return kept, {task: dict(c) for task, c in counts.items()}
