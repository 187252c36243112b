"""Stage 06: base, SFT and GRPO models on all suites, greedy and sampled, with intervals.

A reply is correct if its one box reaches IoU 0.5 in the correct image. A suite's score is the
unweighted mean over its tasks (MIG-Bench's AVG), that of own data the mean over its questions.
Intervals are by list of images (`stats`).
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mig_kit import stats
from mig_kit.boxes import BoxFormat, iou
from mig_kit.common import UserError, model_folder
from mig_kit.image_files import image_digests
from mig_kit.pipeline import run_folders
from mig_kit.pipeline.run_facts import name_data
from mig_kit.pipeline.stage_params import START_WORDS
from mig_kit.prompts import Answer, parse_reply, read_reply
from mig_kit.rewards import is_correct, names_image, reply_iou
from mig_kit.sample import Sample, TableRows, read_samples
from mig_kit.score import calibration
from mig_kit.stats import macro_mean, to_percent
from mig_kit.world import suites
from mig_kit.world.claims import count_claims

PAIRS = (("grpo", "sft"), ("grpo", "start"), ("grpo", "base"), ("sft", "base"))


def load_test_samples(run_id: str, params: Mapping) -> dict[str, Sequence[Sample]]:
    """Suite -> scored samples: held-out own data, then synthetic suites; params: of 06."""
    samples: dict[str, Sequence[Sample]] = {}
    if has_own_data(run_id):
        folder = run_folders.stage_folder("01_synthesize", run_id)
        samples[suites.OWN] = read_samples(folder / "val.parquet")
    return samples | draw_test_samples(params)


def draw_test_samples(params: Mapping) -> dict[str, list[Sample]]:
    """Suite -> its synthetic test samples, if its size in the parameters of 06 is not 0."""
    return {name: suites.make_suite(name, "test", params["suites"][name], params["eval_seed"])
            for name in suites.SUITES if params["suites"].get(name)}


def digest_questions(samples: Mapping[str, Sequence[Sample]]) -> dict[str, str]:
    """Suite -> SHA-256 over all that its questions show and ask, and what answers them."""
    digests = {suite: hashlib.sha256() for suite in samples}
    for suite, part in samples.items():
        for sample in part:
            # False: of 0.4, that not all boxes are asked for; records hold digests with it
            asked = (sample.id, sample.question, sample.targets, sample.reference, sample.options,
                     sample.letter, False, [image.hex() for image in image_digests(sample.images)])
            digests[suite].update(json.dumps(asked, default=float).encode())
    return {suite: digest.hexdigest() for suite, digest in digests.items()}


def has_own_data(run_id: str) -> bool:
    """Whether the run was trained on data of its own, not on drawn scenes."""
    return name_data(run_id) != "scenes"


def find_rl_start(start_from: str) -> Path | None:
    """The folder that 05 started from, None for a run's model; UserError if it is gone."""
    if start_from in START_WORDS:
        return None
    if not model_folder(start_from).is_dir():
        raise UserError(f"RL started from {start_from}, which is gone, and 06 compares "
                        "with it; bring it back, or run 05 again from another model")
    from mig_kit.models.loading import resolve_model  # seconds, which tables need not wait for

    return resolve_model(start_from)


def list_pairs(systems: Mapping) -> list[tuple[str, str]]:
    """The (after, before) pairs of PAIRS whose systems were both evaluated."""
    return [pair for pair in PAIRS if set(pair) <= set(systems)]


def score_answer(answer: Answer, sample: Sample) -> dict[str, float]:
    """{"iou", "correct", "image", "format"} of one reply, 0..1 each.

    image: whether the image is correct. In multiple choice, and without a target, iou and image
    repeat correct.
    """
    correct, well_formed = float(is_correct(answer, sample)), float(answer.well_formed)
    if sample.options or not sample.targets:
        return {"iou": correct, "correct": correct, "image": correct,
                "format": well_formed if sample.options else max(correct, well_formed)}
    return {"iou": reply_iou(answer, sample), "correct": correct,
            "image": float(names_image(answer, sample)), "format": well_formed}


def reply_is_correct(reply: str, sample: Sample, box_format: BoxFormat) -> float:
    """1.0 if the reply is correct."""
    return float(is_correct(read_reply(reply, sample, box_format), sample))


def first_per_task(samples: Sequence[Sample], per_task: int) -> Sequence[Sample]:
    """The first `per_task` samples of every task, in order; all for 0."""
    if not per_task:
        return samples
    by_task = stats.group_by_task((sample.task for sample in samples), np.arange(len(samples)))
    rows = sorted(row for rows in by_task.values() for row in rows[:per_task].tolist())
    if isinstance(samples, TableRows):
        return samples.select(rows)
    return [samples[row] for row in rows]


