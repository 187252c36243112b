"""The table of a result, and what is read from it: scores, intervals, paired differences.

A row is one reply: its model (or protocol), suite, task, question and kind, and what it is worth.
`part` names what counts alike in a suite's mean: the task, nothing where all questions do. `list`
numbers the question's images: intervals resample questions about the same images together.
"""

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from mig_kit import stats
from mig_kit.boxes import BoxFormat
from mig_kit.common import UserError
from mig_kit.image_files import image_digests
from mig_kit.prompts import Answer, read_reply
from mig_kit.rewards import is_correct, names_image, reply_iou
from mig_kit.sample import Sample
from mig_kit.stats import to_percent
from mig_kit.world.claims import count_claims
from mig_kit.world.suites import OWN

FILE = "items.csv"
QUESTION = ["suite", "task", "part", "list", "id"]  # columns that tell a question
TEXTS = ("model", "protocol", "suite", "task", "part", "id", "kind", "reply")


def score_answer(answer: Answer, sample: Sample) -> dict[str, float | None]:
    """What one answer is worth.

    Returns: {"correct", "iou", "image": whether the image is correct, "format", "read": whether it
        names a box, a letter or that there is none} of 0..1, and {"true", "judged"}, claims of the
        reasoning (None without a scene). In multiple choice, and without a target, iou and image
        repeat correct.
    """
    correct = float(is_correct(answer, sample))
    claims = count_claims(answer, sample) if sample.spec else None
    asks_for_box = bool(sample.targets) and not sample.options
    is_none = not sample.targets and not sample.options
    return {"correct": correct,
            "iou": reply_iou(answer, sample) if asks_for_box else correct,
            "image": float(names_image(answer, sample)) if asks_for_box else correct,
            "format": max(float(answer.well_formed), correct * is_none),
            "read": float(answer.states(sample.options) or answer.names_none),
            "true": claims and claims.true, "judged": claims and claims.judged}


def score_part(sample: Sample) -> str:
    """What counts alike in a suite's mean: its task, of own data every question."""
    return "" if sample.suite == OWN else sample.task


def number_image_lists(samples: Sequence[Sample]) -> np.ndarray:
    """(samples,) a number for the images that each shows: the same where they are the same."""
    return stats.number_alike(image_digests(sample.images) for sample in samples)


def make_items(samples: Mapping[str, Sequence[Sample]], replies: Mapping[str, Mapping],
               box_format: BoxFormat, by: str = "model") -> pd.DataFrame:
    """The table of all replies.

    Args:
        samples: suite -> its questions.
        replies: model -> suite -> {"greedy", "drawn"} of `reply_files.suite_replies`.
        by: what the keys of `replies` are called in the table.
    """
    lists, rows = {suite: number_image_lists(part) for suite, part in samples.items()}, []
    for name, by_suite in replies.items():
        for suite, part in samples.items():
            answers = by_suite[suite]
            for sample, number, greedy, drawn in zip(part, lists[suite], answers["greedy"],
                                                     answers["drawn"], strict=True):
                question = {by: name, "suite": suite, "task": sample.task,
                            "part": score_part(sample), "list": number, "id": sample.id}
                rows += [{**question, "kind": kind, "draw": draw, "reply": _digest(reply),
                          **score_answer(read_reply(reply, sample, box_format), sample)}
                         for kind, texts in (("greedy", [greedy]), ("drawn", drawn))
                         for draw, reply in enumerate(texts)]
    return pd.DataFrame(rows)


def _digest(reply: str) -> str:
    return hashlib.sha256(reply.encode("utf-8", "surrogatepass")).hexdigest()[:12]


def write_items(items: pd.DataFrame, folder: Path) -> None:
    """Write the table beside a result."""
    items.to_csv(folder / FILE, index=False)


def read_items(folder: Path) -> pd.DataFrame:
    """The table beside a result; UserError where there is none."""
    if not (folder / FILE).is_file():
        raise UserError(f"{folder} holds no {FILE}; make it again: a run's with mig-kit run 06 "
                        "--force, another by finishing its mig-kit eval")
    return pd.read_csv(folder / FILE, dtype=dict.fromkeys(TEXTS, str), keep_default_na=False,
                       na_values={"true": "", "judged": ""}, float_precision="round_trip")


def pick(items: pd.DataFrame, **values: str) -> pd.DataFrame:
    """The rows whose columns have these values."""
    return items[np.logical_and.reduce([items[name] == value for name, value in values.items()])]


def spread(items: pd.DataFrame) -> pd.DataFrame:
    """A row per question, in order, and a column per model: its share of correct draws, or NaN."""
    return items.pivot_table("correct", QUESTION, "model", sort=False)


def to_groups(values: pd.Series) -> stats.Groups:
    """(values, lists) of each part, as intervals take them; values: indexed by part and list."""
    return [(part.to_numpy(float), part.index.get_level_values("list").to_numpy())
            for _, part in values.groupby(level="part", sort=False)]


def macro_percent(values: pd.Series) -> float:
    """The mean over parts, percent; values: indexed by part."""
    return to_percent(values.groupby(level="part", sort=False).mean().mean())


