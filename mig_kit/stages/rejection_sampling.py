"""Stage 04: rejection sampling with the merged model curates the prompts for RL.

The paper's abstracts name the step; the rule is ours: draw N replies at temperature 1 and keep
prompts whose pass rate lies between two bounds, at most the same number of every task.
"""

import random
from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from mig_kit.common import UserError
from mig_kit.prompts import Answer
from mig_kit.rewards import is_correct
from mig_kit.sample import Sample
from mig_kit.training.reward_loading import RL_NEEDS
from mig_kit.world.teacher import recognize_detail


def pass_rates(samples: Sequence[Sample], answers: dict[str, list[Answer]]) -> np.ndarray:
    """Share of correct answers per sample, (samples,) float in 0..1; answers: by sample id."""
    return np.array([np.mean([is_correct(answer, sample) for answer in answers[sample.id]])
                     for sample in samples])


def question_kind(sample: Sample) -> str:
    """What a question asks for: "a letter", "a box", or "none" where there is none."""
    return "a letter" if sample.options else "a box" if sample.targets else "none"


def accuracy_by_detail(samples: Sequence[Sample],
                       answers: dict[str, list[Answer]]) -> list[dict]:
    """Rows {asked, detail, n, correct (0..1)}: share of correct answers by kind of question and by
    the detail of the reasoning.
    """
    outcomes = defaultdict(list)
    for sample in samples:
        asked = question_kind(sample)
        for answer in answers[sample.id]:
            outcomes[asked, recognize_detail(answer)].append(is_correct(answer, sample))
    return [{"asked": asked, "detail": detail, "n": len(values), "correct": float(np.mean(values))}
            for (asked, detail), values in sorted(outcomes.items())]


def unsolved_warning(samples: Sequence[Sample], rates: np.ndarray) -> str:
    """A sentence that names the kinds of question without a correct reply, or ""; rates: 0..1."""
    solved = {question_kind(sample) for sample, rate in zip(samples, rates) if rate > 0}
    kinds = dict.fromkeys(map(question_kind, samples))
    unsolved = " and ".join(kind for kind in kinds if kind not in solved)
    return unsolved and (
        f"no reply to the questions whose answer is {unsolved} is correct: {RL_NEEDS}")


def require_prompts(kept: Sequence[Sample], rates: np.ndarray) -> None:
    """UserError with a remedy if no prompt is kept; rates: of the candidates, 0..1."""
    if len(kept):
        return
    replies = f"to the {len(rates)} candidates"
    if not rates.any():
        raise UserError(f"no reply {replies} is correct: {RL_NEEDS}")
    if rates.min() == 1:
        raise UserError(f"every reply {replies} is correct, so RL has nothing to add; give harder "
                        "questions")
    raise UserError("no pass rate lies within min_pass_rate and max_pass_rate, for they are "
                    f"{rates.min():.2f} to {rates.max():.2f}; widen them, with --force, since "
                    "04 has begun")


def select_by_pass_rate(samples: Sequence[Sample], rates: np.ndarray, *, lowest: float,
                        highest: float, per_task: int,
                        seed: int) -> tuple[list[int], dict[str, dict[str, int]]]:
    """(indices of kept samples, task -> reason -> count), for lowest <= pass rate <= highest.

    At most `per_task` of every task are kept, drawn at random.
    """
    counts: dict[str, Counter] = defaultdict(Counter)
    within = defaultdict(list)
    for index, (sample, rate) in enumerate(zip(samples, rates, strict=True)):
        if rate < lowest:
            counts[sample.task]["below min_pass_rate"] += 1
        elif rate > highest:
            counts[sample.task]["above max_pass_rate"] += 1
        else:
            within[sample.task].append(index)
    rng, kept = random.Random(f"curate/{seed}"), []
    for task, candidates in within.items():
        rng.shuffle(candidates)
        kept += candidates[:per_task]
        counts[task]["kept"] = len(candidates[:per_task])
        counts[task]["over per_task"] = len(candidates[per_task:])
    rng.shuffle(kept)
    return kept, {task: dict(count) for task, count in counts.items()}