def score_parts(samples: Sequence[Sample]) -> list[str]:
    """(samples,) names of the parts whose means count alike: the task, "" for all of own data."""
    return ["" if sample.suite == suites.OWN else sample.task for sample in samples]


def split_for_score(samples: Sequence[Sample], values: np.ndarray) -> list[np.ndarray]:
    """values (samples, ...) of each of `score_parts`, in order of appearance."""
    return list(stats.group_by_task(score_parts(samples), values).values())


def number_image_lists(samples: Sequence[Sample]) -> np.ndarray:
    """(samples,) a number for the images that each shows: the same where they are the same."""
    numbers: dict[tuple[bytes, ...], int] = {}
    return np.array([numbers.setdefault(image_digests(sample.images), len(numbers))
                     for sample in samples])


def summarize_suite(samples: list[Sample], greedy: list[str], drawn: list[list[str]],
                    box_format: BoxFormat) -> dict:
    """One system's scores on one suite, in percent.

    Args:
        greedy: a reply to each sample.
        drawn: replies at temperature 1 to each sample, which may have none.
    Returns: {"n", "score", "ci95", "format", "image", "tasks"} of the greedy replies; {"n_sampled",
        "sampled", "pass_at_k"} of those drawn, where sampled is None if no sample has any;
        "reasoning" for drawn scenes.
    """
    scores = [score_answer(read_reply(reply, sample, box_format), sample)
              for reply, sample in zip(greedy, samples, strict=True)]
    columns = {name: np.array([score[name] for score in scores])
               for name in ("iou", "correct", "format", "image")}
    columns["lists"] = number_image_lists(samples)
    with_drawn = [(sample, some) for sample, some in zip(samples, drawn) if some]
    drawn_samples = [sample for sample, _ in with_drawn]
    drawn_values = np.array([[reply_is_correct(reply, sample, box_format) for reply in some]
                             for sample, some in with_drawn])
    by_task = stats.group_by_task((sample.task for sample in samples), np.arange(len(samples)))
    tasks = {task: _summarize_task({name: values[rows] for name, values in columns.items()})
             for task, rows in by_task.items()}
    groups = list(zip(*(split_for_score(samples, columns[name]) for name in ("correct", "lists"))))
    summary = {"n": len(samples), "score": to_percent(macro_mean([part for part, _ in groups])),
               "ci95": list(map(to_percent, stats.share_interval_by_list(groups))),
               "sampled": None, "n_sampled": len(drawn_samples), "tasks": tasks}
    if drawn_samples:
        summary |= _sampled_averages(split_for_score(drawn_samples, drawn_values))
    for name in ("format", "image"):
        summary[name] = to_percent(macro_mean(split_for_score(samples, columns[name])))
    if all(sample.spec for sample in samples):
        summary["reasoning"] = summarize_reasoning(samples, greedy, box_format)
    return summary


def summarize_reasoning(samples: list[Sample], replies: list[str], box_format: BoxFormat) -> dict:
    """How true the reasoning about drawn samples is, in percent, with NAME_ci95 of each figure.

    Returns:
        claims: number of claims that can be judged.
        truth: share of these that are true.
        grounded: share of the correct replies that make a claim, and no false one.
        Figures without a case are None.
    """
    counts = [count_claims(parse_reply(reply), sample)
              for reply, sample in zip(replies, samples)]
    n_true, judged = np.array([(count.true, count.judged) for count in counts], dtype=float).T
    correct = np.array([reply_is_correct(reply, sample, box_format)
                        for reply, sample in zip(replies, samples)])
    summary = {"claims": int(judged.sum())}
    for name, (part, total) in {
            "truth": (n_true, judged),
            "grounded": (correct * (judged > 0) * (n_true == judged), correct)}.items():
        summary |= {name: None, f"{name}_ci95": None}
        if total.any():
            summary |= {name: to_percent(part.sum() / total.sum()),
                        f"{name}_ci95": list(map(to_percent, stats.ratio_interval(part, total)))}
    return summary


def _summarize_task(columns: dict[str, np.ndarray]) -> dict:
    """Greedy scores of one task in percent; columns: of `score_answer`, and the lists of images."""
    overlap = columns["iou"]
    accuracies = {f"acc@{t}": to_percent((overlap >= t).mean()) for t in (0.3, 0.5, 0.7)}
    return {"n": len(overlap), **accuracies, "mean_iou": to_percent(overlap.mean()),
            "ci95": list(map(to_percent, stats.share_interval_by_list(
                [(columns["correct"], columns["lists"])]))),
            "format": to_percent(columns["format"].mean()),
            "image": to_percent(columns["image"].mean())}


