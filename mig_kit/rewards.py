"""Rule-based rewards: format, image, box and choice. Each is a plain function of one reply and one
sample, in 0..1.

The paper names the three rewards but publishes no formula. The form is MG-Thinker's, the nearest
published one: the format reward counts correctly paired tags, the image reward is 0 or 1 and gates
the box reward. Our choice: the box reward is the IoU itself from `floor` up (MG-Thinker steps to 1
at IoU 0.9), because the IoU tells good boxes from better ones.
"""

import re

from mig_kit.boxes import BoxFormat
from mig_kit.prompts import parse_reply, reply_box_in_original
from mig_kit.sample import Sample, best_iou

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def format_reward(reply: str, sample: Sample) -> float:
    """1 if the whole reply is well formed; else 0.25 for each tag that occurs exactly once, at most
    0.75.
    """
    paired = sum(reply.count(tag) == 1 for tag in TAGS) / len(TAGS)
    return 1.0 if parse_reply(reply).well_formed else min(paired, 0.75)


def image_reward(reply: str, sample: Sample) -> float:
    """1 if the reply names an image that holds a target, else 0."""
    return float(parse_reply(reply).image in {target.image for target in sample.targets})


def box_reward(reply: str, sample: Sample, box_format: BoxFormat, floor: float = 0.1) -> float:
    """IoU of the reply's box with the target in the image that the reply names; 0 below `floor` or
    in the wrong image.

    box_format: says in which coordinates the reply's box is written.
    """
    answer = parse_reply(reply)
    box = reply_box_in_original(sample, answer, box_format)
    if box is None:
        return 0.0
    overlap = best_iou(sample, answer.image, box)
    return overlap if overlap >= floor else 0.0


def choice_reward(reply: str, sample: Sample) -> float:
    """1 if the reply to a multiple-choice sample gives the correct letter, else 0."""
    return float(bool(sample.letter) and parse_reply(reply).letter == sample.letter)


def cites_only_existing_images(reply: str, sample: Sample) -> bool:
    """Whether every "image k" in the reasoning is an image of the prompt; models cite images that
    do not exist.
    """
    cited = re.findall(r"\bimage (\d{1,3})\b", parse_reply(reply).thinking, re.IGNORECASE)
    return all(1 <= int(number) <= len(sample.images) for number in cited)


def is_correct(reply: str, sample: Sample, box_format: BoxFormat, threshold: float = 0.5) -> bool:
    """Whether the reply names the right image with IoU >= threshold; for a multiple-choice sample,
    the correct letter; where nothing in the images answers, whether it says so.
    """
    if sample.options:
        return choice_reward(reply, sample) == 1
    if not sample.targets:
        return parse_reply(reply).names_none
    return box_reward(reply, sample, box_format, floor=0.0) >= threshold
