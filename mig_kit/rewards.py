"""Rule-based rewards: format, image, box and choice, and other box terms to choose.

A reward is a function of a reply, its sample and the model's box format; it gives a number, or None
where it does not apply to the sample. A function of that form in a file of your own is chosen in
the same way, by the parameter `rewards` of 05: "my_rewards.py:center".

The paper names its rewards but publishes no formula. The form is MG-Thinker's, the nearest
published one: the format reward counts correctly paired tags, the image reward is 0 or 1 and gates
the box reward. Our choice: the box reward is the IoU itself from `floor` up (MG-Thinker steps to 1
at IoU 0.9), because the IoU tells good boxes from better ones.
"""

import re
from collections.abc import Callable

from mig_kit.boxes import BoxFormat, giou, iou, to_original_box
from mig_kit.prompts import parse_reply, reply_box_in_original
from mig_kit.sample import Sample, best_iou

Reward = Callable[[str, Sample, BoxFormat], float | None]
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def reply_iou(reply: str, sample: Sample, box_format: BoxFormat) -> float:
    """IoU of the reply's box with the target in the image that the reply names; 0 without a box or
    in the wrong image.

    box_format: says in which coordinates the reply's box is written.
    """
    answer = parse_reply(reply)
    box = reply_box_in_original(sample, answer, box_format)
    return 0.0 if box is None else best_iou(sample, answer.image, box)


def names_target_image(reply: str, sample: Sample) -> bool:
    """Whether the reply names an image that holds a target."""
    return parse_reply(reply).image in {target.image for target in sample.targets}


def names_letter(reply: str, sample: Sample) -> bool:
    """Whether the reply to a multiple-choice sample gives the correct letter."""
    return bool(sample.letter) and parse_reply(reply).letter == sample.letter


def reply_success(reply: str, sample: Sample, box_format: BoxFormat) -> float:
    """How well the reply answers, 0..1: its IoU; for multiple choice whether its letter is correct;
    where nothing in the images answers, whether it says so.
    """
    if sample.options:
        return float(names_letter(reply, sample))
    if not sample.targets:
        return float(parse_reply(reply).names_none)
    return reply_iou(reply, sample, box_format)


def format_reward(reply: str, sample: Sample, box_format: BoxFormat) -> float:
    """1 if the whole reply is well formed; else 0.25 for each tag that occurs exactly once, at most
    0.75.
    """
    paired = sum(reply.count(tag) == 1 for tag in TAGS) / len(TAGS)
    return 1.0 if parse_reply(reply).well_formed else min(paired, 0.75)


def image_reward(reply: str, sample: Sample, box_format: BoxFormat) -> float | None:
    """1 if the reply names an image that holds a target, else 0; None for multiple choice."""
    return None if sample.options else float(names_target_image(reply, sample))


def choice_reward(reply: str, sample: Sample, box_format: BoxFormat) -> float | None:
    """1 if the reply gives the correct letter, else 0; None but for multiple choice."""
    return float(names_letter(reply, sample)) if sample.options else None


def box_reward(reply: str, sample: Sample, box_format: BoxFormat,
               floor: float = 0.1) -> float | None:
    """`reply_iou`, 0 below `floor`; None for multiple choice, as every box term."""
    if sample.options:
        return None
    overlap = reply_iou(reply, sample, box_format)
    return overlap if overlap >= floor else 0.0


def box_step_reward(reply: str, sample: Sample, box_format: BoxFormat) -> float | None:
    """1 from IoU 0.5 up, else 0: what 06 counts as correct."""
    if sample.options:
        return None
    return float(reply_iou(reply, sample, box_format) >= 0.5)


def box_mg_thinker_reward(reply: str, sample: Sample, box_format: BoxFormat) -> float | None:
    """MG-Thinker's box term: 1 from IoU 0.9 up, the IoU itself from 0.1 up, else 0.

    Published are the steps, the gate by the image and a plain sum with format and image. Ours: that
    0.1 and 0.9 belong to the upper step, and `reward_weights` in place of the plain sum.
    """
    overlap = box_reward(reply, sample, box_format, floor=0.1)
    return 1.0 if overlap is not None and overlap >= 0.9 else overlap


def box_squared_reward(reply: str, sample: Sample, box_format: BoxFormat) -> float | None:
    """IoU squared: the better the box, the more a further improvement earns."""
    return None if sample.options else reply_iou(reply, sample, box_format) ** 2


def box_giou_reward(reply: str, sample: Sample, box_format: BoxFormat) -> float | None:
    """(1 + GIoU) / 2 with the nearest target in the image that the reply names, so 0..1; two
    boxes side by side that fill their enclosing box get 0.5, distant ones less. 0 in the wrong
    image.
    """
    if sample.options:
        return None
    answer = parse_reply(reply)
    box = reply_box_in_original(sample, answer, box_format)
    if box is None:
        return 0.0
    values = ((1 + giou(box, target.box)) / 2 for target in sample.targets
              if target.image == answer.image)
    return max(values, default=0.0)


def box_ungated_reward(reply: str, sample: Sample, box_format: BoxFormat,
                       floor: float = 0.1) -> float | None:
    """As `box_reward` without the gate: the best IoU with any target, in whatever image the reply
    says that its box is.
    """
    if sample.options:
        return None
    box = parse_reply(reply).box
    if box is None:
        return 0.0
    overlaps = (iou(to_original_box(box, sample.sizes[target.image - 1], box_format), target.box)
                for target in sample.targets)
    overlap = max(overlaps, default=0.0)
    return overlap if overlap >= floor else 0.0


# the name by which `rewards` of 05 chooses a reward, and under which it is logged
REWARDS: dict[str, Reward] = {
    "format": format_reward, "image": image_reward, "box": box_reward, "choice": choice_reward,
    "box_step": box_step_reward, "box_mg_thinker": box_mg_thinker_reward,
    "box_squared": box_squared_reward, "box_giou": box_giou_reward,
    "box_ungated": box_ungated_reward}


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
    return reply_success(reply, sample, box_format) >= threshold
