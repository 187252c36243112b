"""Rule-based rewards: format, image, box and choice, and other box terms to choose.

A reward is a function of a reply, its sample and the model's box format; it gives a number, or None
where it does not apply to the sample. A function of that form in a file of your own is chosen in
the same way, by the parameter `rewards` of 05: "my_rewards.py:center".

The paper names its rewards but publishes no formula. The form is MG-Thinker's, the nearest
published one: the format reward counts correctly paired tags, the image reward is 0 or 1 and gates
the box reward. Our choice: the box reward is the IoU itself from `floor` up (MG-Thinker steps to 1
at IoU 0.9), because the IoU tells good boxes from better ones.

Of a question for all boxes (`Sample.find_all`) every box term is summed over one-to-one pairs of
boxes and targets that make the sum largest, and divided by the larger of the two numbers, as
VisionReasoner does (arXiv 2505.12081): an order earns nothing, and a box too many costs. A correct
"none" earns RIGHT_NONE in the image term and in every box term; a wrong one earns nothing, not even
for its format. Both are ours. With the default weights, a third of the questions without a box and
two images, always saying "none" earns 0.28, naming a random image with a box that misses 0.30; over
`find_all`'s two or three images the two are level, and with more images "none" earns more: lower
RIGHT_NONE there.
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
RIGHT_NONE = 0.5


def match_score(reply: str, sample: Sample, box_format: BoxFormat, score: PairScore = iou,
                right_none: float = 1.0) -> float:
    """How well the boxes of a reply meet those of a question for all boxes.

    The largest sum of `score` over one-to-one pairs of boxes and targets, divided by the number of
    boxes or of targets, whichever is larger. A box that repeats another, or lies in another image
    than its target, scores 0 and counts. Where there is no target: right_none if the
    reply says so, else 0. An answer that cannot be read scores 0.
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
    """(boxes, targets) float: the score of every pair, 0 for one in different images."""
    return np.array([
        [score(to_original_box(box, sample.sizes[target.image - 1], box_format), target.box)
         if image == target.image else 0.0 for target in sample.targets] for image, box in boxes])


def reply_iou(reply: str, sample: Sample, box_format: BoxFormat) -> float:
    """IoU of the reply's box with the target in the image that the reply names; 0 without a box or
    in the wrong image; of a question for all boxes `match_score`.

    box_format: says in which coordinates the reply's box is written.
    """
    if sample.find_all:
        return match_score(reply, sample, box_format)
    return max((iou(box, target.box)
                for image, box in reply_boxes_in_original(sample, reply, box_format)
                for target in sample.targets if target.image == image), default=0.0)


def weakest_iou(reply: str, sample: Sample, box_format: BoxFormat) -> float:
    """The largest IoU that every pair of a box and a target of a question for all boxes can reach
    at once, each box in its target's image; 0 unless there are as many boxes as targets, and 1 for
    a right "none". Of a question for one box its `reply_iou`.
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
    """1 if the reply names an image that holds a target, else 0. Of a question for all boxes how
    many images the reply names that hold targets, over how many it names or hold targets, and 1 for
    a right "none".
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
    """1 if the whole reply is well formed; else 0.25 for each tag that occurs exactly once, at most
    0.75. 0 for a "none" where all boxes are asked for and there is one.
    """
    if sample.find_all and sample.targets and parse_boxes(reply) == []:
        return 0.0
    paired = sum(reply.count(tag) == 1 for tag in TAGS) / len(TAGS)
    return 1.0 if is_well_formed(reply, sample) else min(paired, 0.75)


def image_reward(reply: str, sample: Sample, box_format: BoxFormat) -> float | None:
    """`image_set_iou`, and RIGHT_NONE for a right "none"; None for multiple choice."""
    if sample.options:
        return None
    is_none_right = sample.find_all and not sample.targets
    return image_set_iou(reply, sample) * (RIGHT_NONE if is_none_right else 1.0)


def choice_reward(reply: str, sample: Sample, box_format: BoxFormat) -> float | None:
    """1 if the reply gives the correct letter, else 0; None but for multiple choice."""
    return float(names_letter(reply, sample)) if sample.options else None


def box_reward(reply: str, sample: Sample, box_format: BoxFormat,
               floor: float = 0.1) -> float | None:
    """`reply_iou`, 0 below `floor`; None for multiple choice. Where all boxes are asked for, that
    of every pair that `match_score` makes.
    """
    if sample.options:
        return None
    if not sample.find_all:
        return _cut_below(reply_iou(reply, sample, box_format), floor)
    return match_score(reply, sample, box_format,
                       lambda box, target: _cut_below(iou(box, target), floor), RIGHT_NONE)


def _cut_below(overlap: float, floor: float) -> float:
    return overlap if overlap >= floor else 0.0


# The name by which `rewards` of 05 chooses a reward, and under which it is logged; it stands in
# joint_rules.KIT_REWARDS, too. A reward of 0 means that nothing was earned: warnings rely on it.
REWARDS: dict[str, Reward] = {
    "format": format_reward, "image": image_reward, "box": box_reward, "choice": choice_reward}


def cites_only_existing_images(reply: str, sample: Sample) -> bool:
    """Whether every "image k" in the reasoning is an image of the prompt; models cite images that
    do not exist.
    """
    cited = re.findall(r"\bimage (\d{1,3})\b", parse_reply(reply).thinking, re.IGNORECASE)
    return all(1 <= int(number) <= len(sample.images) for number in cited)


def is_correct(reply: str, sample: Sample, box_format: BoxFormat, threshold: float = 0.5) -> bool:
    """Whether the reply names the right image with IoU >= threshold; for a multiple-choice sample,
    the correct letter; where nothing in the images answers, whether it says so; where all boxes are
    asked for, whether it finds each with that IoU and names no other.
    """
    if sample.options:
        return names_letter(reply, sample)
    if not sample.targets and not sample.find_all:
        return parse_reply(reply).names_none
    return weakest_iou(reply, sample, box_format) >= threshold
