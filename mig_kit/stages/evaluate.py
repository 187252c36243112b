"""Stage 06: base, SFT and GRPO models on all suites, greedy and sampled, with intervals.

A reply is right if its one box reaches IoU 0.5 in the right image; naming several boxes counts as naming none. A suite's
score is the unweighted mean over its tasks (MIG-Bench's AVG). Intervals: percentile bootstrap over the samples of each
task (2,000 resamples, stratified); differences are paired by sample.
"""

from collections import Counter, defaultdict

import numpy as np

from mig_kit.boxes import BoxFormat
from mig_kit.prompts import parse_reply
from mig_kit.rewards import box_reward, image_reward, is_correct
from mig_kit.sample import Sample
from mig_kit.stats import bootstrap_interval, macro_mean, pass_at_k, to_percent


def score_reply(reply: str, sample: Sample, box_format: BoxFormat) -> dict[str, float]:
    """IoU, right or not, image right or not, and well-formed or not of one reply (0..1 each)."""
    if sample.options:
        right = float(is_correct(reply, sample, box_format))
        return {"iou": right, "right": right, "image": right, "format": float(parse_reply(reply).well_formed)}
    if not sample.targets:  # nothing to find: right is to name no box
        right = float(parse_reply(reply).names_none)
        return {"iou": right, "right": right, "image": right, "format": max(right, float(parse_reply(reply).well_formed))}
    overlap = box_reward(reply, sample, box_format, floor=0.0)
    return {"iou": overlap, "right": float(overlap >= 0.5), "image": image_reward(reply, sample),
            "format": float(parse_reply(reply).well_formed)}


def first_per_task(samples: list[Sample], per_task: int) -> list[Sample]:
    """The first `per_task` samples of every task, in order; all for 0."""
    seen: Counter = Counter()
    kept = []
    for sample in samples:
        seen[sample.task] += 1
        if not per_task or seen[sample.task] <= per_task:
            kept.append(sample)
    return kept


def split_by_task(samples: list[Sample], values: np.ndarray) -> dict[str, np.ndarray]:
    """values (samples, ...) split by task, in order of appearance."""
    rows = defaultdict(list)
    for index, sample in enumerate(samples):
        rows[sample.task].append(index)
    return {task: values[index] for task, index in rows.items()}


def summarize_suite(samples: list[Sample], greedy: list[str], drawn: list[list[str]], box_format: BoxFormat) -> dict:
    """One system on one suite: n, score and ci95 (greedy, percent), sampled (mean at T 1), pass@8, and every task.

    drawn: (samples, replies) at T 1; samples with none are left out of sampled and pass@k, which are None if all are.
    """
    scores = [score_reply(reply, sample, box_format) for reply, sample in zip(greedy, samples, strict=True)]
    right = np.array([s["right"] for s in scores])
    overlap = np.array([s["iou"] for s in scores])
    asked = [i for i, replies in enumerate(drawn) if replies]
    many = split_by_task([samples[i] for i in asked], np.array([[reply_is_correct(r, samples[i], box_format) for r in drawn[i]] for i in asked]))
    tasks = {}
    for task, rows in split_by_task(samples, np.arange(len(samples))).items():
        tasks[task] = {
            "n": len(rows), **{f"acc@{t}": to_percent((overlap[rows] >= t).mean()) for t in (0.3, 0.5, 0.7)},
            "mean_iou": to_percent(overlap[rows].mean()), "ci95": [to_percent(v) for v in bootstrap_interval([right[rows]])],
            "format": to_percent(np.mean([scores[i]["format"] for i in rows])),
            "image": to_percent(np.mean([scores[i]["image"] for i in rows]))}
        if task in many:
            tasks[task]["sampled"] = to_percent(many[task].mean())
            tasks[task][f"pass@{many[task].shape[1]}"] = to_percent((many[task].sum(1) > 0).mean())
    groups = list(split_by_task(samples, right).values())
    result = {"n": len(samples), "score": to_percent(macro_mean(groups)), "ci95": [to_percent(v) for v in bootstrap_interval(groups)],
              "sampled": None, "n_sampled": len(asked), "tasks": tasks}
    if many:
        result["sampled"] = to_percent(macro_mean([rows.mean(1) for rows in many.values()]))
        result["pass_at_k"] = {str(k): to_percent(macro_mean([np.array([pass_at_k(int(r.sum()), len(r), k) for r in rows])
                                                      for rows in many.values()]))
                               for k in (1, 2, 4, 8) if k <= len(drawn[asked[0]])}
    for name in ("format", "image"):
        result[name] = to_percent(macro_mean(list(split_by_task(samples, np.array([s[name] for s in scores])).values())))
    return result


def reply_is_correct(reply: str, sample: Sample, box_format: BoxFormat) -> float:
    """1.0 if the reply is right."""
    return score_reply(reply, sample, box_format)["right"]


def paired_difference(samples: list[Sample], after: list[str], before: list[str], after_drawn: list[list[str]],
          before_drawn: list[list[str]], box_format: BoxFormat) -> dict:
    """Paired difference of two systems in points: value and ci95 (greedy), sampled and sampled_ci95 (mean at T 1).

    Samples without drawn replies of either system are left out of the latter two.
    """
    gap = np.array([reply_is_correct(a, s, box_format) - reply_is_correct(b, s, box_format) for a, b, s in zip(after, before, samples)])
    groups = list(split_by_task(samples, gap).values())
    result = {"value": to_percent(macro_mean(groups)), "ci95": [to_percent(v) for v in bootstrap_interval(groups)], "sampled": None}
    asked = [i for i, (a, b) in enumerate(zip(after_drawn, before_drawn)) if a and b]
    if asked:
        means = [np.mean([reply_is_correct(r, samples[i], box_format) for r in after_drawn[i]])
                 - np.mean([reply_is_correct(r, samples[i], box_format) for r in before_drawn[i]]) for i in asked]
        groups = list(split_by_task([samples[i] for i in asked], np.array(means)).values())
        result |= {"sampled": to_percent(macro_mean(groups)), "sampled_ci95": [to_percent(v) for v in bootstrap_interval(groups)]}
    return result


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
