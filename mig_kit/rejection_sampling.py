"""Stage 04: rejection sampling with the merged model curates the prompts for reinforcement learning.

The paper names the step but not the rule. Ours: draw N replies per candidate at T 1, call a reply right if it names the
right image with IoU >= 0.5, and keep prompts that are neither always right nor never right (a group without spread has no
advantage to learn from), the same number from every task.
"""

import json
import os
import random
from collections import Counter, defaultdict
from contextlib import closing
from pathlib import Path
from threading import Lock

import numpy as np

from mig_kit.decoding import decoding_weights
from mig_kit.frames import View
from mig_kit.generation import Sampling, rollouts, uniform_draws
from mig_kit.prompt_cache import PromptCache, inner
from mig_kit.records import Sample
from mig_kit.rewards import correct
from mig_kit.runs import progress, release_memory
from mig_kit.workers import in_threads


def stored(path: Path) -> dict[str, list[str]]:
    """Replies by sample id from a rollout file; a last line cut by a kill is dropped from the file."""
    if not path.is_file():
        return {}
    lines, whole = path.read_text().split("\n"), []
    for line in lines:
        try:
            whole.append(json.loads(line))
        except ValueError:
            continue
    text = "".join(json.dumps(row) + "\n" for row in whole)
    beside = path.with_suffix(".tmp")
    beside.write_text(text)
    beside.replace(path)
    return {row["id"]: row["replies"] for row in whole}


def _objects(sample: Sample) -> tuple[int, ...]:
    """What tells a list of images from others without reading them."""
    return tuple(map(id, sample.images))


def sample_replies(model, processor, samples: list[Sample], path: Path, *, replies: int, temperature: float,
                   max_new_tokens: int, batch_size: int, seed: int, view: View, autocast: bool,
                   label: str = "rollouts", cache: PromptCache | None = None, workers: int = 1) -> dict[str, list[str]]:
    """`replies` replies to every sample, appended to `path` batch by batch; what is there already is not drawn again.

    Each batch has its own seed, and batches are cut before anything is skipped, so a resumed run draws what an
    uninterrupted one would have drawn. Questions about the same image objects are asked together, for `rollouts` reads these
    once. cache: prompts made ready by an earlier call for the same samples and model. workers: batches under way at a time, on a
    CPU; the replies are the same. Raises ValueError for fewer than one reply.
    """
    if replies < 1:
        raise ValueError(f"replies is {replies}; a prompt needs at least one reply (only 06_evaluate can do without)")
    have = stored(path)
    cache = cache or PromptCache(model, processor, view, limit=batch_size, autocast=autocast)
    first: dict[tuple[int, ...], str] = {}
    for s in samples:
        first[_objects(s)] = min(s.id, first.get(_objects(s), s.id))
    order = sorted(samples, key=lambda s: (len(s.images), first[_objects(s)], s.id))
    batches = [order[i:i + batch_size] for i in range(0, len(order), batch_size)]
    sampling = Sampling(temperature, max_new_tokens=max_new_tokens)
    path.parent.mkdir(parents=True, exist_ok=True)
    todo = [(number, batch) for number, batch in enumerate(batches) if not all(s.id in have for s in batch)]
    alone = Lock()  # the cache and the tokenizer are for one thread at a time

    def drawn(numbered: tuple[int, list[Sample]]) -> list[list[list[int]]]:
        number, batch = numbered
        with alone:
            prompts = cache.get(batch)
        draws = uniform_draws(seed * 1_000_003 + number, len(batch), replies, max_new_tokens)
        return rollouts(model, processor, prompts, replies, sampling, draws, autocast, joined)

    with path.open("a") as file, decoding_weights(inner(model), autocast) as joined, \
            closing(in_threads(drawn, todo, workers)) as found:
        for groups, (number, batch) in zip(progress(found, label, total=len(batches), initial=len(batches) - len(todo)), todo):
            for sample, group in zip(batch, groups):
                if sample.id not in have:
                    with alone:
                        have[sample.id] = processor.tokenizer.batch_decode(group, skip_special_tokens=True)
                    file.write(json.dumps({"id": sample.id, "replies": have[sample.id]}) + "\n")
            file.flush()
            os.fsync(file.fileno())
            if number % 8 == 7:
                release_memory()
    return {s.id: have[s.id] for s in samples}


def pass_rates(samples: list[Sample], replies: dict[str, list[str]], view: View,
               threshold: float = 0.5) -> np.ndarray:
    """Share of right replies per sample, (samples,) float in 0..1."""
    return np.array([np.mean([correct(r, s, threshold, view) for r in replies[s.id]]) for s in samples])


def pass_at_k(right: int, total: int, k: int) -> float:
    """Chance that k of `total` replies, `right` of them right, hold a right one (Chen et al., arXiv 2107.03374, eq. 1)."""
    if total - right < k:
        return 1.0
    return 1.0 - float(np.prod(1.0 - k / np.arange(total - right + 1, total + 1)))


def by_detail(samples: list[Sample], replies: dict[str, list[str]], view: View) -> list[dict]:
    """How often replies are right by what their reasoning says: rows {asked, detail, n, right}, right in 0..1.

    asked: "a box" or "a letter". detail: "method" (nothing of the form "name: value"), "finding" (one such statement) or
    "evidence" (several), as the tiny teacher writes them.
    """
    found = defaultdict(list)
    for sample in samples:
        for reply in replies[sample.id]:
            stated = reply.partition("</think>")[0].count(": ")
            detail = ("method", "finding", "evidence")[min(stated, 2)]
            found["a letter" if sample.options else "a box", detail].append(correct(reply, sample, 0.5, view))
    return [{"asked": asked, "detail": detail, "n": len(right), "right": float(np.mean(right))}
            for (asked, detail), right in sorted(found.items())]


def curate(samples: list[Sample], rates: np.ndarray, *, lowest: float, highest: float, per_task: int,
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
