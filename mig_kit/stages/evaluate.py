"""Stage 06: base, SFT and GRPO models on all suites, greedy and sampled, with intervals.

A reply is correct if its one box reaches IoU 0.5 in the correct image; naming several boxes counts
as naming none. A suite's score is the unweighted mean over its tasks (MIG-Bench's AVG). Intervals:
percentile bootstrap over the samples of each task (2,000 resamples, stratified); differences are
paired by sample.
"""

from collections import Counter

import numpy as np

from mig_kit.boxes import BoxFormat
from mig_kit.prompts import parse_reply
from mig_kit.rewards import is_correct, names_target_image, reply_iou
from mig_kit.sample import Sample
from mig_kit.stats import (
    group_by_task,
    macro_mean,
    paired_gap,
    pass_at_k,
    percent_interval,
    to_percent,
)


def score_reply(reply: str, sample: Sample, box_format: BoxFormat) -> dict[str, float]:
    """{"iou", "correct", "image", "format"} of one reply, 0..1 each.

    image: whether the image is correct; format: whether the reply is well formed. A sample without
    a target is answered by naming no box; there, and in multiple choice, iou and image repeat
    correct.
    """
    correct = float(is_correct(reply, sample, box_format))
    well_formed = float(parse_reply(reply).well_formed)
    if sample.options:
        return {"iou": correct, "correct": correct, "image": correct, "format": well_formed}
    if not sample.targets:
        return {"iou": correct, "correct": correct, "image": correct,
                "format": max(correct, well_formed)}
    return {"iou": reply_iou(reply, sample, box_format), "correct": correct,
            "image": float(names_target_image(reply, sample)), "format": well_formed}


def reply_is_correct(reply: str, sample: Sample, box_format: BoxFormat) -> float:
    """1.0 if the reply is correct."""
    return score_reply(reply, sample, box_format)["correct"]


def first_per_task(samples: list[Sample], per_task: int) -> list[Sample]:
    """The first `per_task` samples of every task, in order; all for 0."""
    counts: Counter = Counter()
    first_samples = []
    for sample in samples:
        counts[sample.task] += 1
        if not per_task or counts[sample.task] <= per_task:
            first_samples.append(sample)
    return first_samples


def split_by_task(samples: list[Sample], values: np.ndarray) -> dict[str, np.ndarray]:
    """values (samples, ...) split by task, in order of appearance."""
    return group_by_task((sample.task for sample in samples), values)


def summarize_suite(samples: list[Sample], greedy: list[str], drawn: list[list[str]],
                    box_format: BoxFormat) -> dict:
    """One system on one suite, in percent: n, score and ci95 (greedy), sampled (mean at temperature
    1), pass@k, and every task.

    drawn: (samples, replies) at temperature 1; samples with none are left out of sampled and
    pass@k, and sampled is None if all are.
    """
    scores = [score_reply(reply, sample, box_format)
              for reply, sample in zip(greedy, samples, strict=True)]
    columns = {name: np.array([score[name] for score in scores])
               for name in ("iou", "correct", "format", "image")}
    drawn_correct = _drawn_correctness(samples, drawn, box_format)
    tasks = {}
    for task, rows in split_by_task(samples, np.arange(len(samples))).items():
        tasks[task] = _summarize_task({name: values[rows] for name, values in columns.items()})
        if task in drawn_correct:
            tasks[task] |= _summarize_drawn(drawn_correct[task])
    groups = list(split_by_task(samples, columns["correct"]).values())
    summary = {"n": len(samples), "score": to_percent(macro_mean(groups)),
               "ci95": percent_interval(groups), "sampled": None,
               "n_sampled": sum(map(len, drawn_correct.values())), "tasks": tasks}
    if drawn_correct:
        summary |= _sampled_averages(list(drawn_correct.values()))
    for name in ("format", "image"):
        summary[name] = to_percent(macro_mean(list(split_by_task(samples, columns[name]).values())))
    return summary


