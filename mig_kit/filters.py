"""Stage 01, the filter: which traces may teach.

Every trace passes `drop_reason`. A model teacher's traces also pass `drop_reason_of_model_teacher`,
with the criteria of MG-Thinker (arXiv 2609.37374, section 3.2) and patterns of our own.
"""

import re

from mig_kit.boxes import BoxFormat, iou, rescale_box, to_model_box
from mig_kit.prompts import parse_reply, read_reply
from mig_kit.rewards import names_image, reply_iou
from mig_kit.sample import Sample, Trace

DROP_REASONS = ("format", "image", "box", "choice", "leak")

CONCLUDES = re.compile(
    r"\b(?:answer|target|object asked for|box)\b[^.]{0,60}\b(?:is|are|lies|sits)\b[^.]{0,60}"
    r"(?:\bimage\s*#?\d|\b(?:first|second|third|fourth|fifth|sixth|last)\s+image\b|[(\[]\s*\d)"
    r"|^\W*(?:therefore|thus|hence|in conclusion)\b"
    r"|\b(?:the|final|correct)\s+answer\s+is\b", re.IGNORECASE)
MENTIONS_GIVEN_ANSWER = re.compile(
    r"\b(?:ground[\s-]?truth|(?:verified|given|provided|supplied|reference) answer"
    r"|answer (?:was |is )?(?:given|provided))\b", re.IGNORECASE)
NUMBER = re.compile(r"(?<![A-Za-z0-9.])[0-9]{1,5}(?:\.[0-9]{1,6})?(?![0-9])")
BETWEEN_NUMBERS = re.compile(
    r"[^A-Za-z0-9]{1,6}(?:(?:[xy][12]?|left|top|right|bottom)[^A-Za-z0-9]{0,6})?", re.IGNORECASE)
BRACKETED_BOX = re.compile(r"\[\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\]")
OPTION_LETTER = re.compile(r"(?:^|\s)\(?[A-H][.)](?:\s|$)")


def drop_reason(reply: str, sample: Sample, box_format: BoxFormat) -> str:
    """"" if the reply may teach, else the first of DROP_REASONS that speaks against it.

    "box" means an IoU below 0.5 with the target.
    """
    answer = read_reply(reply, sample, box_format)
    if not answer.states(sample.options) or not answer.well_formed:
        return "format"
    if sample.options:
        if answer.letter != sample.letter:
            return "choice"
        return "leak" if OPTION_LETTER.search(answer.thinking) else ""
    if not names_image(answer, sample):
        return "image"
    if reply_iou(answer, sample) < 0.5:
        return "box"
    return "leak" if contains_target_box(answer.thinking, sample, box_format) else ""


def drop_reason_of_model_teacher(trace: Trace, sample: Sample, box_format: BoxFormat) -> str:
    """"" if a model teacher's trace may teach, else one of DROP_REASONS, "no reply", "up front" or
    "reveals".
    """
    if trace.error:
        return "no reply"
    if reason := drop_reason(trace.text, sample, box_format):
        return reason
    thinking = parse_reply(trace.text).thinking
    if concludes_up_front(thinking):
        return "up front"
    return "reveals" if reveals_answer(thinking, sample, box_format) else ""


def contains_target_box(thinking: str, sample: Sample, box_format: BoxFormat) -> bool:
    """Whether a bracketed box, in the model's coordinates, meets a target with IoU >= 0.5."""
    boxes = [tuple(map(float, numbers)) for numbers in BRACKETED_BOX.findall(thinking)]
    targets = [to_model_box(target.box, sample.sizes[target.image - 1], box_format)
               for target in sample.targets]
    return any(iou(box, target) >= 0.5 for box in boxes for target in targets)


def concludes_up_front(thinking: str) -> bool:
    """Whether the first sentence already names the answer or its image, or concludes."""
    first_sentence = re.split(r"(?<=[.!?])\s|\n", thinking.strip(), maxsplit=1)[0]
    return bool(CONCLUDES.search(first_sentence))


def reveals_answer(thinking: str, sample: Sample, box_format: BoxFormat) -> bool:
    """Whether the reasoning mentions a given answer, or has four numbers that meet a target (IoU >=
    0.5) in the model's coordinates, 0 to 1, 0 to 1000 or original pixels.
    """
    if MENTIONS_GIVEN_ANSWER.search(thinking):
        return True
    numbers = list(NUMBER.finditer(thinking))
    for four in zip(numbers, numbers[1:], numbers[2:], numbers[3:]):
        if not all(BETWEEN_NUMBERS.fullmatch(thinking, a.end(), b.start())
                   for a, b in zip(four, four[1:])):
            continue
        box = tuple(float(number.group()) for number in four)
        for target in sample.targets:
            size = sample.sizes[target.image - 1]
            forms = (target.box, to_model_box(target.box, size, box_format),
                     rescale_box(target.box, size, (1000, 1000)),
                     rescale_box(target.box, size, (1, 1)))
            if any(iou(box, form) >= 0.5 for form in forms):
                return True
    return False
