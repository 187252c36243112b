"""Rule-based rewards: format, image, box and choice.

A reward is a function of a reply, its sample and the model's box format; it returns a number, or
None if it does not apply to the sample. Parameter `rewards` of 05 also takes a function from your
own file: "my_rewards.py:center". Of the paper we had the abstracts, without a formula; the form is
MG-Thinker's.
"""

import re
from collections.abc import Callable

from mig_kit.boxes import BoxFormat, iou
from mig_kit.prompts import parse_reply, reply_boxes_in_original
from mig_kit.sample import Sample

Reward = Callable[[str, Sample, BoxFormat], float | None]
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def reply_iou(reply: str, sample: Sample, box_format: BoxFormat) -> float:
    """IoU of the reply's box with the nearest target in the image that it names, else 0."""
    return max((iou(box, target.box)
                for image, box in reply_boxes_in_original(sample, reply, box_format)
                for target in sample.targets if target.image == image), default=0.0)


def names_image(reply: str, sample: Sample) -> bool:
    """Whether the reply names an image with a target."""
    return parse_reply(reply).image in {target.image for target in sample.targets}


def names_letter(reply: str, sample: Sample) -> bool:
    """Whether the reply to a multiple-choice sample gives the correct letter."""
    return bool(sample.letter) and parse_reply(reply).letter == sample.letter


def format_reward(reply: str, sample: Sample, box_format: BoxFormat) -> float:
    """1 if the reply is well formed, else 0.25 per tag that occurs exactly once, at most 0.75."""
    paired = sum(reply.count(tag) == 1 for tag in TAGS) / len(TAGS)
    return 1.0 if parse_reply(reply).well_formed else min(paired, 0.75)


def image_reward(reply: str, sample: Sample, box_format: BoxFormat) -> float | None:
    """1 if the reply names an image with a target, else 0; None for multiple choice."""
    return None if sample.options else float(names_image(reply, sample))


def choice_reward(reply: str, sample: Sample, box_format: BoxFormat) -> float | None:
    """1 if the reply gives the correct letter, else 0; None unless it is multiple choice."""
    return float(names_letter(reply, sample)) if sample.options else None


def box_reward(reply: str, sample: Sample, box_format: BoxFormat,
               floor: float = 0.1) -> float | None:
    """`reply_iou`, or 0 below `floor`; None for multiple choice."""
    if sample.options:
        return None
    # The IoU tells good boxes from better ones; MG-Thinker steps to 1 at IoU 0.9.
    overlap = reply_iou(reply, sample, box_format)
    return overlap if overlap >= floor else 0.0


# The name by which `rewards` of 05 chooses a reward, and under which it is logged. A reward of 0
# means that nothing was earned: warnings rely on it.
REWARDS: dict[str, Reward] = {
    "format": format_reward, "image": image_reward, "box": box_reward, "choice": choice_reward}


def cites_only_existing_images(reply: str, sample: Sample) -> bool:
    """Whether every "image k" in the reasoning is an image of the prompt."""
    cited = re.findall(r"\bimage (\d{1,3})\b", parse_reply(reply).thinking, re.IGNORECASE)
    return all(1 <= int(number) <= len(sample.images) for number in cited)


def is_correct(reply: str, sample: Sample, box_format: BoxFormat, threshold: float = 0.5) -> bool:
    """Whether a reply is correct, by what its sample asks for.

    A box must be in the right image with IoU >= threshold; a letter must be the right one; if
    nothing in the images answers, as in some MC-Bench-like questions, the reply must say so.
    """
    if sample.options:
        return names_letter(reply, sample)
    if not sample.targets:
        return parse_reply(reply).names_none
    return reply_iou(reply, sample, box_format) >= threshold
