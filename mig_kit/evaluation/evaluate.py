"""Stage 06: the questions of all suites, and who is compared; `items` judges the replies.

A reply is correct if its one box reaches IoU 0.5 in the correct image, or by its letter, or if it
says rightly that there is none (`rewards.is_correct`). A suite's score is the
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
from mig_kit.evaluation.items import number_image_lists, score_part
from mig_kit.image_files import image_digests
from mig_kit.pipeline.runs import Run
from mig_kit.pipeline.stage_params import START_WORDS
from mig_kit.prompts import read_reply
from mig_kit.sample import Sample, TableRows, read_samples
from mig_kit.score import calibration
from mig_kit.world import suites

PAIRS = (("grpo", "sft"), ("grpo", "start"), ("grpo", "base"), ("sft", "base"))


def load_test_samples(run_id: str, params: Mapping) -> dict[str, Sequence[Sample]]:
    """Suite -> scored samples: held-out own data, then synthetic suites; params: of 06."""
    samples: dict[str, Sequence[Sample]] = {}
    run = Run(run_id)
    if run.data != "scenes":
        samples[suites.OWN] = read_samples(run.stage_folder("01_synthesize") / "val.parquet")
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


def first_per_task(samples: Sequence[Sample], per_task: int) -> Sequence[Sample]:
    """The first `per_task` samples of every task, in order; all for 0."""
    if not per_task:
        return samples
    rows = stats.first_rows([sample.task for sample in samples], per_task)
    if isinstance(samples, TableRows):
        return samples.select(rows)
    return [samples[row] for row in rows]


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
    parts = stats.group_by_task(map(score_part, asked), np.arange(len(asked)))
    return calibration.measure_refit(np.array(boxes), np.array(answers), number_image_lists(asked),
                                     [*parts.values()])
