"""Rule-based rewards: format, image, box and choice.

A reward is a function of an answer (`prompts.Answer`, a reply that was read) and its sample; it
returns a number, or None if it does not apply to the sample. Parameter `rewards` of 05 also takes a
function from your own file: "my_rewards.py:center". Of the paper we had the abstracts, which name
no rewards; these are ours, after MG-Thinker's.
"""

import re
from collections.abc import Callable

from mig_kit.boxes import iou
from mig_kit.prompts import Answer
from mig_kit.sample import Sample

Reward = Callable[[Answer, Sample], float | None]
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


def reply_iou(answer: Answer, sample: Sample) -> float:
    """IoU of the answer's box with the nearest target in the image that it names, else 0."""
    return max((iou(answer.box, target.box) for target in sample.targets
                if answer.box and target.image == answer.image), default=0.0)


def names_image(answer: Answer, sample: Sample) -> bool:
    """Whether the answer names an image with a target."""
    return answer.image in {target.image for target in sample.targets}


def names_letter(answer: Answer, sample: Sample) -> bool:
    """Whether the answer to a multiple-choice sample gives the correct letter."""
    return bool(sample.letter) and answer.letter == sample.letter


def format_reward(answer: Answer, sample: Sample) -> float:
    """1 if the reply is well formed, else 0.25 per tag that occurs exactly once, at most 0.75."""
    paired = sum(answer.text.count(tag) == 1 for tag in TAGS) / len(TAGS)
    return 1.0 if answer.well_formed else min(paired, 0.75)


def image_reward(answer: Answer, sample: Sample) -> float | None:
    """1 if the answer names an image with a target, else 0; None for multiple choice."""
    return None if sample.options else float(names_image(answer, sample))


def choice_reward(answer: Answer, sample: Sample) -> float | None:
    """1 if the answer gives the correct letter, else 0; None unless it is multiple choice."""
    return float(names_letter(answer, sample)) if sample.options else None


def box_reward(answer: Answer, sample: Sample, floor: float = 0.1) -> float | None:
    """`reply_iou`, or 0 below `floor`; None for multiple choice."""
    if sample.options:
        return None
    # The IoU tells good boxes from better ones; MG-Thinker steps to 1 at IoU 0.9.
    overlap = reply_iou(answer, sample)
    return overlap if overlap >= floor else 0.0


# The name by which `rewards` of 05 chooses a reward, and under which it is logged. A reward of 0
# means that nothing was earned: warnings rely on it.
REWARDS: dict[str, Reward] = {
    "format": format_reward, "image": image_reward, "box": box_reward, "choice": choice_reward}


def cites_only_existing_images(answer: Answer, sample: Sample) -> bool:
    """Whether every "image k" in the reasoning is an image of the prompt."""
    cited = re.findall(r"\bimage (\d{1,3})\b", answer.thinking, re.IGNORECASE)
    return all(1 <= int(number) <= len(sample.images) for number in cited)


def is_correct(answer: Answer, sample: Sample, threshold: float = 0.5) -> bool:
    """Whether an answer is correct, by what its sample asks for.

    A box must be in the right image with IoU >= threshold; a letter must be the right one; if
    nothing in the images answers, as in some MC-Bench-like questions, the reply must say so.
    """
    if sample.options:
        return names_letter(answer, sample)
    if not sample.targets:
        return answer.names_none
    return reply_iou(answer, sample) >= threshold