def _sampled_averages(groups: list[np.ndarray]) -> dict:
    """{"sampled", "pass_at_k": {k: percent}}; groups: (samples, replies) of each task, 0 or 1."""
    total = groups[0].shape[1]
    chances = {k: [np.array([stats.pass_at_k(int(count), total, k) for count in rows.sum(1)])
                   for rows in groups] for k in (1, 2, 4, 8) if k <= total}
    return {"sampled": to_percent(macro_mean([rows.mean(1) for rows in groups])),
            "pass_at_k": {str(k): to_percent(macro_mean(parts)) for k, parts in chances.items()}}


def paired_difference(samples: list[Sample], after: dict, before: dict,
                      box_format: BoxFormat) -> dict:
    """Paired difference of two systems in points: value, ci95 (greedy), sampled, sampled_ci95.

    Samples without drawn replies of either system are left out of the sampled figures.

    after, before: their {"greedy", "drawn"} in `reply_files.suite_replies`.
    """
    def gap(rows: Sequence[int], after: list[list[str]], before: list[list[str]]) -> dict:
        part = [samples[row] for row in rows]
        gaps = np.subtract(*([np.mean([reply_is_correct(reply, sample, box_format)
                                       for reply in replies[row]])
                              for row, sample in zip(rows, part)] for replies in (after, before)))
        groups = zip(*(split_for_score(part, values)
                       for values in (gaps, number_image_lists(part))))
        return stats.paired_gap_by_list(list(groups), after == before)

    greedy = ([[reply] for reply in replies["greedy"]] for replies in (after, before))
    difference = gap(range(len(samples)), *greedy) | {"sampled": None}
    drawn = after["drawn"], before["drawn"]
    if rows := [row for row, both in enumerate(zip(*drawn)) if all(both)]:
        sampled = gap(rows, *drawn)
        difference |= {"sampled": sampled["value"], "sampled_ci95": sampled["ci95"]}
    return difference


def summarize_systems(samples: dict[str, list[Sample]], replies: dict,
                      box_format: BoxFormat) -> dict:
    """system -> suite -> `summarize_suite`; replies: of `reply_files.suite_replies`."""
    return {system: {suite: summarize_suite(samples[suite], answers["greedy"], answers["drawn"],
                                            box_format)
                     for suite, answers in by_suite.items()}
            for system, by_suite in replies.items()}


def compare_systems(samples: dict[str, list[Sample]], replies: dict,
                    pairs: list[tuple[str, str]], box_format: BoxFormat) -> dict:
    """"after-before" -> suite -> `paired_difference`, for every (after, before) pair of systems."""
    return {f"{after}-{before}": {
        suite: paired_difference(part, replies[after][suite], replies[before][suite], box_format)
        for suite, part in samples.items()} for after, before in pairs}


def calibrate_systems(samples: dict[str, list[Sample]], replies: dict,
                      box_format: BoxFormat) -> dict:
    """system -> suite -> `calibration.measure_refit`, of the questions for one box."""
    with_boxes = [suite for suite, part in samples.items() if any(map(_asks_for_one_box, part))]
    return {system: {suite: calibrate_boxes(samples[suite], by_suite[suite]["greedy"], box_format)
                     for suite in with_boxes} for system, by_suite in replies.items()}


def _asks_for_one_box(sample: Sample) -> bool:
    return bool(sample.targets) and not sample.options


def calibrate_boxes(samples: list[Sample], greedy: list[str], box_format: BoxFormat) -> dict:
    """What comes back of one system's boxes if a line for each edge is fitted on other images.

    Shares of the image that holds the target; a box in another image stays wrong.
    """
    pairs = [(sample, reply) for sample, reply in zip(samples, greedy, strict=True)
             if _asks_for_one_box(sample)]
    asked, boxes, answers = [sample for sample, _ in pairs], [], []
    for sample, reply in pairs:
        answer = read_reply(reply, sample, box_format)
        image, box = (answer.image, answer.box) if answer.box else (None, None)
        target = max(sample.targets, key=lambda target: (
            target.image == image, box is not None and iou(box, target.box)))
        sides = sample.sizes[target.image - 1] * 2
        boxes.append(np.divide(box, sides) if image == target.image else [np.nan] * 4)
        answers.append(np.divide(target.box, sides))
    return calibration.measure_refit(np.array(boxes), np.array(answers), number_image_lists(asked),
                                     split_for_score(asked, np.arange(len(asked))))