def score_with_interval(values: pd.Series) -> dict:
    """{"score", "ci95"} of shares, percent; values: indexed by part and list."""
    return {"score": macro_percent(values),
            "ci95": [*map(to_percent, stats.share_interval_by_list(to_groups(values)))]}


def paired_gap(items: pd.DataFrame, after: str, before: str) -> dict | None:
    """{"value", "ci95"} in points of the questions that both answered, None without any."""
    wide = spread(items)
    if not {after, before} <= {*wide} or not len(wide := wide.dropna(subset=[after, before])):
        return None
    return stats.paired_gap_by_list(to_groups(wide[after] - wide[before]))


def paired_difference(items: pd.DataFrame, after: str, before: str) -> dict:
    """{"value", "ci95"} of greedy and {"sampled", "sampled_ci95"} of drawn replies, in points.

    Without doubt 0 where both models gave the same replies. items: of one suite.
    """
    gaps = []
    for kind in ("greedy", "drawn"):
        part = pick(items, kind=kind)
        gap = paired_gap(part, after, before)
        if gap and np.array_equal(*(pick(part, model=name)["reply"] for name in (after, before))):
            gap["ci95"] = [0.0, 0.0]
        gaps.append(gap)
    greedy, drawn = gaps
    sampled = {"sampled": drawn["value"], "sampled_ci95": drawn["ci95"]} if drawn else {
        "sampled": None}
    return greedy | sampled


def summarize_suite(items: pd.DataFrame) -> dict:
    """One model's scores on one suite, in percent.

    Returns: {"n", "score", "ci95", "format", "image", "tasks"} of the greedy replies; {"n_sampled",
        "sampled", "pass_at_k"} of those drawn, where sampled is None if no question has any;
        "reasoning" for drawn scenes.
    """
    greedy, drawn = (pick(items, kind=kind).set_index(QUESTION) for kind in ("greedy", "drawn"))
    summary = {"n": len(greedy), **score_with_interval(greedy["correct"]),
               "format": macro_percent(greedy["format"]), "image": macro_percent(greedy["image"]),
               "sampled": None, "n_sampled": 0,
               "tasks": {task: _summarize_task(part)
                         for task, part in greedy.groupby(level="task", sort=False)}}
    if len(drawn):
        summary |= _summarize_draws(drawn["correct"])
    if greedy["judged"].notna().all():
        summary["reasoning"] = summarize_reasoning(greedy)
    return summary


def _summarize_task(greedy: pd.DataFrame) -> dict:
    """Greedy scores of one task, percent."""
    means = {"mean_iou": greedy["iou"], "format": greedy["format"], "image": greedy["image"]}
    means |= {f"acc@{threshold}": greedy["iou"] >= threshold for threshold in (0.3, 0.5, 0.7)}
    return {"n": len(greedy), **{name: to_percent(values.mean()) for name, values in means.items()},
            "ci95": score_with_interval(greedy["correct"])["ci95"]}


def _summarize_draws(correct: pd.Series) -> dict:
    """{"n_sampled", "sampled", "pass_at_k": {k: percent}}; every question has as many draws."""
    by_question = correct.groupby(level=QUESTION, sort=False)
    counts, total = by_question.sum().astype(int), int(by_question.size().iloc[0])
    chances = {k: [stats.pass_at_k(count, total, k) for count in counts]
               for k in (1, 2, 4, 8) if k <= total}
    return {"n_sampled": len(counts), "sampled": macro_percent(counts / total),
            "pass_at_k": {str(k): macro_percent(pd.Series(values, counts.index))
                          for k, values in chances.items()}}


def summarize_reasoning(greedy: pd.DataFrame) -> dict:
    """How true the reasoning about drawn samples is, in percent, with NAME_ci95 of each figure.

    Returns:
        claims: number of claims that can be judged.
        truth: share of these that are true.
        grounded, silent, false: shares of the correct replies that make a claim and no false one,
            no claim, and a false claim; together 100.
        Figures without a case are None.
    """
    true, judged, correct = (greedy[name].to_numpy(float) for name in ("true", "judged", "correct"))
    summary = {"claims": int(judged.sum())}
    is_silent, is_false = judged == 0, true < judged
    for name, (part, total) in {
            "truth": (true, judged), "grounded": (correct * ~(is_silent | is_false), correct),
            "silent": (correct * is_silent, correct),
            "false": (correct * is_false, correct)}.items():
        summary |= {name: None, f"{name}_ci95": None}
        if total.any():
            summary |= {name: to_percent(part.sum() / total.sum()),
                        f"{name}_ci95": [*map(to_percent, stats.ratio_interval(part, total))]}
    return summary


def summarize_all(items: pd.DataFrame, by: str = "model") -> dict:
    """Model (or protocol) -> suite -> `summarize_suite`."""
    return {name: {suite: summarize_suite(part)
                   for suite, part in of_name.groupby("suite", sort=False)}
            for name, of_name in items.groupby(by, sort=False)}


def compare_all(items: pd.DataFrame, pairs: Sequence[tuple[str, str]]) -> dict:
    """"after-before" -> suite -> `paired_difference`, for every (after, before) pair of models."""
    return {f"{after}-{before}": {suite: paired_difference(part, after, before)
                                  for suite, part in items.groupby("suite", sort=False)}
            for after, before in pairs}
