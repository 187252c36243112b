"""Rule-based rewards: format, image index, box, choice. Plain functions of one reply and one sample, each in 0..1.

The paper names the three rewards but publishes no formula. The form is MG-Thinker's nearest published one: the format
counts correctly paired tags, the image index is 0 or 1 and gates the box term. Our choice: the box term is the IoU itself
from `floor` up (theirs steps to 1 at IoU 0.9), because an unclipped IoU says more about a small box.
"""

import re

from mig_kit.boxes import QWEN2_5, BoxFormat, to_original_box
from mig_kit.prompts import parse_reply
from mig_kit.sample import Sample, best_iou

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def format_reward(reply: str, sample: Sample) -> float:
    """0.25 per tag that occurs exactly once, all of it only if the whole reply is well formed; else at most 0.75."""
    paired = sum(reply.count(tag) == 1 for tag in TAGS) / len(TAGS)
    return 1.0 if parse_reply(reply).well_formed else min(paired, 0.75)


def image_reward(reply: str, sample: Sample) -> float:
    """1 if the reply names an image that holds a target."""
    return float(parse_reply(reply).image in {number for number, _ in sample.targets})


def box_reward(reply: str, sample: Sample, floor: float = 0.1, box_format: BoxFormat = QWEN2_5) -> float:
    """IoU with the target in the named image, 0 below `floor` or in the wrong image.

    pixels: (min_pixels, max_pixels) of the processor; the reply's box is in pixels of the resized image.
    """
    read = parse_reply(reply)
    if read.box is None or read.image is None or not 1 <= read.image <= len(sample.images):
        return 0.0
    value = best_iou(sample, read.image, to_original_box(read.box, sample.sizes[read.image - 1], box_format))
    return value if value >= floor else 0.0


def choice_reward(reply: str, sample: Sample) -> float:
    """1 if the reply to a multiple-choice sample gives the right letter."""
    return float(bool(sample.letter) and parse_reply(reply).letter == sample.letter)


def cites_only_existing_images(reply: str, sample: Sample) -> bool:
    """Whether every "image k" in the reasoning is an image of the prompt; a model may list images that are not there."""
    return all(1 <= int(number) <= len(sample.images) for number in re.findall(r"\bimage (\d{1,3})\b", parse_reply(reply).thinking, re.I))


def is_correct(reply: str, sample: Sample, threshold: float = 0.5, box_format: BoxFormat = QWEN2_5) -> bool:
    """Right image and IoU >= threshold; for a multiple-choice sample, the right letter."""
    if sample.options:
        return choice_reward(reply, sample) == 1
    return box_reward(reply, sample, 0.0, box_format) >= threshold