def _drawn_correctness(samples: list[Sample], drawn: list[list[str]],
                       box_format: BoxFormat) -> dict[str, np.ndarray]:
    """task -> (samples, replies), 1 for each correct reply, of the samples that have drawn ones."""
    drawn_samples, correct = [], []
    for sample, replies in zip(samples, drawn):
        if replies:
            drawn_samples.append(sample)
            correct.append([reply_is_correct(reply, sample, box_format) for reply in replies])
    return split_by_task(drawn_samples, np.array(correct))


def _summarize_task(columns: dict[str, np.ndarray]) -> dict:
    """Greedy scores of one task in percent; columns: of score_reply, (samples,) each."""
    overlap = columns["iou"]
    accuracies = {f"acc@{t}": to_percent((overlap >= t).mean()) for t in (0.3, 0.5, 0.7)}
    return {"n": len(overlap), **accuracies, "mean_iou": to_percent(overlap.mean()),
            "ci95": percent_interval([columns["correct"]]),
            "format": to_percent(columns["format"].mean()),
            "image": to_percent(columns["image"].mean())}


def _summarize_drawn(correct: np.ndarray) -> dict[str, float]:
    """Mean, and share of samples with a correct reply, of (samples, replies) 0 or 1; in percent."""
    return {"sampled": to_percent(correct.mean()),
            f"pass@{correct.shape[1]}": to_percent((correct.sum(1) > 0).mean())}


def _sampled_averages(groups: list[np.ndarray]) -> dict:
    """{"sampled", "pass_at_k": {k: percent}}; groups: (samples, replies) of each task, 0 or 1."""
    total = groups[0].shape[1]
    averages = {"sampled": to_percent(macro_mean([rows.mean(1) for rows in groups])),
                "pass_at_k": {}}
    for k in (1, 2, 4, 8):
        if k > total:
            break
        chances = [np.array([pass_at_k(int(count), total, k) for count in rows.sum(1)])
                   for rows in groups]
        averages["pass_at_k"][str(k)] = to_percent(macro_mean(chances))
    return averages


def paired_difference(samples: list[Sample], after: list[str], before: list[str],
                      after_drawn: list[list[str]], before_drawn: list[list[str]],
                      box_format: BoxFormat) -> dict:
    """Paired difference of two systems in points: value and ci95 (greedy), sampled and sampled_ci95
    (mean at temperature 1).

    Samples without drawn replies of either system are left out of the latter two.
    """
    gaps = np.array([reply_is_correct(a, sample, box_format)
                     - reply_is_correct(b, sample, box_format)
                     for a, b, sample in zip(after, before, samples)])
    difference = {**paired_gap(list(split_by_task(samples, gaps).values())), "sampled": None}
    drawn_samples, drawn_gaps = [], []
    for sample, a, b in zip(samples, after_drawn, before_drawn):
        if a and b:
            drawn_samples.append(sample)
            drawn_gaps.append(_share_correct(a, sample, box_format)
                              - _share_correct(b, sample, box_format))
    if drawn_samples:
        gap = paired_gap(list(split_by_task(drawn_samples, np.array(drawn_gaps)).values()))
        difference |= {"sampled": gap["value"], "sampled_ci95": gap["ci95"]}
    return difference


def _share_correct(replies: list[str], sample: Sample, box_format: BoxFormat) -> float:
    return float(np.mean([reply_is_correct(reply, sample, box_format) for reply in replies]))


def summarize_systems(samples: dict[str, list[Sample]], replies: dict,
                      box_format: BoxFormat) -> dict:
    """system -> suite -> `summarize_suite`; replies: of `engine.systems.suite_replies`."""
    return {system: {suite: summarize_suite(samples[suite], answers["greedy"], answers["drawn"],
                                            box_format)
                     for suite, answers in by_suite.items()}
            for system, by_suite in replies.items()}


def compare_systems(samples: dict[str, list[Sample]], replies: dict,
                    pairs: list[tuple[str, str]], box_format: BoxFormat) -> dict:
    """"after-before" -> suite -> `paired_difference`, for every (after, before) pair of systems."""
    deltas = {}
    for after, before in pairs:
        deltas[f"{after}-{before}"] = {
            suite: paired_difference(
                samples[suite], replies[after][suite]["greedy"], replies[before][suite]["greedy"],
                replies[after][suite]["drawn"], replies[before][suite]["drawn"], box_format)
            for suite in samples}
    return deltas
