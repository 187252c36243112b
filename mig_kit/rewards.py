"""Rule-based rewards: format, image, box and choice.

A reward is a function of a reply, its sample and the model's box format; it returns a number, or
None if it does not apply to the sample. Parameter `rewards` of 05 also takes a function from your
own file: "my_rewards.py:center". The paper publishes no formula; the form is MG-Thinker's.
"""

import re
from bisect import bisect_left
from collections.abc import Callable

import numpy as np

from mig_kit.boxes import Box, BoxFormat, iou, matched_sum, to_original_box
from mig_kit.prompts import is_well_formed, parse_boxes, parse_reply, reply_boxes_in_original
from mig_kit.sample import Sample

Reward = Callable[[str, Sample, BoxFormat], float | None]
PairScore = Callable[[Box, Box], float]  # of a box and a target, pixels of the same image
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
# Ours: what a correct "none" earns in the image term and in every box term; a wrong one earns 0.
# At the default weights, with two images and a third of the questions without a box, always saying
# "none" earns 0.28 on average, and guessing an image with a box that misses 0.30. With more than
# three images "none" would earn more than guessing: lower RIGHT_NONE there.
RIGHT_NONE = 0.5


def match_score(reply: str, sample: Sample, box_format: BoxFormat, score: PairScore = iou,
                right_none: float = 1.0) -> float:
    """How well a reply's boxes meet the targets of a question for all boxes, 0..1.

    Args:
        score: how well a box meets a target of the same image; other pairs count 0.
        right_none: what a reply that names no box gets if there is no target.
    Returns: the largest sum of scores over one-to-one pairs, divided by the larger number of boxes
    or targets, as in VisionReasoner (arXiv 2505.12081); 0 for an answer that cannot be read.
    """
    boxes = parse_boxes(reply)
    if boxes is None:
        return 0.0
    if not boxes or not sample.targets:
        return 0.0 if boxes or sample.targets else right_none
    scores = _pair_scores(list(dict.fromkeys(boxes)), sample, box_format, score)
    return matched_sum(scores) / max(len(boxes), len(sample.targets))


def _pair_scores(boxes: list[tuple[int, Box]], sample: Sample, box_format: BoxFormat,
                 score: PairScore = iou) -> np.ndarray:
    """(boxes, targets) float: the score of every pair, 0 if they lie in different images."""
    return np.array([
        [score(to_original_box(box, sample.sizes[target.image - 1], box_format), target.box)
         if image == target.image else 0.0 for target in sample.targets] for image, box in boxes])


def reply_iou(reply: str, sample: Sample, box_format: BoxFormat) -> float:
    """IoU of the reply's box with the target in the image that it names, else 0.

    For a question for all boxes it is `match_score`.
    """
    if sample.find_all:
        return match_score(reply, sample, box_format)
    return max((iou(box, target.box)
                for image, box in reply_boxes_in_original(sample, reply, box_format)
                for target in sample.targets if target.image == image), default=0.0)


def weakest_iou(reply: str, sample: Sample, box_format: BoxFormat) -> float:
    """The lowest IoU of the pairing of boxes and targets whose lowest IoU is highest.

    0 unless a reply has as many boxes as there are targets; 1 for a correct "none". For a question
    for one box it is `reply_iou`.
    """
    if not sample.find_all:
        return reply_iou(reply, sample, box_format)
    boxes = parse_boxes(reply)
    if boxes is None or len(set(boxes)) != len(boxes) or len(boxes) != len(sample.targets):
        return 0.0
    if not boxes:
        return 1.0
    overlaps = _pair_scores(boxes, sample, box_format)
    values = np.unique(overlaps)  # every pairing reaches the first of them
    n_reached = bisect_left(values, True, key=lambda value: (
        matched_sum(overlaps >= value) < len(boxes)))
    return float(values[n_reached - 1])


def image_set_iou(reply: str, sample: Sample) -> float:
    """1 if the reply names an image with a target, else 0.

    For a question for all boxes: images named that hold targets, over images named or holding
    targets; 1 for a correct "none".
    """
    wanted = {target.image for target in sample.targets}
    if not sample.find_all:
        return float(parse_reply(reply).image in wanted)
    boxes = parse_boxes(reply)
    if boxes is None:
        return 0.0
    named = {image for image, _ in boxes}
    return len(named & wanted) / len(named | wanted) if named | wanted else 1.0


def names_letter(reply: str, sample: Sample) -> bool:
    """Whether the reply to a multiple-choice sample gives the correct letter."""
    return bool(sample.letter) and parse_reply(reply).letter == sample.letter


def format_reward(reply: str, sample: Sample, box_format: BoxFormat) -> float:
    """1 if the reply is well formed, else 0.25 per tag that occurs exactly once, at most 0.75.

    0 for a "none" to a question for all boxes that has a target.
    """
    if sample.find_all and sample.targets and parse_boxes(reply) == []:
        return 0.0
    paired = sum(reply.count(tag) == 1 for tag in TAGS) / len(TAGS)
    return 1.0 if is_well_formed(reply, sample) else min(paired, 0.75)


def image_reward(reply: str, sample: Sample, box_format: BoxFormat) -> float | None:
    """`image_set_iou`, but RIGHT_NONE for a correct "none"; None for multiple choice."""
    if sample.options:
        return None
    is_none_right = sample.find_all and not sample.targets
    return image_set_iou(reply, sample) * (RIGHT_NONE if is_none_right else 1.0)


def choice_reward(reply: str, sample: Sample, box_format: BoxFormat) -> float | None:
    """1 if the reply gives the correct letter, else 0; None unless it is multiple choice."""
    return float(names_letter(reply, sample)) if sample.options else None


def box_reward(reply: str, sample: Sample, box_format: BoxFormat,
               floor: float = 0.1) -> float | None:
    """`reply_iou`, or 0 below `floor`; None for multiple choice.

    For a question for all boxes it is `match_score` with every pair's IoU cut likewise.
    """
    if sample.options:
        return None
    # The IoU tells good boxes from better ones; MG-Thinker steps to 1 at IoU 0.9.
    if not sample.find_all:
        return _cut_below(reply_iou(reply, sample, box_format), floor)
    return match_score(reply, sample, box_format,
                       lambda box, target: _cut_below(iou(box, target), floor), RIGHT_NONE)


def _cut_below(overlap: float, floor: float) -> float:
    return overlap if overlap >= floor else 0.0


# The name by which `rewards` of 05 chooses a reward, and under which it is logged; it stands in
# reward_names.KIT_REWARDS, too. A reward of 0 means that nothing was earned: warnings rely on it.
REWARDS: dict[str, Reward] = {
    "format": format_reward, "image": image_reward, "box": box_reward, "choice": choice_reward}


def cites_only_existing_images(reply: str, sample: Sample) -> bool:
    """Whether every "image k" in the reasoning is an image of the prompt."""
    cited = re.findall(r"\bimage (\d{1,3})\b", parse_reply(reply).thinking, re.IGNORECASE)
    return all(1 <= int(number) <= len(sample.images) for number in cited)


def is_correct(reply: str, sample: Sample, box_format: BoxFormat, threshold: float = 0.5) -> bool:
    """Whether a reply is correct, by what its sample asks for.

    A box must be in the right image with IoU >= threshold; a letter must be the right one. If all
    boxes are asked for, each must be found with that IoU, and no other; if nothing in the images
    answers, the reply must say so.
    """
    if sample.options:
        return names_letter(reply, sample)
    if not sample.targets and not sample.find_all:
        return parse_reply(reply).names_none
    return weakest_iou(reply, sample, box_format) >= threshold
